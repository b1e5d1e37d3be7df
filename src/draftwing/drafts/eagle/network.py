"""The EAGLE draft networks: of EAGLE-1/2 (arXiv 2401.15077, section 3.1) and EAGLE-3 (arXiv 2503.01840, section 3.1).

Slot t reads what the target knows at t and the embedding of token x_{t+1}. EAGLE-1 reads the target's last feature f_t
and estimates f_{t+1}, which the target's own head turns into the distribution of x_{t+2}. EAGLE-3 reads g_t, fused
from three of the target's layers, and predicts x_{t+2} directly, over a draft vocabulary. What a slot gives is fed
back as the next slot's state.
"""

from collections.abc import Callable

import torch
from torch import nn

from draftwing.layers import MLP, Attend, Attention, DecoderLayer, DraftConfig, DraftVocab, RMSNorm
from draftwing.rotary import Rotary, Rotation
from draftwing.target.native_layers import NativeDraft, NativePass

Shared = Callable[[torch.Tensor], torch.Tensor]
"""A module of the target's that is shared and not stored."""


class DraftNetwork(nn.Module):
    """What both kinds have in common.

    The target's embedding is shared and not stored, unless a head has one of its own (as it must when it is narrower
    than the target). So is the target's output head, where the configuration says that the head has none.
    """

    _embed: tuple[Shared]
    native: NativeDraft | None = None
    """The same in C, of a head that is packed for a CPU (fused_layers.py)."""

    def __init__(self, config: DraftConfig, vocab: DraftVocab, target_head: Shared) -> None:
        super().__init__()
        self.config, self.vocab = config, vocab
        self.rotary = Rotary(config.head_dim, config.rope_parameters, config.max_position_embeddings)
        self._target_head = (target_head,)  # in a tuple, so that it is no submodule of ours

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype, packed ones' too."""
        return self.rotary.cos.dtype

    def take_embedding(self, target_embedding: Shared, own_embedding: bool) -> None:
        """Read the target's embedding, or make one of the head's own.

        Called where that has its place among the parameters, which is part of checkpoints.
        """
        if own_embedding:
            self.embed_tokens = nn.Embedding(self.config.vocab_size, self.config.hidden_size)
        self._embed = (self.embed_tokens if own_embedding else target_embedding,)

    @property
    def embedding(self) -> Shared:
        """The target's, or the head's own."""
        return self._embed[0]

    def embed(self, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The embeddings `[B, N, D]` of `tokens [B, N]`."""
        return self.embedding(tokens).to(dtype)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """The draft's state `[..., D]` from target features `[..., F]`; by default these themselves."""
        return features

    def feed_back(self, output: torch.Tensor) -> torch.Tensor:
        """The state that the next draft step reads, from the output of `forward`."""
        return output

    def readout(self, output: torch.Tensor) -> torch.Tensor:
        """What the output head reads of the output of `forward`."""
        return output

    @property
    def output_head(self) -> Shared:
        """From `readout` to logits."""
        return self._target_head[0]

    def logits(self, output: torch.Tensor) -> torch.Tensor:
        """Draft logits `[..., Vd]` from the output of `forward`."""
        logits = None if self.native is None else self.native.logits(output)
        return self.output_head(self.readout(output)) if logits is None else logits

    def forward(
        self, hidden: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """`hidden [B, N, D]` at slots t, `tokens [B, N]` one step ahead -> outputs `[B, N, D]`, before any norm."""
        if self.native is not None:
            nodes = NativePass.of(self.rotary.cos, self.rotary.sin, attend, positions)
            if nodes is not None:
                return self.native.run(nodes, hidden, tokens)
        return self.run(hidden, tokens, self.rotary(positions), attend)

    def run(self, hidden: torch.Tensor, tokens: torch.Tensor, rotation: Rotation, attend: Attend) -> torch.Tensor:
        """The network itself."""
        raise NotImplementedError


class EagleModel(DraftNetwork):
    """EAGLE-1/2: Llama layers over `fc([embedding; feature])`."""

    def __init__(
        self, config: DraftConfig, target_embedding: Shared, target_head: Shared, own_embedding: bool = False
    ) -> None:
        super().__init__(config, DraftVocab(None, config.vocab_size), target_head)
        self.take_embedding(target_embedding, own_embedding)
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.fc_bias)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, input_norm=layer > 0) for layer in range(config.num_hidden_layers)
        )

    @torch.no_grad()
    def start_from(self, weight: torch.Tensor) -> None:
        """Make `fc` the linear map `weight [D, 2 * D]`, to which the layers add nothing yet."""
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            for parameter in (*layer.self_attn.o_proj.parameters(), *layer.mlp.down_proj.parameters()):
                parameter.zero_()
        for parameter in self.fc.parameters():
            parameter.zero_()
        self.fc.weight.copy_(weight)

    def fc_inputs(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """What `fc` reads, `[B, N, 2 * D]`; the arguments are those of `forward`."""
        return torch.cat((self.embed(tokens, hidden.dtype), hidden), dim=-1)

    def run(self, hidden: torch.Tensor, tokens: torch.Tensor, rotation: Rotation, attend: Attend) -> torch.Tensor:
        """The predicted features."""
        x: torch.Tensor = self.fc(self.fc_inputs(hidden, tokens))
        for layer in self.layers:
            x = layer(x, rotation, attend)
        return x


class Eagle3Layer(nn.Module):
    """A decoder layer whose attention reads `[norm(embedding); norm(state)]` and whose residual is the state."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config, 2 * config.hidden_size, layer=0)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm_before_residual = config.norm_before_residual

    def forward(
        self, embedding: torch.Tensor, hidden: torch.Tensor, rotation: Rotation, attend: Attend
    ) -> torch.Tensor:
        normed = self.hidden_norm(hidden)
        residual = normed if self.norm_before_residual else hidden
        x = torch.cat((self.input_layernorm(embedding), normed), dim=-1)
        x = residual + self.self_attn(x, rotation, attend)
        output: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return output


class Eagle3Model(DraftNetwork):
    """EAGLE-3: fusion, layers, norm and output head, with the options of 3.1 and of speculators."""

    def __init__(
        self,
        config: DraftConfig,
        vocab: DraftVocab,
        target_embedding: Shared,
        target_head: Shared,
        own_embedding: bool = False,
    ) -> None:
        super().__init__(config, vocab, target_head)
        num_features = len(config.aux_layers) * config.target_hidden_size
        if config.has_fc:
            self.fc = nn.Linear(num_features, config.hidden_size, bias=config.fc_bias)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(
                RMSNorm(config.target_hidden_size, config.rms_norm_eps) for _ in config.aux_layers
            )
        if config.norm_before_fc:
            self.input_norm = RMSNorm(num_features, config.rms_norm_eps)
        self.midlayer = Eagle3Layer(config)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(1, config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.own_lm_head:
            self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.take_embedding(target_embedding, own_embedding)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Of target features (low; mid; high), normed if the options say so."""
        if self.config.fc_norm:
            parts = features.split(self.config.target_hidden_size, dim=-1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        if self.config.norm_before_fc:
            features = self.input_norm(features)
        return self.fc(features) if self.config.has_fc else features

    def run(self, hidden: torch.Tensor, tokens: torch.Tensor, rotation: Rotation, attend: Attend) -> torch.Tensor:
        """The outputs before the norm."""
        x: torch.Tensor = self.midlayer(self.embed(tokens, hidden.dtype), hidden, rotation, attend)
        for layer in self.layers:
            x = layer(x, rotation, attend)
        return x

    def feed_back(self, output: torch.Tensor) -> torch.Tensor:
        """The raw output, or the normed one (EAGLE-3.1)."""
        return self.readout(output) if self.config.norm_output else output

    def readout(self, output: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.norm(output)
        return normed

    @property
    def output_head(self) -> Shared:
        return self.lm_head if self.config.own_lm_head else self._target_head[0]
