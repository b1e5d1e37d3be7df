"""A script that a Python with speculators or transformers runs: what that package's own loader makes of a folder.

Writes one JSON object: the version, the configuration, and for speculators a digest of every tensor. Imports nothing of
ours.
"""

import hashlib
import json
import os
import sys
from importlib.metadata import version
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"


def main(package: str, folder: str, answer_file: str) -> None:
    """Load the folder."""
    said = of_speculators(folder) if package == "speculators" else of_transformers(folder)
    with open(f"{answer_file}.partial", "w", encoding="utf-8") as file:
        json.dump(said, file, default=str)
    os.replace(f"{answer_file}.partial", answer_file)


def of_speculators(folder: str) -> dict[str, Any]:
    """Its model, with the parts that it takes from the verifier."""
    import speculators

    model = speculators.SpeculatorModel.from_pretrained(folder)
    tensors = {name: digest(tensor) for name, tensor in model.state_dict().items()}
    return {"version": version("speculators"), "config": model.config.to_dict(), "tensors": tensors}


def digest(tensor: Any) -> str:
    """Of a tensor's numbers, in float32, and its shape; bfloat16 and float16 lose nothing there."""
    numbers = tensor.detach().cpu().float().contiguous().numpy()
    return hashlib.sha256(str(numbers.shape).encode() + numbers.tobytes()).hexdigest()


def of_transformers(folder: str) -> dict[str, Any]:
    """Its configuration, for which no weights are read."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    return {"version": transformers.__version__, "config": config.to_dict(), "tensors": {}}


if __name__ == "__main__":
    main(*sys.argv[1:])
