"""Rows to token ids and exact loss masks: a chat template's assistant turns, or all of a plain text.

The mask comes from character offsets of the rendered conversation, so it is right for any chat template. Where one
rewrites earlier turns (Qwen3's drops what was thought there), each answer is learnt in the text that the model saw.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from draftwing.data.corpus import Row

Message = dict[str, Any]
"""A turn as OpenAI's API has it: `role`, `content` (a string), and whatever the chat template reads beside them."""
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
SHOWN = 40
"""Characters shown of a text in an error."""


@dataclass(frozen=True)
class Example:
    """One tokenised sample: `input_ids [S]` (int64) and `loss_mask [S]` (bool, True on tokens the model should say).

    Several documents packed into one have `document_ids [S]` (int64, ascending from 0). Stored `features [S, F]` and
    `last_hidden [S, D]` (the input of the target's output head) spare the target's pass.
    """

    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    document_ids: torch.Tensor | None = None
    features: torch.Tensor | None = None
    last_hidden: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.input_ids.numel()


def cut(example: Example, length: int) -> list[Example]:
    """Pieces of at most `length` tokens; those without a supervised slot are left out."""
    pieces = []
    for start in range(0, len(example), length):
        piece = Example(example.input_ids[start : start + length], example.loss_mask[start : start + length])
        if piece.loss_mask[2:].any():
            pieces.append(piece)
    return pieces


def encode_row(row: Row, tokenizer: PreTrainedTokenizerFast) -> list[Example]:
    """Tokenise one row: one example, or several of a conversation whose chat template rewrites earlier turns.

    Raises:
        ValueError: the row has none of the known fields or one of another shape, or its chat template is unfit.
    """
    if "input_ids" in row:
        return [_read_ids(row, len(tokenizer))]
    row = normalise(row)
    if "text" in row:
        ids = tokenizer(row["text"], add_special_tokens=True)["input_ids"]
        return [Example(torch.tensor(ids, dtype=torch.int64), torch.ones(len(ids), dtype=torch.bool))]
    return encode_conversation(row["messages"], tokenizer, row.get("tools"), truncated=bool(row.get("truncated")))


def _read_ids(row: Row, vocab_size: int) -> Example:
    ids, mask = row["input_ids"], row.get("loss_mask")
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise ValueError("input_ids: expected a list of whole numbers")
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise ValueError(f"input_ids: {wrong} is outside the tokenizer's vocabulary of {vocab_size}")
    mask = [True] * len(ids) if mask is None else mask
    if not isinstance(mask, list) or len(mask) != len(ids) or not all(entry in (0, 1) for entry in mask):
        raise ValueError(f"loss_mask: expected {len(ids)} entries as in input_ids, 0 or 1, got {str(mask)[:SHOWN]}")
    return Example(torch.tensor(ids, dtype=torch.int64), torch.tensor(mask, dtype=torch.bool))


def normalise(row: Row) -> Row:
    """The row with its conversation, if it is one, in OpenAI's form.

    Raises:
        ValueError: the row has none of the known fields or one of another shape.
    """
    if "input_ids" in row:
        return row
    if "text" in row:
        if not isinstance(row["text"], str):
            raise ValueError(f"text: expected a string, got {type(row['text']).__name__}")
        return row
    return row | {"messages": conversation(row)}


def conversation(row: Row) -> list[Message]:
    """The messages of a chat row, in OpenAI's form; ShareGPT's `conversations` are translated.

    Raises:
        ValueError: no such field, or a turn that is no text.
    """
    if "messages" in row:
        return [_read_message(index, message) for index, message in enumerate(_turns(row, "messages"))]
    if "conversations" in row:
        messages: list[Message] = []
        for turn in _turns(row, "conversations"):
            speaker = turn.get("from")
            if not isinstance(speaker, str) or speaker not in SPEAKERS:
                raise ValueError(f"conversations: expected a speaker of {', '.join(SPEAKERS)}, got {speaker!r}")
            messages.append(_read_message(len(messages), {"role": SPEAKERS[speaker], "content": turn.get("value")}))
        return messages
    raise ValueError(f"row: expected one of messages, conversations, text, input_ids; got the fields {sorted(row)}")


def _turns(row: Row, name: str) -> list[Message]:
    turns = row[name]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{name}: expected a list of at least one turn, got {turns!r:.{SHOWN}}")
    return turns


def _read_message(index: int, message: Message) -> Message:
    """A message whose content is a string; a list of text parts is joined, tool calls may stand alone."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise ValueError(f"messages: turn {index} has no role")
    if content is None and message.get("tool_calls"):
        content = ""
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, dict) else part
                raise ValueError(f"messages: turn {index} has a part of type {kind!r}; only text is read")
            if not isinstance(part.get("text"), str):
                raise ValueError(f"messages: turn {index} has a part of type 'text' without a text")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"messages: turn {index} has as content {type(content).__name__}; expected text")
    return message | {"content": content}


def render(
    messages: list[Message], tokenizer: Any, add_generation_prompt: bool = False, tools: list[Any] | None = None
) -> str:
    """The conversation as the text that the model reads.

    Raises:
        ValueError: the tokenizer has no chat template, or the template refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise ValueError("chat_template: the target's tokenizer has none, so only text and input_ids rows can be read")
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template is a program: it may do anything with tools or calls of another form
        raise ValueError(f"chat_template: the template refuses the conversation: {error}") from None
    assert isinstance(text, str)
    return text


def encode_conversation(
    messages: list[Message],
    tokenizer: Any,
    tools: list[Any] | None = None,
    truncated: bool = False,
    add_generation_prompt: bool = False,
) -> list[Example]:
    """Tokenise a conversation; the assistant's turns are supervised, tool calls too, if the template writes them.

    It is one example as long as its rendering grows from turn to turn. Where the template rewrites an earlier turn
    another one begins, in which only the turns from there on are supervised. The last example ends as the conversation
    does if `add_generation_prompt`, and with a supervised turn otherwise.

    `truncated` says that the last answer was cut off, so that its end-of-turn token is not supervised.

    Raises:
        ValueError: the chat template refuses the conversation, loses its tool calls, or does not write a turn behind
            the prompt for it.
    """
    if not messages or messages[0]["role"] == "assistant":
        raise ValueError("messages: turn 0 is an answer; expected what it answers before it")
    renderings: list[_Rendering] = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            is_cut = truncated and index == len(messages) - 1
            _go_on(renderings, *_render_turn(messages[: index + 1], tokenizer, tools, is_cut))
    whole = render(messages, tokenizer, add_generation_prompt, tools)
    if add_generation_prompt or not renderings or whole.startswith(renderings[-1].text):
        _go_on(renderings, whole)
    return [_encode_rendering(rendering, tokenizer) for rendering in renderings]


@dataclass
class _Rendering:
    """A conversation as the model reads it, and which characters of it are the model's to say."""

    text: str
    spans: list[tuple[int, int]]


def _go_on(renderings: list[_Rendering], text: str, *spans: tuple[int, int]) -> None:
    """Extend the last rendering to `text` if it is the beginning of that, or add another one."""
    if renderings and text.startswith(renderings[-1].text):
        renderings[-1].text = text
        renderings[-1].spans += spans
    else:
        renderings.append(_Rendering(text, list(spans)))


def _render_turn(
    messages: list[Message], tokenizer: Any, tools: list[Any] | None, is_cut: bool
) -> tuple[str, tuple[int, int]]:
    """A conversation through its last turn, an assistant's, and where in it the model says that."""
    *earlier, message = messages
    index = len(earlier)
    before = render(earlier, tokenizer, True, tools)
    through = render(messages, tokenizer, False, tools)
    if not through.startswith(before):
        raise ValueError(_unfit(index, message["content"], through, before))
    if message.get("tool_calls"):
        without = {key: value for key, value in message.items() if key != "tool_calls"}
        if render([*earlier, without], tokenizer, False, tools) == through:
            raise ValueError(f"chat_template: does not write the tool calls of turn {index}")
    # What the template writes after the end-of-turn token (a line break, often) is not the model's to say.
    end = len(through.rstrip())
    if is_cut:
        content = message["content"].strip()
        if not content or content not in through[len(before) :]:
            raise ValueError(f"chat_template: does not write the truncated turn {index} as it is")
        end = through.rindex(content) + len(content)
    return through, (len(before), end)


def _encode_rendering(rendering: _Rendering, tokenizer: Any) -> Example:
    encoded = tokenizer(rendering.text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    supervised = [any(a <= start and end <= b for a, b in rendering.spans) for start, end in offsets]
    return Example(torch.tensor(ids, dtype=torch.int64), torch.tensor(supervised, dtype=torch.bool))


def _unfit(turn: int, content: str, through: str, before: str) -> str:
    """Say where a turn's rendering leaves the prompt for it."""
    same = next((i for i, (a, b) in enumerate(zip(through, before, strict=False)) if a != b), len(through))
    start = max(0, same - SHOWN)
    return (
        f"chat_template: does not write turn {turn} ({content[:SHOWN]!r}) behind the prompt for it: that has "
        f"{before[start : same + SHOWN]!r}, the conversation {through[start : same + SHOWN]!r}; "
        f"they part at character {same}"
    )
