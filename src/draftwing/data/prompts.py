"""Prompts to measure on: the embedded held-out ones, or any JSONL file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from draftwing.data.chat import Message, conversation, render
from draftwing.data.corpus import Row
from draftwing.data.sources import parse_row

FIELDS = ("prompt", "messages", "turns")


@dataclass(frozen=True)
class Prompt:
    """A named prompt: plain `text` to continue, or chat `messages` to answer, and what the user says after that."""

    name: str
    text: str = ""
    messages: tuple[Message, ...] = ()
    later_turns: tuple[str, ...] = ()
    category: str = ""

    @property
    def num_turns(self) -> int:
        return 1 + len(self.later_turns)

    def token_ids(self, tokenizer: Any) -> list[int]:
        """The prompt as the model reads it; messages become plain text where the tokenizer has no chat template."""
        if not self.messages:
            text, is_chat = self.text, False
        elif is_chat := has_chat_template(tokenizer):
            text = render(list(self.messages), tokenizer, add_generation_prompt=True)
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
    """Read a JSONL file whose rows have `prompt`, `messages` or `turns` (what the user says, turn by turn).

    Raises:
        ValueError: no such file, no UTF-8, no rows, no JSON, or a row with none of these fields (named by its line).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"prompts: no such file: {path}")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts: {path} is not UTF-8: {error}") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            prompts.append(as_prompt(_parse(line, f"{path}, line {number}"), f"{path}, line {number}"))
    if not prompts:
        raise ValueError(f"prompts: {path} is empty")
    return prompts


def _parse(line: str, place: str) -> Row:
    try:
        return parse_row(line)
    except ValueError as error:
        raise ValueError(f"prompts: {place}: {error}") from None


def as_prompt(row: Row, place: str) -> Prompt:
    """The prompt of a row; `place` names the row in errors.

    Raises:
        ValueError: the row has none of FIELDS, or one of another form.
    """
    names = (row.get("name"), row.get("question_id"))
    name = next((str(name) for name in names if name is not None), place)
    category = str(row.get("category") or "")
    match next((field for field in FIELDS if field in row), None):
        case "prompt" if isinstance(text := row["prompt"], str):
            return Prompt(name, text=text, category=category)
        case "messages" if _are_messages(row["messages"]):
            return Prompt(name, messages=_read_messages(row, place), category=category)
        case "turns" if _are_texts(turns := row["turns"]):
            first = {"role": "user", "content": turns[0]}
            return Prompt(name, messages=(first,), later_turns=tuple(turns[1:]), category=category)
        case None:
            raise ValueError(f"prompts: {place}: expected one of {', '.join(FIELDS)}; got {sorted(row)}")
        case field:
            forms = {"prompt": "a text", "messages": "a list of role and content", "turns": "a list of texts"}
            raise ValueError(f"prompts: {place}: {field}: expected {forms[field]}, got {str(row[field])[:60]}")


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _are_messages(value: Any) -> bool:
    is_message = lambda turn: isinstance(turn, dict) and {"role", "content"} <= turn.keys()
    return isinstance(value, list) and bool(value) and all(map(is_message, value))


def _read_messages(row: Row, place: str) -> tuple[Message, ...]:
    """The messages as training rows are read: text parts joined, a turn without text refused."""
    try:
        return tuple(conversation(row))
    except ValueError as error:
        raise ValueError(f"prompts: {place}: {error}") from None


def spread(prompts: Sequence[Prompt], count: int | None) -> list[Prompt]:
    """At most `count` prompts, evenly spaced, so that files sorted by category keep all of theirs."""
    if count is None or count >= len(prompts):
        return list(prompts)
    return [prompts[index * len(prompts) // count] for index in range(count)]


def write_held_out_prompts(rows: Sequence[Row], path: Path, count: int = 16) -> None:
    """Write a prompts file made of held-out rows."""
    lines = [json.dumps(prompt) for prompt in held_out_prompts(rows, count)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def held_out_prompts(rows: Sequence[Row], count: int) -> list[dict[str, Any]]:
    """Rows for a prompts file from a corpus's held-out rows: every other a request, every other an opening of code.

    Spread evenly over the rows; the opening is a function's signature and its first lines.
    """
    chats = [row["messages"] for row in rows if "messages" in row]
    chats = [messages for messages in chats if messages[1]["content"].count("\n") >= 8]
    step = max(1, len(chats) // count)
    prompts: list[dict[str, Any]] = []
    for index, (request, answer) in enumerate(chats[::step][:count]):
        title = request["content"].split("\n")[0].removeprefix("Write the Python function ").rstrip(".")
        if index % 2 == 0:
            prompts.append({"name": title, "messages": [request]})
        else:
            prompts.append({"name": title, "prompt": "\n".join(answer["content"].split("\n")[:4]) + "\n"})
    return prompts
