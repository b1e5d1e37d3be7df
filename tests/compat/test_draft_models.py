"""Folders of causal language models as drafts: recognised beside the published heads, loaded, or refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB_SIZE, tiny_llama
from published import TINY, eagle1_shapes, eagle3_shapes, random_tensors
from safetensors.torch import load_file, save_file
from transformers import MambaConfig, MambaForCausalLM

from draftwing.api import SpeculativeModel
from draftwing.drafts.eagle.formats import HeadOptions
from draftwing.drafts.fit import Tensors
from draftwing.drafts.inspect_draft import inspect_draft
from draftwing.drafts.kinds import family_of_files
from draftwing.drafts.language_model import LanguageModel, ModelReport, vocabulary_problems
from draftwing.drafts.load_draft import load_draft
from draftwing.target.model import TargetModel


class Tokenizer:
    """What the check of vocabularies asks of a tokenizer."""

    def __init__(self, **ids: int) -> None:
        self._ids = ids

    def get_vocab(self) -> dict[str, int]:
        return self._ids


def save(folder: Path, **sizes: int) -> str:
    tiny_llama(seed=3, **sizes).save_pretrained(folder)
    return str(folder)


def is_language_model(values: dict[str, Any], tensors: Tensors) -> bool:
    return isinstance(family_of_files(values, tensors).kind, LanguageModel)


def test_a_folder_with_a_causal_language_model(target: TargetModel, tmp_path: Path) -> None:
    model = load_draft(save(tmp_path, num_hidden_layers=2), target)
    assert isinstance(model, TargetModel)
    assert (model.num_layers, model.vocab_size, model.dtype) == (2, VOCAB_SIZE, torch.float64)


def test_its_products_are_not_kept_in_8_bits(target: TargetModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"draft_dtype: for draft heads, and .* is a language model"):
        SpeculativeModel(target).with_draft(save(tmp_path), draft_dtype="int8")


def test_an_eagle1_head_names_the_same_architecture_and_is_none() -> None:
    llama = {"architectures": ["LlamaForCausalLM"]}
    assert is_language_model(llama, tiny_llama().state_dict())
    assert not is_language_model(llama, random_tensors(eagle1_shapes(TINY), torch.arange(48)))
    eagle3 = random_tensors(eagle3_shapes(TINY), torch.arange(48))
    assert not is_language_model({"architectures": ["LlamaForCausalLMEagle3"]}, eagle3)
    assert not is_language_model({}, tiny_llama().state_dict())


def test_missing_tensors_are_not_made_up(target: TargetModel, tmp_path: Path) -> None:
    file = Path(save(tmp_path)) / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"draft: .* lacks 1 tensors, the first is model\.norm\.weight"):
        load_draft(str(tmp_path), target)


def test_a_recurrent_model_is_refused(target: TargetModel, tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=16, num_hidden_layers=1)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    for attempt in (lambda: load_draft(str(tmp_path), target), lambda: inspect_draft(str(tmp_path))):
        with pytest.raises(ValueError, match="draft: MambaForCausalLM keeps a recurrent state"):
            attempt()


def test_options_of_heads_are_refused(target: TargetModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"aux_layers: .* only EAGLE heads"):
        load_draft(save(tmp_path), target, options=HeadOptions(aux_layers=(1, 3, 5)))


def test_another_number_of_tokens_needs_tokenizers_to_compare(target: TargetModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size: the draft model has 72 tokens and the target 64"):
        load_draft(save(tmp_path, vocab_size=72), target)


@pytest.mark.parametrize(
    ("draft", "target", "agree"),
    [
        (Tokenizer(a=0, b=1), Tokenizer(a=0, b=1), True),
        (Tokenizer(a=0, b=1), Tokenizer(a=0, b=1, added=2), True),
        (Tokenizer(a=0, b=1), Tokenizer(b=0, a=1), False),
        (None, Tokenizer(a=0), False),
        (Tokenizer(a=0), None, False),
    ],
    ids=["the same", "one has more", "other ids", "no tokenizer", "no tokenizer of the target"],
)
def test_tokenizers_agree_where_no_token_has_two_ids(
    draft: Tokenizer | None, target: Tokenizer | None, agree: bool
) -> None:
    assert (vocabulary_problems(72, 64, draft, target) == []) is agree


def test_inspection_counts_parameters_and_checks_the_vocabulary(tmp_path: Path) -> None:
    folder = save(tmp_path / "draft", vocab_size=72, num_hidden_layers=2)
    save(tmp_path / "target")
    alone = inspect_draft(folder)
    assert isinstance(alone, ModelReport)
    assert alone.num_parameters == tiny_llama(vocab_size=72, num_hidden_layers=2).num_parameters()
    assert (alone.vocab_size, alone.target_vocab_size, alone.dtype) == (72, None, "float64")
    assert alone.problems == []
    (problem,) = inspect_draft(folder, str(tmp_path / "target")).problems
    assert problem.startswith("vocab_size: ")


def test_a_broken_config_is_named(target: TargetModel, tmp_path: Path) -> None:
    config = Path(save(tmp_path)) / "config.json"
    values = json.loads(config.read_text(encoding="utf-8")) | {"model_type": "nobody_knows"}
    config.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ValueError, match="nobody_knows"):
        load_draft(str(tmp_path), target)
