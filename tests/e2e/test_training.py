"""Training at scale, small: several processes equal one; a run that is stopped or killed ends with the same bits."""

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SLOW, tiny_llama
from forked import Forked
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from draftwing.cli import main
from draftwing.config import TrainConfig
from draftwing.drafts.head_loss import HeadLoss
from draftwing.files import to_json
from draftwing.training import checkpoints, loop
from draftwing.training.frozen_target import frozen_target
from draftwing.training.interruption import StopOnSignal
from draftwing.training.processes import end_processes, start_processes
from draftwing.training.train_language_model import train_tokenizer

STEPS = 10
TAU = "decode_prompts=1"
CHILDREN = get_context("forkserver")
"""Starts processes that have imported everything already."""


def train_and_stop(rank: int, address: str, command: list[str]) -> None:
    """One of two processes that torchrun would start; the second alone hears SIGTERM, in step 5."""
    on_step_end = StopOnSignal.on_step_end

    def stop_at_5(self: StopOnSignal, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        on_step_end(self, args, state, control, **kwargs)

    StopOnSignal.on_step_end = stop_at_5  # type: ignore[method-assign]
    train_as(rank, address, command)


def train_as(rank: int, address: str, command: list[str]) -> None:
    """One of two processes that torchrun would start."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address.split(":")
    raise SystemExit(main(command))


def compare_shards(rank: int, address: str, folder: Path) -> None:
    """One of two processes; each reads rows of its own with a target of which it keeps half of the layers."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address.split(":")
    start_processes()
    recipe = TrainConfig("eagle3", "", target=str(folder / "target"), bf16=False, shard_target=True)
    shards = frozen_target(recipe, recipe.target)
    whole = frozen_target(dataclasses.replace(recipe, shard_target=False), recipe.target)
    rows = torch.randint(0, whole.vocab_size, (1 + rank, 5 + rank))
    states, expected = (target.read_rows(rows, (1, 3, 5)) for target in (shards, whole))
    assert torch.equal(states.features, expected.features)
    assert torch.equal(states.last_hidden, expected.last_hidden)
    layers = sum(p.numel() for p in whole.model.model.layers.parameters())
    kept = sum(p.to_local().numel() for p in shards.model.model.layers.parameters() if isinstance(p, DTensor))
    assert kept == layers // 2
    assert torch.equal(shards.output_head.weight, whole.output_head.weight)
    end_processes(0)


def train_and_die(command: list[str]) -> None:
    """Killed when the files of checkpoint 8 are written and its mark is not."""
    complete = loop.complete_checkpoint

    def die_at_8(checkpoint: Path, *rest: Any) -> None:
        if checkpoint.name == "checkpoint-8":
            os.kill(os.getpid(), signal.SIGKILL)
        complete(checkpoint, *rest)

    loop.complete_checkpoint = die_at_8
    main(command)


def statuses(target: Callable[..., None], *arguments: tuple[Any, ...]) -> list[int | None]:
    """The exit statuses of processes that run a function, one for each tuple of arguments."""
    CHILDREN.set_forkserver_preload(["draftwing.training.stage", "draftwing.cli", __name__])
    processes = [CHILDREN.Process(target=target, args=part) for part in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random target with its tokenizer, rows of unlike lengths (3.5 steps an epoch) and a recipe."""
    folder = tmp_path_factory.mktemp("scale")
    rows: list[dict[str, Any]] = [{"text": f"def add_{n}(a, b):\n    return a + b\n" * (1 + n % 3)} for n in range(12)]
    for n in range(5):
        turns = [{"role": "user", "content": f"Add {n}."}, {"role": "assistant", "content": f"return a + {n} " * n}]
        rows.append({"messages": turns, "held_out": n > 1})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tokenizer = train_tokenizer((row["text"] for row in rows if "text" in row), 300)
    tokenizer.save_pretrained(folder / "target")
    tiny_llama(vocab_size=len(tokenizer)).float().save_pretrained(folder / "target")
    recipe = {
        "objective": "eagle3",
        "output": str(folder / "one"),
        "target": str(folder / "target"),
        "data": str(folder / "data.jsonl"),
        "draft_vocab_size": 200,
        "aux_layers": [1, 3, 5],
        "sequence_length": 32,
        "batch_size": 4,
        "max_steps": STEPS,
        "learning_rate": 0.01,
        "warmup_steps": 2,
        "ttt_steps": 3,
        "log_every": 2,
        "evaluate_every": 4,
        "save_every": 4,
        "bf16": False,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder


def command_of(folder: Path, output: str, *overrides: str) -> list[str]:
    """Train by the recipe, to another output."""
    settings = [f"output={folder / output}", *overrides]
    return ["train", str(folder / "recipe.yaml"), *(part for item in settings for part in ("--set", item))]


def train(folder: Path, output: str, *overrides: str) -> dict[str, Any]:
    """Run the recipe in this process; returns its record."""
    assert main(command_of(folder, output, *overrides)) == 0
    return record_of(folder, output)


def free_address() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{server.getsockname()[1]}"


def record_of(folder: Path, output: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / output / "training.json").read_text(encoding="utf-8"))
    return record


def weights_of(folder: Path, output: str) -> dict[str, torch.Tensor]:
    """The last checkpoint's float32 weights; the head's own file is rounded."""
    checkpoint = folder / output / "checkpoints" / f"checkpoint-{STEPS}"
    if (checkpoint / "model.safetensors").is_file():
        return load_file(checkpoint / "model.safetensors")
    weights: dict[str, torch.Tensor] = torch.load(checkpoint / "pytorch_model_fsdp.bin", weights_only=True)
    return weights


def assert_same(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, Any]:
    """The record of a run in one process that nothing interrupts."""
    return train(folder, "one", TAU)


@pytest.fixture(scope="module")
def whole_eagle1(folder: Path) -> dict[str, Any]:
    """The same for EAGLE-1, which draws noise; evaluated and saved at its end only."""
    return train(folder, "one_eagle1", "objective=eagle1", "evaluate_every=100", "save_every=100")


@pytest.fixture
def stop_at_5(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> pytest.MonkeyPatch:
    """Send this process a signal in step 5: SIGTERM, or the fixture's parameter."""
    on_step_end, number = StopOnSignal.on_step_end, getattr(request, "param", signal.SIGTERM)

    def send(self: StopOnSignal, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            os.kill(os.getpid(), number)
        on_step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(StopOnSignal, "on_step_end", send)
    return monkeypatch


class TestSeveralProcesses:
    def test_accumulated_batches_equal_one(self, folder: Path, whole: dict[str, Any]) -> None:
        record = train(folder, "accumulated", "batch_size=1", "accumulation_steps=4", TAU)
        assert_same(weights_of(folder, "accumulated"), weights_of(folder, "one"), rtol=1e-3, atol=1e-5)
        assert_same_figures(record, whole)

    @pytest.mark.slow  # three interpreters; the tests below have processes that are forked
    def test_two_processes_equal_one(self, folder: Path, whole: dict[str, Any]) -> None:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            "-m",
            "draftwing",
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command += command_of(folder, "ddp", "batch_size=2", TAU)
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["eval_loss"] == pytest.approx(whole["metrics"]["eval_loss"], rel=1e-4)
        assert_same(weights_of(folder, "ddp"), weights_of(folder, "one"), rtol=1e-3, atol=1e-5)
        assert_same_figures(record_of(folder, "ddp"), whole)

    def test_an_eagle1_head_starts_and_learns_as_in_one_process(self, folder: Path) -> None:
        """It is fitted to the same rows first; its noise, which each process draws for itself, is off."""
        quiet = ("objective=eagle1", "feature_noise=0", "evaluate_every=100", "save_every=100")
        train(folder, "one_quiet", *quiet)
        address, command = free_address(), command_of(folder, "two_quiet", *quiet, "batch_size=2")
        assert statuses(train_as, *((rank, address, command) for rank in range(2))) == [0, 0]
        assert_same(weights_of(folder, "two_quiet"), weights_of(folder, "one_quiet"), rtol=1e-3, atol=1e-5)

    def test_shards_stopped_and_continued_equal_one_process(self, folder: Path, whole: dict[str, Any]) -> None:
        """FSDP2 with accumulated batches; one process hears SIGTERM, both stop after that step and then go on."""
        command = command_of(folder, "fsdp2", "batch_size=1", "accumulation_steps=2", "parallel=fsdp2")
        address = free_address()
        assert statuses(train_and_stop, *((rank, address, command) for rank in range(2))) == [143, 143]
        assert checkpoints.newest_checkpoint(folder / "fsdp2" / "checkpoints", {}).name == "checkpoint-5"
        address = free_address()
        assert statuses(train_as, *((rank, address, command) for rank in range(2))) == [0, 0]
        assert_same(weights_of(folder, "fsdp2"), weights_of(folder, "one"), rtol=1e-3, atol=1e-5)
        record = record_of(folder, "fsdp2")
        assert record["metrics"]["eval_loss"] == pytest.approx(whole["metrics"]["eval_loss"], rel=1e-4)

    def test_shards_of_a_target_compute_what_a_whole_one_computes(self, folder: Path) -> None:
        address = free_address()
        assert statuses(compare_shards, *((rank, address, folder) for rank in range(2))) == [0, 0]

    def test_heads_learn_the_same_from_shards_of_a_target(self, folder: Path, whole: dict[str, Any]) -> None:
        """Its layers in shards beside the head's, which are put together apart from them."""
        for parallel in ("ddp", "fsdp2"):
            output = f"shards_{parallel}"
            command = command_of(folder, output, "batch_size=2", "shard_target=true", f"parallel={parallel}")
            address = free_address()
            assert statuses(train_as, *((rank, address, command) for rank in range(2))) == [0, 0]
            assert_same(weights_of(folder, output), weights_of(folder, "one"), rtol=1e-3, atol=1e-5)

    def test_a_target_without_weights_is_every_processs_mistake(self, folder: Path, tmp_path: Path) -> None:
        """None waits for another that has left, though they load one after another."""
        (tmp_path / "config.json").write_bytes((folder / "target" / "config.json").read_bytes())
        command = command_of(folder, "no_weights", f"target={tmp_path}", "shard_target=true")
        address = free_address()
        assert statuses(train_as, *((rank, address, command) for rank in range(2))) == [2, 2]

    def test_heads_learn_the_same_from_a_target_on_disk(self, folder: Path, whole: dict[str, Any]) -> None:
        train(folder, "on_disk", "device_map={model: disk, lm_head: disk}")
        assert_same(weights_of(folder, "on_disk"), weights_of(folder, "one"), rtol=0, atol=0)

    def test_a_taught_draft_model_learns_the_same_however_a_step_is_split(self, folder: Path) -> None:
        """A step's loss is a mean over the tokens that its rows' masks leave, whose number differs between batches."""
        sizes = "{hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2}"
        target = folder / "target"
        settings = ("objective=language_model", f"teacher={target}", f"tokenizer={target}", f"architecture={sizes}")
        splits = {"taught": ["batch_size=4"], "taught_4": ["batch_size=1", "accumulation_steps=4"]}
        records = [train(folder, output, *settings, *split) for output, split in splits.items()]
        command = command_of(folder, "taught_2", *settings, "batch_size=2", "shard_target=true")
        address = free_address()
        assert statuses(train_as, *((rank, address, command) for rank in range(2))) == [0, 0]
        losses = [losses_of(record) for record in (*records, record_of(folder, "taught_2"))]
        assert len(losses[0]) == STEPS // 2 + 3, "of training and held out"
        for output, others in zip(("taught_4", "taught_2"), losses[1:], strict=True):
            assert others == pytest.approx(losses[0], rel=1e-4)
            assert_same(weights_of(folder, output), weights_of(folder, "taught"), rtol=1e-3, atol=1e-5)

    def test_a_process_that_ends_has_said_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is buffered and registered for the end is not lost with the interpreter's own farewell."""
        script = (
            "import atexit, sys\n"
            "by_line, sys.stdout = sys.stdout, open(1, 'w', closefd=False)\n"
            "from draftwing.training.processes import end_processes, start_processes\n"
            "start_processes()\n"
            "atexit.register(print, 'registered')\n"
            "print('said')\n"
            "end_processes(3)\n"
            "print('never')\n"
        )
        host, port = free_address().split(":")
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": host, "MASTER_PORT": port}
        for name, value in alone.items():
            monkeypatch.setenv(name, value)
        process = Forked(script)
        assert (process.wait(), process.out) == (3, "said\nregistered\n"), process.errors


def losses_of(record: dict[str, Any]) -> list[float]:
    """Every logged loss, of training and evaluation."""
    return [entry[name] for entry in record["history"] for name in ("loss", "eval_loss") if name in entry]


def assert_same_figures(record: dict[str, Any], expected: dict[str, Any]) -> None:
    """Every logged loss and accuracy, of training and evaluation."""
    assert len(record["history"]) == len(expected["history"])
    for entry, wanted in zip(record["history"], expected["history"], strict=True):
        assert entry == pytest.approx(wanted, rel=2e-3, abs=1e-4)


class TestResume:
    @pytest.mark.parametrize(
        ("objective", "stop_at_5", "expected"),
        [("eagle1", signal.SIGTERM, "one_eagle1"), ("eagle3", signal.SIGINT, "one")],
        indirect=["stop_at_5"],
    )
    def test_a_stopped_run_ends_with_the_same_bits(
        self,
        folder: Path,
        whole: dict[str, Any],
        whole_eagle1: dict[str, Any],
        stop_at_5: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        objective: str,
        expected: str,
    ) -> None:
        """EAGLE-1 draws feature noise, so the random numbers continue too; the row of chances crosses an epoch."""
        output = f"stopped_{objective}"
        with pytest.raises(SystemExit) as stop:
            train(folder, output, f"objective={objective}")
        assert stop.value.code == {"eagle1": 143, "eagle3": 130}[objective]
        name = {"eagle1": "SIGTERM", "eagle3": "SIGINT"}[objective]
        assert f"stopped by {name} after step 5; the same command continues" in capsys.readouterr().err
        interrupted = record_of(folder, output)
        assert not interrupted["finished"]
        assert interrupted["history"][-1]["step"] == 4
        assert "not finished" in (folder / output / "training.html").read_text(encoding="utf-8")
        stop_at_5.undo()
        assert train(folder, output, f"objective={objective}")["finished"]
        checkpoint = folder / output / "checkpoints" / "checkpoint-5"
        assert f"resuming from {checkpoint}\n" in capsys.readouterr().err
        assert_same(weights_of(folder, output), weights_of(folder, expected), rtol=0, atol=0)

    def test_the_momentum_of_muon_continues_too(self, folder: Path, stop_at_5: pytest.MonkeyPatch) -> None:
        with pytest.raises(SystemExit):
            train(folder, "stopped_muon", "optimizer=muon")
        stop_at_5.undo()
        for output in ("stopped_muon", "one_muon"):
            assert train(folder, output, "optimizer=muon")["finished"]
        assert_same(weights_of(folder, "stopped_muon"), weights_of(folder, "one_muon"), rtol=0, atol=0)

    def test_a_second_ctrl_c_stops_at_once(self) -> None:
        before = signal.getsignal(signal.SIGINT)
        with StopOnSignal() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.received == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is before

    def test_a_kill_while_a_checkpoint_is_written(self, folder: Path, whole: dict[str, Any]) -> None:
        assert statuses(train_and_die, (command_of(folder, "killed"),)) == [-signal.SIGKILL]
        written = folder / "killed" / "checkpoints"
        assert (written / "checkpoint-8" / "trainer_state.json").is_file()
        assert checkpoints.newest_checkpoint(written, {}).name == "checkpoint-4"
        train(folder, "killed")
        assert_same(weights_of(folder, "killed"), weights_of(folder, "one"), rtol=0, atol=0)
        assert sorted(path.name for path in written.iterdir()) == ["checkpoint-10", "checkpoint-8"]

    def test_the_evaluations_interval_changes_nothing(self, folder: Path, whole_eagle1: dict[str, Any]) -> None:
        train(folder, "often", "objective=eagle1", "evaluate_every=1", "save_every=3", "keep_checkpoints=1")
        assert_same(weights_of(folder, "often"), weights_of(folder, "one_eagle1"), rtol=0, atol=0)
        assert [path.name for path in (folder / "often" / "checkpoints").iterdir()] == ["checkpoint-10"]

    def test_other_settings_are_refused_and_listed(
        self, folder: Path, stop_at_5: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit):
            train(folder, "changed")
        stop_at_5.undo()
        command = command_of(folder, "changed")
        assert main([*command, "--set", "learning_rate=1e-3", "--set", "ttt_steps=2", "--set", "log_every=1"]) == 2
        error = capsys.readouterr().err
        assert "learning_rate was 0.01, is 0.001; ttt_steps was 3, is 2." in error
        assert "log_every" not in error
        assert main([*command, "--set", "batch_size=2"]) == 2
        assert "rows_per_step was 4, is 2" in capsys.readouterr().err
        assert main([*command, "--set", "batch_size=2", "--set", "accumulation_steps=2"]) == 0

    def test_other_rows_are_refused_though_they_are_as_many(
        self, folder: Path, tmp_path: Path, stop_at_5: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        data = tmp_path / "data.jsonl"
        data.write_bytes((folder / "data.jsonl").read_bytes())
        with pytest.raises(SystemExit):
            train(folder, "edited", f"data={data}")
        stop_at_5.undo()
        data.write_text(data.read_text(encoding="utf-8").replace("add_1(", "add_7("), encoding="utf-8")
        assert main(command_of(folder, "edited", f"data={data}")) == 2
        assert re.search(r"made with other settings: rows was '\w+', is '\w+'\. Undo", capsys.readouterr().err)
        (mark,) = (folder / "edited" / "checkpoints").glob("checkpoint-5/recipe.json")
        settings = json.loads(mark.read_text(encoding="utf-8"))
        del settings["rows"]  # as older runs have it
        mark.write_text(json.dumps(settings), encoding="utf-8")
        train(folder, "edited", f"data={data}")

    def test_a_finished_stage_is_skipped_but_not_another(
        self, folder: Path, whole: dict[str, Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        weights = (folder / "one" / "model.safetensors").stat()
        assert train(folder, "one") == whole
        assert re.search(r"finished already \(begun \d{4}-.*\), skipped", capsys.readouterr().err)
        assert (folder / "one" / "model.safetensors").stat() == weights
        assert main(["train", str(folder / "recipe.yaml"), "--set", "seed=1"]) == 2
        assert "seed was 0, is 1" in capsys.readouterr().err

    @pytest.mark.parametrize("changed", ["target", "data"])
    def test_a_finished_stage_is_refused_when_its_inputs_changed(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: str
    ) -> None:
        """A copy, of another time, is the same input; a changed weight, or another row, is not."""
        target, data = tmp_path / "target", tmp_path / "data.jsonl"
        settings = (f"target={target}", f"data={data}", "max_steps=1", "save_every=1")
        for _ in range(2):
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(folder / "target", target, copy_function=shutil.copyfile)
            data.write_bytes((folder / "data.jsonl").read_bytes())
            train(folder, f"inputs_{changed}", *settings)
        assert "finished already" in capsys.readouterr().err
        if changed == "target":
            weights = load_file(target / "model.safetensors")
            save_file({name: tensor + 1 for name, tensor in weights.items()}, target / "model.safetensors")
        else:
            data.write_text(data.read_text(encoding="utf-8").replace("add_1(", "sub_1("), encoding="utf-8")
        assert main(command_of(folder, f"inputs_{changed}", *settings)) == 2
        assert f"content of {changed} was" in capsys.readouterr().err

    def test_finished_medusa_heads_are_skipped_too(self, folder: Path) -> None:
        """Their file has another name."""
        settings = ("objective=medusa", "medusa_heads=2", "max_steps=1", "save_every=1")
        record = train(folder, "medusa", *settings)
        shutil.rmtree(folder / "medusa" / "checkpoints")
        weights = (folder / "medusa" / "medusa_lm_head.safetensors").stat()
        assert train(folder, "medusa", *settings) == record
        assert (folder / "medusa" / "medusa_lm_head.safetensors").stat() == weights


class TestRecord:
    def test_the_best_head_is_kept(self, folder: Path, whole: dict[str, Any]) -> None:
        evaluations = [entry for entry in whole["history"] if "eval_tau_sim" in entry]
        assert len(evaluations) >= 2
        assert (folder / "one" / "best" / "model.safetensors").is_file()
        best = max(evaluations, key=lambda entry: entry["eval_tau_sim"])
        state = json.loads(
            (folder / "one" / "checkpoints" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text(encoding="utf-8")
        )
        assert state["best_metric"] == best["eval_tau_sim"]

    def test_true_tau_is_what_the_engine_decodes(self, folder: Path, whole: dict[str, Any]) -> None:
        assert all(1 <= entry["eval_tau"] <= 4 for entry in whole["history"] if "eval_loss" in entry)
        tree = train(folder, "tree", TAU, "decode_plan=tree:4x3x12", "evaluate_every=100")
        assert tree["metrics"]["eval_tau"] >= whole["metrics"]["eval_tau"]

    def test_the_report_shows_the_curves(self, folder: Path, whole: dict[str, Any]) -> None:
        page = (folder / "one" / "training.html").read_text(encoding="utf-8")
        assert not any(word in page for word in ("src=", "href=", "url(", "@import")), "it needs nothing else"
        assert page.count("<polyline") >= 8
        for name in ("eval_tau_sim", "eval_tau", "eval_accuracy_2", "learning_rate"):
            assert f">{name}</text>" in page


@pytest.mark.parametrize("plan", [(), ("--plan", "--tflops", "1")])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("aux_layers=[1,2,9]", "error: aux_layers: expected numbers of hidden states from 0 to 6, the number of the "),
        ("aux_layers=[-1,2,3]", "error: aux_layers: expected numbers of hidden states from 0 to 6, the number of the "),
        ("architecture.hidden_size=16", "error: architecture.hidden_size: expected the target's 32, got 16"),
        ("architecture.draft_vocab_size=100", "error: architecture.draft_vocab_size: unknown key"),
        ("objective=eagle1 architecture.aux_layers=[1,3,5]", "error: architecture.aux_layers: unknown key"),
        ("objective=medusa architecture.hidden_size=16", "error: architecture: Medusa heads have none; medusa_heads "),
    ],
)
def test_shapes_that_the_target_does_not_have_are_found_first(
    folder: Path, capsys: pytest.CaptureFixture[str], plan: tuple[str, ...], override: str, message: str
) -> None:
    assert main([*command_of(folder, "unfit", *override.split()), *plan]) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "unfit").exists()


def test_it_is_said_how_much_a_draft_vocabulary_covers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    warning = "; no other one can be accepted: choose a larger draft_vocab_size"
    for size, is_low in ((4, True), (200, False)):
        train(folder, f"covers_{size}", f"draft_vocab_size={size}", "max_steps=1", "save_every=1")
        said = capsys.readouterr().err
        assert re.search(rf"the draft vocabulary of {size} tokens covers [\d.]+% of the supervised tokens", said)
        assert (warning in said) == is_low
    train(folder, "covers_all", "draft_vocab_size=null", "max_steps=1", "save_every=1")
    assert "the draft vocabulary" not in capsys.readouterr().err


class TestContinuedHead:
    """`init_from`: a head for a fine-tuned target starts from the one for its base."""

    def test_a_new_vocabulary_keeps_the_rows_of_the_tokens_that_stay(self, folder: Path, whole: dict[str, Any]) -> None:
        start_from = f"init_from={folder / 'one'}"
        settings = (start_from, "aux_layers=[]", "max_steps=1", "learning_rate=0", "save_every=1")
        train(folder, "kept", *settings, "draft_vocab_size=null")
        train(folder, "wider", *settings, "draft_vocab_size=250")
        target = load_file(folder / "target" / "model.safetensors")["lm_head.weight"].bfloat16()
        old, kept, wider = (load_file(folder / name / "model.safetensors") for name in ("one", "kept", "wider"))
        assert_same(kept, old, rtol=0, atol=0)
        old_ids, new_ids = (head["d2t"] + torch.arange(len(head["d2t"])) for head in (old, wider))
        assert len(new_ids) == 250
        rows = dict(zip(old_ids.tolist(), old["lm_head.weight"], strict=True))
        for row, token in enumerate(new_ids.tolist()):
            assert torch.equal(wider["lm_head.weight"][row], rows.get(token, target[token]))
        assert torch.equal(wider["fc.weight"], old["fc.weight"])

    def test_an_embedding_to_train_starts_from_the_targets(self, folder: Path, whole: dict[str, Any]) -> None:
        """With a new vocabulary or the old one; the next run keeps it, trained or not."""
        settings = ("aux_layers=[]", "draft_vocab_size=null", "max_steps=1", "save_every=1")
        start_from, trains = f"init_from={folder / 'one'}", "train_embedding=true"
        train(folder, "embeds", start_from, *settings, trains, "learning_rate=0")
        target = load_file(folder / "target" / "model.safetensors")["model.embed_tokens.weight"].bfloat16()
        assert torch.equal(load_file(folder / "embeds" / "model.safetensors")["embed_tokens.weight"], target)
        start_from = f"init_from={folder / 'embeds'}"
        for name, more in (("learns", (trains,)), ("frozen", ()), ("embeds_more", (trains, "draft_vocab_size=250"))):
            train(folder, name, start_from, *settings, "learning_rate=0.01", "warmup_steps=0", *more)
            found = load_file(folder / name / "model.safetensors")["embed_tokens.weight"]
            assert torch.equal(found, target) == (name == "frozen")

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["init_from=tiny"], "the head reads features of width 256, the target's have 32"),
            (["objective=eagle1"], "holds an EAGLE-3 head, the objective is eagle1"),
            (["parallel=fsdp2"], "parallel: fsdp2 shards over several processes; start them with `torchrun"),
            (["decode_plan=tree:4"], "decode_plan: plan: expected off, chain:DEPTH, tree:"),
            (["report_to=mlflow"], "report_to: mlflow is not installed"),
        ],
    )
    def test_what_does_not_fit_is_refused(
        self,
        folder: Path,
        whole: dict[str, Any],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        overrides: list[str],
        message: str,
    ) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        settings = (f"init_from={folder / 'one'}", "draft_vocab_size=null", *overrides)
        assert main(command_of(folder, "refused", *settings)) == 2
        assert message in capsys.readouterr().err

    def test_another_vocabulary_is_refused(
        self, folder: Path, whole: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for file in (folder / "target").iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        tiny_llama(vocab_size=320).float().save_pretrained(tmp_path)
        settings = (f"target={tmp_path}", f"init_from={folder / 'one'}")
        assert main(command_of(folder, "refused", *settings)) == 2
        assert re.search(r"vocab_size: the head was made for \d+ tokens, the target has 320", capsys.readouterr().err)


# What is not finite ends a run.


def as_strict_json(text: str) -> Any:
    """As every reader takes it: Python's alone knows NaN and Infinity."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("objective", ["eagle3", "eagle1", "medusa"])
def test_a_loss_that_explodes_ends_the_run(folder: Path, capsys: pytest.CaptureFixture[str], objective: str) -> None:
    output = f"exploded_{objective}"
    assert main(command_of(folder, output, f"objective={objective}", "learning_rate=1e30", "warmup_steps=0")) == 2
    said = capsys.readouterr()
    assert re.search(
        r"error: training: the (loss|gradient) of step \d+ is not finite; no checkpoint was made", said.err
    )
    assert "learning_rate (it is 1e+30)" in said.err
    assert not list((folder / output).rglob("*.safetensors")), "nothing of it is left as a head"
    if (folder / output / "training.json").exists():
        assert as_strict_json((folder / output / "training.json").read_text())["finished"] is False


@pytest.mark.parametrize(
    ("step", "where"),  # between checkpoints, and with the weights of one
    [(6, "gradient"), (8, "loss"), pytest.param(6, "loss", marks=SLOW), pytest.param(8, "gradient", marks=SLOW)],
)
def test_the_last_good_checkpoint_is_kept(
    folder: Path,
    whole: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    step: int,
    where: str,
) -> None:
    good_step = loop.Trainer.training_step

    def broken_step(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = good_step(self, *args, **kwargs)
        if self.state.global_step == step and where == "gradient":
            next(p for p in self.model.parameters() if p.grad is not None).grad.view(-1)[3] = torch.nan
        return loss * (torch.nan if self.state.global_step == step and where == "loss" else 1.0)

    output = f"broken_{step}_{where}"
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "training_step", broken_step)
        assert main(command_of(folder, output)) == 2
    kept = 4 if (step, where) == (8, "loss") else step // 4 * 4
    said = capsys.readouterr().err
    assert f"the {where} of step {step + 1} is not finite; the last good checkpoint is " in said
    assert f"checkpoint-{kept}." in said
    as_strict_json((folder / output / "training.json").read_text())
    train(folder, output)
    assert_same(weights_of(folder, output), weights_of(folder, "one"), rtol=0, atol=0)


def test_an_evaluation_that_is_not_finite_is_not_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = HeadLoss.pop_metrics

    def broken_figures(self: Any, training: bool, *args: Any) -> dict[str, float]:
        return figures(self, training, *args) | ({} if training else {"loss": float("inf")})

    monkeypatch.setattr(HeadLoss, "pop_metrics", broken_figures)
    assert main(command_of(folder, "broken_evaluation")) == 2
    assert "error: training: eval_loss at step 4 is not finite" in capsys.readouterr().err
    assert not list((folder / "broken_evaluation").rglob("*.safetensors"))


def test_json_has_no_word_for_what_is_not_finite() -> None:
    value = {"loss": float("nan"), "rows": [1.5, float("inf"), (2, -float("inf"))], "name": "NaN"}
    assert as_strict_json(to_json(value)) == {"loss": None, "rows": [1.5, None, [2, None]], "name": "NaN"}
