"""The server with drafts against the same server without: tokens/s, times to first token and per token, by clients.

    python benchmarks/bench_server.py --output docs/results/tiny_cpu_server.json

All servers run from the beginning and are asked in turn, so that rounds pair them; who is not asked waits. The same
requests go to all, and the texts of these two must be equal. Last, one client's tokens/s are compared with those of
`generate`, with drafts and without.

Others' servers run beside them with the same weights, plain and with the same head in chains of 3:

    python benchmarks/bench_server.py --clients 1 4 --vllm PYTHON_WITH_VLLM --transformers \\
        --llama-server PATH --target-gguf tiny-bf16.gguf

llama.cpp's converter writes the GGUF file: `convert_hf_to_gguf.py --outtype bf16 src/draftwing/assets/tiny/target`.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from bench_busy import print_table

import draftwing
from draftwing.data.prompts import read_prompts
from draftwing.drafts.export_draft import export_draft
from draftwing.embedded import EMBEDDED_PROMPTS, embedded_target
from draftwing.evaluation.compare import timed
from draftwing.provenance import write_record
from draftwing.serving.process import bind
from draftwing.target.packed import multiplies_bfloat16

SERVERS = {"plain": ["--method", "plain"], "drafts": ["--draft", "tiny"]}
READY = "http://"
MODEL_LEN = 1024
CHAIN = 3
VLLM = Path(__file__).parent / "vllm_command.py"
TARGET = str(embedded_target("tiny"))
DTYPE = "bfloat16" if multiplies_bfloat16() else "float32"
"""That of our servers."""


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
    texts = [model.tokenizer.decode(prompt) for prompt in prompts]  # not every server reads ids
    bodies = [as_body(texts[i % len(texts)], i, options) for i in range(options.num_requests)]
    with ExitStack() as stack:
        seats = max(options.clients)
        urls = {name: stack.enter_context(server(more, seats)) for name, more in SERVERS.items()}
        heads = Path(stack.enter_context(TemporaryDirectory()))
        for name, command in others(options, heads, seats).items():
            urls[name] = stack.enter_context(other_server(name, command))
        rows = [row for clients in options.clients for row in measure(urls, bodies, clients, options)]
        alone = {"plain": model.with_method("plain"), "drafts": model}
        overhead = {name: measure_http(alone[name], urls[name], bodies, options) for name in SERVERS}
    print_table(rows, "milliseconds to the first token and for each further one")
    print(
        "one client over HTTP has, of generate's tokens/s:", {name: round(ratio, 3) for name, ratio in overhead.items()}
    )
    if options.output:
        write_record(options.output, rows, vars(options), http_over_generate=overhead)
    return 0


def as_body(prompt: str, number: int, options: argparse.Namespace) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": options.max_new_tokens, "seed": number}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    return body | stream | {"temperature": options.temperature}


@contextmanager
def server(more: Sequence[str], num_seats: int) -> Iterator[str]:
    """A server's address, once it answers."""
    command = [sys.executable, "-m", "draftwing", "serve", "--target", "tiny", *more]
    command += ["--port", "0", "--seats", str(num_seats)]
    log = Path(f"build/server-{more[-1]}.log")
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as said, subprocess.Popen(command, stderr=said) as started:
        try:
            while not (
                url := next(
                    (word for word in log.read_text().rpartition("\n")[0].split() if word.startswith(READY)), ""
                )
            ):
                if started.poll() is not None:
                    raise SystemExit(f"the server has ended: see {log}")
                time.sleep(0.1)
            yield url.rstrip(".,/")
        finally:
            started.kill()


def others(options: argparse.Namespace, heads: Path, seats: int) -> dict[str, list[str]]:
    """The commands of others' servers, but for their ports; their heads are written into a folder."""
    commands = dict[str, list[str]]()
    if options.llama_server:
        head = export_draft("tiny", "tiny", "llama.cpp", heads / "llama", target_gguf=Path(options.target_gguf))
        sizes = ["-np", str(seats), "-c", str(seats * MODEL_LEN), "-t", str(options.threads)]
        commands["llama"] = [options.llama_server, "-m", options.target_gguf, *sizes, "--alias", "tiny"]
        (file,) = head.folder.glob("*.gguf")
        drafts = ["-md", str(file), "--spec-type", "draft-eagle3", "--spec-draft-n-max", str(CHAIN)]
        commands["llama eagle3"] = [*commands["llama"], *drafts]
    if options.vllm:
        export_draft("tiny", "tiny", "vllm", heads / "vllm", verifier=TARGET, force=True)
        run = [options.vllm, str(VLLM), "serve", TARGET]
        sizes = ["--max-num-seqs", str(seats), "--max-model-len", str(MODEL_LEN)]
        sizes += ["--dtype", DTYPE]
        commands["vllm"] = [*run, "--served-model-name", "tiny", *sizes]
        drafts = {"method": "eagle3", "model": str(heads / "vllm"), "num_speculative_tokens": CHAIN}
        commands["vllm eagle3"] = [*commands["vllm"], "--speculative-config", json.dumps(drafts)]
    if options.transformers:
        serve = "from transformers.cli.transformers import main; main()"
        commands["transformers"] = [sys.executable, "-c", serve, "serve", "--device", "cpu", "--dtype", DTYPE]
    return commands


@contextmanager
def other_server(name: str, command: Sequence[str]) -> Iterator[str]:
    """Another server's address, once it answers."""
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    url, log = f"{READY}127.0.0.1:{port}", Path(f"build/server-{name.replace(' ', '-')}.log")
    log.parent.mkdir(exist_ok=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("w", encoding="utf-8") as said:
        started = subprocess.Popen(
            [*command, "--port", str(port)], stdout=said, stderr=said, env=environment, start_new_session=True
        )
        try:
            while not answers_at(url):
                if started.poll() is not None:
                    raise SystemExit(f"{name} has ended: see {log}")
                time.sleep(0.5)
            yield url
        finally:
            with suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()


def answers_at(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    return False


def measure(
    urls: dict[str, str], bodies: Sequence[dict[str, Any]], clients: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """All requests from so many clients at once, to all servers in turn; medians over the rounds.

    Another's server that ends is taken out of `urls`.
    """
    speeds: dict[str, list[float]] = defaultdict(list)
    answers: dict[str, list[Answer]] = defaultdict(list)
    for number in range(options.rounds + 1):
        texts = {}
        of_round = [begun_anew(body, f"{clients}.{number}.{index}") for index, body in enumerate(bodies)]
        for name, url in tuple(urls.items()):
            try:
                seconds, got = ask_all(url, [body | {"model": called(name)} for body in of_round], clients)
            except httpx.HTTPError:
                if name in SERVERS:
                    raise
                print(f"{name} has ended with {clients} clients, and is left out")
                del urls[name]
                continue
            texts[name] = [answer.text for answer in got]
            if number:  # the first round warms up
                speeds[name].append(sum(answer.num_tokens for answer in got) / seconds)
                answers[name] += got
        assert texts["plain"] == texts["drafts"], "the answers differ"
    return [as_row(name, clients, speeds, answers[name], texts) for name in urls]


def as_row(
    name: str,
    clients: int,
    speeds: Mapping[str, Sequence[float]],
    answers: Sequence[Answer],
    texts: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """A server's figures with so many clients; `over it` are the ratios of our server with drafts to it."""
    firsts, tokens = ([getattr(answer, field) * 1e3 for answer in answers] for field in ("first_s", "token_s"))
    ratios = [ours / its for ours, its in zip(speeds["drafts"], speeds[name], strict=True)]
    return {
        "clients": clients,
        "server": name,
        "tok/s": statistics.median(speeds[name]),
        "first p50": quantile(firsts, 50),
        "first p99": quantile(firsts, 99),
        "token p50": quantile(tokens, 50),
        "token p99": quantile(tokens, 99),
        "drafts over it": statistics.median(ratios),
        "lowest": min(ratios),
        "same texts": statistics.mean(ours == its for ours, its in zip(texts["plain"], texts[name], strict=True)),
    }


def begun_anew(body: dict[str, Any], name: str) -> dict[str, Any]:
    """A request whose prompt no server has read before: some keep what they have read, and `generate` does not."""
    return body | {"prompt": f"# {name}\n{body['prompt']}"}


def called(name: str) -> str:
    """What a server calls the model."""
    return TARGET if name == "transformers" else "tiny"


def ask_all(url: str, bodies: Sequence[dict[str, Any]], clients: int) -> tuple[float, list[Answer]]:
    start = time.perf_counter()
    limits = httpx.Limits(max_keepalive_connections=0)  # some servers close those just when they are used again
    with httpx.Client(timeout=600, limits=limits) as client, ThreadPoolExecutor(clients) as pool:
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
                text += chunk["choices"][0]["text"] or ""
            if chunk.get("usage"):
                num_tokens = chunk["usage"]["completion_tokens"]
    return Answer(text, num_tokens, first, time.perf_counter() - start)


def measure_http(model: Any, url: str, bodies: Sequence[dict[str, Any]], options: argparse.Namespace) -> float:
    """One client's tokens/s over those of `generate`: the median of pairs, request by request in turn."""
    ratios = []
    with httpx.Client(timeout=600) as client:
        for number in range(options.rounds + 1):
            for index, body in enumerate(bodies[: options.http_requests]):
                body = begun_anew(body, f"http {number}.{index}")
                answer = ask(client, url, body)
                more = {"temperature": body["temperature"], "seed": body["seed"]}
                prompt = model.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
                run, seconds = timed(model.start, [prompt], max_new_tokens=body["max_tokens"], **more)
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
    parser.add_argument("--vllm", metavar="PYTHON", help="one with vLLM: its server is measured too")
    parser.add_argument("--llama-server", metavar="PATH", help="llama.cpp's server is measured too")
    parser.add_argument("--target-gguf", help="the embedded target for it, in bfloat16")
    parser.add_argument("--transformers", action="store_true", help="its server is measured too")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="of llama.cpp's server (default: all cores)"
    )
    parser.add_argument("--output", help="write the figures with their provenance to this JSON file")
    options = parser.parse_args()
    if options.llama_server and not options.target_gguf:
        parser.error("--llama-server: needs --target-gguf, the embedded target's file")
    return options


if __name__ == "__main__":
    sys.exit(main())
