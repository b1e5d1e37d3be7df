"""Medusa's heads: which token each one predicts, trees against the heads' own probabilities, and what they learn."""

import copy
import dataclasses
from itertools import accumulate, product

import pytest
import torch
from conftest import VOCAB_SIZE, generate, medusa, nodes_of, requests_for, run
from torch import nn

from draftwing.config import Loss, TrainConfig
from draftwing.drafts.medusa.drafter import MedusaDrafter
from draftwing.drafts.medusa.network import MedusaConfig, MedusaModel
from draftwing.drafts.medusa.objective import MedusaTraining, new_medusa
from draftwing.engine.sampling import uncoupled_rank
from draftwing.engine.tree import DraftTree
from draftwing.engine.tree_plan import TreePlan
from draftwing.target.model import TargetModel
from draftwing.target.packed import pack_linears

NUM_HEADS, HIDDEN = 3, 32


@pytest.fixture(scope="module")
def target(stock_target: TargetModel) -> TargetModel:
    """Training reads its weights."""
    return stock_target


class Oracle(nn.Module):
    """A head that recognises the feature of position t of a known text and says the text's token at t + offset."""

    def __init__(self, texts: list[list[int]], features: list[torch.Tensor], offset: int) -> None:
        super().__init__()
        self._features = torch.cat(features)
        self._says = torch.tensor(
            [(text + [0] * offset)[t + offset] for text, states in zip(texts, features, strict=True)
             for t in range(len(states))]
        )  # fmt: skip

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        nearest = torch.cdist(hidden.flatten(0, -2), self._features).argmin(-1)
        return 30.0 * nn.functional.one_hot(self._says[nearest], VOCAB_SIZE).double().view(*hidden.shape[:-1], -1)


def oracle_heads(target: TargetModel, prompts: list[list[int]], num_new: int, shift: int) -> MedusaModel:
    """Heads that know what the target will say, `shift` tokens off."""
    requests = requests_for(prompts, max_new_tokens=num_new + NUM_HEADS + 2, eos=())
    texts = [prompt + tokens for prompt, tokens in zip(prompts, run(target, requests), strict=True)]
    with torch.no_grad():
        states = [target.model(torch.tensor([text]), output_hidden_states=True).hidden_states[-1][0] for text in texts]
    model = MedusaModel(MedusaConfig(HIDDEN, VOCAB_SIZE, NUM_HEADS)).double()
    for index in range(NUM_HEADS):
        model[index] = Oracle(texts, states, 2 + index + shift)
    return model


@pytest.mark.parametrize(("shift", "is_right"), [(0, True), (-1, False), (1, False)])
def test_heads_that_know_the_future_are_accepted_whole(
    target: TargetModel, prompts: list[list[int]], shift: int, is_right: bool
) -> None:
    """Head 0 predicts two tokens beyond the feature, the root's child; off by one, nothing like it happens."""
    # A prompt of one token has no feature yet, and one that repeats it has the same feature everywhere.
    prompts, num_new = [prompt for prompt in prompts if len(set(prompt)) > 1], 40
    drafter = medusa(oracle_heads(target, prompts, num_new, shift))
    figures = generate(target, requests_for(prompts, num_new, ()), drafter, f"chain:{NUM_HEADS}").statistics
    assert (figures.acceptance_rate == [1.0] * NUM_HEADS) == is_right
    assert (figures.num_cycles == len(prompts) * num_new // (NUM_HEADS + 1)) == is_right


def drafter_that_has_read(model: MedusaModel, features: torch.Tensor, num_read: list[int]) -> MedusaDrafter:
    drafter = MedusaDrafter(model, len(features), torch.float64, torch.device("cpu"))
    drafter.observe(torch.zeros(features.shape[:2], dtype=torch.int64), features, torch.tensor(num_read))
    return drafter


def grow(drafter: MedusaDrafter, plan: str, batch_size: int) -> DraftTree:
    return drafter.grow(torch.zeros(batch_size, dtype=torch.int64), TreePlan.parse(plan), uncoupled_rank)


@pytest.mark.parametrize("plan", ["chain:3", "tree:3x3x12", "tree:4x2x20", "medusa", "eagle1", "tree:4x8x40"])
@torch.no_grad()
def test_scores_are_sums_of_the_heads_log_probabilities(medusa_heads: MedusaModel, plan: str) -> None:
    """From each row's last feature that was read; what lies behind it is padding. Deeper plans end with the heads."""
    features, num_read = torch.randn(3, 5, HIDDEN, dtype=torch.float64), [5, 2, 1]
    tree = grow(drafter_that_has_read(medusa_heads, features, num_read), plan, 3)
    assert tree.valid.all()
    assert tree.max_depth <= NUM_HEADS
    for row, count in enumerate(num_read):
        heads = [head(features[row, count - 1]).log_softmax(-1) for head in medusa_heads]
        for path, score in nodes_of(tree, row).items():
            expected = sum(heads[depth][token].item() for depth, token in enumerate(path))
            assert score == pytest.approx(expected, abs=1e-9)


@torch.no_grad()
def test_later_reads_replace_the_feature_of_rows_that_went_on(medusa_heads: MedusaModel) -> None:
    features = torch.randn(2, 6, HIDDEN, dtype=torch.float64)
    drafter = drafter_that_has_read(medusa_heads, features[:, :3], [3, 0])
    drafter.observe(torch.zeros(2, 3, dtype=torch.int64), features[:, 3:], torch.tensor([0, 2]))
    tree = grow(drafter, "chain:1", 2)
    last = torch.stack((features[0, 2], features[1, 4]))
    assert torch.equal(tree.tokens[:, 1], medusa_heads[0](last).argmax(-1))


def test_a_row_that_has_read_nothing_drafts_nothing(medusa_heads: MedusaModel) -> None:
    features = torch.randn(2, 2, HIDDEN, dtype=torch.float64)
    tree = grow(drafter_that_has_read(medusa_heads, features, [0, 2]), "tree:2x2x5", 2)
    assert tree.valid.sum(1).tolist() == [1, 5]


def test_lookaheads_plans_are_refused(medusa_heads: MedusaModel) -> None:
    drafter = drafter_that_has_read(medusa_heads, torch.randn(1, 1, HIDDEN, dtype=torch.float64), [1])
    with pytest.raises(ValueError, match="plan: lookahead:WxNxG is for the method lookahead"):
        grow(drafter, "lookahead:3x3x3", 1)


@torch.no_grad()
def test_a_head_is_residual_blocks_and_a_matrix() -> None:
    torch.manual_seed(0)
    model = MedusaModel(MedusaConfig(HIDDEN, VOCAB_SIZE, num_heads=2, num_layers=2)).double()
    weights = dict(model.named_parameters())
    hidden = x = torch.randn(4, HIDDEN, dtype=torch.float64)
    for block in range(2):
        y = x @ weights[f"1.{block}.linear.weight"].T + weights[f"1.{block}.linear.bias"]
        x = x + y * torch.sigmoid(y)
    torch.testing.assert_close(model(hidden)[1], x @ weights["1.2.weight"].T)


class TestTraining:
    CONFIG = TrainConfig(objective="medusa", output="", target="unused", medusa_heads=NUM_HEADS)

    def test_heads_start_as_the_targets_own(self, target: TargetModel) -> None:
        model = new_medusa(self.CONFIG, target).double()
        hidden = torch.randn(5, HIDDEN, dtype=torch.float64)
        for logits in model(hidden):
            torch.testing.assert_close(logits, target.output_head(hidden).float().double())

    @pytest.mark.parametrize("loss", ["kl", "cross_entropy"])
    @pytest.mark.parametrize("given", ["rows", "packed", "stored"])
    def test_loss_and_gradients_equal_a_slow_loop(
        self, target: TargetModel, medusa_heads: MedusaModel, given: str, loss: Loss
    ) -> None:
        """Slot t teaches head k what the target says of x_{t+2+k}, if that token is the model's to say."""
        torch.manual_seed(0)
        ids, mask = torch.randint(1, VOCAB_SIZE, (3, 12)), torch.rand(3, 12) < 0.6
        with torch.no_grad():
            output = target.model(ids, output_hidden_states=True)
        model = copy.deepcopy(medusa_heads)
        expected, accuracies = torch.zeros((), dtype=torch.float64), []
        for k, head in enumerate(model):
            losses, hits = [], []
            for row, t in product(range(3), range(12 - 2 - k)):
                if mask[row, t + 2 + k]:
                    says = output.logits[row, t + 1 + k]
                    taught = says.softmax(-1) if loss == "kl" else nn.functional.one_hot(says.argmax(), VOCAB_SIZE)
                    logits = head(output.hidden_states[-1][row, t])
                    losses.append(-(taught * logits.log_softmax(-1)).sum())
                    hits.append(float(says.argmax() == logits.argmax()))
            expected = expected + 0.8**k * torch.stack(losses).mean()
            accuracies.append(sum(hits) / len(hits))
        gradients = torch.autograd.grad(expected, list(model.parameters()))

        module = MedusaTraining(model, target, dataclasses.replace(self.CONFIG, loss=loss))
        more = {"last_hidden": output.hidden_states[-1]} if given == "stored" else {}
        if given == "packed":
            ids, mask, more = ids.view(1, -1), mask.view(1, -1), {"document_ids": torch.arange(36)[None] // 12}
        result = module(ids, mask, **more)["loss"]
        result.backward()
        torch.testing.assert_close(result, expected)
        torch.testing.assert_close([parameter.grad for parameter in model.parameters()], list(gradients))
        metrics = module.pop_metrics(training=True)
        assert [metrics[f"accuracy_{k}"] for k in range(NUM_HEADS)] == pytest.approx(accuracies)
        assert metrics["tau_sim"] == pytest.approx(1 + sum(accumulate(accuracies, lambda a, b: a * b)))

    def test_a_batch_with_nothing_to_learn_has_no_loss(self, target: TargetModel, medusa_heads: MedusaModel) -> None:
        loss = MedusaTraining(medusa_heads, target, self.CONFIG)(
            torch.ones(2, 4, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.bool)
        )
        assert loss["loss"] == 0
        loss["loss"].backward()

    def test_training_leaves_the_target_alone(self, target: TargetModel) -> None:
        model = new_medusa(self.CONFIG, target).double()
        ids = torch.randint(1, VOCAB_SIZE, (2, 8))
        module = MedusaTraining(model, target, self.CONFIG)
        module(ids, torch.ones_like(ids, dtype=torch.bool))["loss"].backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert all(parameter.grad is None for parameter in target.model.parameters())
        assert set(module.state_dict()) == {f"head.{name}" for name in model.state_dict()}


@pytest.mark.parametrize(
    ("plan", "depth", "expected"),
    [
        (TreePlan.parse("tree:4x8x40"), 3, TreePlan(4, 3, 37)),
        (TreePlan.parse("tree:4x8x20"), 3, TreePlan(4, 3, 20)),
        (TreePlan.chain(2), 3, TreePlan.chain(2)),
        (TreePlan.static(((0,), (1,), (0, 0), (0, 0, 0))), 2, TreePlan.static(((0,), (1,), (0, 0)))),
    ],
    ids=str,
)
def test_plans_are_cut_to_the_heads(plan: TreePlan, depth: int, expected: TreePlan) -> None:
    assert plan.cut_to(depth) == expected


def test_the_papers_tree() -> None:
    plan = TreePlan.parse("medusa")
    assert (plan.num_nodes, plan.depth, [len(level) for level in plan.levels]) == (64, 4, [10, 28, 23, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_packed_heads_draft_as_plain_ones(dtype: torch.dtype, medusa_heads: MedusaModel) -> None:
    """Packing, which `load` does on a CPU, leaves a network without parameters of its own."""
    model = MedusaModel(MedusaConfig(HIDDEN, VOCAB_SIZE, NUM_HEADS)).to(dtype)
    model.load_state_dict(medusa_heads.state_dict())
    features, trees = torch.randn(2, 3, HIDDEN, dtype=dtype), []
    for is_packed in (False, True):
        if is_packed:
            pack_linears(model)
        drafter = MedusaDrafter(model, 2, dtype, torch.device("cpu"))
        drafter.observe(torch.zeros(2, 3, dtype=torch.int64), features, torch.tensor([3, 2]))
        trees.append(grow(drafter, "chain:3", 2))
    torch.testing.assert_close(trees[0].scores, trees[1].scores, atol=0.1, rtol=0.1)
