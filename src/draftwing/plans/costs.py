"""What a cycle costs on this machine: seconds of each stage, measured once with the engine itself."""

import contextlib
import hashlib
import itertools
import json
import logging
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

from draftwing.drafts.family import Draft
from draftwing.drafts.kinds import family_of_draft
from draftwing.engine.captured import Recorder
from draftwing.engine.engine import Engine, NewDrafter, Request
from draftwing.engine.generation import Generation
from draftwing.engine.readback import Array, CycleReport
from draftwing.engine.sampling import SamplingParams
from draftwing.engine.statistics import STAGES
from draftwing.engine.stopping import StopRule
from draftwing.engine.tree_plan import OFF, TreePlan
from draftwing.files import cache_folder, write_text
from draftwing.provenance import provenance
from draftwing.target.model import TargetModel
from draftwing.target.packed import PackedLinear
from draftwing.threads import num_threads

logger = logging.getLogger(__name__)
DAYS_KEPT = 30
"""After which a measurement is made anew: drivers, neighbours and cooling change."""
NUM_NODES = (2, 4, 8, 12, 16, 24, 32, 48, 64)
WIDTHS = (1, 4, 8)
RECORDED_NODES, RECORDED_WIDTHS = (2, 16, 32), (1,)
"""Where each plan has to be recorded, which takes as long as some hundred cycles, and few nodes cost what more do."""
CONTEXTS = (64, 512)
PARTS = 3
"""Generations that each measurement is spread over, so that none leads far beyond its context."""
SECONDS = 3.0
"""After which no further generation is begun at a context: long cycles differ less from each other than short ones."""
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

        by_context = ("plain", "verify", "draft_step", "extend", "fixed")
        return replace(self, contexts=[context], **{name: between(getattr(self, name)) for name in by_context})

    def cycle(self, plan: TreePlan) -> float:
        """Seconds of a cycle of this plan, at the first context."""
        return float(self.trees([plan.num_nodes])[0]) + self.levels(plan) if plan.depth else self.plain[0]

    def levels(self, plan: TreePlan) -> float:
        """Seconds of a plan's draft levels beyond the first."""
        return (plan.depth - 1) * float(self.steps([plan.width])[0])

    def trees(self, num_nodes: Sequence[int]) -> Array:
        """Seconds of cycles with one draft level that verify so many nodes, at the first context."""
        return self.extend[0] + np.interp(num_nodes, self.num_nodes, self.verify[0]) + self.fixed[0]

    def steps(self, widths: Sequence[int]) -> Array:
        """Seconds of one further draft level of so many nodes, at the first context."""
        return np.interp(widths, self.widths, self.draft_step[0])

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


def what_costs_depend_on(target: TargetModel, draft: Draft, captured: bool) -> dict[str, Any]:
    """The machine, the two models and how they run, by name."""
    kind = family_of_draft(draft).kind
    where = {"on": str(target.device), "dtype": str(target.dtype), "pass": type(target).__name__}
    network = kind.network(draft)
    passes = {type(part).__name__ for part in (draft, *network.modules())}  # fused ones differ
    where["draft_pass"] = ", ".join(sorted(passes))
    where["products"], where["draft_products"] = products_of(target.model), products_of(network)
    where["captured"] = str(captured)
    where["attention"] = target.model.config._attn_implementation  # a user's own model has another
    where["threads"] = str(num_threads())
    return _machine() | where | {"target": target.config.to_dict(), "draft": kind.config(draft)}


def products_of(network: nn.Module) -> str:
    """The kinds of a network's products, in words."""
    kinds = {str(module.product) for module in network.modules() if isinstance(module, PackedLinear)}
    return ", ".join(sorted(kinds))


@cache
def _machine() -> dict[str, Any]:
    made_by = provenance()
    return {name: made_by[name] for name in ("draftwing", "device", "cores", "torch", "transformers")}


def cached_costs(key: Mapping[str, Any], measure: Callable[[], CycleCosts], since: float = 0.0) -> CycleCosts:
    """The costs measured earlier under the same key, or measured now and kept on disk if that can be written.

    Those from before `since` (seconds, as time.time gives them) and those older than DAYS_KEPT do not count.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
    file = cache_folder() / "costs" / f"{digest}.json"
    try:
        entry = json.loads(file.read_text(encoding="utf-8"))
        if max(since, time.time() - DAYS_KEPT * 86400) <= entry["measured_at"] <= time.time():
            return CycleCosts.from_dict(entry["costs"])
    except (OSError, ValueError, KeyError, TypeError):  # not measured yet, or a file that something else wrote
        pass
    rows, kind = key.get("batch_size", 1), "sampled" if key.get("sampled") else "greedy"
    logger.info(
        "measuring this machine once: cycles of %d rows, %s, some seconds each; kept for %d days", rows, kind, DAYS_KEPT
    )
    costs = measure()
    entry = json.dumps({"key": key, "measured_at": time.time(), "costs": costs.as_dict()}, indent=2, default=str)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, entry)
    return costs


def measure_costs(
    target: TargetModel,
    new_drafter: NewDrafter,
    batch_size: int,
    largest: TreePlan,
    num_rounds: int = 12,
    contexts: Sequence[int] = CONTEXTS,
    recorder: Recorder | None = None,
    sampled: bool = False,
    most_seconds: float | None = None,
) -> CycleCosts:
    """Time the engine's own stages with the plans that tell them apart, up to the largest.

    `sampled`: at temperature 1, where choosing and ranking draw noise for every node, instead of greedily.

    The plans take turns, each round in another order, so that a drift of the machine, the growing context and what a
    cycle leaves to the next bear on all alike. The text is random (seeded, the same each time). Takes 400 cycles at
    most, and 140 where they are long: `most_seconds` (default: SECONDS) bound what comes behind these.
    """
    most_seconds = SECONDS if most_seconds is None else most_seconds
    limit = target.max_positions or 4 * CONTEXTS[-1]
    contexts = sorted({max(1, min(context, limit // 4)) for context in contexts})
    some_widths, some_sizes = (WIDTHS, NUM_NODES) if recorder is None else (RECORDED_WIDTHS, RECORDED_NODES)
    widths = [width for width in some_widths if width < largest.width] + [largest.width]
    sizes = [num_nodes for num_nodes in some_sizes if num_nodes < largest.num_nodes] + [largest.num_nodes]
    plans = [OFF]
    plans += [_shallowest(num_nodes, widths[-1]) for num_nodes in sizes]
    num_steps = max(1, min(STEPS, largest.depth - 1))
    plans += [TreePlan(width, 1 + num_steps, 2) for width in widths]
    sampling = SamplingParams(temperature=1.0 if sampled else 0.0)
    texts = [_requests(target, batch_size, n, plans, -(-num_rounds // PARTS), sampling) for n in contexts]
    capacity = max(request.most_tokens for requests, _ in texts for request in requests)
    engine = Engine(target, new_drafter, batch_size, capacity, _Schedule(plans, ()), recorder)
    engine.waits = True  # the next cycle is another plan's
    measured: dict[str, list[Any]] = defaultdict(list)
    for context, (requests, rounds) in zip(contexts, texts, strict=True):
        cycles, start = _Cycles(plans), time.perf_counter()
        for part in range(PARTS):
            if part and time.perf_counter() - start > most_seconds:
                break
            engine.plan = _Schedule(plans, rounds)
            generation = Generation(engine, requests)
            cycles.run(generation, rounds)
            generation.close()
        plain, *stages = cycles.medians()
        by_nodes, by_width = stages[: len(sizes)], stages[len(sizes) :]
        first = by_nodes[0]
        measured["contexts"].append(context + max(len(output.tokens) for output in generation.outputs) // 2)
        measured["plain"].append(sum(plain.values()))
        measured["verify"].append([stage["verify"] for stage in by_nodes])
        measured["draft_step"].append([max(0.0, stage["draft"] - first["draft"]) / num_steps for stage in by_width])
        measured["extend"].append(first["draft"])
        measured["fixed"].append(first["commit"] + first["host"])
    return CycleCosts(num_nodes=sizes, widths=widths, **measured)


def _shallowest(num_nodes: int, width: int) -> TreePlan:
    """The plan of so many nodes that has the fewest levels."""
    depth = 1
    while TreePlan(width, depth, 1).num_candidates < num_nodes - 1:
        depth += 1
    return TreePlan(width, depth, num_nodes)


class _Schedule:
    """Rounds of plans, given as their indices."""

    learns = False

    def __init__(self, plans: Sequence[TreePlan], rounds: Sequence[Sequence[int]]) -> None:
        self._turns = (plans[index] for order in rounds for index in order)
        self.largest = max(plans, key=lambda plan: (plan.num_nodes, plan.depth))

    def next(self, num_rows: int, longest: int, sampled: bool = False) -> TreePlan:
        return next(self._turns)

    def learn(self, report: CycleReport) -> None:
        pass


def _requests(
    target: TargetModel,
    batch_size: int,
    context: int,
    plans: Sequence[TreePlan],
    num_rounds: int,
    sampling: SamplingParams,
) -> tuple[list[Request], list[list[int]]]:
    """Prompts of random text, and the plans' order in so many rounds behind one that warms up.

    In fewer where there are no positions for so many.
    """
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(target.vocab_size, (batch_size, context), generator=generator).tolist()
    # Every plan gets its cycles even if all drafts are accepted, but for targets of a hundred positions or fewer.
    room = (target.max_positions or 10**6) - context
    most_tokens = sum(plan.depth + 1 for plan in plans)
    num_rounds = max(2, min(1 + num_rounds, room // most_tokens))
    stop = StopRule(min(room, num_rounds * most_tokens), ())
    rounds = [torch.randperm(len(plans), generator=generator).tolist() for _ in range(num_rounds)]
    return [Request(prompt, sampling, stop) for prompt in prompts], rounds


class _Cycles:
    """Seconds of the stages of cycles, by their plans' indices."""

    def __init__(self, plans: Sequence[TreePlan]) -> None:
        self._of_plan: list[list[dict[str, float]]] = [[] for _ in plans]

    def run(self, generation: Generation, rounds: Sequence[Sequence[int]]) -> None:
        """Run these rounds of plans; all but the first count, or the last cycle where a tiny target has no room."""
        clock = [dict(generation.statistics.seconds)]
        turns = list(itertools.chain(*rounds))
        for _ in itertools.islice(generation.cycles(), len(turns)):
            clock.append(dict(generation.statistics.seconds))
        cycles = [{name: after[name] - before[name] for name in STAGES} for before, after in itertools.pairwise(clock)]
        missing = len(turns) - len(cycles)
        for index, cycle in list(zip(turns, cycles + cycles[-1:] * missing, strict=True))[len(rounds[0]) :]:
            self._of_plan[index].append(cycle)

    def medians(self) -> list[dict[str, float]]:
        """Of each plan."""
        return [{name: statistics.median(cycle[name] for cycle in same) for name in STAGES} for same in self._of_plan]
