"""The tree's ancestor mask and the walk that accepts a path of it, on literal trees and against a slow loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from draftwing.engine.tree import DraftTree, Verdict, root_tree, walk

pytestmark = pytest.mark.usefixtures("machine")


def tree_of(tokens: list[list[int]], parents: list[list[int]], valid: list[list[bool]] | None = None) -> DraftTree:
    """A batch of trees from their tokens and parents; depths follow."""
    depths = []
    for row in parents:
        row_depths = [0]
        for parent in row[1:]:
            row_depths.append(row_depths[parent] + 1)
        depths.append(row_depths)
    token_ids = torch.tensor(tokens)
    return DraftTree(
        tokens=token_ids,
        parents=torch.tensor(parents),
        depths=torch.tensor(depths),
        valid=torch.ones_like(token_ids, dtype=torch.bool) if valid is None else torch.tensor(valid),
        scores=torch.zeros(token_ids.shape),
        log_probs=torch.zeros(token_ids.shape),
        max_depth=max(map(max, depths)),
    )


def verdict_of(tree: DraftTree, chosen: list[list[int]]) -> Verdict:
    return walk(tree, torch.tensor(chosen))


#      0         tokens: 0:10  1:11  2:12  3:13  4:14  5:15
#     / \
#    1   2
#   / \   \
#  3   4   5
TOKENS = [10, 11, 12, 13, 14, 15]
PARENTS = [0, 0, 0, 1, 1, 2]


class TestAncestors:
    def test_branching_tree(self) -> None:
        assert tree_of([TOKENS], [PARENTS]).ancestors.int().tolist() == [
            [
                [1, 0, 0, 0, 0, 0],
                [1, 1, 0, 0, 0, 0],
                [1, 0, 1, 0, 0, 0],
                [1, 1, 0, 1, 0, 0],
                [1, 1, 0, 0, 1, 0],
                [1, 0, 1, 0, 0, 1],
            ]
        ]

    def test_a_chain_is_the_causal_mask(self) -> None:
        for length in range(1, 11):  # every count of doublings, and one past each
            chain = tree_of([list(range(length))], [[max(0, node - 1) for node in range(length)]])
            assert torch.equal(chain.ancestors[0], torch.ones(length, length, dtype=torch.bool).tril())

    def test_rows_have_their_own_masks(self) -> None:
        masks = tree_of([[1, 2, 3], [1, 2, 3]], [[0, 0, 1], [0, 0, 0]]).ancestors.int().tolist()
        assert masks == [[[1, 0, 0], [1, 1, 0], [1, 1, 1]], [[1, 0, 0], [1, 1, 0], [1, 0, 1]]]

    def test_plain_decoding_has_a_root_that_sees_itself(self) -> None:
        tree = root_tree(torch.tensor([5, 6]))
        assert tree.tokens.tolist() == [[5], [6]]
        assert tree.ancestors.tolist() == [[[True]], [[True]]]


class TestWalk:
    def test_nothing_accepted_emits_the_bonus_alone(self) -> None:
        verdict = verdict_of(tree_of([TOKENS], [PARENTS]), [[99, 0, 0, 0, 0, 0]])
        assert verdict.num_accepted.tolist() == [0]
        assert verdict.bonus.tolist() == [99]
        assert verdict.path.tolist() == [[0, 0, 0]]
        assert verdict.tokens[0, 0] == 99

    def test_a_full_branch_is_accepted_and_its_leaf_gives_the_bonus(self) -> None:
        #                                                 root chose 12, node 2 chose 15, node 5 chose 77
        verdict = verdict_of(tree_of([TOKENS], [PARENTS]), [[12, 0, 15, 0, 0, 77]])
        assert verdict.num_accepted.tolist() == [2]
        assert verdict.path.tolist() == [[0, 2, 5]]
        assert verdict.tokens.tolist() == [[12, 15, 77]]
        assert verdict.bonus.tolist() == [77]

    def test_the_second_sibling_can_be_the_one(self) -> None:
        verdict = verdict_of(tree_of([TOKENS], [PARENTS]), [[11, 14, 0, 0, 78, 0]])
        assert verdict.path.tolist() == [[0, 1, 4]]
        assert verdict.tokens.tolist() == [[11, 14, 78]]

    def test_a_match_below_a_rejected_node_does_not_count(self) -> None:
        # Node 2 would be followed by 15, which node 5 holds; but the root chose 11 and node 1 chose something else.
        verdict = verdict_of(tree_of([TOKENS], [PARENTS]), [[11, 50, 15, 0, 0, 77]])
        assert verdict.num_accepted.tolist() == [1]
        assert verdict.path.tolist() == [[0, 1, 0]]
        assert verdict.bonus.tolist() == [50]

    def test_an_invalid_node_is_never_accepted_nor_what_hangs_below_it(self) -> None:
        valid = [[True, False, True, True, True, True]]
        verdict = verdict_of(tree_of([TOKENS], [PARENTS], valid), [[11, 13, 0, 60, 0, 0]])
        assert verdict.num_accepted.tolist() == [0]
        assert verdict.bonus.tolist() == [11]

    def test_a_node_without_a_choice_of_its_own_is_not_accepted(self) -> None:
        verdict = verdict_of(tree_of([TOKENS], [PARENTS]), [[11, ~5, 0, 0, 0, 0]])
        assert verdict.num_accepted.tolist() == [0]
        assert verdict.bonus.tolist() == [11]

    def test_rows_of_a_batch_are_independent(self) -> None:
        tree = tree_of([TOKENS, TOKENS, TOKENS], [PARENTS, PARENTS, [0, 0, 1, 2, 3, 4]])
        verdict = verdict_of(tree, [[99, 0, 0, 0, 0, 0], [12, 0, 15, 0, 0, 77], [11, 12, 13, 14, 15, 16]])
        assert verdict.num_accepted.tolist() == [0, 2, 5]
        assert verdict.bonus.tolist() == [99, 77, 16]
        assert verdict.path[2].tolist() == [0, 1, 2, 3, 4, 5]

    def test_num_accepted_leaves_the_bonus_out(self) -> None:
        verdict = verdict_of(tree_of([[1, 2]], [[0, 0]]), [[2, 3]])
        emitted = verdict.tokens[0, : int(verdict.num_accepted) + 1].tolist()
        assert verdict.num_accepted.tolist() == [1]
        assert emitted == [2, 3]


@st.composite
def trees_with_choices(draw: st.DrawFn) -> tuple[list[int], list[int], list[bool], list[int]]:
    """Tokens, parents, validity and the target's choices; few token ids, so that choices often match."""
    num_nodes = draw(st.integers(1, 12))
    tokens, parents, valid = [0], [0], [True]
    for node in range(1, num_nodes):
        parent = draw(st.integers(0, node - 1))
        siblings = {tokens[other] for other in range(1, node) if parents[other] == parent}
        tokens.append(draw(st.integers(0, 15).filter(lambda token, taken=siblings: token not in taken)))  # type: ignore[misc]
        parents.append(parent)
        valid.append(draw(st.integers(0, 5)) > 0)
    chosen = []
    for node in range(num_nodes):
        children = [tokens[child] for child in range(1, num_nodes) if parents[child] == node]
        chosen.append(draw(st.sampled_from([*children, 3])))
    return tokens, parents, valid, chosen


def slow_walk(tokens: list[int], parents: list[int], valid: list[bool], chosen: list[int]) -> tuple[list[int], int]:
    """From the root, follow the child that holds the chosen token for as long as there is one."""
    path = [0]
    while True:
        children = [node for node in range(1, len(tokens)) if parents[node] == path[-1]]
        matching = [child for child in children if valid[child] and tokens[child] == chosen[path[-1]]]
        if not matching:
            return path, chosen[path[-1]]
        path.append(matching[0])


@given(trees_with_choices())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_walk_equals_a_slow_loop(case: tuple[list[int], list[int], list[bool], list[int]]) -> None:
    tokens, parents, valid, chosen = case
    verdict = verdict_of(tree_of([tokens], [parents], [valid]), [chosen])
    path, bonus = slow_walk(tokens, parents, valid, chosen)
    num_accepted = int(verdict.num_accepted)
    assert verdict.path[0, : num_accepted + 1].tolist() == path
    assert verdict.tokens[0, : num_accepted + 1].tolist() == [tokens[node] for node in path[1:]] + [bonus]
    assert verdict.bonus.tolist() == [bonus]
