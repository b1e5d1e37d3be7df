"""Looking n-grams up and merging what followed them into a tree: literal cases, and a slow search over random text."""

import math
import random
from dataclasses import replace

import pytest
import torch

from draftwing.drafts.ngram import LONGEST_MATCH, NgramDrafter
from draftwing.engine.sampling import uncoupled_rank
from draftwing.engine.tree import Candidates, DraftTree, best_subtree, follow
from draftwing.engine.tree_plan import TreePlan, TreeShape

Path = tuple[int, ...]
STAGED = TreePlan.parse("tree:2x2x6").with_lookup()  # a draft of two levels, a lookup of five tokens


def drafter_that_has_read(*rows: list[int]) -> NgramDrafter:
    """A drafter with these histories; each ends with the row's root."""
    drafter = NgramDrafter(len(rows), capacity=64, device=torch.device("cpu"))
    observe(drafter, *rows)
    return drafter


def observe(drafter: NgramDrafter, *rows: list[int]) -> None:
    longest = max(map(len, rows))
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.int64)
    drafter.observe(padded, None, torch.tensor([len(row) for row in rows]))


def grow(drafter: NgramDrafter, *rows: list[int], plan: str = "chain:3") -> DraftTree:
    root = torch.tensor([row[-1] if row else 0 for row in rows])
    return drafter.grow(root, TreePlan.parse(plan), uncoupled_rank)


def continuation(text: list[int], depth: int = 3) -> list[int]:
    """What is drafted after a text, [] without a match."""
    tree = grow(drafter_that_has_read(text), text, plan=f"chain:{depth}")
    return tree.tokens[0, 1:][tree.valid[0, 1:]].tolist()


class TestLookup:
    def test_what_followed_the_match_is_drafted_again(self) -> None:
        assert continuation([1, 2, 3, 4, 5, 9, 1, 2]) == [3, 4, 5]

    def test_the_longest_match_wins_over_a_later_one(self) -> None:
        assert continuation([7, 1, 2, 30, 31, 32, 8, 2, 40, 41, 42, 7, 1, 2]) == [30, 31, 32]

    def test_of_equal_matches_the_most_recent_wins(self) -> None:
        assert continuation([5, 1, 2, 30, 31, 32, 6, 1, 2, 40, 41, 42, 7, 1, 2]) == [40, 41, 42]

    def test_a_match_that_reaches_the_end_goes_on_in_turn(self) -> None:
        assert continuation([1, 2, 3, 1, 2, 3, 1, 2], depth=5) == [3, 1, 2, 3, 1]
        assert continuation([4, 4]) == [4, 4, 4]

    @pytest.mark.parametrize("text", [[], [1], [1, 2], [1, 2, 3, 4]])
    def test_without_a_match_nothing_is_drafted(self, text: list[int]) -> None:
        assert continuation(text) == []

    def test_rows_look_up_their_own_text(self) -> None:
        rows = [1, 2, 3, 4, 1], [5, 6], [9, 8, 7, 6, 5, 9, 8], []
        tree = grow(drafter_that_has_read(*rows), *rows)
        assert tree.valid[:, 1:].all(1).tolist() == tree.valid[:, 1:].any(1).tolist() == [True, False, True, False]
        assert tree.tokens[[0, 2], 1:].tolist() == [[2, 3, 4], [7, 6, 5]]

    def test_what_was_not_kept_is_not_text(self) -> None:
        drafter = drafter_that_has_read([1, 2, 3, 4])
        drafter.observe(torch.tensor([[1, 50, 51]]), None, torch.tensor([1]))
        assert grow(drafter, [1, 2, 3, 4, 1]).tokens.tolist() == [[1, 2, 3, 4]]

    def test_it_equals_a_slow_search(self) -> None:
        generator = random.Random(0)
        for _ in range(100):
            text = generator.choices(range(4), k=generator.randint(0, 40))
            assert continuation(text, depth=4) == slow_continuation(text, depth=4)

    def test_only_chains_are_drafted(self) -> None:
        with pytest.raises(ValueError, match="takes chain:DEPTH"):
            grow(drafter_that_has_read([1, 2, 1]), [1, 2, 1], plan="tree:2x2x4")


def slow_continuation(text: list[int], depth: int) -> list[int]:
    best_length, best_end = 0, 0
    for end in range(1, len(text)):
        length = 0
        while length < min(end, LONGEST_MATCH) and text[end - 1 - length] == text[-1 - length]:
            length += 1
        if length and length >= best_length:
            best_length, best_end = length, end
    copied = list(text)
    for step in range(depth if best_length else 0):
        copied.append(copied[best_end + step])
    return copied[len(text) :]


class TestRates:
    """Beta(l, 2) before anything is seen: a match of 1 token is right in 1 of 3 cases, then one of 2 in 2 of 4."""

    TEXT = [1, 2, 3, 4, 1]

    def scores(self, drafter: NgramDrafter, text: list[int]) -> list[float]:
        return grow(drafter, text).scores[0, 1:].exp().tolist()

    def test_a_chain_scores_the_product_of_its_rates(self) -> None:
        expected = [1 / 3, 1 / 3 * 2 / 4, 1 / 3 * 2 / 4 * 3 / 5]
        assert self.scores(drafter_that_has_read(self.TEXT), self.TEXT) == pytest.approx(expected)

    def test_what_came_teaches_the_rates_up_to_the_first_wrong_token(self) -> None:
        drafter = drafter_that_has_read(self.TEXT)
        grow(drafter, self.TEXT)  # drafts 2, 3, 4
        observe(drafter, [2, 7, 4, 1])  # 2 was right; 7 instead of 3; what stands below says nothing
        # The end is 4, 1 again: a match of 2 tokens, and a kind of its own by length: 1 wrong of 2, 0 of 3, 0 of 4.
        assert self.scores(drafter, [*self.TEXT, 2, 7, 4, 1]) == pytest.approx(
            [2 / 5, 2 / 5 * 3 / 5, 2 / 5 * 3 / 5 * 4 / 6]
        )

    def test_tokens_that_were_not_kept_teach_nothing(self) -> None:
        drafter = drafter_that_has_read(self.TEXT)
        before = self.scores(drafter, self.TEXT)
        drafter.observe(torch.tensor([[2, 3, 4]]), None, torch.tensor([0]))
        assert self.scores(drafter, self.TEXT) == before

    def test_rows_learn_for_themselves(self) -> None:
        rows = self.TEXT, self.TEXT
        drafter = drafter_that_has_read(*rows)
        grow(drafter, *rows)
        observe(drafter, [2], [3])
        observe(drafter, [9, 1], [9, 1])
        scores = grow(drafter, [*self.TEXT, 2, 9, 1], [*self.TEXT, 3, 9, 1]).scores[:, 1].exp()
        assert scores.tolist() == pytest.approx([2 / 4, 1 / 4])


def candidates_of(*rows: dict[Path, float]) -> Candidates:
    """The candidates of token paths with their probabilities, by levels; rows have paths of the same lengths."""
    paths = [sorted(row, key=len) for row in rows]
    scores = torch.tensor([[math.log(row[path]) for path in row] for row in rows])
    return Candidates(
        tokens=torch.tensor([[path[-1] for path in row] for row in paths]),
        scores=scores,
        log_probs=scores,
        parents=torch.tensor([[row.index(path[:-1]) if path[1:] else -1 for path in row] for row in paths]),
        depths=torch.tensor([[len(path) for path in row] for row in paths]),
    )


def nodes_of(tree: DraftTree, row: int = 0) -> dict[Path, float]:
    """A row's valid nodes as token paths with their probabilities; checks what a tree promises."""
    paths: list[Path] = [()]
    for node in range(1, tree.num_nodes):
        parent = int(tree.parents[row, node])
        assert parent < node, "parents come before children"
        assert tree.scores[row, node] <= tree.scores[row, parent]
        assert tree.valid[row, parent] or not tree.valid[row, node]
        paths.append((*paths[parent], int(tree.tokens[row, node])))
    nodes = {path: node for node, path in enumerate(paths) if tree.valid[row, node] and path}
    assert len(nodes) == int(tree.valid[row].sum()) - 1, "siblings differ"
    return {path: pytest.approx(math.exp(tree.scores[row, node]), abs=1e-6) for path, node in nodes.items()}


def merged(candidates: Candidates, *texts: list[int], plan: TreeShape = STAGED) -> DraftTree:
    """The tree of an EAGLE-like draft and of what is looked up in the texts."""
    extended = drafter_that_has_read(*texts).extend(candidates, plan, max(map(len, texts)))
    root = torch.tensor([text[-1] for text in texts])
    return best_subtree(root, extended, plan.num_nodes, plan.max_depth)


DRAFT = {(10,): 0.6, (20,): 0.2, (10, 11): 0.3, (10, 12): 0.1, (20, 21): 0.1, (20, 22): 0.05}
NO_MATCH = [1, 2, 3]


class TestFollow:
    @pytest.mark.parametrize(
        ("chain", "nodes", "contested"),
        [
            ([10, 12, 13], [0, 3, 6], [False, False, False]),  # below a leaf nobody votes against it
            ([20, 99, 21], [1, 6, 6], [False, True, False]),
            ([99, 10, 11], [6, 6, 6], [True, False, False]),
        ],
    )
    def test_a_chain_leaves_the_tree_somewhere(self, chain: list[int], nodes: list[int], contested: list[bool]) -> None:
        overlap = follow(candidates_of(DRAFT), torch.tensor([chain]), num_levels=2)
        assert overlap.nodes.tolist() == [nodes]
        assert overlap.is_found.tolist() == [[node < 6 for node in nodes]]
        assert overlap.is_contested.tolist() == [contested]


class TestMerging:
    def test_without_a_match_the_tree_is_as_it_was(self) -> None:
        draft = candidates_of(DRAFT)
        alone = best_subtree(torch.tensor([3]), draft, STAGED.num_nodes, STAGED.depth)
        assert nodes_of(merged(draft, NO_MATCH)) == nodes_of(alone)

    def test_a_new_branch_from_the_root_pays_for_the_draft_s_vote_against_it(self) -> None:
        """A match of 4 tokens: Beta(1, 5) against the draft, then Beta(5, 2), Beta(6, 2), ... alone."""
        nodes = nodes_of(merged(candidates_of(DRAFT), [1, 2, 3, 4, 30, 31, 32, 1, 2, 3, 4]))
        assert nodes == {(10,): 0.6, (20,): 0.2, (10, 11): 0.3, (30,): 1 / 6, (30, 31): 1 / 6 * 5 / 7}

    def test_tokens_that_the_draft_has_too_score_the_better_estimate(self) -> None:
        """A match of 3 tokens gives 20 the rate 3 / 5 instead of the draft's 0.2, and 4 / 6 to what it adds below."""
        nodes = nodes_of(merged(candidates_of({(10,): 0.6, (20,): 0.2}), [1, 2, 3, 20, 21, 1, 2, 3]))
        assert nodes[(20,)] == 3 / 5
        assert nodes[(20, 21)] == 3 / 5 * 4 / 6
        assert nodes[(10,)] == 0.6

    def test_a_continuation_inherits_the_draft_s_confidence_in_its_beginning(self) -> None:
        nodes = nodes_of(merged(candidates_of({(10,): 0.9, (20,): 0.05}), [1, 10, 31, 32, 1]))
        assert nodes[(10,)] == 0.9  # the match of 1 token says 1 / 3
        assert nodes[(10, 31)] == 0.9 * 2 / 4

    def test_a_continuation_that_the_draft_has_whole_adds_nothing(self) -> None:
        shallow = replace(TreePlan.parse("tree:2x2x7"), lookup_depth=2)
        nodes = nodes_of(merged(candidates_of(DRAFT), [1, 2, 20, 22, 9, 1, 2], plan=shallow))
        assert set(nodes) == set(DRAFT)
        assert (nodes[(20,)], nodes[(20, 22)]) == (2 / 4, 2 / 4 * 3 / 5)

    def test_rows_are_merged_apart(self) -> None:
        texts = [NO_MATCH, [1, 2, 3, 4, 30, 31, 32, 1, 2, 3, 4], [1, 2, 3, 10, 12, 1, 2, 3]]
        together = merged(candidates_of(DRAFT, DRAFT, DRAFT), *texts)
        for row, text in enumerate(texts):
            assert nodes_of(together, row) == nodes_of(merged(candidates_of(DRAFT), text))

    def test_a_draft_of_nan_leaves_the_lookup_alone(self) -> None:
        draft = candidates_of(DRAFT)
        draft = replace(draft, scores=torch.full_like(draft.scores, torch.nan))
        looked_up = (40, 41, 42, 1, 40)
        nodes = nodes_of(merged(draft, [1, 40, 41, 42, 1]))
        assert set(nodes) == {looked_up[:length] for length in range(1, 6)}
