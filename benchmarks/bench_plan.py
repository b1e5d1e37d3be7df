"""Trees that size themselves against fixed plans, with a trained head and with a useless one.

    python benchmarks/bench_plan.py --output docs/results/tiny_cpu_plan.json

Settings are (target size, batch size). A larger target is the embedded one with idle columns in its MLPs: the same
tokens at a higher cost. The useless head is the embedded one with every matrix drawn anew. All decode the same prompts
in one process, in turn; a figure is the median over repeats (twice as many are run, see `measure`). Two ratios matter:
`auto` with the trained head over the best fixed plan (found by trying all), and `auto` with the useless head over plain
decoding.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from draftwing.api import Lessons, SpeculativeModel
from draftwing.data.prompts import read_prompts
from draftwing.drafts.eagle.fused_layers import pack_head
from draftwing.drafts.load_draft import load_draft, read_acceptance
from draftwing.embedded import EMBEDDED_PROMPTS
from draftwing.evaluation.compare import Start, timed
from draftwing.provenance import write_record
from draftwing.target.fused import pack_target
from draftwing.target.load import load_target, load_tokenizer
from draftwing.target.model import TargetModel

PLANS = ("chain:1", "chain:2", "chain:3", "chain:5", "chain:7", "tree:2x3x6", "tree:2x4x8", "tree:3x4x12",
         "tree:4x4x16", "tree:4x6x24", "tree:4x8x32")  # fmt: skip


def main() -> int:
    options = parse_options()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    tokenizer = load_tokenizer("tiny")
    prompts = [prompt.token_ids(tokenizer) for prompt in read_prompts(EMBEDDED_PROMPTS)]
    rows = []
    for setting in track(options.settings, "settings", console=Console(stderr=True)):
        size, batch_size = map(int, setting.split("x"))
        target = widened(size, options.dtype)
        trained = SpeculativeModel(
            target, head_for(target, random=False), tokenizer, lessons=Lessons(read_acceptance("tiny"))
        )
        useless = SpeculativeModel(target, head_for(target, random=True), tokenizer)
        methods: dict[str, Start] = {
            "off": partial(trained.start, plan="off"),
            "auto": partial(trained.start, ngram=False),
        }
        methods |= {plan: partial(trained.start, plan=plan) for plan in PLANS}
        methods["useless auto"] = partial(useless.start, ngram=False)
        batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
        batches = [batch for batch in batches if len(batch) == batch_size][: options.batches]
        rows.append(measure(methods, batches, options) | {"target_size": size, "batch_size": batch_size})
    print_table(rows)
    if options.output:
        write_record(options.output, rows, vars(options))
    return 0


def widened(size: int, dtype: str) -> TargetModel:
    """The embedded target with `size` times as wide MLPs, whose further columns do nothing."""
    target = load_target("tiny", getattr(torch, dtype))
    for layer in target.model.model.layers:
        mlp = layer.mlp
        for name, is_output in (("gate_proj", False), ("up_proj", False), ("down_proj", True)):
            weight = getattr(mlp, name).weight.detach()
            idle = torch.zeros_like(weight).repeat((1, size - 1) if is_output else (size - 1, 1))
            wide = torch.cat((weight, idle), dim=1 if is_output else 0)
            linear = nn.Linear(wide.shape[1], wide.shape[0], bias=False, dtype=weight.dtype)
            linear.weight = nn.Parameter(wide, requires_grad=False)
            setattr(mlp, name, linear)
    target.config.intermediate_size *= size
    return pack_target(target)


def head_for(target: TargetModel, random: bool) -> Any:
    head = load_draft("tiny", target)
    assert isinstance(head, nn.Module)
    if random:
        draw_anew(head)
    pack_head(head)
    return head


def draw_anew(head: nn.Module) -> None:
    """Make a head useless: every matrix is drawn anew."""
    for number, weight in enumerate(head.parameters()):
        if weight.ndim > 1:
            generator = torch.Generator(weight.device).manual_seed(number)
            weight.data.normal_(std=weight.shape[1] ** -0.5, generator=generator)


def measure(methods: dict[str, Start], batches: Sequence[Any], options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of each method, and the two ratios.

    The best fixed plan is found in the first half of the repeats and timed in the second, as all others are: the
    fastest of many in the very runs that it is judged by owes some of its speed to chance.
    """
    settings = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature}
    for start in methods.values():
        decode(start, batches[0], settings | {"max_new_tokens": 16})
    samples: dict[str, list[list[float]]] = {name: [[] for _ in batches] for name in methods}
    num_tokens = 0
    for index, batch in enumerate(batches):
        outputs = {}
        for _ in range(2 * options.repeats):
            for name, start in methods.items():
                outputs[name], elapsed = decode(start, batch, settings)
                samples[name][index].append(elapsed)
        assert all(tokens == outputs["off"] for tokens in outputs.values()), "a plan changed the tokens"
        num_tokens += sum(map(len, outputs["off"]))

    def speeds(half: slice) -> dict[str, float]:
        return {
            name: num_tokens / sum(statistics.median(seconds[half]) for seconds in by_batch)
            for name, by_batch in samples.items()
        }

    search, judged = speeds(slice(None, options.repeats)), speeds(slice(options.repeats, None))
    best = max(("off", *PLANS), key=search.__getitem__)
    return {
        "tokens_per_second": judged,
        "best_fixed": best,
        "auto_over_best_fixed": judged["auto"] / judged[best],
        "useless_auto_over_plain": judged["useless auto"] / judged["off"],
    }


def decode(start: Start, batch: Sequence[Sequence[int]], settings: dict[str, Any]) -> tuple[list[list[int]], float]:
    generation, seconds = timed(start, batch, **settings)
    return [output.tokens for output in generation.outputs], seconds


def print_table(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Trees that size themselves")
    for column in ("target", "batch", "plain", "best fixed plan", "auto", "auto / best", "useless head / plain"):
        table.add_column(column, justify="right")
    for row in rows:
        speeds, best = row["tokens_per_second"], row["best_fixed"]
        table.add_row(
            f"x{row['target_size']}",
            str(row["batch_size"]),
            f"{speeds['off']:.0f}",
            f"{best} {speeds[best]:.0f}",
            f"{speeds['auto']:.0f}",
            f"{row['auto_over_best_fixed']:.3f}",
            f"{row['useless_auto_over_plain']:.3f}",
        )
    Console(width=110).print(table)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=["1x1", "1x4", "8x1"], help="TARGET_SIZExBATCH_SIZE ...")
    parser.add_argument("--batches", type=int, default=6, help="batches of prompts per setting (default: 6)")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--output", help="write the figures with their provenance to this JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
