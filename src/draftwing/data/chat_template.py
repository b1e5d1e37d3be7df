"""Rows to token ids and exact loss masks: a chat template's assistant turns, or all of a plain text.

The mask comes from where the rendered conversation's characters are tokens, so it is right for any chat template. Where
one rewrites earlier turns (Qwen3's drops what was thought there), each answer is learnt in the text that the model saw.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from draftwing.data.corpus import Row
from draftwing.data.messages import SHOWN, THOUGHTS, Message, present, read_conversation, read_flag

CONVERSATION_FIELDS = ("messages", "conversations", "system", "tools", "functions", "truncated")
"""What a row's conversation is read from."""


@dataclass(frozen=True)
class Example:
    """One tokenised sample: `input_ids [S]` (int64) and `loss_mask [S]` (bool, True on tokens the model should say).

    Several documents packed into one have `document_ids [S]` (int64, ascending from 0). Stored `last_hidden [S, D]`
    (the input of the target's output head) and `features [S, F]`, if they are others, spare the target's pass.
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


def encode_row(row: Row, tokenizer: Any) -> list[Example]:
    """Tokenise one row: one example, or several of a conversation whose chat template rewrites earlier turns.

    Raises:
        ValueError: the row has none of the known fields or one of another shape, or its chat template is unfit.
    """
    row = normalise(row)
    if "input_ids" in row:
        return [_read_ids(row, tokenizer)]
    if "text" in row:
        ids = tokenizer(row["text"], add_special_tokens=True)["input_ids"]
        return [_example(ids, [True] * len(ids))]
    return encode_conversation(row["messages"], tokenizer, row.get("tools"), row.get("truncated", False))


def _example(ids: list[int], mask: list[Any]) -> Example:
    return Example(torch.tensor(ids, dtype=torch.int64), torch.tensor(mask, dtype=torch.bool))


def _read_ids(row: Row, tokenizer: Any) -> Example:
    ids, mask = row["input_ids"], row.get("loss_mask")
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise ValueError("input_ids: expected a list of whole numbers")
    if ids and not 0 <= min(ids) <= max(ids) < len(tokenizer):
        known = tokenizer.get_vocab().values()  # with gaps, ids go beyond the number of tokens
        wrong = min(ids) if min(ids) < 0 else max(ids)
        if min(ids) < 0 or max(ids) > max(known):
            raise ValueError(f"input_ids: {wrong} is outside the tokenizer's vocabulary of {len(tokenizer)}")
    mask = [True] * len(ids) if mask is None else mask
    if not isinstance(mask, list) or len(mask) != len(ids) or not all(entry in (0, 1) for entry in mask):
        raise ValueError(f"loss_mask: expected {len(ids)} entries as in input_ids, 0 or 1, got {str(mask)[:SHOWN]}")
    return _example(ids, mask)


def normalise(row: Row) -> Row:
    """The row without nulls and with its conversation, if it is one, in OpenAI's form.

    Raises:
        ValueError: the row has none of the known fields or one of another shape.
    """
    row = present(row)
    read_flag(row, "held_out")
    if "input_ids" in row:
        return row
    if "text" in row:
        if not isinstance(row["text"], str):
            raise ValueError(f"text: expected a string, got {type(row['text']).__name__}")
        return row
    others = {name: value for name, value in row.items() if name not in CONVERSATION_FIELDS}
    return others | read_conversation(row)


def render(
    messages: list[Message], tokenizer: Any, add_generation_prompt: bool = False, tools: list[Any] | None = None
) -> str:
    """The conversation as the text that the model reads.

    Raises:
        ValueError: the tokenizer has no chat template, or the template refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise ValueError("chat_template: the target's tokenizer has none, so only text and input_ids rows can be read")
    messages = [_as_template_reads(message, str(tokenizer.chat_template)) for message in messages]
    attempts = [messages]
    if any("tool_calls" in message for message in messages):
        attempts.append([_with_argument_texts(message) for message in messages])
    problem = ""
    for attempt in attempts:
        try:
            return str(
                tokenizer.apply_chat_template(
                    attempt, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except Exception as error:  # a template is a program: it may do anything with tools or calls of another form
            problem = problem or str(error)
    raise ValueError(f"chat_template: the template refuses the conversation: {problem}")


def encode_text(text: str, tokenizer: Any) -> list[int]:
    """The ids of a template's text, which has its special tokens in it."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _as_template_reads(message: Message, template: str) -> Message:
    """A message with what was thought under all its names; a developer is the system to a template without any."""
    if message["role"] == "developer" and "developer" not in template:
        message = message | {"role": "system"}
    if "reasoning_content" in message:
        message = dict.fromkeys(THOUGHTS, message["reasoning_content"]) | message
    return message


def _with_argument_texts(message: Message) -> Message:
    """A message whose tool calls have their arguments as JSON: some templates (DeepSeek's) join texts with them."""
    if "tool_calls" not in message:
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    texts = [json.dumps(function["arguments"], ensure_ascii=False) for function in functions]
    calls = [
        call | {"function": call["function"] | {"arguments": text}}
        for call, text in zip(message["tool_calls"], texts, strict=True)
    ]
    return message | {"tool_calls": calls}


def encode_conversation(
    messages: list[Message],
    tokenizer: Any,
    tools: list[Any] | None = None,
    truncated: bool = False,
) -> list[Example]:
    """Tokenise a conversation; the assistant's turns are supervised, tool calls too, if the template writes them.

    It is one example as long as its rendering grows from turn to turn. Where the template rewrites an earlier turn
    another one begins, in which only the turns from there on are supervised. What follows the last answer is read, too.

    `truncated` says that the last answer was cut off, so that its end-of-turn token is not supervised.

    Raises:
        ValueError: the chat template refuses the conversation, loses its tool calls or thoughts, or does not write a
            turn behind the prompt for it.
    """
    if not messages or messages[0]["role"] == "assistant":
        raise ValueError("messages: turn 0 is an answer; expected what it answers before it")
    renderings: list[_Rendering] = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            is_cut = truncated and index == len(messages) - 1
            _go_on(renderings, *_render_turn(messages[: index + 1], tokenizer, tools, is_cut))
    whole = render(messages, tokenizer, tools=tools)
    if not renderings or whole.startswith(renderings[-1].text):
        _go_on(renderings, whole)
    return [_example(*supervised_tokens(made.text, made.spans, tokenizer)) for made in renderings]


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
    for name, what in (("tool_calls", "the tool calls"), ("reasoning_content", "what was thought in")):
        without = {key: value for key, value in message.items() if key != name}
        if name in message and render([*earlier, without], tokenizer, False, tools) == through:
            raise ValueError(f"chat_template: does not write {what} {'of ' * (name == 'tool_calls')}turn {index}")
    # What the template writes after the end-of-turn token (a line break, often) is not the model's to say.
    end = len(through.rstrip())
    if is_cut:
        content = message["content"].strip() or message.get("reasoning_content", "").strip()
        if not content or content not in through[len(before) :]:
            raise ValueError(f"chat_template: does not write the truncated turn {index} as it is")
        end = through.rindex(content) + len(content)
    return through, (len(before), end)


def _unfit(turn: int, content: str, through: str, before: str) -> str:
    """Say where a turn's rendering leaves the prompt for it."""
    same = next((i for i, (a, b) in enumerate(zip(through, before, strict=False)) if a != b), len(through))
    start = max(0, same - SHOWN)
    return (
        f"chat_template: does not write turn {turn} ({content[:SHOWN]!r}) behind the prompt for it: that has "
        f"{before[start : same + SHOWN]!r}, the conversation {through[start : same + SHOWN]!r}; "
        f"they part at character {same}"
    )


Span = tuple[int, int]
"""Characters from `start` to `stop`, as a slice."""


def supervised_tokens(text: str, spans: list[Span], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The token ids of `text`, and for each whether it lies whole in one of the spans.

    Raises:
        ValueError: the tokenizer is written in Python, and it cannot be told which tokens are a span's.
    """
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        inside = [any(a <= start and end <= b for a, b in spans) for start, end in offsets]
        return encoded["input_ids"], inside
    prefixes = _Prefixes(text, tokenizer)
    inside = [False] * len(prefixes.ids)
    for span in spans:
        first, last = prefixes.tokens_within(*span)
        inside[first:last] = [True] * (last - first)
    return prefixes.ids, inside


@dataclass(frozen=True)
class _Border:
    """A place where tokens meet: so many `tokens` are the first characters up to `position`."""

    position: int
    tokens: int


class _Prefixes:
    """A text's tokens without offsets. Where tokens meet, the ids of the text so far are the first of all its ids."""

    def __init__(self, text: str, tokenizer: Any) -> None:
        self._text, self._tokenizer = text, tokenizer
        self.ids = encode_text(text, tokenizer)

    def tokens_within(self, start: int, stop: int) -> tuple[int, int]:
        """The slice of tokens that lie whole between two positions; a token across either of them does not."""
        first, last = self._find(range(start, stop + 1)), self._find(range(stop, start - 1, -1))
        before, after = self._find(range(start, -1, -1)), self._find(range(stop, len(self._text) + 1))
        assert before is not None and after is not None  # the text's own ends
        if first is None or last is None:
            first, last = after, after
        if first.tokens - before.tokens > 1 or after.tokens - last.tokens > 1:
            raise self._error(start, "prefixes of the text have other tokens")
        self._check(first, last)
        return first.tokens, last.tokens

    def _find(self, positions: Iterable[int]) -> _Border | None:
        """The first of the positions at which tokens meet."""
        for position in positions:
            ids = encode_text(self._text[:position], self._tokenizer)
            if self.ids[: len(ids)] == ids:
                return _Border(position, len(ids))
        return None

    def _check(self, first: _Border, last: _Border) -> None:
        """Raise a ValueError if the tokens do not say, but for spaces, what the text does."""
        try:
            said = self._tokenizer.decode(self.ids[first.tokens : last.tokens])
        except Exception as error:  # a tokenizer is a program: it may do anything
            raise self._error(first.position, f"it cannot decode its own: {error}") from error
        text = self._text[first.position : last.position]
        if "".join(said.split()) != "".join(text.split()):
            raise self._error(first.position, f"they seem to say {said[:SHOWN]!r}")

    def _error(self, position: int, why: str) -> ValueError:
        text = self._text[position : position + SHOWN]
        return ValueError(
            "tokenizer: it is written in Python and gives no offsets; which tokens are the answer's in "
            f"{text!r} cannot be told: {why}"
        )
