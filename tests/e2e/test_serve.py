"""The server with its engine and the embedded models: real clients, company, clients that leave, signals."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import pytest

pytest.importorskip("fastapi", reason='pip install "draftwing[serve]"')

import httpx
import openai
import pydantic
import uvicorn
from forked import COMMAND, Forked, is_up
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tools_template import CLAMP, SORT, TEMPLATE

import draftwing
from draftwing.api import SpeculativeModel
from draftwing.cli import main
from draftwing.engine.options import GenerateOptions
from draftwing.serving.app import create_app
from draftwing.serving.intake import Intake
from draftwing.serving.process import address_of, bind
from draftwing.serving.scheduler import Scheduler
from draftwing.serving.streams import Identity
from draftwing.target.load import load_tokenizer

PROMPT = "def read_lines(path):\n"
CHAT = [{"role": "user", "content": "Write the Python function clamp."}]
LENGTH = 512


@pytest.fixture(scope="module")
def model() -> SpeculativeModel:
    return draftwing.load("tiny", draft="tiny", dtype="float32")


class Served:
    """A server in a thread of this process."""

    def __init__(self, model: SpeculativeModel) -> None:
        self.scheduler = Scheduler(model, 3, LENGTH, GenerateOptions(plan="chain:3"), 4)
        app = create_app(self.scheduler, Intake(model, self.scheduler), Identity("tiny", "tiny", "test"))
        self.scheduler.start()
        self._listener = bind("127.0.0.1", 0)
        self.url = address_of(self._listener)
        self._server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]}, daemon=True)
        self._thread.start()
        wait_for(lambda: self._server.started)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=20)
        self.scheduler.stop()

    def metric(self, line: str) -> float:
        """A figure of GET /metrics, 0 while it is not there."""
        page = httpx.get(f"{self.url}/metrics").text
        return next((float(row.split()[-1]) for row in page.splitlines() if row.startswith(line)), 0.0)


def wait_for(is_so: Callable[[], Any], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def served(model: SpeculativeModel) -> Iterator[Served]:
    served = Served(model)
    yield served
    served.close()


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def alone(model: SpeculativeModel, prompt: str, **options: Any) -> str:
    """The text that `generate` gives."""
    ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
    output: Any = model.generate(ids, plan="off", return_dict_in_generate=True, **options)
    text: str = model.tokenizer.decode(output.tokens[0], skip_special_tokens=True)
    return text


def test_the_sdk_completes(client: openai.OpenAI, model: SpeculativeModel) -> None:
    for temperature in (0.0, 0.8):
        answer = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=24, temperature=temperature, seed=5, logprobs=2
        )
        expected = alone(model, PROMPT, max_new_tokens=24, temperature=temperature, seed=5)
        assert answer.choices[0].text == expected
        assert answer.usage is not None
        assert answer.usage.completion_tokens_details is not None
        assert answer.usage.completion_tokens_details.accepted_prediction_tokens
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs is not None
        assert len(logprobs.token_logprobs) == 24
        if not temperature:
            assert logprobs.top_logprobs is not None
            best = [max(top.values()) for top in logprobs.top_logprobs]
            assert logprobs.token_logprobs == best


def test_the_sdk_streams_what_it_completes(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, seed=5, n=2)
    stream = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, seed=5, n=2, stream=True)
    texts = ["", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    assert texts[0] != texts[1]


def test_the_sdk_chats(client: openai.OpenAI, model: SpeculativeModel) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": CHAT, "max_completion_tokens": 32, "temperature": 0}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=1)
    ids = model.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output: Any = model.generate(**ids, max_new_tokens=32, plan="off", return_dict_in_generate=True)
    said = whole.choices[0].message.content
    assert said == model.tokenizer.decode(output.tokens[0], skip_special_tokens=True)
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == said
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == said
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 32
    assert len(chunks) < 32  # a chunk for each cycle, not for each token


def test_the_sdk_scores_a_prompt(client: openai.OpenAI, model: SpeculativeModel) -> None:
    ids = model.tokenizer(PROMPT)["input_ids"]
    answer = client.completions.create(model="tiny", prompt=[ids], max_tokens=1, echo=True, logprobs=1, temperature=0)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert len(logprobs.token_logprobs) == len(ids) + 1
    assert all(value < 0 for value in logprobs.token_logprobs[1:])


def test_the_sdk_scores_a_prompt_as_long_as_the_context(client: openai.OpenAI, model: SpeculativeModel) -> None:
    """And each of its tokens, the last one too, as in a longer text."""
    ids = (model.tokenizer(PROMPT * 100)["input_ids"] * 9)[:LENGTH]
    asked: dict[str, Any] = {"model": "tiny", "echo": True, "max_tokens": 0, "logprobs": 1}
    whole = client.completions.create(prompt=[ids], **asked).choices[0].logprobs
    part = client.completions.create(prompt=[ids[:40]], **asked).choices[0].logprobs
    assert whole is not None and part is not None
    assert whole.token_logprobs is not None and part.token_logprobs is not None
    assert len(whole.token_logprobs) == LENGTH
    assert part.token_logprobs == whole.token_logprobs[:40]
    assert part.top_logprobs == whole.top_logprobs[:40]  # type: ignore[index]


def test_the_sdk_lists_and_is_refused(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.completions.create(model="other", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError, match="tools: this model's chat template knows none"):
        client.chat.completions.create(
            model="tiny",
            messages=CHAT,  # type: ignore[arg-type]
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
    with pytest.raises(openai.BadRequestError, match="context has 512 tokens"):
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=LENGTH)


def test_the_sdk_asks_for_a_form(client: openai.OpenAI) -> None:
    """Whole and streamed, beside a request that asks for none."""
    properties = {"name": {"enum": ["clamp", "sort"]}, "steps": {"type": "integer", "minimum": 0, "maximum": 99}}
    schema = {"type": "object", "properties": properties, "required": ["name", "steps"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "function", "schema": schema, "strict": True}}
    options: dict[str, Any] = {"model": "tiny", "messages": CHAT, "max_tokens": 120, "seed": 3}

    def chat(form: dict[str, Any]) -> Any:
        return client.chat.completions.create(**options, response_format=form).choices[0]

    with ThreadPoolExecutor(3) as pool:
        forms = [form, {"type": "text"}, {"type": "regex", "regex": "[a-f]{3}( [0-9]{1,3}){2}!"}]
        whole, free, regex = pool.map(chat, forms)
    value = json.loads(whole.message.content)
    assert set(value) == {"name", "steps"}
    assert value["name"] in ("clamp", "sort")
    assert 0 <= value["steps"] <= 99
    assert re.fullmatch("[a-f]{3}( [0-9]{1,3}){2}!", regex.message.content)
    assert whole.finish_reason == regex.finish_reason == "stop"
    assert free.message.content == client.chat.completions.create(**options).choices[0].message.content
    chunks = list(client.chat.completions.create(**options, response_format=form, stream=True))  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].choices[0].finish_reason == "stop"
    with pytest.raises(openai.BadRequestError, match="response_format: Unimplemented keys"):
        chat({"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}})


@pytest.fixture
def tool_client(model: SpeculativeModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[openai.OpenAI]:
    """Of a server whose chat template knows tools."""
    tokenizer = load_tokenizer("tiny")
    tokenizer.chat_template = TEMPLATE
    monkeypatch.setattr(model, "tokenizer", tokenizer)
    served = Served(model)
    try:
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
            yield client
    finally:
        served.close()


def test_the_sdk_calls_tools(tool_client: openai.OpenAI) -> None:
    """A required call, whole and streamed, its result given back, and the same tokens without drafts."""
    client, options = tool_client, dict[str, Any](model="tiny", tools=[CLAMP, SORT], max_tokens=120, seed=3)
    asked: Any = client.chat.completions.create(messages=CHAT, **options, tool_choice="required").choices[0]
    (call,) = asked.message.tool_calls
    assert (asked.finish_reason, asked.message.content) == ("tool_calls", None)
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == ({"value", "mode"} if call.function.name == "clamp" else {"by"})
    named = {"type": "function", "function": {"name": "sort"}}
    with client.chat.completions.stream(messages=CHAT, **options, tool_choice=named) as stream:
        streamed = stream.get_final_completion().choices[0].message.tool_calls[0]
    assert streamed.function.name == "sort"
    assert json.loads(streamed.function.arguments)["by"] in ("size", "name")
    plain: Any = client.chat.completions.create(
        messages=CHAT, **options, tool_choice=named, extra_body={"draft": False}
    )
    function = plain.choices[0].message.tool_calls[0].function
    assert (function.name, function.arguments) == (streamed.function.name, streamed.function.arguments)
    assert plain.usage.completion_tokens_details.accepted_prediction_tokens == 0
    result = {"role": "tool", "tool_call_id": call.id, "content": "3"}
    said: Any = client.chat.completions.create(
        messages=[*CHAT, asked.message.model_dump(), result], **options, tool_choice="none"
    )
    assert said.choices[0].message.tool_calls is None


def test_the_sdk_calls_tools_in_responses(tool_client: openai.OpenAI) -> None:
    """The same calls as in a chat, whole and streamed; their outputs are given back."""
    client, flat = tool_client, [{"type": "function", **tool["function"]} for tool in (CLAMP, SORT)]
    options: dict[str, Any] = {"model": "tiny", "tools": flat, "extra_body": {"seed": 3}}
    whole = client.responses.create(input=CHAT, tool_choice="required", **options)
    chat: Any = client.chat.completions.create(
        model="tiny", messages=CHAT, tools=[CLAMP, SORT], tool_choice="required", seed=3
    )
    (call,) = whole.output
    function = chat.choices[0].message.tool_calls[0].function
    assert (call.type, call.name, call.arguments) == ("function_call", function.name, function.arguments)
    with client.responses.stream(input=CHAT, tool_choice="required", **options) as stream:
        events = list(stream)
        assert stream.get_final_response().output[0].arguments == call.arguments
    (delta,) = [each for each in events if each.type == "response.function_call_arguments.delta"]
    (done,) = [each for each in events if each.type == "response.function_call_arguments.done"]
    assert (delta.delta, done.arguments) == (call.arguments, call.arguments)
    back = {"type": "function_call_output", "call_id": call.call_id, "output": "3"}
    said = client.responses.create(
        input=[*CHAT, call.model_dump(), back], tool_choice="none", max_output_tokens=8, **options
    )
    assert [item.type for item in said.output] == ["message"]


def test_the_sdk_gets_responses(client: openai.OpenAI) -> None:
    """Whole and streamed, the text of the same chat; in a form; refused where nothing is stored."""
    options: dict[str, Any] = {"model": "tiny", "temperature": 0, "extra_body": {"seed": 3}}
    chat = client.chat.completions.create(messages=CHAT, max_tokens=24, **options)  # type: ignore[arg-type]
    whole = client.responses.create(input=CHAT[0]["content"], max_output_tokens=24, **options)
    assert whole.output_text == chat.choices[0].message.content
    assert (whole.status, whole.usage.output_tokens) == ("incomplete", 24)
    with client.responses.stream(input=CHAT, max_output_tokens=24, **options) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    assert len(deltas) < 24  # an event for each cycle, not for each token

    class Step(pydantic.BaseModel):
        number: Annotated[int, pydantic.Field(ge=0, le=99)]

    parsed = client.responses.parse(input="Hello", max_output_tokens=60, text_format=Step, **options)
    assert parsed.output_parsed is not None
    assert 0 <= parsed.output_parsed.number <= 99
    with pytest.raises(openai.BadRequestError, match="nothing is stored"):
        client.responses.create(input="Hello", previous_response_id=whole.id, **options)


def test_the_readmes_program_runs(served: Served) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"<<'EOF'\n(.*?)\nEOF", readme, re.DOTALL)
    program = program.replace("http://127.0.0.1:8000", served.url)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout


def test_company_changes_nothing(client: openai.OpenAI, model: SpeculativeModel) -> None:
    """Seven requests at three seats, sampled and greedy, with stop strings: each has its own tokens."""
    asked = [
        {"prompt": PROMPT + "    x" * row, "max_tokens": 8 + 5 * row, "temperature": (0.0, 0.9)[row % 2], "seed": row}
        for row in range(7)
    ]
    with ThreadPoolExecutor(7) as pool:
        answers = list(pool.map(lambda body: client.completions.create(model="tiny", **body), asked))  # type: ignore[call-overload]
    for body, answer in zip(asked, answers, strict=True):
        options = {name: value for name, value in body.items() if name not in ("prompt", "max_tokens")}
        expected = alone(model, str(body["prompt"]), max_new_tokens=body["max_tokens"], **options)
        assert answer.choices[0].text == expected


def test_stop_strings_end_an_answer(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=48, temperature=0).choices[0].text
    stop = whole[20:23]
    for stream in (False, True):
        body = {"prompt": PROMPT, "max_tokens": 48, "temperature": 0, "stop": stop, "stream": stream}
        response = httpx.post(str(client.base_url) + "completions", json=body, timeout=60)
        said = response.text if stream else json.dumps([response.json()])
        texts = [json.loads(line[6:]) for line in said.split("\n\n")[:-2]] if stream else json.loads(said)
        assert "".join(chunk["choices"][0]["text"] for chunk in texts) == whole[: whole.index(stop)]
        assert texts[-1]["choices"][0]["finish_reason"] == "stop"


NUMBERS = st.sampled_from([0, 1, -1, 0.5, 2, 1e-300, 1e-30, 1e30, 100, -100, None])
FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.sampled_from(FIELDS), NUMBERS),
    st.dictionaries(st.sampled_from(["n", "min_tokens", "logprobs", "seed"]), st.integers(-1, 4)),
    st.dictionaries(st.sampled_from(["echo", "ignore_eos", "skip_special_tokens", "stream"]), st.booleans()),
    st.dictionaries(st.sampled_from(["0", "1", "300"]), st.sampled_from([-100, 0, 100])),
    st.lists(st.sampled_from([" ", "\n", "the", "\ufffd"]), max_size=2),
    st.lists(st.integers(0, 4200), max_size=3) | st.text(max_size=8),
)
def test_no_wish_breaks_the_engine(
    served: Served, numbers: Any, counts: Any, flags: Any, bias: Any, stop: Any, prompt: Any
) -> None:
    """Any mixture of fields: an answer, or an error that names one; the next request is answered."""
    body = numbers | counts | flags | {"logit_bias": bias, "stop": stop, "prompt": prompt, "max_tokens": 6}
    response = httpx.post(f"{served.url}/v1/completions", json=body, timeout=60)
    assert response.status_code in (200, 400), response.text
    assert '"error"' not in response.text or response.status_code == 400
    assert served.scheduler.is_alive


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_seat(served: Served, stream: bool) -> None:
    """Long before its answer would have ended."""
    cancelled = served.metric('draftwing_requests_total{end="cancelled"')

    async def leave() -> None:
        body = {"prompt": PROMPT, "max_tokens": 480, "ignore_eos": True, "stream": stream}
        async with httpx.AsyncClient() as client:
            request = asyncio.create_task(_read_a_line(client, f"{served.url}/v1/completions", body))
            while not served.scheduler.num_running:
                await asyncio.sleep(0.01)
            await asyncio.wait([request], timeout=0.2)
            request.cancel()
            await asyncio.wait([request])

    asyncio.run(leave())
    wait_for(lambda: not served.scheduler.num_running, seconds=5)
    wait_for(lambda: served.metric('draftwing_requests_total{end="cancelled"') == cancelled + 1)


async def _read_a_line(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> None:
    async with client.stream("POST", url, json=body, timeout=60) as response:
        async for _ in response.aiter_lines():
            await asyncio.sleep(1)


def test_a_dead_engine_is_told(model: SpeculativeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(model)
    try:
        assert httpx.get(f"{served.url}/health").status_code == 200

        def fail() -> Any:
            raise RuntimeError("/home/secret: out of everything")

        monkeypatch.setattr(served.scheduler._engine, "step", fail)
        response = httpx.post(f"{served.url}/v1/completions", json={"prompt": PROMPT}, timeout=60)
        assert response.status_code == 500
        assert "secret" not in response.text
        assert httpx.get(f"{served.url}/health").status_code == 503
        assert httpx.post(f"{served.url}/v1/completions", json={"prompt": PROMPT}).status_code == 503
    finally:
        served.close()


def start(*arguments: str) -> tuple[Forked, str]:
    """The command with the embedded model, and its address once it serves."""
    command = ["serve", "--port", "0", "--json", "--seats", "2", "--plan", "chain:3", *arguments]
    process = Forked(COMMAND, command)
    url = json.loads(process.first_line())["url"]
    wait_for(lambda: is_up(url))
    return process, url


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--port 70000", "--port: expected a whole number from 0"),
        ("--host 203.0.113.1 --port 0", "host: cannot listen at 203.0.113.1"),
        ("--api-key-file nowhere.txt", "nowhere.txt"),
        ("--seats 0", "--seats: expected a whole number from 1 on"),
        ("--method plain --plan chain:2", "plan: plain drafts nothing"),
        ("--port 0 --max-model-len 5000 --plan off", "max_model_len: expected from 2 tokens to the model's 1024"),
    ],
)
def test_mistakes_are_one_line(arguments: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *arguments.split()]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert says in last


def test_mistakes_are_json_where_the_log_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--log-json", "--host", "203.0.113.1", "--port", "0"]) == 2
    (line,) = map(json.loads, capsys.readouterr().err.splitlines())
    assert line["level"] == "error"
    assert "cannot listen at 203.0.113.1" in line["message"]


def test_keys_that_are_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text("\n\n", encoding="utf-8")
    for arguments in (["--api-key", " "], ["--api-key-file", str(tmp_path / "keys.txt")]):
        assert main(["serve", *arguments]) == 2
        assert "api_key: expected a key that is not empty" in capsys.readouterr().err


def test_what_is_not_installed_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("draftwing.cli.serve.find_spec", lambda name: None if name == "uvicorn" else object())
    assert main(["serve"]) == 2
    assert 'serve: needs uvicorn: pip install "draftwing[serve]"' in capsys.readouterr().err


def children_of(pid: int) -> list[int]:
    """Its processes, the oldest first."""
    return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


NEEDS_PROC = pytest.mark.skipif(
    not Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").exists(), reason="needs Linux' /proc"
)


def figures(url: str, name: str) -> list[float]:
    """A figure of each replica, as any of them tells it."""
    page = httpx.get(f"{url}/metrics", timeout=30).text
    return list(map(float, re.findall(rf"^{name}{{.*replica=.*}} (\S+)$", page, re.MULTILINE)))


@NEEDS_PROC
def test_a_killed_replica_loses_its_running_requests_alone() -> None:
    """Two behind one port: each is stopped for a moment, so that it is known who serves what."""
    process, url = start("--replicas", "2")
    try:
        wait_for(lambda: len(children_of(process.pid)) == 2)
        first, second = children_of(process.pid)
        wait_for(lambda: figures(url, "draftwing_replica_up") == [1, 1])
        assert figures(url, "draftwing_seats") == [2, 2]
        os.kill(first, signal.SIGSTOP)
        wait_for(lambda: is_up(url))  # the second one
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as kept:
            kept_lines = kept.iter_lines()
            next(kept_lines)
            os.kill(second, signal.SIGSTOP)
            os.kill(first, signal.SIGCONT)
            with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as lost:
                lost_lines = lost.iter_lines()
                next(lost_lines)
                os.kill(second, signal.SIGCONT)
                os.kill(first, signal.SIGKILL)
                with pytest.raises(httpx.RemoteProtocolError):
                    list(lost_lines)
            assert httpx.post(f"{url}/v1/completions", json=LONG | {"max_tokens": 4}, timeout=60).status_code == 200
            assert [line for line in kept_lines if line][-1] == "data: [DONE]"
        wait_for(lambda: len(children_of(process.pid)) == 2)  # another one in its place
        process.send_signal(signal.SIGTERM)
        assert process.wait() in (0, 143), process.errors  # the new one may be cut while it loads
        assert f"replica 1 (process {first}) has ended (137) and is started anew" in process.errors
    finally:
        process.kill()


def test_a_replica_that_does_not_start_ends_all() -> None:
    process = Forked(COMMAND, ["serve", "--port", "0", "--replicas", "3", "--target", "./nowhere"])
    assert process.wait() == 2
    (line,) = process.errors.splitlines()
    assert line.startswith("error: target: no folder")


@pytest.mark.slow
@NEEDS_PROC
def test_replicas_end_with_their_parent() -> None:
    process, url = start("--replicas", "2")
    wait_for(lambda: len(children_of(process.pid)) == 2)
    children = children_of(process.pid)
    process.kill()
    wait_for(lambda: not any(_runs(pid) for pid in children))
    assert not is_up(url)


def _runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_replicas_of_a_command_that_nothing_was_forked_for() -> None:
    """As its users start it: two whole starts, and no process that had imported the package."""
    command = [sys.executable, "-m", "draftwing", "serve", "--port", "0", "--json", "--seats", "2"]
    command += ["--plan", "chain:3", "--replicas", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = json.loads(process.stdout.readline())["url"]
            wait_for(lambda: is_up(url))
            assert (
                httpx.post(f"{url}/v1/completions", json=LONG | {"stream": False, "max_tokens": 3}).status_code == 200
            )
            process.terminate()
            assert process.wait(60) in (0, 143)  # the second one may be cut while it loads
            assert not is_up(url)
        finally:
            process.kill()


LONG = {"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "stream": True}


def test_a_signal_lets_running_requests_end() -> None:
    process, url = start("--api-key", "s3cret", "--log-json")
    assert httpx.post(f"{url}/v1/completions", json=LONG).status_code == 401
    headers = {"authorization": "Bearer s3cret"}
    with httpx.stream("POST", f"{url}/v1/completions", json=LONG | {"max_tokens": 150}, headers=headers) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{url}/ready").status_code == 503)
        assert httpx.get(f"{url}/health").status_code == 200
        refused = httpx.post(f"{url}/v1/completions", json=LONG, headers=headers)
        assert refused.status_code == 503
        said = [line for line in lines if line]
    assert said[-1] == "data: [DONE]"
    assert json.loads(said[-2][6:])["choices"][0]["finish_reason"] == "length"
    assert process.wait() == 0, process.errors
    errors = process.errors
    assert "s3cret" not in errors
    lines = [json.loads(line) for line in errors.splitlines()]  # every one of them, from the start on
    assert any(line.get("status") == 200 for line in lines)
    assert any("draining" in line.get("message", "") for line in lines)


def test_what_runs_when_the_seconds_are_over_is_told_so() -> None:
    process, url = start("--drain-seconds", "0")
    with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGINT)
        said = [line for line in lines if line]
    assert json.loads(said[-2][6:])["error"]["type"] == "service_unavailable"
    assert process.wait() == 0


def test_a_second_signal_ends_at_once() -> None:
    process, url = start()
    with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{url}/ready").status_code == 503)
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 128 + signal.SIGTERM
