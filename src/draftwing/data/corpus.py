"""The licence-clean corpus that is present everywhere: the running Python's standard library.

Sources and language-reference topics become text rows; every documented function also becomes a chat row whose
user turn is the docstring and whose assistant turn is the source. Whole modules are held out for evaluation.
"""

import ast
import importlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Row = dict[str, Any]
"""One sample: `{"text": str}` or `{"messages": [{"role", "content"}, ...]}`, as in a JSONL data file."""

HELD_OUT_MODULES = frozenset(
    ("bisect", "calendar", "colorsys", "csv", "fnmatch", "getopt", "glob", "graphlib", "heapq", "json", "queue")
    + ("sched", "shlex", "statistics", "textwrap")
)
# Tests teach the model to write tests, character tables teach it nothing.
SKIPPED_FOLDERS = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "_bundled")
)
MAX_FUNCTION_LINES = 60


@dataclass(frozen=True)
class Splits(Generic[Item]):
    """What trains, and what is held out for evaluation: rows, or what stands for them."""

    train: Sequence[Item]
    held_out: Sequence[Item]


def read_stdlib(root: Path | None = None) -> Splits[Row]:
    """Collect the rows of the standard library under `root` (default: the running interpreter's)."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    train: list[Row] = [{"text": text} for text in _language_topics()]
    held_out: list[Row] = []
    for path in _source_files(root):
        source = path.read_text(encoding="utf-8", errors="replace")
        rows = held_out if in_held_out_module(path.relative_to(root)) else train
        rows.append({"text": source})
        rows.extend(chat_rows(source))
    return Splits(train, held_out)


def in_held_out_module(relative: Path) -> bool:
    """Whether a file (path relative to the library's root) belongs to a held-out module or package."""
    return relative.parts[0].removesuffix(".py") in HELD_OUT_MODULES


def chat_rows(source: str) -> Iterator[Row]:
    """Yield one chat row per documented function of a module: request from the docstring, answer from the source."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # templates and files of other Python versions live in the library too
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        answer = _source_without_docstring(source, node)
        if docstring and answer and answer.count("\n") <= MAX_FUNCTION_LINES:
            summary = docstring.split("\n\n")[0]
            yield {
                "messages": [
                    {"role": "user", "content": f"Write the Python function {node.name}.\n{summary}"},
                    {"role": "assistant", "content": answer},
                ]
            }


def _source_without_docstring(source: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The function's lines, dedented, docstring removed; empty if nothing but the docstring is there."""
    if len(node.body) < 2:
        return ""
    lines = source.split("\n")  # as ast counts lines; splitlines() also splits at form feeds
    docstring = node.body[0]
    signature = lines[node.lineno - 1 : docstring.lineno - 1]
    docstring_end = docstring.end_lineno or docstring.lineno
    if node.body[1].lineno == docstring_end:  # a statement on the docstring's last line
        return ""
    kept = [*signature, *lines[docstring_end : node.end_lineno]]
    if any(line[: node.col_offset].strip() for line in kept):  # text inside a string that starts further left
        return ""
    kept = [line[node.col_offset :] for line in kept]
    return "\n".join(line.rstrip() for line in kept).strip("\n")


def _source_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not SKIPPED_FOLDERS.intersection(relative.parts) and not path.name.startswith("_sysconfigdata"):
            yield path


def _language_topics() -> list[str]:
    """The language reference as pydoc ships it (`help("for")` and the like)."""
    return list(importlib.import_module("pydoc_data.topics").topics.values())
