"""POST /v1/responses over a scripted engine: its form, its events, and what needs a store."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason='pip install "draftwing[serve]"')

from fake_scheduler import FakeScheduler
from fastapi.testclient import TestClient
from test_serving import CHAT, CYCLES, SAID, asked, client_of, ids, problem
from tools_template import chain

INPUT = {"input": "Hello"}


@pytest.fixture
def scheduler() -> FakeScheduler:
    return FakeScheduler(CYCLES, "stop")


@pytest.fixture
def client(scheduler: FakeScheduler) -> Iterator[TestClient]:
    with client_of(scheduler) as client:
        yield client


def test_a_response_has_openais_form(client: TestClient, scheduler: FakeScheduler) -> None:
    asks = {"temperature": 0.5, "top_p": 0.9, "max_output_tokens": 9, "seed": 7, "store": False, "draft": False}
    body = client.post("/v1/responses", json=INPUT | asks).json()
    assert body["id"].startswith("resp_")
    (item,) = body.pop("output")
    assert (item["role"], item["status"]) == ("assistant", "completed")
    assert item["content"] == [{"type": "output_text", "text": "    return args", "annotations": []}]
    told = ("object", "status", "error", "seed", "temperature", "top_p", "max_output_tokens", "store", "text")
    expected = ["response", "completed", None, 7, 0.5, 0.9, 9, False, {"format": {"type": "text"}}]
    assert [body[name] for name in told] == expected
    assert body["usage"]["output_tokens"] == len(SAID)
    assert body["usage"]["input_tokens_details"] == {"cached_tokens": 2}
    assert body["usage"]["output_tokens_details"]["accepted_prediction_tokens"] == len(SAID) - 2
    request = asked(scheduler)
    assert (request.stop.max_new_tokens, request.drafts, request.sampling.temperature) == (9, False, 0.5)


@pytest.mark.parametrize(
    "given",
    [
        {"input": [{"role": "user", "content": "Hello"}]},
        {
            "input": [
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}], "id": "x"}
            ]
        },
    ],
)
def test_inputs_are_conversations(client: TestClient, scheduler: FakeScheduler, given: dict[str, Any]) -> None:
    client.post("/v1/responses", json=INPUT)
    as_text = asked(scheduler).prompt
    assert list(as_text) == ids("<|user|>\nHello<|end|>\n<|assistant|>\n")
    client.post("/v1/responses", json=given)
    assert asked(scheduler).prompt == as_text
    client.post("/v1/responses", json=given | {"instructions": "Be brief."})
    assert list(asked(scheduler).prompt) == ids("<|system|>\nBe brief.<|end|>\n") + list(as_text)


def test_a_conversation_goes_on(client: TestClient, scheduler: FakeScheduler) -> None:
    """With what was answered in front, as its output has it."""
    output = client.post("/v1/responses", json=INPUT).json()["output"]
    more = {"role": "user", "content": "More"}
    assert client.post("/v1/responses", json={"input": [*CHAT["messages"], *output, more]}).status_code == 200
    chat = [*CHAT["messages"], {"role": "assistant", "content": "    return args"}, more]
    prompt = asked(scheduler).prompt
    client.post("/v1/chat/completions", json={"messages": chat})
    assert asked(scheduler).prompt == prompt


def events(text: str) -> list[dict[str, Any]]:
    """A stream's events; the name of each is its type, and they are numbered."""
    read = []
    for part in text.split("\n\n")[:-1]:
        name, data = part.split("\n")
        read.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {read[-1]['type']}"
    assert [event["sequence_number"] for event in read] == list(range(len(read)))
    return read


def test_a_streams_events(client: TestClient) -> None:
    read = events(client.post("/v1/responses", json=INPUT | {"stream": True}).text)
    before = ["created", "in_progress", "output_item.added", "content_part.added"]
    after = ["output_text.done", "content_part.done", "output_item.done", "completed"]
    expected = [*before, *["output_text.delta"] * len(CYCLES), *after]
    assert [event["type"].removeprefix("response.") for event in read] == expected
    assert "".join(event["delta"] for event in read if "delta" in event) == "    return args"
    last = read[-1]["response"]
    assert last["output"][0] == read[-2]["item"]
    assert (last["id"], last["status"]) == (read[0]["response"]["id"], "completed")
    assert last["usage"]["output_tokens"] == len(SAID)


def test_a_response_that_was_cut() -> None:
    with client_of(FakeScheduler(CYCLES, "length")) as client:
        body = client.post("/v1/responses", json=INPUT).json()
        last = events(client.post("/v1/responses", json=INPUT | {"stream": True}).text)[-1]
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert (last["type"], last["response"]["status"]) == ("response.incomplete", "incomplete")


def test_a_response_that_fails() -> None:
    with client_of(FakeScheduler(CYCLES, None, "the request has failed (MemoryError)")) as client:
        problem(client.post("/v1/responses", json=INPUT), 500)
        last = events(client.post("/v1/responses", json=INPUT | {"stream": True}).text)[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert "MemoryError" in last["response"]["error"]["message"]


def test_a_form(client: TestClient, scheduler: FakeScheduler) -> None:
    form = {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}
    assert client.post("/v1/responses", json=INPUT | {"text": {"format": form}}).json()["text"] == {"format": form}
    assert asked(scheduler).allowed is not None
    assert client.post("/v1/responses", json=INPUT | {"text": {"format": {"type": "text"}}}).status_code == 200
    assert asked(scheduler).allowed is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("previous_response_id", "resp_1"),
        ("store", True),
        ("background", True),
        ("conversation", "conv_1"),
        ("tools", [{"type": "web_search"}]),
        ("truncation", "auto"),
        ("reasoning", {"effort": "low"}),
        ("include", ["message.output_text.logprobs"]),
        ("max_tokens", 5),
        ("response_format", {"type": "text"}),
        ("n", 2),
        ("max_output_tokens", 0),
        ("max_output_tokens", "5"),
        ("input", 5),
        ("input", []),
        ("input", [{"type": "item_reference", "id": "x"}]),
        ("input", [{"role": "nobody", "content": "x"}]),
        ("input", "\ud800"),
        ("input", "x " * 600),
        ("instructions", "\ud800"),
        ("text", {"format": {"type": "xml"}}),
        ("text", {"format": {"type": "json_schema", "name": "\ud800", "schema": {}}}),
        ("text", {"format": {"type": "json_schema", "name": "x"}}),
        ("text", {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}),
        ("text", {"format": {"type": "json_schema", "name": "x", "schema": chain(1000)}}),
        ("text", {"format": {"type": "regex", "regex": "a" * 5000}}),
        ("text", {"format": {"type": "text", "regex": "a"}}),
        ("min_tokens", 700),
    ],
)
def test_a_wrong_field_is_named(client: TestClient, scheduler: FakeScheduler, field: str, value: Any) -> None:
    headers = {"content-type": "application/json"}
    error = problem(client.post("/v1/responses", content=json.dumps(INPUT | {field: value}), headers=headers))
    assert error["param"] == field
    assert error["message"].startswith(field)
    assert not scheduler.submitted


@pytest.mark.parametrize(
    "fields",
    [
        *({"store": None}, {"tools": []}, {"metadata": {"a": "b"}}, {"truncation": "disabled"}, {"include": []}),
        {"include": ["reasoning.encrypted_content"]},
        {"stream": True, "stream_options": {"include_obfuscation": False}},
        {"stream": True, "stream_options": None},
        {"stream": True, "stream_options": {"include_usage": None, "draftwing": False}},
        {"text": {"format": None, "verbosity": None}},
        {"text": {"format": {"type": "text", "regex": None, "strictness": None}}},
    ],
)
def test_fields_that_change_nothing_are_taken(client: TestClient, fields: dict[str, Any]) -> None:
    assert client.post("/v1/responses", json=INPUT | fields).status_code == 200


def test_metadata_come_back(client: TestClient) -> None:
    given = {"metadata": {"a": "b"}}
    assert client.post("/v1/responses", json=INPUT | given).json()["metadata"] == given["metadata"]
    assert client.post("/v1/responses", json=INPUT).json()["metadata"] == {}


def test_a_streams_options_are_not_a_chats(client: TestClient) -> None:
    body = {"stream": True, "stream_options": {"include_usage": True}}
    assert problem(client.post("/v1/responses", json=INPUT | body))["param"] == "stream_options"


def test_nothing_is_stored(client: TestClient) -> None:
    name = client.post("/v1/responses", json=INPUT).json()["id"]
    problem(client.get(f"/v1/responses/{name}"), 404)
