"""Continuous batching against fixed batches: requests of mixed lengths over 1, 4 and 16 seats.

A fixed batch decodes as many requests as there are seats to the end of the longest, then takes the next ones; with
seats, the next request comes as soon as one has ended. Both give the same tokens, which is asserted.

    python benchmarks/bench_engine.py --output docs/results/tiny_cpu_engine.json
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import draftwing
from draftwing.api import SpeculativeModel
from draftwing.data.prompts import read_prompts
from draftwing.embedded import EMBEDDED_PROMPTS
from draftwing.engine.engine import Request
from draftwing.engine.options import GenerateOptions
from draftwing.engine.sampling import SamplingParams
from draftwing.engine.stopping import StopRule
from draftwing.provenance import write_record

LIMITS = (8, 16, 32, 64, 128)
"""New tokens of a request; each is drawn."""


@dataclass
class Served:
    """What serving all requests once came to; seconds since the first came."""

    tokens: list[list[int]]
    seconds: float
    first_token_s: list[float]
    empty_seat_s: float
    """Seconds of seats that nobody was decoded in, summed over seats."""


def main() -> int:
    options = parse_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = draftwing.load("tiny", draft="tiny", dtype=options.dtype)
    requests = mixed_requests(model, options.num_requests, options.temperature)
    rows = [measure(model, requests, num_seats, options) for num_seats in options.seats]
    print_table(rows)
    if options.output:
        write_record(options.output, rows, vars(options))
    return 0


def mixed_requests(model: SpeculativeModel, count: int, temperature: float) -> list[Request]:
    """Embedded prompts, each cut somewhere, with limits of their own."""
    luck = random.Random(0)
    prompts = [prompt.token_ids(model.tokenizer) for prompt in read_prompts(EMBEDDED_PROMPTS)]
    requests = []
    for number in range(count):
        prompt = luck.choice(prompts)
        prompt = prompt[: luck.randint(4, len(prompt))]
        sampling = SamplingParams(temperature, seed=number)
        requests.append(Request(prompt, sampling, StopRule(luck.choice(LIMITS), model.target.eos_token_ids)))
    return requests


def measure(
    model: SpeculativeModel, requests: Sequence[Request], num_seats: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Both ways in turn, the medians of their repeats."""
    settings = GenerateOptions(plan=options.plan)
    fixed = [requests[first : first + num_seats] for first in range(0, len(requests), num_seats)]
    ways = {"fixed": fixed, "seats": [requests]}
    runs: dict[str, list[Served]] = {way: [] for way in ways}
    serve(model, fixed[:1], num_seats, settings)  # warm-up
    for _ in track(range(options.repeats), f"{num_seats} seats", console=Console(stderr=True)):
        for way, batches in ways.items():
            runs[way].append(serve(model, batches, num_seats, settings))
    assert len({str(run.tokens) for served in runs.values() for run in served}) == 1, "a way changed the tokens"
    figures: dict[str, Any] = {"num_seats": num_seats}
    for way, served in runs.items():
        figures[way] = {
            "tokens_per_second": statistics.median(sum(map(len, run.tokens)) / run.seconds for run in served),
            "first_token_s": statistics.median(statistics.mean(run.first_token_s) for run in served),
            "empty_seat_s": statistics.median(run.empty_seat_s for run in served),
        }
    figures["speedup"] = figures["seats"]["tokens_per_second"] / figures["fixed"]["tokens_per_second"]
    return figures


def serve(
    model: SpeculativeModel, batches: Sequence[Sequence[Request]], num_seats: int, settings: GenerateOptions
) -> Served:
    """Decode the batches one after another, each over so many seats."""
    begin = last = time.perf_counter()
    tokens: list[list[int]] = []
    first_token_s: list[float] = []
    empty_seat_s = 0.0
    for batch in batches:
        generation = model.start_requests(batch, settings, num_seats)
        has_token = [False] * len(batch)
        for committed in generation.cycles():
            now = time.perf_counter()
            num_running = sum(map(bool, committed.tokens))
            empty_seat_s += (now - last) * (num_seats - num_running)
            last = now
            for row, new in enumerate(committed.tokens):
                if new and not has_token[row]:
                    has_token[row] = True
                    first_token_s.append(now - begin)
        tokens += [output.tokens for output in generation.outputs]
    return Served(tokens, time.perf_counter() - begin, first_token_s, empty_seat_s)


def print_table(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Fixed batches and seats")
    for column in ("seats", "tokens/s, fixed", "seats", "speed-up", "first token s, fixed", "seats", "empty seats s"):
        table.add_column(column, justify="right")
    for row in rows:
        fixed, seats = row["fixed"], row["seats"]
        table.add_row(
            str(row["num_seats"]),
            f"{fixed['tokens_per_second']:.0f}",
            f"{seats['tokens_per_second']:.0f}",
            f"{row['speedup']:.2f}",
            f"{fixed['first_token_s']:.2f}",
            f"{seats['first_token_s']:.2f}",
            f"{fixed['empty_seat_s']:.1f}, {seats['empty_seat_s']:.1f}",
        )
    Console(width=110).print(table)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seats", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--num-requests", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--plan", help="as GenerateOptions has it (default: auto)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--output", help="write the figures with their provenance to this JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
