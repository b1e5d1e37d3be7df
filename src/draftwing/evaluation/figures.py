"""The figures of an evaluation, from its runs: speed, acceptance, stages, sameness, what one choice changes.

Every interval is a bootstrap over prompts; the turns of a conversation stay together.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product, zip_longest
from typing import Any

from draftwing.drafts.kinds import PLAIN, family_of
from draftwing.engine.statistics import STAGES
from draftwing.engine.tree_plan import STATIC_TREES, TreePlan
from draftwing.evaluation.evaluate import Cell, Evaluation, Remarks
from draftwing.evaluation.journal import Journal, Run
from draftwing.evaluation.specs import MethodSpec
from draftwing.intervals import Interval, Sums, ratio_interval


@dataclass(frozen=True)
class DepthRate:
    """P(accepted at a depth | its parent was), and the cycles in which the parent was (a mean over the repeats)."""

    rate: float
    num_reached: float


@dataclass(frozen=True)
class Figures:
    """Some runs of one method; `speedup` is over plain decoding of the same turns.

    Attributes:
        tokens_per_second, acceptance_length: absolute, and tau, tokens per target pass with the bonus token.
        identical_share: of the turns whose output can be compared, those equal to plain decoding's.
    """

    num_turns: int
    num_tokens: int
    seconds: float
    tokens_per_second: Interval
    speedup: Interval | None
    acceptance_length: Interval | None
    identical_share: float | None


@dataclass(frozen=True)
class ResultRow:
    """A method on a data set at a temperature. `figures` is None if there is no run at all.

    Attributes:
        num_expected: the turns of the data set, those that were skipped left out.
        acceptance_rate: by depth from 1 on, conditional.
        n_alpha: on chains only: acceptance where n = 0, 1, ... of the features the draft reads are its own
            (arXiv 2401.15077, section 4.1); that is the rate at depth n + 1.
        stage_seconds: prefill, draft, verify, commit, host.
    """

    data: str
    temperature: float
    method: str
    num_expected: int
    failure: str | None
    figures: Figures | None
    by_category: dict[str, Figures]
    acceptance_rate: list[DepthRate]
    n_alpha: list[float] | None
    stage_seconds: dict[str, float]
    peak_bytes: int | None
    runs: list[Run]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready figures; the runs without their tokens, which runs.jsonl has."""
        return asdict(self) | {"runs": [_figures_of_run(run) for run in self.runs]}


def result_rows(evaluation: Evaluation, journal: Journal, remarks: Remarks, chains: Iterable[str]) -> list[ResultRow]:
    """One row per cell. `chains` are the methods whose drafts are chains."""
    by_cell: dict[Cell, list[Run]] = defaultdict(list)
    for run in journal.runs.values():
        by_cell[run.data, run.temperature, run.method].append(run)
    chains, rows = set(chains), []
    for data, temperature, method in product(evaluation.data, evaluation.temperatures, evaluation.all_methods):
        runs, plain = by_cell[data.name, temperature, method], by_cell[data.name, temperature, PLAIN]
        skipped = {(skip.prompt, skip.turn) for skip in remarks.skipped if skip.data == data.name}
        skipped -= {_turn(run) for run in plain}  # another temperature's answers were too long to go on from
        rates = acceptance_rates(runs)
        rows.append(
            ResultRow(
                data.name,
                temperature,
                method,
                data.num_turns - len(skipped),
                remarks.failures.get((data.name, temperature, method)),
                figures_of(runs, plain),
                by_category(runs, plain),
                rates,
                n_alpha(rates) if method in chains else None,
                stage_seconds(runs),
                max((run.peak_bytes for run in runs if run.peak_bytes is not None), default=None),
                runs,
            )
        )
    return rows


def figures_of(runs: Sequence[Run], plain: Sequence[Run]) -> Figures | None:
    """The figures of a method's runs beside plain decoding's; None without a run."""
    if not runs:
        return None
    compared = [run.identical for run in runs if run.identical is not None]
    has_cycles = all(run.num_cycles is not None for run in runs)
    return Figures(
        len(runs),
        sum(run.num_tokens for run in runs),
        sum(run.seconds for run in runs),
        ratio_interval(_tokens_per(runs, "seconds")),
        rate_ratio(runs, plain),
        ratio_interval(_tokens_per(runs, "num_cycles")) if has_cycles else None,
        sum(compared) / len(compared) if compared else None,
    )


def rate_ratio(runs: Sequence[Run], others: Sequence[Run], per: str = "seconds") -> Interval | None:
    """Tokens per second (or per another field of a run) over the others', on the turns that both have.

    None where they share none, or where the field is unknown.
    """
    shared = {_turn(run) for run in runs} & {_turn(run) for run in others}
    mine, theirs = ([run for run in some if _turn(run) in shared] for some in (runs, others))
    if not shared or any(getattr(run, per) is None for run in mine + theirs):
        return None
    return ratio_interval(_tokens_per(mine, per), _tokens_per(theirs, per))


def by_category(runs: Sequence[Run], plain: Sequence[Run]) -> dict[str, Figures]:
    """Figures for each category; none where the prompts have less than two."""
    names = sorted({run.category for run in runs})
    if len(names) < 2:
        return {}
    parts = {name: [[run for run in some if run.category == name] for some in (runs, plain)] for name in names}
    figures = {name or "(none)": figures_of(*part) for name, part in parts.items()}
    return {name: part for name, part in figures.items() if part is not None}


def acceptance_rates(runs: Sequence[Run]) -> list[DepthRate]:
    """Conditional acceptance by depth, all cycles of all runs together."""
    accepted, reached = (
        [sum(counts) for counts in zip_longest(*(getattr(run, name) for run in runs), fillvalue=0.0)]
        for name in ("accepted_at", "reached_at")
    )
    return [DepthRate(a / r if r else 0.0, r) for a, r in zip(accepted, reached, strict=True)]


def n_alpha(rates: Sequence[DepthRate]) -> list[float]:
    """0-alpha, 1-alpha, ... of a chain.

    The draft of a chain's token at depth d + 1 reads d features of its own, and it is asked whether it is accepted only
    where those before it were.
    """
    return [depth.rate for depth in rates if depth.num_reached]


def stage_seconds(runs: Sequence[Run]) -> dict[str, float]:
    """The seconds of each stage, summed; empty for engines that do not say."""
    staged = [run.stages for run in runs if run.stages]
    return {stage: sum(stages[stage] for stages in staged) for stage in STAGES} if staged else {}


def _turn(run: Run) -> tuple[int, int]:
    return run.prompt, run.turn


def _tokens_per(runs: Sequence[Run], name: str) -> Sums:
    """The tokens of each prompt's turns, and another field, summed; in the order of the prompts."""
    tokens: dict[int, float] = defaultdict(float)
    others: dict[int, float] = defaultdict(float)
    for run in sorted(runs, key=_turn):
        tokens[run.prompt] += run.num_tokens
        others[run.prompt] += getattr(run, name)
    return list(tokens.values()), list(others.values())


def _figures_of_run(run: Run) -> dict[str, Any]:
    return {name: value for name, value in asdict(run).items() if name not in ("tokens", "text", "data", "method")}


CHOICES = {"ngram": "n-grams merged into the tree", "uncoupled": "drafting without the target's noise"}
"""Options of a method, and what they change."""


@dataclass(frozen=True)
class Ablation:
    """A row `with_it` over a row `without`: ratios of tau and of tokens/s, on the turns that both have."""

    what: str
    data: str
    temperature: float
    with_it: str
    without: str
    acceptance_length_ratio: Interval
    speed_ratio: Interval


def ablations(rows: Sequence[ResultRow], specs: Mapping[str, MethodSpec]) -> list[Ablation]:
    """All pairs of rows of one data set and temperature whose specs differ in one choice.

    `specs` are by row name and have their plans, default ones too; rows without a spec are other engines.
    """
    found = []
    known = [row for row in rows if row.method in specs]
    for one in known:
        for other in known:
            if (one.data, one.temperature) == (other.data, other.temperature):
                what = choice_between(specs[one.method], specs[other.method])
                if what is None or (what == CHOICES["uncoupled"] and one.temperature == 0):  # there is no noise
                    continue
                cycles, seconds = (rate_ratio(one.runs, other.runs, per) for per in ("num_cycles", "seconds"))
                if cycles and seconds:
                    found.append(Ablation(what, one.data, one.temperature, one.method, other.method, cycles, seconds))
    return found


def choice_between(one: MethodSpec, other: MethodSpec) -> str | None:
    """The single choice that `one` has and `other` has not; None if there is no such choice."""
    for option, what in CHOICES.items():
        if option in one.options and replace(one, options=_without(one, option)) == other:
            return what
    if replace(one, plan=None, method="") != replace(other, plan=None, method=""):
        return None
    if one.method != other.method and family_of(one.method) is family_of(other.method):
        if not (_is_dynamic_tree(one) and other.plan in STATIC_TREES):
            return None
        return "dynamic against static tree" if _num_nodes(one) == _num_nodes(other) else None
    if one.method == other.method and _is_fixed_tree(one) and other.is_chain:
        return "tree against chain"
    if one.method == other.method and one.plan == "auto" and _is_fixed_tree(other):
        return "trees that size themselves against fixed ones"
    return None


def _without(spec: MethodSpec, option: str) -> tuple[str, ...]:
    return tuple(name for name in spec.options if name != option)


def _is_fixed_tree(spec: MethodSpec) -> bool:
    return _is_dynamic_tree(spec) or spec.plan in STATIC_TREES


def _is_dynamic_tree(spec: MethodSpec) -> bool:
    return spec.plan is not None and spec.plan.startswith("tree:")


def _num_nodes(spec: MethodSpec) -> int:
    return TreePlan.parse(spec.plan or "off").num_nodes
