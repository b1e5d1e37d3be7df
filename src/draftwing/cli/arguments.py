"""Options that several commands share."""

import argparse
import json
import math
from contextlib import suppress
from typing import Any

from draftwing.config import QUANTIZATIONS
from draftwing.threads import choose_threads


def positive(text: str) -> int:
    """An option's whole number from 1 on."""
    with suppress(ValueError):
        if (value := int(text)) >= 1:
            return value
    raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text}")


def temperature(text: str) -> float:
    """An option's temperature."""
    with suppress(ValueError):
        if 0 <= (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"expected a number from 0 on, got {text}")


def temperatures(text: str) -> tuple[float, ...]:
    """An option's temperatures, separated by commas."""
    values = tuple(map(temperature, text.split(",")))
    if len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"expected each once, got {text}")
    return values


class _UseThreads(argparse.Action):
    """Sets the number of torch's threads as it is read, for that must be known when torch is loaded."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        choose_threads(values)
        setattr(namespace, self.dest, values)


def add_threads(parser: argparse.ArgumentParser) -> None:
    """On how many of the CPU's cores."""
    parser.add_argument(
        "--threads",
        type=positive,
        action=_UseThreads,
        help="torch's threads on the CPU (default: $OMP_NUM_THREADS, or the cores that other processes leave free)",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where the models run, in which dtype and on how many threads."""
    add_threads(parser)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    parser.add_argument(
        "--dtype", help="float32, bfloat16, float16 or float64 (default: the file's; float32 on a CPU without bf16)"
    )


def add_execution(parser: argparse.ArgumentParser) -> None:
    """How the target's weights are kept and cycles are run."""
    parser.add_argument(
        "--quantize",
        choices=QUANTIZATIONS,
        help="keep the target's linear layers in fewer bits, by torchao (int4: CUDA only); files that are quantised "
        "already need no option",
    )
    parser.add_argument(
        "--no-capture",
        dest="capture",
        action="store_false",
        help="on a CUDA device, run cycles operation by operation instead of replaying recorded ones",
    )


def execution(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_execution`, for `load`."""
    return {"quantize": options.quantize, "capture": options.capture}


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
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers separated by commas, got {text}") from None


def json_object(text: str) -> dict[str, Any]:
    """An option's JSON object."""
    with suppress(ValueError):
        if isinstance(value := json.loads(text), dict):
            return value
    raise argparse.ArgumentTypeError(f"expected a JSON object, got {text}")
