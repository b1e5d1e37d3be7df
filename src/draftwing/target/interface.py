"""What a model is called here, and what its class and configuration must offer to be run over token trees."""

import inspect
from typing import Any, Literal

from transformers import PreTrainedModel

ATTENTION = "draftwing"
"""The name of our attention among transformers' implementations."""
Role = Literal["target", "draft"]
"""What a model is here: the first word of messages about it."""
TREE_ATTENTIONS = (ATTENTION, "sdpa", "eager")
LENGTH_DEPENDENT_ROPE = frozenset(("dynamic", "longrope"))


def check_interface(model: PreTrainedModel, role: Role) -> None:
    """Raise a ValueError of one line for a model that takes no tree; what its passes show, TargetModel looks at."""
    name, config = type(model).__name__, model.config.get_text_config()
    if getattr(model, "_is_stateful", False):
        raise ValueError(f"{role}: {name} keeps a recurrent state, which cannot be rolled back after a rejected draft")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{role}: {name} takes no position_ids, so tree nodes cannot be placed")
    for rope_type in LENGTH_DEPENDENT_ROPE & _rope_types(config):
        raise ValueError(
            f"{role}: {name} has {rope_type!r} positions, which depend on the longest row of a pass, so its "
            "tokens would depend on the tree and the batch"
        )
    if getattr(config, "alibi", False):
        raise ValueError(f"{role}: {name} has alibi position biases, which do not follow a tree's positions")
    if "local" in getattr(config, "attention_layers", ()):
        raise ValueError(f"{role}: {name} has local attention layers that count slots instead of positions")
    attention = model.config._attn_implementation
    if attention == ATTENTION and not (model._supports_attention_backend or model._supports_sdpa):
        raise ValueError(f"{role}: {name} has its own attention; load it with attn_implementation='eager'")
    if attention not in TREE_ATTENTIONS:
        raise ValueError(
            f"{role}: {name} has attn_implementation {attention!r}, which cannot take a tree mask; load it "
            f"with one of {TREE_ATTENTIONS}"
        )


def _rope_types(config: Any) -> set[str]:
    """The RoPE types of a model's layers; its parameters are one mapping, or one per layer type."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    mappings = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {str(mapping.get("rope_type", mapping.get("type"))) for mapping in mappings}
