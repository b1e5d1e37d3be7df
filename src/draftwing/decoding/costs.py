"""What a cycle costs on this machine: seconds of each stage, measured once with the engine itself."""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from draftwing.decoding.generate import Generation, Request, plain_plan
from draftwing.decoding.plan import TreePlan
from draftwing.decoding.readback import CycleReport
from draftwing.decoding.rows import DrafterFactory, NewRows, Rows
from draftwing.decoding.sampling import SamplingParams
from draftwing.decoding.statistics import STAGES
from draftwing.decoding.stopping import StopRule
from draftwing.models.target import TargetModel

logger = logging.getLogger(__name__)
NUM_NODES = (2, 4, 8, 12, 16, 24, 32, 48, 64)
WIDTHS = (1, 4, 8)
CONTEXTS = (64, 512)
WARM_UP = 2
ROUNDS = 2
"""Times that all plans are gone through; the faster median counts, for costs that are kept must not hold a hiccup."""
STEPS = 3
"""Draft levels beyond the first that a draft step's seconds are taken from, if the largest plan has so many."""


@dataclass(frozen=True)
class CycleCosts:
    """Seconds of a cycle's parts for one batch size, by context length; linear in between.

    Attributes:
        contexts: committed tokens a row at which the rest was measured, `[C]`.
        plain: a cycle without drafts, `[C]`.
        num_nodes, verify: the target's pass and choice over a tree of so many nodes a row, `[C][N]`.
        widths, draft_step: one further level of so many nodes, `[C][W]`.
        extend: reading the committed tokens into the draft, and the first level, `[C]`.
        fixed: commit and host, `[C]`.
    """

    contexts: Sequence[int]
    plain: Sequence[float]
    num_nodes: Sequence[int]
    verify: Sequence[Sequence[float]]
    widths: Sequence[int]
    draft_step: Sequence[Sequence[float]]
    extend: Sequence[float]
    fixed: Sequence[float]

    def at(self, context: int) -> "CycleCosts":
        """The costs at one context length (held constant beyond the measured ones)."""

        def between(values: Sequence[Any]) -> Any:
            columns = np.array(values, dtype=float)
            if columns.ndim == 1:
                return [float(np.interp(context, self.contexts, columns))]
            return [[float(np.interp(context, self.contexts, column)) for column in columns.T]]

        return CycleCosts(
            contexts=[context],
            plain=between(self.plain),
            num_nodes=self.num_nodes,
            verify=between(self.verify),
            widths=self.widths,
            draft_step=between(self.draft_step),
            extend=between(self.extend),
            fixed=between(self.fixed),
        )

    def cycle(self, plan: TreePlan) -> float:
        """Seconds of a cycle of this plan, at the first context."""
        return self.tree(plan.num_nodes, self.levels(plan)) if plan.depth else self.plain[0]

    def levels(self, plan: TreePlan) -> float:
        """Seconds of a plan's draft levels beyond the first."""
        return (plan.depth - 1) * self.step(plan.width)

    def tree(self, num_nodes: int, levels: float) -> float:
        """Seconds of a cycle that verifies `num_nodes` and spends so many on the draft's levels beyond the first."""
        verify = float(np.interp(num_nodes, self.num_nodes, self.verify[0]))
        return self.extend[0] + levels + verify + self.fixed[0]

    def step(self, width: int) -> float:
        """Seconds of one further draft level of `width` nodes, at the first context."""
        return float(np.interp(width, self.widths, self.draft_step[0]))

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "CycleCosts":
        """The costs that `as_dict` described.

        Raises:
            ValueError: a field is missing or unknown, or has another shape.
        """
        try:
            costs = CycleCosts(**values)
        except TypeError as error:
            raise ValueError(f"costs: {error}") from None
        contexts, nodes, widths = len(costs.contexts), len(costs.num_nodes), len(costs.widths)
        shapes: dict[str, tuple[int, ...]] = {"plain": (contexts,), "extend": (contexts,), "fixed": (contexts,)}
        shapes |= {"verify": (contexts, nodes), "draft_step": (contexts, widths)}
        for name, shape in shapes.items():
            if np.shape(getattr(costs, name)) != shape:
                raise ValueError(f"costs: {name}: expected the shape {shape}, got {np.shape(getattr(costs, name))}")
        return costs


def cache_folder() -> Path:
    """Where measurements are kept: $DRAFTWING_CACHE, or draftwing in the user's cache folder."""
    if folder := os.environ.get("DRAFTWING_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "draftwing"


def cached_costs(key: Mapping[str, Any], measure: Callable[[], CycleCosts]) -> CycleCosts:
    """The costs measured earlier under the same key, or measured now and kept on disk if that can be written."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
    file = cache_folder() / "costs" / f"{digest}.json"
    try:
        return CycleCosts.from_dict(json.loads(file.read_text(encoding="utf-8"))["costs"])
    except (OSError, ValueError, KeyError, TypeError):  # not measured yet, or a file that something else wrote
        logger.info("measuring this machine once, which takes a few seconds")
        costs = measure()
    record = json.dumps({"key": key, "costs": costs.as_dict()}, indent=2, default=str)
    partial = file.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(record, encoding="utf-8")
        partial.replace(file)
    return costs


def measure_costs(
    target: TargetModel,
    new_drafter: DrafterFactory,
    batch_size: int,
    largest: TreePlan,
    cycles: int = 12,
    contexts: Sequence[int] = CONTEXTS,
    new_rows: NewRows = Rows,
) -> CycleCosts:
    """Time the engine's own stages with the plans that tell them apart, up to the largest.

    The text is random (seeded, the same each time). Takes about 350 cycles on a CPU and 500 on a GPU: seconds,
    or minutes where a cycle of a large target takes long.
    """
    limit = target.max_positions or 4 * CONTEXTS[-1]
    contexts = sorted({max(1, min(context, limit // 4)) for context in contexts})
    widths = [width for width in WIDTHS if width < largest.width] + [largest.width]
    sizes = [num_nodes for num_nodes in NUM_NODES if num_nodes < largest.num_nodes] + [largest.num_nodes]
    plans = [plain_plan(target, batch_size)]
    plans += [_shallowest(num_nodes, widths[-1]) for num_nodes in sizes]
    num_steps = max(1, min(STEPS, largest.depth - 1))
    plans += [TreePlan(width, 1 + num_steps, 2) for width in widths]
    measured: dict[str, list[Any]] = defaultdict(list)
    for context in contexts:
        requests, per_plan = _requests(target, batch_size, context, plans * ROUNDS, cycles // ROUNDS)
        generation = Generation(target, requests, new_drafter, _Schedule(plans * ROUNDS, per_plan), new_rows=new_rows)
        plain, *stages = _fastest(_stage_seconds(generation, plans * ROUNDS, per_plan), len(plans))
        by_nodes, by_width = stages[: len(sizes)], stages[len(sizes) :]
        first = by_nodes[0]
        measured["plain"].append(sum(plain.values()))
        measured["verify"].append([stage["verify"] for stage in by_nodes])
        measured["draft_step"].append([max(0.0, stage["draft"] - first["draft"]) / num_steps for stage in by_width])
        measured["extend"].append(first["draft"])
        measured["fixed"].append(first["commit"] + first["host"])
    return CycleCosts(contexts=contexts, num_nodes=sizes, widths=widths, **measured)


def _shallowest(num_nodes: int, width: int) -> TreePlan:
    """The plan of so many nodes that has the fewest levels."""
    depth = 1
    while TreePlan(width, depth, 1).num_candidates < num_nodes - 1:
        depth += 1
    return TreePlan(width, depth, num_nodes)


class _Schedule:
    """Plans in turn, each for so many cycles."""

    learns = False

    def __init__(self, plans: Sequence[TreePlan], cycles: int) -> None:
        self._turns = (plan for plan in plans for _ in range(cycles))
        self.largest = max(plans, key=lambda plan: (plan.num_nodes, plan.depth))

    def next(self, longest: int) -> TreePlan:
        return next(self._turns)

    def learn(self, report: CycleReport) -> None:
        pass


def _fastest(turns: list[dict[str, float]], num_plans: int) -> list[dict[str, float]]:
    """For each plan the least seconds of each stage over its rounds."""
    rounds = [turns[start : start + num_plans] for start in range(0, len(turns), num_plans)]
    return [{name: min(turn[name] for turn in same) for name in STAGES} for same in zip(*rounds, strict=True)]


def _requests(
    target: TargetModel, batch_size: int, context: int, plans: Sequence[TreePlan], cycles: int
) -> tuple[list[Request], int]:
    """Prompts of random text for so many cycles of each plan, or for as many as there are positions for."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(target.vocab_size, (batch_size, context), generator=generator).tolist()
    # Every plan gets its cycles even if all drafts are accepted, but for targets of a hundred positions or fewer.
    room = (target.max_positions or 10**6) - context
    most_tokens = sum(plan.depth + 1 for plan in plans)
    per_plan = max(2, min(cycles + WARM_UP, room // most_tokens))
    stop = StopRule(min(room, per_plan * most_tokens), ())
    return [Request(prompt, SamplingParams(), stop) for prompt in prompts], per_plan


def _stage_seconds(generation: Generation, plans: Sequence[TreePlan], per_plan: int) -> list[dict[str, float]]:
    """Median seconds of each stage of a cycle, for each of the plans, which have so many cycles each."""
    clock = [dict(generation.statistics.seconds)]
    for _ in itertools.islice(generation.cycles(), per_plan * len(plans)):
        clock.append(dict(generation.statistics.seconds))
    steps = [{name: b[name] - a[name] for name in STAGES} for a, b in itertools.pairwise(clock)]
    skipped = min(WARM_UP, per_plan - 1)
    turns = [
        steps[start + skipped : start + per_plan] or steps[-1:] for start in range(0, per_plan * len(plans), per_plan)
    ]
    return [{name: statistics.median(step[name] for step in turn) for name in STAGES} for turn in turns]
