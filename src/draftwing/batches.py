"""Prompts as users of transformers hold them: padded batches, lists of ids, a tokenizer's encodings."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from draftwing.config import check_keys

Prompts = torch.Tensor | Sequence[int] | Sequence[Sequence[int]] | Mapping[str, Any]
"""Token ids as tensors or lists, or a tokenizer's encoding of them."""


def read_prompts(input_ids: Prompts, attention_mask: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Prompts and their mask as tensors `[B, S]`, from whatever `generate` takes.

    Raises:
        ValueError: neither token ids nor an encoding of nothing but ids and their mask.
    """
    if isinstance(input_ids, Mapping):
        check_keys(input_ids, ("input_ids", "attention_mask"))
        if "input_ids" not in input_ids:
            raise ValueError("input_ids: missing from what was given")
        attention_mask = input_ids.get("attention_mask") if attention_mask is None else attention_mask
        input_ids = input_ids["input_ids"]
    ids = _as_rows("input_ids", input_ids)
    if (ids.is_floating_point() and ids.numel()) or ids.dtype == torch.bool:
        raise ValueError(f"input_ids: expected token ids [B, S], got {ids.dtype}")
    return ids, None if attention_mask is None else _as_rows("attention_mask", attention_mask)


def _as_rows(name: str, values: Any) -> torch.Tensor:
    """Values `[B, S]`, or `[S]` as one row."""
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}: expected numbers in rows of one length [B, S], got {values!r}") from None
    if tensor.ndim not in (1, 2):
        raise ValueError(f"{name}: expected shape [B, S], got {list(tensor.shape)}")
    return tensor if tensor.ndim == 2 else tensor[None]


def unpad(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[list[int]]:
    """The prompts of a padded batch `[B, S]` as lists of ids; the mask's zeros are dropped."""
    if attention_mask is None:
        rows: list[list[int]] = input_ids.tolist()
        return rows
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: expected shape {list(input_ids.shape)} as input_ids, got {list(attention_mask.shape)}"
        )
    return [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]


def append_padded(input_ids: torch.Tensor, rows: list[list[int]], pad_token_id: int) -> torch.Tensor:
    """`input_ids [B, S]` followed by each row's new tokens, padded on the right to one length."""
    longest = max(map(len, rows))
    new = [row + [pad_token_id] * (longest - len(row)) for row in rows]
    return torch.cat((input_ids, torch.tensor(new, device=input_ids.device)), dim=1)
