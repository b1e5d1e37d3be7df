"""Bodies that are valid but for a few random changes, to the application with its engine: never a server error.

    DRAFTWING_BODIES=100000 pytest -s tests/e2e/test_random_bodies.py -m slow

What a body is depends on its number alone, so that one that fails can be sent again: DRAFTWING_BODIES=16587:16588.
"""

import asyncio
import json
import os
import random
import sysconfig
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason='pip install "draftwing[serve]"')

import httpx
from tools_template import CLAMP, SORT, TEMPLATE, chain

import draftwing
from draftwing.engine.options import GenerateOptions
from draftwing.serving.app import create_app
from draftwing.serving.intake import Intake
from draftwing.serving.scheduler import Scheduler
from draftwing.serving.streams import Identity

NUMBERS = range(*map(int, os.environ.get("DRAFTWING_BODIES", "3000").split(":")))
AT_ONCE = 8
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "def clamp("}]
CALLED = {"id": "a", "type": "function", "function": {"name": "clamp", "arguments": '{"value": 3}'}}
SCHEMA = {"type": "object", "properties": {"by": {"enum": ["size", "name"]}, "at": {"type": "integer"}}}
SAMPLED = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3, "max_tokens": 4}
PENALTIES = {"presence_penalty": 0.5, "frequency_penalty": -1, "repetition_penalty": 1.1}
STREAM = {"stream": True, "stream_options": {"include_usage": True, "draftwing": True}}
FLAT = [{"type": "function", **{name: CLAMP["function"][name] for name in ("name", "parameters")}}]
COMPLETIONS, CHATS, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
BODIES: tuple[tuple[str, dict[str, Any]], ...] = (
    (COMPLETIONS, {"prompt": "def main(args):", "stop": ["\n", "x"], "logit_bias": {"5": -3}} | SAMPLED),
    (COMPLETIONS, {"prompt": [[1, 2, 3], [4]], "n": 2, "echo": True, "logprobs": 2, "max_tokens": 0}),
    (COMPLETIONS, {"model": "tiny", "prompt": ["a", "b"], "best_of": 1, "min_tokens": 2} | STREAM),
    (COMPLETIONS, {"prompt": "x", "response_format": {"type": "regex", "regex": "[a-c]{2}"}}),
    (COMPLETIONS, {"prompt": "é\U0001f600", "ignore_eos": True, "stop_token_ids": [7]} | PENALTIES),
    (CHATS, {"messages": TURNS, "logprobs": True, "top_logprobs": 2} | SAMPLED | STREAM),
    (CHATS, {"messages": TURNS, "response_format": {"type": "json_object"}, "max_tokens": 6}),
    (CHATS, {"messages": TURNS, "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}),
    (CHATS, {"messages": TURNS, "tools": [CLAMP, SORT], "tool_choice": "required", "parallel_tool_calls": False}),
    (CHATS, {"messages": TURNS, "tools": [SORT], "tool_choice": {"type": "function", "function": {"name": "sort"}}}),
    (
        CHATS,
        {
            "messages": [
                *TURNS,
                {"role": "assistant", "content": None, "tool_calls": [CALLED]},
                {"role": "tool", "content": [{"type": "text", "text": "3"}], "tool_call_id": "a"},
            ],
            "tools": [CLAMP],
        },
    ),
    (RESPONSES, {"input": "Hello", "instructions": "Be brief.", "max_output_tokens": 4, "stream": True}),
    (RESPONSES, {"input": TURNS, "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}}),
    (RESPONSES, {"input": TURNS, "tools": FLAT, "tool_choice": "auto", "max_output_tokens": 4}),
    ("/tokenize", {"prompt": "def main", "add_special_tokens": True, "return_token_strs": True}),
    ("/tokenize", {"messages": TURNS, "tools": [CLAMP]}),
    ("/detokenize", {"tokens": [1, 2, 3, 700]}),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 0.5, 1e308, -1e-308, 2**31, 2**63, -(2**63), 10**30, 1.0),
    *("", " ", "x", "\x00", "\ud800", "😀é", "a" * 5000, "../../etc/passwd", "{{ 7 }}", "<|end|>", "1e5"),
    *([], {}, [[]], [None], {"": None}, {"type": "function"}, {"$ref": "#"}, [{}], [1, "x"], [0] * 600),
    *(chain(100), chain(1000)),
)
"""What a value is changed into; others are values of other bodies."""
SECRETS = (str(Path(draftwing.__file__).parent), sysconfig.get_path("purelib"))
IN_TRACES = ("Traceback", 'File "', ".py")
"""What the model may say as well."""


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in a body its values are, all of them but itself."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*place, key)
        yield from places(value[key], (*place, key))


def at(body: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        body = body[key]
    return body


FIELDS = sorted({place for _, body in BODIES for place in places(body)}, key=repr)
NAMES = sorted({place[-1] for place in FIELDS if isinstance(place[-1], str)})


def random_body(number: int) -> tuple[str, bytes]:
    """A route and the bytes that it is sent."""
    luck = random.Random(number)
    route, body = deepcopy(luck.choice(BODIES))
    for _ in range(luck.choice((0, 1, 1, 1, 2, 3, 5))):
        change(body, luck)
    content = json.dumps(body).encode()
    if luck.random() < 0.1:
        content = torn(content, luck)
    return (route if luck.random() < 0.97 else luck.choice(BODIES)[0]), content


def change(body: dict[str, Any], luck: random.Random) -> None:
    """Change a value, leave one out, call one otherwise, or add a field that another body has."""
    if not body or luck.random() < 0.3:
        other = luck.choice(BODIES)[1]
        name = luck.choice(list(other))
        body[name] = deepcopy(other[name] if luck.random() < 0.7 else luck.choice(VALUES))
        return
    place = luck.choice(list(places(body)))
    owner, key = at(body, place[:-1]), place[-1]
    match luck.randrange(6):
        case 0:
            del owner[key]
        case 1 if isinstance(owner, dict):
            owner[luck.choice((*NAMES, f"{key}s", str(key)[:-1], f"x_{key}"))] = owner.pop(key)
        case 2:
            owner[key] = [owner[key]] * luck.choice((1, 2, 200))
        case 3:
            other = luck.choice(BODIES)[1]
            owner[key] = deepcopy(at(other, luck.choice(list(places(other)))))
        case _:
            owner[key] = deepcopy(luck.choice(VALUES))


def torn(content: bytes, luck: random.Random) -> bytes:
    """Bytes that are cut, doubled or changed somewhere."""
    first, last = sorted(luck.randrange(len(content) + 1) for _ in range(2))
    return luck.choice(
        (
            content[:first],
            content[:first] + content[last:],
            content[:last] + content[first:],
            content[:first] + luck.randbytes(3) + content[last:],
            content.replace(b":", b":" * 2, 1),
        )
    )


def is_fine(response: httpx.Response) -> bool:
    """An answer, or an error of the one form that is the client's; nothing of the machine in either."""
    if response.status_code >= 500 or any(secret in response.text for secret in SECRETS):
        return False
    if response.status_code >= 400:
        return set(response.json()) == {"error"} and not any(part in response.text for part in IN_TRACES)
    return "server_error" not in response.text and "service_unavailable" not in response.text


async def send_all(app: Any) -> Counter[str]:
    """Send all bodies, a few at once; how many answers each route gave by status."""
    numbers, statuses = iter(NUMBERS), Counter[str]()
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)

    async def send_some(client: httpx.AsyncClient) -> None:
        for number in numbers:
            route, content = random_body(number)
            response = await client.post(route, content=content, headers={"content-type": "application/json"})
            assert is_fine(response), (number, route, content, response.status_code, response.text[:2000])
            statuses[f"{route} {response.status_code}"] += 1
            if statuses.total() % 1000 == 0:
                print(f"{statuses.total()} of {len(NUMBERS)}", flush=True)

    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=300) as client:
        await asyncio.gather(*(send_some(client) for _ in range(AT_ONCE)))
    return statuses


@pytest.mark.slow
def test_no_random_body_is_a_server_error() -> None:
    model = draftwing.load("tiny", draft="tiny", dtype="float32")
    model.tokenizer.chat_template = TEMPLATE
    scheduler = Scheduler(model, 4, 256, GenerateOptions(plan="chain:3"), 200)
    intake = Intake(model, scheduler, max_new_tokens=8)
    scheduler.start()
    try:
        statuses = asyncio.run(send_all(create_app(scheduler, intake, Identity("tiny", "tiny", "test"))))
        assert scheduler.is_alive
        assert scheduler.num_running == scheduler.num_waiting == 0
    finally:
        scheduler.stop()
    print(dict(sorted(statuses.items())))
    assert sum(statuses.values()) == len(NUMBERS)
    answered = {key.split()[0] for key in statuses if key.endswith(" 200")}
    assert answered == {route for route, _ in BODIES}, "bodies of every route are answered as well"
