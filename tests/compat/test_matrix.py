"""Which formats of drafts are written, read back and checked, and what agreed: what two documents say.

    python tests/compat/test_matrix.py

writes the tables in docs/formats.md and docs/export.md anew.
"""

import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import tiny_llama
from test_export import eagle1, eagle3, write, write_tokenizer_gguf
from test_medusa_files import tensors_of

from draftwing.drafts.export_draft import export_draft
from draftwing.drafts.family import ENGINES
from draftwing.drafts.inspect_draft import inspect_draft
from draftwing.drafts.kinds import family_of_files
from draftwing.drafts.load_draft import open_draft
from draftwing.embedded import EMBEDDED_DRAFTS, drafts_of

DOCS = Path(__file__).parents[2] / "docs"
RECORD = DOCS / "results/exports.json"
BEGIN, END = "<!-- written by tests/compat/test_matrix.py -->\n", "<!-- to here -->\n"
FORMATS = {"eagle1": "EAGLE-1/2", "eagle3": "EAGLE-3", "speculators": "speculators", "medusa": "Medusa"}


def form_of(name: str) -> tuple[str, str]:
    """A draft's family, and the format that its files are in."""
    files = open_draft(name)
    family = family_of_files(files.values, files.tensors).name.removeprefix("an ").removeprefix("a ")
    if files.folder.is_file():
        return family, "GGUF"
    if any(tensor.startswith("lm_heads.") for tensor in files.tensors):
        return family, "Medusa, vLLM's names"
    return family, FORMATS.get(inspect_draft(name).format, "transformers")


def matrix(scratch: Path) -> str:
    """The table: each format that was written, and was read back here, and where folders of it were checked."""
    target, target_gguf = scratch / "target", write_tokenizer_gguf(scratch / "target.gguf")
    tiny_llama(num_hidden_layers=8).save_pretrained(target)
    medusa = write(scratch / "medusa", {"medusa_num_heads": 3, "medusa_num_layers": 1}, tensors_of(3, 32, 64, 1))
    drafts = [eagle1(scratch / "eagle1"), eagle3(scratch / "eagle3"), medusa]
    written: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in drafts_of("tiny"):
        written[form_of(str(EMBEDDED_DRAFTS[name]))].append("`train`")  # what it has written
    for draft in drafts:
        for engine in ENGINES:
            folder = scratch / f"{Path(draft).name}-{engine}"
            try:
                export_draft(draft, str(target), engine, folder, target_gguf=target_gguf, force=True)
            except ValueError as error:
                assert "cannot load it" in str(error)
            else:
                written[form_of(str(folder))].append(f"`--to {engine}`")
    checked = checks_by_form()
    lines = ["| draft | format | written by | checked in |", "|---|---|---|---|"]
    for form in sorted(written):
        lines.append(f"| {' | '.join(form)} | {', '.join(written[form])} | {', '.join(checked[form]) or 'no'} |")
    return "\n".join(lines) + "\n"


def checks_by_form() -> dict[tuple[str, str], list[str]]:
    """The engines, with versions, in which folders of a form agreed."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in recorded():
        family, layout = form_of(str(EMBEDDED_DRAFTS[row["draft"]]))
        layout = {"speculators": "speculators", "llama.cpp": "GGUF"}.get(row["to"], layout)
        layout = "Medusa, vLLM's names" if layout == "Medusa" else layout
        how = "" if "rows" in row else " (loads)"
        assert row["agrees"]
        found[family, layout].append(f"{row['checker']} {row['version'].partition('+')[0]}{how}")
    return found


def recorded() -> list[dict[str, Any]]:
    """What `make engines` has found."""
    rows: list[dict[str, Any]] = json.loads(RECORD.read_text(encoding="utf-8"))["rows"]
    return rows


def agreed(_: Path) -> str:
    """The table of that."""
    lines = ["| draft | folder | checked by | tokens | cycles with as many accepted | faults found when planted |"]
    lines.append("|---|---|---|---|---|---|")
    for row in recorded():
        assert row["agrees"]
        if "rows" in row:
            tokens = f"all {sum(prompt['num_tokens'] for prompt in row['rows'])}"
            equal, compared = (sum(prompt[name] for prompt in row["rows"]) for name in ("num_equal", "num_compared"))
            found = [tokens, f"{equal} of {compared}"]
        else:
            found = ["", f"loads: {row['loaded']['num_fields']} fields, {row['loaded']['num_tensors']} tensors"]
        faults = ", ".join(name.replace("_", " ") for name in row["sabotages_found"])
        by = f"{row['checker']} {row['version'].partition('+')[0]}"
        lines.append(f"| {' | '.join([row['draft'], row['to'], by, *found, faults])} |")
    return "\n".join(lines) + "\n"


TABLES = {DOCS / "formats.md": matrix, DOCS / "export.md": agreed}


def between(text: str) -> tuple[str, str, str]:
    """What stands before the table, the table, and what stands behind it."""
    before, _, rest = text.partition(BEGIN)
    table, _, behind = rest.partition(END)
    return before, table, behind


@pytest.mark.parametrize("document", TABLES, ids=lambda document: document.name)
def test_the_document_has_this_table(document: Path, tmp_path: Path) -> None:
    _, table, _ = between(document.read_text(encoding="utf-8"))
    assert table == TABLES[document](tmp_path), "python tests/compat/test_matrix.py writes it anew"


if __name__ == "__main__":
    for document, table in TABLES.items():
        with tempfile.TemporaryDirectory() as folder:
            before, _, behind = between(document.read_text(encoding="utf-8"))
            document.write_text(before + BEGIN + table(Path(folder)) + END + behind, encoding="utf-8")
