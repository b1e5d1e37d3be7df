"""Drafts written for other engines: what each one finds in the folder, what is refused, and the way back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published import TINY, eagle1_shapes, eagle3_shapes, random_tensors
from safetensors.torch import load_file, save_file
from test_formats import norm_shapes, speculators_values
from test_medusa_files import tensors_of

from draftwing.cli import main
from draftwing.drafts import load_draft
from draftwing.drafts.eagle import gguf_head as gguf_heads
from draftwing.drafts.export_draft import export_draft
from draftwing.drafts.family import ENGINES

gguf = pytest.importorskip("gguf")

TARGET_IDS = torch.arange(64)[torch.arange(64) % 4 != 2]
"""48 of the target's 64 tokens."""
VALUES = {**TINY.values(), "draft_vocab_size": 48, "rope_theta": 10000.0, "rms_norm_eps": 1e-5}
AUX = {"eagle_aux_hidden_state_layer_ids": [1, 3, 5]}
DEFAULT_AUX = {"eagle_aux_hidden_state_layer_ids": [2, 4, 5]}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A target of 8 layers, for which the layers that EAGLE-3 reads by default are 2, 4 and 5."""
    folder = tmp_path_factory.mktemp("target")
    tiny_llama(num_hidden_layers=8).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def target_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target's GGUF file, of which the tokenizer alone is read."""
    return write_tokenizer_gguf(tmp_path_factory.mktemp("gguf") / "target.gguf")


def write_tokenizer_gguf(file: Path) -> Path:
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "<end>"])
    writer.add_token_types([1, 1, 3])
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write(folder: Path, values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return str(folder)


def eagle3(folder: Path, shapes: dict[str, tuple[int, ...]] | None = None, **values: Any) -> str:
    tensors = random_tensors(eagle3_shapes(TINY) | (shapes or {}), TARGET_IDS)
    return write(folder, VALUES | DEFAULT_AUX | values, to_float32(tensors))


def eagle1(folder: Path, fc_bias: bool = False, **values: Any) -> str:
    return write(folder, TINY.values() | values, to_float32(random_tensors(eagle1_shapes(TINY, fc_bias), TARGET_IDS)))


def to_float32(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("engine", ENGINES)
def test_each_engine_finds_the_names_that_it_reads(engine: str, target: str, target_gguf: Path, tmp_path: Path) -> None:
    draft = eagle3(tmp_path / "draft")
    exported = export_draft(draft, target, engine, tmp_path / "out", target_gguf=target_gguf)
    assert exported.folder == tmp_path / "out"
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8").count(exported.command) == 1
    assert not (tmp_path / "out.partial").exists()
    if engine == "llama.cpp":
        return
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    expected = eagle3_shapes(TINY, "layers.0" if engine == "speculators" else "midlayer")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert torch.equal(tensors["d2t"] + torch.arange(48), TARGET_IDS)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_both_lists_of_feature_layers_mean_the_same(engine: str, target: str, tmp_path: Path) -> None:
    """vLLM reads the one at the top level, SGLang the nested one, which counts from one less."""
    export_draft(eagle3(tmp_path / "draft", **AUX), target, engine, tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    layers = values["eagle_aux_hidden_state_layer_ids"]
    assert layers == [layer + 1 for layer in values["eagle_config"]["eagle_aux_hidden_state_layer_ids"]] == [1, 3, 5]


def test_a_gguf_head_has_absolute_ids_and_rows_in_pairs(target: str, target_gguf: Path, tmp_path: Path) -> None:
    draft = eagle3(tmp_path / "draft")
    export_draft(draft, target, "llama.cpp", tmp_path / "out", target_gguf=target_gguf)
    reader = gguf.GGUFReader(tmp_path / "out" / gguf_heads.HEAD_GGUF)
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    fields = {key: field.contents() for key, field in reader.fields.items()}
    ours = load_file(Path(draft) / "model.safetensors")
    assert tensors.keys() == {*gguf_heads.NAMES.values(), "d2t"} - {"token_embd.weight", "enc.output_norm.weight"}
    assert torch.equal(tensors["d2t"], TARGET_IDS)
    assert fields["eagle3.target_layers"] == [2, 4, 5]
    assert fields["tokenizer.ggml.tokens"] == ["a", "b", "<end>"]
    for name, heads in (("q", 4), ("k", 2)):
        theirs, mine = tensors[f"blk.0.attn_{name}.weight"], ours[f"midlayer.self_attn.{name}_proj.weight"]
        for head in range(heads):
            first = 8 * head
            assert torch.equal(theirs[first], mine[first])
            assert torch.equal(theirs[first + 1], mine[first + 4])  # half a head of 8 apart
    assert torch.equal(tensors["blk.0.attn_v.weight"], ours["midlayer.self_attn.v_proj.weight"])


@pytest.mark.parametrize("sabotage", ["pairs", "offsets"])
def test_wrong_conventions_are_noticed(
    sabotage: str, target: str, target_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is read back and compared; a cut or a fault leaves no folder."""
    if sabotage == "pairs":
        monkeypatch.setattr(gguf_heads, "halves_to_pairs", lambda weight, num_heads: weight)
    else:
        monkeypatch.setattr(load_draft, "read_gguf", with_offsets(load_draft.read_gguf))
    with pytest.raises(ValueError, match="other numbers" if sabotage == "pairs" else "d2t|t2d|target_ids"):
        export_draft(eagle3(tmp_path / "draft"), target, "llama.cpp", tmp_path / "out", target_gguf=target_gguf)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["draft"]


def with_offsets(read: Any) -> Any:
    """A reader that takes the file's absolute ids for offsets."""

    def sabotaged(file: Path) -> Any:
        values, tensors = read(file)
        return values, tensors | {"d2t": tensors["d2t"] + torch.arange(48)}

    return sabotaged


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("option", ["norm_before_residual", "norm_output", "fc_norm", "norm_before_fc"])
def test_an_option_is_read_there_or_refused(
    option: str, engine: str, target: str, target_gguf: Path, tmp_path: Path
) -> None:
    norms = {"fc_norm": norm_shapes(("fc_norm.0", "fc_norm.1", "fc_norm.2"), 32)}
    norms["norm_before_fc"] = norm_shapes(("input_norm",), 96)
    draft = eagle3(tmp_path / "draft", norms.get(option), **{option: True})
    out, more = tmp_path / "out", {"target_gguf": target_gguf}
    readers = {
        "norm_before_residual": {"vllm", "speculators", "llama.cpp"},
        "norm_output": {"vllm", "sglang", "speculators"},
        "fc_norm": {"vllm", "sglang", "speculators"},
        "norm_before_fc": {"vllm", "sglang", "speculators", "llama.cpp"},
    }
    if engine in readers[option]:
        export_draft(draft, target, engine, out, **more)
        return
    says = "cannot load it" if engine == "llama.cpp" else "would load it and draft worse"
    with pytest.raises(ValueError, match=f"{says}: {option}: "):
        export_draft(draft, target, engine, out, **more)
    assert not out.exists()


def test_gguf_heads_that_are_not_read(target: str, target_gguf: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Windows, scaled positions and quantised weights, which other writers may have; what is written is read back."""
    fields, add = gguf_heads._fields, gguf_heads._add_tensor
    draft = eagle3(tmp_path / "draft")

    def with_window(*arguments: Any) -> dict[str, Any]:
        return fields(*arguments) | {"attention.sliding_window": 64}

    monkeypatch.setattr(gguf_heads, "_fields", with_window)
    with pytest.raises(ValueError, match=r"has eagle3.attention.sliding_window 64, which is not read here"):
        export_draft(draft, target, "llama.cpp", tmp_path / "out", target_gguf=target_gguf)
    monkeypatch.undo()

    def quantised(writer: Any, name: str, tensor: torch.Tensor, config: Any, dtype: torch.dtype) -> None:
        if name != "output.weight":
            return add(writer, name, tensor, config, dtype)
        kind = gguf.GGMLQuantizationType.Q8_0
        return writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)

    monkeypatch.setattr(gguf_heads, "_add_tensor", quantised)
    with pytest.raises(ValueError, match=r"output.weight is quantised \(Q8_0\); quantised heads are not read"):
        export_draft(draft, target, "llama.cpp", tmp_path / "out", target_gguf=target_gguf)


def test_eagle1_heads(target: str, tmp_path: Path) -> None:
    """vLLM takes `bias` for the attention's and drops fc's; SGLang always has one, which must not stay random."""
    plain, biased = eagle1(tmp_path / "plain"), eagle1(tmp_path / "biased", fc_bias=True)
    export_draft(plain, target, "vllm", tmp_path / "vllm")
    assert "bias" not in json.loads((tmp_path / "vllm" / "config.json").read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match=r"vLLM .* would load it and draft worse: fc.bias: it drops this tensor"):
        export_draft(biased, target, "vllm", tmp_path / "biased-vllm")
    with pytest.raises(ValueError, match=r"embed_tokens.weight: it puts the target's embedding in this one's place"):
        export_draft(plain, target, "sglang", tmp_path / "sglang")
    copied = load_file(Path(plain) / "model.safetensors")
    copied["embed_tokens.weight"] = tiny_llama(num_hidden_layers=8).model.embed_tokens.weight.detach().float()
    copy = write(tmp_path / "copy", TINY.values(), copied)
    export_draft(copy, target, "sglang", tmp_path / "sglang")
    written = load_file(tmp_path / "sglang" / "model.safetensors")
    assert torch.equal(written["fc.bias"], torch.zeros(32))
    values = json.loads((tmp_path / "sglang" / "config.json").read_text(encoding="utf-8"))
    assert values["architectures"] == ["LlamaForCausalLMEagle"]
    for engine in ("speculators", "llama.cpp"):
        with pytest.raises(ValueError, match="reads EAGLE-3 heads alone"):
            export_draft(plain, target, engine, tmp_path / "none")


class Scaled(torch.nn.Embedding):
    """As Gemma 3's embedding: its weights are scaled where they are looked up."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens) * 4


def test_a_head_that_reads_a_scaled_embedding(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that take the target's weights read it without the scale; the others get what the head reads."""
    embedding, loads = Scaled(64, 32), 0

    def load(name: str) -> torch.nn.Module:
        nonlocal loads
        loads += 1
        return embedding

    monkeypatch.setattr("draftwing.drafts.export_draft.target_embedding", load)
    draft = Path(eagle1(tmp_path / "draft"))
    tensors = load_file(draft / "model.safetensors")
    del tensors["embed_tokens.weight"]
    save_file(tensors, draft / "model.safetensors")
    with pytest.raises(ValueError, match="it reads the target's embedding without the scale"):
        export_draft(str(draft), target, "sglang", tmp_path / "none")
    assert loads == 1
    export_draft(str(draft), target, "vllm", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["embed_tokens.weight"], embedding.weight * 4)


@pytest.mark.parametrize("engine", ["vllm", "sglang", "eagle"])
def test_an_eagle1_head_gets_the_embedding_that_it_reads(engine: str, target: str, tmp_path: Path) -> None:
    """Published files have one, and engines look for it; a head of ours reads the target's and has none."""
    draft = Path(eagle1(tmp_path / "draft"))
    tensors = {name: tensor for name, tensor in load_file(draft / "model.safetensors").items() if "embed" not in name}
    save_file(tensors, draft / "model.safetensors")
    export_draft(str(draft), target, engine, tmp_path / "out", dtype=torch.float16)
    embedding = tiny_llama(num_hidden_layers=8).model.embed_tokens.weight.detach()
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["embed_tokens.weight"], embedding.to(torch.float16))
    assert written.keys() - tensors.keys() == {"embed_tokens.weight"} | ({"fc.bias"} if engine == "sglang" else set())


def test_medusa_heads_get_the_names_that_vllm_knows(target: str, tmp_path: Path) -> None:
    """vLLM leaves out without a word what has other names."""
    draft = write(tmp_path / "draft", {"medusa_num_heads": 3, "medusa_num_layers": 2}, tensors_of(3, 32, 64, 2))
    exported = export_draft(draft, target, "vllm", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    blocks = {f"blocks.{i}.layers.{j}.{kind}" for i in range(3) for j in range(2) for kind in ("weight", "bias")}
    assert tensors.keys() == blocks | {f"lm_heads.{i}.weight" for i in range(3)}
    assert '"method": "medusa"' in exported.command
    with pytest.raises(ValueError, match=r"SGLang .* cannot load it: it runs no Medusa heads"):
        export_draft(draft, target, "sglang", tmp_path / "none")


@pytest.mark.parametrize(
    ("values", "engine", "says"),
    [
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "llama.cpp",
            "rope_parameters: linear was not tried",
        ),
        ({"hidden_act": "gelu"}, "vllm", "hidden_act: it computes silu alone"),
        ({"sliding_window": 16}, "vllm", "sliding_window: it does not read this option"),
        ({"fc.bias": (32,)}, "llama.cpp", r"fc.bias: no engine reads a bias behind an EAGLE-3 head's fc"),
        (AUX, "eagle", r"aux_layers: it always reads the layers \(2, 4, 5\)"),
        ({}, "trtllm", "to: no such engine: 'trtllm'"),
    ],
)
def test_what_an_engine_would_read_wrong_is_refused(
    values: dict[str, Any], engine: str, says: str, target: str, target_gguf: Path, tmp_path: Path
) -> None:
    shapes = {name: values[name] for name in values if "." in name}  # tensors
    draft = eagle3(tmp_path / "draft", shapes, **{name: value for name, value in values.items() if name not in shapes})
    with pytest.raises(ValueError, match=says):
        export_draft(draft, target, engine, tmp_path / "out", target_gguf=target_gguf)
    assert not (tmp_path / "out").exists()


def test_a_fault_is_written_where_that_is_asked_for(target: str, tmp_path: Path) -> None:
    draft = eagle3(tmp_path / "draft", norm_before_residual=True)
    exported = export_draft(draft, target, "sglang", tmp_path / "out", force=True)
    assert exported.faults[0].startswith("norm_before_residual: ")
    assert exported.faults == json.loads((tmp_path / "out" / "export.json").read_text(encoding="utf-8"))["faults"]


def test_a_folder_that_holds_something_and_a_missing_tokenizer(target: str, tmp_path: Path) -> None:
    draft = eagle3(tmp_path / "draft")
    with pytest.raises(ValueError, match=r"output: .* exists and is not empty"):
        export_draft(draft, target, "vllm", tmp_path)
    with pytest.raises(ValueError, match="pass the target's GGUF file"):
        export_draft(draft, target, "llama.cpp", tmp_path / "out")
    (tmp_path / "no.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="gguf: cannot read"):
        export_draft(draft, target, "llama.cpp", tmp_path / "out", target_gguf=tmp_path / "no.gguf")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("another target", "vocab_size|hidden_size"),
        ("a language model", "it is not exported; engines load this folder as it is"),
        ("a cut file", "cannot read .*model.safetensors"),
        ("no draft", "no folder and no reachable hub id"),
    ],
)
def test_bad_input_leaves_nothing(
    case: str, says: str, engine: str, target: str, target_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One error, and no folder, whole or partial, for any engine."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    draft = eagle3(tmp_path / "draft")
    if case == "another target":
        target = str(tmp_path / "other")
        tiny_llama(num_hidden_layers=8, vocab_size=72).save_pretrained(target)
    elif case == "a language model":
        draft = target
    elif case == "a cut file":
        file = Path(draft) / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-40])
    else:
        draft = str(tmp_path / "nowhere")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=says):
        export_draft(draft, target, engine, tmp_path / "out", target_gguf=target_gguf)
    assert sorted(tmp_path.iterdir()) == before


CONFIGURATIONS = st.fixed_dictionaries(
    {
        "norm_before_residual": st.booleans(),
        "norm_output": st.booleans(),
        "rope_theta": st.sampled_from([10000.0, 500000.0, 123456.7]),
        "rms_norm_eps": st.sampled_from([1e-5, 1e-6, 3e-6]),
        "max_position_embeddings": st.integers(64, 1 << 20),
        "trained_length": st.sampled_from([None, 48]),
        "eagle_aux_hidden_state_layer_ids": st.sampled_from([[1, 2, 3], [2, 4, 5], [3, 5, 8]]),
    }
)


@given(values=CONFIGURATIONS, fc_norm=st.booleans(), before_fc=st.booleans(), engine=st.sampled_from([*ENGINES]),
       dtype=st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16]))  # fmt: skip
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_head_comes_back_or_is_refused(
    values: dict[str, Any],
    fc_norm: bool,
    before_fc: bool,
    engine: str,
    dtype: torch.dtype | None,
    target: str,
    target_gguf: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """`export_draft` itself compares what it has written, bit for bit; a refusal names a field."""
    folder = tmp_path_factory.mktemp("any")
    shapes = norm_shapes(("fc_norm.0", "fc_norm.1", "fc_norm.2"), 32) if fc_norm else {}
    shapes |= norm_shapes(("input_norm",), 96) if before_fc else {}
    stated = {"fc_norm": fc_norm, "norm_before_fc": before_fc}
    draft = eagle3(folder / "draft", shapes, **{**values, **stated})
    try:
        export_draft(draft, target, engine, folder / "out", target_gguf=target_gguf, dtype=dtype)
    except ValueError as error:
        assert ("cannot load it" if engine == "llama.cpp" else "would load it and draft worse") in str(error)
        assert engine in ("eagle", "sglang", "llama.cpp")
        assert not (folder / "out").exists()
    else:
        export_draft(str(folder / "out"), target, "speculators", folder / "back")  # and from there on


@given(
    kind=st.sampled_from(["eagle1", "medusa"]),
    has_bias=st.booleans(),
    theta=st.sampled_from([10000.0, 500000.0, 123456.7]),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    engine=st.sampled_from(["vllm", "sglang", "eagle"]),
    dtype=st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16]),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_other_kinds_come_back_or_are_refused(
    kind: str,
    has_bias: bool,
    theta: float,
    sizes: tuple[int, int],
    engine: str,
    dtype: torch.dtype | None,
    target: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """EAGLE-1 and Medusa, there and back: bit for bit what was written, in the second folder as in the first."""
    folder = tmp_path_factory.mktemp("any")
    if kind == "medusa":
        draft = write(folder / "draft", {}, tensors_of(sizes[0], 32, 64, sizes[1]))
    else:
        draft = eagle1(folder / "draft", has_bias, rope_theta=theta)
    if engine != "vllm" or (kind == "eagle1" and has_bias):  # the others replace its embedding, and run no Medusa
        with pytest.raises(ValueError, match=r"cannot load it|would load it and draft worse"):
            export_draft(draft, target, engine, folder / "out", dtype=dtype)
        assert not (folder / "out").exists()
        return
    export_draft(draft, target, engine, folder / "out", dtype=dtype)
    export_draft(str(folder / "out"), target, engine, folder / "back")
    once, twice = (load_file(folder / name / "model.safetensors") for name in ("out", "back"))
    assert once.keys() == twice.keys() and all(torch.equal(once[name], twice[name]) for name in once)


def test_speculators_files_keep_what_they_take_for_granted(target: str, tmp_path: Path) -> None:
    """A residual from the normed features is the rule there; elsewhere it has to be said."""
    values = speculators_values(VALUES, draft_vocab_size=48, **DEFAULT_AUX)
    tensors = to_float32(random_tensors(eagle3_shapes(TINY, "layers.0"), TARGET_IDS))
    export_draft(write(tmp_path / "draft", values, tensors), target, "vllm", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["norm_before_residual"] is True


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded head, with a line that starts the engine; --json for machines."""
    folder = tmp_path / "out"
    command = ["export", "tiny", "--target", "tiny", "--to", "vllm", "--verifier", "org/it", "--output", str(folder)]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith('vllm serve org/it --speculative-config \'{"method": "eagle3", ')
    assert "was trained on 192 tokens" in captured.err
    assert main(command) == 2
    assert "output: " in capsys.readouterr().err
    command[-1] = str(tmp_path / "json")
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["engine"] == "vllm"
    assert main(["inspect", str(folder), "--target", "tiny"]) == 0
