"""Fields of a head's config.json: each is used, changes nothing, or is refused by its name; none goes unnoticed."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from published import TINY, Shapes, eagle1_shapes, eagle3_shapes, random_tensors, speculators_values
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Qwen3Config

from draftwing.drafts.eagle.inspect_head import HeadReport
from draftwing.drafts.eagle.network import DraftNetwork
from draftwing.drafts.eagle.save_head import save_head, to_head
from draftwing.drafts.fit import sizes_of
from draftwing.drafts.inspect_draft import inspect_draft, report_table
from draftwing.drafts.load_draft import load_draft
from draftwing.target.attention import grouped_attention
from draftwing.target.model import TargetModel

TARGET_IDS = torch.arange(16, 64)
AUX = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2, 4]}}
VALUES = {**TINY.values(), "draft_vocab_size": 48, "rope_theta": 10000.0, **AUX}
SHAPES = eagle3_shapes(TINY)
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LENGTH = 8


def write(folder: Path, changes: dict[str, Any], shapes: Shapes = SHAPES, values: dict[str, Any] = VALUES) -> str:
    """A tiny head with changed values; those that are `...` are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {name: value for name, value in (values | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    save_file(random_tensors(shapes, TARGET_IDS), folder / "model.safetensors")
    return str(folder)


def logits_of(head: DraftNetwork) -> torch.Tensor:
    """What a head says of a fixed text."""
    generator = torch.Generator().manual_seed(0)
    width = sum(head.config.target_hidden_size for _ in head.config.feature_layers)
    features = torch.randn(1, LENGTH, width, dtype=torch.float64, generator=generator)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None]
    numbers = torch.arange(LENGTH)[None]

    def attend(layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return grouped_attention(queries, keys, values, mask).transpose(1, 2)

    with torch.inference_mode():
        return head.logits(head(head.project(features), numbers, 3 * numbers, attend))


def report_of(folder: str) -> HeadReport:
    report = inspect_draft(folder)
    assert isinstance(report, HeadReport)
    return report


USED: dict[str, dict[str, Any]] = {
    "hidden_act": {"hidden_act": "gelu_pytorch_tanh"},
    "rms_norm_eps": {"rms_norm_eps": 0.1},
    "rope_theta": {"rope_theta": 1e6},
    "partial_rotary_factor": {"partial_rotary_factor": 0.5},
    "partial_rotary_factor, new place": {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}},
    "theta by layer type": {"rope_parameters": {"full_attention": {**ROPE, "rope_theta": 1e6}}},
    "linear by layer type": {"rope_parameters": {"full_attention": {**ROPE, "rope_type": "linear", "factor": 8.0}}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "yarn, its length told elsewhere": {"rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 64},
    "yarn, its factor told by lengths": {
        "rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 64},
        "max_position_embeddings": 256,
    },
    "norm_output": {"eagle_config": {**AUX["eagle_config"], "norm_output": True}},
    "norm_before_residual": {"norm_before_residual": True},
}


@pytest.mark.parametrize("changes", USED.values(), ids=USED)
def test_a_used_field_changes_the_output(changes: dict[str, Any], target: TargetModel, tmp_path: Path) -> None:
    plain = logits_of(load_draft(write(tmp_path / "plain", {}), target))
    folder = write(tmp_path / "changed", changes)
    head = load_draft(folder, target)
    if "norm_output" in str(changes):  # it acts from the second draft step on
        assert head.config.norm_output
    else:
        assert not torch.equal(logits_of(head), plain)
    report = report_of(folder)
    assert report.problems == []
    assert any(name.split(".")[-1] in str(changes) for name in report.used_fields)


@pytest.mark.parametrize("changes", USED.values(), ids=USED)
@pytest.mark.parametrize("head_format", ["eagle3", "speculators"])
def test_a_used_field_survives_writing(
    changes: dict[str, Any], head_format: Any, target: TargetModel, tmp_path: Path
) -> None:
    head = load_draft(write(tmp_path / "in", changes), target)
    save_head(to_head(head, head_format), tmp_path / "out", sizes_of(target))
    again = load_draft(str(tmp_path / "out"), target)
    assert again.config == head.config
    assert torch.equal(logits_of(again), logits_of(head))


IDLE: dict[str, dict[str, Any]] = {
    "of transformers": {"use_cache": False, "initializer_range": 0.5, "transformers_version": "4.57.0", "id2label": {}},
    "dropout": {"attention_dropout": 0.1},
    "mrope: the axes of text are equal": {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
    "mrope, new name": {"rope_scaling": {"rope_type": "default", "type": "mrope", "mrope_section": [1, 1, 2]}},
    "scales of one": {"logit_scale": 1.0, "embedding_multiplier": 1, "residual_multiplier": 1.0},
    "null": {"final_logit_softcapping": None, "a_field_of_tomorrow": None},
    "a window that is off": {"sliding_window": 4, "use_sliding_window": False, "max_window_layers": 28},
    "a window of other layers": {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]},
    "biases that the file lacks": {"attention_bias": True},
    "an output head that the file has": {"tie_word_embeddings": True},
    "the target's layers": {"num_hidden_layers": 40},
    "Model-Optimizer's": {
        "eagle_config": {
            **AUX["eagle_config"],
            "use_aux_hidden_state": True,
            "use_input_layernorm_in_first_layer": True,
            "use_last_layernorm": True,
            "use_mtp_layernorm": False,
            "next_layer_regular": True,
            "parallel_draft_step": 1,
        }
    },
}


@pytest.mark.parametrize("changes", IDLE.values(), ids=IDLE)
def test_an_idle_field_changes_nothing(changes: dict[str, Any], target: TargetModel, tmp_path: Path) -> None:
    plain = logits_of(load_draft(write(tmp_path / "plain", {}), target))
    folder = write(tmp_path / "changed", changes)
    assert torch.equal(logits_of(load_draft(folder, target)), plain)
    assert report_of(folder).problems == []


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen3Config])
def test_all_of_transformers_own_fields_are_known(config_class: Any, target: TargetModel, tmp_path: Path) -> None:
    """A head's config.json that is its target's with one layer, as trainers write them."""
    values = config_class(head_dim=8).to_dict() | VALUES
    assert report_of(write(tmp_path, {}, values=values)).problems == []


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"a_field_of_tomorrow": 3}, "a_field_of_tomorrow: .* not known here .its value is 3."),
    "unknown, off": ({"new_norms": False}, "new_norms: .* not known here"),
    "activation": ({"hidden_act": "xielu"}, "hidden_act: expected one of silu, .*, got 'xielu'"),
    "logit scale": ({"logit_scale": 0.0625}, "logit_scale: 0.0625 would change what the head computes"),
    "soft cap": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping: 30.0 would change"),
    "embedding multiplier": ({"embedding_multiplier": 12}, "embedding_multiplier: 12 would change"),
    "query scale": ({"query_pre_attn_scalar": 256}, "query_pre_attn_scalar: 256 would change"),
    "quantised": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config: .* would change"),
    "no last norm": ({"eagle_config": {"use_last_layernorm": False}}, "eagle_config.use_last_layernorm: False would"),
    "parallel drafting": ({"eagle_config": {"parallel_draft_step": 4}}, "eagle_config.parallel_draft_step: 4 would"),
    "another norm": ({"layer_norm_eps": 1e-5}, "layer_norm_eps: .* not known here"),
    "another network": ({"architectures": ["DFlashDraftModel"]}, "architectures: DFlashDraftModel is not one of"),
    "another kind of layer": ({"model_type": "gemma3_text"}, "model_type: the layers of 'gemma3_text' are not Llama's"),
    "another attention": ({"layer_types": ["chunked_attention"]}, "layer_types: .*, got 'chunked_attention'"),
    "dynamic rope": (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_type: expected one of .*, got 'dynamic'",
    ),
    "half a rope": ({"rope_scaling": {"type": "linear"}}, r"rope_parameters.factor: linear needs a number, got None"),
    "a strange rope": (
        {"rope_parameters": {**ROPE, "high_frequencies": 3}},
        "rope_parameters.high_frequencies: not known here .its value is 3.",
    ),
    "two ropes": (
        {"rope_parameters": {"full_attention": ROPE, "sliding_attention": {**ROPE, "rope_theta": 5e5}}},
        "rope_parameters: there are some for full_attention, sliding_attention; layer_types must say which",
    ),
    "norms that the file lacks": (
        {"fc_norm": True},
        "fc_norm: config.json says so, but the file has no fc_norm.0.weight",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_a_field_that_would_change_the_network_is_refused_by_name(
    changes: dict[str, Any], message: str, target: TargetModel, tmp_path: Path
) -> None:
    if "eagle_config" in changes:
        changes = {"eagle_config": {**AUX["eagle_config"], **changes["eagle_config"]}}
    folder = write(tmp_path, changes)
    with pytest.raises(ValueError, match=message):
        load_draft(folder, target)
    try:
        (problem, *_) = report_of(folder).problems
    except ValueError as error:  # what cannot be read at all
        problem = str(error)
    assert re.search(message, problem)


def test_fields_of_a_speculators_layer_are_named_with_their_place(target: TargetModel, tmp_path: Path) -> None:
    values = speculators_values({**TINY.values(), "logit_scale": 2.0, "use_cache": True}, draft_vocab_size=48)
    folder = write(tmp_path, {}, eagle3_shapes(TINY, "layers.0"), values)
    report = report_of(folder)
    assert report.problems[0].startswith("transformer_layer_config.logit_scale: 2.0 would change")
    assert "transformer_layer_config.use_cache" in report.idle_fields
    assert "transformer_layer_config.hidden_act" in report.used_fields


def test_options_of_eagle3_in_an_eagle1_file_are_refused(target: TargetModel, tmp_path: Path) -> None:
    folder = write(tmp_path, {"norm_output": True}, eagle1_shapes(TINY), TINY.values())
    with pytest.raises(ValueError, match="norm_output: only EAGLE-3 heads have it"):
        load_draft(folder, target)


def test_the_table_lists_used_and_idle_fields(tmp_path: Path) -> None:
    table = report_table(report_of(write(tmp_path, {"use_cache": True})))
    rows = dict(zip(*(column.cells for column in table.columns), strict=True))
    assert "hidden_act" in str(rows["fields used"])
    assert "use_cache" in str(rows["fields that change nothing"])


def test_a_sliding_window_bounds_what_is_read(target: TargetModel, tmp_path: Path) -> None:
    changes = {"sliding_window": 16, "layer_types": ["sliding_attention"], "trained_length": 64}
    folder = write(tmp_path / "in", changes)
    head = load_draft(folder, target)
    assert head.config.window == 16
    assert any("the last 16 tokens" in note for note in report_of(folder).notes)
    save_head(to_head(head, "eagle3"), tmp_path / "out", sizes_of(target))
    assert load_draft(str(tmp_path / "out"), target).config == head.config


def test_a_window_wider_than_the_rows_of_training_bounds_nothing(tmp_path: Path) -> None:
    report = report_of(write(tmp_path, {"sliding_window": 128, "trained_length": 64}))
    assert dict(report.rows())["reads"] == "the last 64 tokens (the length it was trained on)"


@pytest.mark.parametrize("name", ["max_position_embeddings", "rms_norm_eps"])
def test_null_says_as_much_as_a_field_that_is_absent(name: str, target: TargetModel, tmp_path: Path) -> None:
    null, absent = (load_draft(write(tmp_path / str(value), {name: value}), target) for value in (None, ...))
    assert null.config == absent.config


def test_layer_types_say_whose_rope_is_the_heads(target: TargetModel, tmp_path: Path) -> None:
    ropes = {"full_attention": ROPE, "sliding_attention": {**ROPE, "rope_theta": 5e5}}
    for kind, theta in (("full_attention", 1e4), ("sliding_attention", 5e5)):
        head = load_draft(write(tmp_path / kind, {"rope_parameters": ropes, "layer_types": [kind, "other"]}), target)
        assert head.config.rope_parameters["rope_theta"] == theta


# Keys that are written.


def keys_written(changes: dict[str, Any], target: TargetModel, folder: Path, **of: Any) -> dict[str, Any]:
    head = load_draft(write(folder / "in", changes, **of), target)
    head_format: Any = "eagle3" if head.config.aux_layers else "eagle1"
    save_head(to_head(head, head_format), folder / "out", sizes_of(target))
    values: dict[str, Any] = json.loads((folder / "out" / "config.json").read_text())
    return values


def test_keys_are_written_where_their_value_is_not_the_default(target: TargetModel, tmp_path: Path) -> None:
    """The reference code takes `target_hidden_size` for a head that brings its own embedding, whatever its value."""
    written = keys_written({"target_hidden_size": 32}, target, tmp_path)
    for name in ("target_hidden_size", "fc_norm", "norm_output", "norm_before_residual", "attention_bias", "bias"):
        assert name not in written
    assert written["draft_vocab_size"] == 48, "SGLang must find it"


def test_a_bias_of_fc_is_not_called_bias(target: TargetModel, tmp_path: Path) -> None:
    """vLLM takes the key for biases of the attention, which no file fills; the reference code, its absence for yes."""
    of = {"values": TINY.values()}
    assert "bias" not in keys_written({}, target, tmp_path / "with", shapes=eagle1_shapes(TINY, fc_bias=True), **of)
    assert keys_written({}, target, tmp_path / "without", shapes=eagle1_shapes(TINY), **of)["bias"] is False


def test_files_of_before_still_load(target: TargetModel, tmp_path: Path) -> None:
    old = {"bias": True, "attention_bias": False, "target_hidden_size": 32, "fc_norm": False, "norm_output": False}
    eagle1 = load_draft(write(tmp_path / "1", old, eagle1_shapes(TINY, fc_bias=True), TINY.values()), target)
    assert eagle1.config.fc_bias and not eagle1.config.attention_bias
    assert (
        load_draft(write(tmp_path / "3", old), target).config == load_draft(write(tmp_path / "new", {}), target).config
    )


@pytest.mark.parametrize(("with_output", "key"), [(False, "qkv_bias"), (True, "attention_bias")])
def test_attention_biases_are_written_under_the_key_that_means_them(
    with_output: bool, key: str, target: TargetModel, tmp_path: Path
) -> None:
    sizes = {"q": 32, "k": 16, "v": 16} | ({"o": 32} if with_output else {})
    shapes = eagle1_shapes(TINY) | {f"layers.0.self_attn.{name}_proj.bias": (size,) for name, size in sizes.items()}
    written = keys_written({}, target, tmp_path, shapes=shapes, values=TINY.values())
    assert {name for name in ("qkv_bias", "attention_bias") if written.get(name)} == {key}
    again = load_draft(str(tmp_path / "out"), target)
    assert again.config.attention_bias and again.config.output_bias == with_output
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == shapes.keys()
