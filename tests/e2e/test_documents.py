"""The programs of the README, of docs/add_a_draft.md and of the examples run; the commands they show exist."""

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from forked import Forked

from draftwing.cli import COMMANDS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def run_program(source: str) -> str:
    """What a program prints, run here, where everything is imported already."""
    with redirect_stdout(StringIO()) as out:
        exec(compile(source, "a program", "exec"), {"__name__": "__main__"})
    return out.getvalue()


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_run_and_are_short(example: Path) -> None:
    source = example.read_text(encoding="utf-8")
    assert source.count("\n") <= 40
    output = run_program(source)
    assert output
    assert "the same tokens: False" not in output


def test_the_readme_program_runs() -> None:
    """As its reader runs it: by itself. The examples above have measured costs, if roughly, as they are kept."""
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    process = Forked(program)
    assert process.wait(120) == 0, process.errors
    assert "of which drafted" in process.out


def test_a_family_in_one_file_decodes_the_same_tokens() -> None:
    """A new family needs nothing from the package but its entry; its drafter is good enough for some tokens.

    In a process of its own: the entry would stay in the table for the tests that follow.
    """
    page = (ROOT / "docs" / "add_a_draft.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    process = Forked(program)
    assert process.wait(120) == 0, process.errors
    assert "the same tokens: True" in process.out
    (num_accepted,) = re.findall(r"accepted: (\d+)", process.out)
    assert int(num_accepted) > 0


def test_the_commands_of_the_readme_exist() -> None:
    assert set(re.findall(r"`draftwing (\w+)", README)) == set(COMMANDS)


def test_the_files_of_the_readme_exist() -> None:
    (tree,) = re.findall(r"```text\nsrc/draftwing/\n(.*?)\nrecipes/", README, re.DOTALL)
    sources = {path.name for path in (ROOT / "src" / "draftwing").rglob("*.py")}
    assert set(re.findall(r"\w+\.py", tree)) <= sources
