"""The known reasons why a draft is accepted less than it could be, each as options that would put it right."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from draftwing.drafts.eagle.fields import rope_scaling_of
from draftwing.drafts.eagle.formats import HeadOptions, default_or_none
from draftwing.drafts.fit import Tensors
from draftwing.layers import DraftConfig
from draftwing.target.hidden_states import NORMED
from draftwing.target.model import TargetModel

COMMON_THETAS = (10000.0, 500000.0, 1000000.0)
WINDOWS = (128, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Suspect:
    """A fault, and the options of `load` or `generate` (under their names there) that would put it right."""

    fault: str
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The options as a user writes them in Python."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

    def joined(self, other: "Suspect") -> "Suspect":
        """Both faults at once."""
        fault = " and ".join(filter(None, (self.fault, other.fault)))
        return Suspect(fault, {**self.options, **other.options})


NOTHING = Suspect("", {})


def head_suspects(
    config: DraftConfig, options: HeadOptions, tensors: Tensors, target: TargetModel, longest: int
) -> list[Suspect]:
    """What to try on a head that was loaded with `options` from `tensors` as `config`; `longest` row in tokens."""
    suspects = [*_rope(config, target), *_windows(config, longest)]
    if config.aux_layers:
        suspects += [*_feature_layers(config.aux_layers, target.num_layers), *_norms(config)]
    if "d2t" in tensors:
        other = "offsets" if options.d2t == "absolute" else "absolute"
        suspects.append(Suspect(f"d2t holds {other} and is read as {options.d2t or 'offsets'}", {"d2t": other}))
    return suspects + precision_suspects(target)


def precision_suspects(target: TargetModel) -> list[Suspect]:
    """What to try on any draft that runs in float16."""
    if target.dtype != torch.float16:
        return []
    return [Suspect("the draft's numbers overflow in float16", {"dtype": "float32"})]


def _feature_layers(loaded: tuple[int, ...], num_layers: int) -> Iterator[Suspect]:
    tried, usual = {loaded}, default_or_none(num_layers) or ()
    for fault, layers in (
        ("the feature layers are one too low", _moved(loaded, 1)),
        ("the feature layers are one too high", _moved(loaded, -1)),
        ("the feature layers are in reverse order", loaded[::-1]),
        ("the last layer's state is meant behind the final norm", _swapped(loaded, num_layers, NORMED)),
        ("the last layer's state is meant before the final norm", _swapped(loaded, NORMED, num_layers)),
        ("the feature layers are not the usual ones", usual if len(usual) == len(loaded) else ()),
    ):
        if layers and layers not in tried and min(layers) >= NORMED and max(layers) <= num_layers:
            tried.add(layers)
            yield Suspect(fault, {"aux_layers": layers})


def _moved(layers: tuple[int, ...], by: int) -> tuple[int, ...]:
    """Layers by other numbers; nothing where one has none, as the state behind the final norm."""
    return () if min(layers) < max(0, -by) else tuple(layer + by for layer in layers)


def _swapped(layers: tuple[int, ...], old: int, new: int) -> tuple[int, ...]:
    return tuple(new if layer == old else layer for layer in layers)


def _rope(config: DraftConfig, target: TargetModel) -> Iterator[Suspect]:
    loaded = config.rope_parameters
    theta, scaling = _theta(loaded), rope_scaling_of(loaded)
    of_target = getattr(target.config, "rope_parameters", None) or {}
    of_target = {} if any(isinstance(value, dict) for value in of_target.values()) else of_target  # one per layer type
    target_theta, target_scaling = _theta(of_target), rope_scaling_of(of_target)
    for other in sorted({target_theta, *COMMON_THETAS} - {theta}):
        yield Suspect(f"rope_theta is not {theta:g}", {"rope_theta": other})
    if scaling:
        yield Suspect("the head was trained without rope_scaling", {"rope_scaling": {}})
    if target_scaling and target_scaling != scaling:
        fault = "the target's rope_scaling is missing" if not scaling else "rope_scaling is not the target's"
        yield Suspect(fault, {"rope_scaling": target_scaling})
        if target_theta != theta:
            both = {"rope_theta": target_theta, "rope_scaling": target_scaling}
            yield Suspect("the target's rope settings are missing", both)


def _theta(parameters: Mapping[str, Any]) -> float:
    return float(parameters.get("rope_theta", 10000.0))


def _norms(config: DraftConfig) -> Iterator[Suspect]:
    for name in ("norm_before_residual", "norm_output"):
        loaded = getattr(config, name)
        yield Suspect(f"{name} is {str(not loaded).lower()}, not {str(loaded).lower()}", {name: not loaded})
    for name in ("fc_norm", "norm_before_fc"):  # without the tensors there is nothing to turn on
        if getattr(config, name):
            yield Suspect(f"the file has {name}'s tensors, but the head was trained without", {name: False})


def _windows(config: DraftConfig, longest: int) -> Iterator[Suspect]:
    fault = "the head is worse past the lengths that it was trained on"
    if config.trained_length is not None:
        fault = "the head was trained on shorter texts than its config.json says"
    for window in sorted({*WINDOWS, config.max_position_embeddings}):
        if window < 0.75 * min(longest, config.window):  # a longer one hides too little to tell
            yield Suspect(fault, {"draft_window": window})
    if config.window < 0.75 * longest:
        yield Suspect("the head bears more than it was trained on", {"draft_window": 1 << longest.bit_length()})
