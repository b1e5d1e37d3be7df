"""Text files that a cut leaves as they were or has written whole."""

from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file so that a cut leaves the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
