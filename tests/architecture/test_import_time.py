"""What needs no model waits for no torch: importing the package, help texts, and mistakes on the command line."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import draftwing
from draftwing.cli import COMMANDS

PROGRAM = """
import json, sys
from draftwing.__main__ import run
try:
    status = run()
except SystemExit as end:
    status = end.code
print(json.dumps([status, sorted({"torch", "transformers", "numpy"} & sys.modules.keys())]))
"""


def status_and_imports(*arguments: str) -> tuple[int, set[str]]:
    """How a command line ends, and what heavy modules it has imported by then."""
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    status, imported = json.loads(ended.stdout.splitlines()[-1])
    return status, set(imported)


@pytest.mark.parametrize("command", [(), *((command,) for command in COMMANDS)], ids=str)
def test_help_imports_nothing_heavy(command: tuple[str, ...]) -> None:
    assert status_and_imports(*command, "--help") == (0, set())


def test_the_version_imports_nothing_heavy() -> None:
    assert status_and_imports("--version") == (0, set())


@pytest.mark.parametrize(
    "command",
    [
        "nonsense",
        "generate --target tiny --prompt x --plan chian:3",
        "generate --target tiny --prompt x --method eagle4",
        "generate --target tiny --prompt x --dtype int3",
        "generate --target tiny --prompt x --top-p 2",
        "generate --target tiny --prompt x --seed -1",
        "generate --target tiny --prompt x --ngram",
        "generate --target tiny",
        "eval --methods eagle3:chian:5",
        "eval --methods ngram+uncoupled",
        "eval --data nowhere.jsonl",
        "eval --against somebody",
        "plan --target tiny",
        "doctor --target tiny",
        "prepare --data stdlib --target tiny --output o --regenerate --shard 3/2",
        "prepare --data stdlib --target tiny --output o --regenerate --features",
        "train no/recipe.yaml",
        "train recipes/tiny.yaml --set learning_rat=1",
    ],
)
def test_mistakes_import_nothing_heavy(command: str) -> None:
    assert status_and_imports(*command.split()) == (2, set())


def test_a_name_of_the_public_api_is_imported_when_it_is_asked_for() -> None:
    program = "import sys, draftwing; print(draftwing.TreePlan(2, 2, 4), 'torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stdout == "tree:2x2x4 False\n", ended.stderr


def test_the_public_names_are_listed_for_tools_and_for_the_interpreter_alike() -> None:
    tree = ast.parse(Path(draftwing.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    for_tools = {
        alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert for_tools == {name: f"draftwing.{home}" for home, names in draftwing._HOMES.items() for name in names}
    assert sorted(for_tools) == draftwing.__all__
    assert set(draftwing.__all__) <= set(dir(draftwing))
    with pytest.raises(AttributeError, match="module 'draftwing' has no attribute 'laod'"):
        draftwing.laod  # noqa: B018


INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in a shell's background ignores it
name = sys.argv.pop(1)
class Interrupter:
    def find_spec(self, module, *_):
        if module == name:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupter())
from draftwing.__main__ import run
sys.exit(run())
"""


@pytest.mark.parametrize("module", ["draftwing.cli", "draftwing.cli.train", "torch", "transformers"])
def test_ctrl_c_during_imports_is_one_line(module: str) -> None:
    command = ("generate", "--target", "tiny", "--prompt", "x")
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED, module, *command], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr, ended.stdout) == (130, "stopped\n", "")
