"""What engines decoded with the embedded drafts (`make engines` records it) is what is decoded here today."""

import json
from pathlib import Path
from typing import Any

import pytest

from draftwing.checks.agreement import compare, drafts_agree
from draftwing.checks.check_export import DEPTH, NUM_PROMPTS, NUM_TOKENS
from draftwing.checks.engine_task import EngineAnswer, EngineTask
from draftwing.checks.ours import decode_here, load_here
from draftwing.data.prompts import read_prompts, spread
from draftwing.drafts.kinds import family_of_files
from draftwing.drafts.load_draft import open_draft
from draftwing.embedded import EMBEDDED, EMBEDDED_PROMPTS

RECORD = Path(__file__).parents[2] / "docs/results/exports.json"
ROWS: list[dict[str, Any]] = [row for row in json.loads(RECORD.read_text(encoding="utf-8"))["rows"] if "answers" in row]
NUM_COMPARED = 2
"""Prompts of each draft: enough to notice a change, and not all for the time that they take."""


@pytest.fixture(scope="module")
def decoded() -> dict[str, list[EngineAnswer]]:
    """What each draft that engines have decoded with brings here."""
    prompts = spread(read_prompts(EMBEDDED_PROMPTS), NUM_PROMPTS)[:NUM_COMPARED]
    found = {}
    for draft in sorted({row["draft"] for row in ROWS}):
        files = open_draft(draft)
        method = family_of_files(files.values, files.tensors).methods[-1].name
        asked = EngineTask(files.folder, str(EMBEDDED / "target"), None, method, [], NUM_TOKENS, DEPTH, 1.0)
        model = load_here(asked, draft)
        found[draft] = [*decode_here(model, asked.on([prompt.token_ids(model.tokenizer) for prompt in prompts]))]
    return found


@pytest.mark.parametrize("row", ROWS, ids=[f"{row['draft']}-{row['engine']}-{row['checker']}" for row in ROWS])
def test_engines_decoded_the_same(row: dict[str, Any], decoded: dict[str, list[EngineAnswer]]) -> None:
    theirs = [EngineAnswer(**answer) for answer in row["answers"]]
    rows = [compare("", ours, answer, (0, 1)) for ours, answer in zip(decoded[row["draft"]], theirs, strict=False)]
    assert len(rows) == NUM_COMPARED and all(row.tokens_agree for row in rows)
    assert drafts_agree(rows)
    wrong = [EngineAnswer(answer.tokens, [max(1, num - 1) for num in answer.cycles]) for answer in theirs]
    pairs = zip(decoded[row["draft"]], wrong, strict=False)
    assert not drafts_agree([compare("", ours, answer, (0, 1)) for ours, answer in pairs]), "it says something"
