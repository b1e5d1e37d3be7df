"""The server's protocol over a scripted engine: what bodies ask for, what is answered, and what is refused."""

import json
import logging
import re
import threading
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi", reason='pip install "draftwing[serve]"')

from fake_scheduler import FakeScheduler
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from tools_template import chain
from transformers import PreTrainedTokenizerFast

from draftwing.engine.engine import Request
from draftwing.engine.logprobs import TokenLogprobs
from draftwing.engine.options import row_seed
from draftwing.serving.answers import Answer
from draftwing.serving.app import create_app
from draftwing.serving.intake import Intake
from draftwing.serving.json_lines import JsonLines, json_lines
from draftwing.serving.schema import MAX_BODY_BYTES
from draftwing.serving.streams import Identity, likeliest, name_of
from draftwing.serving.token_texts import Offsets, TokenTexts
from draftwing.target.load import load_tokenizer

TOKENIZER = load_tokenizer("tiny")
EOS = TOKENIZER.eos_token_id
IDENTITY = Identity("tiny", "org/tiny", "draftwing-test")
CHAT = {"messages": [{"role": "user", "content": "Hello"}]}
TEXT = {"prompt": "def main(args):"}
LIMITS = ("max_tokens", "max_completion_tokens")
"""What chats call the number of new tokens."""


def ids(text: str) -> list[int]:
    tokens: list[int] = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return tokens


SAID = ids("    return args")
CYCLES = [(SAID[:1], 0), (SAID[1:], len(SAID) - 2)]


def client_of(
    scheduler: FakeScheduler, tokenizer: Any = TOKENIZER, max_new_tokens: int | None = None, **options: Any
) -> TestClient:
    target = SimpleNamespace(vocab_size=len(TOKENIZER), eos_token_ids=(EOS, 0))
    model = SimpleNamespace(tokenizer=tokenizer, target=target)
    intake = Intake(model, scheduler, max_new_tokens)  # type: ignore[arg-type]
    app = create_app(scheduler, intake, IDENTITY, **options)  # type: ignore[arg-type]
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def scheduler() -> FakeScheduler:
    return FakeScheduler(CYCLES)


@pytest.fixture
def client(scheduler: FakeScheduler) -> Iterator[TestClient]:
    with client_of(scheduler) as client:
        yield client


def asked(scheduler: FakeScheduler) -> Request:
    """The last request that was submitted."""
    return scheduler.submitted[-1].request


def events(text: str) -> list[Any]:
    """A stream's chunks; its last line says that it is done."""
    lines = [line for line in text.split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def problem(response: Any, status: int = 400) -> dict[str, Any]:
    """The one form of errors."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_a_completion_has_openais_form(client: TestClient) -> None:
    body = client.post("/v1/completions", json=TEXT | {"seed": 7}).json()
    assert body["id"].startswith("cmpl-")
    assert (body["object"], body["model"], body["seed"]) == ("text_completion", "tiny", 7)
    choice = {"index": 0, "text": "    return args", "logprobs": None, "finish_reason": "length"}
    assert body["choices"] == [choice]
    drafted = len(SAID) - 2
    assert body["usage"] == {
        "prompt_tokens": len(ids(TEXT["prompt"])),
        "completion_tokens": len(SAID),
        "total_tokens": len(ids(TEXT["prompt"])) + len(SAID),
        "prompt_tokens_details": {"cached_tokens": 2},
        "completion_tokens_details": {
            "accepted_prediction_tokens": drafted,
            "rejected_prediction_tokens": 8 - drafted,
        },
    }


def test_what_drafting_brought_adds_up(client: TestClient) -> None:
    """What AIPerf checks before it believes the figures."""
    figures = client.post("/v1/completions", json=TEXT).json()["metrics"]["speculative_decoding"]
    histogram = figures["acceptance_histogram"]
    assert sum(histogram) == figures["num_spec_steps"] == 2
    accepted = sum(number * count for number, count in enumerate(histogram))
    assert accepted == figures["num_accepted_draft_tokens"] <= figures["num_draft_tokens"]
    assert figures["mean_acceptance_length"] == 1 + accepted / 2
    assert figures["draft_acceptance_rate"] == accepted / figures["num_draft_tokens"]


def test_a_chat_has_openais_form(client: TestClient, scheduler: FakeScheduler) -> None:
    body = client.post("/v1/chat/completions", json=CHAT).json()
    assert body["object"] == "chat.completion"
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "    return args"}
    assert list(asked(scheduler).prompt) == ids("<|user|>\nHello<|end|>\n<|assistant|>\n")


def test_content_may_be_a_list_of_texts(client: TestClient, scheduler: FakeScheduler) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": parts}]})
    in_parts = asked(scheduler).prompt
    client.post("/v1/chat/completions", json=CHAT)
    assert in_parts == asked(scheduler).prompt


def test_a_streams_pieces_are_the_answer(client: TestClient) -> None:
    options = {"include_usage": True, "draftwing": True}
    response = client.post("/v1/chat/completions", json=CHAT | {"stream": True, "stream_options": options})
    assert response.headers["content-type"].startswith("text/event-stream")
    first, second, last = events(response.text)
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"]["role"] == "assistant"  # with the first token
    assert first["choices"][0]["delta"]["content"]
    assert first["usage"] is None
    said = [chunk["choices"][0]["delta"]["content"] for chunk in (first, second)]
    assert "".join(said) == "    return args"
    assert second["choices"][0]["finish_reason"] == "length"
    drafted = second["draftwing"]
    assert "".join(text for text, _ in drafted["pieces"]) == said[1]
    assert (drafted["num_tokens"], drafted["num_accepted"]) == (len(SAID) - 1, len(SAID) - 2)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len(SAID)
    assert {chunk["seed"] for chunk in (first, second, last)} == {first["seed"]}


def test_usage_goes_with_every_chunk_on_request(client: TestClient) -> None:
    options = {"continuous_usage_stats": True, "include_usage": True}
    chunks = events(client.post("/v1/completions", json=TEXT | {"stream": True, "stream_options": options}).text)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, len(SAID), len(SAID)]


def test_a_stream_without_options_has_chunks_alone(client: TestClient) -> None:
    chunks = events(client.post("/v1/completions", json=TEXT | {"stream": True}).text)
    assert len(chunks) == 2
    assert not any("usage" in chunk or "draftwing" in chunk for chunk in chunks)


def test_fields_become_what_the_engine_is_asked_for(client: TestClient, scheduler: FakeScheduler) -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "seed": -1}
    more = {"logit_bias": {"5": -3}, "max_tokens": 9, "stop": ["ab", "c"], "stop_token_ids": [9], "logprobs": 2}
    more |= {"presence_penalty": -0.5, "frequency_penalty": 1.5, "min_tokens": 4}
    assert client.post("/v1/completions", json={"prompt": [5, 6]} | fields | more).status_code == 200
    request = asked(scheduler)
    sampling, stop = request.sampling, request.stop
    assert list(request.prompt) == [5, 6]
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 5, 0.1)
    assert (sampling.repetition_penalty, sampling.logit_bias) == (1.1, {5: -3.0})
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-0.5, 1.5)
    assert sampling.seed == 2**63 - 1
    assert (stop.max_new_tokens, stop.min_new_tokens) == (9, 4)
    assert (stop.stop_strings, stop.eos_token_ids) == (("ab", "c"), (EOS, 0, 9))
    assert (request.num_logprobs, request.scores_prompt) == (2, False)
    client.post("/v1/completions", json={"prompt": [5, 6], "ignore_eos": True, "top_k": -1, "n": None})
    assert asked(scheduler).stop.eos_token_ids == ()
    assert (asked(scheduler).sampling.top_k, asked(scheduler).sampling.temperature) == (0, 1.0)


@pytest.mark.parametrize(("given", "drafts"), [({}, True), ({"draft": True}, True), ({"draft": False}, False)])
def test_drafts_may_be_left_out(
    client: TestClient, scheduler: FakeScheduler, given: dict[str, bool], drafts: bool
) -> None:
    for route, body in (("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)):
        assert client.post(route, json=body | given).status_code == 200
        assert asked(scheduler).drafts is drafts


def test_how_many_tokens_there_may_be(client: TestClient, scheduler: FakeScheduler) -> None:
    client.post("/v1/completions", json={"prompt": [5]})
    assert asked(scheduler).stop.max_new_tokens == 16
    client.post("/v1/chat/completions", json=CHAT)
    assert asked(scheduler).stop.max_new_tokens == 512 - len(asked(scheduler).prompt)
    client.post("/v1/chat/completions", json=CHAT | {"max_tokens": 3, "max_completion_tokens": 5})
    assert asked(scheduler).stop.max_new_tokens == 5


def test_several_answers_to_several_prompts(client: TestClient, scheduler: FakeScheduler) -> None:
    body = client.post("/v1/completions", json={"prompt": ["a", "b b"], "n": 2, "seed": 3}).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    requests = [ticket.request for ticket in scheduler.submitted]
    assert [list(request.prompt) for request in requests] == [ids("a"), ids("a"), ids("b b"), ids("b b")]
    assert [request.sampling.seed for request in requests] == [row_seed(3, index) for index in range(4)]
    assert body["usage"]["prompt_tokens"] == len(ids("a")) + len(ids("b b"))
    assert body["usage"]["completion_tokens"] == 4 * len(SAID)


def test_a_drawn_seed_is_returned(client: TestClient, scheduler: FakeScheduler) -> None:
    seeds = []
    for _ in range(2):
        seeds.append(client.post("/v1/completions", json=TEXT).json()["seed"])
        assert asked(scheduler).sampling.seed == seeds[-1]
    assert seeds[0] != seeds[1]


def test_log_probabilities_of_a_chat(client: TestClient) -> None:
    body = client.post("/v1/chat/completions", json=CHAT | {"logprobs": True, "top_logprobs": 2}).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [TOKENIZER.decode([token]) for token in SAID]
    assert content[0]["logprob"] == -1.0
    assert bytes(content[0]["bytes"]).decode() == content[0]["token"]
    assert [entry["logprob"] for entry in content[0]["top_logprobs"]] == [-0.5, -1.0]


def test_log_probabilities_of_a_completion_with_its_prompt(client: TestClient, scheduler: FakeScheduler) -> None:
    """What lm-eval reads: the prompt's tokens first, the first of them without."""
    body = {"prompt": [SAID], "echo": True, "logprobs": 1, "max_tokens": 1}
    choice = client.post("/v1/completions", json=body).json()["choices"][0]
    assert asked(scheduler).scores_prompt
    written = choice["logprobs"]
    assert choice["text"] == "    return args" * 2
    assert "".join(written["tokens"]) == choice["text"]
    assert written["token_logprobs"] == [None, *[-1.0] * (2 * len(SAID) - 1)]
    assert written["top_logprobs"][0] is None
    assert len(written["top_logprobs"]) == len(written["token_logprobs"])
    assert_offsets(choice, slice(None))


@pytest.mark.parametrize("prompt", [ids(TEXT["prompt"]), [5]])
def test_an_echo_alone_shows_no_new_token(prompt: list[int]) -> None:
    with client_of(FakeScheduler([(prompt[-1:], 0)])) as client:
        body = {"prompt": prompt, "echo": True, "max_tokens": 0, "logprobs": 0}
        answer = client.post("/v1/completions", json=body).json()
    assert answer["choices"][0]["text"] == TOKENIZER.decode(prompt)
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == [None] + [-1.0] * (len(prompt) - 1)
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert answer["choices"][0]["finish_reason"] == "length"
    details = {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}
    assert (answer["usage"]["completion_tokens"], answer["usage"]["completion_tokens_details"]) == (0, details)


def test_tokens_of_one_text_are_told_apart() -> None:
    """lm-eval takes the likeliest name for the chosen one: two tokens must not share one."""
    texts, same = TokenTexts(TOKENIZER), SameTexts(TOKENIZER)
    half, other = ids("字")[:2]
    names = likeliest(half, TokenLogprobs(-2.0, [(other, -1.0), (SAID[0], -1.5)]), texts, by_id=False)
    assert len(names) == 3
    assert list(names.values()) == [-1.0, -1.5, -2.0]
    assert name_of(half, texts, by_id=False).startswith("bytes:\\x")
    chances = TokenLogprobs(-2.0, [(8, -1.0)])
    assert likeliest(7, chances, same, by_id=False) == {"token_id:8": -1.0, "same": -2.0}
    assert likeliest(7, chances, same, by_id=True) == {"token_id:8": -1.0, "token_id:7": -2.0}


def test_a_prompt_as_long_as_the_context_is_scored(client: TestClient, scheduler: FakeScheduler) -> None:
    body = {"prompt": [[5] * 512], "echo": True, "max_tokens": 0, "logprobs": 0, "min_tokens": 0}
    assert client.post("/v1/completions", json=body).status_code == 200
    assert asked(scheduler).most_tokens == 512
    allowed = asked(scheduler).allowed
    assert allowed is not None
    assert allowed([]).nonzero().tolist() == [[5]]
    error = problem(client.post("/v1/completions", json=body | {"prompt": [[5] * 513]}))
    assert error["message"].endswith("513 of the prompt and 0 new ones do not fit into it")
    error = problem(client.post("/v1/completions", json=body | {"max_tokens": 1}))
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")


def test_offsets_behind_a_token_that_the_tokenizer_adds() -> None:
    """The echo does not show it, so the prompt's first token stands at the beginning."""
    tokenizer = load_tokenizer("tiny")
    added = TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", EOS)])
    tokenizer.backend_tokenizer.post_processor = added
    with client_of(FakeScheduler([*CYCLES, ([EOS], 0)], "eos"), tokenizer) as client:
        body = TEXT | {"echo": True, "logprobs": 0}
        choice = client.post("/v1/completions", json=body).json()["choices"][0]
        as_ids = client.post("/v1/completions", json=body | {"prompt": [EOS, *SAID]}).json()["choices"][0]
    assert choice["text"] == TEXT["prompt"] + "    return args"
    assert choice["logprobs"]["tokens"][0] == "<|end|>"
    assert choice["logprobs"]["text_offset"][:2] == [0, 0]
    assert choice["logprobs"]["text_offset"][-1] == len(choice["text"])
    assert_offsets(choice, slice(1, -1))
    assert as_ids["text"].startswith("<|end|>")
    assert_offsets(as_ids, slice(0, -1))


def assert_offsets(choice: dict[str, Any], tokens: slice) -> None:
    """Each token stands where it is said to stand."""
    written = choice["logprobs"]
    offsets = list(zip(written["tokens"], written["text_offset"], strict=True))[tokens]
    assert all(choice["text"].startswith(token, start) for token, start in offsets), offsets


def test_offsets_where_beginnings_eat_a_space() -> None:
    words = {"\u2581Hello": 0, "\u2581world": 1, "<unk>": 2, "<s>": 3}
    backend = Tokenizer(WordLevel(words, "<unk>"))
    backend.pre_tokenizer, backend.decoder = Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")
    echoed = Offsets(tokenizer, [3], [3, 0, 1], "Hello world")
    assert [echoed.next(token) for token in (3, 0, 1, 0, 3, 1)] == [0, 0, 5, 11, 17, 17]
    alone = Offsets(tokenizer, [3])
    assert [alone.next(token) for token in (0, 1, 3, 1)] == [0, 6, 12, 12]


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_are_named_beside_the_event_loop(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scored prompt's thousands of names must not keep others' streams waiting."""
    threads = set[str]()

    def text(self: TokenTexts, token: int) -> str:
        threads.add(threading.current_thread().name)
        return "x"

    monkeypatch.setattr(TokenTexts, "text", text)
    with client_of(FakeScheduler(CYCLES)) as client:
        for route, body in (("/v1/completions", TEXT | {"logprobs": 1}), ("/v1/chat/completions", CHAT)):
            more = {"logprobs": True, "top_logprobs": 1} if body is CHAT else {}
            assert client.post(route, json=body | more | {"stream": stream}).status_code == 200
    assert all(name.startswith("draftwing-tokenizer") for name in threads)
    assert threads


class SameTexts(TokenTexts):
    """A vocabulary whose tokens all read alike."""

    def text(self, token: int) -> str:
        return "same"


def test_bytes_of_half_a_character(client: TestClient) -> None:
    half = ids("字")[0]
    scheduler = FakeScheduler([([half], 0)])
    with client_of(scheduler) as client:
        body = client.post("/v1/chat/completions", json=CHAT | {"logprobs": True}).json()
    (entry,) = body["choices"][0]["logprobs"]["content"]
    assert entry["token"] == "\ufffd"
    assert entry["bytes"] == list("字".encode())[: len(entry["bytes"])]


@pytest.mark.parametrize("ends_with", ["args", " args", "rgs"])
def test_a_stop_string_is_cut_off(ends_with: str) -> None:
    with client_of(FakeScheduler(CYCLES, "stop")) as client:
        body = {"stop": ends_with, "stream": True}
        chunks = events(client.post("/v1/completions", json=TEXT | body).text)
        said = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert said == "    return args".removesuffix(ends_with)
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        body = {"stop": ends_with, "include_stop_str_in_output": True}
        answer = client.post("/v1/completions", json=TEXT | body).json()
        assert answer["choices"][0]["text"] == "    return args"


def test_the_end_of_sequence_is_no_text() -> None:
    with client_of(FakeScheduler([([*SAID, EOS], 0)], "eos")) as client:
        choice = client.post("/v1/completions", json=TEXT).json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("    return args", "stop")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("chat_template", "{{ 1 }}"),
        ("tempratur", 1),
        ("max_token", 5),
        ("temperature", -1),
        ("temperature", 1e39),
        ("stop_token_ids", [99999]),
        ("min_length", 3),
        ("guided_whatever", "x"),
        ("spaces_between_special_tokens", False),
        ("n_predict", 5),
        ("temp", 1),
        ("Seed", 5),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("min_p", 2),
        ("n", 0),
        ("n", 17),
        ("best_of", 2),
        ("presence_penalty", 3),
        ("frequency_penalty", "x"),
        ("repetition_penalty", 0),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"99999": 1}),
        ("logit_bias", {"5": 1000}),
        ("logit_bias", [1]),
        ("seed", 1.5),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("stop", ""),
        ("stop", ["a"] * 17),
        ("stop", "x" * 257),
        ("stop_token_ids", [-1]),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("max_tokens", 0),
        ("max_tokens", 1000),
        ("min_tokens", -1),
        ("min_tokens", 700),
        ("model", 5),
    ],
)
def test_a_wrong_field_is_named(client: TestClient, scheduler: FakeScheduler, field: str, value: Any) -> None:
    for route, body in (("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)):
        error = problem(client.post(route, json=body | {field: value}))
        assert error["type"] == "invalid_request_error"
        if (field, value) == ("max_tokens", 1000):
            assert error["code"] == "context_length_exceeded"
            assert "512" in error["message"]
        else:
            assert error["param"] == field
            assert field in error["message"]
    assert not scheduler.submitted


WRONG_FORMS = [
    "json_object",
    {},
    {"type": "xml"},
    {"type": "json_object", "schema": {"type": "object"}},
    {"type": "text", "regex": "a"},
    {"type": "json_schema"},
    {"type": "json_schema", "json_schema": {"name": "x"}},
    {"type": "json_schema", "json_schema": {"name": "x", "schema": 5}},
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objct"}}},
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}},
    {"type": "json_schema", "json_schema": {"schema": {"x-guidance": {"lenient": True}, "uniqueItems": True}}},
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "http://host/x"}}},
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": []}}},
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["\ud800"]}}},
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [[{"a": -(2**63) + 1}]]}}},
    {"type": "json_schema", "json_schema": {"name": "x", "schema": chain(1000)}},
    {"type": "json_schema", "json_schema": {"schema": {"type": "integer", "minimum": -1e30, "maximum": -1e29}}},
    {"type": "regex"},
    {"type": "regex", "regex": "(a"},
    {"type": "regex", "regex": r"(a)\1"},
    {"type": "regex", "regex": r"a[^\s\S]"},
    {"type": "regex", "regex": "\ud800"},
    {"type": "regex", "regex": "a" * 5000},
    {"type": "regex", "regex": "(a{1000}){1000}"},
    {"type": "json_schema", "json_schema": {"schema": {"type": "string", "pattern": "(a{1000}){1000}"}}},
    {"type": "json_schema", "json_schema": {"schema": {"patternProperties": {"(a{1000}){1000}": {}}}}},
]


@pytest.mark.parametrize("form", WRONG_FORMS)
def test_a_wrong_form_is_named(client: TestClient, scheduler: FakeScheduler, form: Any) -> None:
    headers = {"content-type": "application/json"}
    content = json.dumps(TEXT | {"response_format": form})
    error = problem(client.post("/v1/completions", content=content, headers=headers))
    assert error["param"] == "response_format"
    assert error["message"].startswith("response_format")
    assert "<state>" not in error["message"]
    assert not scheduler.submitted


def test_each_answer_is_asked_about_alone(client: TestClient, scheduler: FakeScheduler) -> None:
    body = {"response_format": {"type": "regex", "regex": "[a-c]{2}"}, "n": 2}
    assert client.post("/v1/completions", json=TEXT | body).status_code == 200
    first, second = (ticket.request.allowed for ticket in scheduler.submitted)
    assert first is not None
    assert second is not None
    assert first is not second
    assert not first(ids("ab"))[ids("a")].any()
    assert second([])[ids("a")].all()
    assert client.post("/v1/completions", json=TEXT).status_code == 200
    assert asked(scheduler).allowed is None


@pytest.mark.parametrize("field", [{"ignore_eos": True}, {"min_tokens": 2}])
def test_a_form_ends_where_it_is_complete(client: TestClient, field: dict[str, Any]) -> None:
    body = TEXT | field | {"response_format": {"type": "json_object"}}
    assert problem(client.post("/v1/completions", json=body))["param"] in field
    assert client.post("/v1/completions", json=body | {"response_format": {"type": "text"}}).status_code == 200


@pytest.mark.parametrize(
    "prompt", ["", [], [[]], [1, "a"], ["a", 1], 5, None, {}, [99999], [-1], [[1], [2.5]], ["a"] * 65, [[1]] * 17]
)
def test_a_wrong_prompt_is_refused(client: TestClient, prompt: Any) -> None:
    error = problem(client.post("/v1/completions", json={"prompt": prompt}))
    assert error["param"] in ("prompt", "n")
    assert not re.search("nput should|union|Value error|tuple", error["message"]), "a schema's words are no plain ones"


def test_a_field_of_several_forms_says_which(client: TestClient) -> None:
    message = problem(client.post("/v1/completions", json={"prompt": [1, "a"]}))["message"]
    assert message == "prompt: expected a text, a list of token ids, or a list of 1 to 64 of either"
    message = problem(client.post("/v1/completions", json=TEXT | {"stop": [5]}))["message"]
    assert message == "stop: expected a text of 1 to 256 characters, or up to 16 of them"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hello",
        [5],
        [{}],
        [{"role": "user"}],
        [{"role": "nobody", "content": "x"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": "\ud800"}],
        [{"role": "user", "content": "x " * 600}],
    ],
)
def test_wrong_messages_are_refused(client: TestClient, messages: Any) -> None:
    content = json.dumps({"messages": messages})
    error = problem(client.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"}))
    assert error["param"] == "messages"


@pytest.mark.parametrize(
    ("field", "value"),
    [("user", "me"), ("tools", []), ("tool_choice", "none"), ("store", False), ("suffix", ""), ("x_of_mine", 1)]
    + [("response_format", {"type": "text"}), ("use_beam_search", False), ("length_penalty", 1.0), ("seed", None)],
)
def test_fields_that_change_nothing_are_taken(client: TestClient, field: str, value: Any) -> None:
    assert client.post("/v1/completions", json=TEXT | {field: value}).status_code == 200


@pytest.mark.parametrize(
    ("content", "kind"),
    [(b"{", "application/json"), (b"[]", "application/json"), (b"", "application/json"), (b"\xff", "application/json")]
    + [(b'{"prompt": "x"}', "text/plain"), (b"[" * 100_000, "application/json"), (b"prompt=x", "application/json")],
)
def test_bodies_that_are_no_object(client: TestClient, content: bytes, kind: str) -> None:
    problem(client.post("/v1/completions", content=content, headers={"content-type": kind}))


def test_too_large_bodies(client: TestClient) -> None:
    problem(client.post("/v1/completions", content=b"x" * (MAX_BODY_BYTES + 1)), 413)

    def in_pieces() -> Iterator[bytes]:
        for _ in range(MAX_BODY_BYTES // 2**16 + 1):
            yield b" " * 2**16

    headers = {"content-type": "application/json"}
    problem(client.post("/v1/completions", content=in_pieces(), headers=headers), 413)


def test_too_many_fields_are_refused_before_they_are_looked_at(client: TestClient) -> None:
    fields = {f"temperatur{number}": 1 for number in range(100_000)}
    assert "unknown fields" in problem(client.post("/v1/completions", json=TEXT | fields))["message"]
    bias = {"logit_bias": {str(number): "x" for number in range(100_000)}}
    assert problem(client.post("/v1/completions", json=TEXT | bias))["param"] == "logit_bias"


def test_unknown_fields_are_logged_by_name(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "draftwing")
    client.post("/v1/completions", json=TEXT | {"user": "me", "x_of_mine": "secret"})
    assert [message for message in caplog.messages if "x_of_mine" in message]
    assert not any("secret" in message or "user" in message for message in caplog.messages)


def test_unknown_models_paths_and_methods(client: TestClient) -> None:
    error = problem(client.post("/v1/completions", json=TEXT | {"model": "gpt-9"}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert client.post("/v1/completions", json=TEXT | {"model": "org/tiny"}).status_code == 200
    problem(client.get("/v1/nothing"), 404)
    response = client.get("/v1/completions")
    problem(response, 405)
    assert response.headers["allow"] == "POST"


def test_a_completion_that_names_no_length_gets_what_the_server_allows(scheduler: FakeScheduler) -> None:
    for most, expected in ((8, 8), (99, 16), (None, 16)):
        with client_of(scheduler, max_new_tokens=most) as client:
            assert client.post("/v1/completions", json=TEXT).status_code == 200
        assert asked(scheduler).stop.max_new_tokens == expected


def test_what_the_engine_refuses_has_the_apis_name(client: TestClient, scheduler: FakeScheduler) -> None:
    def check(request: Request) -> None:
        raise ValueError("max_new_tokens: the prompt has 9 tokens, and 8 new ones would pass the model's 10 positions")

    scheduler.check = check
    assert problem(client.post("/v1/completions", json=TEXT))["param"] == "max_tokens"
    for limit in LIMITS:
        assert problem(client.post("/v1/chat/completions", json=CHAT | {limit: 8}))["param"] == limit
    error = problem(client.post("/v1/responses", json={"input": "Hello"}))
    assert error["param"] == "max_output_tokens"
    assert error["message"].startswith("max_output_tokens: the prompt has 9 tokens")


def test_a_limit_has_the_name_that_the_client_gave_it(scheduler: FakeScheduler) -> None:
    with client_of(scheduler, max_new_tokens=8) as client:
        for limit in LIMITS:
            error = problem(client.post("/v1/chat/completions", json=CHAT | {limit: 9}))
            assert (error["param"], error["message"].partition(":")[0]) == (limit, limit)
        error = problem(client.post("/v1/responses", json={"input": "Hello", "max_output_tokens": 9}))
        assert error["param"] == "max_output_tokens"


def test_a_full_line_and_a_server_that_shuts_down(client: TestClient, scheduler: FakeScheduler) -> None:
    scheduler.is_full = True
    response = client.post("/v1/completions", json=TEXT)
    assert problem(response, 429)["type"] == "rate_limit_error"
    assert int(response.headers["retry-after"]) >= 1
    scheduler.is_full, scheduler.is_draining = False, True
    problem(client.post("/v1/completions", json=TEXT), 503)
    problem(client.get("/ready"), 503)
    assert client.get("/health").status_code == 200


def test_a_dead_engine_is_seen(client: TestClient, scheduler: FakeScheduler) -> None:
    assert client.get("/health").status_code == client.get("/ready").status_code == 200
    scheduler.is_alive = False
    problem(client.get("/health"), 503)
    problem(client.get("/ready"), 503)


def test_a_request_that_fails_is_an_error_in_either_form() -> None:
    with client_of(FakeScheduler(CYCLES, None, "the request has failed (MemoryError)")) as client:
        assert "MemoryError" in problem(client.post("/v1/completions", json=TEXT), 500)["message"]
        chunks = events(client.post("/v1/completions", json=TEXT | {"stream": True}).text)
        assert chunks[-1]["error"]["type"] == "server_error"


@pytest.mark.parametrize("more", [{}, {"stream": True}])
def test_an_answer_that_cannot_be_written_is_counted_as_an_error(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, more: dict[str, bool]
) -> None:
    def take(self: Answer, delivery: Any) -> None:
        raise RuntimeError("no text")

    monkeypatch.setattr(Answer, "take", take)
    assert "the request has failed" in client.post("/v1/completions", json=TEXT | more).text
    assert 'draftwing_requests_total{end="error",model_name="tiny"} 1.0' in client.get("/metrics").text


def test_a_mistake_of_ours_shows_nothing_of_the_machine(client: TestClient, scheduler: FakeScheduler) -> None:
    def check(request: Request) -> None:
        raise RuntimeError("/home/secret/file")

    scheduler.check = check
    response = client.post("/v1/completions", json=TEXT)
    assert problem(response, 500)["message"] == "the request has failed"
    assert "secret" not in response.text


def test_keys() -> None:
    with client_of(FakeScheduler(CYCLES), keys=("s3cret", "other")) as client:
        response = client.post("/v1/completions", json=TEXT)
        assert problem(response, 401)["type"] == "authentication_error"
        assert response.headers["www-authenticate"] == "Bearer"
        for header in ("Bearer wrong", "Bearer ", "Basic s3cret", "Bearer s3cret2", "Bearer \xe9"):
            headers = {"authorization": header.encode("latin-1")}
            problem(client.post("/v1/completions", json=TEXT, headers=headers), 401)  # type: ignore[arg-type]
        for route in ("/v1/models", "/tokenizer_info"):
            problem(client.get(route), 401)
        for key in ("s3cret", "other"):
            headers = {"authorization": f"Bearer {key}"}
            assert client.post("/v1/completions", json=TEXT, headers=headers).status_code == 200
        for route in ("/health", "/ready", "/metrics", "/", "/openapi.json", "/version"):
            assert client.get(route).status_code == 200
    with client_of(FakeScheduler(CYCLES)) as client:  # lm-eval sends an empty one
        assert client.get("/v1/models", headers={"authorization": "Bearer"}).status_code == 200


def test_models(client: TestClient) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert {name: model[name] for name in ("id", "root", "max_model_len", "object")} == {
        "id": "tiny",
        "root": "org/tiny",
        "max_model_len": 512,
        "object": "model",
    }
    assert client.get("/v1/models/tiny").json() == model
    assert client.get("/v1/models/org/tiny").json() == model
    assert problem(client.get("/v1/models/other"), 404)["code"] == "model_not_found"


def test_the_version(client: TestClient) -> None:
    assert client.get("/version").json() == {"version": version("draftwing")}


def test_tokenizing(client: TestClient) -> None:
    answer = client.post("/tokenize", json={"prompt": "return args", "return_token_strs": True}).json()
    assert answer["tokens"] == ids("return args")
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 512)
    assert "".join(answer["token_strs"]) == "return args"
    body = CHAT | {"model": "org/tiny"}
    assert client.post("/tokenize", json=body).json()["tokens"] == ids("<|user|>\nHello<|end|>\n<|assistant|>\n")
    assert client.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "return args"}
    assert client.get("/tokenizer_info").json()["eos_token"] == "<|end|>"
    problem(client.post("/tokenize", json={}))
    problem(client.post("/tokenize", json={"prompt": "x", "messages": []}))
    assert problem(client.post("/detokenize", json={"tokens": [99999]}))["param"] == "tokens"


def test_metrics(client: TestClient, scheduler: FakeScheduler) -> None:
    scheduler.statistics.count_cycle(1, 2, 2)
    client.post("/v1/completions", json=TEXT)
    client.post("/v1/completions", json=TEXT | {"stream": True})
    page = client.get("/metrics").text
    drafted = len(SAID) - 2
    for line in (
        'draftwing_requests_total{end="length",model_name="tiny"} 2.0',
        f'draftwing_new_tokens_total{{model_name="tiny"}} {2.0 * len(SAID)}',
        'vllm:spec_decode_num_drafts_total{model_name="tiny"} 4.0',
        f'vllm:spec_decode_num_accepted_tokens_total{{model_name="tiny"}} {2.0 * drafted}',
        'vllm:spec_decode_num_accepted_tokens_per_pos_total{model_name="tiny",position="0"} 2.0',
        'draftwing_first_token_seconds_count{model_name="tiny"} 2.0',
        'vllm:num_requests_waiting{model_name="tiny"} 0.0',
        'draftwing_seats{model_name="tiny"} 4.0',
        'draftwing_accepted_at_total{depth="1",model_name="tiny"} 1.0',
        'draftwing_stage_seconds_total{model_name="tiny",stage="verify"} 0.0',
    ):
        assert line in page.splitlines()
    assert client.head("/metrics").status_code == 200
    assert client.get("/metrics").headers["content-type"].startswith("text/plain")


def test_the_page_brings_everything_with_it(client: TestClient) -> None:
    response = client.get("/")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "http://" not in response.text.replace("http://www.w3.org", "")
    assert "https://" not in response.text
    assert "innerHTML" not in response.text


def test_every_status_is_documented(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    for route in ("/v1/completions", "/v1/chat/completions", "/v1/responses"):
        answers = paths[route]["post"]["responses"]
        assert set(answers) == {"200", "400", "401", "404", "413", "429", "500", "503"}
        assert set(answers["200"]["content"]) == {"application/json", "text/event-stream"}
    assert "422" not in json.dumps(list(paths.values()))


def test_each_request_is_a_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "draftwing")
    with client_of(FakeScheduler(CYCLES), keys=("s3cret",)) as client:
        client.post("/v1/completions", json=TEXT, headers={"authorization": "Bearer s3cret"})
        client.get("/health")
    (record,) = caplog.records
    line = JsonLines().format(record)
    facts = json.loads(line)
    assert f"path=/v1/completions status=200 seconds={facts['seconds']}" in record.getMessage()
    assert (facts["path"], facts["status"], facts["new_tokens"]) == ("/v1/completions", 200, len(SAID))
    assert "s3cret" not in line
    assert "main" not in line
    caplog.clear()
    with client_of(FakeScheduler(CYCLES)) as client:
        client.get("/a%0Ab")
    assert [message.count("\n") for message in caplog.messages] == [0]


def test_every_line_of_the_log_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever writes it: this package, another one, Python's warnings; errors with their traces."""
    with warnings.catch_warnings(), json_lines():
        warnings.simplefilter("always")
        logging.getLogger("draftwing.any").warning("two\nlines")
        logging.getLogger("uvicorn.error").warning("invalid request")
        logging.getLogger("transformers.any").warning("odd")
        warnings.warn("old", stacklevel=1)
        try:
            raise RuntimeError("failed")
        except RuntimeError:
            logging.getLogger("draftwing.any").exception("it has failed")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["level"] for line in lines] == ["warning"] * 4 + ["error"]
    assert lines[0]["message"] == "two\nlines"
    assert "RuntimeError: failed" in lines[4]["error"]
    assert all(isinstance(line["time"], float) for line in lines)


FIELD_NAMES = st.sampled_from(
    ["prompt", "messages", "model", "n", "max_tokens", "temperature", "top_p", "top_k", "min_p", "stop", "seed"]
    + ["logit_bias", "logprobs", "top_logprobs", "echo", "stream", "stream_options", "best_of", "suffix", "tools"]
    + ["input", "instructions", "max_output_tokens", "text", "store", "tool_choice", "response_format", "draft"]
    + ["presence_penalty", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids", "user", "tokens"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text() | st.integers(0, 50)
    | st.sampled_from(["def main", "user", "\ud800", 1e-300, -0.0]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "5", "include_usage"]) | st.text(), inner),
    max_leaves=8,
)  # fmt: skip
ROUTES = ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize"]
BODIES = st.dictionaries(FIELD_NAMES | st.text(), VALUES, max_size=5)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(ROUTES), BODIES, st.booleans())
def test_no_body_is_a_server_error(client: TestClient, route: str, body: dict[str, Any], is_whole: bool) -> None:
    """Anything in any field: an answer, or an error that is the client's."""
    if is_whole:
        body = TEXT | CHAT | {"tokens": [1], "input": "Hello"} | body
        body.pop("messages" if route in ("/v1/completions", "/tokenize") else "prompt")
        body.pop("prompt" if route == "/v1/responses" else "input", None)
    response = client.post(route, content=json.dumps(body), headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        problem(response, response.status_code)


def test_a_chat_does_not_echo(client: TestClient) -> None:
    assert problem(client.post("/v1/chat/completions", json=CHAT | {"echo": True}))["param"] == "echo"


def test_few_unknown_fields_are_looked_at(client: TestClient) -> None:
    unknown = {f"x_{number}_of_mine": 1 for number in range(33)}
    assert problem(client.post("/v1/completions", json=TEXT | unknown))["param"] == "x_32_of_mine"
    unknown.popitem()
    assert client.post("/v1/completions", json=TEXT | unknown).status_code == 200


def test_a_text_that_is_far_too_long_is_not_tokenised(client: TestClient) -> None:
    error = problem(client.post("/v1/completions", json={"prompt": "x" * (64 * 512 + 1)}))
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    assert "32769 characters" in error["message"]
