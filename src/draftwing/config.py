"""Configuration: frozen dataclasses filled from YAML; an unknown key is an error that names the nearest one."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import yaml

Config = TypeVar("Config")
Objective = Literal["language_model", "self_generated", "eagle1", "eagle3", "medusa"]
OBJECTIVES = get_args(Objective)
Loss = Literal["kl", "cross_entropy", "lk"]
LOSSES = get_args(Loss)


@dataclass(frozen=True)
class TrainConfig:
    """One stage of a recipe: what is made, from which data, for how long. Lengths are in tokens.

    `language_model` trains a target or, from another's `tokenizer` and `target`, a small draft model for it;
    `self_generated` writes rows that a target says itself (to the file `output`); `eagle1` and `eagle3` train a head
    for a target, `medusa` a set of heads.
    """

    objective: Objective
    output: str
    target: str = ""
    """The frozen target: a folder, a hub id or `tiny`. A `language_model` learns its distributions, if it is named."""
    data: str | tuple[str, ...] = "stdlib"
    """`stdlib` (the Python standard library, `data/corpus.py`), a JSONL file, `hub:org/name[/config][:split]`, several
    of these, or a folder made by `draftwing prepare`."""
    features: str = ""
    """A folder made by `draftwing prepare --features` from the prepared folder `data`; spares the target's passes."""
    packing: bool = False
    """Several documents in one row of `sequence_length` tokens."""
    max_rows: int | None = None
    architecture: Mapping[str, Any] = field(default_factory=dict)
    """Overrides of the trained network's configuration (Hugging Face names: `hidden_size`, ...)."""
    vocab_size: int = 4096
    """Entries of the tokenizer that `language_model` trains."""
    tokenizer: str = ""
    """An existing tokenizer for `language_model`, of a folder, a hub id or `tiny`; empty trains one on the data."""
    init_from: str = ""
    """A trained head to continue from; its shape and draft vocabulary are kept. Empty starts a new one."""
    draft_vocab_size: int | None = None
    """EAGLE-3's output vocabulary, the data's most frequent tokens; None keeps the whole target vocabulary."""
    aux_layers: tuple[int, ...] = ()
    """EAGLE-3's feature layers as hidden_states indices (0 = embeddings); empty means 2, n//2, n-3."""
    sequence_length: int = 512
    batch_size: int = 8
    max_steps: int = 1000
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 0.0
    max_grad_norm: float = 0.5
    bf16: bool = True
    compile: bool = False
    seed: int = 0
    log_every: int = 20
    evaluate_every: int = 500
    evaluate_rows: int = 64
    """Held-out rows (blocks, for a language model) that an evaluation uses."""
    save_every: int = 500
    prompt_length: int = 64
    """Tokens of a plain text that `self_generated` gives as a prompt."""
    max_new_tokens: int | None = None
    """Tokens of an answer of `self_generated`; None: what `sequence_length` leaves."""
    temperatures: tuple[float, ...] = (0.0, 1.0)
    """Sampling temperatures of `self_generated`, in turn."""
    ttt_steps: int = 7
    ttt_decay: float = 0.8
    """Weight of each EAGLE-3 step, or Medusa head, over the one before."""
    medusa_heads: int = 4
    """Heads of `medusa`; the furthest predicts so many tokens beyond the next."""
    loss: Loss = "kl"
    """A head's token loss: `kl` to the target's distribution, `cross_entropy` to the target's likeliest token, or `lk`,
    which goes over from KL to the acceptance rate (training/losses.py)."""
    lk_decay: float = 3.0
    """How fast `lk` leaves KL as acceptance rises (eta; arXiv 2602.23881)."""
    feature_steps: int = 1
    """EAGLE-1's training-time-test steps; with more than 1 it learns to go on from features of its own (as HASS)."""
    feature_noise: float = 0.1
    """EAGLE-1's uniform noise on the input features, half width (EAGLE paper, 3.2)."""
    token_loss_weight: float = 0.1
    """EAGLE-1's weight of cross-entropy beside the feature regression (EAGLE paper, 3.2)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "aux_layers", tuple(self.aux_layers))
        if not isinstance(self.data, str):
            object.__setattr__(self, "data", _names(self.data))
        object.__setattr__(self, "temperatures", tuple(self.temperatures))
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, got {self.loss!r}")
        if self.lk_decay < 0:
            raise ValueError(f"lk_decay: expected at least 0, got {self.lk_decay}")
        if self.objective != "language_model" and not self.target:
            raise ValueError(f"target: {self.objective} needs the model that the head drafts for")
        if self.objective == "medusa" and (self.packing or self.features):
            raise ValueError("packing, features: medusa reads one document a row and runs the target itself")
        if self.objective == "language_model" and self.target and not self.tokenizer:
            raise ValueError("tokenizer: a language_model that learns from a target needs the target's tokenizer")
        for name in (
            "sequence_length",
            "batch_size",
            "max_steps",
            "ttt_steps",
            "feature_steps",
            "medusa_heads",
            "log_every",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return dataclasses.asdict(self)


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


def check_keys(values: Iterable[str], known: Iterable[str]) -> None:
    """Raise a ValueError for the first key that is not known, naming the nearest that is."""
    known = list(known)
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known: {', '.join(known)}"
            raise ValueError(f"{key}: unknown key{hint}")


def _checked(name: str, hint: Any, value: Any) -> Any:
    """The value if its type is the field's; numbers that YAML reads as text (1e-3) are converted."""
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif hint not in (int, bool, str, float) or type(value) is hint:
        return value
    raise ValueError(f"{name}: expected {hint.__name__}, got {value!r}")


def read_recipe(path: str | Path) -> list[TrainConfig]:
    """Read a recipe: either the keys of one stage, or `stages`, a list of them, run in order.

    Raises:
        ValueError: no such file, no YAML, or a wrong key or value (named).
    """
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
    stages = values.get("stages", [values])
    return [from_mapping(TrainConfig, stage) for stage in stages]
