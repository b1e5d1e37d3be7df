"""Recipes: a dataclass of options per objective, filled from one flat YAML; an unknown key names the nearest one."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

Config = TypeVar("Config")
Objective = Literal["language_model", "self_generated", "eagle1", "eagle3", "medusa"]
Loss = Literal["kl", "cross_entropy", "lk"]
Parallel = Literal["ddp", "fsdp2"]
Schedule = Literal["cosine", "linear"]
Optimizer = Literal["adamw", "muon"]
DTYPES = ("float32", "bfloat16", "float16", "float64")
QUANTIZATIONS = ("int8", "int4", "float8")
"""How a target's linear layers can be kept in fewer bits (target/load.py)."""
DRAFT_DTYPES = ("int8", "target")
"""What a draft head's linear layers are kept in: 8 bits (target/rounded.py), or the target's dtype."""
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
TRACKERS = ("tensorboard", "wandb", "mlflow")


def at_least(least: float, default: Any) -> Any:
    """A field with this default whose values below `least` are refused."""
    return field(default=default, metadata={"least": least})


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe: what is made, from which data, for how long. Lengths are in tokens.

    These are the keys that several objectives read; the classes below add those of one objective each.
    """

    objective: Objective
    output: str
    target: str = ""
    """The frozen target: a folder, a hub id or `tiny`. Unused by `language_model`."""
    data: str | tuple[str, ...] = "stdlib"
    """`stdlib` (the Python standard library, `data/corpus.py`), a JSONL file, `hub:org/name[/config][:split]`,
    several of these, or a folder made by `draftwing prepare`."""
    features: str = ""
    """A folder made by `draftwing prepare --features` from the prepared folder `data`; spares a head's target its
    passes."""
    max_rows: int | None = at_least(1, None)
    architecture: Mapping[str, Any] = field(default_factory=dict)
    """Overrides of the trained network's configuration (Hugging Face names: `intermediate_size`, ...)."""
    sequence_length: int = at_least(1, 512)
    batch_size: int = at_least(1, 8)
    """Rows of one process's forward pass; an optimizer step reads batch_size x accumulation_steps x processes rows."""
    accumulation_steps: int = at_least(1, 1)
    max_steps: int = at_least(1, 1000)
    optimizer: Optimizer = "adamw"
    """`muon`: for the matrices of hidden layers, which learn in fewer steps; AdamW for the rest (training/muon.py)."""
    learning_rate: float = at_least(0, 1e-3)
    schedule: Schedule = "cosine"
    """How the learning rate falls to 0 at `max_steps`, after `warmup_steps` of linear rise."""
    warmup_steps: int = at_least(0, 100)
    weight_decay: float = at_least(0, 0.0)
    max_grad_norm: float = at_least(0, 0.5)
    bf16: bool = True
    compile: bool | None = None
    """torch.compile for a language model, or for a head's layers; None: where there is a GPU."""
    parallel: Parallel = "ddp"
    """What several processes (torchrun) share out: `ddp` the rows, `fsdp2` also the head's weights and optimizer."""
    device_map: str | Mapping[str, Any] = ""
    """Split the frozen target over the devices of one process: auto, balanced, balanced_low_0, sequential, or a
    mapping of its modules to devices, `cpu` and `disk` among them (transformers' `device_map`)."""
    shard_target: bool = False
    """Shard the frozen target's layers over several processes (torchrun); each is gathered while it runs."""
    seed: int = 0
    log_every: int = at_least(1, 20)
    evaluate_every: int = at_least(1, 500)
    evaluate_rows: int = at_least(1, 64)
    """Held-out rows (blocks, for a language model) that an evaluation uses."""
    save_every: int = at_least(1, 500)
    keep_checkpoints: int = at_least(1, 2)
    report_to: tuple[str, ...] = ()
    """Where the log goes beside training.json and training.html: tensorboard, wandb, mlflow."""
    prompt_length: int = at_least(1, 64)
    """Tokens of a plain text that are given as a prompt, by `self_generated` and where an evaluation decodes."""

    def __post_init__(self) -> None:
        if not isinstance(self.data, str):
            object.__setattr__(self, "data", _names(self.data))
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if get_origin(hint) is tuple:
                object.__setattr__(self, name, tuple(value))
            if get_origin(hint) is Literal and value not in get_args(hint):
                raise ValueError(f"{name}: expected one of {', '.join(get_args(hint))}, got {value!r}")
        if self.objective != "language_model" and not self.target:
            raise ValueError(f"target: {self.objective} needs the model that the head drafts for")
        self._check_bounds()
        for tracker in self.report_to:
            if tracker not in TRACKERS:
                raise ValueError(f"report_to: expected some of {', '.join(TRACKERS)}, got {tracker!r}")
        if not isinstance(self.device_map, Mapping) and self.device_map not in ("", *DEVICE_MAPS):
            expected = f"one of {', '.join(DEVICE_MAPS)} or a mapping of modules to devices"
            raise ValueError(f"device_map: expected {expected}, got {self.device_map!r}")
        if len(self.splits) > 1:
            raise ValueError("shard_target: is for several processes and device_map for one; give one of the two")
        if self.parallel == "fsdp2" and self.objective == "language_model":
            raise ValueError("parallel: a language_model is trained with ddp; fsdp2 shards heads")
        if self.parallel == "fsdp2" and self.optimizer == "muon":
            raise ValueError("optimizer: muon needs whole matrices, and parallel=fsdp2 shards them; set one of the two")

    def _check_bounds(self) -> None:
        for f in dataclasses.fields(self):
            value, least = getattr(self, f.name), f.metadata.get("least")
            if least is not None and value is not None and not value >= least:
                raise ValueError(f"{f.name}: expected at least {least}, got {value}")

    @property
    def splits(self) -> list[str]:
        """The keys that split the frozen target."""
        return [name for name in ("device_map", "shard_target") if getattr(self, name)]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class LanguageModelStage(Stage):
    """`language_model`: a target or, from another's `tokenizer` and `teacher`, a small draft model for it."""

    vocab_size: int = at_least(1, 4096)
    """Entries of the tokenizer that is trained."""
    tokenizer: str = ""
    """An existing tokenizer, of a folder, a hub id or `tiny`; empty trains one on the data."""
    teacher: str = ""
    """A model whose distributions are learnt, as the draft model of a target does; empty: the tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        of_tokenizer = {"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"} & self.architecture.keys()
        if self.objective == "language_model" and of_tokenizer:
            raise ValueError(f"architecture.{min(of_tokenizer)}: a language_model has its tokenizer's; expected none")
        if self.teacher and not self.tokenizer:
            raise ValueError("tokenizer: a language_model that learns from a teacher needs the teacher's tokenizer")


@dataclass(frozen=True)
class SelfGeneratedStage(Stage):
    """`self_generated`: rows that a target says itself, written to the file `output`."""

    max_new_tokens: int | None = at_least(1, None)
    """Tokens of an answer; None: what `sequence_length` leaves."""
    temperatures: tuple[float, ...] = (0.0, 1.0)
    """Sampling temperatures, in turn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperatures or min(self.temperatures) < 0:
            raise ValueError(f"temperatures: expected some numbers of at least 0, got {list(self.temperatures)}")


@dataclass(frozen=True)
class HeadStage(Stage):
    """Heads of any kind."""

    packing: bool = False
    """Several documents in one row of `sequence_length` tokens."""
    init_from: str = ""
    """A trained or published head to continue from; its shape is kept. Empty starts a new one."""
    loss: Loss = "kl"
    """The token loss: `kl` to the target's distribution, `cross_entropy` to the target's likeliest token, or `lk`,
    which goes over from KL to the acceptance rate (losses/slot_losses.py)."""
    lk_decay: float = at_least(0, 3.0)
    """How fast `lk` leaves KL as acceptance rises (eta; arXiv 2602.23881)."""
    ttt_steps: int = at_least(1, 7)
    """EAGLE-3's training-time-test steps, and the depth of the chain that an evaluation of any head decodes with."""
    ttt_decay: float = at_least(0, 0.8)
    """Weight of each training-time-test step, or Medusa head, over the one before."""
    decode_prompts: int = at_least(0, 0)
    """Held-out prompts that an evaluation decodes to measure tau; 0 measures none."""
    decode_plan: str = ""
    """The tree plan to decode them with (`tree:4x4x16`, ...); empty: a chain of `ttt_steps`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_from and self.architecture:
            raise ValueError("architecture: the head of init_from has its own; give one of the two")
        if self.splits and self.decode_prompts:
            raise ValueError(f"decode_prompts: a target that {self.splits[0]} splits cannot decode; set it to 0")


@dataclass(frozen=True)
class EagleStage(HeadStage):
    """EAGLE heads of either kind."""

    aux_layers: tuple[int, ...] = ()
    """EAGLE-3's feature layers: i is the output of layer i (0: the embeddings); empty means 2, n//2, n-3."""
    train_embedding: bool = False
    """Whether the head trains an embedding of its own, which starts as a copy of the target's. Otherwise a new head
    reads the target's, and a continued one keeps its own, if it has one, as it is. Engines that put the target's in
    its place, as the reference EAGLE code does, draft with another head then."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_embedding and self.objective not in ("eagle1", "eagle3"):
            raise ValueError(f"train_embedding: is for an EAGLE head, not {self.objective}")


@dataclass(frozen=True)
class Eagle1Stage(EagleStage):
    """`eagle1`: an EAGLE-1/2 head."""

    feature_steps: int = at_least(1, 1)
    """Training-time-test steps; with more than 1 the head learns to go on from features of its own (as HASS)."""
    feature_noise: float = at_least(0, 0.1)
    """Uniform noise on the input features, half width (EAGLE paper, 3.2)."""
    token_loss_weight: float = at_least(0, 0.1)
    """Weight of cross-entropy beside the feature regression (EAGLE paper, 3.2)."""


@dataclass(frozen=True)
class Eagle3Stage(EagleStage):
    """`eagle3`: an EAGLE-3 head."""

    draft_vocab_size: int | None = at_least(1, None)
    """The output vocabulary, the data's most frequent tokens; None keeps the whole target vocabulary, with
    `init_from` the head's own; a number there counts the data anew."""


@dataclass(frozen=True)
class MedusaStage(HeadStage):
    """`medusa`: a set of Medusa heads."""

    medusa_heads: int = at_least(1, 4)
    """How many; the furthest predicts so many tokens beyond the next."""


@dataclass(frozen=True)
class TrainConfig(MedusaStage, Eagle3Stage, Eagle1Stage, SelfGeneratedStage, LanguageModelStage):
    """A stage as its recipe says it: one flat namespace, so a key may be given that the objective does not read.

    What reads a stage names the class above that has what it needs.
    """


def _names(data: Any) -> tuple[str, ...]:
    if not isinstance(data, list | tuple) or not data or not all(isinstance(name, str) for name in data):
        raise ValueError(f"data: expected a name or a list of names, got {data!r}")
    return tuple(data)


def from_mapping(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """Build a configuration dataclass from a mapping.

    Raises:
        ValueError: a key is unknown (the nearest known key is named) or a required one is missing.
    """
    fields = {f.name: f for f in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    check_keys(values, fields)
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ValueError(f"{name}: missing")
    hints = get_type_hints(config_class)
    return config_class(**{name: _checked(name, hints[name], value) for name, value in values.items()})


def check_keys(values: Iterable[str], known: Iterable[str], within: str = "") -> None:
    """Raise a ValueError for the first key that is not known, naming the nearest that is; `within` goes before it."""
    known = list(known)
    for key in values:
        if key not in known:
            raise ValueError(f"{within}{key}: unknown key; {suggestion(key, known)}")


def suggestion(name: str, known: Iterable[str]) -> str:
    """What to say of a name that is not known: the nearest that is, or all."""
    known = list(known)
    nearest = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(known)}"


def _checked(name: str, hint: Any, value: Any) -> Any:
    """The value if its type is the field's; numbers that YAML reads as text (1e-3) are converted.

    A single value stands for a list of it.
    """
    kind, inner = get_origin(hint), get_args(hint)
    if NoneType in inner:
        return None if value is None else _checked(name, inner[0], value)
    if kind is tuple:
        if value is None:
            raise ValueError(f"{name}: expected a list of {inner[0].__name__}, got None; an empty one is []")
        return tuple(_checked(name, inner[0], item) for item in (value if isinstance(value, list | tuple) else [value]))
    if kind is Mapping:
        if not isinstance(value, Mapping):
            raise ValueError(f"{name}: expected a mapping of keys to values, got {value!r}")
        return value
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif hint not in (int, bool, str, float) or type(value) is hint:
        return value
    raise ValueError(f"{name}: expected {hint.__name__}, got {value!r}")


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> list[TrainConfig]:
    """Read a recipe: either the keys of one stage, or `stages`, a list of them, run in order.

    `overrides` are `key=value` with a YAML value, for every stage; `architecture.hidden_size=64` reaches inside.

    Raises:
        ValueError: no such file, no YAML, or a wrong key or value (named).
    """
    import yaml  # not by every command

    if not Path(path).is_file():
        raise ValueError(f"recipe: no such file: {path}")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"recipe: {path} is no YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of keys to values, or `stages`, a list of mappings")
    if "stages" in values and len(values) > 1:
        raise ValueError(
            f"{next(key for key in values if key != 'stages')}: unknown key beside `stages`; put it in a stage"
        )
    if "stages" not in values:
        check_keys(values, [*(field.name for field in dataclasses.fields(TrainConfig)), "stages"])
    stages = values.get("stages", [values])
    if stages == []:
        raise ValueError(f"stages: empty; {path} has nothing to train")
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise ValueError(f"{path}: expected `stages` to be a list of mappings of keys to values")
    return [from_mapping(TrainConfig, _overridden(stage, overrides)) for stage in stages]


def _overridden(stage: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    import yaml

    values = dict(stage)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"set: expected KEY=VALUE, got {override!r}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(f"set: {text!r}, given for {key}, is no YAML value") from None
        field_name, dot, inner = key.partition(".")
        if dot and field_name != "architecture":
            raise ValueError(f"{key}: unknown key; only architecture has keys inside")
        values[field_name] = {**(values.get(field_name) or {}), inner: value} if dot else value
    return values
