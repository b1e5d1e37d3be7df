"""The published head formats: names and shapes, round trips, conventions, and what is refused."""

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from published import (
    LLAMA_8B,
    LLAMA_70B,
    NARROW,
    QWEN3_32B,
    TINY,
    VICUNA_7B,
    VICUNA_13B,
    Shapes,
    eagle1_shapes,
    eagle3_shapes,
    on_meta,
    random_tensors,
    speculators_values,
)
from safetensors.torch import load_file, save_file

from draftwing.drafts.eagle.build_head import expected_shapes, fit_problems
from draftwing.drafts.eagle.fields import sort_fields
from draftwing.drafts.eagle.formats import AUX_NORM_NAMES, HeadFile, HeadOptions, default_aux_layers, read_head
from draftwing.drafts.eagle.network import DraftNetwork
from draftwing.drafts.eagle.save_head import save_head, to_head, write_head
from draftwing.drafts.fit import TargetSizes, sizes_of, tensor_problems
from draftwing.drafts.load_draft import load_draft, read_draft_files
from draftwing.target.attention import grouped_attention
from draftwing.target.model import TargetModel

DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


# Manifests: files as they are published, at their true sizes.


@pytest.fixture(scope="module")
def target(stock_target: TargetModel) -> TargetModel:
    """Training reads its weights."""
    return stock_target


@dataclass(frozen=True)
class Manifest:
    """A published head, the target it is for, and what reading it must give."""

    values: dict[str, Any]
    shapes: Shapes
    target: TargetSizes
    format: str
    expected: dict[str, Any]
    """Fields of the DraftConfig."""
    millions: float | None = None
    """Parameters, from the size of the published file."""


def norm_shapes(names: tuple[str, ...], size: int) -> Shapes:
    return {f"{name}.weight": (size,) for name in names}


MANIFESTS = {
    "eagle1-llama3.1-8b": Manifest(
        {**LLAMA_8B.values(), "bias": False, "rope_theta": 500000.0, "rms_norm_eps": 1e-5},
        eagle1_shapes(LLAMA_8B),
        TargetSizes(4096, 32, 128256),
        "eagle1",
        {"fc_bias": False, "num_key_value_heads": 8, "rope_parameters": {**DEFAULT_ROPE, "rope_theta": 500000.0}},
    ),
    "eagle1-vicuna-7b": Manifest(
        {k: v for k, v in VICUNA_7B.values().items() if k != "num_key_value_heads"},  # absent means one per head
        eagle1_shapes(VICUNA_7B, fc_bias=True),
        TargetSizes(4096, 32, 32000),
        "eagle1",
        {"fc_bias": True, "num_key_value_heads": 32, "head_dim": 128, "draft_vocab_size": 32000, "aux_layers": ()},
    ),
    "eagle1-vicuna-13b": Manifest(
        VICUNA_13B.values(),
        eagle1_shapes(VICUNA_13B, fc_bias=True),
        TargetSizes(5120, 40, 32000),
        "eagle1",
        {"max_position_embeddings": 2048},
        millions=533,
    ),
    "eagle1-qwen2": Manifest(
        {**LLAMA_8B.values(), "qkv_bias": True},
        eagle1_shapes(LLAMA_8B)
        | {f"layers.0.self_attn.{name}_proj.bias": (size,) for name, size in (("q", 4096), ("k", 1024), ("v", 1024))},
        TargetSizes(4096, 32, 128256),
        "eagle1",
        {"attention_bias": True},
    ),
    "eagle3-llama3.1-8b": Manifest(
        {**LLAMA_8B.values(), "draft_vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
        eagle3_shapes(LLAMA_8B),
        TargetSizes(4096, 32, 128256),
        "eagle3",
        {
            "aux_layers": (2, 16, 29),
            "draft_vocab_size": 32000,
            "vocab_size": 128256,
            "head_dim": 128,
            "rope_parameters": DEFAULT_ROPE,  # the file names no rope_theta
            "norm_before_residual": False,
            "norm_output": False,
            "fc_norm": False,
            "norm_before_fc": False,
        },
        millions=425,
    ),
    "eagle3-llama3.3-70b": Manifest(
        {**LLAMA_70B.values(), "draft_vocab_size": 32000},
        eagle3_shapes(LLAMA_70B),
        TargetSizes(8192, 80, 128256),
        "eagle3",
        {"aux_layers": (2, 40, 77)},
        millions=1403,
    ),
    "eagle3-vicuna-13b": Manifest(
        {**VICUNA_13B.values(), "draft_vocab_size": 32000, "num_hidden_layers": 40},  # as published; there is one
        eagle3_shapes(VICUNA_13B, vocab_maps=()),
        TargetSizes(5120, 40, 32000),
        "eagle3",
        {"num_hidden_layers": 1, "aux_layers": (2, 20, 37), "draft_vocab_size": 32000},
        millions=638,
    ),
    "eagle3-qwen3-32b": Manifest(
        {**QWEN3_32B.values(), "draft_vocab_size": 32000, "head_dim": 128, "rope_theta": 1000000},
        eagle3_shapes(QWEN3_32B),
        TargetSizes(5120, 64, 151936),
        "eagle3",
        {"head_dim": 128, "num_attention_heads": 64, "hidden_size": 5120},
    ),
    "eagle3-narrow-with-own-embedding": Manifest(
        {**NARROW.values(), "draft_vocab_size": 32000, "head_dim": 128, "target_hidden_size": 5120},
        eagle3_shapes(NARROW) | {"embed_tokens.weight": (151936, 2048)},
        TargetSizes(5120, 64, 151936),
        "eagle3",
        {"hidden_size": 2048, "target_hidden_size": 5120},
    ),
    "eagle3-model-optimizer": Manifest(
        {
            **LLAMA_8B.values(),
            "draft_vocab_size": 32000,
            "eagle_config": {
                "eagle_aux_hidden_state_layer_ids": [1, 15, 28],
                "use_aux_hidden_state": True,
                "use_input_layernorm_in_first_layer": True,
                "use_last_layernorm": True,
                "next_layer_regular": True,
            },
        },
        eagle3_shapes(LLAMA_8B, "layers.0", vocab_maps=("d2t",)),
        TargetSizes(4096, 32, 128256),
        "eagle3",
        {"aux_layers": (2, 16, 29)},
        millions=425,
    ),
    "speculators": Manifest(
        speculators_values({**LLAMA_8B.values(), "head_dim": 128, "rms_norm_eps": 1e-5}, draft_vocab_size=32000),
        eagle3_shapes(LLAMA_8B, "layers.0")
        | {"embed_tokens.weight": (128256, 4096)}
        | norm_shapes(("input_norm",), 3 * 4096),
        TargetSizes(4096, 32, 128256),
        "speculators",
        {"norm_before_residual": True, "norm_before_fc": True, "fc_norm": False, "aux_layers": (2, 16, 29)},
    ),
    "speculators-qwen3-layer": Manifest(
        speculators_values(
            {**QWEN3_32B.values(), "model_type": "qwen3", "head_dim": 128},
            draft_vocab_size=32000,
            norm_before_residual=False,
            target_hidden_size=None,
            eagle_aux_hidden_state_layer_ids=[2, 32, 61],
        ),
        eagle3_shapes(QWEN3_32B, "layers.0")
        | norm_shapes(("layers.0.self_attn.q_norm", "layers.0.self_attn.k_norm"), 128),
        TargetSizes(5120, 64, 151936),
        "speculators",
        {"norm_before_residual": False, "qk_norm": True, "aux_layers": (2, 32, 61), "target_hidden_size": 5120},
    ),
    "eagle3.1": Manifest(
        {**LLAMA_8B.values(), "draft_vocab_size": 32000, "fc_norm": True, "norm_output": True},
        eagle3_shapes(LLAMA_8B) | norm_shapes(("fc_norm.0", "fc_norm.1", "fc_norm.2"), 4096),
        TargetSizes(4096, 32, 128256),
        "eagle3",
        {"fc_norm": True, "norm_output": True, "norm_before_residual": False},
    ),
    "eagle3.1-sglang-names": Manifest(
        {**LLAMA_8B.values(), "draft_vocab_size": 32000, "use_aux_norm": True},
        eagle3_shapes(LLAMA_8B) | norm_shapes(("aux_norm_low", "aux_norm_mid", "aux_norm_high"), 4096),
        TargetSizes(4096, 32, 128256),
        "eagle3",
        {"fc_norm": True, "norm_output": False},
    ),
}


@pytest.mark.parametrize("manifest", MANIFESTS.values(), ids=MANIFESTS)
def test_published_manifest_is_read(manifest: Manifest) -> None:
    head = read_head(manifest.values, on_meta(manifest.shapes), manifest.target)
    assert sort_fields(manifest.values, manifest.shapes, head.is_eagle3).refused == []
    assert head.format == manifest.format
    assert {name: getattr(head.config, name) for name in manifest.expected} == manifest.expected
    assert tensor_problems(expected_shapes(head), head.tensors) == []
    assert fit_problems(head, manifest.target) == []
    if manifest.millions is not None:
        assert round(head.num_parameters / 1e6) == manifest.millions


@pytest.mark.parametrize("manifest", MANIFESTS.values(), ids=MANIFESTS)
def test_published_manifest_is_written(manifest: Manifest) -> None:
    """The same names and shapes at their true sizes, under the names that all engines read; maps have tests below."""
    head = read_head(manifest.values, on_meta(manifest.shapes), manifest.target)
    values, tensors = write_head(dataclasses.replace(head, target_ids=None), manifest.target)
    layer = "layers.0." if head.format in ("eagle1", "speculators") else "midlayer."
    expected = {
        AUX_NORM_NAMES.get(name, re.sub(r"^(layers\.0|midlayer)\.", layer, name)): shape
        for name, shape in manifest.shapes.items()
        if name not in ("d2t", "t2d")
    }
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}, "as published"
    stated = values.get("transformer_layer_config", values)
    published = manifest.values.get("transformer_layer_config", manifest.values)
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "tie_word_embeddings")
    assert {name: stated[name] for name in sizes} == {name: published[name] for name in sizes}


def test_prefix_and_stray_buffers_are_dropped() -> None:
    manifest = MANIFESTS["eagle3-llama3.1-8b"]
    tensors = {"model." + name: tensor for name, tensor in on_meta(manifest.shapes).items()}
    tensors["model.midlayer.self_attn.rotary_emb.inv_freq"] = torch.empty(64, device="meta")
    head = read_head(manifest.values, tensors, manifest.target)
    assert tensor_problems(expected_shapes(head), head.tensors) == []


def test_the_output_head_in_an_eagle1_repack_is_ignored() -> None:
    manifest = MANIFESTS["eagle1-vicuna-7b"]
    tensors = on_meta(manifest.shapes | {"lm_head.weight": (32000, 4096)})
    head = read_head(manifest.values, tensors, manifest.target)
    assert tensor_problems(expected_shapes(head), head.tensors) == []


# Round trips: a network, its files, and the network again.

AUX_LAYERS = (1, 3, 5)
TINY_TARGET = TargetSizes(hidden_size=32, num_layers=6, vocab_size=64)
TARGET_IDS = torch.arange(64)[torch.arange(64) % 4 != 2]
"""48 of the 64 tokens."""
TINY_VALUES = {**TINY.values(), "draft_vocab_size": 48, "rope_theta": 10000.0}
AUX_VALUES = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2, 4]}}


def without_embedding(shapes: Shapes) -> Shapes:
    return {name: shape for name, shape in shapes.items() if name != "embed_tokens.weight"}


TINY_HEADS: dict[str, tuple[dict[str, Any], Shapes]] = {
    "eagle1": (TINY.values(), eagle1_shapes(TINY, fc_bias=True)),
    "eagle1 of the target's embedding": (TINY.values(), without_embedding(eagle1_shapes(TINY))),
    "eagle3": ({**TINY_VALUES, **AUX_VALUES}, eagle3_shapes(TINY)),
    "eagle3.1": (
        {**TINY_VALUES, **AUX_VALUES, "fc_norm": True, "norm_output": True},
        eagle3_shapes(TINY) | norm_shapes(("fc_norm.0", "fc_norm.1", "fc_norm.2"), 32),
    ),
    "speculators": (
        speculators_values(TINY_VALUES, draft_vocab_size=48, eagle_aux_hidden_state_layer_ids=[1, 3, 5]),
        eagle3_shapes(TINY, "layers.0") | norm_shapes(("input_norm",), 96) | {"embed_tokens.weight": (64, 32)},
    ),
}


def write_files(folder: Path, values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(params=TINY_HEADS)
def head_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Each tiny head in its published format, with numbers in it."""
    values, shapes = TINY_HEADS[request.param]
    return write_files(tmp_path / "published", values, random_tensors(shapes, TARGET_IDS))


def assert_same_network(one: DraftNetwork, other: DraftNetwork) -> None:
    assert type(one) is type(other)
    assert one.config == other.config
    parameters, others = dict(one.named_parameters()), dict(other.named_parameters())
    assert parameters.keys() == others.keys()
    for name, parameter in parameters.items():
        assert torch.equal(parameter, others[name]), name
    ids, other_ids = one.vocab.target_ids, other.vocab.target_ids
    assert (ids is None and other_ids is None) or torch.equal(ids, other_ids)  # type: ignore[arg-type]


def test_reading_writing_and_reading_gives_the_same_network(
    head_folder: Path, target: TargetModel, tmp_path: Path
) -> None:
    network = load_draft(str(head_folder), target)
    values, tensors = read_draft_files(head_folder)
    head = to_head(network, read_head(values, tensors, TINY_TARGET).format)
    save_head(head, tmp_path / "written", sizes_of(target), verifier="org/target")
    assert_same_network(load_draft(str(tmp_path / "written"), target), network)
    written = load_file(tmp_path / "written" / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("head_format", ["eagle3", "speculators"])
@pytest.mark.parametrize("name", ["eagle3", "speculators"])
def test_either_format_holds_either_head(name: str, head_format: Any, target: TargetModel, tmp_path: Path) -> None:
    """The options that only speculators' files have are written to EAGLE-3 files too."""
    values, shapes = TINY_HEADS[name]
    network = load_draft(str(write_files(tmp_path / "in", values, random_tensors(shapes, TARGET_IDS))), target)
    save_head(to_head(network, head_format), tmp_path / "out", sizes_of(target))
    assert_same_network(load_draft(str(tmp_path / "out"), target), network)


def test_a_head_without_an_embedding_reads_the_targets(target: TargetModel, tmp_path: Path) -> None:
    """As one with a copy of it, which the published EAGLE-1 heads have."""
    values, shapes = TINY_HEADS["eagle1"]
    tensors = random_tensors(shapes, TARGET_IDS)
    embedding = target.embedding.weight.detach()
    folders = [
        write_files(tmp_path / name, values, {**tensors, **of_target})
        for name, of_target in (("copy", {"embed_tokens.weight": embedding.clone()}), ("other", {}))
    ]
    del tensors["embed_tokens.weight"]
    folders.append(write_files(tmp_path / "none", values, tensors))
    copy, other, none = (load_draft(str(folder), target) for folder in folders)
    tokens = torch.arange(20).view(2, 10)
    outputs = [head.embed(tokens, torch.float32) for head in (copy, other, none)]
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize("kinds", [["sliding", "full"], ["full", "sliding"]])
def test_layers_of_two_kinds_of_attention_are_refused(kinds: list[str], target: TargetModel, tmp_path: Path) -> None:
    values, shapes = TINY_HEADS["eagle3"]
    second = {name.replace("layers.0", "layers.1"): shape for name, shape in eagle1_shapes(TINY).items()}
    shapes = shapes | {name: shape for name, shape in second.items() if name.startswith("layers.1")}
    windows = {"sliding_window": 16, "layer_types": [f"{kind}_attention" for kind in kinds]}
    folder = write_files(tmp_path, values | windows, random_tensors(shapes, TARGET_IDS))
    with pytest.raises(ValueError, match="the layers of a head have one kind of attention here, these have two"):
        load_draft(str(folder), target)


def test_several_layers_survive_the_round_trip(target: TargetModel, tmp_path: Path) -> None:
    """Layers behind the first are plain ones, layers.1 and on in every file."""
    values, shapes = TINY_HEADS["eagle3"]
    second = {name.replace("layers.0", "layers.1"): shape for name, shape in eagle1_shapes(TINY).items()}
    second = {name: shape for name, shape in second.items() if name.startswith("layers.1")}
    shapes = shapes | second | norm_shapes(("layers.1.input_layernorm",), 32)
    tensors = random_tensors(shapes, TARGET_IDS)
    network = load_draft(str(write_files(tmp_path / "in", values, tensors)), target)
    assert network.config.num_hidden_layers == 2
    for head_format, prefix in (("eagle3", "midlayer."), ("speculators", "layers.0.")):
        folder = tmp_path / head_format
        save_head(to_head(network, head_format), folder, sizes_of(target))  # type: ignore[arg-type]
        assert_same_network(load_draft(str(folder), target), network)
        names = load_file(folder / "model.safetensors").keys()
        assert {name.replace("midlayer.", prefix) for name in shapes} == names


def test_dtype_of_the_written_files(target: TargetModel, tmp_path: Path) -> None:
    values, shapes = TINY_HEADS["eagle3"]
    network = load_draft(str(write_files(tmp_path / "in", values, random_tensors(shapes, TARGET_IDS))), target)
    save_head(to_head(network, "eagle3"), tmp_path / "out", sizes_of(target), dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors.pop("d2t").dtype == torch.int64
    assert tensors.pop("t2d").dtype == torch.bool
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def as_bin(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    torch.save({"not": "weights"}, folder / "training_args.bin")
    (folder / "model.safetensors").unlink()


def as_shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def with_prefix(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({f"model.{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")


def as_training_state(folder: Path) -> None:
    """What accelerate's `save_state` leaves: the second model is the target's output head; not all are tensors."""
    as_bin(folder)
    torch.save({"weight": torch.zeros(64, 32)}, folder / "pytorch_model_1.bin")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    torch.save(optimizer.state_dict(), folder / "optimizer.bin")
    torch.save({"last_epoch": 3, "_step_count": 4}, folder / "scheduler.bin")


def as_training_state_in_safetensors(folder: Path) -> None:
    save_file({"weight": torch.zeros(64, 32)}, folder / "model_1.safetensors")
    torch.save({"state": {}, "param_groups": []}, folder / "optimizer.bin")


def under_another_name(folder: Path) -> None:
    torch.save({"state": {}, "param_groups": []}, folder / "optimizer.bin")
    (folder / "model.safetensors").rename(folder / "head.safetensors")


@pytest.mark.parametrize(
    "rewrite",
    [as_bin, as_shards, with_prefix, as_training_state, as_training_state_in_safetensors, under_another_name],
)
def test_other_files_give_the_same_network(
    rewrite: Callable[[Path], None], head_folder: Path, target: TargetModel
) -> None:
    network = load_draft(str(head_folder), target)
    rewrite(head_folder)
    assert_same_network(load_draft(str(head_folder), target), network)


# Conventions.


def read_tiny(
    name: str = "eagle3",
    changes: dict[str, Any] | None = None,
    target: TargetSizes | None = TINY_TARGET,
    tensors: dict[str, torch.Tensor | None] | None = None,
    **overrides: Any,
) -> HeadFile:
    """A tiny head with changed values (None removes) and tensors (None removes)."""
    values, shapes = TINY_HEADS[name]
    held: dict[str, Any] = random_tensors(shapes, TARGET_IDS) | (tensors or {})
    values = {key: value for key, value in (values | (changes or {})).items() if value is not None}
    tensors = {key: value for key, value in held.items() if value is not None}
    return read_head(values, tensors, target, HeadOptions(**overrides))


def test_d2t_holds_offsets_and_memory_holds_ids() -> None:
    assert torch.equal(read_tiny().target_ids, TARGET_IDS)  # type: ignore[arg-type]
    offsets = random_tensors(TINY_HEADS["eagle3"][1], TARGET_IDS)["d2t"]
    assert offsets[:5].tolist() == [0, 0, 1, 1, 1]  # tokens 0, 1, 3, 4, 5


def test_t2d_may_be_absent() -> None:
    assert torch.equal(read_tiny(tensors={"t2d": None}).target_ids, TARGET_IDS)  # type: ignore[arg-type]


def test_d2t_may_be_absent() -> None:
    """Draft tokens are numbered in the order of the target's, so that t2d alone tells."""
    assert torch.equal(read_tiny(tensors={"d2t": None}).target_ids, TARGET_IDS)  # type: ignore[arg-type]
    narrow = {"d2t": None, "t2d": torch.arange(64) < 47}
    with pytest.raises(ValueError, match="t2d: marks 47 tokens for the 48 rows of lm_head"):
        read_tiny(tensors=narrow)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_maps_of_other_dtypes(dtype: torch.dtype) -> None:
    maps = random_tensors(TINY_HEADS["eagle3"][1], TARGET_IDS)
    tensors = {"d2t": maps["d2t"].to(dtype), "t2d": maps["t2d"].to(torch.uint8)}
    assert torch.equal(read_tiny(tensors=tensors).target_ids, TARGET_IDS)  # type: ignore[arg-type]


def test_a_draft_vocabulary_of_another_size_than_its_output_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"draft_vocab_size: config\.json says 47, lm_head\.weight has 48 rows"):
        read_tiny(changes={"draft_vocab_size": 47})


def test_a_whole_vocabulary_needs_no_maps() -> None:
    whole = torch.zeros(64, 32, dtype=torch.float64)
    zeros = torch.zeros(64, dtype=torch.int64)
    ones = torch.ones(64, dtype=torch.bool)
    for maps in (
        {"d2t": None, "t2d": None},
        {"d2t": zeros, "t2d": ones},
        {"d2t": zeros, "t2d": ~ones},  # nobody has filled them in
        {"d2t": zeros, "t2d": None},
        {"d2t": None, "t2d": ones},
    ):
        head = read_tiny(changes={"draft_vocab_size": 64}, tensors={"lm_head.weight": whole, **maps})
        assert head.target_ids is None
        assert head.config.draft_vocab_size == 64


def test_a_permuted_whole_vocabulary_keeps_its_map() -> None:
    ids = torch.arange(63, -1, -1)
    maps = {"d2t": ids - torch.arange(64), "t2d": torch.ones(64, dtype=torch.bool)}
    head = read_tiny(changes={"draft_vocab_size": 64}, tensors={"lm_head.weight": torch.zeros(64, 32), **maps})
    assert torch.equal(head.target_ids, ids)  # type: ignore[arg-type]


def shifted(by: int) -> torch.Tensor:
    return TARGET_IDS - torch.arange(48) + by


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"t2d": torch.arange(64) < 48}, "t2d: marks other tokens"),
        ({"t2d": torch.ones(64, dtype=torch.bool)}, "t2d: marks other tokens"),
        ({"d2t": shifted(40)}, "d2t: maps to token 64, outside the target vocabulary of 64"),
        ({"d2t": shifted(-1), "t2d": None}, "d2t: maps to token -1, outside"),
        ({"d2t": None, "t2d": None}, "d2t: missing, and lm_head.weight has 48 rows for 64 tokens"),
        ({"d2t": torch.zeros(47, dtype=torch.int64)}, "d2t: expected 48 entries"),
        ({"d2t": torch.zeros(48, dtype=torch.int64), "t2d": torch.zeros(64, dtype=torch.bool)}, "t2d: marks other"),
        ({"lm_head.weight": None}, "lm_head.weight: missing"),
    ],
)
def test_a_broken_vocabulary_map_is_named(tensors: dict[str, torch.Tensor | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_tiny(tensors=tensors)


def test_two_draft_tokens_for_one_target_token_are_refused(target: TargetModel, tmp_path: Path) -> None:
    values, shapes = TINY_HEADS["eagle3"]
    tensors = random_tensors(shapes, TARGET_IDS)
    tensors["d2t"][1] -= 1
    del tensors["t2d"]
    with pytest.raises(ValueError, match="d2t: maps two draft tokens to one target token"):
        load_draft(str(write_files(tmp_path, values, tensors)), target)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("eagle3", {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}}, (2, 3, 4)),  # output ids
        ("eagle3", {"eagle_config": None, "eagle_aux_hidden_state_layer_ids": [1, 2, 4]}, (1, 2, 4)),  # as they are
        ("speculators", {"eagle_aux_hidden_state_layer_ids": [2, 3, 6]}, (2, 3, 6)),
    ],
)
def test_feature_layers_in_each_convention(name: str, changes: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert read_tiny(name, changes).config.aux_layers == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"target_layer_ids": [0, 2, 4]}, (1, 3, 5)),  # DeepSpec: layers counted from 0, their outputs
        ({"eagle_config": {"target_layer_ids": [0, 2, 5]}}, (1, 3, 6)),
        ({"aux_hidden_state_layer_ids": [1, 3, 5]}, (1, 3, 5)),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, -1]}}, (2, 3, 6)),  # from the end, as in Python
        ({"eagle_aux_hidden_state_layer_ids": [1, 3, 5], "target_layer_ids": [0, 2, 4]}, (1, 3, 5)),
    ],
)
def test_feature_layers_under_each_name(changes: dict[str, Any], expected: tuple[int, ...]) -> None:
    head = read_tiny(changes={"eagle_config": None} | changes)
    assert head.config.aux_layers == expected
    tensors = random_tensors(TINY_HEADS["eagle3"][1], TARGET_IDS)
    values = {**TINY_VALUES, **changes}
    assert sort_fields(values, tensors, is_eagle3=True).refused == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"eagle_aux_hidden_state_layer_ids": [0, 2, 4], **AUX_VALUES},  # the same list in both conventions
            r"the file's lists contradict each other .*\[1, 3, 5\].*\[0, 2, 4\].*pass aux_layers \(--aux-layers\)",
        ),
        ({"eagle_config": None, "layer_ids": [1, 3, 5]}, r"layer_ids: \[1, 3, 5\] may count layers from 0 or from 1"),
    ],
)
def test_feature_layers_in_an_unknown_convention_are_asked_for(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_tiny(changes=changes)
    assert read_tiny(changes=changes, aux_layers=(1, 3, 5)).config.aux_layers == (1, 3, 5)


def test_any_number_of_feature_layers(target: TargetModel, tmp_path: Path) -> None:
    """DeepSpec's EAGLE-3 heads read five."""
    shapes = eagle3_shapes(TINY) | {"fc.weight": (32, 5 * 32)}
    values = {**TINY_VALUES, "target_layer_ids": [0, 1, 2, 4, 5]}
    network = load_draft(str(write_files(tmp_path / "in", values, random_tensors(shapes, TARGET_IDS))), target)
    assert network.config.aux_layers == (1, 2, 3, 5, 6)
    save_head(to_head(network, "eagle3"), tmp_path / "out", sizes_of(target))
    assert_same_network(load_draft(str(tmp_path / "out"), target), network)


# Parts that a file leaves to the target.


@torch.inference_mode()
def logits_of(network: DraftNetwork, features: torch.Tensor) -> torch.Tensor:
    """What a head says of a fixed text of 8 tokens, from `features [1, 8, F]`."""
    numbers, mask = torch.arange(8)[None], torch.ones(8, 8, dtype=torch.bool).tril()[None, None]

    def attend(layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return grouped_attention(queries, keys, values, mask).transpose(1, 2)

    return network.logits(network(network.project(features), numbers, numbers, attend))


def whole_head() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """An EAGLE-3 head over the whole vocabulary."""
    sizes = dataclasses.replace(TINY, draft_vocab=64)
    values = {**TINY_VALUES, **AUX_VALUES, "draft_vocab_size": 64}
    return values, random_tensors(eagle3_shapes(sizes, vocab_maps=()))


@pytest.mark.parametrize("stated", [None, 64])
@pytest.mark.parametrize("head_format", ["eagle3", "speculators"])
def test_without_an_output_head_the_targets_is_used(
    stated: int | None, head_format: Any, target: TargetModel, tmp_path: Path
) -> None:
    values, tensors = whole_head()
    own = target.output_head.weight.detach().clone()
    assert isinstance(own, torch.Tensor)
    with_head = load_draft(str(write_files(tmp_path / "with", values, tensors | {"lm_head.weight": own})), target)
    del tensors["lm_head.weight"]
    folder = write_files(tmp_path / "without", {**values, "draft_vocab_size": stated}, tensors)
    network = load_draft(str(folder), target)
    features = torch.randn(1, 8, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits_of(network, features), logits_of(with_head, features))
    assert not any(name.startswith("lm_head") for name, _ in network.named_parameters())
    save_head(to_head(network, head_format), tmp_path / "out", sizes_of(target))
    assert_same_network(load_draft(str(tmp_path / "out"), target), network)


def test_a_tied_head_with_an_embedding_reads_it_out(target: TargetModel, tmp_path: Path) -> None:
    values, tensors = whole_head()
    tensors["embed_tokens.weight"] = tensors.pop("lm_head.weight")
    values |= {"tie_word_embeddings": True}
    network = load_draft(str(write_files(tmp_path / "tied", values, tensors)), target)
    assert torch.equal(network.lm_head.weight, tensors["embed_tokens.weight"])  # type: ignore[union-attr]
    del tensors["embed_tokens.weight"]
    with pytest.raises(ValueError, match="tie_word_embeddings: the head's output head is its embedding"):
        load_draft(str(write_files(tmp_path / "untold", values, tensors)), target)


def test_without_fc_the_last_state_is_the_first_of_the_draft(target: TargetModel, tmp_path: Path) -> None:
    values, shapes = TINY_HEADS["eagle3"]
    last = {"eagle_aux_hidden_state_layer_ids": [], "use_aux_hidden_state": False}
    tensors = random_tensors(shapes, TARGET_IDS)
    joined = tensors | {"fc.weight": torch.eye(32, dtype=torch.float64)}
    with_fc = load_draft(str(write_files(tmp_path / "with", values | {"eagle_config": last}, joined)), target)
    del tensors["fc.weight"]
    network = load_draft(str(write_files(tmp_path / "without", values | {"eagle_config": last}, tensors)), target)
    assert network.config.feature_layers == with_fc.config.feature_layers == (-1,), "behind the final norm"
    features = torch.randn(1, 8, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits_of(network, features), logits_of(with_fc, features))
    save_head(to_head(network, "eagle3"), tmp_path / "out", sizes_of(target))
    assert_same_network(load_draft(str(tmp_path / "out"), target), network)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", TINY_HEADS)
def test_weights_that_are_not_finite_are_refused(name: str, number: float, target: TargetModel, tmp_path: Path) -> None:
    values, shapes = TINY_HEADS[name]
    tensors = random_tensors(shapes, TARGET_IDS)
    tensors["fc.weight"][3, 5] = number
    with pytest.raises(ValueError, match=r"fc\.weight: holds NaN or infinity"):
        load_draft(str(write_files(tmp_path, values, tensors)), target)


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [(8, (2, 4, 5)), (28, (2, 14, 25)), (32, (2, 16, 29)), (36, (2, 18, 33)), (61, (2, 30, 58))],
)
def test_default_feature_layers(num_layers: int, expected: tuple[int, ...]) -> None:
    assert default_aux_layers(num_layers) == expected
    deep = dataclasses.replace(TINY_TARGET, num_layers=num_layers)
    assert read_tiny(changes={"eagle_config": None}, target=deep).config.aux_layers == expected


def test_a_shallow_target_has_no_default_feature_layers() -> None:
    with pytest.raises(ValueError, match="aux_layers: a target of 6 layers has no default"):
        read_tiny(changes={"eagle_config": None})


def test_feature_layers_can_be_overridden() -> None:
    assert read_tiny(aux_layers=(2, 4, 6)).config.aux_layers == (2, 4, 6)
    with pytest.raises(ValueError, match=r"aux_layers: fc\.weight reads 3 layers"):
        read_tiny(aux_layers=(2, 4))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, DEFAULT_ROPE),
        ({"rope_theta": None, "rope_scaling": None}, DEFAULT_ROPE),
        ({"rope_theta": 1e6}, {"rope_type": "default", "rope_theta": 1e6}),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
        ),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING}, {**LLAMA3_SCALING, "rope_theta": 5e5}),
        ({"rope_parameters": {**LLAMA3_SCALING, "rope_theta": 5e5}}, {**LLAMA3_SCALING, "rope_theta": 5e5}),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 1e6},
            {"rope_type": "default", "rope_theta": 5e5},
        ),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_rope_settings_old_and_new(values: dict[str, Any], expected: dict[str, Any], nested: bool) -> None:
    values = {**TINY.values(), **values}
    name = "speculators" if nested else "eagle3"
    changes = {"transformer_layer_config": values} if nested else {"rope_theta": None} | values
    assert read_tiny(name, changes).config.rope_parameters == expected


@pytest.mark.parametrize("name", TINY_HEADS)
def test_rope_theta_can_be_overridden(name: str) -> None:
    assert read_tiny(name, rope_theta=1e4).config.rope_parameters == DEFAULT_ROPE
    assert read_tiny(name, rope_theta=5e5).config.rope_parameters == {**DEFAULT_ROPE, "rope_theta": 5e5}


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_overriding_rope_theta_keeps_the_scaling(key: str) -> None:
    head = read_tiny(changes={"rope_theta": 1e6, key: dict(LLAMA3_SCALING)}, rope_theta=1e4)
    assert head.config.rope_parameters == {**LLAMA3_SCALING, "rope_theta": 1e4}


def test_written_rope_settings_are_there_for_old_and_new_readers(target: TargetModel, tmp_path: Path) -> None:
    values, shapes = TINY_HEADS["eagle3"]
    values = {**values, "rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING}
    network = load_draft(str(write_files(tmp_path / "in", values, random_tensors(shapes, TARGET_IDS))), target)
    save_head(to_head(network, "eagle3"), tmp_path / "out", sizes_of(target))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_parameters"] == {**LLAMA3_SCALING, "rope_theta": 5e5}
    assert written["rope_theta"] == 5e5
    assert written["rope_scaling"] == LLAMA3_SCALING


def test_an_unsupported_rope_type_is_named(target: TargetModel, tmp_path: Path) -> None:
    values, shapes = TINY_HEADS["eagle3"]
    values = {**values, "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}}
    with pytest.raises(ValueError, match="rope_type: expected one of default, linear, llama3, yarn, got 'longrope'"):
        load_draft(str(write_files(tmp_path, values, random_tensors(shapes, TARGET_IDS))), target)


def test_defaults_of_the_residual_option_differ_by_format() -> None:
    assert not read_tiny("eagle3").config.norm_before_residual
    assert read_tiny("eagle3", {"norm_before_residual": True}).config.norm_before_residual
    assert read_tiny("speculators").config.norm_before_residual
    assert not read_tiny("speculators", {"norm_before_residual": False}).config.norm_before_residual


def test_written_feature_layers_follow_each_format(target: TargetModel, tmp_path: Path) -> None:
    values, shapes = TINY_HEADS["eagle3"]
    network = load_draft(str(write_files(tmp_path / "in", values, random_tensors(shapes, TARGET_IDS))), target)
    key = "eagle_aux_hidden_state_layer_ids"
    save_head(to_head(network, "eagle3"), tmp_path / "eagle3", sizes_of(target))
    written = json.loads((tmp_path / "eagle3" / "config.json").read_text())
    assert written["eagle_config"][key] == [0, 2, 4]  # SpecForge, SGLang
    assert written[key] == [1, 3, 5]  # vLLM, llama.cpp
    assert load_draft(str(tmp_path / "eagle3"), target).config.aux_layers == AUX_LAYERS
    save_head(to_head(network, "speculators"), tmp_path / "speculators", sizes_of(target))
    assert json.loads((tmp_path / "speculators" / "config.json").read_text())[key] == [1, 3, 5]


# Strictness.


@pytest.mark.parametrize("name", ["eagle1", "eagle3", "eagle3.1", "speculators"])
def test_every_missing_tensor_is_named(name: str, target: TargetModel, tmp_path: Path) -> None:
    values, shapes = TINY_HEADS[name]
    # Their presence is what decides, or one of two is enough.
    optional = ("d2t", "t2d", "fc.bias", "input_norm.weight", "fc_norm.0.weight", "embed_tokens.weight")
    for lost in shapes.keys() - set(optional):
        tensors = random_tensors(shapes, TARGET_IDS)
        del tensors[lost]
        with pytest.raises(ValueError, match="missing") as caught:
            load_draft(str(write_files(tmp_path, values, tensors)), target)
        ours = lost.replace("layers.0.", "midlayer.") if name == "speculators" else lost
        assert str(caught.value).startswith((f"{lost}:", f"{ours}:")), lost


def test_an_unknown_tensor_is_named(head_folder: Path, target: TargetModel) -> None:
    tensors = load_file(head_folder / "model.safetensors")
    save_file(tensors | {"mask_hidden": torch.zeros(1, 32)}, head_folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"mask_hidden: unknown tensor of shape \(1, 32\)"):
        load_draft(str(head_folder), target)


def test_an_input_norm_in_an_eagle1_file_is_refused(target: TargetModel, tmp_path: Path) -> None:
    values, shapes = TINY_HEADS["eagle1"]
    tensors = random_tensors(shapes | norm_shapes(("layers.0.input_layernorm",), 32))
    with pytest.raises(ValueError, match=r"layers.0.input_layernorm.weight: unknown tensor"):
        load_draft(str(write_files(tmp_path, values, tensors)), target)


@pytest.mark.parametrize(
    ("name", "wrong", "expected"),
    [
        ("mlp.gate_proj.weight", (47, 32), (48, 32)),
        ("mlp.down_proj.weight", (32, 47), (32, 48)),
        ("self_attn.k_proj.weight", (8, 64), (16, 64)),
        ("self_attn.o_proj.weight", (31, 32), (32, 32)),
        ("hidden_norm.weight", (33,), (32,)),
    ],
)
def test_a_misshapen_tensor_is_named(
    name: str, wrong: tuple[int, ...], expected: tuple[int, ...], target: TargetModel, tmp_path: Path
) -> None:
    values, shapes = TINY_HEADS["eagle3"]
    tensors = random_tensors(shapes | {f"midlayer.{name}": wrong}, TARGET_IDS)
    with pytest.raises(ValueError) as caught:
        load_draft(str(write_files(tmp_path, values, tensors)), target)
    assert str(caught.value) == f"midlayer.{name}: expected shape {expected}, got {wrong}"


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"])
@pytest.mark.parametrize("name", ["eagle1", "eagle3"])
def test_a_missing_configuration_key_is_named(name: str, key: str) -> None:
    with pytest.raises(ValueError, match=f"{key}: missing from the head's config.json"):
        read_tiny(name, {key: None})


def test_a_speculators_file_without_its_layer_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match=r"transformer_layer_config: missing from the head's config\.json"):
        read_tiny("speculators", {"transformer_layer_config": None})


def test_another_speculators_algorithm_is_refused() -> None:
    with pytest.raises(ValueError, match="speculators_model_type: expected eagle3, got 'dflash'"):
        read_tiny("speculators", {"speculators_model_type": "dflash"})


def test_a_file_that_is_no_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fc\.weight: missing; this is no EAGLE head"):
        read_head({}, {"model.layers.0.self_attn.q_proj.weight": torch.zeros(1, 1)})


OTHER_TARGETS: dict[str, tuple[dict[str, int], str]] = {
    "hidden size": ({"hidden_size": 48, "num_attention_heads": 6}, "hidden_size: .* width 32, the target's have 48"),
    "vocabulary": ({"vocab_size": 72}, "vocab_size: .* made for 64 tokens, the target has 72"),
}


@pytest.mark.parametrize(("sizes", "message"), OTHER_TARGETS.values(), ids=OTHER_TARGETS)
def test_a_head_for_another_target_is_refused(sizes: dict[str, int], message: str, head_folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_draft(str(head_folder), TargetModel(tiny_llama(**sizes)))


@pytest.mark.parametrize("name", ["eagle3", "eagle3.1", "speculators"])
def test_a_target_with_too_few_layers_is_refused(name: str, tmp_path: Path) -> None:
    values, shapes = TINY_HEADS[name]
    folder = write_files(tmp_path, values, random_tensors(shapes, TARGET_IDS))
    with pytest.raises(ValueError, match=r"aux_layers: \(1, 3, 5\) go beyond the target's 4 layers"):
        load_draft(str(folder), TargetModel(tiny_llama(num_hidden_layers=4)))


def test_a_narrow_head_needs_its_own_embedding(target: TargetModel, tmp_path: Path) -> None:
    sizes = dataclasses.replace(TINY, hidden=16)
    values = {**TINY_VALUES, **AUX_VALUES, "hidden_size": 16, "head_dim": 8, "target_hidden_size": 32}
    with pytest.raises(ValueError, match=r"embed_tokens\.weight: missing, .* width 32 instead of the head's 16"):
        load_draft(str(write_files(tmp_path, values, random_tensors(eagle3_shapes(sizes), TARGET_IDS))), target)
    shapes = eagle3_shapes(sizes) | {"embed_tokens.weight": (64, 16)}
    network = load_draft(str(write_files(tmp_path, values, random_tensors(shapes, TARGET_IDS))), target)
    assert network.config.hidden_size == 16


def truncate(folder: Path) -> str:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return "cannot read .*model.safetensors"


def empty(folder: Path) -> str:
    (folder / "model.safetensors").write_bytes(b"")
    return "cannot read .*model.safetensors"


def lfs_pointer(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    return "cannot read .*pytorch_model.bin"


def nested_state(folder: Path) -> str:
    torch.save({"state_dict": load_file(folder / "model.safetensors"), "epoch": 3}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return "pytorch_model.bin holds other things than tensors by name"


def lost_shard(folder: Path) -> str:
    as_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    return "cannot read .*model-00002-of-00002.safetensors"


def config_of_another_kind(folder: Path) -> str:
    (folder / "config.json").write_text("[]")
    return "cannot read .*config.json: expected an object, got list"


def broken_config(folder: Path) -> str:
    (folder / "config.json").write_text('{"hidden_size": 32,')
    return "cannot read .*config.json"


def no_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "has no config.json"


def no_weights(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return "has neither .safetensors nor .bin files"


DAMAGES = [truncate, empty, lfs_pointer, nested_state, lost_shard, broken_config, config_of_another_kind]


@pytest.mark.parametrize("damage", [*DAMAGES, no_config, no_weights])
def test_damaged_files_are_named(damage: Callable[[Path], str], target: TargetModel, tmp_path: Path) -> None:
    values, shapes = TINY_HEADS["eagle3"]
    message = damage(write_files(tmp_path, values, random_tensors(shapes, TARGET_IDS)))
    with pytest.raises(ValueError, match=f"draft: .*{message}"):
        load_draft(str(tmp_path), target)
