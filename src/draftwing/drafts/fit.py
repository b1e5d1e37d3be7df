"""Whether what a file holds is complete and fits its target: one sentence for each problem."""

from typing import Any

import torch

from draftwing.drafts.eagle.formats import HeadFile, TargetSizes, Tensors
from draftwing.drafts.medusa.network import MedusaConfig

BROKEN = "holds NaN or infinity"


def tensor_problems(expected: dict[str, torch.Size], tensors: Tensors) -> list[str]:
    """One sentence for each tensor that is missing, unknown or misshapen."""
    problems = [f"{name}: missing; expected shape {tuple(expected[name])}" for name in expected.keys() - tensors.keys()]
    problems += [
        f"{name}: unknown tensor of shape {tuple(tensors[name].shape)}" for name in tensors.keys() - expected.keys()
    ]
    for name in expected.keys() & tensors.keys():
        if tensors[name].shape != expected[name]:
            problems.append(f"{name}: expected shape {tuple(expected[name])}, got {tuple(tensors[name].shape)}")
    return sorted(problems)


def broken_tensors(tensors: Tensors) -> list[str]:
    """One sentence for each tensor with a number that is not finite."""
    broken = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not _is_finite(tensor)]
    return [f"{name}: {BROKEN}" for name in sorted(broken)]


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool((tensor if tensor.element_size() > 1 else tensor.float()).isfinite().all())  # float8 has no isfinite


def fit_problems(head: HeadFile, target: TargetSizes) -> list[str]:
    """One sentence for each way in which a head does not fit its target."""
    config, problems = head.config, []
    if config.target_hidden_size != target.hidden_size:
        problems.append(
            f"hidden_size: the head reads features of width {config.target_hidden_size}, "
            f"the target's have {target.hidden_size}"
        )
    if config.vocab_size != target.vocab_size:
        problems.append(
            f"vocab_size: the head was made for {config.vocab_size} tokens, the target has {target.vocab_size}"
        )
    if head.is_eagle3 and config.hidden_size != target.hidden_size and "embed_tokens.weight" not in head.tensors:
        problems.append(
            f"embed_tokens.weight: missing, and the target's embedding has width {target.hidden_size} instead of "
            f"the head's {config.hidden_size}"
        )
    if config.aux_layers and not -1 <= min(config.aux_layers) <= max(config.aux_layers) <= target.num_layers:
        problems.append(f"aux_layers: {config.aux_layers} go beyond the target's {target.num_layers} layers")
    if not config.has_fc and config.hidden_size != target.hidden_size:
        problems.append(
            f"fc.weight: missing, and the target's states have width {target.hidden_size} instead of "
            f"the head's {config.hidden_size}"
        )
    if not config.own_lm_head and config.hidden_size != target.hidden_size:
        problems.append(
            f"lm_head.weight: missing, and the target's output head reads width {target.hidden_size} "
            f"instead of the head's {config.hidden_size}"
        )
    if head.is_eagle3 and not config.aux_layers:
        problems.append("aux_layers: the file names none and the target has no default")
    return problems


def medusa_problems(config: MedusaConfig, target: TargetSizes) -> list[str]:
    """One sentence for each way in which Medusa heads do not fit their target."""
    problems = []
    if config.hidden_size != target.hidden_size:
        problems.append(
            f"hidden_size: the heads read features of width {config.hidden_size}, the target's have "
            f"{target.hidden_size}"
        )
    if config.vocab_size != target.vocab_size:
        problems.append(
            f"vocab_size: the heads were made for {config.vocab_size} tokens, the target has {target.vocab_size}"
        )
    return problems


def vocabulary_problems(draft_size: int, target_size: int, draft_tokenizer: Any, target_tokenizer: Any) -> list[str]:
    """Why a draft model's ids may not mean the target's tokens; tokenizers are None where unknown.

    Two models of one tokenizer may still differ in size, by how far their embeddings are padded.
    """
    if draft_tokenizer is None or target_tokenizer is None:
        if draft_size == target_size:
            return []
        return [
            f"vocab_size: the draft model has {draft_size} tokens and the target {target_size}, "
            "and without the tokenizers of both their ids cannot be compared"
        ]
    draft_ids, target_ids = draft_tokenizer.get_vocab(), target_tokenizer.get_vocab()
    differing = [token for token, draft_id in draft_ids.items() if target_ids.get(token, draft_id) != draft_id]
    if not differing:
        return []
    first = min(differing, key=draft_ids.__getitem__)
    return [
        f"vocab_size: the draft model (of {draft_size} tokens) and the target (of {target_size}) have different "
        f"tokenizers: {first!r} is {draft_ids[first]} in the one and {target_ids[first]} in the other"
    ]
