"""Options that several commands share."""

import argparse
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from draftwing.config import DRAFT_DTYPES, DTYPES, QUANTIZATIONS
from draftwing.drafts.kinds import methods
from draftwing.embedded import EMBEDDED_DRAFTS, EMBEDDED_TARGETS
from draftwing.engine.tree_plan import STATIC_TREES, TreePlan
from draftwing.threads import choose_threads

if TYPE_CHECKING:
    from draftwing.drafts.eagle.formats import HeadOptions

Value = TypeVar("Value")
TARGETS = f"{', '.join(EMBEDDED_TARGETS)}, a folder, a .gguf file or a hub id"
_DRAFTS_HERE = sorted(name for name, folder in EMBEDDED_DRAFTS.items() if folder.is_dir())
DRAFTS = f"{', '.join(_DRAFTS_HERE)}, a folder, a .gguf file or a hub id"


def read_by(read: Callable[[str], Value]) -> Callable[[str], Value]:
    """An option that a function reads whose ValueError begins with the field's name, as argparse's message does too."""

    def convert(text: str) -> Value:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error).partition(": ")[2]) from None

    return convert


def plan_name(text: str) -> str:
    """An option's plan, as `generate` takes it."""
    if text != "auto":
        read_by(TreePlan.parse)(text)
    return text


def plain_text(text: str) -> str:
    """An option's text; the shell may pass bytes that are no UTF-8, which Python turns into lone surrogates."""
    with suppress(UnicodeEncodeError):
        text.encode()
        return text
    raise argparse.ArgumentTypeError(f"expected UTF-8, got {text!r}")


def number(kind: Callable[[str], Value], is_fit: Callable[[Value], bool], expected: str) -> Callable[[str], Value]:
    """An option's number of a kind (int, float), if it is fit."""

    def convert(text: str) -> Value:
        with suppress(ValueError):
            if is_fit(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")

    return convert


positive = number(int, lambda value: value >= 1, "a whole number from 1 on")
not_negative = number(int, lambda value: value >= 0, "a whole number from 0 on")
seed = number(int, lambda value: 0 <= value < 2**63, "a whole number from 0 to 2^63-1")
temperature = number(float, lambda value: 0 <= value < math.inf, "a number from 0 on")
above_zero = number(float, lambda value: 0 < value < math.inf, "a number above 0")
finite = number(float, math.isfinite, "a finite number")
share = number(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
positive_share = number(float, lambda value: 0 < value <= 1, "a number above 0 and at most 1")


def temperatures_in_turn(text: str) -> tuple[float, ...]:
    """An option's temperatures, separated by commas; one that is there twice has two turns."""
    return tuple(map(temperature, text.split(",")))


def temperatures(text: str) -> tuple[float, ...]:
    """An option's temperatures, separated by commas."""
    values = temperatures_in_turn(text)
    if len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"expected each once, got {text}")
    return values


def without_use(
    options: argparse.Namespace, used_with: Mapping[str, Collection[str]], asked: Collection[str]
) -> Iterator[tuple[str, Collection[str]]]:
    """Options that are given and say something of no part that is `asked` for, each with the parts that it is for."""
    for name, parts in used_with.items():
        if getattr(options, name) and not any(part in asked for part in parts):
            yield name, parts


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
    parser.add_argument("--dtype", choices=DTYPES, help="default: the file's; float32 on a CPU without bf16")


def add_method(parser: argparse.ArgumentParser, choices: Sequence[str] | None = None) -> None:
    """Which of the methods drafts."""
    parser.add_argument("--method", choices=choices or methods(), help="default: what the draft is made for")


def add_plan(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Which trees are drafted."""
    said = default or "the method's"
    parser.add_argument(
        "--plan",
        type=plan_name,
        default=default,
        help=f"auto, off, chain:DEPTH, tree:WIDTHxDEPTHxNODES, {' or '.join(STATIC_TREES)} (their papers' trees), "
        f"lookahead:WxNxG (default: {said})",
    )


def add_remeasure(parser: argparse.ArgumentParser) -> None:
    """Whether costs that were measured before are believed."""
    parser.add_argument(
        "--remeasure",
        action="store_true",
        help="measure anew what a cycle costs on this machine, by which trees size themselves, because it was busy or "
        "has changed; else a measurement is kept for 30 days in $DRAFTWING_CACHE (default: ~/.cache/draftwing)",
    )


def add_execution(parser: argparse.ArgumentParser) -> None:
    """Which files of the target are loaded, how weights are kept and how cycles are run."""
    parser.add_argument("--revision", help="of a target on the hub: a branch, a tag or a commit")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that comes with a target's or tokenizer's files"
    )
    parser.add_argument(
        "--quantize",
        choices=QUANTIZATIONS,
        help="keep the target's linear layers in fewer bits: int8 by draftwing in float32 on a CPU with a C compiler, "
        "else by torchao (int4: CUDA only); files that are quantised already need no option",
    )
    parser.add_argument(
        "--draft-dtype",
        choices=DRAFT_DTYPES,
        help="keep the linear layers of a draft head in 8 bits, or in the target's dtype (default: 8 bits in float32 "
        "on a CPU with a C compiler, else the target's dtype); the output stays the same, fewer drafts may be accepted",
    )
    parser.add_argument(
        "--no-capture",
        dest="capture",
        action="store_false",
        help="on a CUDA device, run cycles operation by operation instead of replaying recorded ones",
    )


def execution(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_execution`, for `load`."""
    files = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    given = {name: value for name, value in files.items() if value}
    return {"quantize": options.quantize, "draft_dtype": options.draft_dtype, "capture": options.capture, **given}


def add_loading(parser: argparse.ArgumentParser, methods: Sequence[str] | None = None) -> None:
    """How a target and its draft are loaded, and by which of the `methods` (default: all) they decode."""
    add_device(parser)
    add_execution(parser)
    add_method(parser, methods)
    add_remeasure(parser)
    add_head_options(parser)


def loading(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_loading`, for `load`."""
    names = ("dtype", "device", "method", "remeasure")
    return {name: getattr(options, name) for name in names} | head_options(options).given | execution(options)


def add_head_options(parser: argparse.ArgumentParser) -> None:
    """What overrides an EAGLE head's file: the fields of HeadOptions (drafts/eagle/formats.py)."""
    group = parser.add_argument_group("instead of what an EAGLE head's file says (see `draftwing doctor`)")
    group.add_argument(
        "--aux-layers", type=layers, help="EAGLE-3's feature layers, 2,16,29: i is the output of layer i"
    )
    group.add_argument("--rope-theta", type=above_zero)
    group.add_argument("--rope-scaling", type=json_object, help="a JSON object as in config.json; {} is none")
    for name in ("norm-before-residual", "norm-output"):
        group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction)
    for name in ("fc-norm", "norm-before-fc"):
        option = name.replace("-", "_")
        group.add_argument(f"--no-{name}", dest=option, action="store_false", default=None, help="ignore its tensors")
    group.add_argument("--d2t", choices=("offsets", "absolute"), help="how the file's d2t is read (default: offsets)")


def head_options(options: argparse.Namespace) -> "HeadOptions":
    """The options of `add_head_options`."""
    from draftwing.drafts.eagle.formats import HeadOptions

    return HeadOptions(**{name: getattr(options, name) for name in HeadOptions.__dataclass_fields__})


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
