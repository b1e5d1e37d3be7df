"""The loaders of speculators and transformers on an exported folder: the same tensors, the same fields."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftwing.checks.elsewhere.in_loader import digest
from draftwing.checks.engine_process import EngineProcess
from draftwing.drafts.load_draft import read_draft_files

SCRIPT = Path(__file__).parent / "elsewhere/in_loader.py"
FIELDS = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
    *("num_hidden_layers", "rms_norm_eps", "max_position_embeddings", "hidden_act", "tie_word_embeddings"),
    *("draft_vocab_size", "norm_before_residual", "norm_before_fc", "eagle_aux_hidden_state_layer_ids"),
)
"""Of a config.json, where it has them; they are what a network is built from."""
FROM_VERIFIER = ("embed_tokens.weight", "verifier_lm_head.weight", "verifier_norm.weight")
"""Tensors that speculators takes from the target where a file lacks them; others would stay random."""


@dataclass(frozen=True)
class Loaded:
    """What a loader made of a folder.

    Attributes:
        num_fields, num_tensors: how many were compared.
        differing: the names of those that it read otherwise, did not read, or has and the file has not.
    """

    version: str
    num_fields: int
    num_tensors: int
    differing: list[str]

    @property
    def num_read(self) -> int:
        return self.num_fields + self.num_tensors


def load_there(package: str, python: Path, folder: Path, seconds: float, written: Path) -> Loaded:
    """Load a folder by `package`, speculators or transformers, of another Python; compare with what was `written`.

    Raises:
        ValueError: the loader fails, or takes too long.
    """
    with tempfile.TemporaryDirectory(prefix="draftwing-") as scratch:
        answer = Path(scratch) / "answer.json"
        with EngineProcess(package, [python, SCRIPT, package, folder, answer], seconds) as process:
            text = process.until(lambda: answer.read_text(encoding="utf-8") if answer.is_file() else None)
    said = json.loads(text)
    values, tensors = read_draft_files(written)
    mine, theirs = _fields(values), _fields(said["config"])
    wrong = [name for name in mine if mine[name] != theirs.get(name)]
    names = list(tensors) if package == "speculators" else []
    wrong += [name for name in names if digest(tensors[name]) != said["tensors"].get(name)]
    wrong += sorted(said["tensors"].keys() - {*names, *FROM_VERIFIER})
    return Loaded(said["version"], len(mine), len(names), wrong)


def _fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration, with those of a layer nested in it, and RoPE's."""
    flat = {**values, **(values.get("transformer_layer_config") or {})}
    found = {name: flat[name] for name in FIELDS if flat.get(name) is not None}
    rope = flat.get("rope_parameters") or {**(flat.get("rope_scaling") or {}), "rope_theta": flat.get("rope_theta")}
    return found | {f"rope.{name}": value for name, value in sorted(rope.items()) if value is not None}
