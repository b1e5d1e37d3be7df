"""Prompts to measure on: the embedded held-out ones, or any JSONL file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftwing.data.chat import render
from draftwing.data.corpus import Row


@dataclass(frozen=True)
class Prompt:
    """A named prompt: plain `text` to continue, or chat `messages` to answer."""

    name: str
    text: str = ""
    messages: tuple[dict[str, str], ...] = ()

    def token_ids(self, tokenizer: Any) -> list[int]:
        """The prompt as the model reads it."""
        text = render(list(self.messages), tokenizer, add_generation_prompt=True) if self.messages else self.text
        ids: list[int] = tokenizer(text, add_special_tokens=not self.messages)["input_ids"]
        return ids


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read a JSONL file whose rows have `prompt`, `messages` or `turns` (the first turn is used).

    Raises:
        ValueError: no such file, no rows, or a row with none of these fields (named by its line).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"prompts: no such file: {path}")
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            prompts.append(_read_prompt(json.loads(line), f"{path}, line {number}"))
    if not prompts:
        raise ValueError(f"prompts: {path} is empty")
    return prompts


def _read_prompt(row: Row, place: str) -> Prompt:
    name = str(row.get("name") or row.get("question_id") or place)
    if "prompt" in row:
        return Prompt(name, text=row["prompt"])
    if "messages" in row:
        return Prompt(name, messages=tuple(row["messages"]))
    if "turns" in row:
        return Prompt(name, messages=({"role": "user", "content": row["turns"][0]},))
    raise ValueError(f"prompts: {place}: expected one of prompt, messages, turns; got {sorted(row)}")


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
