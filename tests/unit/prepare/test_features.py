"""Stored features: those of the target's own pass, shard by shard; fp8's error is bounded; misuse is refused."""

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from torch.utils.data import DataLoader

from draftwing.data.examples import Collator
from draftwing.data.features import FeatureExamples, Storage, check_features, from_fp8, to_fp8
from draftwing.data.prepared import Prepared, PrepareSettings, open_prepared
from draftwing.prepare import target_features as module
from draftwing.prepare.target_features import FeatureWriter
from draftwing.prepare.tokens import prepare
from draftwing.target.load import load_tokenizer
from draftwing.target.model import TargetModel

LAYERS = (1, 3, 5)


@pytest.fixture(scope="module")
def target(stock_target: TargetModel) -> TargetModel:
    """Training reads its weights."""
    return stock_target


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Documents of 3 to 40 tokens of the tiny Llama's vocabulary."""
    folder = tmp_path_factory.mktemp("prepared")
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 64, (3 + n,), generator=generator).tolist() for n in range(38)]
    path = folder / "ids.jsonl"
    path.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in rows), encoding="utf-8")
    return prepare(PrepareSettings((str(path),)), load_tokenizer("tiny"), folder / "out")


def write(
    prepared: Prepared, target: TargetModel, folder: Path, storage: Storage = "bf16", layers: tuple[int, ...] = LAYERS
) -> FeatureWriter:
    writer = FeatureWriter(prepared, target, layers, storage, folder)
    writer.write()
    return writer


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 40_000)
    monkeypatch.setattr(module, "BATCH_TOKENS", 64)


def hidden_states(target: TargetModel, ids: torch.Tensor) -> Any:
    with torch.inference_mode():
        return target.model(input_ids=ids[None], use_cache=False, output_hidden_states=True).hidden_states


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_features_are_those_of_the_targets_own_pass(
    tmp_path: Path, prepared: Prepared, target: TargetModel, split: str
) -> None:
    write(prepared, target, tmp_path / "features")
    documents = prepared.examples(split)
    stored = FeatureExamples(documents, str(tmp_path / "features"), target, LAYERS)
    assert stored.lengths == documents.lengths
    for index, document in enumerate(documents):
        states = hidden_states(target, document.input_ids)
        example = stored[index]
        assert torch.equal(example.input_ids, document.input_ids)
        assert example.features is not None
        assert example.last_hidden is not None
        expected = torch.cat([states[layer][0] for layer in LAYERS], dim=-1).to(torch.bfloat16)
        torch.testing.assert_close(example.features, expected, rtol=2**-7, atol=1e-6)
        torch.testing.assert_close(example.last_hidden, states[6][0].to(torch.bfloat16), rtol=2**-7, atol=1e-6)


def test_last_hidden_is_the_input_of_the_output_head(tmp_path: Path, prepared: Prepared, target: TargetModel) -> None:
    write(prepared, target, tmp_path / "features")
    example = FeatureExamples(prepared.examples("train"), str(tmp_path / "features"), target, LAYERS)[3]
    assert example.last_hidden is not None
    with torch.inference_mode():
        logits = target.model(input_ids=example.input_ids[None], use_cache=False).logits[0]
        ours = target.output_head(example.last_hidden.double())
    assert torch.equal(ours.argmax(-1), logits.argmax(-1))
    assert (ours - logits).abs().max() < 0.02 * logits.abs().max()


def test_eagle1_features_are_not_stored_twice(tmp_path: Path, prepared: Prepared, target: TargetModel) -> None:
    writer = write(prepared, target, tmp_path / "features", layers=(-1,))
    assert writer.bytes_per_token == 2 * 32
    example = FeatureExamples(prepared.examples("train"), str(tmp_path / "features"), target, (-1,))[0]
    assert example.features is None, "which are the last hidden state"
    assert example.last_hidden is not None


def test_features_for_eagle3_serve_eagle1_too(tmp_path: Path, prepared: Prepared, target: TargetModel) -> None:
    write(prepared, target, tmp_path / "features")
    documents = prepared.examples("train")
    theirs = FeatureExamples(documents, str(tmp_path / "features"), target, LAYERS)[0]
    ours = FeatureExamples(documents, str(tmp_path / "features"), target, (-1,))[0]
    assert ours.features is None
    assert ours.last_hidden is not None
    assert theirs.last_hidden is not None
    assert torch.equal(ours.last_hidden, theirs.last_hidden)


def test_fp8_takes_half_the_bytes_and_a_scale_for_each_vector(
    tmp_path: Path, prepared: Prepared, target: TargetModel
) -> None:
    exact, small = (write(prepared, target, tmp_path / storage, storage) for storage in ("bf16", "fp8"))
    assert (exact.bytes_per_token, small.bytes_per_token) == (4 * 32 * 2, 4 * (32 + 4))
    documents = prepared.examples("train")
    for index in range(5):
        a, b = (FeatureExamples(documents, str(tmp_path / s), target, LAYERS)[index] for s in ("bf16", "fp8"))
        for true, stored in ((a.features, b.features), (a.last_hidden, b.last_hidden)):
            assert true is not None
            assert stored is not None
            assert stored.dtype == torch.bfloat16
            assert (stored - true).float().norm() < 0.05 * true.float().norm()


def test_fp8_round_trip_error_is_half_a_step() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, 4, 64, generator=generator) * torch.tensor([1e-3, 1.0, 30.0, 1e4])[:, None]
    values[0] = 0.0
    quantised, scale = to_fp8(values)
    assert (quantised.shape, quantised.dtype, scale.shape) == ((50, 256), torch.float8_e4m3fn, (50, 4))
    restored = from_fp8(quantised, scale).float().view_as(values)
    # Three bits of mantissa: half a step is 2^-4 of a value, or 2^-10 of the scale's unit where values are subnormal;
    # bf16 adds its own 2^-9.
    bound = values.abs() * (2**-4 + 2**-8) + scale[..., None] * 2**-9
    assert ((restored - values).abs() <= bound).all()
    assert torch.equal(restored[0], torch.zeros_like(restored[0]))
    largest = values.abs().amax(-1)
    assert torch.allclose(restored.abs().amax(-1), largest, rtol=2**-8)


def test_a_larger_error_would_be_noticed() -> None:
    values = torch.randn(50, 4, 64, generator=torch.Generator().manual_seed(0))
    quantised, scale = to_fp8(values)
    restored = from_fp8(quantised, scale.roll(1, dims=1)).float().view_as(values)  # another vector's scale
    assert ((restored - values).abs() > values.abs() * (2**-4 + 2**-8) + scale[..., None] * 2**-9).any()


@pytest.mark.usefixtures("small_shards")
def test_complete_shards_are_kept_when_a_run_was_stopped(
    tmp_path: Path,
    prepared: Prepared,
    target: TargetModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "features"
    write_shard, written = module.write_shard, list[str]()

    def write_two(*arguments: Any) -> Any:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(arguments[1])
        return write_shard(*arguments)

    monkeypatch.setattr(module, "write_shard", write_two)
    with pytest.raises(KeyboardInterrupt):
        write(prepared, target, folder)
    with pytest.raises(ValueError, match="is unfinished"):
        FeatureExamples(prepared.examples("train"), str(folder), target, LAYERS)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert len(before) == 2
    monkeypatch.setattr(
        module, "write_shard", lambda *arguments: written.append(arguments[1]) or write_shard(*arguments)
    )
    with caplog.at_level(logging.INFO, "draftwing"):
        writer = FeatureWriter(prepared, target, LAYERS, "bf16", folder)
    assert caplog.messages == [f"resuming from {folder}: 2 files are there"]
    num_left = writer.estimate().num_tokens
    assert 0 < num_left < sum(sum(prepared.examples(split).lengths) for split in ("train", "held_out"))
    writer.write()
    assert len(written) == len(set(written)) > 3
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert check_features(str(folder)) == sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_damage_is_noticed(tmp_path: Path, prepared: Prepared, target: TargetModel) -> None:
    write(prepared, target, tmp_path)
    file = tmp_path / "train-00000.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="its checksum is not the index's"):
        check_features(str(tmp_path))
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"expected {len(whole)} bytes, found {len(whole) - 1}"):
        FeatureExamples(prepared.examples("train"), str(tmp_path), target, LAYERS)


def test_a_disk_that_cannot_hold_it_is_refused_before_anything_is_written(
    tmp_path: Path, prepared: Prepared, target: TargetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    writer = FeatureWriter(prepared, target, LAYERS, "bf16", tmp_path / "features")
    with pytest.raises(ValueError, match=r"output: .*the disk cannot hold the features: .* tokens, .* GB"):
        writer.estimate()
    assert not (tmp_path / "features").exists()


def test_the_estimate_counts_what_is_to_be_written(tmp_path: Path, prepared: Prepared, target: TargetModel) -> None:
    writer = FeatureWriter(prepared, target, LAYERS, "fp8", tmp_path / "features")
    estimate = writer.estimate()
    writer.write()
    size = sum(path.stat().st_size for path in (tmp_path / "features").glob("*.safetensors"))
    assert estimate.num_tokens == sum(sum(prepared.examples(split).lengths) for split in ("train", "held_out"))
    assert size == pytest.approx(estimate.num_bytes, rel=0.05)
    assert estimate.hours == pytest.approx(estimate.num_tokens / estimate.tokens_per_second / 3600)
    assert writer.bytes_per_token * estimate.num_tokens <= estimate.num_bytes


class TestFit:
    """Features are read only beside the tokens, target and layers that they were made from."""

    @pytest.fixture
    def folder(self, tmp_path: Path, prepared: Prepared, target: TargetModel) -> str:
        write(prepared, target, tmp_path / "features")
        return str(tmp_path / "features")

    def test_other_layers(self, folder: str, prepared: Prepared, target: TargetModel) -> None:
        with pytest.raises(ValueError, match=r"made from the layers \[1, 3, 5\], not \(2, 3, 4\)"):
            FeatureExamples(prepared.examples("train"), folder, target, (2, 3, 4))

    def test_another_target(self, folder: str, prepared: Prepared) -> None:
        with pytest.raises(ValueError, match="made from another target"):
            FeatureExamples(prepared.examples("train"), folder, TargetModel(tiny_llama(seed=1)), LAYERS)

    def test_other_tokens(self, tmp_path: Path, folder: str, prepared: Prepared, target: TargetModel) -> None:
        settings = PrepareSettings(prepared.settings.data, seed=1)
        others = prepare(settings, load_tokenizer("tiny"), tmp_path / "others")
        with pytest.raises(ValueError, match="made from other tokens than those of `data`"):
            FeatureExamples(others.examples("train"), folder, target, LAYERS)

    def test_a_run_that_is_continued_with_another_storage(
        self, folder: str, prepared: Prepared, target: TargetModel
    ) -> None:
        with pytest.raises(ValueError, match=r"other settings: storage was 'bf16', is 'fp8'"):
            FeatureWriter(prepared, target, LAYERS, "fp8", Path(folder))

    @pytest.mark.parametrize("layers", [(), (1, 3, 7), (-2, 3, 5)])
    def test_layers_that_the_target_lacks(
        self, tmp_path: Path, prepared: Prepared, target: TargetModel, layers: tuple[int, ...]
    ) -> None:
        with pytest.raises(ValueError, match="aux_layers: expected some of 0 to 6"):
            FeatureWriter(prepared, target, layers, "bf16", tmp_path / "x")

    def test_documents_beyond_the_targets_positions(self, tmp_path: Path, prepared: Prepared) -> None:
        short = TargetModel(tiny_llama(max_position_embeddings=32))
        with pytest.raises(ValueError, match="prepare the data with --sequence-length 32"):
            FeatureWriter(prepared, short, LAYERS, "bf16", tmp_path / "x")

    def test_a_folder_of_another_kind(self, prepared: Prepared, target: TargetModel) -> None:
        with pytest.raises(ValueError, match="expected the format draftwing-features-2"):
            FeatureExamples(prepared.examples("train"), str(prepared.folder), target, LAYERS)
        with pytest.raises(ValueError, match=r"cannot read its index\.json"):
            open_prepared("no/such/folder", None)


def test_features_can_be_read_by_other_processes(tmp_path: Path, prepared: Prepared, target: TargetModel) -> None:
    write(prepared, target, tmp_path / "features")
    stored = FeatureExamples(prepared.examples("train"), str(tmp_path / "features"), target, LAYERS)
    stored[0]  # files are open
    copy = pickle.loads(pickle.dumps(stored))
    assert torch.equal(copy[1].features, stored[1].features)
    loader = DataLoader(
        stored,  # type: ignore[arg-type]
        batch_size=4, num_workers=1, prefetch_factor=2, collate_fn=Collator(0), multiprocessing_context="fork",
    )  # fmt: skip
    alone = DataLoader(stored, batch_size=4, collate_fn=Collator(0))  # type: ignore[arg-type]
    for ours, theirs in zip(loader, alone, strict=True):
        assert set(ours) == {"input_ids", "loss_mask", "features", "last_hidden"}
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_cut_documents_have_the_features_of_the_whole(tmp_path: Path, prepared: Prepared, target: TargetModel) -> None:
    write(prepared, target, tmp_path / "features")
    whole = prepared.examples("train")
    pieces = prepared.examples("train", length=10)
    stored = FeatureExamples(whole, str(tmp_path / "features"), target, LAYERS)
    cut = FeatureExamples(pieces, str(tmp_path / "features"), target, LAYERS)
    index = next(i for i, (start, _) in enumerate(pieces.spans) if start not in {a for a, _ in whole.spans})
    start, stop = pieces.spans[index]
    document = next(i for i, (a, b) in enumerate(whole.spans) if a <= start < b)
    first = whole.spans[document][0]
    features = stored[document].features
    assert features is not None
    assert torch.equal(cut[index].features, features[start - first : stop - first])
