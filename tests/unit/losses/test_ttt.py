"""Training-time test: its attention, its loss against a slow loop over slots, and that it trains what drafting runs."""

import copy
import dataclasses
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import head_training, new_head, tiny_llama
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

from draftwing.config import Loss, TrainConfig
from draftwing.drafts.eagle import objective
from draftwing.drafts.eagle.drafter import EagleDrafter
from draftwing.drafts.eagle.network import DraftNetwork, Eagle3Model
from draftwing.drafts.head_loss import HeadLoss
from draftwing.engine.sampling import uncoupled_rank
from draftwing.engine.tree_plan import TreePlan
from draftwing.losses.slot_losses import feature_regression
from draftwing.losses.slots import SupervisedSlots, document_positions
from draftwing.losses.ttt import TttAttention, block_mask, flex_merged_attention, shift_left
from draftwing.target.model import TargetModel

STEPS = 4
EAGLE3 = TrainConfig(objective="eagle3", output="", target="unused", ttt_steps=STEPS, ttt_decay=0.5)
EAGLE1 = TrainConfig(objective="eagle1", output="", target="unused", token_loss_weight=0.3)
CONFIGS = {"eagle1": EAGLE1, "eagle3": EAGLE3}


@pytest.fixture(scope="module")
def target(stock_target: TargetModel) -> TargetModel:
    """Training reads its weights."""
    return stock_target


def explicit_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """`[B, H, Q, dim]` queries over `[B, H, K, dim]` keys where `mask [..., Q, K]` -> `[B, Q, H, dim]`."""
    scores = queries @ keys.transpose(2, 3) / queries.shape[-1] ** 0.5
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values).transpose(1, 2)


def causal_attention(layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """An `Attend` over one plain sequence."""
    groups, length = queries.shape[1] // keys.shape[1], queries.shape[2]
    keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    return explicit_attention(queries, keys, values, torch.ones(length, length, dtype=torch.bool).tril())


def random_steps(length: int, width: int = 8) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Queries of 4 heads, keys and values of 2, of three steps of two rows."""
    torch.manual_seed(0)
    shapes = [(2, 4, length, width), (2, 2, length, width), (2, 2, length, width)]
    return [tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes) for _ in range(3)]  # type: ignore[misc]


def explicit_steps(steps: Sequence[Sequence[torch.Tensor]], documents: torch.Tensor | None) -> list[torch.Tensor]:
    """The attention of each step by one matrix of scores over all steps' keys and one mask."""
    length = steps[0][0].shape[2]
    everywhere = torch.ones(2, length, length, dtype=torch.bool, device=steps[0][0].device)
    causal, own = everywhere.tril(), torch.eye(length, dtype=torch.bool, device=everywhere.device)
    if documents is not None:
        causal &= documents[:, :, None] == documents[:, None, :]
    outputs = []
    for step, (queries, _, _) in enumerate(steps):
        keys = torch.cat([k for _, k, _ in steps[: step + 1]], dim=2).repeat_interleave(2, dim=1)
        values = torch.cat([v for _, _, v in steps[: step + 1]], dim=2).repeat_interleave(2, dim=1)
        mask = torch.cat([causal] + [own.expand(2, -1, -1)] * step, dim=2)
        outputs.append(explicit_attention(queries, keys, values, mask[:, None]))
    return outputs


def flex_steps(steps: Sequence[Sequence[torch.Tensor]], mask: Any, attend: Any) -> list[torch.Tensor]:
    """The attention of each step as on CUDA."""
    outputs = [
        flex_merged_attention(queries, steps[0][1:], [own[1:] for own in steps[1 : step + 1]], mask, attend)  # type: ignore[misc, arg-type]
        for step, (queries, _, _) in enumerate(steps)
    ]
    return [output.transpose(1, 2) for output in outputs]


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


class TestTttAttention:
    @pytest.mark.parametrize("documents", [None, [[0, 0, 0, 1, 1], [0, 1, 1, 1, -1]]])
    def test_equals_explicit_masks_over_all_keys(self, documents: list[list[int]] | None) -> None:
        """Step 0's keys are read causally in a document; of each later step, a slot reads its own key alone."""
        steps = random_steps(5)
        ids = None if documents is None else torch.tensor(documents)
        expected, inputs = explicit_steps(steps, ids), [x for step in steps for x in step]
        attend = TttAttention(ids)
        outputs = [attend(0, *step) for step in steps]
        torch.testing.assert_close(outputs, expected)
        upstream = [torch.randn_like(output) for output in outputs]
        torch.testing.assert_close(
            torch.autograd.grad(outputs, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
        )

    @pytest.mark.parametrize("documents", [None, [[0, 0, 0, 1, 1], [0, 1, 1, 1, -1]]])
    def test_flex_attention_is_merged_alike(self, documents: list[list[int]] | None) -> None:
        """What runs on CUDA, here by the plain implementation of flex attention."""
        steps = [tuple(x.float().detach() for x in step) for step in random_steps(5)]
        ids = None if documents is None else torch.tensor(documents)
        mask = block_mask(ids, 5, torch.device("cpu"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # flex attention warns that it is not compiled
            outputs = flex_steps(steps, mask, flex_attention)
        torch.testing.assert_close(outputs, explicit_steps(steps, ids))

    def test_gradients_of_the_merger_with_flex_attention(self) -> None:
        """With an attention in its place that autograd differentiates, its logsumexp too."""

        def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **_: Any) -> Any:
            keys, values = keys.repeat_interleave(2, dim=1), values.repeat_interleave(2, dim=1)
            scores = queries @ keys.transpose(2, 3) / queries.shape[-1] ** 0.5
            scores = scores.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf)
            return scores.softmax(-1) @ values, SimpleNamespace(lse=scores.logsumexp(-1))

        steps = random_steps(5)
        inputs = [x for step in steps for x in step]
        outputs, expected = flex_steps(steps, None, attend), explicit_steps(steps, None)
        upstream = [torch.randn_like(output) for output in outputs]
        torch.testing.assert_close(
            torch.autograd.grad(outputs, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
        )

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @pytest.mark.parametrize("documents", [None, [[0] * 100 + [1] * 60, [0] * 30 + [1] * 120 + [-1] * 10]])
    def test_on_a_gpu(self, documents: list[list[int]] | None) -> None:
        ids = None if documents is None else torch.tensor(documents, device="cuda")
        wide = [[x.detach().cuda().requires_grad_() for x in step] for step in random_steps(160, width=64)]
        steps = [[x.detach().bfloat16().requires_grad_() for x in step] for step in wide]
        attend = TttAttention(ids)
        outputs, expected = [attend(0, *step) for step in steps], explicit_steps(wide, ids)
        upstream = [torch.randn_like(output) for output in expected]
        inputs, exact = [x for step in steps for x in step], [x for step in wide for x in step]
        actual = [*outputs, *torch.autograd.grad(outputs, inputs, [x.bfloat16() for x in upstream])]
        for x, y in zip(actual, [*expected, *torch.autograd.grad(expected, exact, upstream)], strict=True):
            assert (x.double() - y).norm() < 0.02 * y.norm()

    def test_no_scores_are_kept_for_the_backward_pass(self) -> None:
        length = 64
        kept: list[int] = []
        attend = TttAttention(torch.zeros(2, length, dtype=torch.int64))
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            for step in random_steps(length):
                attend(0, *step)
        assert max(kept) == 2 * 4 * length * 8  # the queries; the scores of one step have 2 * 4 * length * length

    def test_bf16_follows_the_values_dtype(self) -> None:
        """Under autocast queries and keys come in float32, rotated, and values in bf16."""
        (queries, keys, values), *_ = random_steps(5)
        output = TttAttention()(0, queries.float(), keys.float(), values.bfloat16())
        assert output.dtype == torch.bfloat16

    def test_layers_remember_apart(self) -> None:
        torch.manual_seed(0)
        first, second = torch.randn(2, 1, 1, 3, 4, dtype=torch.float64)
        attend = TttAttention()
        attend(0, first, first, first)
        alone = TttAttention()(1, second, second, second)
        assert torch.equal(attend(1, second, second, second), alone)


class SlowSlot:
    """Drafting from one slot of one row, step after step, without a cache: the rows of the table in losses/ttt.py."""

    def __init__(self, head: DraftNetwork, features: torch.Tensor, tokens: torch.Tensor, slot: int) -> None:
        self._head, self._tokens, self._slot = head, tokens, slot
        self.hidden = head.project(features[: slot + 1])

    def logits(self, step: int) -> torch.Tensor:
        """Draft logits of x_{slot + 2 + step}; steps are to be asked for in order."""
        length = self._slot + 1 + step
        read = self._tokens[1 : length + 1]  # slot t reads x_{t+1}; step j of this slot reads x_{slot+1+j}
        positions = torch.arange(length)
        output = self._head(self.hidden[None], read[None], positions[None], causal_attention)[0, -1]
        self.hidden = torch.cat((self.hidden, self._head.feed_back(output)[None]))
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

        training = head_training(head, target, EAGLE3)
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
        training = head_training(heads["eagle3"], target, EAGLE3)
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
        training, batch = head_training(head, target, EAGLE3), random_batch()
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
        training = head_training(heads[method], target, EAGLE1 if method == "eagle1" else EAGLE3).eval()
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
        training = head_training(heads[method], target, EAGLE1 if method == "eagle1" else EAGLE3)
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
    drafter = EagleDrafter(head, 1, 40)
    drafter.observe(observed[:, 1:], features[:, :-1], torch.tensor([slot + 1]))
    drafter.catch_up(slot + 1)
    tree = drafter.grow(observed[:, -1], TreePlan.chain(STEPS), rank=uncoupled_rank)

    recorded: list[torch.Tensor] = []
    recorder = copy.copy(head)
    object.__setattr__(recorder, "readout", lambda output: recorded.append(head.logits(output)) or head.readout(output))
    sequence = torch.cat((observed, tree.tokens[:, 1:], torch.tensor([[1, 2]])), dim=1)
    mask = torch.ones_like(sequence, dtype=torch.bool)
    head_training(recorder, target, EAGLE3)(sequence, mask)
    assert len(recorded) == STEPS
    slots = SupervisedSlots.of(mask, torch.arange(sequence.shape[1])[None])
    score = 0.0
    for step, logits in enumerate(recorded):
        row = int((slots.student(step) == slot).nonzero()[-1])
        log_probs = logits[row].log_softmax(-1)
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
        training = head_training(head, target, EAGLE1).eval()
        assert training(input_ids, loss_mask)["loss"].item() == pytest.approx(expected, rel=1e-5)

    @torch.no_grad()
    def test_further_steps_read_their_own_features(self, target: TargetModel, heads: dict[str, DraftNetwork]) -> None:
        """As SlowSlot drafts: `feature_steps`, each with its regression and cross-entropy."""
        head, (input_ids, loss_mask) = heads["eagle1"].eval(), random_batch()
        output = target.model(input_ids=input_ids, use_cache=False, output_hidden_states=True)
        features, steps, totals, counts = output.hidden_states[-1], 3, [0.0] * 3, [0] * 3
        for row in range(2):
            for slot in range(input_ids.shape[1] - 2):
                slow = SlowSlot(head, features[row], input_ids[row], slot)
                for step in range(min(steps, input_ids.shape[1] - 2 - slot)):
                    log_q = slow.logits(step).log_softmax(-1)
                    if loss_mask[row, slot + 2 + step]:
                        teacher = slot + 1 + step
                        totals[step] -= 0.3 * (output.logits[row, teacher].softmax(-1) * log_q).sum().item()
                        totals[step] += feature_regression(slow.hidden[-1], features[row, teacher]).item()
                        counts[step] += 1
        config = dataclasses.replace(EAGLE1, feature_steps=steps, ttt_decay=0.5)
        training = head_training(head, target, config).eval()
        expected = sum(0.5**step * totals[step] / counts[step] for step in range(steps))
        assert training(input_ids, loss_mask)["loss"].item() == pytest.approx(expected, rel=1e-5)
        assert training.pop_metrics(training=False)["loss"] == pytest.approx(expected, rel=1e-5)

    @torch.no_grad()
    def test_noise_is_added_in_training_only(self, target: TargetModel, heads: dict[str, DraftNetwork]) -> None:
        training, batch = head_training(copy.deepcopy(heads["eagle1"]), target, EAGLE1), random_batch()
        torch.manual_seed(0)
        noisy = [training.train()(*batch)["loss"].item() for _ in range(2)]
        quiet = [training.eval()(*batch)["loss"].item() for _ in range(2)]
        assert noisy[0] != noisy[1]
        assert quiet[0] == quiet[1]


ROWS = [[5, 9, 3, 17, 8, 2, 40, 11], [7, 7], [30, 2, 19, 4, 55, 23, 6], [12], [1, 2, 3, 4]]
"""Five documents, one of a single token."""
PACKED = [[0, 1, 2], [3, 4]]
"""Which documents lie in which packed row; the second is padded."""


def as_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """The documents in rows of their own: ids and loss mask (the first two tokens are a prompt)."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ROWS], batch_first=True)
    lengths = torch.tensor([[len(row)] for row in ROWS])
    slots = torch.arange(ids.shape[1])
    return ids, (slots >= 2) & (slots < lengths)


def as_packed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same, packed: ids, loss mask, document ids."""
    ids, mask = as_rows()
    packed: list[list[torch.Tensor]] = [[], [], []]
    for members in PACKED:
        packed[0].append(torch.cat([ids[row][: len(ROWS[row])] for row in members]))
        packed[1].append(torch.cat([mask[row][: len(ROWS[row])] for row in members]))
        packed[2].append(torch.cat([torch.full((len(ROWS[row]),), n) for n, row in enumerate(members)]))
    fill = (63, False, -1)
    parts = (nn.utils.rnn.pad_sequence(x, batch_first=True, padding_value=f) for x, f in zip(packed, fill, strict=True))
    return tuple(parts)  # type: ignore[return-value]


def loss_and_gradients(training: HeadLoss, *batch: torch.Tensor, **more: torch.Tensor) -> list[torch.Tensor]:
    training.head.zero_grad()
    loss = training(*batch, **more)["loss"]
    loss.backward()
    gradients = [p.grad for p in training.head.parameters() if p.grad is not None]
    assert len(gradients) > 5
    return [loss.detach(), *gradients]


def target_with(attention: str, **options: Any) -> TargetModel:
    model = tiny_llama(**options)
    model.set_attn_implementation(attention)
    return TargetModel(model)


class TestPacking:
    @pytest.mark.parametrize("attention", ["draftwing", "sdpa", "eager"])
    @pytest.mark.parametrize("method", ["eagle1", "eagle3"])
    def test_equals_documents_in_rows_of_their_own(
        self, heads: dict[str, DraftNetwork], method: str, attention: str
    ) -> None:
        training = head_training(copy.deepcopy(heads[method]), target_with(attention), CONFIGS[method]).eval()
        expected = loss_and_gradients(training, *as_rows())
        assert expected[0] > 0
        alone = training.pop_metrics(training=False)
        actual = loss_and_gradients(training, *as_packed())
        torch.testing.assert_close(actual, expected)
        assert training.pop_metrics(training=False) == pytest.approx(alone)
        _, mask, documents = as_packed()
        assert training.count_slots(mask, documents).tolist() == training.count_slots(as_rows()[1]).tolist()

    @pytest.mark.parametrize(
        "sabotage", ["target reads across", "head reads across", "steps cross", "nothing restarts"]
    )
    def test_crossing_documents_is_noticed(
        self, target: TargetModel, heads: dict[str, DraftNetwork], monkeypatch: pytest.MonkeyPatch, sabotage: str
    ) -> None:
        training = head_training(copy.deepcopy(heads["eagle3"]), target, EAGLE3)
        expected, packed = loss_and_gradients(training, *as_rows())[0], as_packed()
        plain = torch.arange(packed[0].shape[1]).expand_as(packed[0])
        if sabotage == "target reads across":
            read = target.read_rows
            monkeypatch.setattr(target, "read_rows", lambda ids, layers, *_: read(ids, layers))
        elif sabotage == "head reads across":
            monkeypatch.setattr(objective, "TttAttention", lambda documents: TttAttention())
        elif sabotage == "steps cross":
            of = SupervisedSlots.of
            monkeypatch.setattr(SupervisedSlots, "of", lambda mask, positions: of(mask, plain))
        else:
            packed = packed[:2]  # type: ignore[assignment]
        assert loss_and_gradients(training, *packed)[0].item() != pytest.approx(expected.item(), rel=1e-3)

    def test_sliding_windows_count_positions(self) -> None:
        torch.manual_seed(0)
        config = MistralConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=3, initializer_range=0.25, attn_implementation="draftwing",
        )  # fmt: skip
        model = TargetModel(MistralForCausalLM(config).double().eval())
        ids, _ = as_rows()
        packed_ids, _, documents = as_packed()
        alone = model.read_rows(ids, (1, -1))
        packed = model.read_rows(packed_ids, (1, -1), document_positions(documents, documents), documents)
        for row, members in enumerate(PACKED):
            length = sum(len(ROWS[member]) for member in members)
            expected = torch.cat([alone.features[member][: len(ROWS[member])] for member in members])
            torch.testing.assert_close(packed.features[row, :length], expected)

    def test_given_features_replace_the_target(self, target: TargetModel, heads: dict[str, DraftNetwork]) -> None:
        for method, head in heads.items():
            training = head_training(copy.deepcopy(head), target, CONFIGS[method]).eval()
            ids, mask, documents = as_packed()
            layers = head.config.feature_layers
            states = target.read_rows(ids, layers, document_positions(documents, documents), documents)
            expected = loss_and_gradients(training, ids, mask, documents)
            given = {"document_ids": documents, "features": states.features, "last_hidden": states.last_hidden}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(target, "read_rows", None)
                torch.testing.assert_close(loss_and_gradients(training, ids, mask, **given), expected, rtol=0, atol=0)


class TestLosses:
    @pytest.mark.parametrize("loss", ["cross_entropy", "lk"])
    @pytest.mark.parametrize("method", ["eagle1", "eagle3"])
    def test_gradients_equal_finite_differences(
        self, target: TargetModel, heads: dict[str, DraftNetwork], method: str, loss: Loss
    ) -> None:
        """For lk with lambda held: eta = 0 is KL, a large one the acceptance rate."""
        for eta in (0.0, 1e9) if loss == "lk" else (3.0,):
            head = copy.deepcopy(heads[method])
            config = dataclasses.replace(CONFIGS[method], loss=loss, lk_decay=eta)
            training = head_training(head, target, config).eval()
            loss_and_gradients(training, *random_batch())
            gradient = head.fc.weight.grad.clone()
            step = 1e-6 * gradient / gradient.norm()  # short, as minima have kinks
            with torch.no_grad():
                head.fc.weight += step
                above = training(*random_batch())["loss"].item()
                head.fc.weight -= 2 * step
                below = training(*random_batch())["loss"].item()
            assert (above - below) / 2e-6 == pytest.approx(gradient.norm().item(), rel=1e-3)

    @pytest.mark.parametrize("loss", ["kl", "cross_entropy", "lk"])
    def test_training_raises_the_acceptance_rate(
        self, target: TargetModel, heads: dict[str, DraftNetwork], loss: Loss
    ) -> None:
        head = copy.deepcopy(heads["eagle3"])
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        training = head_training(head, target, dataclasses.replace(EAGLE3, loss=loss))
        optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
        rates = []
        for _ in range(12):
            optimizer.zero_grad()
            training(*random_batch())["loss"].backward()
            optimizer.step()
            rates.append(training.pop_metrics(training=True)["acceptance_rate_0"])
        assert rates[-1] > rates[0] + 0.1


class TestOptions:
    def test_eagle31_feeds_back_the_normed_output(self, target: TargetModel) -> None:
        """`fc_norm` and `norm_output` in `architecture`; the state of step 1 has been through the norm."""
        config = dataclasses.replace(EAGLE3, aux_layers=(1, 3, 5), architecture={"fc_norm": True, "norm_output": True})
        torch.manual_seed(0)
        head = new_head(config, target, []).double()
        assert isinstance(head, Eagle3Model)
        assert len(head.fc_norm) == 3
        read: list[torch.Tensor] = []
        outputs: list[torch.Tensor] = []
        head.midlayer.register_forward_hook(
            lambda _, inputs, output: (read.append(inputs[1]), outputs.append(output))[0]
        )
        loss_and_gradients(head_training(head, target, config), *random_batch())
        for step in range(1, STEPS):
            torch.testing.assert_close(read[step], head.norm(outputs[step - 1]))
            assert not torch.allclose(read[step], outputs[step - 1])

    @pytest.mark.parametrize("config", [EAGLE1, dataclasses.replace(EAGLE3, aux_layers=(1, 3, 5))])
    @pytest.mark.parametrize("trains", [False, True])
    def test_an_embedding_of_its_own_is_trained_if_asked(
        self, target: TargetModel, config: TrainConfig, trains: bool
    ) -> None:
        """Otherwise the head reads the target's, which is never trained."""
        config = dataclasses.replace(config, train_embedding=trains)
        head = new_head(config, target, []).double()
        assert hasattr(head, "embed_tokens") == trains
        if trains:
            assert torch.equal(head.get_parameter("embed_tokens.weight"), target.embedding.weight), (
                "it starts as a copy"
            )
        head_training(head, target, config)(*random_batch())["loss"].backward()
        if trains:
            assert head.get_parameter("embed_tokens.weight").grad is not None
        assert target.embedding.weight.grad is None

    def test_a_copy_of_a_scaled_embedding_is_scaled(self, target: TargetModel, monkeypatch: pytest.MonkeyPatch) -> None:
        """As Gemma 3's, which scales what it looks up."""

        class Scaled(torch.nn.Embedding):
            def forward(self, tokens: torch.Tensor) -> torch.Tensor:
                return super().forward(tokens) * 4

        embedding = Scaled(*target.embedding.weight.shape).double()
        monkeypatch.setattr(target.model, "get_input_embeddings", lambda: embedding)
        heads = [new_head(dataclasses.replace(EAGLE1, train_embedding=trains), target, []) for trains in (False, True)]
        tokens = torch.arange(20).view(2, 10)
        shared, copied = (head.double().embed(tokens, torch.float64) for head in heads)
        torch.testing.assert_close(copied, shared)

    def test_a_window_that_training_would_not_apply_is_refused(self, target: TargetModel) -> None:
        config = dataclasses.replace(EAGLE1, architecture={"sliding_window": 40}, sequence_length=40)
        assert new_head(config, target, []).config.sliding_window == 40
        with pytest.raises(ValueError, match=r"architecture.sliding_window: training reads whole rows, .* got 40"):
            new_head(dataclasses.replace(config, sequence_length=41), target, [])

    def test_medusa_heads_read_no_embedding(self) -> None:
        with pytest.raises(ValueError, match="train_embedding: is for an EAGLE head"):
            dataclasses.replace(EAGLE3, objective="medusa", train_embedding=True)

    def test_a_capped_target_teaches_capped_logits(self, heads: dict[str, DraftNetwork]) -> None:
        capped = gemma2()
        model, (ids, mask) = TargetModel(capped), random_batch()
        hidden = model.read_rows(ids, (-1,)).last_hidden
        expected = capped(input_ids=ids).logits
        torch.testing.assert_close(model.logits(hidden), expected)
        torch.testing.assert_close(new_head(EAGLE1, model, []).double().logits(hidden), expected)
        config = dataclasses.replace(EAGLE3, ttt_steps=1, aux_layers=(0, 1, 2))
        head = new_head(config, model, []).double()
        training = head_training(head, model, config)
        loss = training(ids, mask)["loss"].item()
        features = model.read_rows(ids, (0, 1, 2)).features
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        log_q = head.logits(head(head.project(features), shift_left(ids, 1), positions, causal_attention)).log_softmax(
            -1
        )
        losses = -(shift_left(expected, 1).softmax(-1) * log_q).sum(-1)
        assert loss == pytest.approx(losses[shift_left(mask, 2)].mean().item(), rel=1e-5)

    def test_logits_changed_in_an_unknown_way_are_refused(self, heads: dict[str, DraftNetwork]) -> None:
        model = tiny_llama()
        target = TargetModel(model)
        target.check_logits()
        model.register_forward_hook(lambda module, inputs, output: setattr(output, "logits", 3 * output.logits))
        with pytest.raises(ValueError, match="target: LlamaForCausalLM changes its logits"):
            head_training(heads["eagle3"], target, EAGLE3)(*random_batch())

    def test_a_row_longer_than_the_heads_positions(self, target: TargetModel) -> None:
        config = dataclasses.replace(EAGLE3, aux_layers=(1, 3, 5), architecture={"max_position_embeddings": 8})
        training = head_training(new_head(config, target, []).double(), target, config)
        assert training(*random_batch())["loss"] > 0


def gemma2() -> Gemma2ForCausalLM:
    """A tiny Gemma 2, whose logits are capped."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0, initializer_range=0.5,
        attn_implementation="draftwing",
    )  # fmt: skip
    return Gemma2ForCausalLM(config).double().eval()


class TestMetrics:
    @torch.no_grad()
    def test_tau_sim_multiplies_the_steps_accuracies(self, target: TargetModel, heads: dict[str, DraftNetwork]) -> None:
        training = head_training(heads["eagle3"], target, EAGLE3)
        training(*random_batch())
        metrics = training.pop_metrics(training=True)
        a, b, c, d = (metrics[f"accuracy_{step}"] for step in range(STEPS))
        assert metrics["tau_sim"] == pytest.approx(1 + a + a * b + a * b * c + a * b * c * d)

    @torch.no_grad()
    def test_they_are_means_over_the_slots_since_the_last_call(
        self, target: TargetModel, heads: dict[str, DraftNetwork]
    ) -> None:
        """In whatever batches the slots came: as the loss of all of them in one."""
        training, (input_ids, loss_mask) = head_training(heads["eagle3"], target, EAGLE3), random_batch()
        whole = training(input_ids, loss_mask)["loss"].item()
        assert training.pop_metrics(training=True)["loss"] == pytest.approx(whole)
        for row in range(2):
            training(input_ids[row : row + 1], loss_mask[row : row + 1])
        assert training.pop_metrics(training=True)["loss"] == pytest.approx(whole)
        assert training.pop_metrics(training=True) == {}

    @torch.no_grad()
    def test_they_are_reduced_over_processes(self, target: TargetModel, heads: dict[str, DraftNetwork]) -> None:
        training, (input_ids, loss_mask) = head_training(heads["eagle1"].eval(), target, EAGLE1).eval(), random_batch()
        whole = training(input_ids, loss_mask)["loss"].item()
        training.pop_metrics(training=False)
        training(input_ids[:1], loss_mask[:1])
        others: list[torch.Tensor] = []
        training.pop_metrics(training=False, sum_over=lambda sums: others.append(sums) or sums)
        training(input_ids[1:], loss_mask[1:])
        metrics = training.pop_metrics(training=False, sum_over=lambda sums: sums + others[0])
        assert metrics["loss"] == pytest.approx(whole)

    @torch.no_grad()
    def test_tau_sim_takes_more_than_ten_steps_in_order(self, heads: dict[str, DraftNetwork]) -> None:
        config = TrainConfig(objective="eagle3", output="", target="unused", ttt_steps=12)
        training = head_training(heads["eagle3"], TargetModel(tiny_llama()), config)
        for step in range(12):
            training._sums[True][f"accuracy_{step}"] = torch.tensor([12 - step, 12])
        product, tau = 1.0, 1.0
        for step in range(12):
            product *= 1 - step / 12
            tau += product
        assert training.pop_metrics(training=True)["tau_sim"] == pytest.approx(tau)
