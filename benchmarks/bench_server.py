"""The server with drafts against the same server without: tokens/s, times to first token and per token, by clients.

    python benchmarks/bench_server.py --output docs/results/tiny_cpu_server.json

Both servers run from the beginning and are asked in turn, so that rounds pair them; who is not asked waits. The same
requests go to both, and their texts must be equal. Last, one client's tokens/s are compared with those of `generate`,
with drafts and without.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import Thread
from typing import Any

import httpx
from bench_busy import print_table

import draftwing
from draftwing.data.prompts import read_prompts
from draftwing.embedded import EMBEDDED_PROMPTS
from draftwing.evaluation.compare import timed
from draftwing.provenance import write_record

SERVERS = {"plain": ["--method", "plain"], "drafts": ["--draft", "tiny"]}
READY = "http://"


@dataclass(frozen=True)
class Answer:
    """A streamed answer: its text, how many tokens, and seconds from the request to the first and the last."""

    text: str
    num_tokens: int
    first_s: float
    last_s: float

    @property
    def token_s(self) -> float:
        """Seconds of a token behind the first."""
        return (self.last_s - self.first_s) / max(1, self.num_tokens - 1)


def main() -> int:
    options = parse_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers are not left behind
    model = draftwing.load("tiny", draft="tiny")
    prompts = [prompt.token_ids(model.tokenizer) for prompt in read_prompts(EMBEDDED_PROMPTS)]
    bodies = [as_body(prompts[i % len(prompts)], i, options) for i in range(options.num_requests)]
    with ExitStack() as stack:
        urls = {name: stack.enter_context(server(more, max(options.clients))) for name, more in SERVERS.items()}
        rows = [measure(urls, bodies, clients, options) for clients in options.clients]
        alone = {"plain": model.with_method("plain"), "drafts": model}
        overhead = {name: measure_http(alone[name], url, bodies, options) for name, url in urls.items()}
    print_table(rows, "milliseconds to the first token and for each further one")
    print(
        "one client over HTTP has, of generate's tokens/s:", {name: round(ratio, 3) for name, ratio in overhead.items()}
    )
    if options.output:
        write_record(options.output, rows, vars(options), http_over_generate=overhead)
    return 0


def as_body(prompt: Sequence[int], number: int, options: argparse.Namespace) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": list(prompt), "max_tokens": options.max_new_tokens, "seed": number}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    return body | stream | {"temperature": options.temperature}


@contextmanager
def server(more: Sequence[str], num_seats: int) -> Iterator[str]:
    """A server's address, once it answers."""
    command = [sys.executable, "-m", "draftwing", "serve", "--target", "tiny", *more]
    command += ["--port", "0", "--seats", str(num_seats)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as started:
        try:
            assert started.stderr is not None
            url = next(word for line in started.stderr for word in line.split() if word.startswith(READY))
            Thread(target=deque, args=(started.stderr, 0), daemon=True).start()  # a full pipe would stop it
            yield url.rstrip(".,/")
        finally:
            started.kill()


def measure(
    urls: dict[str, str], bodies: Sequence[dict[str, Any]], clients: int, options: argparse.Namespace
) -> dict[str, Any]:
    """All requests from so many clients at once, to both servers in turn; medians over the rounds."""
    speeds: dict[str, list[float]] = defaultdict(list)
    answers: dict[str, list[Answer]] = defaultdict(list)
    for number in range(options.rounds + 1):
        texts = {}
        for name, url in urls.items():
            seconds, got = ask_all(url, bodies, clients)
            texts[name] = [answer.text for answer in got]
            if number:  # the first round warms up
                speeds[name].append(sum(answer.num_tokens for answer in got) / seconds)
                answers[name] += got
        assert texts["plain"] == texts["drafts"], "the answers differ"
    row: dict[str, Any] = {"clients": clients}
    for name in urls:
        firsts, tokens = ([getattr(a, field) * 1e3 for a in answers[name]] for field in ("first_s", "token_s"))
        row |= {f"{name} tok/s": statistics.median(speeds[name])}
        row |= {f"{name} first p50": quantile(firsts, 50), f"{name} first p99": quantile(firsts, 99)}
        row |= {f"{name} token p50": quantile(tokens, 50), f"{name} token p99": quantile(tokens, 99)}
    ratios = [a / b for a, b in zip(speeds["drafts"], speeds["plain"], strict=True)]
    return row | {"drafts over plain": statistics.median(ratios), "lowest": min(ratios)}


def ask_all(url: str, bodies: Sequence[dict[str, Any]], clients: int) -> tuple[float, list[Answer]]:
    start = time.perf_counter()
    with httpx.Client(timeout=600) as client, ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda body: ask(client, url, body), bodies))
    return time.perf_counter() - start, answers


def ask(client: httpx.Client, url: str, body: dict[str, Any]) -> Answer:
    start = time.perf_counter()
    first, text, num_tokens = 0.0, "", 0
    with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if chunk["choices"]:
                first = first or time.perf_counter() - start
                text += chunk["choices"][0]["text"]
            if chunk.get("usage"):
                num_tokens = chunk["usage"]["completion_tokens"]
    return Answer(text, num_tokens, first, time.perf_counter() - start)


def measure_http(model: Any, url: str, bodies: Sequence[dict[str, Any]], options: argparse.Namespace) -> float:
    """One client's tokens/s over those of `generate`: the median of pairs, request by request in turn."""
    ratios = []
    with httpx.Client(timeout=600) as client:
        for number in range(options.rounds + 1):
            for body in bodies[: options.http_requests]:
                answer = ask(client, url, body)
                more = {"temperature": body["temperature"], "seed": body["seed"]}
                run, seconds = timed(model.start, [body["prompt"]], max_new_tokens=body["max_tokens"], **more)
                if number:  # the first round warms up
                    ratios.append(answer.num_tokens / answer.last_s / (run.statistics.num_tokens / seconds))
    return statistics.median(ratios)


def quantile(values: Sequence[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--num-requests", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--http-requests", type=int, default=8, help="of the comparison with generate (default: 8)")
    parser.add_argument("--output", help="write the figures with their provenance to this JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
