"""Options that several commands share."""

import argparse
import json
from typing import Any


def positive(text: str) -> int:
    """An option's whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where the models run and in which dtype."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    parser.add_argument(
        "--dtype", help="float32, bfloat16, float16 or float64 (default: the file's; float32 on a CPU without bf16)"
    )


def add_head_options(parser: argparse.ArgumentParser) -> None:
    """What overrides an EAGLE head's file: the fields of HeadOptions (checkpoint/formats.py)."""
    group = parser.add_argument_group("instead of what an EAGLE head's file says (see `draftwing doctor`)")
    group.add_argument("--aux-layers", type=layers, help="EAGLE-3's feature layers, hidden_states indices: 2,16,29")
    group.add_argument("--rope-theta", type=float)
    group.add_argument("--rope-scaling", type=json_object, help="a JSON object as in config.json; {} is none")
    for name in ("norm-before-residual", "norm-output"):
        group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction)
    for name in ("fc-norm", "norm-before-fc"):
        option = name.replace("-", "_")
        group.add_argument(f"--no-{name}", dest=option, action="store_false", default=None, help="ignore its tensors")
    group.add_argument("--d2t", choices=("offsets", "absolute"), help="how the file's d2t is read (default: offsets)")


def head_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_head_options` that were given, for `load`."""
    names = ("aux_layers", "rope_theta", "rope_scaling", "norm_before_residual", "norm_output")
    values = {name: getattr(options, name) for name in (*names, "fc_norm", "norm_before_fc", "d2t")}
    return {name: value for name, value in values.items() if value is not None}


def layers(text: str) -> tuple[int, ...]:
    """An option's layer numbers, separated by commas."""
    return tuple(map(int, text.split(",")))


def json_object(text: str) -> dict[str, Any]:
    """An option's JSON object."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text}")
    return value
