"""The drop-in's tokens are stock `generate`'s, whatever the call asks for, in float64 at temperature 0; or it refuses.

Batches are ragged, trees branch, and rows end at different steps.
"""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import EOS, VOCAB_SIZE, tiny_llama
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import logits_process as processing
from transformers.generation import stopping_criteria as stopping

import draftwing
from draftwing.checkpoint.load import DraftNetwork
from draftwing.decoding import sampling
from draftwing.decoding.stepwise import choose_in_steps
from draftwing.honoured import HONOURED_FIELDS, NEUTRAL_FIELDS, PREFIX_PROCESSORS, check_config

ROWS = [[5, 6, 7, 5, 6, 7, 16], [7, 16, 7, 16], [9, 8, 7, 23, 23, 9, 8], [3]]
COMMON = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": EOS}


@pytest.fixture(scope="module")
def stock() -> Any:
    model = tiny_llama()
    model.set_attn_implementation("sdpa")
    model.generation_config.top_k = 0  # transformers' 50 would warn beside greedy decoding
    return model


@pytest.fixture(scope="module")
def fast(heads: dict[str, DraftNetwork]) -> Any:
    return draftwing.custom_generate(heads["eagle3"], plan="tree:4x4x16", seed=3)


def batch(rows: Sequence[Sequence[int]] = ROWS) -> dict[str, torch.Tensor]:
    """Prompts padded on the left."""
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
    }


class CallsAndRows(LogitsProcessor):
    """Favours a token that depends on the row's number, on the call's, and on the last token."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        rows = torch.arange(len(scores))
        scores = scores.clone()
        scores[rows, (rows * 7 + self.num_calls + input_ids[:, -1]) % VOCAB_SIZE] += 6.0
        return scores


class AcrossRows(LogitsProcessor):
    """Forbids every row what another row has just said."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, input_ids[:, -1].unique(), -torch.inf)


class ScoreAbove(StoppingCriteria):
    """Ends a row when its best score is high; it reads scores, which must be asked for."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return scores[-1].amax(-1) > 8.5


class AfterTokens(StoppingCriteria):
    """Ends row b after b + 3 calls."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.num_calls += 1
        return torch.arange(len(input_ids)) + 3 <= self.num_calls


class AllRowsSaid(StoppingCriteria):
    """Ends all rows at once when each has said an even token; a single boolean."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> bool:
        return bool((input_ids[:, len(ROWS[0]) :] % 2 == 0).any(1).all())


def allowed(batch_id: int, text: torch.Tensor) -> list[int]:
    return [token for token in range(VOCAB_SIZE) if token % (batch_id + 2) != int(text[-1]) % 2]


def processors(*those: Any) -> dict[str, Any]:
    return {"logits_processor": LogitsProcessorList(those)}


def criteria(*those: Any) -> dict[str, Any]:
    return {"stopping_criteria": StoppingCriteriaList(those)}


CALLS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "repetition_penalty": {"repetition_penalty": 1.4},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.4},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[16], [23, 9], [7, 16, 7]]},
    "sequence_bias": {"sequence_bias": [[[16], 3.0], [[7, 16], -9.0], [[5, 6], 4.0]]},
    "suppress_tokens": {"suppress_tokens": [7, 16]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [7, 16, 23, 9]},
    "min_length": {"min_length": 14},
    "min_new_tokens": {"min_new_tokens": 9},
    "forced_bos_token_id": {"forced_bos_token_id": 17, **batch([[4], [9]])},
    "forced_eos_token_id": {"forced_eos_token_id": 12},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 1.6)},
    "remove_invalid_values": {"remove_invalid_values": True, "suppress_tokens": [7, 16]},
    "renormalize_logits": {"renormalize_logits": True},
    "watermarking_config": {"watermarking_config": {"bias": 4.0, "seeding_scheme": "selfhash"}},
    "guidance_scale": {"guidance_scale": 2.0},
    "max_length": {"max_new_tokens": None, "max_length": 13},
    "eos_token_id": {"eos_token_id": [EOS, 16, 23]},
    "no end": {"eos_token_id": -1},
    "pad_token_id": {"pad_token_id": 33},
    "max_time": {"max_time": 100.0},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": allowed},
    "several": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 4, "suppress_tokens": [9]},
    "a penalty on the answer alone": processors(processing.RepetitionPenaltyLogitsProcessor(1.6, len(ROWS[0]))),
    "a penalty on padding, too": processors(processing.RepetitionPenaltyLogitsProcessor(1.6)),
    "two penalties": processors(*[processing.RepetitionPenaltyLogitsProcessor(1.4)] * 2),
    "a bias after the penalty": processors(
        processing.RepetitionPenaltyLogitsProcessor(1.6), processing.SequenceBiasLogitsProcessor([[[16], 3.0]])
    ),
    "a coarse temperature": processors(processing.TemperatureLogitsWarper(1e30), processing.TopKLogitsWarper(3)),
    "typical_p": processors(processing.TypicalLogitsWarper(0.3)),
    "epsilon_cutoff": processors(processing.EpsilonLogitsWarper(0.2)),
    "eta_cutoff": processors(processing.EtaLogitsWarper(0.2)),
    "top_h": processors(processing.TopHLogitsWarper(0.4)),
    "a processor that counts calls and rows": processors(CallsAndRows()),
    "a processor that mixes rows": processors(AcrossRows()),
    "a function": processors(lambda input_ids, scores: scores.roll(1, dims=-1)),
    "a criterion that counts calls and rows": criteria(AfterTokens()),
    "the same without an end": criteria(AfterTokens()) | {"eos_token_id": None},
    "a criterion over all rows": criteria(AllRowsSaid()) | {"eos_token_id": None},
    "a criterion that reads scores": criteria(ScoreAbove()) | {"output_scores": True, "return_dict_in_generate": True},
    "a short length criterion": criteria(stopping.MaxLengthCriteria(2)),
    "an end criterion": criteria(stopping.EosTokenCriteria([7, 16])),
}
"""What a call may ask for; names of GenerationConfig's fields where there is one."""


def tokens(output: Any) -> list[list[int]]:
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    return sequences.tolist()


@pytest.mark.filterwarnings("ignore:Passing `.*` requires")
@pytest.mark.parametrize("num_rows", [1, 4])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_gives_stock_tokens(stock: Any, fast: Any, name: str, num_rows: int) -> None:
    options = COMMON | batch(ROWS[:num_rows]) | CALLS[name]
    expected = tokens(stock.generate(**copy.deepcopy(options)))
    assert tokens(stock.generate(**options, custom_generate=fast)) == expected


def test_these_calls_change_tokens(stock: Any) -> None:
    """Equality would be cheap if they asked for nothing."""
    plain = stock.generate(**COMMON, **batch())
    same = [name for name in CALLS if tokens(stock.generate(**COMMON | batch() | copy.deepcopy(CALLS[name]))) == tokens(plain)]
    assert same == ["nothing"]
