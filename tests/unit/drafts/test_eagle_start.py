"""Where a new EAGLE-1 head starts: the linear map that estimates the target's next feature best."""

import pytest
import torch
from conftest import head_training, new_head

from draftwing.config import TrainConfig
from draftwing.drafts.eagle.network import EagleModel
from draftwing.drafts.eagle.objective import EagleTraining
from draftwing.losses.ttt import TttAttention
from draftwing.target.model import TargetModel

CONFIG = TrainConfig(objective="eagle1", output="", target="unused", token_loss_weight=1.0)
PROMPT = 3


@pytest.fixture(scope="module")
def target(stock_target: TargetModel) -> TargetModel:
    """Training reads its weights."""
    return stock_target


@pytest.fixture(scope="module")
def batches(target: TargetModel) -> list[dict[str, torch.Tensor]]:
    """Two batches of what the target says greedily behind random prompts."""
    torch.manual_seed(3)
    prompts = torch.randint(1, target.vocab_size, (24, PROMPT))
    ids = target.model.generate(prompts, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    mask = torch.arange(ids.shape[1]).expand_as(ids) >= PROMPT
    return [{"input_ids": ids[part], "loss_mask": mask[part]} for part in (slice(0, 8), slice(8, 24))]


def started(target: TargetModel, batches: list[dict[str, torch.Tensor]], **architecture: bool | int) -> EagleTraining:
    torch.manual_seed(1)
    config = TrainConfig(**{**CONFIG.as_dict(), "architecture": architecture})
    training = head_training(new_head(config, target, []), target, config)
    training.start(batches, lambda sums: sums)
    assert isinstance(training, EagleTraining)
    return training


@torch.no_grad()
def test_fc_is_the_least_squares_fit_of_what_a_loop_over_slots_collects(
    target: TargetModel, batches: list[dict[str, torch.Tensor]]
) -> None:
    inputs, outputs = [], []
    for batch in batches:
        for ids in batch["input_ids"]:
            features = target.model.model(ids[None]).last_hidden_state[0]
            for slot in range(PROMPT - 2, len(ids) - 2):  # x_{slot + 2} is the target's to say
                inputs.append(torch.cat((target.embedding(ids[slot + 1]), features[slot])))
                outputs.append(features[slot + 1])
    expected = torch.linalg.lstsq(torch.stack(inputs), torch.stack(outputs)).solution.T
    head = started(target, batches).head
    assert isinstance(head, EagleModel)
    torch.testing.assert_close(head.fc.weight.double(), expected, rtol=0.05, atol=0.02)


@torch.no_grad()
@pytest.mark.parametrize("architecture", [{}, {"num_hidden_layers": 2, "fc_bias": True, "mlp_bias": True}])
def test_the_layers_add_nothing_to_it(
    target: TargetModel, batches: list[dict[str, torch.Tensor]], architecture: dict[str, bool | int]
) -> None:
    head = started(target, batches, **architecture).head
    assert isinstance(head, EagleModel)
    hidden, tokens = torch.randn(1, 6, target.hidden_size), torch.randint(1, 60, (1, 6))
    output = head(hidden, tokens, torch.arange(6)[None], TttAttention())
    assert torch.equal(output, head.fc_inputs(hidden, tokens) @ head.fc.weight.T)


def test_it_drafts_better_at_once_and_learns_from_there(
    target: TargetModel, batches: list[dict[str, torch.Tensor]]
) -> None:
    random = head_training(new_head(CONFIG, target, []), target, CONFIG)
    fitted = started(target, batches)
    losses = []
    for training in (random, fitted):
        losses.append(training(**batches[1])["loss"])
    assert losses[1] < 0.9 * losses[0]
    optimizer = torch.optim.AdamW(fitted.head.parameters(), lr=2e-3)
    for _ in range(5):
        optimizer.zero_grad()
        loss = fitted(**batches[1])["loss"]
        loss.backward()
        optimizer.step()
    assert loss < losses[1]
    assert all(layer.self_attn.o_proj.weight.abs().sum() > 0 for layer in fitted.head.layers)


def test_an_eagle3_head_starts_as_it_is(target: TargetModel) -> None:
    config = TrainConfig(objective="eagle3", output="", target="unused", aux_layers=(1, 3, 5))
    assert head_training(new_head(config, target, []), target, config).tokens_to_start == 0
