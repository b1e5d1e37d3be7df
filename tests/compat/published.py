"""Manifests of published heads: what their files hold, by name and shape, and what their config.json says.

Shapes follow the published files (EAGLE, SpecForge, Model-Optimizer and speculators); one manifest can be made at its
true size on the meta device, which takes no memory, or tiny with numbers in it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Sizes:
    """The sizes that a head's shapes follow from."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    draft_vocab: int = 0
    target_hidden: int = 0

    def values(self) -> dict[str, Any]:
        """The keys that every config.json has."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "model_type": "llama",
            "hidden_act": "silu",
            "num_hidden_layers": 1,
            "tie_word_embeddings": False,
        }


LLAMA_8B = Sizes(4096, 14336, 32, 8, 128, 128256, 32000, 4096)
LLAMA_70B = Sizes(8192, 28672, 64, 8, 128, 128256, 32000, 8192)
VICUNA_7B = Sizes(4096, 11008, 32, 32, 128, 32000, 32000, 4096)
VICUNA_13B = Sizes(5120, 13824, 40, 40, 128, 32000, 32000, 5120)
QWEN3_32B = Sizes(5120, 25600, 64, 8, 128, 151936, 32000, 5120)  # heads of 128, not 5120 / 64
NARROW = Sizes(2048, 6144, 32, 4, 128, 151936, 32000, 5120)
TINY = Sizes(32, 48, 4, 2, 8, 64, 48, 32)
"""For the target of tests/conftest.py."""


def layer_shapes(sizes: Sizes, prefix: str, input_size: int) -> Shapes:
    query, key = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    return {
        f"{prefix}.self_attn.q_proj.weight": (query, input_size),
        f"{prefix}.self_attn.k_proj.weight": (key, input_size),
        f"{prefix}.self_attn.v_proj.weight": (key, input_size),
        f"{prefix}.self_attn.o_proj.weight": (sizes.hidden, query),
        f"{prefix}.mlp.gate_proj.weight": (sizes.intermediate, sizes.hidden),
        f"{prefix}.mlp.up_proj.weight": (sizes.intermediate, sizes.hidden),
        f"{prefix}.mlp.down_proj.weight": (sizes.hidden, sizes.intermediate),
        f"{prefix}.post_attention_layernorm.weight": (sizes.hidden,),
    }


def eagle1_shapes(sizes: Sizes, fc_bias: bool = False) -> Shapes:
    """No input norm, no final norm, no output head; the embedding is inside."""
    shapes: Shapes = {
        "embed_tokens.weight": (sizes.vocab, sizes.hidden),
        "fc.weight": (sizes.hidden, 2 * sizes.hidden),
        **layer_shapes(sizes, "layers.0", sizes.hidden),
    }
    return shapes | ({"fc.bias": (sizes.hidden,)} if fc_bias else {})


def eagle3_shapes(sizes: Sizes, prefix: str = "midlayer", vocab_maps: tuple[str, ...] = ("d2t", "t2d")) -> Shapes:
    """The 15 tensors of a published EAGLE-3 file; attention reads twice the hidden size."""
    shapes: Shapes = {
        "fc.weight": (sizes.hidden, 3 * sizes.target_hidden),
        f"{prefix}.hidden_norm.weight": (sizes.hidden,),
        f"{prefix}.input_layernorm.weight": (sizes.hidden,),
        **layer_shapes(sizes, prefix, 2 * sizes.hidden),
        "norm.weight": (sizes.hidden,),
        "lm_head.weight": (sizes.draft_vocab, sizes.hidden),
        "d2t": (sizes.draft_vocab,),
        "t2d": (sizes.vocab,),
    }
    return {name: shape for name, shape in shapes.items() if name not in ("d2t", "t2d") or name in vocab_maps}


def on_meta(shapes: Shapes) -> dict[str, torch.Tensor]:
    """Tensors that have a shape and no memory."""
    dtypes = {"d2t": torch.int64, "t2d": torch.bool}
    return {
        name: torch.empty(shape, dtype=dtypes.get(name, torch.float16), device="meta") for name, shape in shapes.items()
    }


def random_tensors(shapes: Shapes, target_ids: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Tensors with numbers in them: normal weights in float64, norms around 1, and the two vocabulary maps."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in sorted(shapes.items()):
        if name not in ("d2t", "t2d"):
            noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            tensors[name] = noise / shape[-1] ** 0.5 if len(shape) > 1 else 1 + 0.1 * noise
    if "d2t" in shapes:
        (num_draft,) = shapes["d2t"]
        ids = torch.arange(num_draft) if target_ids is None else target_ids
        tensors["d2t"] = ids - torch.arange(num_draft)
        if "t2d" in shapes:
            tensors["t2d"] = torch.zeros(shapes["t2d"], dtype=torch.bool)
            tensors["t2d"][ids] = True
    return tensors


def speculators_values(values: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """A speculators config.json around a layer's values."""
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.5.0",
        "transformer_layer_config": dict(values),
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "verifier": {"name_or_path": "org/target", "architectures": ["LlamaForCausalLM"]},
        },
        **options,
    }
