"""Every script in benchmarks/ runs, on a prompt or two, in `make slow`; docs/results has what they measure."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FEW = "--max-new-tokens 8"
RUNS = {
    "bench_busy.py": f"--alone --rounds 1 --patience 0 {FEW}",
    "bench_cycle.py": "--rounds 3 --plans chain:3 --draft-vocab-size 512 --context 512",
    "bench_engine.py": "--seats 2 --num-requests 4 --repeats 1 --plan chain:3",
    "bench_flips.py": f"--cuts 1 --temperatures 1 --dtype float32 {FEW}",
    "bench_generate.py": f"--num-prompts 1 --repeats 1 --plans auto chain:3 --random-head {FEW}",
    "bench_ngram.py": f"--measure speed --num-prompts 1 --repeats 1 {FEW}",
    "bench_plan.py": f"--settings 1x1 --batches 1 --repeats 1 {FEW}",
    "bench_sampling.py": f"--num-prompts 1 --seeds 1 --temperatures 0 1 {FEW}",
    "bench_server.py": f"--clients 2 --num-requests 2 --rounds 1 --http-requests 1 {FEW}",
    "bench_train_step.py": "--steps 1 --ttt-steps 2 --sequence-length 64",
    "fit_coupling.py": f"--temperatures 1 --num-nodes 40 {FEW}",
}
ELSEWHERE = {
    "chat_rig.py": "tests/e2e/test_from_target.py",
    "check_engines.py": "`make engines`",
    "data_scaling.py": "needs rows of a target's own",
    "inflate.py": "tests/unit/target/test_inflated.py has its functions; its shapes are a GPU's",
    "on_gpu.py": "runs some of these, on a GPU or with --tiny",
    "target_gguf.py": "`make engines`",
    "vllm_command.py": "tests/clients",
}


def test_every_benchmark_is_run_somewhere() -> None:
    assert {script.name for script in BENCHMARKS.glob("*.py")} == RUNS.keys() | ELSEWHERE.keys()


@pytest.mark.slow
@pytest.mark.parametrize("script", RUNS)
def test_it_runs(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "result.json"
    command = [sys.executable, str(BENCHMARKS / script), *RUNS[script].split(), "--output", str(output)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(output.read_text(encoding="utf-8"))["rows"]
