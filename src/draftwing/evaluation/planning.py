"""What `draftwing plan` shows: measured costs, learnt acceptance, and the trees that follow from them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table

from draftwing.drafts.load_draft import ACCEPTANCE_FILE
from draftwing.engine.statistics import Statistics
from draftwing.evaluation.compare import Start, timed
from draftwing.files import write_text
from draftwing.plans.acceptance import EDGES, NUM_DEPTHS, AcceptanceTable
from draftwing.plans.costs import CycleCosts
from draftwing.plans.lessons import Experience

BAR = 40


@dataclass(frozen=True)
class PlanReport:
    """Costs and acceptance of a target with a draft, and what decoding with them brought, plain and sized by itself."""

    costs: CycleCosts
    experience: Experience
    plain: Statistics
    auto: Statistics
    seconds: Mapping[str, float]
    """Of all decoding, plans' own decisions too: `off` and `auto`."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready figures; seconds, probabilities, tokens per second."""
        return {
            "costs": self.costs.as_dict(),
            "acceptance": self.experience.acceptance.as_dict(),
            "learnt_speedup": self.experience.gain,
            "speedup": self.speedup,
            "acceptance_length": self.auto.acceptance_length,
            "node_pays_from": self.node_pays_from(),
            "level_pays_from": self.level_pays_from(),
        }

    @property
    def speedup(self) -> float:
        """Tokens per second with trees that size themselves, over plain decoding's."""
        return self.tokens_per_second * self.seconds["off"] / self.plain.num_tokens

    @property
    def tokens_per_second(self) -> float:
        """With trees that size themselves."""
        return self.auto.num_tokens / self.seconds["auto"]

    @property
    def rate(self) -> float:
        """Tokens per second that a further second of a cycle must bring, at the first context."""
        return max(1.0, self.experience.gain) / self.costs.plain[0]

    def node_pays_from(self) -> dict[int, float]:
        """P(accepted) from which one more node pays, by the nodes that the tree has already."""
        sizes = np.array(self.costs.num_nodes)
        seconds = np.maximum(np.diff(self.costs.verify[0]) / np.diff(sizes), 0.0)
        return {int(size): float(self.rate * cost) for size, cost in zip(sizes[:-1], seconds, strict=True)}

    def level_pays_from(self) -> dict[int, float]:
        """P(one of the level's parents is accepted) from which drafting one more level pays, by its width."""
        deeper = float(self.experience.acceptance.continuation[NUM_DEPTHS - 1])
        seconds = zip(self.costs.widths, self.costs.draft_step[0], strict=True)
        return {width: self.rate * step / deeper for width, step in seconds}


def measure_plan(
    start: Start,
    experience: Experience,
    costs: CycleCosts,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    **options: Any,
) -> PlanReport:
    """Decode prompts, so many at a time, plain and with trees that size themselves (`options` of `generate`)."""
    totals, seconds = {"off": Statistics(), "auto": Statistics()}, {"off": 0.0, "auto": 0.0}
    for first in range(0, len(prompts) - batch_size + 1, batch_size):  # whole batches only: costs are theirs
        for plan, total in totals.items():
            generation, passed = timed(start, prompts[first : first + batch_size], plan=plan, **options)
            total.merge(generation.statistics)
            seconds[plan] += passed
    return PlanReport(costs, experience, totals["off"], totals["auto"], seconds)


def save_acceptance(folder: Path, tables: dict[str, AcceptanceTable]) -> Path:
    """Write what was learnt (`greedy`, `sampled`) beside a head; `load` starts from it. Keeps the tables not given."""
    file = folder / ACCEPTANCE_FILE
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    known |= {name: table.as_dict() for name, table in tables.items()}
    write_text(file, json.dumps(known, indent=2) + "\n")
    return file


def as_tables(report: PlanReport) -> Group:
    """Costs with bars, acceptance by probability and depth."""
    return Group(
        *(_cost_table(report.costs, index) for index in range(len(report.costs.contexts))), _acceptance(report)
    )


def _cost_table(costs: CycleCosts, index: int) -> Table:
    table = Table(title=f"A cycle's parts at {costs.contexts[index]} tokens of context")
    table.add_column("part")
    table.add_column("ms", justify="right")
    table.add_column("", justify="left")
    parts = [("plain decoding, one token", costs.plain[index])]
    parts += [(f"target's pass, {n} nodes", s) for n, s in zip(costs.num_nodes, costs.verify[index], strict=True)]
    parts += [("draft, first level", costs.extend[index])]
    parts += [(f"draft, a level of {w}", s) for w, s in zip(costs.widths, costs.draft_step[index], strict=True)]
    parts += [("commit and host", costs.fixed[index])]
    most = max(seconds for _, seconds in parts)
    for name, seconds in parts:
        table.add_row(name, f"{1000 * seconds:.2f}", "█" * round(BAR * seconds / most))
    return table


def _acceptance(report: PlanReport) -> Table:
    table = Table(title="Accepted, of nodes whose parent was, by the draft's own probability")
    table.add_column("probability")
    for depth in range(1, NUM_DEPTHS + 1):
        table.add_column(f"depth {depth}{'+' if depth == NUM_DEPTHS else ''}", justify="right")
    edges = [0.0, *np.exp(EDGES), 1.0]
    learnt = report.experience.acceptance
    for index in range(len(edges) - 1):
        cells = []
        for depth in range(NUM_DEPTHS):
            expected = learnt.expected[depth, index]
            middle = (edges[index] + edges[index + 1]) / 2
            cells.append(f"{min(1.0, middle * np.exp(learnt.correction[depth, index])):.2f}" if expected > 1 else "")
        table.add_row(f"{edges[index]:.2f} - {edges[index + 1]:.2f}", *cells)
    return table


def implied_plan(report: PlanReport) -> Sequence[str]:
    """Sentences for the console: which trees pay, and what they brought."""
    if report.experience.gain < 1:
        return [f"Drafting does not pay here ({report.experience.gain:.2f}x): decoding goes on without drafts."]
    nodes = ", ".join(f"{p:.2f} after {n}" for n, p in report.node_pays_from().items() if p < 1)
    levels = ", ".join(f"{p:.2f} for {w} nodes" for w, p in report.level_pays_from().items())
    return [
        f"A node is verified if it is accepted with a probability of at least {nodes}.",
        f"A level is drafted if one of its parents is accepted with a probability of at least {levels}.",
        f"Measured: {report.tokens_per_second:.0f} tokens/s, {report.speedup:.2f}x plain decoding, tau "
        f"{report.auto.acceptance_length:.2f}.",
    ]
