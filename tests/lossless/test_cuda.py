"""On a CUDA device: trees, batches and captured cycles give plain decoding's tokens, in bfloat16 to the last one.

Recordings are what takes time here, so that each test has few.
"""

from typing import Any

import pytest
import torch

import draftwing
from draftwing.target.model import TargetModel
from draftwing.target.row_pass import RowTarget

pytestmark = pytest.mark.gpu
PROMPTS = ("def read_lines(path):\n", "import os\n\nclass Folder:\n", "for key, value in sorted(")
SAMPLING = {
    "greedy": {},
    "sampled": {"temperature": 1.0},
    "warped": {"temperature": 0.9, "top_k": 500, "top_p": 0.95, "min_p": 0.01},
}


def load(dtype: str = "bfloat16", capture: bool = True) -> draftwing.SpeculativeModel:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return draftwing.load("tiny", draft="tiny", dtype=dtype, device="cuda", capture=capture)


@pytest.fixture(scope="module")
def model() -> draftwing.SpeculativeModel:
    return load()


def generate(
    model: draftwing.SpeculativeModel, num_rows: int = 1, plan: str = "off", **options: Any
) -> list[list[int]]:
    encoded = model.tokenizer(list(PROMPTS[:num_rows]), padding=True, return_tensors="pt")
    options = {"max_new_tokens": 90, "eos_token_id": ()} | options
    output = model.generate(
        encoded.input_ids, encoded.attention_mask, return_dict_in_generate=True, plan=plan, **options
    )
    return output.tokens


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("plan", ["chain:3", "tree:4x4x16", "tree:10x8x60"])
def test_tokens_of_bfloat16(model: draftwing.SpeculativeModel, plan: str, sampling: str) -> None:
    plain = generate(model, **SAMPLING[sampling])
    for _ in range(2):  # the second time with what was recorded
        assert generate(model, plan=plan, **SAMPLING[sampling]) == plain


@pytest.mark.parametrize("sampling", ["greedy", "warped"])
def test_tokens_in_a_batch(model: draftwing.SpeculativeModel, sampling: str) -> None:
    plain = generate(model, num_rows=3, **SAMPLING[sampling])
    assert generate(model, num_rows=3, plan="tree:4x4x16", **SAMPLING[sampling]) == plain
    assert generate(model, **SAMPLING[sampling]) == plain[:1], "alone"


def test_trees_that_size_themselves(model: draftwing.SpeculativeModel) -> None:
    assert generate(model, plan="auto") == generate(model)


def test_merged_ngrams_and_contexts_beyond_a_bound(model: draftwing.SpeculativeModel) -> None:
    plain = generate(model, max_new_tokens=420)
    assert generate(model, plan="tree:4x5x26", ngram=True, max_new_tokens=420) == plain


def test_cycles_that_are_not_captured() -> None:
    model = load(capture=False)
    for sampling in ("greedy", "warped"):
        assert generate(model, plan="tree:4x4x16", **SAMPLING[sampling]) == generate(model, **SAMPLING[sampling])


def test_float32_captured_or_not() -> None:
    """Its products are the library's: tokens agree where no two logits nearly tie."""
    captured, eager = load("float32"), load("float32", capture=False)
    assert "float32" in str(eager.generate([1], max_new_tokens=1, return_dict_in_generate=True).statistics.as_dict())
    plain = generate(eager)
    for model in (captured, eager):
        assert generate(model, plan="tree:4x4x16") == plain


@torch.inference_mode()
def test_logits_have_the_same_bits_in_trees_of_any_size(model: draftwing.SpeculativeModel) -> None:
    """Around the ends of tails, blocks and parts, and of tiles of rows: a comb of chains below one root."""
    target = model.target
    assert type(target) is RowTarget
    for length in (31, 63, 128, 161, 257):
        for num_nodes, num_rows in ((7, 1), (17, 1), (60, 1), (40, 3), (130, 2)):
            in_tree = comb_logits(target, length, num_nodes, num_rows)
            for node in (0, 3, num_nodes - 1):
                alone = path_logits(target, length, comb_path(node))
                assert torch.equal(in_tree[0, node], alone), (length, num_nodes, num_rows, node)


def comb_path(node: int) -> list[int]:
    """Node n hangs below n - 5, the first ones below the root; so the last of 130 nodes stands at depth 26."""
    return [*comb_path(max(node - 5, 0)), node] if node else [0]


def token_of(node: int) -> int:
    return 10 + node


def read_prompt(target: TargetModel, length: int, num_rows: int) -> Any:
    cache = target.new_cache(num_rows, length + 200)
    tokens = (torch.arange(num_rows * length, device="cuda").view(num_rows, length) * 7 + 1) % 1000
    num_valid = length - 9 * torch.arange(num_rows, device="cuda")
    target.prefill(tokens, num_valid, cache)
    return cache


def comb_logits(target: TargetModel, length: int, num_nodes: int, num_rows: int) -> torch.Tensor:
    paths = [comb_path(node) for node in range(num_nodes)]
    ancestors = torch.zeros(num_rows, num_nodes, num_nodes, dtype=torch.bool)
    for node, path in enumerate(paths):
        ancestors[:, node, path] = True
    tokens = torch.tensor([[token_of(node) for node in range(num_nodes)]] * num_rows, device="cuda")
    depths = torch.tensor([[len(path) - 1 for path in paths]] * num_rows, device="cuda")
    return target.forward_tree(tokens, depths, ancestors.cuda(), read_prompt(target, length, num_rows)).logits


def path_logits(target: TargetModel, length: int, path: list[int]) -> torch.Tensor:
    """Decoded token by token, alone."""
    cache, one = read_prompt(target, length, 1), torch.ones(1, dtype=torch.int64, device="cuda")
    for node in path:
        tokens, seen = torch.full((1, 1), token_of(node), device="cuda"), torch.ones(1, 1, 1, device="cuda").bool()
        logits = target.forward_tree(tokens, torch.zeros_like(tokens), seen, cache).logits
        cache.commit(None, one, max_kept=1)
    return logits[0, 0]
