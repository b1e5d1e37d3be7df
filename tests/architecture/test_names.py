"""One name for one thing: no two classes and no two modules of src share one."""

import ast
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import draftwing

SOURCE = Path(draftwing.__file__).parent
FAMILY_PARTS = {"kind.py", "network.py", "drafter.py", "objective.py", "files.py"}
"""The parts of a family of drafts: drafts/FAMILY/ may have each of them."""


def modules() -> list[Path]:
    return [path for path in sorted(SOURCE.rglob("*.py")) if path.name != "__init__.py"]


def is_family_part(path: Path) -> bool:
    return path.parent.parent == SOURCE / "drafts" and path.name in FAMILY_PARTS


def shared(named: Iterable[tuple[str, Path]]) -> dict[str, list[str]]:
    """The names that several files give, with the files."""
    places: dict[str, list[str]] = defaultdict(list)
    for name, path in named:
        places[name].append(str(path.relative_to(SOURCE)))
    return {name: found for name, found in places.items() if len(found) > 1}


def classes_of(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node.name for node in tree.body if isinstance(node, ast.ClassDef)]


def test_no_two_classes_have_one_name() -> None:
    assert shared((name, path) for path in modules() for name in classes_of(path)) == {}


def test_no_two_modules_have_one_name_but_the_parts_of_families() -> None:
    assert shared((path.name, path) for path in modules() if not is_family_part(path)) == {}


def test_what_is_shared_is_found() -> None:
    twice = [("Report", SOURCE / "a.py"), ("Report", SOURCE / "b.py"), ("Verdict", SOURCE / "a.py")]
    assert shared(twice) == {"Report": ["a.py", "b.py"]}
