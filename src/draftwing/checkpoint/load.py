"""Load targets and drafts from a folder, a hub id or the embedded assets. Strict: every tensor is accounted for."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from draftwing.checkpoint.fields import sort_fields
from draftwing.checkpoint.fit import (
    broken_tensors,
    fit_problems,
    medusa_problems,
    tensor_problems,
    vocabulary_problems,
)
from draftwing.checkpoint.formats import (
    FROM_FILE,
    HeadFile,
    HeadOptions,
    TargetSizes,
    Tensors,
    count_features,
    is_language_model,
    read_head,
)
from draftwing.checkpoint.medusa_format import is_medusa, read_medusa
from draftwing.checkpoint.quantize import is_quantized_file, quantization_config
from draftwing.models.draft_vocab import DraftVocab
from draftwing.models.eagle import EagleModel
from draftwing.models.eagle3 import Eagle3Model
from draftwing.models.layers import DraftConfig
from draftwing.models.medusa import MedusaConfig, MedusaModel
from draftwing.models.packed import multiplies_bfloat16
from draftwing.models.target import ATTENTION, Role, TargetModel, one_line

TOKENIZER_FILES = ("*.model", "*.txt", "*.tiktoken")
HUB_OPTIONS = ("cache_dir", "code_revision", "force_download", "local_files_only", "proxies") + (
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)
"""What of `from_pretrained`'s options says where files come from and whether their code is run."""
EMBEDDED = Path(__file__).parent.parent / "assets" / "tiny"
"""The embedded target, its drafts, and prompts that they were not trained on."""
EMBEDDED_PROMPTS = EMBEDDED / "prompts.jsonl"
EMBEDDED_DRAFTS = {
    "tiny-draft": EMBEDDED / "draft",
    "tiny-eagle1": EMBEDDED / "eagle1",
    "tiny": EMBEDDED / "eagle3",
    "tiny-medusa": EMBEDDED / "medusa",
}
ACCEPTANCE_FILE = "acceptance.json"
"""Beside a draft's weights: how often its tokens were accepted, from `draftwing plan --save`."""
MEDUSA_FILE = "medusa_lm_head.pt"
TRAINING_STATE = re.compile(r"(training_args|optimizer\w*|scheduler\w*|sampler\w*|random_states\w*|rng_state\w*)\.")
"""What trainers leave beside the weights."""
DraftNetwork = EagleModel | Eagle3Model
Network = TypeVar("Network", EagleModel | Eagle3Model, MedusaModel)
Draft = DraftNetwork | MedusaModel | TargetModel
"""What drafts for a target: an EAGLE head's network, Medusa's heads, or a second causal language model."""


def resolve_target(name: str) -> str:
    """A folder or hub id for the target `name`; `tiny` is the embedded one."""
    return str(EMBEDDED / "target") if name == "tiny" else name


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


def load_target(
    name: str,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    role: Role = "target",
    quantize: str | None = None,
    **options: Any,
) -> TargetModel:
    """Load a causal language model with our attention function. `options` go to transformers' `from_pretrained`.

    Without a `dtype` it is the file's; on a CPU without bf16 products, and for float16 files there, float32.
    `quantize` is one of QUANTIZATIONS.

    Raises:
        ValueError: a name that cannot be loaded, missing tensors, a model that cannot verify trees. The message begins
            with the `role`. A quantisation that cannot be had.
    """
    return TargetModel(_load_on(torch.device(device), name, dtype, role, quantize, **options), role)


def load_stock(name: str, dtype: torch.dtype, device: str | torch.device, quantize: str | None = None) -> Any:
    """A causal language model as transformers runs it, to compare with.

    Raises:
        ValueError: a name that cannot be loaded.
    """
    return _load_on(torch.device(device), name, dtype, "model", quantize, attn_implementation=None)


def _load_on(
    device: torch.device, name: str, dtype: torch.dtype | None, role: str, quantize: str | None, **options: Any
) -> Any:
    """A model on its device, or where a `device_map` in the options puts it; arguments as those of `load_target`."""
    lacks_bfloat16 = device.type == "cpu" and not multiplies_bfloat16()
    if quantize is not None:
        options["quantization_config"] = quantization_config(quantize, device)
        if dtype is None and lacks_bfloat16:
            dtype = torch.float32  # a quantised model cannot be converted
    try:
        is_quantized = is_quantized_file(resolve_target(name), **options) or "quantization_config" in options
    except OSError as error:
        reason = "cannot load" if Path(resolve_target(name)).is_dir() else "no folder and no reachable hub id:"
        raise ValueError(f"{role}: {reason} {name!r}: {one_line(error)}") from error
    if is_quantized and device.type != "cpu":
        # Weights are packed for the device that they are on, and must not be moved. accelerate places them.
        options = {"device_map": str(device)} | options
    model = load_model(name, dtype, role, **options)
    if is_quantized or "device_map" in options:
        return model
    is_slow = model.dtype == torch.float16 or (model.dtype == torch.bfloat16 and lacks_bfloat16)
    return model.float() if dtype is None and device.type == "cpu" and is_slow else model.to(device)


def load_model(name: str, dtype: torch.dtype | None = None, role: str = "target", **options: Any) -> Any:
    """The transformers model of a target, where the `options` (`device_map`) put it; arguments as `load_target`'s.

    Raises:
        ValueError: a name that cannot be loaded, missing tensors.
    """
    options.setdefault("attn_implementation", ATTENTION)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            resolve_target(name), dtype=dtype or "auto", output_loading_info=True, **options
        )
    except (OSError, ImportError, TypeError) as error:  # no such model; a package that an option needs; no such option
        raise ValueError(f"{role}: cannot load {name!r}: {one_line(error)}") from error
    except ValueError as error:  # among others: a model of another kind, with a list of all that are of this one
        reason = one_line(error)
        if reason.startswith("Unrecognized configuration class"):
            reason = f"{_architecture(name, options)} is no causal language model that transformers loads as one"
        raise ValueError(f"{role}: cannot load {name!r}: {reason}") from error
    except KeyError as error:  # older modules pick their attention from a table of their own (Falcon, GPT-J)
        if error.args != (options["attn_implementation"],):
            raise
        raise ValueError(
            f"{role}: {name!r} does not know the attention {error}; pass attn_implementation='sdpa' or 'eager'"
        ) from error
    except RuntimeError as error:  # also raised for lack of memory
        if "mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"{role}: the tensors of {name!r} have other shapes than its config.json says; is it a draft head?"
        ) from error
    if missing := sorted(info["missing_keys"]):  # transformers fills them with random values
        raise ValueError(f"{role}: {name!r} lacks {len(missing)} tensors, the first is {missing[0]}")
    return model.eval()


def _architecture(name: str, options: Mapping[str, Any]) -> str:
    """What a model's config.json says that it is."""
    known = {key: value for key, value in options.items() if key in HUB_OPTIONS}
    config = AutoConfig.from_pretrained(resolve_target(name), **known)
    return ", ".join(config.architectures or ()) or str(config.model_type)


def load_tokenizer(name: str, **options: Any) -> Any:
    """The tokenizer that belongs to a target. Of the model's `options` it takes HUB_OPTIONS.

    Raises:
        ValueError: it has none, or it cannot be loaded.
    """
    options = {key: value for key, value in options.items() if key in HUB_OPTIONS}
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_target(name), **options)
    except (OSError, ValueError, ImportError) as error:  # one written in Python may need a package
        raise ValueError(f"target: no tokenizer in {name!r}: {one_line(error)}") from error
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # transformers makes one without files, from the config
        raise ValueError(f"target: no tokenizer in {name!r}")
    return tokenizer


def find_tokenizer(name: str) -> Any:
    """The tokenizer that lies beside a model, None if there is none."""
    try:
        return load_tokenizer(name)
    except (OSError, ValueError):  # transformers has no way to ask
        return None


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
