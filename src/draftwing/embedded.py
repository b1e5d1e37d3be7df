"""The embedded models: a target, the drafts that were trained for it, and prompts that neither was trained on."""

from pathlib import Path

EMBEDDED = Path(__file__).parent / "assets" / "tiny"
EMBEDDED_PROMPTS = EMBEDDED / "prompts.jsonl"
EMBEDDED_DRAFTS = {
    "tiny-draft": EMBEDDED / "draft",
    "tiny-eagle1": EMBEDDED / "eagle1",
    "tiny": EMBEDDED / "eagle3",
    "tiny-medusa": EMBEDDED / "medusa",
}
