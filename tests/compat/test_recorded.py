"""What engines decoded with the embedded drafts (`make engines` records it) is what is decoded here today."""

import json
from pathlib import Path
from typing import Any

import pytest

from draftwing.api import SpeculativeModel, load
from draftwing.checks.agreement import EngineAnswer, compare, drafts_agree
from draftwing.checks.check_export import NUM_PROMPTS, NUM_TOKENS, decode_here
from draftwing.data.prompts import read_prompts, spread
from draftwing.embedded import EMBEDDED_PROMPTS

RECORD = Path(__file__).parents[2] / "docs/results/exports.json"
ROWS: list[dict[str, Any]] = [row for row in json.loads(RECORD.read_text(encoding="utf-8"))["rows"] if "answers" in row]
DECODED = [
    ("tiny", "vllm", "vllm"),
    ("tiny", "speculators", "vllm"),
    ("tiny-eagle1", "vllm", "vllm"),
    ("tiny-medusa", "vllm", "vllm"),
    ("tiny", "llama.cpp", "llama-server"),
]
"""The drafts, the engines that they were exported to, and who decoded with them."""
NUM_COMPARED = 2
"""Prompts of each draft: enough to notice a change, and not all for the time that they take."""


@pytest.fixture(scope="module")
def decoded() -> dict[str, tuple[SpeculativeModel, list[EngineAnswer]]]:
    """What each draft that engines have decoded with brings here."""
    prompts = spread(read_prompts(EMBEDDED_PROMPTS), NUM_PROMPTS)[:NUM_COMPARED]
    found = {}
    for draft in sorted({draft for draft, _, _ in DECODED}):
        model = load("tiny", draft=draft, dtype="float32", draft_dtype="target")
        ids = [prompt.token_ids(model.tokenizer) for prompt in prompts]
        found[draft] = model, [*decode_here(model, ids, NUM_TOKENS)]
    return found


def test_every_engine_is_on_record() -> None:
    assert sorted((row["draft"], row["to"], row["checker"]) for row in ROWS) == sorted(DECODED)
    assert all(len(row["answers"]) == NUM_PROMPTS for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=[f"{row['draft']}-{row['to']}-{row['checker']}" for row in ROWS])
def test_engines_decoded_the_same(
    row: dict[str, Any], decoded: dict[str, tuple[SpeculativeModel, list[EngineAnswer]]]
) -> None:
    model, ours = decoded[row["draft"]]
    ends = model.target.eos_token_ids
    theirs = [EngineAnswer(**answer) for answer in row["answers"][:NUM_COMPARED]]
    rows = [compare("", mine, answer, ends) for mine, answer in zip(ours, theirs, strict=True)]
    assert all(row.tokens_agree for row in rows)
    assert drafts_agree(rows)
    wrong = [EngineAnswer(answer.tokens, [max(1, num - 1) for num in answer.cycles]) for answer in theirs]
    pairs = zip(ours, wrong, strict=True)
    assert not drafts_agree([compare("", mine, answer, ends) for mine, answer in pairs]), "it says something"
