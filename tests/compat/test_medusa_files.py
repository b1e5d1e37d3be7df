"""Files of Medusa heads: the published layout, round trips, what is refused, and what `inspect` says of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama

from draftwing.drafts.eagle.formats import HeadOptions
from draftwing.drafts.inspect_draft import inspect_draft, report_table
from draftwing.drafts.load_draft import load_draft
from draftwing.drafts.medusa.files import MedusaHeads, expected_medusa_shapes, is_medusa, read_medusa, save_medusa
from draftwing.drafts.medusa.kind import MedusaReport
from draftwing.drafts.medusa.network import MedusaConfig, MedusaModel
from draftwing.target.model import TargetModel

Tensors = dict[str, torch.Tensor]
# What FasterDecoding/medusa-vicuna-7b-v1.3 says of itself; its file holds five heads.
PUBLISHED = {
    "base_model_name_or_path": "lmsys/vicuna-7b-v1.3",
    "medusa_num_heads": 2,
    "medusa_num_layers": 1,
    "transformers_version": "4.31.0",
}


def tensors_of(num_heads: int, hidden: int, vocab: int, num_layers: int = 1, device: str = "cpu") -> Tensors:
    generator = None if device == "meta" else torch.Generator().manual_seed(0)
    shapes = {}
    for head in range(num_heads):
        for block in range(num_layers):
            shapes[f"{head}.{block}.linear.weight"] = (hidden, hidden)
            shapes[f"{head}.{block}.linear.bias"] = (hidden,)
        shapes[f"{head}.{num_layers}.weight"] = (vocab, hidden)
    return {name: torch.randn(shape, generator=generator, device=device) for name, shape in shapes.items()}


def write(folder: Path, tensors: Tensors, values: dict[str, Any] = PUBLISHED) -> str:
    """As published: a .pt file beside config.json."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    torch.save(tensors, folder / "medusa_lm_head.pt")
    return str(folder)


def test_the_published_heads_are_read_at_their_true_size() -> None:
    """Five heads, whatever the configuration says."""
    tensors = tensors_of(5, 4096, 32000, device="meta")
    assert is_medusa(PUBLISHED, tensors)
    heads = read_medusa(PUBLISHED, tensors)
    assert heads.config == MedusaConfig(hidden_size=4096, vocab_size=32000, num_heads=5, num_layers=1)
    assert {name: t.shape for name, t in heads.tensors.items()} == expected_medusa_shapes(heads.config)


def test_the_names_that_whole_models_are_saved_with() -> None:
    tensors = tensors_of(2, 32, 64, num_layers=2)
    prefixed = {f"medusa_head.{name}": tensor for name, tensor in tensors.items()}
    assert is_medusa({}, prefixed)
    heads = read_medusa({}, prefixed)
    assert heads.config == MedusaConfig(32, 64, num_heads=2, num_layers=2)
    assert heads.tensors.keys() == tensors.keys()


def test_a_published_file_loads_into_the_network(target: TargetModel, tmp_path: Path) -> None:
    tensors = tensors_of(3, 32, 64)
    model = load_draft(write(tmp_path / "heads", tensors), target)
    assert isinstance(model, MedusaModel)
    assert len(model) == 3
    hidden = torch.randn(2, 32, dtype=torch.float64)
    y = hidden @ tensors["2.0.linear.weight"].double().T + tensors["2.0.linear.bias"].double()
    expected = (hidden + y * y.sigmoid()) @ tensors["2.1.weight"].double().T
    torch.testing.assert_close(model(hidden)[2], expected)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_what_is_saved_loads_again_bit_by_bit(target: TargetModel, tmp_path: Path, num_layers: int) -> None:
    torch.manual_seed(0)
    model = MedusaModel(MedusaConfig(32, 64, 2, num_layers)).double()
    save_medusa(MedusaHeads(model.config, dict(model.named_parameters())), tmp_path, "org/target")
    loaded = load_draft(str(tmp_path), target)
    assert isinstance(loaded, MedusaModel)
    assert loaded.config == model.config
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name))
    values = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert (values["medusa_num_heads"], values["medusa_num_layers"]) == (2, num_layers)
    assert values["base_model_name_or_path"] == "org/target"
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"1.0.linear.bias": None}, r"1\.0\.linear\.bias: missing; expected shape \(32,\)"),
        ({"0.1.weight": None}, r"0\.1\.weight: missing; head 0 needs an output matrix"),
        ({"1.1.weight": torch.zeros(63, 32)}, r"1\.1\.weight: expected shape \(64, 32\), got \(63, 32\)"),
        ({"3.0.linear.weight": torch.zeros(32, 32)}, r"2\.0\.linear\.bias: missing"),
        ({"fc.weight": torch.zeros(2, 2)}, r"fc\.weight: unknown tensor of shape \(2, 2\); Medusa heads have none"),
    ],
)
def test_wrong_tensors_are_named(target: TargetModel, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    tensors = tensors_of(2, 32, 64) | change
    folder = write(tmp_path / "heads", {name: tensor for name, tensor in tensors.items() if tensor is not None})
    with pytest.raises(ValueError, match=message):
        load_draft(folder, target)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((48, 64), "hidden_size: the heads read features of width 48, the target's have 32"),
        ((32, 72), "vocab_size: the heads were made for 72 tokens, the target has 64"),
    ],
)
def test_another_targets_heads_are_refused(
    target: TargetModel, tmp_path: Path, sizes: tuple[int, int], message: str
) -> None:
    folder = write(tmp_path / "heads", tensors_of(2, *sizes))
    with pytest.raises(ValueError, match=message):
        load_draft(folder, target)
    tiny_llama().config.save_pretrained(tmp_path / "target")
    assert inspect_draft(folder, str(tmp_path / "target")).problems == [message]


def test_options_of_eagle_heads_are_refused(target: TargetModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rope_theta: .* holds Medusa heads, only EAGLE heads have them"):
        load_draft(write(tmp_path / "heads", tensors_of(2, 32, 64)), target, options=HeadOptions(rope_theta=1e6))


def test_a_damaged_file_is_named(target: TargetModel, tmp_path: Path) -> None:
    folder = write(tmp_path / "heads", tensors_of(2, 32, 64))
    (tmp_path / "heads" / "medusa_lm_head.pt").write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match=r"draft: cannot read .*medusa_lm_head\.pt"):
        load_draft(folder, target)


def test_inspection_says_what_they_are(tmp_path: Path) -> None:
    folder = write(tmp_path / "heads", tensors_of(3, 32, 64))
    tiny_llama().config.save_pretrained(tmp_path / "target")
    report = inspect_draft(folder, str(tmp_path / "target"))
    assert isinstance(report, MedusaReport)
    assert (report.format, report.dtype) == ("medusa", "float32")
    assert (report.num_heads, report.num_layers, report.hidden_size, report.vocab_size) == (3, 1, 32, 64)
    assert report.num_parameters == 3 * (32 * 32 + 32 + 64 * 32)
    assert report.problems == []
    assert report.notes == ["config.json says medusa_num_heads 2, the file has 3, which are all used"]
    cells = [str(cell) for column in report_table(report).columns for cell in column.cells]
    assert "3 heads of 1 residual block, hidden size 32" in cells
    assert any("complete" in cell for cell in cells)


def test_inspection_names_what_is_wrong(tmp_path: Path) -> None:
    tensors = tensors_of(2, 32, 64)
    del tensors["1.0.linear.bias"]
    report = inspect_draft(write(tmp_path / "heads", tensors))
    assert report.problems == ["1.0.linear.bias: missing; expected shape (32,)"]
