"""Training-time test: its attention, its loss against a slow loop over slots, and that it trains what drafting runs."""

import copy

import pytest
import torch
from conftest import tiny_llama

from draftwing.checkpoint.load import DraftNetwork
from draftwing.config import TrainConfig
from draftwing.decoding.drafters.eagle import EagleDrafter
from draftwing.decoding.plan import TreePlan
from draftwing.decoding.sampling import uncoupled_rank
from draftwing.models.eagle3 import Eagle3Model
from draftwing.models.target import TargetModel
from draftwing.training.objectives import HeadTraining, draft_mask
from draftwing.training.ttt import TttAttention, shift_left

STEPS = 4
EAGLE3 = TrainConfig(objective="eagle3", output="", target="unused", ttt_steps=STEPS, ttt_decay=0.5)
EAGLE1 = TrainConfig(objective="eagle1", output="", target="unused", token_loss_weight=0.3)


def explicit_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """`[B, H, Q, dim]` queries over `[B, H, K, dim]` keys where `mask [Q, K]` -> `[B, Q, H * dim]`."""
    scores = queries @ keys.transpose(2, 3) / queries.shape[-1] ** 0.5
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values).transpose(1, 2).flatten(2)


def causal_attention(layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """An `Attend` over one plain sequence."""
    groups, length = queries.shape[1] // keys.shape[1], queries.shape[2]
    keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    return explicit_attention(queries, keys, values, torch.ones(length, length, dtype=torch.bool).tril())


def random_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of 14 tokens: one all supervised but its prompt, one with two answers and padding at its end."""
    torch.manual_seed(5)
    input_ids = torch.randint(1, 60, (2, 14))
    loss_mask = torch.tensor([[0] * 4 + [1] * 10, [0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    return input_ids, loss_mask


class TestShiftLeft:
    def test_values(self) -> None:
        assert shift_left(torch.tensor([[1, 2, 3, 4]]), 0).tolist() == [[1, 2, 3, 4]]
        assert shift_left(torch.tensor([[1, 2, 3, 4]]), 1).tolist() == [[2, 3, 4, 0]]
        assert shift_left(torch.tensor([[True, True]]), 1).tolist() == [[True, False]]

    def test_further_axes_move_along(self) -> None:
        assert shift_left(torch.tensor([[[1, 2], [3, 4]]]), 1).tolist() == [[[3, 4], [0, 0]]]

    def test_past_the_end_only_zeros_are_left(self) -> None:
        assert shift_left(torch.tensor([[1, 2]]), 5).shape == (1, 2)
        assert shift_left(torch.tensor([[1, 2]]), 5).tolist() == [[0, 0]]


class TestDraftMask:
    def test_the_example_of_its_docstring(self) -> None:
        """Tokens: user, hi, assistant, yes, sir, end, padding."""
        mask = torch.tensor([[0, 0, 0, 1, 1, 1, 0]], dtype=torch.bool)
        assert draft_mask(mask).int().tolist() == [[0, 1, 1, 1, 0, 0, 0]]

    def test_two_turns(self) -> None:
        mask = torch.tensor([[0, 0, 1, 1, 0, 0, 0, 1, 1]], dtype=torch.bool)
        assert draft_mask(mask).int().tolist() == [[1, 1, 0, 0, 0, 1, 1, 0, 0]]

    def test_the_last_two_slots_have_nothing_to_predict(self) -> None:
        assert draft_mask(torch.ones(1, 5, dtype=torch.bool)).int().tolist() == [[1, 1, 1, 0, 0]]


class TestTttAttention:
    def test_equals_explicit_masks_over_all_keys(self) -> None:
        """Step 0's keys are read causally; of each later step, a slot reads its own key alone."""
        torch.manual_seed(0)
        length, attend = 5, TttAttention()
        steps = [
            (
                torch.randn(2, 4, length, 8, dtype=torch.float64),
                torch.randn(2, 2, length, 8, dtype=torch.float64),
                torch.randn(2, 2, length, 8, dtype=torch.float64),
            )
            for _ in range(3)
        ]
        causal, own = torch.ones(length, length, dtype=torch.bool).tril(), torch.eye(length, dtype=torch.bool)
        for step, (queries, keys, values) in enumerate(steps):
            all_keys = torch.cat([k for _, k, _ in steps[: step + 1]], dim=2).repeat_interleave(2, dim=1)
            all_values = torch.cat([v for _, _, v in steps[: step + 1]], dim=2).repeat_interleave(2, dim=1)
            mask = torch.cat([causal] + [own] * step, dim=1)
            expected = explicit_attention(queries, all_keys, all_values, mask)
            torch.testing.assert_close(attend(0, queries, keys, values), expected, rtol=1e-5, atol=1e-6)

    def test_layers_remember_apart(self) -> None:
        torch.manual_seed(0)
        first, second = torch.randn(2, 1, 1, 3, 4, dtype=torch.float64)
        attend = TttAttention()
        attend(0, first, first, first)
        alone = TttAttention()(1, second, second, second)
        assert torch.equal(attend(1, second, second, second), alone)


class SlowSlot:
    """Drafting from one slot of one row, step after step, without a cache: the rows of the table in training/ttt.py."""

    def __init__(self, head: DraftNetwork, features: torch.Tensor, tokens: torch.Tensor, slot: int) -> None:
        self._head, self._tokens, self._slot = head, tokens, slot
        self._hidden = head.fuse(features[: slot + 1])

    def logits(self, step: int) -> torch.Tensor:
        """Draft logits of x_{slot + 2 + step}; steps are to be asked for in order."""
        length = self._slot + 1 + step
        read = self._tokens[1 : length + 1]  # slot t reads x_{t+1}; step j of this slot reads x_{slot+1+j}
        positions = torch.arange(length)
        output = self._head(self._hidden[None], read[None], positions[None], causal_attention)[0, -1]
        self._hidden = torch.cat((self._hidden, self._head.feed_back(output)[None]))
        return self._head.logits(output)


class TestEagle3Loss:
    @torch.no_grad()
    def test_equals_a_slow_loop_over_slots(self, target: TargetModel, heads: dict[str, DraftNetwork]) -> None:
        head, (input_ids, loss_mask) = heads["eagle3"], random_batch()
        output = target.model(input_ids=input_ids, use_cache=False, output_hidden_states=True)
        features = torch.cat([output.hidden_states[layer] for layer in head.config.feature_layers], dim=-1)
        draft_ids = head.vocab.target_ids
        assert draft_ids is not None
        assert len(draft_ids) < target.vocab_size
        length = input_ids.shape[1]
        losses: list[list[float]] = [[] for _ in range(STEPS)]
        hits: list[list[bool]] = [[] for _ in range(STEPS)]
        for row in range(2):
            for slot in range(length - 2):
                slow = SlowSlot(head, features[row], input_ids[row], slot)
                for step in range(min(STEPS, length - 2 - slot)):
                    log_q = slow.logits(step).log_softmax(-1)
                    if not loss_mask[row, slot + 2 + step]:
                        continue
                    said = output.logits[row, slot + 1 + step]  # the target's distribution of x_{slot + 2 + step}
                    hits[step].append(int(draft_ids[log_q.argmax()]) == int(said.argmax()))
                    is_drafted = said.argmax() in draft_ids  # else it is supervised by nothing, but counts
                    loss = -(said[draft_ids].softmax(-1) * log_q).sum().item()
                    losses[step].append(loss if is_drafted else 0.0)
        means = [sum(values) / len(values) for values in losses]

        training = HeadTraining(head, target, EAGLE3)
        loss = training(input_ids, loss_mask)["loss"].item()
        assert loss == pytest.approx(sum(0.5**step * mean for step, mean in enumerate(means)), rel=1e-5)
        metrics = training.pop_metrics(training=True)
        for step in range(STEPS):
            assert metrics[f"loss_{step}"] == pytest.approx(means[step], rel=1e-5)
            assert metrics[f"accuracy_{step}"] == pytest.approx(sum(hits[step]) / len(hits[step]))

    @torch.no_grad()
    def test_padding_and_unsupervised_tails_do_not_matter(
        self, target: TargetModel, heads: dict[str, DraftNetwork]
    ) -> None:
        input_ids, loss_mask = random_batch()
        training = HeadTraining(heads["eagle3"], target, EAGLE3)
        loss = training(input_ids, loss_mask)["loss"]
        other_padding = input_ids.clone()
        other_padding[1, 10:] = 63
        torch.testing.assert_close(training(other_padding, loss_mask)["loss"], loss)
        longer = torch.cat((input_ids, input_ids[:, :5]), dim=1)
        longer_mask = torch.cat((loss_mask, torch.zeros(2, 5, dtype=torch.bool)), dim=1)
        torch.testing.assert_close(training(longer, longer_mask)["loss"], loss)

    def test_gradients_flow_back_through_all_steps(self, target: TargetModel, heads: dict[str, DraftNetwork]) -> None:
        """The gradient of `fc`, which acts in step 0 alone, equals finite differences: no step is detached."""
        head = copy.deepcopy(heads["eagle3"])
        assert isinstance(head, Eagle3Model)
        head.zero_grad()
        training, batch = HeadTraining(head, target, EAGLE3), random_batch()
        training(*batch)["loss"].backward()
        gradient = head.fc.weight.grad
        assert gradient is not None
        step = 1e-3 * gradient / gradient.norm()
        with torch.no_grad():
            head.fc.weight += step
            above = training(*batch)["loss"].item()
            head.fc.weight -= 2 * step
            below = training(*batch)["loss"].item()
        assert (above - below) / 2e-3 == pytest.approx(gradient.norm().item(), rel=1e-3)

    @pytest.mark.parametrize("method", ["eagle1", "eagle3"])
    @torch.no_grad()
    def test_batches_split_over_processes_add_up(
        self, target: TargetModel, heads: dict[str, DraftNetwork], method: str
    ) -> None:
        """With the slots of all of them counted; a mean of their own means is another number."""
        training = HeadTraining(heads[method], target, EAGLE1 if method == "eagle1" else EAGLE3).eval()
        input_ids, loss_mask = random_batch()
        whole = training(input_ids, loss_mask)["loss"]
        num_slots = training.count_slots(loss_mask)
        rows = [(input_ids[row : row + 1], loss_mask[row : row + 1]) for row in range(2)]
        parts = [training(*row, num_items_in_batch=num_slots)["loss"] for row in rows]
        torch.testing.assert_close(parts[0] + parts[1], whole)
        means = [training(*row)["loss"] for row in rows]
        assert abs((means[0] + means[1]) / 2 - whole) > 1e-3

    @pytest.mark.parametrize("method", ["eagle1", "eagle3"])
    def test_the_target_is_frozen(self, target: TargetModel, heads: dict[str, DraftNetwork], method: str) -> None:
        target.model.zero_grad()
        training = HeadTraining(heads[method], target, EAGLE1 if method == "eagle1" else EAGLE3)
        training(*random_batch())["loss"].backward()
        heads[method].zero_grad()
        assert [name for name, p in target.model.named_parameters() if p.grad is not None] == []


@pytest.mark.parametrize("slot", [2, 6])
@torch.no_grad()
def test_training_computes_what_drafting_computes(
    target: TargetModel, heads: dict[str, DraftNetwork], slot: int
) -> None:
    """Step j at slot t, on the drafted tokens, has the logits that the drafter had at depth j + 1 below slot t."""
    head = heads["eagle3"]
    observed = random_batch()[0][:1, : slot + 2]  # slots <= t have read x_0 .. x_{t+1}
    output = target.model(input_ids=observed, use_cache=False, output_hidden_states=True)
    features = torch.cat([output.hidden_states[layer] for layer in head.config.feature_layers], dim=-1)
    drafter = EagleDrafter(head, 1, 40, torch.float64, torch.device("cpu"))
    drafter.observe(observed[:, 1:], features[:, :-1], torch.tensor([slot + 1]))
    tree = drafter.grow(observed[:, -1], TreePlan.chain(STEPS), longest=slot + 1, rank=uncoupled_rank)

    recorded: list[torch.Tensor] = []
    recorder = copy.copy(head)
    object.__setattr__(recorder, "logits", lambda output: recorded.append(head.logits(output)) or recorded[-1])
    sequence = torch.cat((observed, tree.tokens[:, 1:], torch.tensor([[1, 2]])), dim=1)
    HeadTraining(recorder, target, EAGLE3)(sequence, torch.ones_like(sequence, dtype=torch.bool))
    assert len(recorded) == STEPS
    score = 0.0
    for step, logits in enumerate(recorded):
        log_probs = logits[0, slot].log_softmax(-1)
        assert head.vocab.to_target(log_probs.argmax()) == tree.tokens[0, step + 1]
        score += log_probs.max().item()
        assert tree.scores[0, step + 1].item() == pytest.approx(score, abs=1e-4)


class TestEagle1Loss:
    @torch.no_grad()
    def test_equals_a_slow_loop_over_slots(self, target: TargetModel, heads: dict[str, DraftNetwork]) -> None:
        head, (input_ids, loss_mask) = heads["eagle1"].eval(), random_batch()
        output = target.model(input_ids=input_ids, use_cache=False, output_hidden_states=True)
        features = output.hidden_states[-1]
        regressions, cross_entropies = [], []
        for row in range(2):
            for slot in range(input_ids.shape[1] - 2):
                if not loss_mask[row, slot + 2]:
                    continue
                predicted = head(
                    features[row : row + 1, : slot + 1],
                    input_ids[row : row + 1, 1 : slot + 2],
                    torch.arange(slot + 1)[None],
                    causal_attention,
                )[0, -1]
                gap = (predicted - features[row, slot + 1]).abs()
                regressions.append(torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean().item())
                teacher = output.logits[row, slot + 1].softmax(-1)
                log_q = target.output_head(predicted).log_softmax(-1)
                cross_entropies.append(-(teacher * log_q).sum().item())
        expected = sum(regressions) / len(regressions) + 0.3 * sum(cross_entropies) / len(cross_entropies)
        training = HeadTraining(head, target, EAGLE1).eval()
        assert training(input_ids, loss_mask)["loss"].item() == pytest.approx(expected, rel=1e-5)

    @torch.no_grad()
    def test_noise_is_added_in_training_only(self, target: TargetModel, heads: dict[str, DraftNetwork]) -> None:
        training, batch = HeadTraining(copy.deepcopy(heads["eagle1"]), target, EAGLE1), random_batch()
        torch.manual_seed(0)
        noisy = [training.train()(*batch)["loss"].item() for _ in range(2)]
        quiet = [training.eval()(*batch)["loss"].item() for _ in range(2)]
        assert noisy[0] != noisy[1]
        assert quiet[0] == quiet[1]


class TestMetrics:
    @torch.no_grad()
    def test_tau_sim_multiplies_the_steps_accuracies(self, target: TargetModel, heads: dict[str, DraftNetwork]) -> None:
        training = HeadTraining(heads["eagle3"], target, EAGLE3)
        training(*random_batch())
        metrics = training.pop_metrics(training=True)
        a, b, c, d = (metrics[f"accuracy_{step}"] for step in range(STEPS))
        assert metrics["tau_sim"] == pytest.approx(1 + a + a * b + a * b * c + a * b * c * d)

    @torch.no_grad()
    def test_they_are_means_over_the_slots_since_the_last_call(
        self, target: TargetModel, heads: dict[str, DraftNetwork]
    ) -> None:
        """In whatever batches the slots came: as the loss of all of them in one."""
        training, (input_ids, loss_mask) = HeadTraining(heads["eagle3"], target, EAGLE3), random_batch()
        whole = training(input_ids, loss_mask)["loss"].item()
        assert training.pop_metrics(training=True)["loss"] == pytest.approx(whole)
        for row in range(2):
            training(input_ids[row : row + 1], loss_mask[row : row + 1])
        assert training.pop_metrics(training=True)["loss"] == pytest.approx(whole)
        assert training.pop_metrics(training=True) == {}

    @torch.no_grad()
    def test_they_are_reduced_over_processes(self, target: TargetModel, heads: dict[str, DraftNetwork]) -> None:
        training, (input_ids, loss_mask) = HeadTraining(heads["eagle1"].eval(), target, EAGLE1).eval(), random_batch()
        whole = training(input_ids, loss_mask)["loss"].item()
        training.pop_metrics(training=False)
        training(input_ids[:1], loss_mask[:1])
        others: list[torch.Tensor] = []
        training.pop_metrics(training=False, reduce=lambda sums: others.append(sums) or sums)
        training(input_ids[1:], loss_mask[1:])
        metrics = training.pop_metrics(training=False, reduce=lambda sums: sums + others[0])
        assert metrics["loss"] == pytest.approx(whole)

    @torch.no_grad()
    def test_tau_sim_takes_more_than_ten_steps_in_order(self, heads: dict[str, DraftNetwork]) -> None:
        config = TrainConfig(objective="eagle3", output="", target="unused", ttt_steps=12)
        training = HeadTraining(heads["eagle3"], TargetModel(tiny_llama()), config)
        for step in range(12):
            training._sums[True][f"accuracy_{step}"] = torch.tensor([12 - step, 12])
        product, tau = 1.0, 1.0
        for step in range(12):
            product *= 1 - step / 12
            tau += product
        assert training.pop_metrics(training=True)["tau_sim"] == pytest.approx(tau)
