"""Where an engine that can check an exported folder is: at a given path, in a variable, a known place, this Python."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from draftwing.config import suggestion
from draftwing.drafts.family import ENGINES

CHECKERS = {
    "vllm": ("vllm", "transformers"),
    "sglang": ("transformers",),
    "speculators": ("vllm", "speculators"),
    "eagle": ("transformers",),
    "llama.cpp": ("llama-server",),
}
"""Who can check a folder that was written for an engine, the most telling first."""
SERVERS = {"llama-server": "llama.cpp/bin/llama-server"}
"""Checkers that are programs of their own, and where they lie below PLACES; the others are packages of a Python."""
PLACES = Path("build/engines")
"""Where `make engines` installs them, below the working directory."""
PROBE = """
from importlib.util import find_spec
import sys
print(*[name for name in sys.argv[1:] if (found := find_spec(name)) and found.origin])
"""
"""Which packages a Python has; a folder of that name in the working directory has no origin."""


class Checker(NamedTuple):
    """An engine or a loader by name, and its program: a Python that has it, or a server."""

    name: str
    at: Path


def find_checker(to: str, given: str = "") -> Checker:
    """Who checks a folder that was exported `to` an engine.

    Args:
        given: a program: a Python that has one of the engine's checkers, or its server; empty: it is looked for.

    Raises:
        ValueError: there is no such engine, no checker of it was found, or the given program is none.
    """
    if to not in CHECKERS:
        raise ValueError(f"check: no such engine: {to!r}; {suggestion(to, ENGINES)}")
    names = CHECKERS[to]
    if given:
        return _given(to, given)
    wanted = [name for name in names if name != "transformers"] or names  # which is here, and proves least
    for name in wanted:
        if (at := find_program(name)) is not None:
            return Checker(name, at)
    variables = " or ".join(map(variable, wanted))
    raise ValueError(
        f"check: {' and '.join(wanted)}: not installed where it was looked for; give the path of "
        f"{'the server' if wanted[0] in SERVERS else 'a Python that has it'} (--check PATH, or {variables}), or "
        "see `make engines`"
    )


def variable(name: str) -> str:
    """The environment's variable with an engine's program: DRAFTWING_VLLM_PYTHON, DRAFTWING_LLAMA_SERVER."""
    return f"DRAFTWING_{name.upper().replace('-', '_')}{'' if name in SERVERS else '_PYTHON'}"


def _given(to: str, given: str) -> Checker:
    path = shutil.which(given)
    if path is None:
        raise ValueError(f"check: no such program: {given}")
    names = CHECKERS[to]
    if names[0] in SERVERS:
        return Checker(names[0], Path(path))
    try:
        probe = [path, "-c", PROBE, *names]
        said = subprocess.run(probe, capture_output=True, text=True, timeout=60, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        raise ValueError(f"check: {given} is not a Python that runs") from None
    has = [name for name in names if name in said]
    if not has:
        raise ValueError(f"check: {given} has no {' and no '.join(names)}")
    return Checker(has[0], Path(path))


def find_program(name: str) -> Path | None:
    """A checker's program: what its variable names, else what lies below PLACES, else what is in this environment.

    Raises:
        ValueError: the variable names no program.
    """
    if path := os.environ.get(variable(name)):
        if shutil.which(path) is None:
            raise ValueError(f"check: {variable(name)}: no such program: {path}")
        return Path(path)
    place = PLACES / SERVERS.get(name, f"{name}/bin/python")
    if place.is_file():
        return place.absolute()
    if name in SERVERS:
        return Path(found) if (found := shutil.which(name)) else None
    package = find_spec(name)
    return Path(sys.executable) if package and package.origin else None
