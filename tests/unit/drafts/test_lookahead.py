"""Lookahead decoding equals a slow one in plain Python: lists for the window, a dict for the pool, whole sequences."""

import random
from collections.abc import Sequence

import pytest
import torch
from conftest import VOCAB_SIZE, generate, lookahead, no_draft, requests_for

from draftwing.drafts.lookahead import POOL_SIZE, LookaheadDrafter, NgramPool
from draftwing.engine.sampling import uncoupled_rank
from draftwing.engine.tree import DraftTree
from draftwing.engine.tree_plan import LookaheadTree, TreePlan
from draftwing.target.model import TargetModel

Ngram = tuple[int, ...]


class SlowPool:
    """The latest n-grams by first token, the oldest first, without limit."""

    def __init__(self) -> None:
        self._ngrams: dict[int, list[Ngram]] = {}

    def add(self, ngram: Sequence[int]) -> None:
        first, *rest = ngram
        known = self._ngrams.setdefault(first, [])
        if tuple(rest) in known:
            known.remove(tuple(rest))
        known.append(tuple(rest))

    def latest(self, first: int, count: int) -> list[Ngram]:
        return self._ngrams.get(first, [])[::-1][:count]


class SlowLookahead:
    """Greedy decoding of one prompt, one forward pass of the stock model for every single token that is wanted."""

    def __init__(self, target: TargetModel, prompt: list[int], plan: LookaheadTree) -> None:
        self._target, self._num_ngrams = target, plan.width
        self._num_columns, self._num_levels = plan.num_columns, plan.depth
        self.text, self.num_accepted = list(prompt), []
        self._pool = SlowPool()
        num_guesses = plan.num_columns * plan.depth
        used = prompt[-num_guesses:]
        guesses = [used[i % len(used)] for i in range(num_guesses)]
        self._window = [guesses[start : start + plan.num_columns] for start in range(0, num_guesses, plan.num_columns)]

    def cycle(self, is_pool_open: bool) -> None:
        """One target pass: verify the n-grams that begin with the last token, and move the window on."""
        self._window[0][0] = self.text[-1]
        best: list[int] = []
        for ngram in self._pool.latest(self.text[-1], self._num_ngrams):
            num_right = 0
            while num_right < len(ngram) and self._next([*self.text, *ngram[:num_right]]) == ngram[num_right]:
                num_right += 1
            best = max(best, list(ngram[:num_right]), key=len)
        newest = [self._next(self.text[:-1] + self._read_by(column)) for column in range(self._num_columns)]
        if is_pool_open:
            for column in range(self._num_columns):
                self._pool.add([*(level[column] for level in self._window), newest[column]])
        self._window = [*self._window[1:], newest]
        self.text += [*best, self._next([*self.text, *best])]
        self.num_accepted.append(len(best))

    def _read_by(self, column: int) -> list[int]:
        """What a column's last guess reads from the root on: level 0 up to the column, then the column."""
        return self._window[0][: column + 1] + [level[column] for level in self._window[1:]]

    def _next(self, tokens: list[int]) -> int:
        logits = self._target.model(input_ids=torch.tensor([tokens]), use_cache=False).logits
        return int(logits[0, -1].argmax())


@pytest.mark.parametrize("plan", ["lookahead:4x4x3", "lookahead:6x3x2", "lookahead:3x2x2", "lookahead:1x3x1"])
@torch.no_grad()
def test_each_cycle_accepts_what_the_slow_one_accepts(target: TargetModel, prompts: list[list[int]], plan: str) -> None:
    shape, num_new = TreePlan.parse(plan), 24
    for prompt in prompts[1:3]:
        slow = SlowLookahead(target, prompt, shape)
        while len(slow.text) < len(prompt) + num_new:
            slow.cycle(is_pool_open=len(slow.num_accepted) >= shape.depth - 1)
        fast = generate(target, requests_for([prompt], max_new_tokens=num_new, eos=()), lookahead(plan), plan)
        assert fast.outputs[0].tokens == slow.text[len(prompt) :][:num_new]
        assert fast.statistics.num_cycles == len(slow.num_accepted)
    assert generate(target, requests_for(prompts, num_new, ()), no_draft).statistics.acceptance_length == 1


@torch.no_grad()
def test_rows_have_windows_and_pools_of_their_own(target: TargetModel, prompts: list[list[int]]) -> None:
    requests = requests_for(prompts, max_new_tokens=50, eos=())
    together = generate(target, requests, lookahead("lookahead:5x4x3"), "lookahead:5x4x3").statistics.num_cycles
    apart = [
        generate(target, [request], lookahead("lookahead:5x4x3"), "lookahead:5x4x3").statistics.num_cycles
        for request in requests
    ]
    assert together == sum(apart)


def test_the_pool_equals_a_dict_of_lists() -> None:
    """Over rows of few different tokens, so that n-grams come again, within one call too."""
    generator, length = random.Random(0), 3
    pool, slow = NgramPool(2, length, torch.device("cpu"), size=400), (SlowPool(), SlowPool())
    for _ in range(30):
        ngrams = [[generator.choices(range(4), k=length) for _ in range(5)] for _ in slow]
        pool.add(torch.tensor(ngrams), torch.tensor([True, True]))
        for row, row_ngrams in enumerate(ngrams):
            for ngram in row_ngrams:
                slow[row].add(ngram)
        first = generator.choices(range(4), k=2)
        tokens, is_found = pool.latest(torch.tensor(first), 4)
        for row in range(2):
            expected = slow[row].latest(first[row], 4)
            assert [tuple(ngram) for ngram in tokens[row][is_found[row]].tolist()] == expected


def test_a_full_pool_forgets_the_oldest() -> None:
    pool = NgramPool(1, 2, torch.device("cpu"), size=4)
    for start in (0, 2, 4):
        pool.add(torch.tensor([[[7, start], [7, start + 1]]]), torch.tensor([True]))
    tokens, is_found = pool.latest(torch.tensor([7]), 4)
    assert is_found.all()
    assert tokens.flatten().tolist() == [5, 4, 3, 2]


class TestTree:
    def grow(self, ngrams: list[Ngram], root: int = 1, plan: str = "lookahead:3x3x4") -> tuple[DraftTree, TreePlan]:
        """The tree of a drafter that has read a prompt and whose pool holds these n-grams."""
        shape = TreePlan.parse(plan)
        drafter = LookaheadDrafter(shape, 1, capacity=60, device=torch.device("cpu"))
        drafter.begin(0, 9)
        drafter.observe(torch.tensor([[8, 7, root]]), None, torch.tensor([3]))
        drafter.grow(torch.tensor([root]), shape, uncoupled_rank)
        drafter._pool.add(torch.tensor([ngrams]), torch.tensor([True]))
        return drafter.grow(torch.tensor([root]), shape, uncoupled_rank), shape

    def test_the_window_is_a_tree(self) -> None:
        """Level 0 is a chain from the root, level 1 hangs below it, column by column."""
        tree, shape = self.grow([(1, 2, 3)])
        assert tree.num_nodes == shape.num_nodes == 14
        assert tree.parents[0, 9:].tolist() == [0, 9, 0, 9, 10]
        assert tree.depths[0, 9:].tolist() == [1, 2, 1, 2, 3]
        assert not tree.valid[0, 9:].any()
        ancestors = tree.ancestors[0, 13].nonzero().flatten().tolist()  # node (1, 2)
        assert ancestors == [0, 9, 10, 13]

    def test_it_starts_from_the_prompts_last_tokens(self) -> None:
        tree, _ = self.grow([(1, 2, 3)])
        assert tree.tokens[0, 9:].tolist() == [8, 7, 1, 9, 8]  # after the root, in place of the first: 9 8 7 1 9 8

    def test_ngrams_that_begin_alike_share_their_first_nodes(self) -> None:
        tree, _ = self.grow([(1, 2, 3), (1, 2, 4), (5, 2, 6), (1, 3, 3)])
        paths = {}
        for node in range(1, 9):
            if tree.valid[0, node]:
                paths[node] = paths.get(int(tree.parents[0, node]), ()) + (int(tree.tokens[0, node]),)
        assert sorted(paths.values()) == [(2,), (2, 3), (2, 4), (3,), (3, 3)]

    def test_what_is_not_in_the_pool_is_not_drafted(self) -> None:
        tree, _ = self.grow([(2, 3, 4)])
        assert tree.valid[0].tolist() == [True] + 13 * [False]
        assert tree.tokens.max() < VOCAB_SIZE

    def test_windows_larger_than_the_pool_are_refused(self) -> None:
        for plan in (f"lookahead:1x2x{POOL_SIZE + 1}", f"lookahead:{POOL_SIZE + 1}x2x1"):
            with pytest.raises(ValueError, match="plan: lookahead's W and G are at most 8192"):
                self.grow([], plan=plan)

    @pytest.mark.parametrize("plan", ["chain:3", "tree:2x2x4"])
    def test_other_plans_are_refused(self, plan: str) -> None:
        with pytest.raises(ValueError, match="plan: lookahead takes lookahead:WxNxG"):
            self.grow([], plan=plan)
