"""Tools: who is told of them, what a model writes is read back as calls, and what is no call stays text."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason='pip install "draftwing[serve]"')

from fake_scheduler import FakeScheduler
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from test_responses import events as response_events
from test_serving import CHAT, EOS, asked, client_of, events, ids, problem
from tools_template import CLAMP, SORT, TEMPLATE, chain, tool

from draftwing.serving.tools import FORMATS, CallReader, format_of, schemas
from draftwing.target.load import load_tokenizer

TOKENIZER = load_tokenizer("tiny")
TOKENIZER.chat_template = TEMPLATE
NAMES = {"clamp", "sort"}
CALL = '<tool_call>\n{"name": "clamp", "arguments": {"value": 3, "mode": "low"}}\n</tool_call>'
WRITTEN = {
    "hermes": [CALL, f"{CALL}\n{CALL.replace('clamp', 'sort')}", CALL.removesuffix("</tool_call>")],
    "llama3_json": [
        '{"name": "clamp", "parameters": {"value": 3}}',
        '<|python_tag|>{"name": "clamp", "parameters": {}}; {"name": "sort", "arguments": {}}',
    ],
    "mistral": ['[TOOL_CALLS] [{"name": "clamp", "arguments": {"value": 3}}, {"name": "sort", "arguments": {}}]'],
    "mistral_args": [
        '[TOOL_CALLS]clamp[ARGS]{"value": 3}',
        '[TOOL_CALLS]clamp{"a": 1}[TOOL_CALLS]sort{"b": "x[ARGS]"}',
    ],
}
NO_CALLS = {
    "hermes": ["<tool_call>", "a < b", '<tool_call>{"name": "other", "arguments": {}}</tool_call>'],
    "llama3_json": ['{"a": 1}', '{"name": "clamp", "parameters": 5}', '{"name": "clamp"', "[" * 100_000],
    "mistral": ["[TOOL", "[TOOL_CALLS][]", '[TOOL_CALLS] {"name": 5}', "[TOOL_CALLS]" + "[" * 100_000],
    "mistral_args": ["clamp[ARGS]{}", "[TOOL_CALLS]clamp[ARGS]{", "[TOOL_CALLS]clamp[ARGS]5"],
}


def read(tool_format: str, text: str, width: int) -> tuple[str, list[Any]]:
    """What is said and called, where the text comes in pieces of so many characters."""
    reader, said, calls = CallReader(FORMATS[tool_format], NAMES), "", list[Any]()
    for start in range(0, max(len(text), 1), width):
        piece, calls = reader.push(text[start : start + width], start + width >= len(text))
        said += piece
    return said, calls


@pytest.mark.parametrize("tool_format", FORMATS)
@pytest.mark.parametrize("width", [1, 3, 10**6])
def test_calls_are_read_back(tool_format: str, width: int) -> None:
    for text in WRITTEN[tool_format]:
        said, calls = read(tool_format, text, width)
        assert said == ""
        assert [call["function"]["name"] for call in calls] == re.findall("clamp|sort", text)
        assert all(isinstance(json.loads(call["function"]["arguments"]), dict) for call in calls)
        assert all(re.fullmatch("[0-9a-f]{9}", call["id"]) for call in calls)
        if not FORMATS[tool_format].is_bare:
            assert read(tool_format, f"Well: {text}", width)[0] == "Well: "
        assert read(tool_format, f"\n {text}", width)[0] == "", "blanks in front of calls are nothing to say"


@pytest.mark.parametrize("tool_format", FORMATS)
def test_what_is_no_call_is_said(tool_format: str) -> None:
    for text in ["", " ", "Hello", *NO_CALLS[tool_format]]:
        for width in (1, 10**6) if len(text) < 1000 else (10**6,):
            assert read(tool_format, text, width) == (text, [])


AMONG_TEXT = [
    (f"{CALL}\nDone.", 1, "Done."),
    (f"<think>use <tool_call> tags</think>{CALL}", 1, "<think>use <tool_call> tags</think>"),
    (f'{CALL}\n<tool_call>{{"name": "other"}}</tool_call>', 1, '<tool_call>{"name": "other"}</tool_call>'),
    (f"{CALL}\n{CALL[:30]}", 1, CALL[:30]),
    (f"{CALL}<|im_end|>", 1, "<|im_end|>"),
    (f"{CALL} and {CALL}", 2, "and "),
]


@pytest.mark.parametrize("width", [1, 10**6])
@pytest.mark.parametrize(("text", "num_calls", "expected"), AMONG_TEXT)
def test_calls_among_text_are_calls(text: str, num_calls: int, expected: str, width: int) -> None:
    said, calls = read("hermes", text, width)
    assert (said, len(calls)) == (expected, num_calls)


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ('{"x": "a\nb\tc"}', {"x": "a\nb\tc"}),
        (r'"{\"x\": 1}"', {"x": 1}),
        ("null", {}),
        (r'{"x": "\ud83d"}', {"x": "\ud83d"}),
    ],
)
def test_arguments_as_models_write_them(written: str, arguments: dict[str, Any]) -> None:
    said, (call,) = read("hermes", f'<tool_call>{{"name": "clamp", "arguments": {written}}}</tool_call>', 10**6)
    text = call["function"]["arguments"]
    assert (said, json.loads(text)) == ("", arguments)
    text.encode()


@pytest.mark.parametrize("arguments", ["[]", "5", '"x"', '{"x": 1e999}', '{"x": NaN}', '{"x": -Infinity}'])
@pytest.mark.parametrize("name", ['"clamp"', '["clamp"]', '{"clamp": 1}', "null"])
def test_what_is_no_name_or_no_object_is_said(name: str, arguments: str) -> None:
    text = f'<tool_call>{{"name": {name}, "arguments": {arguments}}}</tool_call>'
    assert read("hermes", text, 10**6) == (text, [])


def test_newer_mistrals_number_their_calls() -> None:
    said, (call,) = read("mistral_args", '[TOOL_CALLS]clamp[CALL_ID]abc123def[ARGS]{"x": 1}', 10**6)
    assert (said, call["function"]["name"], call["function"]["arguments"]) == ("", "clamp", '{"x": 1}')


def test_a_long_end_of_blanks_is_read_quickly() -> None:
    """In the time of one pass over it: a server's event loop reads it."""
    text = "<tool_call>a" + " " * 200_000
    assert read("hermes", text, 10**6) == (text, [])


def test_text_is_not_held_back_where_no_call_can_begin() -> None:
    reader = CallReader(FORMATS["hermes"], NAMES)
    assert reader.push("a <b> and <tool", False) == ("a <b> and ", [])
    assert reader.push("box>", False) == ("<toolbox>", [])
    assert CallReader(FORMATS["llama3_json"], NAMES).push("I {", False) == ("I {", [])


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (TEMPLATE, "hermes"),
        ("Respond in the format {name, parameters} <|start_header_id|>ipython", "llama3_json"),
        ("[TOOL_CALLS] [AVAILABLE_TOOLS]", "mistral"),
        ("[TOOL_CALLS]{{ name }}[ARGS]", "mistral_args"),
        ("<tool_call><function={{ name }}> arguments", None),
        ("<tool_call>{{ name }}<arg_key> arguments", None),
        ("{{ messages }}", None),
    ],
)
def test_the_template_tells_the_format(template: str, name: str | None) -> None:
    assert format_of(template) is (FORMATS[name] if name else None)


@pytest.mark.parametrize("tool_format", FORMATS)
@pytest.mark.parametrize("is_special", [False, True])
def test_what_is_enforced_is_what_is_read(tool_format: str, is_special: bool) -> None:
    """The grammar takes a call as it is written, and no other function's, nor other arguments."""
    known = FORMATS[tool_format]
    tokenizer = load_tokenizer("tiny")
    marks = [*known.marks, "[ARGS]"]
    if is_special:
        tokenizer.add_special_tokens({"additional_special_tokens": marks})
    special = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in marks} if is_special else {}
    grammar = known.grammar(schemas([CLAMP["function"], SORT["function"]]), special)

    def takes(text: str) -> bool:
        grammar_text = LLMatcher.grammar_from_lark(grammar)
        matcher = LLMatcher(from_tokenizer(tokenizer, eos_token=[EOS]), grammar_text, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())

    written = known.before.replace("NAME", "clamp")
    assert takes(f'{written}{{"value": 3, "mode": "low"}}{known.after}')
    assert not takes(f'{written}{{"value": 300, "mode": "low"}}{known.after}')
    assert not takes(f"{written}{{}}{known.after}")
    assert takes(f'{written.replace("clamp", "sort")}{{"by": "size"}}{known.after}')
    assert not takes(f"{written.replace('clamp', 'other')}{{}}{known.after}")
    said, calls = read(tool_format, f'{written}{{"value": 3, "mode": "low"}}{known.after}', 1)
    assert (said, len(calls)) == ("", 1)


def scripted(text: str, finish_reason: str = "eos") -> FakeScheduler:
    """Says a text, in cycles of three tokens."""
    tokens = [*ids(text), *([EOS] if finish_reason == "eos" else [])]
    return FakeScheduler([(tokens[start : start + 3], 0) for start in range(0, len(tokens), 3)], finish_reason)


@pytest.fixture
def scheduler() -> FakeScheduler:
    return scripted(f"Well.\n{CALL}")


@pytest.fixture
def client(scheduler: FakeScheduler) -> Iterator[TestClient]:
    with client_of(scheduler, TOKENIZER) as client:
        yield client


def chat(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/chat/completions", json=CHAT | {"tools": [CLAMP, SORT]} | fields)


def test_an_answer_that_calls(client: TestClient, scheduler: FakeScheduler) -> None:
    (choice,) = chat(client).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Well.\n"
    (call,) = choice["message"]["tool_calls"]
    assert (call["type"], call["function"]["name"]) == ("function", "clamp")
    assert json.loads(call["function"]["arguments"]) == {"value": 3, "mode": "low"}
    prompt = TOKENIZER.decode(asked(scheduler).prompt)
    assert '"description": "to sort"' in prompt
    assert asked(scheduler).allowed is None


def test_a_stream_that_calls(client: TestClient) -> None:
    chunks = events(chat(client, stream=True).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta["content"] for delta in deltas) == "Well.\n"
    (call,) = deltas[-1]["tool_calls"]
    assert (call["index"], call["function"]["name"]) == (0, "clamp")
    assert not any("tool_calls" in delta for delta in deltas[:-1])
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_choice_of_none_is_not_told_of_tools(client: TestClient, scheduler: FakeScheduler) -> None:
    (choice,) = chat(client, tool_choice="none").json()["choices"]
    assert choice["message"]["content"] == f"Well.\n{CALL}"
    assert choice["finish_reason"] == "stop"
    assert "clamp" not in TOKENIZER.decode(asked(scheduler).prompt)


def test_calls_go_back_into_the_conversation(client: TestClient, scheduler: FakeScheduler) -> None:
    said = chat(client).json()["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "3"}
    assert chat(client, messages=[*CHAT["messages"], said, result]).status_code == 200
    prompt = TOKENIZER.decode(asked(scheduler).prompt)
    assert '<tool_call>{"name": "clamp", "arguments": {"value": 3, "mode": "low"}}</tool_call><|end|>' in prompt
    assert "<|tool|>\n3<|end|>" in prompt


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "sort"}}])
def test_a_call_may_be_required(client: TestClient, scheduler: FakeScheduler, choice: Any) -> None:
    assert chat(client, tool_choice=choice, n=2).status_code == 200
    first, second = (ticket.request.allowed for ticket in scheduler.submitted)
    assert first is not None and second is not None and first is not second
    assert first(ids('<tool_call>\n{"name": "sort", "arguments": {"by": "'))[ids("size")[0]]
    if choice == "required":
        assert first(ids('<tool_call>\n{"name": "'))[ids("clamp")[0]]
    else:
        assert not first(ids('<tool_call>\n{"name": "'))[ids("clamp")[0]]


def test_of_several_calls_the_first_one_alone() -> None:
    with client_of(scripted(f"{CALL}\n{CALL}"), TOKENIZER) as client:
        calls = [chat(client, parallel_tool_calls=flag).json()["choices"][0]["message"] for flag in (True, False)]
    assert [len(message["tool_calls"]) for message in calls] == [2, 1]
    assert calls[0]["content"] is None


def test_a_call_that_was_cut_is_text() -> None:
    with client_of(scripted(CALL[:50], "length"), TOKENIZER) as client:
        (choice,) = chat(client).json()["choices"]
    assert (choice["message"], choice["finish_reason"]) == ({"role": "assistant", "content": CALL[:50]}, "length")


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("tools", {"tools": [5]}),
    ("tools", {"tools": [{"type": "function"}]}),
    ("tools", {"tools": [{"type": "code_interpreter"}]}),
    ("tools", {"tools": [{"type": "function", "function": {"name": "with space"}}]}),
    ("tools", {"tools": [CLAMP, CLAMP]}),
    ("tools", {"tools": [CLAMP] * 129}),
    ("tools", {"tools": [{"type": "function", "function": {"name": "f", "description": "\ud800"}}]}),
    ("tools", {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}),
    ("tools", {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "objct"}}}]}),
    ("tools", {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}]}),
    ("tools", {"tools": [tool("f", x={"enum": [-(2**63)]})]}),
    ("tools", {"tools": [{"type": "function", "function": {"name": "f", "parameters": chain(1000)}}]}),
    ("tool_choice", {"tool_choice": "always"}),
    ("tool_choice", {"tool_choice": {"type": "function", "function": {"name": "other"}}}),
    ("tool_choice", {"tool_choice": {"type": "function"}}),
    ("tool_choice", {"tools": [], "tool_choice": "required"}),
    ("response_format", {"tool_choice": "auto", "response_format": {"type": "json_object"}}),
    ("min_tokens", {"min_tokens": 3}),
    ("ignore_eos", {"ignore_eos": True}),
]


@pytest.mark.parametrize(("field", "fields"), WRONG)
def test_a_wrong_field_is_named(client: TestClient, scheduler: FakeScheduler, field: str, fields: Any) -> None:
    content = json.dumps(CHAT | {"tools": [CLAMP], "tool_choice": "required"} | fields)
    response = client.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert problem(response)["param"] == field
    assert not scheduler.submitted


def test_models_that_know_no_tools() -> None:
    """Or write calls in a way that nobody has told of; a choice of none needs neither."""
    others = load_tokenizer("tiny")
    others.chat_template = TEMPLATE.replace("<tool_call>", "<call>")
    for tokenizer, says in ((load_tokenizer("tiny"), "knows none"), (others, "--tool-call-parser")):
        with client_of(FakeScheduler(), tokenizer) as client:
            error = problem(chat(client))
            assert error["param"] == "tools"
            assert says in error["message"]
    with client_of(scripted("Hello"), load_tokenizer("tiny")) as client:
        assert chat(client, tool_choice="none").status_code == 200


FLAT = [{"type": "function", **tool["function"]} for tool in (CLAMP, SORT)]


def respond(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/responses", json={"input": "Hello", "tools": FLAT} | fields)


def test_a_response_that_calls(client: TestClient, scheduler: FakeScheduler) -> None:
    """It is told of the tools as a chat is, and its calls are items behind what it says."""
    body = respond(client, tool_choice="auto", parallel_tool_calls=False).json()
    said, call = body["output"]
    assert (said["type"], said["content"][0]["text"]) == ("message", "Well.\n")
    assert (call["type"], call["name"], call["status"]) == ("function_call", "clamp", "completed")
    assert json.loads(call["arguments"]) == {"value": 3, "mode": "low"}
    told = (body["status"], body["tool_choice"], body["parallel_tool_calls"])
    assert told == ("completed", "auto", False)
    assert [tool["name"] for tool in body["tools"]] == ["clamp", "sort"]
    prompt = asked(scheduler).prompt
    chat(client)
    assert asked(scheduler).prompt == prompt


def test_the_events_of_a_response_that_calls(client: TestClient) -> None:
    """A message's events, then each call's; the last one has the same items."""
    read = response_events(respond(client, stream=True).text)
    kinds = [event["type"].removeprefix("response.") for event in read]
    arguments = ["function_call_arguments.delta", "function_call_arguments.done"]
    begun = kinds.index("output_text.done")
    assert kinds[begun:] == [
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", *arguments, "output_item.done", "completed"),
    ]
    added, delta, done, ended, last = read[-5:]
    call = last["response"]["output"][1]
    assert ended["item"] == call
    assert added["item"] == call | {"arguments": "", "status": "in_progress"}
    assert delta["delta"] == done["arguments"] == call["arguments"]
    assert {event["output_index"] for event in (added, delta, done, ended)} == {1}
    assert delta["item_id"] == done["item_id"] == call["id"]


def test_a_response_of_calls_alone_has_no_message() -> None:
    with client_of(scripted(f"{CALL}\n{CALL}"), TOKENIZER) as client:
        whole = respond(client).json()["output"]
        read = response_events(respond(client, stream=True).text)
    assert [item["type"] for item in whole] == ["function_call"] * 2
    added = [event["item"] for event in read if event["type"].endswith("output_item.added")]
    assert [item["type"] for item in added] == ["function_call"] * 2
    assert [event["output_index"] for event in read if "output_index" in event] == 4 * [0] + 4 * [1]


def test_calls_and_their_outputs_go_back_into_a_response(client: TestClient, scheduler: FakeScheduler) -> None:
    """As its output has them; the prompt is that of the same chat."""
    output = respond(client).json()["output"]
    result = {"call_id": output[1]["call_id"], "type": "function_call_output"}
    for text in ("3", [{"type": "input_text", "text": "3"}]):
        items = [*CHAT["messages"], *output, result | {"output": text}]
        assert respond(client, input=items).status_code == 200
        prompt = asked(scheduler).prompt
        function = {name: output[1][name] for name in ("name", "arguments")}
        call = {"id": output[1]["call_id"], "type": "function", "function": function}
        said = {"role": "assistant", "content": "Well.\n", "tool_calls": [call]}
        back = {"role": "tool", "tool_call_id": call["id"], "content": "3"}
        chat(client, messages=[*CHAT["messages"], said, back])
        assert asked(scheduler).prompt == prompt


def test_several_calls_in_a_row_are_one_answers(client: TestClient, scheduler: FakeScheduler) -> None:
    call = {"type": "function_call", "call_id": "a", "name": "sort", "arguments": "{}"}
    respond(client, input=[*CHAT["messages"], call, call | {"call_id": "b"}])
    assert TOKENIZER.decode(asked(scheduler).prompt).count("<|assistant|>") == 2


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "sort"}])
def test_a_response_may_have_to_call(client: TestClient, scheduler: FakeScheduler, choice: Any) -> None:
    body = respond(client, tool_choice=choice).json()
    assert body["tool_choice"] == choice
    allowed = asked(scheduler).allowed
    assert allowed is not None
    begun = ids('<tool_call>\n{"name": "')
    assert bool(allowed(begun)[ids("clamp")[0]]) == (choice == "required")


CALLED = {"type": "function_call", "call_id": "a", "name": "clamp", "arguments": "{}"}
WRONG_RESPONSES: list[tuple[str, dict[str, Any]]] = [
    ("tools", {"tools": [CLAMP]}),
    ("tools", {"tools": [{"type": "web_search"}]}),
    ("tools", {"tools": [FLAT[0], FLAT[0]]}),
    ("tool_choice", {"tool_choice": {"type": "function", "function": {"name": "sort"}}}),
    ("tool_choice", {"tool_choice": {"type": "function", "name": "other"}}),
    ("tool_choice", {"tools": [], "tool_choice": "required"}),
    ("text", {"text": {"format": {"type": "json_object"}}}),
    ("ignore_eos", {"tool_choice": "required", "ignore_eos": True}),
    ("input", {"input": [{"type": "reasoning", "summary": []}]}),
    ("input", {"input": [CALLED | {"call_id": 5}]}),
    ("input", {"input": [CALLED | {"name": None}]}),
    ("input", {"input": [CALLED | {"arguments": "5"}]}),
    ("input", {"input": [{"type": "function_call_output", "output": "3"}]}),
    ("input", {"input": [{"type": "function_call_output", "call_id": "a", "output": 3}]}),
]


@pytest.mark.parametrize(("field", "fields"), WRONG_RESPONSES)
def test_a_wrong_field_of_a_response_is_named(
    client: TestClient, scheduler: FakeScheduler, field: str, fields: Any
) -> None:
    assert problem(respond(client, **fields))["param"] == field
    assert not scheduler.submitted


def test_tools_count_among_the_tokens(client: TestClient, scheduler: FakeScheduler) -> None:
    """As the chat counts them; a choice of none leaves them out in both."""
    for choice in ("auto", "none"):
        fields = {"tools": [CLAMP, SORT], "tool_choice": choice}
        counted = client.post("/tokenize", json=CHAT | fields).json()
        chat(client, tool_choice=choice)
        assert counted["tokens"] == list(asked(scheduler).prompt)
    error = problem(client.post("/tokenize", json={"prompt": "x", "tools": [CLAMP]}))
    assert error["param"] == "tools"
    with client_of(FakeScheduler(), load_tokenizer("tiny")) as other:
        problem(other.post("/tokenize", json=CHAT | {"tools": [CLAMP]}))


SCHEMA_WORDS = ["type", "function", "name", "parameters", "properties", "enum", "$ref", "$defs", "anyOf", "x-guidance"]
PARTS = st.recursive(
    st.none()
    | st.integers(-3, 3)
    | st.sampled_from(["function", "f", "object", "integer", "#/$defs/x", "\ud800", "auto"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(SCHEMA_WORDS), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PARTS, st.sampled_from(["auto", "required", "none", None]) | PARTS, st.booleans())
def test_no_tool_is_a_server_error(client: TestClient, part: Any, choice: Any, is_schema: bool) -> None:
    """Whatever stands for tools, and for the schema of one's arguments."""
    function = {"type": "function", "function": {"name": "f", "parameters": part}}
    body = CHAT | {"tools": [function] if is_schema else part, "tool_choice": choice, "max_tokens": 4}
    headers = {"content-type": "application/json"}
    response = client.post("/v1/chat/completions", content=json.dumps(body), headers=headers)
    assert response.status_code in (200, 400), response.text
