"""Tree plans: their text form, the sizes they imply, and what is refused."""

import pytest

from draftwing.engine.options import GenerateOptions
from draftwing.engine.tree_plan import LookaheadTree, TreePlan, TreeShape


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("off", TreePlan(width=0, depth=0, num_nodes=1)),
        ("chain:5", TreePlan(width=1, depth=5, num_nodes=6)),
        ("tree:10x7x60", TreePlan(width=10, depth=7, num_nodes=60)),
        ("lookahead:15x5x7", LookaheadTree(num_columns=15, ngram_length=5, num_ngrams=7)),
    ],
)
def test_parse(text: str, plan: TreeShape) -> None:
    assert TreePlan.parse(text) == plan


@pytest.mark.parametrize("text", ["", "on", "chain", "chain:", "chain:-1", "tree:3x4", "tree:3x4x5x6", "EAGLE1"])
def test_other_text_is_refused_and_the_forms_are_named(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"plan: expected off, chain:DEPTH, tree:W.*, lookahead:W.*, eagle1 or medusa"
    ) as e:
        TreePlan.parse(text)
    assert repr(text) in str(e.value)


@pytest.mark.parametrize("text", ["lookahead:0x5x7", "lookahead:7x5x0", "lookahead:7x1x7"])
def test_lookahead_plans_of_nothing_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"plan: expected lookahead:WxNxG with .*, got {text}"):
        TreePlan.parse(text)


def test_a_lookahead_plan_bounds_the_depth_of_its_guesses() -> None:
    """The last guess of a window of W columns and N - 1 levels stands W - 1 + N - 2 tokens behind the root."""
    plan = TreePlan.parse("lookahead:15x5x7")
    assert (plan.width, plan.depth, plan.num_nodes) == (7, 4, 88)
    assert (plan.max_depth, plan.is_chain) == (14 + 3, False)
    assert TreePlan.parse("lookahead:1x5x7").max_depth == 4  # its n-grams are deeper


def test_eagle1_is_the_papers_tree() -> None:
    plan = TreePlan.parse("eagle1")
    assert [len(level) for level in plan.levels] == [4, 8, 8, 3, 2]
    assert plan.num_nodes == 26  # 25 draft nodes and the root
    assert (plan.width, plan.depth) == (4, 5)


def test_levels_order_paths_by_depth_then_rank() -> None:
    plan = TreePlan.static(((1,), (0, 1), (0,), (0, 0)))
    assert plan.paths == ((0,), (1,), (0, 0), (0, 1))
    assert plan.levels == (((0,), (1,)), ((0, 0), (0, 1)))


@pytest.mark.parametrize(
    ("width", "depth", "candidates"), [(4, 1, 4), (4, 2, 4 + 16), (10, 7, 10 + 6 * 100), (0, 0, 0)]
)
def test_a_dynamic_plan_scores_one_level_of_width_and_then_squares(width: int, depth: int, candidates: int) -> None:
    assert TreePlan(width, depth, 1).num_candidates == candidates


def test_a_plan_may_keep_every_candidate_but_no_more() -> None:
    TreePlan.parse("tree:2x2x7")
    with pytest.raises(ValueError, match="8 nodes asked for, but width 2 and depth 2 draft only 6 candidates"):
        TreePlan.parse("tree:2x2x8")


@pytest.mark.parametrize("sizes", [(-1, 2, 2), (2, -1, 2), (2, 2, 0)])
def test_sizes_below_zero_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="plan: "):
        TreePlan(*sizes)


def test_a_static_path_needs_its_parent() -> None:
    with pytest.raises(ValueError, match=r"path \(1, 0\) has no parent"):
        TreePlan.static(((0,), (1, 0)))


@pytest.mark.parametrize(
    "paths",
    [
        pytest.param(()),
        pytest.param(((0,), (0,))),
        pytest.param(((-1,),)),
    ],
    ids=str,
)
def test_a_static_tree_has_distinct_paths_of_ranks(paths: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match=r"^plan: "):
        TreePlan.static(paths)


@pytest.mark.parametrize(
    ("text", "is_chain"),
    [("off", True), ("chain:3", True), ("tree:1x3x4", True), ("tree:2x3x4", False), ("eagle1", False)],
)
def test_is_chain(text: str, is_chain: bool) -> None:
    assert TreePlan.parse(text).is_chain == is_chain


def test_a_lookup_competes_for_the_same_nodes_and_may_be_deeper() -> None:
    plan = TreePlan.parse("tree:2x3x6").with_lookup()
    assert (plan.num_nodes, plan.depth, plan.max_depth) == (6, 3, 5)
    assert TreePlan.parse("tree:10x8x60").with_lookup().max_depth == 8
    assert not TreePlan.chain(3).with_lookup().is_chain, "it may branch off"


def test_a_lookup_is_no_part_of_a_plan_that_is_asked_for() -> None:
    with pytest.raises(ValueError, match="plan: expected a tree without a lookup, which ngram=True adds"):
        GenerateOptions(plan=TreePlan.chain(3).with_lookup())


@pytest.mark.parametrize("text", ["off", "chain:3", "tree:1x4x3", "tree:4x4x16", "eagle1", "medusa", "lookahead:5x4x3"])
def test_a_plan_is_written_as_it_is_read(text: str) -> None:
    assert str(TreePlan.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("chain:1000", "chain:8"),
        ("chain:8", "chain:8"),
        ("tree:2x20x60", "tree:2x8x31"),
        ("lookahead:5x20x3", "lookahead:5x9x3"),
        ("eagle1", "eagle1"),
    ],
)
def test_a_plan_is_cut_to_a_limit(text: str, cut: str) -> None:
    assert str(TreePlan.parse(text).cut_to(8)) == cut


def test_a_plan_says_the_same_of_itself_in_every_process() -> None:
    """Measured costs are kept on disk under it."""
    assert " at 0x" not in repr(TreePlan.chain(2))
