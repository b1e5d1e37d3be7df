"""Prompts to measure on: the embedded held-out ones, or any file of rows."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from draftwing.data.chat_template import render
from draftwing.data.corpus import Row
from draftwing.data.messages import Message, present, read_conversation
from draftwing.data.sources import open_file

MOST_HELD_OUT = 16
"""Prompts that are made of held-out rows."""
FIELDS = ("prompt", "messages", "conversations", "turns", "text")


@dataclass(frozen=True)
class Prompt:
    """A named prompt: plain `text` to continue, or chat `messages` to answer, and what the user says after that.

    The model is told of the `tools`.
    """

    name: str
    text: str = ""
    messages: tuple[Message, ...] = ()
    later_turns: tuple[str, ...] = ()
    category: str = ""
    tools: tuple[Message, ...] = ()

    @property
    def num_turns(self) -> int:
        return 1 + len(self.later_turns)

    def token_ids(self, tokenizer: Any) -> list[int]:
        """The prompt as the model reads it; messages become plain text where the tokenizer has no chat template.

        Raises:
            ValueError: the chat template refuses the messages, or there is none and nothing can tell of the tools.
        """
        if not self.messages:
            text, is_chat = self.text, False
        elif is_chat := has_chat_template(tokenizer):
            text = render(list(self.messages), tokenizer, True, list(self.tools) or None)
        elif self.tools:
            raise ValueError("chat_template: the target's tokenizer has none, so no prompt can have tools")
        else:
            text = "\n\n".join(message["content"] for message in self.messages) + "\n\n"
        ids: list[int] = tokenizer(text, add_special_tokens=not is_chat)["input_ids"]
        return ids

    def followed_by(self, answer: str) -> "Prompt":
        """The conversation's next turn, given the model's answer to this one."""
        said = ({"role": "assistant", "content": answer}, {"role": "user", "content": self.later_turns[0]})
        return replace(self, messages=(*self.messages, *said), later_turns=self.later_turns[1:])


def has_chat_template(tokenizer: Any) -> bool:
    """Whether the tokenizer says how a conversation is put into text."""
    return getattr(tokenizer, "chat_template", None) is not None


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read a file whose rows have `prompt` or `text`, `messages` or `conversations`, or `turns` (what the user says).

    Raises:
        ValueError: no such file, no rows, or a row that cannot be read or has none of these (named by its line).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"prompts: no such file: {path}")
    try:
        source = open_file(str(path))
    except ValueError as error:
        raise ValueError(f"prompts: {str(error).removeprefix('data: ')}") from None
    prompts = []
    for index in range(len(source)):
        place = f"{path}, line {source.line(index)}"
        try:
            row = source.read(index)
        except ValueError as error:
            raise ValueError(f"prompts: {place}: {error}") from None
        prompts.append(as_prompt(row, place))
    if not prompts:
        raise ValueError(f"prompts: {path} is empty")
    return prompts


def as_prompt(row: Row, place: str) -> Prompt:
    """The prompt of a row; `place` names the row in errors.

    Raises:
        ValueError: the row has none of FIELDS, or one of another form.
    """
    row = present(row)
    names = (row.get("name"), row.get("question_id"))
    name = next((str(name) for name in names if name is not None), place)
    category = str(row.get("category") or "")
    match next((field for field in FIELDS if field in row), None):
        case "prompt" | "text" as field if isinstance(text := row[field], str):
            return Prompt(name, text=text, category=category)
        case "messages" | "conversations":
            messages, tools = _read_messages(row, place)
            return Prompt(name, messages=messages, category=category, tools=tools)
        case "turns" if _are_texts(turns := row["turns"]):
            first = {"role": "user", "content": turns[0]}
            return Prompt(name, messages=(first,), later_turns=tuple(turns[1:]), category=category)
        case None:
            raise ValueError(f"prompts: {place}: expected one of {', '.join(FIELDS)}; got {sorted(row)}")
        case field:
            form = "a list of texts" if field == "turns" else "a text"
            raise ValueError(f"prompts: {place}: {field}: expected {form}, got {str(row[field])[:60]}")


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _read_messages(row: Row, place: str) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """The messages, as training rows are read, without an answer at their end; and the tools."""
    try:
        said = read_conversation(row)
    except ValueError as error:
        raise ValueError(f"prompts: {place}: {error}") from None
    messages = said["messages"]
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise ValueError(f"prompts: {place}: messages: expected something to answer, got answers alone")
    return tuple(messages), tuple(said.get("tools", ()))


def spread(prompts: Sequence[Prompt], count: int | None) -> list[Prompt]:
    """At most `count` prompts, evenly spaced, so that files sorted by category keep all of theirs."""
    if count is None or count >= len(prompts):
        return list(prompts)
    return [prompts[index * len(prompts) // count] for index in range(count)]


def _is_long_answer(messages: Sequence[Message]) -> bool:
    if [message["role"] for message in messages] != ["user", "assistant"]:
        return False
    texts = [message.get("content") for message in messages]
    return all(isinstance(text, str) for text in texts) and str(texts[1]).count("\n") >= 8


def write_held_out_prompts(rows: Sequence[Row], path: Path) -> None:
    """Write a prompts file from a corpus's held-out rows: every other a request, every other an opening of code.

    Spread evenly over the rows of one request and a long answer; the opening is a function's signature and its first
    lines.
    """
    chats = [row["messages"] for row in rows if _is_long_answer(row.get("messages") or [])]
    step = max(1, len(chats) // MOST_HELD_OUT)
    prompts: list[dict[str, Any]] = []
    for index, (request, answer) in enumerate(chats[::step][:MOST_HELD_OUT]):
        title = request["content"].split("\n")[0].removeprefix("Write the Python function ").rstrip(".")
        if index % 2 == 0:
            prompts.append({"name": title, "messages": [request]})
        else:
            prompts.append({"name": title, "prompt": "\n".join(answer["content"].split("\n")[:4]) + "\n"})
    path.write_text("\n".join(map(json.dumps, prompts)) + "\n", encoding="utf-8")
