"""torch.compile in training: when, what of a head, and that it learns the same."""

import copy
from functools import partial

import pytest
import torch
from conftest import head_training
from torch._dynamo.utils import counters

from draftwing.config import TrainConfig
from draftwing.drafts.eagle.network import DraftNetwork
from draftwing.drafts.medusa.network import MedusaModel
from draftwing.target.model import TargetModel
from draftwing.training.loop import training_arguments, wants_compile


@pytest.fixture(scope="module")
def target(stock_target: TargetModel) -> TargetModel:
    """Training reads its weights."""
    return stock_target


@pytest.mark.parametrize("has_gpu", [False, True])
@pytest.mark.parametrize("compile", [None, False, True])
def test_compiled_is_what_the_recipe_says_or_what_has_a_gpu(
    monkeypatch: pytest.MonkeyPatch, has_gpu: bool, compile: bool | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    config = TrainConfig("eagle3", "", target="tiny", compile=compile)
    assert wants_compile(config) is (has_gpu if compile is None else compile)


@pytest.mark.parametrize(("objective", "expected"), [("language_model", True), ("eagle3", False)])
def test_the_trainer_compiles_language_models_alone(objective: str, expected: bool) -> None:
    """Around a head's whole step it would compile the target's hooks and every step anew."""
    assert training_arguments(TrainConfig(objective, "out", target="tiny", compile=True)).torch_compile is expected  # type: ignore[arg-type]


def test_compiling_leaves_the_products_of_other_stages_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.training_args.is_torch_tf32_available", lambda: True)
    before = torch.backends.fp32_precision
    training_arguments(TrainConfig("language_model", "out", target="tiny", compile=True))
    after, torch.backends.fp32_precision = torch.backends.fp32_precision, before
    assert after == before


@pytest.fixture(params=["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def backend(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Compile as far as graphs; all the way, which takes minutes, where there is time."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=request.param))
    torch.compiler.reset()
    counters.clear()
    return str(request.param)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at all of them
@pytest.mark.parametrize("objective", ["eagle1", "eagle3", "medusa"])
def test_compiled_layers_learn_the_same(
    target: TargetModel, heads: dict[str, DraftNetwork], medusa_heads: MedusaModel, backend: str, objective: str
) -> None:
    """Rows of several lengths, trained on and evaluated; no step and no length is compiled apart."""
    eager = copy.deepcopy(medusa_heads if objective == "medusa" else heads[objective])
    compiled = copy.deepcopy(eager)
    config = TrainConfig(objective, "", target="unused", ttt_steps=4, feature_steps=2, feature_noise=0.0)  # type: ignore[arg-type]
    modules = [head_training(head, target, config) for head in (eager, compiled)]
    modules[1].compile_parts()
    num_graphs = []
    for length in (14, 9, 23):
        ids = torch.randint(1, 60, (2, length), generator=torch.Generator().manual_seed(length))
        losses = []
        for module in modules:
            loss = module.train()(ids, torch.ones_like(ids, dtype=torch.bool))["loss"]
            loss.backward()
            with torch.no_grad():
                evaluated = module.eval()(ids, torch.ones_like(ids, dtype=torch.bool))["loss"]
            losses.append(torch.stack((loss.detach(), evaluated)))
        torch.testing.assert_close(losses[1], losses[0])
        num_graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < num_graphs[0] == num_graphs[-1] <= 9
    assert compiled.state_dict().keys() == eager.state_dict().keys()
    for name, parameter in compiled.named_parameters():
        torch.testing.assert_close(parameter.grad, eager.get_parameter(name).grad)
