"""On a CUDA device: captured cycles, eager ones and plain decoding give the same tokens in float32."""

import pytest
import torch

import draftwing

pytestmark = pytest.mark.gpu
PROMPTS = ("def read_lines(path):\n", "import os\n\nclass Folder:\n", "for key, value in sorted(")


@pytest.fixture(scope="module")
def models() -> dict[str, draftwing.SpeculativeModel]:
    """The embedded models with captured cycles and without."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return {
        name: draftwing.load("tiny", draft="tiny", dtype="float32", device="cuda", capture=captures)
        for name, captures in (("captured", True), ("eager", False))
    }


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("plan", ["auto", "chain:3", "tree:4x4x16", "tree:10x8x60"])
def test_tokens(models: dict[str, draftwing.SpeculativeModel], plan: str, temperature: float, num_rows: int) -> None:
    encoded = models["eager"].tokenizer(list(PROMPTS[:num_rows]), padding=True, return_tensors="pt")
    options = {"attention_mask": encoded.attention_mask, "max_new_tokens": 100, "temperature": temperature}
    plain = models["eager"].generate(encoded.input_ids, plan="off", **options)
    for model in models.values():
        for _ in range(2):  # the second time with what was recorded
            assert torch.equal(model.generate(encoded.input_ids, plan=plan, **options), plain)


def test_merged_ngrams_and_contexts_beyond_a_bound(models: dict[str, draftwing.SpeculativeModel]) -> None:
    prompt = models["eager"].tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    options = {"max_new_tokens": 700, "eos_token_id": ()}
    plain = models["captured"].generate(prompt, plan="off", **options)
    for model in models.values():
        assert torch.equal(model.generate(prompt, plan="tree:4x5x26", ngram=True, **options), plain)
