"""The cycle: draft, verify, commit. Plain decoding is the same cycle with a tree of one node."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from draftwing.decoding.drafters import Drafter
from draftwing.decoding.plan import Plan, TreePlan
from draftwing.decoding.sampling import Sampler, SamplingParams, uncoupled_rank
from draftwing.decoding.statistics import StageClock, Statistics
from draftwing.decoding.stopping import StopRule
from draftwing.decoding.tree import Array, CycleReport, DraftTree, Verdict, read_cycle, walk
from draftwing.models.target import TargetModel

PREFILL_CHUNK = 512


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


DrafterFactory = Callable[[int, int], Drafter]
"""Builds the drafter of a batch from its rows and their capacity in tokens (tree nodes included)."""


class Generation:
    """B rows being decoded together; iterate `cycles()` to run it to the end.

    `coupled` drafts rank their candidates with the target's own noise; the output is the same without.

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
    ) -> None:
        _check_prompts(target, requests)
        self.outputs = [RowOutput() for _ in requests]
        self.statistics = Statistics()
        self._target, self._plan = target, plan
        self._stops = [request.stop for request in requests]
        self._clock = StageClock(self.statistics, target.device)
        longest = max(len(request.prompt) + request.stop.max_new_tokens for request in requests)
        # Behind the committed tokens: the verified tree or the draft's levels, and what a last cycle commits too much.
        tree = plan.largest
        capacity = longest + max(tree.num_nodes, tree.width * tree.max_depth) + tree.max_depth + 1
        self._cache = target.new_cache(len(requests), capacity)
        self._drafter = new_drafter(len(requests), capacity)
        params = [request.sampling for request in requests]
        self._sampler = Sampler(params, target.vocab_size, target.device, tree.max_depth)
        self._rank = self._sampler.rank if coupled else uncoupled_rank
        self._lengths = [len(request.prompt) - 1 for request in requests]  # committed tokens before the root
        self._active = torch.ones(len(requests), dtype=torch.bool, device=target.device)
        with self._clock.stage("prefill"), torch.inference_mode():
            self._root = self._prefill([list(request.prompt) for request in requests])

    def cycles(self) -> Iterator[Committed]:
        """Run cycles until every row has stopped, yielding what each commits."""
        while not all(output.finish_reason for output in self.outputs):
            yield self._emit(*self._cycle())

    @torch.inference_mode()
    def _cycle(self) -> tuple[DraftTree, Verdict]:
        with self._clock.stage("draft"):
            longest = max(self._lengths)
            plan = self._plan.next(longest)
            self._sampler.reserve(self._lengths, plan.max_depth)
            tree = self._drafter.grow(self._root, plan, longest, self._rank)
        with self._clock.stage("verify"):
            self._cache.bound = longest
            output = self._target.forward_tree(
                tree.tokens, tree.depths, tree.ancestors, self._cache, self._drafter.feature_layers
            )
            chosen = self._sampler.choose(output.logits, tree, self._cache.lengths)
            verdict = walk(tree, chosen)
        with self._clock.stage("commit"):
            num_kept = torch.where(self._active, verdict.num_accepted + 1, 0)
            path = None if plan.is_chain else verdict.path
            self._cache.commit(path, num_kept, max_kept=tree.max_depth + 1)
            features = None if output.features is None else verdict.along_path(output.features)
            self._drafter.see_choices(chosen)
            self._drafter.observe(verdict.tokens, features, num_kept)
            self._sampler.observe(verdict.tokens, num_kept)
            self._root = torch.where(self._active, verdict.bonus, self._root)
        return tree, verdict

    def _emit(self, tree: DraftTree, verdict: Verdict) -> Committed:
        """Read the verdict, the cycle's one device-to-host copy, and hand out tokens up to each row's stop."""
        with self._clock.stage("host"):
            rows = self._read(tree, verdict).tolist()
            emitted: list[list[int]] = []
            num_accepted_emitted = []
            some_row_ended = False
            for row, (num_accepted, *tokens) in enumerate(rows):
                output = self.outputs[row]
                if output.finish_reason:
                    emitted.append([])
                    num_accepted_emitted.append(0)
                    continue
                new = tokens[: num_accepted + 1]
                self._lengths[row] += len(new)
                num_emitted, output.finish_reason = self._stops[row].check(output.tokens, new)
                output.tokens += new[:num_emitted]
                emitted.append(new[:num_emitted])
                num_accepted_emitted.append(min(num_accepted, num_emitted))
                self.statistics.count_cycle(num_accepted, tree.max_depth, num_emitted)
                some_row_ended |= output.finish_reason is not None
            if some_row_ended:  # the device learns it once, not in every cycle after
                running = [output.finish_reason is None for output in self.outputs]
                self._active = torch.tensor(running, device=self._active.device)
        self._clock.settle()
        return Committed(emitted, num_accepted_emitted)

    def _read(self, tree: DraftTree, verdict: Verdict) -> Array:
        """`[B, 1 + L]` on the host: accepted draft tokens and tokens to emit. A plan that learns is told the rest."""
        if not self._plan.learns or tree.max_depth == 0:
            return torch.cat((verdict.num_accepted[:, None], verdict.tokens), dim=1).numpy(force=True)
        result, facts_of_rows = read_cycle(tree, verdict)
        rows = np.array([row for row, output in enumerate(self.outputs) if output.finish_reason is None])
        num_tokens = int(result[rows, 0].sum()) + len(rows)
        self._plan.learn(CycleReport(rows, num_tokens, tree.num_nodes, lambda: facts_of_rows(rows)))
        return result

    def _prefill(self, prompts: list[list[int]]) -> torch.Tensor:
        """Read all of the prompts but their last tokens, which become the roots of the first trees."""
        device = self._target.device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        longest = max(map(len, prompts))
        tokens = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
        self._sampler.observe(tokens, lengths)
        self._drafter.start(tokens[:, 0])
        following = tokens.roll(-1, dims=1)
        for start in range(0, longest - 1, PREFILL_CHUNK):
            # The roots pass as padding: so no chunk is a single token, whose product rounds differently from several's.
            chunk = slice(start, start + PREFILL_CHUNK)
            num_valid = (lengths - 1 - start).clamp(0, PREFILL_CHUNK)
            features = self._target.prefill(tokens[:, chunk], num_valid, self._cache, self._drafter.feature_layers)
            self._drafter.observe(following[:, chunk], features, num_valid)
        return tokens.gather(1, lengths[:, None] - 1).squeeze(1)


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
