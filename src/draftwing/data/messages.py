"""Conversations in one form, whoever wrote them: OpenAI's client, ShareGPT, a data set's columns, a server.

Training rows, prompts, regeneration and endpoints read them here, so that all have the same fields.
"""

import json
from collections.abc import Mapping
from typing import Any

from draftwing.data.corpus import Row

Message = dict[str, Any]
"""A turn: its `role`, `content` (a string), and whatever the chat template reads beside them.

Among that are `reasoning_content`, what was thought, and `tool_calls`, whose arguments are mappings. No field is null.
"""
SPEAKERS = {
    **{name: name for name in ("system", "developer", "user", "assistant", "tool")},
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("function", "observation", "ipython"), "tool"),
}
"""The role of each name that turns have in use; others are refused."""
CALLERS = ("function_call", "tool_call")
"""Speakers whose content is the JSON of tool calls."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Names of what was thought: of DeepSeek's and SGLang's servers, of vLLM's, and of gpt-oss' template."""
TEXT_PARTS = ("text", "input_text", "output_text")
SHOWN = 40
"""Characters shown of a text in an error."""


def read_conversation(row: Row) -> Row:
    """The conversation of a row (`messages`, or ShareGPT's `conversations`, with `system`, `tools`, `truncated`).

    It has `messages`, `tools` if the model is told of any, and `truncated` if its last answer was cut off at a limit.

    Raises:
        ValueError: no such field, or one of another form.
    """
    row = present(row)
    name = next((name for name in ("messages", "conversations") if name in row), None)
    if name is None:
        raise ValueError(f"row: expected one of messages, conversations, text, input_ids; got the fields {sorted(row)}")
    turns = parsed(row[name])
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{name}: expected a list of at least one turn, got {turns!r:.{SHOWN}}")
    messages = [read_message(turn, f"{name}: turn {index}") for index, turn in enumerate(turns)]
    system = row.get("system")
    if isinstance(system, str) and system and messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": system})
    said: Row = {"messages": messages}
    if tools := _read_tools(row):
        said["tools"] = tools
    if read_flag(row, "truncated"):
        said["truncated"] = True
    return said


def read_flag(row: Row, name: str) -> bool:
    """A field that is true or false; absent, it is false.

    Raises:
        ValueError: it is something else, a text such as "no" among that.
    """
    value = row.get(name)
    if value is not None and value not in (True, False):
        raise ValueError(f"{name}: expected true or false, got {value!r:.{SHOWN}}")
    return bool(value)


def _read_tools(row: Row) -> list[Message]:
    """The `tools` of a row (formerly `functions`), which may be a list or its JSON.

    Raises:
        ValueError: they are no list of objects.
    """
    tools = parsed(row.get("tools") or row.get("functions"))
    if not tools:
        return []
    tools = [parsed(tool) for tool in tools] if isinstance(tools, list) else [tools]
    if not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(
            f"tools: expected a list of objects, got {row.get('tools') or row.get('functions')!r:.{SHOWN}}"
        )
    return [_as_function(tool) for tool in tools]


def read_message(turn: Message, place: str) -> Message:
    """A turn in OpenAI's form: nulls and empty calls dropped, text parts joined, arguments of tool calls parsed.

    Raises:
        ValueError: a role that nobody knows, or content or calls of another form. The message begins with the `place`.
    """
    said = present(turn)
    speaker = said.pop("from", None) or said.pop("role", None)
    content = said.pop("content", said.pop("value", None))
    calls = said.pop("tool_calls", None) or said.pop("function_call", None)
    if not isinstance(speaker, str):
        raise ValueError(f"{place} has no role")
    if speaker not in SPEAKERS:
        known = ", ".join(SPEAKERS)
        raise ValueError(f"{place} has the role {speaker!r}, which nobody knows; expected one of {known}")
    if speaker in CALLERS:
        calls, content = content, None
    more: dict[str, Any] = {"tool_calls": _read_calls(calls, place)} if calls else {}
    for thought in [said.pop(name, None) for name in reversed(THOUGHTS)]:
        more |= {"reasoning_content": _read_text(thought, place)} if thought else {}
    content = "" if content is None and more else _read_text(content, place)
    fields = {name: value for name, value in said.items() if name not in ("role", "function_call")}
    return {"role": SPEAKERS[speaker], "content": content} | fields | more


def present(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are not null: clients and tables write null for those that are not there."""
    return {name: value for name, value in fields.items() if value is not None}


def parsed(value: Any) -> Any:
    """What a string is the JSON of; anything else, and a string that is no JSON, stays as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _read_text(content: Any, place: str) -> str:
    """Content as a string; a list of text parts is joined."""
    if isinstance(content, list):
        return "".join(_read_part(part, place) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{place} has as content {type(content).__name__}; expected text")
    return content


def _read_part(part: Any, place: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else part
    if kind not in TEXT_PARTS:
        raise ValueError(f"{place} has a part of type {kind!r}; only text is read")
    if not isinstance(part.get("text"), str):
        raise ValueError(f"{place} has a part of type {kind!r} without a text")
    return str(part["text"])


def _read_calls(calls: Any, place: str) -> list[Message]:
    calls = parsed(calls) or []
    calls = [parsed(call) for call in (calls if isinstance(calls, list) else [calls])]
    return [_read_call(call, place) for call in calls]


def _read_call(value: Any, place: str) -> Message:
    call = _as_function(present(value)) if isinstance(value, dict) else {}
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{place} has a tool call without a function's name")
    arguments = function.get("arguments")
    arguments = {} if arguments in (None, "") else parsed(arguments)
    if not isinstance(arguments, dict):
        raise ValueError(f"{place} has as arguments of a tool call {arguments!r:.{SHOWN}}; expected a JSON object")
    return call | {"function": present(function) | {"arguments": arguments}}


def _as_function(value: Message) -> Message:
    """A tool or a call of one with the function under that name; some rows have it bare."""
    return value if "function" in value or "name" not in value else {"type": "function", "function": value}
