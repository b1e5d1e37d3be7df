"""Each of the row pass's kernels, and of a draft's, is compiled for several GPUs by Triton's own tools, without a GPU.

Triton's interpreter accepts what its compiler does not. A process of its own compiles, since this one interprets.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from draftwing.target.attention import has_triton

pytestmark = pytest.mark.skipif(not has_triton(), reason="Triton cannot compile here")
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Of a program, by compute capability (CUDA C++ Programming Guide, technical specifications)."""


CASES = [
    *((80, "usual"), (90, "usual"), (100, "usual"), (89, "other")),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in ((89, "usual"), (80, "other"), (90, "other"))),
]


@pytest.mark.parametrize(("capability", "passes"), CASES)
def test_all_kernels_compile(capability: int, passes: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = str(Path(__file__).parents[2] / "compile_kernels.py")
    command = [sys.executable, script, str(capability), str(SHARED_BYTES[capability]), passes]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    compiled = json.loads(result.stdout.splitlines()[-1])
    of_pass = {"_multiply", "_join_splits", "_multiply_rotated", "_rotate", "_attend", "_join_parts"}
    of_draft = {"_search_block", "_join_blocks", "_grow_level", "_rank", "_keep", "_inherit"}
    assert {kernel["name"] for kernel in compiled} == of_pass | of_draft | {"_choose_in_block", "_choose_block"}
    for kernel in compiled:
        assert kernel["shared_bytes"] <= SHARED_BYTES[capability], kernel
        assert kernel["registers"]["LOCAL"] == 0, kernel
        assert kernel["registers"]["STACK"] <= 64, kernel
    products = [kernel for kernel in compiled if kernel["name"] in ("_multiply", "_multiply_rotated", "_attend")]
    assert all(kernel["products"] for kernel in products), "by tensor cores"
