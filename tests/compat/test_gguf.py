"""GGUF files as targets: a small one that is written here, read by transformers and by us."""

import json
import shutil
from collections import namedtuple
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Forked
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.convert_slow_tokenizer import bytes_to_unicode

import draftwing
from draftwing import embedded
from draftwing.cli import main
from draftwing.files import UNFINISHED, cache_folder, whole_folder
from draftwing.target import gguf as reading
from draftwing.target.load import load_tokenizer, resolve_target

WIDTH, LAYERS, HEADS, KV_HEADS, INNER = 64, 2, 4, 2, 96
TEMPLATE = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|none|>", "<|start|>", "<|end|>", "<|stop|>"]
VOCABULARY = SPECIAL + list(bytes_to_unicode().values()) + ["th", "the", "Ġthe", "in"]
MERGES = ["t h", "th e", "Ġ the", "i n"]


def write(
    file: Path,
    quantised: str = "Q8_0",
    architecture: str = "llama",
    leave_out: str = "",
    tokenizer: bool = True,
    plain: Any = np.float32,
) -> Path:
    """A Llama of random weights with a byte-level tokenizer and a chat template; matrices are `quantised`, or plain."""
    writer, numbers = GGUFWriter(file, architecture), np.random.default_rng(0)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(VOCABULARY))
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(VOCABULARY)
        writer.add_token_types([3] * len(SPECIAL) + [1] * (len(VOCABULARY) - len(SPECIAL)))
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(3)
        writer.add_eot_token_id(2)
        writer.add_chat_template(TEMPLATE)
    shapes = {"token_embd": (len(VOCABULARY), WIDTH), "output": (len(VOCABULARY), WIDTH), "output_norm": (WIDTH,)}
    kv_width = WIDTH // HEADS * KV_HEADS
    for layer in range(LAYERS):
        block = {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH), "attn_output": (WIDTH, WIDTH)}
        block |= {"attn_k": (kv_width, WIDTH), "attn_v": (kv_width, WIDTH)}
        block |= {"ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        values = numbers.normal(0, 0.2, shape).astype(np.float32) + (len(shape) == 1)
        if name == leave_out:
            continue
        if len(shape) == 1 or not quantised:
            writer.add_tensor(f"{name}.weight", values if len(shape) == 1 else values.astype(plain))
        else:
            kind = GGMLQuantizationType[quantised]
            writer.add_tensor(f"{name}.weight", quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DRAFTWING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "model.gguf")


def as_transformers_reads(file: Path, dtype: torch.dtype) -> Any:
    config = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=dtype, quantization_config=config
    )


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"quantised": "Q8_0"}, torch.bfloat16),
        ({"quantised": "Q4_1"}, torch.bfloat16),
        ({"quantised": "", "plain": np.float32}, torch.float32),
        ({"quantised": "", "plain": np.float16}, torch.float16),
    ],
)
def test_logits_are_those_of_transformers(tmp_path: Path, options: dict[str, Any], dtype: torch.dtype) -> None:
    file = write(tmp_path / "model.gguf", **options)
    expected = as_transformers_reads(file, dtype).float()
    model = draftwing.load(str(file), dtype="float32")
    assert json.loads((Path(resolve_target(str(file))) / "config.json").read_text())["dtype"] == str(dtype)[6:]
    ids = torch.tensor([[1, 50, 60, 70, 2, 5, 99, 250]])
    with torch.inference_mode():
        logits = expected(ids).logits
        ours = AutoModelForCausalLM.from_pretrained(resolve_target(str(file)), dtype=torch.float32)(ids).logits
    assert torch.equal(ours, logits), "the weights are the same to the bit"
    greedy = expected.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=[2, 3], pad_token_id=2)
    for method in (None, "ngram"):
        decoder = model if method is None else model.with_method(method)
        assert decoder.generate(ids, max_new_tokens=40).tolist() == greedy.tolist()


def test_other_weights_have_other_logits(tmp_path: Path) -> None:
    """The comparison above notices one number."""
    file = write(tmp_path / "model.gguf")
    ids, model = torch.tensor([[1, 50, 60]]), as_transformers_reads(file, torch.float32)
    with torch.inference_mode():
        logits = model(ids).logits
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 0.1
        assert not torch.equal(model(ids).logits, logits)


def test_tokenizer_template_and_ends_are_the_files(file: Path) -> None:
    model = draftwing.load(str(file))
    expected = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in ("the thin end", "  the\n\n in", "naïve 你好 <|start|>user\nx<|end|>"):
        assert model.tokenizer(text)["input_ids"] == expected(text)["input_ids"]
    assert model.tokenizer.chat_template == TEMPLATE
    assert set(model.target.eos_token_ids) == {2, 3}, "an answer ends with the end of a turn, too"


def test_a_file_is_dequantised_once(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve_target(str(file))
    assert Path(folder).parent == cache
    monkeypatch.setattr(reading, "_write", lambda *_: pytest.fail("it is there"))
    assert resolve_target(str(file)) == resolve_target(str(file.parent)) == folder
    assert load_tokenizer(str(file)).name_or_path == folder
    copy = file.with_name("copy.gguf")
    shutil.copy(file, copy)
    assert resolve_target(str(copy)) == folder, "the contents count, not the name"


def test_the_dequantised_file_is_for_whom_others_are(file: Path, cache: Path) -> None:
    """A container's image is built by one user and run by another."""
    draftwing.load(str(file))
    (cache / "other").touch()
    modes = {path.stat().st_mode for path in cache.rglob("*") if path.is_file()}
    assert modes == {(cache / "other").stat().st_mode}


def test_another_file_of_the_same_name_is_another_model(file: Path) -> None:
    first = resolve_target(str(file))
    write(file, quantised="Q4_1")
    assert resolve_target(str(file)) != first


@pytest.mark.parametrize("damage", ["cut weights", "no tokenizer", "no record", "broken record", "cut while written"])
def test_a_damaged_cache_is_never_read(file: Path, damage: str) -> None:
    folder = Path(resolve_target(str(file)))
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    weights = folder / "model.safetensors"
    if damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif damage == "no record":
        (folder / reading.RECORD).unlink()
    elif damage == "broken record":
        (folder / reading.RECORD).write_text("[]")
    else:
        folder.rename(folder.with_name(f".{folder.name}.0123abcd{UNFINISHED}"))
    draftwing.load(str(file))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    assert not list(folder.parent.glob(f".*{UNFINISHED}"))


def test_a_kill_while_writing_leaves_nothing_that_is_read(file: Path, cache: Path) -> None:
    program = (
        "import os, sys\n"
        "from transformers import PreTrainedTokenizerBase as Tokenizer\n"
        "from draftwing.target.load import resolve_target\n"
        "Tokenizer.save_pretrained = lambda *_, **__: os._exit(9)\n"  # behind the weights
        "resolve_target(sys.argv[1])\n"
    )
    process = Forked(program, [str(file)])
    assert process.wait() == 9, process.errors
    assert [path.suffix for path in cache.iterdir() if path.is_dir()] == [UNFINISHED]
    draftwing.load(str(file))
    assert [path.suffix for path in cache.iterdir() if path.is_dir()] != [UNFINISHED]


def test_a_failure_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyError), whole_folder(tmp_path / "made") as folder:
        (folder / "file").write_text("half")
        raise KeyError
    assert not list(tmp_path.glob("made*"))


def test_files_that_cannot_be_read(tmp_path: Path, file: Path) -> None:
    data = file.read_bytes()
    cases = {
        "absent": (None, "no such file"),
        "foreign": (b"PK\x03\x04" + data[4:], "is no GGUF file: it does not begin with GGUF"),
        "empty": (b"", "is no GGUF file"),
        "short": (data[:20], "cannot be read as GGUF; is it cut off?"),
        "middle": (data[: len(data) // 40], "cannot be read as GGUF; is it cut off?"),
        "end": (data[:-200], "cannot be read as GGUF; is it cut off?"),
    }
    for name, (contents, message) in cases.items():
        path = tmp_path / f"{name}.gguf"
        if contents is not None:
            path.write_bytes(contents)
        with pytest.raises(ValueError, match=f"^target: .*{message}") as raised:
            draftwing.load(str(path))
        assert str(raised.value).count("\n") == 0
    cache = cache_folder() / "gguf"
    assert not cache.exists() or not any(path.is_dir() for path in cache.iterdir()), "nothing half-written is left"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "llamb"}, "transformers cannot read .*llamb"),
        ({"leave_out": "blk.1.ffn_up"}, "lacks 1 tensors, the first is model.layers.1.mlp.up_proj.weight"),
        ({"tokenizer": False}, "no tokenizer in"),
    ],
)
def test_models_that_cannot_be_read(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    file = write(tmp_path / "model.gguf", **options)
    with pytest.raises(ValueError, match=f"^target: .*{message}"):
        draftwing.load(str(file))


def test_one_of_several_files_must_be_named(file: Path) -> None:
    shutil.copy(file, file.with_name("other.gguf"))
    with pytest.raises(ValueError, match=r"target: .* has 2 .gguf files; name one, such as .*model.gguf"):
        draftwing.load(str(file.parent))


def test_weights_beside_it_come_first(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(resolve_target(str(file)), folder)
    shutil.copy(file, folder)
    assert resolve_target(str(folder)) == str(folder)


def test_no_room(file: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000))
    with pytest.raises(ValueError, match=r"no room: it takes [\d,]+ bytes, and 1,000 are free; \$DRAFTWING_CACHE may"):
        draftwing.load(str(file))


def test_a_disk_that_fills_up(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reading, "write_text", fail)
    with pytest.raises(ValueError, match=r"target: cannot keep .*No space left on device"):
        draftwing.load(str(file))
    assert not [path for path in (tmp_path / "cache" / "gguf").iterdir() if path.is_dir()]
    (tmp_path / "blocked").write_text("")
    monkeypatch.setenv("DRAFTWING_CACHE", str(tmp_path / "blocked"))
    with pytest.raises(ValueError, match="target: cannot keep "):
        draftwing.load(str(file))


def test_without_the_package(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    with pytest.raises(ValueError, match=r"transformers needs gguf: pip install gguf$"):
        draftwing.load(str(file))


def test_it_is_a_draft_too(file: Path) -> None:
    model = draftwing.load(str(file), draft=str(file))
    ids = torch.tensor([[1, 50, 60]])
    output = model.generate(ids, max_new_tokens=12, plan="chain:3", return_dict_in_generate=True)
    assert output.sequences.tolist() == model.with_method("plain").generate(ids, max_new_tokens=12).tolist()
    with pytest.raises(ValueError, match=r"draft: no such file: absent.gguf"):
        draftwing.load("tiny", draft="absent.gguf")


def test_commands_take_it(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--target", str(file)]
    assert main(["generate", *common, "--prompt", "the", "--max-new-tokens", "4", "--chat", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_tokens"] <= 4
    (tmp_path / "rows.jsonl").write_text('{"text": "in the thin end"}\n' * 4)
    output = ["--output", str(tmp_path / "prepared"), "--data", str(tmp_path / "rows.jsonl")]
    assert main(["prepare", *common, *output, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 4
    assert main(["inspect", "tiny", *common]) == 1
    assert "does not fit" in capsys.readouterr().out
    assert main(["generate", "--target", str(tmp_path / "no.gguf"), "--prompt", "x"]) == 2
    assert "error: target: no such file" in capsys.readouterr().err


def test_smollm2_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="target: smollm2 is in a package that is not installed: pip install gguf"):
        draftwing.load("smollm2")


def test_smollm2_is_the_packages_file(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of that name whose code cannot be imported: only its file is wanted."""
    package = tmp_path / "site" / embedded.SMOLLM2_PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import a_package_that_is_not_there\n")
    shutil.copy(file, package / embedded.SMOLLM2_FILE)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert resolve_target("smollm2") == resolve_target(str(file))


@pytest.mark.parametrize(
    ("draft", "method", "message"),
    [
        ("smollm2", None, "draft: smollm2 is not part of this installation; recipes/smollm2.yaml trains it"),
        ("smollm2", "eagle2", "draft: smollm2-eagle1 is not part of this installation; recipes/smollm2.yaml trains it"),
        ("smollm2", "medusa", "draft: smollm2 has no draft for the method medusa"),
    ],
)
def test_drafts_of_smollm2_that_are_not_there(
    draft: str, method: str | None, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("smollm2", "smollm2-eagle1"):
        monkeypatch.setitem(embedded.EMBEDDED_DRAFTS, name, tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"^{message}$"):
        draftwing.load("smollm2", draft=draft, method=method)
