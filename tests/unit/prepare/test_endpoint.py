"""Answers from a chat endpoint: a small server in this process that fails as servers do."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from draftwing.cli import main
from draftwing.config import TrainConfig
from draftwing.data.chat_template import encode_row
from draftwing.prepare.endpoint import Endpoint, EndpointAnswers, RefusedRequest
from draftwing.prepare.self_generated import RunPart, regenerate
from draftwing.target.load import load_tokenizer

Reply = tuple[int, dict[str, str], Any]


class Server(ThreadingHTTPServer):
    """Answers by `reply(request)`; keeps the requests, and how many were in flight at most."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply: Callable[[dict[str, Any]], Reply] = echo
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(request | {"path": self.path})
            self.server.headers.append(dict(self.headers))
            status, headers, body = self.server.reply(request)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


def said(text: str | None, finish_reason: str = "stop", **message: Any) -> Reply:
    answer = {"role": "assistant", "content": text} | message
    return 200, {}, {"choices": [{"message": answer, "finish_reason": finish_reason}]}


def echo(request: dict[str, Any]) -> Reply:
    """Says how many messages it was sent and repeats the last one."""
    return said(f"{len(request['messages'])}: {request['messages'][-1]['content']}")


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Ten conversations of two questions each."""
    path = tmp_path / "chats.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for n in range(10):
            turns = [("system", "be brief"), ("user", f"question {n}"), ("assistant", "old"), ("user", "and then?")]
            turns += [("assistant", "old too")]
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    return TrainConfig("self_generated", str(tmp_path / "answers.jsonl"), target="tiny", data=str(path))


def answer(config: TrainConfig, server: Server, shard: RunPart | None = None) -> list[dict[str, Any]]:
    endpoint = Endpoint(server.url, "big", first_wait_s=0.01)
    regenerate(config, load_tokenizer("tiny"), EndpointAnswers(config, endpoint, concurrency=3), shard)
    return read(config)


def read(config: TrainConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(config.output).read_text(encoding="utf-8").splitlines()]


def test_every_turn_is_answered_in_its_new_context(config: TrainConfig, server: Server) -> None:
    rows = answer(config, server)
    assert [row["held_out"] for row in rows] == [True] + [False] * 9
    for row in rows:
        contents = [message["content"] for message in row["messages"]]
        assert contents == ["be brief", contents[1], f"2: {contents[1]}", "and then?", "4: and then?"]
        assert encode_row(row, load_tokenizer("tiny"))[0].loss_mask.any()
    assert len({row["messages"][1]["content"] for row in rows}) == 10
    second = next(r for r in server.requests if len(r["messages"]) == 4)
    assert second["messages"][2]["content"].startswith("2: question")  # its own words, not the data's
    assert (second["path"], second["model"]) == ("/v1/chat/completions", "big")
    assert {request["temperature"] for request in server.requests} == {0.0, 1.0}
    assert {request["seed"] for request in server.requests} == set(range(10))


def test_rows_stay_in_order_however_fast_the_answers_are(config: TrainConfig, server: Server) -> None:
    expected = answer(config, server)
    Path(config.output).unlink()
    assert answer(config, server) == expected


def test_a_stopped_run_asks_for_the_missing_rows_only(config: TrainConfig, server: Server) -> None:
    whole = answer(config, server)
    lines = Path(config.output).read_text(encoding="utf-8").splitlines(keepends=True)
    Path(config.output).write_text("".join(lines[:7]) + lines[7][:20], encoding="utf-8")
    server.requests.clear()
    assert answer(config, server) == whole
    assert len(server.requests) == 2 * 3


def test_shards_share_the_rows(config: TrainConfig, server: Server, tmp_path: Path) -> None:
    whole = answer(config, server)
    parts = []
    for number in (1, 2, 3):
        part = TrainConfig(**config.as_dict() | {"output": str(tmp_path / f"part-{number}.jsonl")})
        parts.append(answer(part, server, RunPart(number, 3)))
    assert [len(part) for part in parts] == [4, 3, 3]
    assert [parts[n % 3][n // 3] for n in range(10)] == whole


def test_a_run_with_other_settings_is_not_continued(config: TrainConfig, server: Server) -> None:
    answer(config, server)
    hotter = TrainConfig(**config.as_dict() | {"temperatures": (0.5,)})
    with pytest.raises(ValueError, match=r"other settings: temperatures was \[0.0, 1.0\], is \[0.5\]"):
        answer(hotter, server)


def test_an_answer_that_breaks_off_is_asked_for_again(server: Server) -> None:
    status, _, body = said("four")
    replies = iter([(200, {"Transfer-Encoding": "chunked"}, b"5\r\nab"), (status, {}, body)])
    server.reply = lambda request: next(replies)
    assert Endpoint(server.url, "big", first_wait_s=0.01).complete([])["message"]["content"] == "four"
    assert len(server.requests) == 2


@pytest.mark.parametrize("failure", [(503, {}, b"busy"), (429, {"Retry-After": "0.02"}, b"slow down")])
def test_passing_failures_are_tried_again(config: TrainConfig, server: Server, failure: Reply) -> None:
    failures = iter([failure] * 2)
    server.reply = lambda request: next(failures, None) or echo(request)
    assert all("messages" in row for row in answer(config, server))
    assert len(server.requests) == 22


def test_a_server_that_stays_down_ends_the_run_and_nothing_is_lost(config: TrainConfig, server: Server) -> None:
    whole = answer(config, server)
    Path(config.output).unlink()
    server.requests.clear()
    server.reply = lambda request: echo(request) if len(server.requests) <= 12 else (500, {}, b"out of memory")
    with pytest.raises(ValueError, match=r"no answer in 6 tries \(status 500: out of memory\); run the same"):
        answer(config, server)
    assert read(config) == whole[: len(read(config))]
    server.reply = echo
    assert answer(config, server) == whole


def test_a_wrong_key_ends_the_run_at_once(config: TrainConfig, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.reply = lambda request: (401, {}, b"no such key")
    with pytest.raises(ValueError, match="status 401: no such key"):
        answer(config, server)
    assert len(server.requests) <= 3  # one for each thread
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_a_refused_request_becomes_a_row_that_says_so(config: TrainConfig, server: Server) -> None:
    def reply(request: dict[str, Any]) -> Reply:
        return (400, {}, b"too long") if "question 4" in request["messages"][1]["content"] else echo(request)

    server.reply = reply
    rows = answer(config, server)
    (failed,) = [row for row in rows if "error" in row]
    assert failed == {"error": "status 400: too long", "held_out": False}
    with pytest.raises(ValueError, match=r"got the fields \['error', 'held_out'\]"):
        encode_row(failed, load_tokenizer("tiny"))


def test_a_conversation_ends_where_an_answer_was_cut_off(config: TrainConfig, server: Server) -> None:
    server.reply = lambda request: said("half a sen", "length")
    for row in answer(config, server):
        assert len(row["messages"]) == 3
        (example,) = encode_row(row, load_tokenizer("tiny"))
        assert load_tokenizer("tiny").decode(example.input_ids[example.loss_mask]) == "half a sen"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_is_kept_for_the_template(config: TrainConfig, server: Server, name: str) -> None:
    """Under the one name that rows have, and without what else a server writes."""
    server.reply = lambda request: said("four", **{name: "two and two", "refusal": None, "tool_calls": []})
    expected = {"role": "assistant", "content": "four", "reasoning_content": "two and two"}
    assert answer(config, server)[0]["messages"][2] == expected
    assert all(request["messages"][2] == expected for request in server.requests if len(request["messages"]) > 2)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def write_tools(config: TrainConfig, tools: Any) -> None:
    path = Path(str(config.data))
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps(row | {"tools": tools}) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tools_are_in_the_request_and_in_the_row(config: TrainConfig, server: Server, tools: Any) -> None:
    write_tools(config, tools)
    rows = answer(config, server)
    assert all(request["tools"] == [TOOL] for request in server.requests)
    assert all(row["tools"] == [TOOL] and len(row["messages"]) == 5 for row in rows)


def test_no_tools_are_no_field(config: TrainConfig, server: Server) -> None:
    write_tools(config, [])
    assert not any("tools" in row for row in answer(config, server))
    assert not any("tools" in request for request in server.requests)


def test_a_conversation_ends_with_a_tool_call(config: TrainConfig, server: Server) -> None:
    """Nobody runs the tool. Its arguments are a mapping, as templates want them; some servers name no content."""
    write_tools(config, [TOOL])
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    message = {"role": "assistant", "tool_calls": [call]}
    server.reply = lambda request: (200, {}, {"choices": [{"message": message, "finish_reason": "tool_calls"}]})
    for row in answer(config, server):
        calls = [call | {"function": {"name": "add", "arguments": {"a": 2}}}]
        assert row["messages"][2:] == [{"role": "assistant", "content": "", "tool_calls": calls}]


def test_an_answer_of_another_form_becomes_a_row_that_says_so(config: TrainConfig, server: Server) -> None:
    server.reply = lambda request: said("", tool_calls=[{"function": {"name": "add", "arguments": '{"a": '}}])
    assert "the answer has as arguments of a tool call '{\"a\": '" in answer(config, server)[0]["error"]


def test_an_empty_answer_is_one(config: TrainConfig, server: Server) -> None:
    server.reply = lambda request: said(None)
    assert answer(config, server)[0]["messages"][2] == {"role": "assistant", "content": ""}


def test_something_else_than_a_completion_is_shown(server: Server) -> None:
    server.reply = lambda request: (200, {}, b"<html>hello")
    with pytest.raises(ValueError, match="this is no chat completion: '<html>hello'"):
        Endpoint(server.url, "big").complete([])


def test_a_refusal_is_told_apart(server: Server) -> None:
    server.reply = lambda request: (422, {}, b"bad field")
    with pytest.raises(RefusedRequest, match="bad field"):
        Endpoint(server.url, "big").complete([])


def test_no_server_at_all_is_named() -> None:
    with pytest.raises(ValueError, match=r"http://127.0.0.1:9/v1/chat/completions: no answer in 6"):
        Endpoint("http://127.0.0.1:9/v1", "big", first_wait_s=0.001).complete([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--endpoint", "localhost:8000"], "needs --model"),
        (["--endpoint", "localhost:8000", "--model", "m"], "endpoint: expected a URL such as"),
        (["--shard", "9/8"], "shard: expected I/N with I from 1 to N, got '9/8'"),
    ],
)
def test_mistakes_on_the_command_line(
    config: TrainConfig, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    common = ["prepare", "--regenerate", "--data", str(config.data), "--target", "tiny", "--output", config.output]
    assert main([*common, *options]) == 2
    assert message in capsys.readouterr().err


def test_the_command_asks_the_endpoint(config: TrainConfig, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["prepare", "--regenerate", "--data", str(config.data), "--target", "tiny", "--output", config.output]
    command += ["--endpoint", server.url, "--model", "big", "--temperatures", "0.7", "--max-new-tokens", "9", "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 10
    assert {(request["temperature"], request["max_tokens"]) for request in server.requests} == {(0.7, 9)}
