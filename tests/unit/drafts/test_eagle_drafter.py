"""Trees grown with caches equal a slow reference that recomputes every node from the whole sequence."""

import copy
import dataclasses
from dataclasses import dataclass
from itertools import islice

import pytest
import torch
from conftest import VOCAB_SIZE, Path, eagle, nodes_of, requests_for, run

from draftwing.drafts.eagle.drafter import EagleDrafter
from draftwing.drafts.eagle.network import DraftNetwork
from draftwing.engine.generation import start_generation
from draftwing.engine.sampling import uncoupled_rank
from draftwing.engine.tree import DraftTree
from draftwing.engine.tree_plan import TreePlan
from draftwing.target.model import TargetModel

METHODS = ("eagle1", "eagle3")
CAPACITY = 120
UNREAD = 64
SMALL_TREE = TreePlan.static(((0,), (2,), (2, 1), (2, 1, 0), (0, 1)))


@pytest.fixture(scope="module")
def target(stock_target: TargetModel) -> TargetModel:
    """Scores are those of the stock modules."""
    return stock_target


def full_causal_attention(layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """An `Attend` without a cache: every slot reads itself and those before it."""
    groups, length = queries.shape[1] // keys.shape[1], queries.shape[2]
    keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    scores = queries @ keys.transpose(2, 3) / queries.shape[-1] ** 0.5
    scores = scores.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf)
    return (scores.softmax(-1) @ values).transpose(1, 2)


@dataclass
class SlowDraft:
    """A head over one committed sequence `tokens`, whose last token is the tree's root; `features [S - 1, F]`."""

    head: DraftNetwork
    tokens: list[int]
    features: torch.Tensor

    def log_probs(self, path: Path) -> torch.Tensor:
        """log P(next token) below the drafted `path`, over draft ids: one whole pass for each of its tokens."""
        hidden = self.head.project(self.features)
        tokens = self.tokens[1:]
        for token in (*path, None):
            positions = torch.arange(len(tokens))[None]
            output = self.head(hidden[None], torch.tensor([tokens]), positions, full_causal_attention)[0]
            if token is not None:
                hidden = torch.cat((hidden, self.head.feed_back(output[-1:])))
                tokens = [*tokens, token]
        return self.head.logits(output[-1]).log_softmax(-1)

    def best_children(self, path: Path, width: int) -> list[tuple[Path, float]]:
        """The `width` likeliest continuations of a path with their log-probabilities, best first."""
        log_probs = self.log_probs(path)
        best = sorted(range(len(log_probs)), key=lambda draft_id: -log_probs[draft_id].item())[:width]
        to_target = self.head.vocab.to_target
        return [((*path, int(to_target(torch.tensor(i)))), log_probs[i].item()) for i in best]

    def dynamic_tree(self, plan: TreePlan) -> dict[Path, float]:
        """EAGLE-2: expand the `width` best nodes of each level, keep the best of all candidates."""
        frontier: dict[Path, float] = {(): 0.0}
        candidates: dict[Path, float] = {}
        for _ in range(plan.depth):
            level = {
                child: score + log_prob
                for path, score in frontier.items()
                for child, log_prob in self.best_children(path, plan.width)
            }
            candidates |= level
            frontier = dict(sorted(level.items(), key=lambda item: -item[1])[: plan.width])
        return dict(sorted(candidates.items(), key=lambda item: -item[1])[: plan.num_nodes - 1])

    def static_tree(self, plan: TreePlan) -> dict[Path, float]:
        """EAGLE-1: the node of rank path (.., r) is the r-th best child of its parent."""
        nodes: dict[Path, tuple[Path, float]] = {(): ((), 0.0)}
        for ranks in plan.paths:
            parent, score = nodes[ranks[:-1]]
            child, log_prob = self.best_children(parent, plan.width)[ranks[-1]]
            nodes[ranks] = child, score + log_prob
        return {path: score for path, score in nodes.values() if path}


def features_of(target: TargetModel, head: DraftNetwork, tokens: list[int]) -> torch.Tensor:
    """The target's features `[S, F]` of a sequence, from the stock module."""
    output = target.model(input_ids=torch.tensor([tokens]), use_cache=False, output_hidden_states=True)
    return torch.cat([output.hidden_states[layer][0] for layer in head.config.feature_layers], dim=-1)


def drafter_that_has_read(target: TargetModel, head: DraftNetwork, sequences: list[list[int]]) -> EagleDrafter:
    """A fresh drafter that has read all of the sequences but their last tokens, the roots, at once."""
    drafter = EagleDrafter(head, len(sequences), CAPACITY)
    longest = max(map(len, sequences))
    padded = [tokens + [0] * (longest - len(tokens)) for tokens in sequences]
    features = torch.stack([features_of(target, head, tokens) for tokens in padded])
    num_new = torch.tensor([len(tokens) - 1 for tokens in sequences])
    drafter.observe(torch.tensor(padded)[:, 1:], features[:, :-1], num_new)
    return drafter


def grow(drafter: EagleDrafter, sequences: list[list[int]], plan: TreePlan) -> DraftTree:
    root = torch.tensor([tokens[-1] for tokens in sequences])
    drafter.catch_up(UNREAD)
    return drafter.grow(root, plan, rank=uncoupled_rank)


def assert_same_nodes(ours: dict[Path, float], reference: dict[Path, float]) -> None:
    assert ours.keys() == reference.keys()
    for path, score in reference.items():
        assert ours[path] == pytest.approx(score, abs=1e-8)


@pytest.mark.parametrize("plan", ["chain:1", "chain:4", "tree:3x3x9", "tree:4x3x37", "tree:3x4x12", "tree:4x1x4"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_the_dynamic_tree_equals_the_slow_reference(
    target: TargetModel, heads: dict[str, DraftNetwork], prompts: list[list[int]], method: str, plan: str
) -> None:
    head, sequences = heads[method], [prompt for prompt in prompts if len(prompt) > 1]
    tree = grow(drafter_that_has_read(target, head, sequences), sequences, TreePlan.parse(plan))
    assert tree.valid.all()
    for row, tokens in enumerate(sequences):
        slow = SlowDraft(head, tokens, features_of(target, head, tokens)[:-1])
        assert_same_nodes(nodes_of(tree, row), slow.dynamic_tree(TreePlan.parse(plan)))


@pytest.mark.parametrize("plan", [TreePlan.parse("eagle1"), SMALL_TREE], ids=["eagle1", "small"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_the_static_tree_equals_the_slow_reference(
    target: TargetModel, heads: dict[str, DraftNetwork], prompts: list[list[int]], method: str, plan: TreePlan
) -> None:
    head, sequences = heads[method], [prompts[0], prompts[3]]
    tree = grow(drafter_that_has_read(target, head, sequences), sequences, plan)
    for row, tokens in enumerate(sequences):
        slow = SlowDraft(head, tokens, features_of(target, head, tokens)[:-1])
        assert_same_nodes(nodes_of(tree, row), slow.static_tree(plan))


@pytest.mark.parametrize(("plan", "depth"), [("chain:3", 3), ("tree:3x4x9", 4), ("eagle1", 5)])
@torch.no_grad()
def test_candidates_are_ranked_with_the_positions_that_they_would_take(
    target: TargetModel, heads: dict[str, DraftNetwork], plan: str, depth: int
) -> None:
    """Below a root at position L the candidates of level d are for position L + d: what Sampler.choose() says too."""
    head, sequences, asked = heads["eagle3"], [[1, 2, 3, 4], [9, 8]], []

    def rank(logits: torch.Tensor, positions: torch.Tensor, target_ids: torch.Tensor | None) -> torch.Tensor:
        assert target_ids is head.vocab.target_ids
        asked.append(positions.tolist())
        return uncoupled_rank(logits, positions, target_ids)

    drafter = drafter_that_has_read(target, head, sequences)
    drafter.catch_up(UNREAD)
    drafter.grow(torch.tensor([4, 8]), TreePlan.parse(plan), rank=rank)
    assert asked == [[[3 + level], [1 + level]] for level in range(1, depth + 1)]


@torch.no_grad()
def test_the_tree_follows_the_ranking(target: TargetModel, heads: dict[str, DraftNetwork]) -> None:
    """A ranking that prefers high draft ids gives the highest as the best child everywhere."""
    head, sequences = heads["eagle3"], [[1, 2, 3, 4]]

    def prefer_high_ids(logits: torch.Tensor, positions: torch.Tensor, target_ids: torch.Tensor | None) -> torch.Tensor:
        return torch.arange(logits.shape[-1]).expand(logits.shape).double().log_softmax(-1)

    drafter = drafter_that_has_read(target, head, sequences)
    drafter.catch_up(UNREAD)
    tree = drafter.grow(torch.tensor([4]), TreePlan.parse("chain:3"), rank=prefer_high_ids)
    highest = int(head.vocab.to_target(torch.tensor(len(head.vocab) - 1)))
    assert tree.tokens.tolist() == [[4, highest, highest, highest]]


@pytest.mark.parametrize("plan", ["chain:3", "tree:3x3x9", "eagle1"])
@torch.no_grad()
def test_a_row_that_has_read_nothing_drafts_nothing(
    target: TargetModel, heads: dict[str, DraftNetwork], plan: str
) -> None:
    """A prompt of one token has no feature yet; the row beside it drafts as ever."""
    sequences = [[7], [1, 2, 3, 4]]
    tree = grow(drafter_that_has_read(target, heads["eagle3"], sequences), sequences, TreePlan.parse(plan))
    assert tree.valid[0].tolist() == [True] + [False] * (tree.num_nodes - 1)
    assert tree.valid[1].all()


@pytest.mark.parametrize("plan", ["chain:4", "tree:4x4x16", "eagle1"])
@pytest.mark.parametrize("method", METHODS)
def test_after_cycles_with_rejections_the_state_is_that_of_a_fresh_drafter(
    target: TargetModel, heads: dict[str, DraftNetwork], prompts: list[list[int]], method: str, plan: str
) -> None:
    head, built = heads[method], []

    def new_drafter(batch_size: int, capacity: int) -> EagleDrafter:
        built.append(eagle(head)(batch_size, capacity))
        return built[0]

    requests = requests_for(prompts, max_new_tokens=60, eos=())
    generation = start_generation(target, requests, new_drafter, TreePlan.parse(plan))
    accepted = {count for committed in islice(generation.cycles(), 6) for count in committed.num_accepted}
    assert len(accepted) > 1, "some cycles must accept more than others"
    sequences = [prompt + output.tokens for prompt, output in zip(prompts, generation.outputs, strict=True)]
    check = TreePlan.parse("tree:3x3x9")
    with torch.no_grad():
        used = grow(built[0], sequences, check)
        fresh = grow(drafter_that_has_read(target, head, sequences), sequences, check)
    for row in range(len(prompts)):
        assert_same_nodes(nodes_of(used, row), nodes_of(fresh, row))


def with_logits(head: DraftNetwork, kind: str) -> DraftNetwork:
    """The head with its logits replaced by hostile ones."""
    twin = copy.copy(head)
    size = len(head.vocab)

    def logits(output: torch.Tensor) -> torch.Tensor:
        shape = (*output.shape[:-1], size)
        if kind == "all nan":
            return torch.full(shape, torch.nan)
        if kind == "some nan":
            return torch.where(output[..., :1] > 0, head.logits(output), torch.nan)
        if kind == "all equal":
            return torch.zeros(shape)
        certain = torch.zeros(shape)  # log P is exactly 0 for one token at every node: a child ties with its parent
        certain[..., 5] = 1e6
        return certain

    object.__setattr__(twin, "logits", logits)
    return twin


@pytest.mark.parametrize("plan", ["chain:4", "tree:4x4x9", "tree:3x4x20"])
@pytest.mark.parametrize("kind", ["all nan", "some nan", "all equal", "certain"])
@torch.no_grad()
def test_ties_and_nan_still_give_a_connected_tree(
    target: TargetModel, heads: dict[str, DraftNetwork], plan: str, kind: str
) -> None:
    head = with_logits(heads["eagle3"], kind)
    sequences = [[1, 2, 3, 4], [9, 8]]
    tree = grow(drafter_that_has_read(target, head, sequences), sequences, TreePlan.parse(plan))
    assert tree.num_nodes == TreePlan.parse(plan).num_nodes
    assert ((tree.tokens >= 0) & (tree.tokens < VOCAB_SIZE)).all()
    assert not tree.scores.isnan().any()
    for row in range(2):
        scores = nodes_of(tree, row)  # checks order, depths and that siblings differ
        assert all(path[:-1] in scores or len(path) == 1 for path in scores)
        for node in range(1, tree.num_nodes):
            parent = tree.parents[row, node]
            assert tree.scores[row, node] <= tree.scores[row, parent]
            assert tree.valid[row, parent] or not tree.valid[row, node]
    if kind != "some nan":
        assert tree.valid[:, 1:].all() == tree.valid[:, 1:].any() == (kind != "all nan")


@pytest.mark.parametrize(
    ("plan", "temperature"),
    [
        pytest.param("tree:49x2x60", 0.0, id="wider than the draft vocabulary"),
        pytest.param("chain:62", 1.0, id="deeper than the noise window"),
        pytest.param("chain:62", 0.0, id="deep"),
    ],
)
def test_a_large_plan_works_or_is_refused_by_name(
    target: TargetModel, heads: dict[str, DraftNetwork], plan: str, temperature: float
) -> None:
    requests = requests_for([[1, 2, 3]], max_new_tokens=4, temperature=temperature)
    try:
        tokens = run(target, requests, eagle(heads["eagle3"]), plan)
    except ValueError as error:
        assert "plan" in str(error)
    else:
        assert tokens == run(target, requests)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_positions_that_waited_unread_are_read_as_if_at_once(
    target: TargetModel, heads: dict[str, DraftNetwork], method: str
) -> None:
    """A prompt, seven cycles without drafts, of which the second row ends after four, then a draft."""
    head, plan = heads[method], TreePlan.parse("tree:3x3x9")
    rows = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [9, 8, 7, 6, 5, 4, 3, 2, 1]]
    features = torch.stack([features_of(target, head, row + [0] * (12 - len(row))) for row in rows])
    ids = torch.tensor([row + [0] * (12 - len(row)) for row in rows])
    drafter = drafter_that_has_read(target, head, [row[:5] for row in rows])
    for start in range(4, 11):
        num_new = torch.tensor([1, int(start < 8)])
        drafter.observe(ids[:, start + 1 : start + 2], features[:, start : start + 1], num_new)
    at_once = drafter_that_has_read(target, head, rows)
    for row in range(2):
        assert_same_nodes(
            nodes_of(grow(drafter, rows, plan), row),
            nodes_of(grow(at_once, rows, plan), row),
        )


@pytest.mark.parametrize("plan", ["chain:4", "tree:3x3x9", "eagle1"])
@torch.no_grad()
def test_a_draft_window_hides_what_lies_before_it(
    target: TargetModel, heads: dict[str, DraftNetwork], plan: str
) -> None:
    """With one layer, a window of 3 slots drafts from the last three features and tokens, whatever stands before."""

    def tree_after(first: list[int], window: int | None) -> DraftTree:
        head, tokens = heads["eagle3"], torch.tensor([[*first, 4, 5, 6, 7]])
        features = features_of(target, head, [9, 9, 9, 4, 5, 6, 7])  # not those of `first`: they must not matter
        features[:3] += tokens[0, :3, None]
        drafter = EagleDrafter(head, 1, CAPACITY, window=window)
        drafter.observe(tokens[:, 1:], features[None, :-1], torch.tensor([6]))
        drafter.catch_up(6)
        return drafter.grow(tokens[:, -1], TreePlan.parse(plan), rank=uncoupled_rank)

    histories = [1, 2, 3], [8, 7, 9]
    windowed, others = (nodes_of(tree_after(first, window=3), 0) for first in histories)
    assert_same_nodes(windowed, others)
    unlimited = [tree_after(first, window=CAPACITY).scores for first in histories]
    assert not torch.allclose(*unlimited)


@torch.no_grad()
def test_a_head_reads_as_many_tokens_as_it_was_trained_on(heads: dict[str, DraftNetwork]) -> None:
    has_window = []
    for trained_length in (3, None):  # if it is not known, its positions count, which are many more
        head, trees = copy.deepcopy(heads["eagle3"]), []
        head.config = dataclasses.replace(head.config, trained_length=trained_length)
        for window in (None, 3):
            drafter = EagleDrafter(head, 1, CAPACITY, window=window)
            torch.manual_seed(0)
            features = torch.randn(1, 6, head.fc.in_features, dtype=torch.float64)
            drafter.observe(torch.tensor([[2, 3, 4, 5, 6, 7]]), features, torch.tensor([6]))
            drafter.catch_up(6)
            trees.append(drafter.grow(torch.tensor([7]), TreePlan.chain(3), rank=uncoupled_rank).scores)
        has_window.append(torch.equal(*trees))
    assert has_window == [True, False]


def test_a_draft_window_below_1_is_refused(heads: dict[str, DraftNetwork]) -> None:
    with pytest.raises(ValueError, match="draft_window"):
        EagleDrafter(heads["eagle3"], 1, CAPACITY, window=0)
