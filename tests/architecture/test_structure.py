"""The shape of the package: its public names, its commands, its recipes, its files."""

import re
import shlex
from pathlib import Path

import pytest

import draftwing
from draftwing.cli import COMMANDS, build_parser, main
from draftwing.config import read_recipe

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "draftwing"


def test_public_names_exist_and_are_documented() -> None:
    assert draftwing.__all__ == sorted(draftwing.__all__)
    for name in draftwing.__all__:
        assert getattr(draftwing, name).__doc__, f"{name} has no docstring"


def test_nothing_inside_the_package_imports_its_front() -> None:
    for path in SOURCE.rglob("*.py"):
        for names in re.findall(r"^from draftwing import (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert names == "native", path


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_load(recipe: Path) -> None:
    assert read_recipe(recipe)


def test_every_command_has_help_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for command, module in COMMANDS.items():
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert module.EXAMPLES.splitlines()[1].strip() in capsys.readouterr().out


def test_examples_in_help_parse() -> None:
    """A help text that shows a command which does not parse would be worse than none."""
    for module in COMMANDS.values():
        for line in module.EXAMPLES.replace("\\\n", "").splitlines()[1:]:
            if line.split()[0] == "curl":  # what asks a server
                continue
            command = line.rpartition(" | ")[2]  # behind what writes into its pipe
            words = shlex.split(command.split(">")[0], comments=True)
            words = words[words.index("draftwing") :] if words[0] == "torchrun" else words
            assert words[0] == "draftwing"
            build_parser().parse_args(words[1:])


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("eval --temperatures 0,nan", "--temperatures: expected a number from 0 on, got nan"),
        ("eval --temperatures 1,1.0", "--temperatures: expected each once, got 1,1.0"),
        (
            "eval --methods draft_model+ngram",
            "methods: draft_model+ngram: ngram: merges into EAGLE trees; the method is draft_model",
        ),
        ("eval --methods eagle3:lookahead:2x3x2", "plans lookahead:WxNxG are for the method lookahead"),
        ("eval --methods lookahead:chain:3", "plans lookahead:WxNxG are for the method lookahead"),
        ("eval --methods lookahead+uncoupled", "methods: lookahead+uncoupled: coupled: says how a draft's candidates"),
        (
            "generate --target tiny --prompt x --plan tree:4",
            "--plan: expected off, chain:DEPTH, tree:WIDTHxDEPTHxNODES",
        ),
        ("generate --target tiny --prompt x --plan chain:2", "plan: plain drafts nothing, so it takes no plan but off"),
        ("generate --target tiny --prompt x --method ngram --plan tree:2x2x3", "so it takes chain:DEPTH"),
        ("generate --target tiny --prompt x --draft-window 9", "draft_window: limits what an EAGLE head reads"),
        ("generate --target tiny --prompt \udcff", "--prompt: expected UTF-8, got '\\udcff'"),
        ("generate --target tiny --prompt x --stop \udcff", "--stop: expected UTF-8, got '\\udcff'"),
        ("generate --target tiny --prompt x --top-p 0", "--top-p: expected a number above 0 and at most 1, got 0"),
        ("generate --target tiny --prompt x --seed -1", "--seed: expected a whole number from 0 to 2^63-1, got -1"),
        (
            "prepare --data x --target tiny --output y --shard 3/2",
            "--shard: expected I/N with I from 1 to N, got '3/2'",
        ),
        ("generate --target tiny --prompt x --max-new-tokens 0", "--max-new-tokens: expected a whole number from 1 on"),
        ("generate --target tiny --prompt x --temperature inf", "--temperature: expected a number from 0 on, got inf"),
        ("doctor --target tiny --draft tiny --aux-layers a,b", "--aux-layers: expected whole numbers"),
        ("doctor --target tiny --draft tiny --rope-scaling [1", "--rope-scaling: expected a JSON object, got [1"),
        ("inspect", "the following arguments are required: draft (see draftwing inspect --help)"),
        ("inspct", "invalid choice: 'inspct'"),
        ("eval --num-prompts 1 --output /dev/null/folder", "Not a directory"),
    ],
)
def test_mistakes_are_one_line_and_status_2(command: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert captured.out == ""


def test_modules_say_what_they_are() -> None:
    for path in SOURCE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not text or text.startswith('"""'), f"{path} has no docstring"


def test_every_file_that_the_table_of_changes_names_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:\w+/)*\w+\.py|\w+/)`", text[text.index("## Where does a change go") :]))
    assert len(named) > 15
    assert [name for name in sorted(named) if not (SOURCE / name).exists()] == []


def test_every_place_of_a_word_exists() -> None:
    text = (ROOT / "docs" / "notation.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:\w+/)*\w+\.py\b", text[text.index("One word for one thing") :]))
    named -= {"tests/architecture/test_names.py"}
    assert len(named) > 20
    assert [name for name in sorted(named) if not (SOURCE / name).exists()] == []


def test_what_the_table_names_in_a_file_is_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \| `([\w/]+\.py)` \| `(\w+)`", text, flags=re.MULTILINE)
    assert len(rows) >= 7
    assert [row for row in rows if row[1] not in (SOURCE / row[0]).read_text(encoding="utf-8")] == []
