"""The README's program and the examples run; the commands they show exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from draftwing.cli import COMMANDS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def run_program(source: str) -> str:
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_readme_program_runs() -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert "of which drafted" in run_program(program)


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_run_and_are_short(example: Path) -> None:
    source = example.read_text(encoding="utf-8")
    assert source.count("\n") <= 40
    output = run_program(source)
    assert output
    assert "the same tokens: False" not in output


def test_the_commands_of_the_readme_exist() -> None:
    assert set(re.findall(r"`draftwing (\w+)", README)) == set(COMMANDS)


def test_the_files_of_the_readme_exist() -> None:
    (tree,) = re.findall(r"```text\nsrc/draftwing/\n(.*?)\nrecipes/", README, re.DOTALL)
    sources = {path.name for path in (ROOT / "src" / "draftwing").rglob("*.py")}
    assert set(re.findall(r"\w+\.py", tree)) <= sources
