"""Every kind of embedded draft in every engine that runs on a CPU: exported, decoded there and here, compared.

    make engines    # installs the engines below build/engines, and runs this

Each check has a sabotaged twin, in which the engine reads a folder with one fault: it must be found. The record in
docs/results/exports.json is what tests/compat/test_recorded.py holds today's decoding to.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from target_gguf import write_target

from draftwing.checks.check_export import NUM_PROMPTS, Check, CheckRequest, check_export
from draftwing.checks.find_engine import Checker, find_program, variable
from draftwing.data.prompts import read_prompts, spread
from draftwing.drafts.eagle.gguf_head import HEAD_GGUF
from draftwing.drafts.export_draft import export_draft
from draftwing.embedded import EMBEDDED, EMBEDDED_PROMPTS
from draftwing.provenance import write_record


def shift_ids(folder: Path) -> None:
    """Every drafted token is the next one's."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    ids = (tensors["d2t"] + torch.arange(len(tensors["d2t"])) + 1) % len(tensors["t2d"])
    tensors["d2t"] = ids - torch.arange(len(ids))
    tensors["t2d"] = torch.zeros_like(tensors["t2d"]).index_fill_(0, ids, True)
    save_file(tensors, file, metadata={"format": "pt"})


def shift_gguf_ids(folder: Path) -> None:
    """The same in a GGUF file, in place."""
    tensors = GGUFReader(folder / HEAD_GGUF, "r+").tensors
    ids = next(tensor for tensor in tensors if tensor.name == "d2t").data
    ids[:] = (ids + 1) % ids.max()


def say_bias(folder: Path) -> None:
    """The key that vLLM takes for the attention's biases, which no file has."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(values | {"bias": True}), encoding="utf-8")


def one_layer_off(folder: Path) -> None:
    """Feature layers in the other convention."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = "eagle_aux_hidden_state_layer_ids"
    values[name] = [layer - 1 for layer in values[name]]
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")


def coarser_eps(folder: Path) -> None:
    """Norms that divide by something else."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(values | {"rms_norm_eps": 1e-3}), encoding="utf-8")


def swap_heads(folder: Path) -> None:
    """Medusa's first two heads in each other's place."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    first, second = (f"lm_heads.{head}.weight" for head in (0, 1))
    tensors[first], tensors[second] = tensors[second], tensors[first]
    save_file(tensors, file, metadata={"format": "pt"})


@dataclass(frozen=True)
class Case:
    """A draft, the engine that it is exported `to`, who checks it, and what may go wrong with it there."""

    draft: str
    to: str
    checker: str
    sabotages: Sequence[Callable[[Path], None]]


CASES = [
    Case("tiny", "vllm", "vllm", (shift_ids, one_layer_off)),
    Case("tiny", "speculators", "vllm", (shift_ids,)),
    Case("tiny-eagle1", "vllm", "vllm", (say_bias,)),
    Case("tiny-medusa", "vllm", "vllm", (swap_heads,)),
    Case("tiny", "llama.cpp", "llama-server", (shift_gguf_ids,)),
    Case("tiny", "speculators", "speculators", (shift_ids,)),
    Case("tiny", "vllm", "transformers", (one_layer_off,)),
    Case("tiny-eagle1", "sglang", "transformers", (coarser_eps,)),
]


def checked(
    case: Case, checker: Checker, target_gguf: Path, folder: Path, sabotage: Callable[[Path], None] | None = None
) -> Check:
    """Export a draft, and check it; with a sabotage the engine reads a copy that has it."""
    given = {"target_gguf": target_gguf} if case.to == "llama.cpp" else {}
    prompts = spread(read_prompts(EMBEDDED_PROMPTS), NUM_PROMPTS)[: 2 if sabotage else None]
    right = folder / "right"
    if sabotage is None:
        verifier = str(EMBEDDED / "target")  # where the speculators folder finds it
        export_draft(case.draft, "tiny", case.to, right, verifier=verifier, force=True, **given)
        read = right
    else:
        read = Path(shutil.copytree(right, folder / sabotage.__name__))
        sabotage(read)
    request = CheckRequest(read, case.to, "tiny", checker, prompts, **given, reference=right)
    check = check_export(request, print)
    told = "; ".join(check.problems) or "agrees"
    print(f"{case.draft} to {case.to}, {checker.name} {check.version}, {read.name}: {told}", flush=True)
    return check


def as_row(case: Case, check: Check) -> dict[str, Any]:
    """A check for the record, with the engine's tokens and cycles."""
    answers = [vars(answer) for answer in check.answers]
    return {"draft": case.draft} | check.as_dict() | ({"answers": answers} if answers else {})


def key(row: dict[str, Any]) -> tuple[str, str, str]:
    """Which case a row is of."""
    return row["draft"], row["to"], row["checker"]


def main() -> int:
    """Run the checks, and record each as it comes; 1 if one did not agree, or a sabotage was not found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/results/exports.json"))
    parser.add_argument("--only", nargs="*", help=f"checkers: {', '.join(sorted({c.checker for c in CASES}))}")
    options = parser.parse_args()
    old = json.loads(options.output.read_text(encoding="utf-8"))["rows"] if options.output.is_file() else []
    rows = {key(row): row for row in old}
    cases = [case for case in CASES if options.only is None or case.checker in options.only]
    with tempfile.TemporaryDirectory() as scratch:
        target_gguf = Path(scratch) / "target.gguf"
        write_target(EMBEDDED / "target", target_gguf)
        for number, case in enumerate(cases):
            checker, folder = program_of(case.checker), Path(scratch) / str(number)
            row = as_row(case, checked(case, checker, target_gguf, folder))
            row["sabotages_found"] = []
            for sabotage in (None, *case.sabotages):
                if sabotage is not None and checked(case, checker, target_gguf, folder, sabotage).problems:
                    row["sabotages_found"].append(sabotage.__name__)
                rows[key(row)] = row
                write_record(options.output, list(rows.values()), {"prompts": NUM_PROMPTS})
    wanted = {(case.draft, case.to, case.checker): len(case.sabotages) for case in cases}
    return int(any(not rows[name]["agrees"] or len(rows[name]["sabotages_found"]) < wanted[name] for name in wanted))


def program_of(name: str) -> Checker:
    """A checker that its variable names, or that `make engines` has installed."""
    if (at := find_program(name)) is None:
        raise ValueError(f"{name}: not installed; `make engines`, or {variable(name)}")
    return Checker(name, at)


if __name__ == "__main__":
    sys.exit(main())
