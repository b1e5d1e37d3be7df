"""The EAGLE-1/2 draft network (arXiv 2401.15077, section 3.1): predicts the target's next last-layer feature.

Slot t reads the target's feature f_t and the embedding of token x_{t+1}; its output estimates f_{t+1}, which the
target's own head turns into the distribution of x_{t+2}.
"""

from collections.abc import Callable

import torch
from torch import nn

from draftwing.layers import Attend, DecoderLayer, DraftConfig, DraftVocab
from draftwing.rotary import Rotary


class EagleModel(nn.Module):
    """One Llama layer over `fc([embedding; feature])`.

    `target_head` is the target's output head, shared and not stored; `embed_tokens` is the head's own copy, as in the
    published files.
    """

    def __init__(self, config: DraftConfig, target_head: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.config = config
        self.vocab = DraftVocab(None, config.vocab_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.fc_bias)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, input_norm=layer > 0) for layer in range(config.num_hidden_layers)
        )
        self.rotary = Rotary(config.head_dim, config.rope_parameters, config.max_position_embeddings)
        self._target_head = (target_head,)  # in a tuple, so that it is no submodule of ours

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype, packed ones' too."""
        return self.rotary.cos.dtype

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """The draft's state from target features: here the features themselves, `[..., D]`."""
        return features

    def forward(
        self, hidden: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """`hidden [B, N, D]` at slots t, `tokens [B, N]` one step ahead -> predicted features `[B, N, D]`."""
        x: torch.Tensor = self.fc(torch.cat((self.embed_tokens(tokens).to(hidden.dtype), hidden), dim=-1))
        rotation = self.rotary(positions)
        for layer in self.layers:
            x = layer(x, rotation, attend)
        return x

    def feed_back(self, output: torch.Tensor) -> torch.Tensor:
        """The state that the next draft step reads."""
        return output

    def readout(self, output: torch.Tensor) -> torch.Tensor:
        """What the output head reads of the output of `forward`."""
        return output

    def logits(self, output: torch.Tensor) -> torch.Tensor:
        """Draft logits `[..., V]` from the output of `forward`."""
        return self._target_head[0](output)
