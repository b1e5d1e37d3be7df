"""Rows to token ids and exact loss masks: a chat template's assistant turns, or all of a plain text.

The mask comes from character offsets of the rendered conversation, so it is right for any chat template that is
prefix-stable (rendering fewer turns gives a prefix of rendering more); others are refused.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from draftwing.data.corpus import Row


@dataclass(frozen=True)
class Example:
    """One tokenised sample: `input_ids [S]` (int64) and `loss_mask [S]` (bool, True on tokens the model should say)."""

    input_ids: torch.Tensor
    loss_mask: torch.Tensor

    def __len__(self) -> int:
        return self.input_ids.numel()


def encode_row(row: Row, tokenizer: PreTrainedTokenizerFast) -> Example:
    """Tokenise one row.

    Raises:
        ValueError: the row has none of the known fields, or its chat template is not prefix-stable.
    """
    if "input_ids" in row:
        input_ids = torch.tensor(row["input_ids"], dtype=torch.int64)
        mask = row.get("loss_mask", [True] * len(input_ids))
        if len(mask) != len(input_ids):
            raise ValueError(f"loss_mask: expected {len(input_ids)} entries as in input_ids, got {len(mask)}")
        return Example(input_ids, torch.tensor(mask, dtype=torch.bool))
    if "text" in row:
        ids = tokenizer(row["text"], add_special_tokens=True)["input_ids"]
        return Example(torch.tensor(ids, dtype=torch.int64), torch.ones(len(ids), dtype=torch.bool))
    return _encode_conversation(conversation(row), tokenizer)


def conversation(row: Row) -> list[dict[str, str]]:
    """The messages of a chat row, in OpenAI's form; ShareGPT's `conversations` are translated."""
    if "messages" in row:
        messages: list[dict[str, str]] = row["messages"]
        return messages
    if "conversations" in row:
        roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
        for turn in row["conversations"]:
            if turn["from"] not in roles:
                raise ValueError(f"conversations: expected a speaker of {', '.join(roles)}, got {turn['from']!r}")
        return [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
    raise ValueError(f"row: expected one of messages, conversations, text, input_ids; got the fields {sorted(row)}")


def render(messages: list[dict[str, str]], tokenizer: Any, add_generation_prompt: bool = False) -> str:
    """The conversation as the text that the model reads."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    assert isinstance(text, str)
    return text


def _encode_conversation(messages: list[dict[str, str]], tokenizer: Any) -> Example:
    spans = []
    whole = render(messages, tokenizer)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(messages[:index], tokenizer, add_generation_prompt=True)
        through = render(messages[: index + 1], tokenizer)
        if not (whole.startswith(through) and through.startswith(before)):
            raise ValueError(f"chat_template: not prefix-stable at turn {index} ({message['content'][:40]!r})")
        # What the template writes after the end-of-turn token (a line break, often) is not the model's to say.
        spans.append((len(before), len(through.rstrip())))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    supervised = [any(a <= start and end <= b for a, b in spans) for start, end in encoded["offset_mapping"]]
    return Example(torch.tensor(encoded["input_ids"], dtype=torch.int64), torch.tensor(supervised, dtype=torch.bool))
