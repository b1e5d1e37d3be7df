"""Load drafts from a folder, a hub id or the embedded assets. Strict: every tensor is accounted for."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file

from draftwing.drafts.draft_vocab import DraftVocab
from draftwing.drafts.eagle.eagle1 import EagleModel
from draftwing.drafts.eagle.eagle3 import Eagle3Model
from draftwing.drafts.eagle.fields import sort_fields
from draftwing.drafts.eagle.formats import (
    FROM_FILE,
    HeadFile,
    HeadOptions,
    TargetSizes,
    Tensors,
    count_features,
    is_language_model,
    read_head,
)
from draftwing.drafts.fit import (
    broken_tensors,
    fit_problems,
    medusa_problems,
    tensor_problems,
    vocabulary_problems,
)
from draftwing.drafts.medusa.files import is_medusa, read_medusa
from draftwing.drafts.medusa.network import MedusaConfig, MedusaModel
from draftwing.embedded import EMBEDDED_DRAFTS
from draftwing.layers import DraftConfig
from draftwing.target.load import find_tokenizer, load_target
from draftwing.target.model import TargetModel

TOKENIZER_FILES = ("*.model", "*.txt", "*.tiktoken")
ACCEPTANCE_FILE = "acceptance.json"
"""Beside a draft's weights: how often its tokens were accepted, from `draftwing plan --save`."""
MEDUSA_FILE = "medusa_lm_head.pt"
TRAINING_STATE = re.compile(r"(training_args|optimizer\w*|scheduler\w*|sampler\w*|random_states\w*|rng_state\w*)\.")
"""What trainers leave beside the weights."""
DraftNetwork = EagleModel | Eagle3Model
Network = TypeVar("Network", EagleModel | Eagle3Model, MedusaModel)
Draft = DraftNetwork | MedusaModel | TargetModel
"""What drafts for a target: an EAGLE head's network, Medusa's heads, or a second causal language model."""


def resolve_draft(name: str) -> Path:
    """The folder of the draft `name`: one of EMBEDDED_DRAFTS, a folder, or a hub id that is fetched.

    Raises:
        ValueError: no such folder, and the hub has no such draft or cannot be reached.
    """
    if name in EMBEDDED_DRAFTS:
        if not EMBEDDED_DRAFTS[name].is_dir():
            raise ValueError(f"draft: {name} is not part of this installation; recipes/tiny_rivals.yaml trains it")
        return EMBEDDED_DRAFTS[name]
    folder = Path(name)
    if folder.is_dir():
        return folder
    try:
        patterns = ["*.json", "*.safetensors", "*.bin", MEDUSA_FILE, *TOKENIZER_FILES]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds; the user needs the name and the reason
        raise ValueError(
            f"draft: no folder and no reachable hub id: {name!r} ({type(error).__name__}: {error})"
        ) from error


def read_draft_files(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """A draft's config.json and tensors (safetensors, which are mapped and not yet read, or .bin).

    Raises:
        ValueError: a file is missing or unreadable.
    """
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise ValueError(f"draft: {folder} has no config.json")
    values = _read_json(config_path)
    tensors: Tensors = {}
    for file in _weight_files(folder):
        tensors |= _read_tensors(file)
    return values, tensors


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold a draft's weights.

    A training folder has others beside them: the optimizer's state, and under numbered names (model_1.safetensors) what
    else was prepared for training, as the target's output head.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            return [folder / file for file in sorted({*_read_json(index)["weight_map"].values()})]
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    files = [file for file in files if not TRAINING_STATE.match(file.name)] or sorted(folder.glob(MEDUSA_FILE))
    if not files:
        raise ValueError(f"draft: {folder} has neither .safetensors nor .bin files")
    return files


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"draft: cannot read {file}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"draft: cannot read {file}: expected an object, got {type(values).__name__}")
    return values


def _read_tensors(file: Path) -> Tensors:
    try:
        part = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"draft: cannot read {file}: {error}") from error
    if not isinstance(part, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in part.values()):
        raise ValueError(f"draft: {file} holds other things than tensors by name; is it a trainer's state?")
    return part


def load_draft(
    name: str,
    target: TargetModel,
    dtype: torch.dtype | None = None,
    options: HeadOptions = FROM_FILE,
    tokenizer: Any = None,
) -> Draft:
    """Load what a folder holds to draft for `target`: an EAGLE head, Medusa's heads or a causal language model.

    `options` override what a head's file says. `tokenizer` is the target's; with it a language model may have another
    number of ids (see `vocabulary_problems`).

    Raises:
        ValueError: as `load_head`; a language model that cannot draft for the target.
    """
    folder = resolve_draft(name)
    values, tensors = read_draft_files(folder)
    is_medusa_file = is_medusa(values, tensors)
    if not is_medusa_file and not is_language_model(values, tensors):
        return _check_finite(build_head(values, tensors, target, dtype, options), tensors)
    if options.given:
        kind = "Medusa heads" if is_medusa_file else "a language model"
        raise ValueError(f"{', '.join(options.given)}: {folder} holds {kind}, only EAGLE heads have them")
    if is_medusa_file:
        return _check_finite(_build_medusa(values, tensors, target, dtype), tensors)
    attention = target.model.config._attn_implementation
    model = load_target(str(folder), dtype or target.dtype, target.device, role="draft", attn_implementation=attention)
    for problem in vocabulary_problems(model.vocab_size, target.vocab_size, find_tokenizer(str(folder)), tokenizer):
        raise ValueError(problem)
    return model


def read_acceptance(name: str) -> dict[str, Any]:
    """The acceptance counts stored with a draft (`greedy`, `sampled`); empty if it has none.

    Raises:
        ValueError: the file is no JSON object.
    """
    file = resolve_draft(name) / ACCEPTANCE_FILE
    if not file.is_file():
        return {}
    try:
        values: dict[str, Any] = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"draft: cannot read {file}: {error}") from None
    return values


def load_head(
    name: str,
    target: TargetModel,
    dtype: torch.dtype | None = None,
    options: HeadOptions = FROM_FILE,
) -> DraftNetwork:
    """Load a head for `target`, in the target's dtype and on its device; `options` override what its file says.

    Raises:
        ValueError: a missing, unknown or misshapen tensor or one that is not finite, a field that is not known, or a
            head made for another target.
    """
    values, tensors = read_draft_files(resolve_draft(name))
    return _check_finite(build_head(values, tensors, target, dtype, options), tensors)


def _check_finite(network: Network, tensors: Tensors) -> Network:
    """Give a network back unless the tensors that it was filled with hold NaN or infinity."""
    for problem in broken_tensors(tensors):
        raise ValueError(problem)
    return network


def build_head(
    values: dict[str, Any],
    tensors: Tensors,
    target: TargetModel,
    dtype: torch.dtype | None = None,
    options: HeadOptions = FROM_FILE,
) -> DraftNetwork:
    """As `load_head`, from a config.json's values and a file's tensors, which may hold NaN."""
    head = read_head(values, tensors, sizes_of(target), options)
    for problem in [*fit_problems(head, sizes_of(target)), *sort_fields(values, tensors, head.is_eagle3).refused]:
        raise ValueError(problem)
    if not head.config.own_lm_head and _is_tied(values) and not _is_tied(target.config.to_dict()):
        raise ValueError(
            "tie_word_embeddings: the head's output head is its embedding, which is the target's, whose own is another"
        )
    network = build_network(head.config, target, head.target_ids, own_embedding="embed_tokens.weight" in head.tensors)
    # Converted before it is filled: a float64 file stays exact.
    network = network.to(device=target.device, dtype=dtype or target.dtype)
    load_strictly(network, head.tensors)
    return network.eval()


def _is_tied(values: Mapping[str, Any]) -> bool:
    return bool(values.get("transformer_layer_config", values).get("tie_word_embeddings"))


def _build_medusa(
    values: dict[str, Any], tensors: Tensors, target: TargetModel, dtype: torch.dtype | None
) -> MedusaModel:
    heads = read_medusa(values, tensors)
    for problem in medusa_problems(heads.config, sizes_of(target)):
        raise ValueError(problem)
    network = MedusaModel(heads.config).to(device=target.device, dtype=dtype or target.dtype)
    load_strictly(network, heads.tensors)
    return network.eval()


def expected_medusa_shapes(config: MedusaConfig) -> dict[str, torch.Size]:
    """The parameters of Medusa heads."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in MedusaModel(config).named_parameters()}


def sizes_of(target: TargetModel) -> TargetSizes:
    return TargetSizes(target.hidden_size, target.num_layers, target.vocab_size)


def build_network(
    config: DraftConfig, target: TargetModel, target_ids: torch.Tensor | None, own_embedding: bool = False
) -> DraftNetwork:
    """A network for `target`, to be filled: EAGLE-3 if the configuration names feature layers, else EAGLE-1."""

    def target_head(output: torch.Tensor) -> torch.Tensor:  # a function: copies share it
        return target.logits(output.to(target.dtype))

    if not config.aux_layers:
        return EagleModel(config, target_head)
    vocab = DraftVocab(target_ids, target.vocab_size)
    return Eagle3Model(config, vocab, target.embedding, target_head, own_embedding)


def expected_shapes(head: HeadFile) -> dict[str, torch.Size]:
    """The parameters that a head's network has."""
    return network_shapes(counted_layers(head), own_embedding="embed_tokens.weight" in head.tensors)


def counted_layers(head: HeadFile) -> DraftConfig:
    """A head's configuration with as many feature layers as its weights read; an EAGLE-3 file need not name them."""
    if not head.is_eagle3 or head.config.aux_layers:
        return head.config
    num_features = count_features(head.tensors, head.config.target_hidden_size)
    return dataclasses.replace(head.config, aux_layers=tuple(range(1, num_features + 1)))


def network_shapes(config: DraftConfig, own_embedding: bool = False) -> dict[str, torch.Size]:
    """The parameters of `build_network`'s, without building it in memory or needing its target."""
    of_target, vocab = torch.nn.Identity(), DraftVocab(None, config.vocab_size)
    is_eagle3 = bool(config.aux_layers)
    with torch.device("meta"):
        network = (
            Eagle3Model(config, vocab, of_target, of_target, own_embedding)
            if is_eagle3
            else EagleModel(config, of_target)
        )
    return {name: parameter.shape for name, parameter in network.named_parameters()}


def load_strictly(network: DraftNetwork | MedusaModel, tensors: Tensors) -> None:
    """Copy the tensors into the network's parameters, each exactly once."""
    expected = dict(network.named_parameters())
    shapes = {name: parameter.shape for name, parameter in expected.items()}
    for problem in tensor_problems(shapes, tensors):
        raise ValueError(problem)
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(tensors[name])
