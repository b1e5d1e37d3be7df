"""Random requests for a server from locust: streams and bodies, clients that leave, bodies that are wrong.

    locust -f tests/clients/soak.py --headless --users 8 --run-time 30m --host http://127.0.0.1:8000

One answer in 50 is asked for once more without drafts, and must be the same: so nothing that ran beside it changed it.
"""

import json
import random
import time
from typing import Any

from locust import HttpUser, task

PROMPTS = ("def clamp(value, low, high):\n", "def read_lines(path):\n", "Write the Python function", "x")
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
SCHEMA = {"type": "object", "properties": {"by": {"enum": ["size", "name"]}}, "required": ["by"]}
WISHES: tuple[dict[str, Any], ...] = (
    *({}, {}, {"stop": ["\n\n", "return"]}, {"n": 2}, {"presence_penalty": 0.8}, {"top_p": 0.9, "min_p": 0.05}),
    *({"repetition_penalty": 1.2}, {"logit_bias": {"10": -5}}, {"min_tokens": 4}, {"ignore_eos": True}),
    {"response_format": {"type": "regex", "regex": "[a-f]{3}( [0-9]{1,3}){2}!"}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
)
WRONG = ({"temperature": "hot"}, {"prompt": 5}, {"max_tokens": 10**6}, {"tools": [1]}, {"stop": [""]}, {"n": 0})


class Client(HttpUser):
    """Asks for something, reads it, and goes on at once."""

    def on_start(self) -> None:
        self.luck = random.Random()

    def request(self) -> tuple[str, dict[str, Any]]:
        """A route, and a body for it."""
        luck = self.luck
        prompt = luck.choice(PROMPTS) * luck.randint(1, 4)
        asks = {
            "max_tokens": luck.randint(4, 48),
            "temperature": luck.choice((0, 0.7, 1.2)),
            "seed": luck.randrange(2**31),
        }
        body = asks | luck.choice(WISHES)
        if luck.random() < 0.4:
            shown = {"logprobs": True, "top_logprobs": 3} if luck.random() < 0.2 else {}
            return CHATS, body | shown | {"messages": [{"role": "user", "content": prompt}]}
        shown = {"logprobs": 3, "echo": True} if luck.random() < 0.2 else {}
        return COMPLETIONS, body | shown | {"prompt": prompt}

    @task(6)
    def ask(self) -> None:
        route, body = self.request()
        with self.client.post(route, json=body, catch_response=True) as response:
            if response.status_code == 429:
                response.success()
            elif response.status_code == 200 and self.luck.random() < 0.02:
                plain = body | {"draft": False}
                again = self.client.post(route, json=plain, name="again without drafts")
                if again.status_code == 200 and again.json()["choices"] != response.json()["choices"]:
                    response.failure(f"another answer without drafts: {json.dumps(body)}")

    @task(4)
    def stream(self) -> None:
        start = time.perf_counter()
        route, body = self.request()
        body |= {"stream": True}
        with self.client.post(route, json=body, stream=True, catch_response=True) as response:
            if response.status_code != 200:
                if response.status_code == 429:
                    response.success()
                return
            lines = (line for line in response.iter_lines() if line)
            first = next(lines, b"")
            milliseconds = (time.perf_counter() - start) * 1000
            self.environment.events.request.fire(
                request_type="SSE", name="first chunk", response_time=milliseconds, response_length=len(first),
                exception=None, context={},
            )  # fmt: skip
            if self.luck.random() < 0.3:
                response.success()
                response.close()  # leaves in the middle
                return
            last = b""
            for line in (first, *lines):
                last = line
                if line.startswith(b"data: {") and "error" in json.loads(line[6:]):
                    response.failure(f"an error in a stream: {line.decode():.200}")
                    return
            if last != b"data: [DONE]":
                response.failure("a stream without an end")

    @task(1)
    def be_wrong(self) -> None:
        body = {"prompt": "x", "max_tokens": 4} | self.luck.choice(WRONG)
        with self.client.post(COMPLETIONS, json=body, name="a wrong body", catch_response=True) as response:
            if response.status_code == 400:
                response.success()
            else:
                response.failure(f"status {response.status_code} for a wrong body")
