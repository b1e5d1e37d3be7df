"""Targets whose linear layers are quantised: in C or by torchao while loading, or by any package's own modules."""

import copy
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB_SIZE, eagle, generate, head_training, requests_for, run, tiny_llama
from torch import nn

import draftwing
from draftwing import native
from draftwing.api import SpeculativeModel
from draftwing.cli import main
from draftwing.config import TrainConfig
from draftwing.drafts.eagle.network import DraftNetwork
from draftwing.plans.costs import what_costs_depend_on
from draftwing.target import load as loading
from draftwing.target.fused import FusedTarget, pack_target
from draftwing.target.load import load_stock, load_target
from draftwing.target.model import TargetModel
from draftwing.target.packed import PackedLinear, multiplies_bfloat16, pack_linears
from draftwing.target.rounded import round_linears
from draftwing.target.row_pass import rounding_problem

needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")
needs_bfloat16 = pytest.mark.skipif(not multiplies_bfloat16(), reason="in float32 rounding depends on the rows")


class RoundedLinear(nn.Module):
    """A linear layer as GPTQ's and others': no `nn.Linear`, no `weight`, no `out_features`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scales = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (weight / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.codes, torch.Tensor) and isinstance(self.scales, torch.Tensor)
        return x @ (self.codes * self.scales).T


@pytest.fixture(scope="module")
def rounded() -> TargetModel:
    """The target of conftest with every product rounded to 8 bits, the output head's too."""
    model = tiny_llama()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, RoundedLinear(child))
    return TargetModel(model)


@pytest.fixture(scope="module")
def by_torchao() -> SpeculativeModel:
    return draftwing.load("tiny", draft="tiny", quantize="int8", dtype="bfloat16")


def check_tokens(model: SpeculativeModel, plan: str, temperature: float) -> None:
    """Alone and in a batch, drafts are accepted, and change nothing."""
    assert model.tokenizer is not None
    prompts = [model.tokenizer(text)["input_ids"] for text in ("def read_lines(path):\n", "import ", "x = [1, 2")]
    for batch in ([prompts[0]], prompts):
        plain = model.with_method("plain").start(batch, max_new_tokens=32, temperature=temperature).run()
        drafted = model.start(batch, max_new_tokens=32, temperature=temperature, plan=plan).run()
        assert [row.tokens for row in drafted.outputs] == [row.tokens for row in plain.outputs]
        assert drafted.statistics.acceptance_length > 1.2


class TestModulesOfOtherClasses:
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_decode_what_they_decode_plainly(
        self, rounded: TargetModel, heads: dict[str, DraftNetwork], prompts: list[list[int]], temperature: float
    ) -> None:
        requests = requests_for(prompts, temperature=temperature)
        drafted = generate(rounded, requests, eagle(heads["eagle3"]), "tree:4x4x16")
        assert [output.tokens for output in drafted.outputs] == run(rounded, requests)
        assert drafted.statistics.acceptance_length > 1.2

    def test_products_that_depend_on_the_other_rows_are_noticed(
        self,
        rounded: TargetModel,
        heads: dict[str, DraftNetwork],
        prompts: list[list[int]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Sabotage: kernels that choose scales for all rows together."""
        forward = RoundedLinear.forward
        monkeypatch.setattr(RoundedLinear, "forward", lambda self, x: forward(self, x + 0.3 * x.amax(1, keepdim=True)))
        drafted = generate(rounded, requests_for(prompts), eagle(heads["eagle3"]), "tree:4x4x16")
        assert [output.tokens for output in drafted.outputs] != run(rounded, requests_for(prompts))

    def test_are_left_as_they_are(self, rounded: TargetModel) -> None:
        assert rounded.vocab_size == VOCAB_SIZE
        packed = pack_target(TargetModel(copy.deepcopy(rounded.model).float()))
        assert type(packed) is TargetModel
        assert not any(isinstance(module, PackedLinear) for module in packed.model.modules())

    def test_cannot_teach(self, rounded: TargetModel, heads: dict[str, DraftNetwork]) -> None:
        config = TrainConfig(objective="eagle3", output="", target="unused")
        rounded = TargetModel(copy.deepcopy(rounded.model))
        rounded.check_logits = lambda: None  # type: ignore[method-assign]
        with pytest.raises(ValueError, match=r"target: its output head is quantised \(RoundedLinear\)"):
            head_training(heads["eagle3"], rounded, config)


@pytest.mark.parametrize("what", ["its own forward", "a hook before", "a hook behind"])
def test_layers_that_do_more_than_a_product_are_not_packed(what: str) -> None:
    """As those of compressed-tensors (activations are rounded) and of models that accelerate has dispatched."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    first = model[0]
    if what == "its own forward":
        first.forward = lambda x: nn.Linear.forward(first, x.round())  # type: ignore[method-assign, arg-type]
    elif what == "a hook before":
        first.register_forward_pre_hook(lambda module, inputs: (inputs[0].round(),))
    else:
        first.register_forward_hook(lambda module, inputs, output: output.round())
    x = torch.randn(3, 4)
    before = model(x)
    pack_linears(model)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), before)


class TestLoading:
    @pytest.mark.parametrize(
        "placement", [{"device": "cuda:1"}, {"device": "cpu"}, {"device": "cuda", "device_map": "auto"}]
    )
    def test_quantised_files_are_placed_while_they_are_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, placement: dict[str, str]
    ) -> None:
        """Their weights are packed for a device: bitsandbytes' models, for one, must not be moved or converted."""
        tiny_llama().save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        (tmp_path / "config.json").write_text(json.dumps(config))
        seen: dict[str, Any] = {}

        def from_pretrained(path: str, **options: Any) -> Any:
            seen.update(options)
            model = tiny_llama().half()
            for name in ("to", "float"):
                monkeypatch.setattr(model, name, lambda *_: pytest.fail("moved or converted"))
            return model, {"missing_keys": []}

        monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", from_pretrained)
        assert load_target(str(tmp_path), **placement).dtype == torch.float16  # type: ignore[arg-type]
        expected = None if placement["device"] == "cpu" else placement.get("device_map", placement["device"])
        assert seen.get("device_map") == expected

    def test_an_unknown_name(self) -> None:
        with pytest.raises(ValueError, match=r"quantize: expected one of int8, int4, float8, got 'int3'"):
            draftwing.load("tiny", quantize="int3")

    def test_no_kernels(self) -> None:
        with pytest.raises(ValueError, match="quantize: torchao has kernels for int4 on CUDA alone"):
            draftwing.load("tiny", quantize="int4")

    @pytest.mark.parametrize("command", [("generate", "--prompt", "x", "--target", "tiny"), ("eval",)])
    def test_without_torchao(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
    ) -> None:
        monkeypatch.setitem(sys.modules, "torchao.quantization", None)
        assert main([*command, "--quantize", "float8"]) == 2
        assert "quantize: needs torchao: pip install 'draftwing[quant]'" in capsys.readouterr().err


@pytest.mark.skipif(native.library() is None, reason="this machine has no C compiler")
class TestInC:
    """On a CPU 8 bits need no torchao. tests/lossless/test_bits.py asserts the bits."""

    @pytest.fixture(scope="class")
    @staticmethod
    def int8() -> SpeculativeModel:
        return draftwing.load("tiny", draft="tiny", quantize="int8")

    def test_all_linear_layers_are_quantised(self, int8: SpeculativeModel) -> None:
        assert isinstance(int8.target, FusedTarget) and int8.dtype == torch.float32
        modules = list(int8.target.model.modules())
        products = {module.product for module in modules if isinstance(module, PackedLinear)}
        assert not any(isinstance(module, nn.Linear) for module in modules)
        assert {product.panels.kept_in for product in products} == {torch.int8}
        assert rounding_problem(int8.target) is None

    def test_the_numbers_are_those_of_the_rounded_model(self, int8: SpeculativeModel) -> None:
        tokens = torch.tensor([[1, 40, 300, 7, 20]])
        model = load_target("tiny", torch.float32).model
        round_linears(model)
        with torch.inference_mode():
            cache, count = int8.target.new_cache(1, 8), torch.tensor([5])
            logits = int8.target.prefill(tokens, count, cache, all_logits=True).logits
            torch.testing.assert_close(logits, model(tokens).logits, atol=0.02, rtol=0)

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize("plan", ["tree:4x4x16", "chain:4"])
    def test_it_decodes_what_it_decodes_plainly(self, int8: SpeculativeModel, plan: str, temperature: float) -> None:
        check_tokens(int8, plan, temperature)

    def test_layers_that_do_more_than_a_product_stay(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[0].register_forward_hook(lambda module, inputs, output: output.round())
        round_linears(model)
        assert [type(layer).__name__ for layer in model] == ["Linear", "RoundedLinear"]

    def test_quantised_files_are_refused(self, tmp_path: Path) -> None:
        model = tiny_llama()
        model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        model.config.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"quantize: expected none, got 'int8': .* is quantised already"):
            draftwing.load(str(tmp_path), quantize="int8")

    def test_layers_that_would_stay_are_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Falcon's linear layers are of a class of their own."""

        class FalconLinear(nn.Linear):
            pass

        model = tiny_llama()
        model.model.layers[0].mlp.up_proj = FalconLinear(32, 48, bias=False)
        monkeypatch.setattr(loading, "load_model", lambda *args, **options: model)
        with pytest.raises(
            ValueError, match=r"quantize: int8 .* plain linear layers, and LlamaForCausalLM has FalconLinear"
        ):
            load_target("tiny", quantize="int8")

    def test_a_device_map_leaves_it_to_torchao(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torchao.quantization", None)
        with pytest.raises(ValueError, match="quantize: needs torchao"):
            load_target("tiny", quantize="int8", device_map="auto")

    def test_a_stock_model_has_the_same_products(self, int8: SpeculativeModel) -> None:
        """So a comparison with transformers is of the same weights."""
        stock = load_stock("tiny", torch.float32, "cpu", "int8")
        x = torch.randn(3, stock.config.hidden_size)
        assert stock.lm_head(x).equal(int8.target.output_head(x))

    def test_costs_tell_an_int8_target_from_an_int8_head(self, int8: SpeculativeModel) -> None:
        own_head = int8.with_draft("tiny", draft_dtype="target")
        rounded_head = draftwing.load("tiny", draft="tiny", dtype="float32")
        keys = [what_costs_depend_on(model.target, model.draft, False) for model in (own_head, rounded_head)]
        assert {key["products"] for key in keys} == {key["draft_products"] for key in keys}
        assert keys[0]["products"] == keys[1]["draft_products"] != keys[0]["draft_products"]

    def test_the_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = (
            "generate --target tiny --draft tiny --plan chain:3 --max-new-tokens 16 --quantize int8 --compare --json"
        )
        assert main([*arguments.split(), "--prompt", "def f("]) == 0
        assert json.loads(capsys.readouterr().out)["identical"]


@needs_torchao
class TestTorchao:
    @needs_bfloat16
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize("plan", ["tree:4x4x16", "chain:4"])
    def test_int8_decodes_what_it_decodes_plainly(
        self, by_torchao: SpeculativeModel, plan: str, temperature: float
    ) -> None:
        check_tokens(by_torchao, plan, temperature)

    def test_what_is_quantised(self, by_torchao: SpeculativeModel) -> None:
        """The layers' products are, and left to their own kernels; the output head is not, and is packed."""
        assert not isinstance(by_torchao.target, FusedTarget)
        weight = by_torchao.target.model.model.layers[0].mlp.up_proj.weight
        assert type(weight).__module__.startswith("torchao.")
        if multiplies_bfloat16():
            assert isinstance(by_torchao.target.output_head, PackedLinear)

    @needs_bfloat16
    @pytest.mark.parametrize("kind", ["int8", "float8"])
    def test_a_rows_bits_do_not_depend_on_the_others(self, kind: str) -> None:
        """From two rows on: a single one is padded (`TargetModel.best_single_row`)."""
        target = load_target("tiny", torch.bfloat16, quantize=kind)
        layer = target.model.model.layers[0].mlp.down_proj
        x = torch.randn(60, layer.in_features, dtype=torch.bfloat16)
        with torch.inference_mode():
            together = layer(x)
            for num_rows in (2, 3, 5, 16, 33):
                assert layer(x[:num_rows]).equal(together[:num_rows])

    def test_the_commands(self, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["generate", "--target", "tiny", "--draft", "tiny", "--prompt", "def f(", "--plan", "chain:3"]
        assert main([*arguments, "--max-new-tokens", "16", "--quantize", "float8", "--compare", "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["identical"] or not multiplies_bfloat16()
        command = (
            "eval --methods eagle3:chain:2 --draft tiny --num-prompts 1 --max-new-tokens 8 --quantize float8 --json"
        )
        assert main(command.split()) == 0
        assert json.loads(capsys.readouterr().out)["options"]["quantize"] == "float8"
