"""`inspect_draft`: the facts of a head file, and every way in which it does not fit its target."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from published import TINY, Shapes, eagle1_shapes, eagle3_shapes, random_tensors, speculators_values
from safetensors.torch import load_file, save_file

from draftwing.drafts.inspect_draft import inspect_draft, report_table

TARGET_IDS = torch.arange(16, 64)
VALUES = {**TINY.values(), "draft_vocab_size": 48}


def write_head(folder: Path, values: dict[str, Any], shapes: Shapes) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    tensors = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor
        for name, tensor in random_tensors(shapes, TARGET_IDS).items()
    }
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def write_target(folder: Path, **sizes: int) -> str:
    """A target's folder with nothing but its config; inspection reads no more."""
    tiny_llama(**sizes).config.save_pretrained(folder)
    return str(folder)


def test_an_eagle3_head(tmp_path: Path) -> None:
    values = VALUES | {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2, 4]}, "norm_output": True}
    folder = write_head(tmp_path / "head", values, eagle3_shapes(TINY))
    report = inspect_draft(folder, write_target(tmp_path / "target"))
    assert report.folder == folder
    assert (report.format, report.dtype) == ("eagle3", "bfloat16")
    assert report.num_parameters == sum(
        torch.Size(shape).numel() for name, shape in eagle3_shapes(TINY).items() if name not in ("d2t", "t2d")
    )
    assert (report.hidden_size, report.num_layers) == (32, 1)
    assert (report.num_heads, report.num_key_value_heads, report.head_dim) == (4, 2, 8)
    assert (report.vocab_size, report.draft_vocab_size) == (64, 48)
    assert report.aux_layers == [1, 3, 5]
    assert report.trained_length is None and report.window == 2048, "as many as it has positions"
    assert report.options == ["norm_output"]
    assert report.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert report.problems == []
    assert any("rope_theta is missing" in note and "10000" in note for note in report.notes)


def test_an_eagle1_head(tmp_path: Path) -> None:
    values = TINY.values() | {"rope_theta": 500000.0}
    report = inspect_draft(write_head(tmp_path / "head", values, eagle1_shapes(TINY, fc_bias=True)))
    assert report.format == "eagle1"
    assert report.options == ["fc_bias"]
    assert report.aux_layers == []
    assert report.rope_parameters["rope_theta"] == 500000.0
    assert report.problems == report.notes == []
    assert dict(report.rows())["network"].startswith("1 layer, hidden size 32")
    assert dict(replace(report, num_layers=2).rows())["network"].startswith("2 layers, hidden size 32")


def test_a_speculators_head(tmp_path: Path) -> None:
    values = speculators_values(VALUES | {"rope_theta": 1e6}, eagle_aux_hidden_state_layer_ids=[1, 3, 5])
    shapes = eagle3_shapes(TINY, "layers.0") | {"input_norm.weight": (96,)}
    report = inspect_draft(write_head(tmp_path / "head", values, shapes), write_target(tmp_path / "target"))
    assert report.format == "speculators"
    assert report.options == ["norm_before_residual", "norm_before_fc"]
    assert report.problems == report.notes == []


def test_feature_layers_that_the_target_decides(tmp_path: Path) -> None:
    folder = write_head(tmp_path / "head", VALUES, eagle3_shapes(TINY))
    alone = inspect_draft(folder)
    assert alone.aux_layers == []
    assert alone.problems == []
    assert any("2, n//2 and n-3" in note for note in alone.notes)
    with_target = inspect_draft(folder, write_target(tmp_path / "target", num_hidden_layers=8))
    assert with_target.aux_layers == [2, 4, 5]
    assert not any("n//2" in note for note in with_target.notes)


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        ({"hidden_size": 48}, "hidden_size: the head reads features of width 32, the target's have 48"),
        ({"hidden_size": 16}, "hidden_size: the head reads features of width 32, the target's have 16"),
        ({"vocab_size": 72}, "vocab_size: the head was made for 64 tokens, the target has 72"),
    ],
)
@pytest.mark.parametrize("shapes", [eagle1_shapes(TINY), eagle3_shapes(TINY)], ids=["eagle1", "eagle3"])
def test_another_targets_head_is_a_problem(sizes: dict[str, int], problem: str, shapes: Shapes, tmp_path: Path) -> None:
    folder = write_head(tmp_path / "head", VALUES, shapes)
    report = inspect_draft(folder, write_target(tmp_path / "target", num_hidden_layers=8, **sizes))
    assert report.problems[0] == problem


def test_a_target_with_too_few_layers_is_a_problem(tmp_path: Path) -> None:
    values = VALUES | {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2, 4]}}
    folder = write_head(tmp_path / "head", values, eagle3_shapes(TINY))
    report = inspect_draft(folder, write_target(tmp_path / "target", num_hidden_layers=4))
    assert report.problems == ["aux_layers: (1, 3, 5) go beyond the target's 4 layers"]


def test_wrong_tensors_are_problems_all_at_once(tmp_path: Path) -> None:
    shapes = eagle3_shapes(TINY) | {"midlayer.mlp.up_proj.weight": (47, 32), "mask_hidden": (1, 32)}
    del shapes["norm.weight"]
    report = inspect_draft(write_head(tmp_path / "head", VALUES, shapes))
    assert report.problems == [
        "mask_hidden: unknown tensor of shape (1, 32)",
        "midlayer.mlp.up_proj.weight: expected shape (48, 32), got (47, 32)",
        "norm.weight: missing; expected shape (32,)",
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_numbers_that_are_not_finite_are_problems(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write_head(tmp_path / "head", VALUES, eagle1_shapes(TINY))
    tensors = load_file(Path(folder) / "model.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    tensors[name].view(-1)[5] = torch.nan
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, Path(folder) / "model.safetensors")
    report = inspect_draft(folder)
    assert report.problems == [f"{name}: holds NaN or infinity"]
    assert any("broken" in str(cell) for cell in report_table(report).columns[0].cells)


def test_the_table_shows_problems_or_says_there_are_none(tmp_path: Path) -> None:
    folder = write_head(tmp_path / "head", VALUES, eagle1_shapes(TINY))
    good = report_table(inspect_draft(folder))
    bad = report_table(inspect_draft(folder, write_target(tmp_path / "target", vocab_size=72)))
    assert any("complete" in str(cell) for cell in good.columns[0].cells)
    assert any("does not fit" in str(cell) for cell in bad.columns[0].cells)


def test_names_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_head(tmp_path / "head", VALUES, eagle1_shapes(TINY))
    with pytest.raises(ValueError, match="target: cannot read the config of"):
        inspect_draft(folder, str(tmp_path / "nothing"))
