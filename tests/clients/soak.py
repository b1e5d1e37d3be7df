"""Random requests for a server from locust: streams and bodies, clients that leave, bodies that are wrong.

    locust -f tests/clients/soak.py --headless --users 8 --run-time 30m --host http://127.0.0.1:8000

One answer in 50 is asked for once more without drafts, and must be the same: so nothing that ran beside it changed it.
"""

import json
import random
import time

from locust import HttpUser, task

PROMPTS = ("def clamp(value, low, high):\n", "def read_lines(path):\n", "Write the Python function", "x")


class Client(HttpUser):
    """Asks for something, reads it, and goes on at once."""

    def on_start(self) -> None:
        self.luck = random.Random()

    def body(self) -> dict[str, object]:
        return {
            "prompt": self.luck.choice(PROMPTS) * self.luck.randint(1, 4),
            "max_tokens": self.luck.randint(1, 48),
            "temperature": self.luck.choice((0, 0.7, 1.2)),
            "seed": self.luck.randrange(2**31),
        }

    @task(6)
    def complete(self) -> None:
        body = self.body()
        with self.client.post("/v1/completions", json=body, catch_response=True) as response:
            if response.status_code == 429:
                response.success()
            elif response.status_code == 200 and self.luck.random() < 0.02:
                again = self.client.post("/v1/completions", json=body | {"draft": False}, name="again without drafts")
                if again.status_code == 200 and again.json()["choices"] != response.json()["choices"]:
                    response.failure("another answer without drafts")

    @task(4)
    def stream(self) -> None:
        start = time.perf_counter()
        body = self.body() | {"stream": True}
        with self.client.post("/v1/completions", json=body, stream=True, catch_response=True) as response:
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
            last = first
            for line in lines:
                last = line
            if last != b"data: [DONE]":
                response.failure("a stream without an end")

    @task(1)
    def be_wrong(self) -> None:
        wrong = self.luck.choice(({"temperature": "hot"}, {"prompt": 5}, {"max_tokens": 10**6}, {"tools": [1]}))
        content = json.dumps(self.body() | wrong)
        headers = {"Content-Type": "application/json"}
        with self.client.post("/v1/completions", data=content, headers=headers, catch_response=True) as response:
            if response.status_code == 400:
                response.success()
            else:
                response.failure(f"status {response.status_code} for a wrong body")
