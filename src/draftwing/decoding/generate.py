"""The cycle: draft, verify, commit. Plain decoding is the same cycle with a tree of one node."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from draftwing.decoding.plan import Plan, TreePlan
from draftwing.decoding.readback import CycleReading, CycleReport
from draftwing.decoding.rows import DrafterFactory, NewRows, Rows
from draftwing.decoding.sampling import SamplingParams
from draftwing.decoding.statistics import StageClock, Statistics
from draftwing.decoding.stopping import StopRule
from draftwing.decoding.tree import DraftTree
from draftwing.models.target import TargetModel
from draftwing.threads import fitting_threads, num_threads


@dataclass(frozen=True)
class Request:
    """One row to generate: its prompt's token ids, its sampling parameters and when to stop."""

    prompt: Sequence[int]
    sampling: SamplingParams
    stop: StopRule


@dataclass
class RowOutput:
    """What a row has emitted so far. `finish_reason` is eos, stop or length once it has ended."""

    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(frozen=True)
class Committed:
    """The tokens that one cycle committed, per row; `num_accepted` of them were drafted (the rest is the bonus)."""

    tokens: list[list[int]]
    num_accepted: list[int]


class Generation:
    """B rows being decoded together; `run` it to the end, or iterate its `cycles()`.

    `coupled` drafts rank their candidates with the target's own noise; the output is the same without. `new_rows` gives
    what keeps their state; `close` hands it back, as the end of `cycles()` does.

    Raises:
        ValueError: an empty prompt, ids outside the vocabulary, or more tokens than the model has positions.
    """

    def __init__(
        self,
        target: TargetModel,
        requests: Sequence[Request],
        new_drafter: DrafterFactory,
        plan: Plan,
        coupled: bool = True,
        new_rows: NewRows = Rows,
    ) -> None:
        _check_prompts(target, requests)
        self.outputs = [RowOutput() for _ in requests]
        self.statistics = Statistics()
        self._plan = plan
        self._stops = [request.stop for request in requests]
        self._clock = StageClock(self.statistics, target.device)
        longest = max(len(request.prompt) + request.stop.max_new_tokens for request in requests)
        # Behind the committed tokens: the verified tree or the draft's levels, and what a last cycle commits too much.
        tree = plan.largest
        capacity = longest + max(tree.num_nodes, tree.width * tree.max_depth) + tree.max_depth + 1
        self.waits = False  # for the device at a cycle's end, so that each cycle counts its own time alone
        self._is_closed = False
        self._running = np.arange(len(requests))
        self._rows = new_rows(target, new_drafter, len(requests), capacity)
        self._lengths = [len(request.prompt) - 1 for request in requests]  # committed tokens before the root
        self._threads = num_threads() if target.bits_depend_on_threads else None  # None: anew in every cycle
        with fitting_threads(self._threads), self._clock.stage("prefill"), torch.inference_mode():
            prompts, params = [list(request.prompt) for request in requests], [r.sampling for r in requests]
            self._rows.begin(prompts, params, tree.max_depth, coupled)

    @property
    def is_done(self) -> bool:
        """Whether every row has stopped."""
        return all(output.finish_reason for output in self.outputs)

    def cycles(self) -> Iterator[Committed]:
        """Run cycles until every row has stopped, yielding what each commits."""
        while not self.is_done:
            yield self._emit(*self._cycle())
        self.close()

    def run(self) -> "Generation":
        """Run cycles until every row has stopped; returns itself."""
        for _ in self.cycles():
            pass
        return self

    def close(self) -> None:
        """End the generation where it stands; it may be closed already."""
        if not self._is_closed:
            self._is_closed = True
            self._rows.release()

    @torch.inference_mode()
    def _cycle(self) -> tuple[DraftTree, CycleReading]:
        longest = max(self._lengths)
        plan = self._plan.next(longest)
        with fitting_threads(self._threads):
            with self._clock.stage("draft"):
                tree = self._rows.draft(plan, self._lengths)
            with self._clock.stage("verify"):
                verification = self._rows.verify(tree, longest)
                learns = self._plan.learns and tree.max_depth > 0
                reading = CycleReading(verification.verdict, tree if learns else None)
            with self._clock.stage("commit"):
                self._rows.commit(plan, tree, verification)
        return tree, reading

    def _emit(self, tree: DraftTree, reading: CycleReading) -> Committed:
        """Read the verdict, the cycle's one device-to-host copy, and hand out tokens up to each row's stop."""
        with self._clock.stage("host"):
            emitted: list[list[int]] = []
            num_accepted_emitted = []
            some_row_ended, num_committed = False, 0
            for row, (num_accepted, *tokens) in enumerate(reading.result().tolist()):
                output = self.outputs[row]
                if output.finish_reason:
                    emitted.append([])
                    num_accepted_emitted.append(0)
                    continue
                new = tokens[: num_accepted + 1]
                self._lengths[row] += len(new)
                num_committed += len(new)
                num_emitted, output.finish_reason = self._stops[row].check(output.tokens, new)
                output.tokens += new[:num_emitted]
                emitted.append(new[:num_emitted])
                num_accepted_emitted.append(min(num_accepted, num_emitted))
                self.statistics.count_cycle(num_accepted, tree.max_depth, num_emitted)
                some_row_ended |= output.finish_reason is not None
            if reading.has_facts:
                rows = self._running
                self._plan.learn(CycleReport(rows, num_committed, tree.num_nodes, lambda: reading.facts(rows)))
            if some_row_ended:  # the device learns it once, not in every cycle after
                active = [output.finish_reason is None for output in self.outputs]
                self._running = np.flatnonzero(active)
                self._rows.set_active(active)
        self._clock.settle(wait=self.is_done or self.waits)
        return Committed(emitted, num_accepted_emitted)


def plain_plan(target: TargetModel, batch_size: int) -> TreePlan:
    """The plan of plain decoding: a single row is padded, see `TargetModel.best_single_row`."""
    return TreePlan.off(target.best_single_row if batch_size == 1 else 1)


def _check_prompts(target: TargetModel, requests: Sequence[Request]) -> None:
    if not requests:
        raise ValueError("requests: expected at least one prompt")
    limit = target.max_positions
    for row, request in enumerate(requests):
        num_prompt, num_new = len(request.prompt), request.stop.max_new_tokens
        if num_prompt == 0:
            raise ValueError(f"input_ids: prompt {row} is empty; at least one token is needed")
        if limit is not None and num_prompt + num_new > limit:
            raise ValueError(
                f"max_new_tokens: prompt {row} has {num_prompt} tokens, and {num_new} new ones would pass the model's "
                f"{limit} positions"
            )
        if min(request.prompt) < 0 or max(request.prompt) >= target.vocab_size:
            raise ValueError(f"input_ids: prompt {row} has ids outside the vocabulary of {target.vocab_size}")
