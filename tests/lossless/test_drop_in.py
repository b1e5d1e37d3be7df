"""The drop-in's tokens are stock `generate`'s, whatever the call asks for, in float64 at temperature 0; or it refuses.

Batches are ragged, trees branch, and rows end at different steps.
"""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EOS, SLOW, VOCAB_SIZE, tiny_llama
from transformers import (
    DynamicCache,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessor,
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
)
from transformers.generation import BaseStreamer
from transformers.generation import logits_process as processing
from transformers.generation import stopping_criteria as stopping

import draftwing
from draftwing.engine import sampling
from draftwing.engine.noise import gumbel
from draftwing.engine.options import GenerateOptions
from draftwing.engine.stepwise import Place
from draftwing.engine.tree import DraftTree, walk
from draftwing.honoured import HONOURED_FIELDS, NEUTRAL_FIELDS, PREFIX_PROCESSORS, check_config
from draftwing.target.model import TargetModel

SEED = 3
ROWS = [[5, 6, 7, 5, 6, 7, 16], [7, 16, 7, 16], [9, 8, 7, 23, 23, 9, 8], [3]]
KEPT = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
COMMON = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": EOS}


@pytest.fixture(scope="module")
def stock() -> Any:
    model = tiny_llama()
    model.set_attn_implementation("sdpa")
    model.generation_config.top_k = 0  # transformers' 50 would warn beside greedy decoding
    return model


@pytest.fixture(scope="module")
def fast(draft_model: TargetModel) -> Any:
    return draftwing.custom_generate(draft_model, plan="tree:2x3x7", seed=SEED)


def batch(rows: Sequence[Sequence[int]] = ROWS) -> dict[str, torch.Tensor]:
    """Prompts padded on the left."""
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
    }


@pytest.fixture(scope="module")
def plain(stock: Any) -> list[list[int]]:
    return tokens(stock.generate(**COMMON, **batch()))


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
        return scores[-1].amax(-1) > 4.1


class AfterTokens(StoppingCriteria):
    """Ends row b after b + 3 calls."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.num_calls += 1
        return torch.arange(len(input_ids)) + 3 <= self.num_calls


def _not_a_number(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return torch.full_like(scores, torch.nan)


NOT_A_NUMBER = LogitsProcessorList([_not_a_number])


class Recorded(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.puts: list[list[Any]] = []
        self.has_ended = False

    def put(self, value: torch.Tensor) -> None:
        self.puts.append(value.tolist())

    def end(self) -> None:
        self.has_ended = True


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


SYNTH_ID = SynthIDTextWatermarkingConfig(keys=[654, 400, 836, 123], ngram_len=3)
CALLS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "repetition_penalty": {"repetition_penalty": 1.4},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.4},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[16], [23, 9], [7, 16, 7]]},
    "sequence_bias": {"sequence_bias": [[[16], 3.0], [[7, 16], -9.0], [[5, 6], 4.0]]},
    "suppress_tokens": {"suppress_tokens": [7, 16]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [35, 40, 29, 32]},
    "min_length": {"min_length": 14},
    "min_new_tokens": {"min_new_tokens": 9},
    "forced_bos_token_id": {"forced_bos_token_id": 17, **batch([[4], [9]])},
    "forced_eos_token_id": {"forced_eos_token_id": 12},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 1.6)},
    "remove_invalid_values": {"remove_invalid_values": True, "suppress_tokens": [7, 16]},
    "watermarking_config": {"watermarking_config": {"bias": 4.0, "seeding_scheme": "selfhash"}},
    "guidance_scale": {"guidance_scale": 2.0},
    "max_length": {"max_new_tokens": None, "max_length": 13},
    "eos_token_id": {"eos_token_id": [EOS, 16, 23]},
    "no end": {"eos_token_id": -1},
    "pad_token_id": {"pad_token_id": 33},
    "max_time": {"max_time": 0.0},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": allowed},
    "several": {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "min_new_tokens": 4,
        "suppress_tokens": [9],
    },
    "a penalty on the answer alone": processors(processing.RepetitionPenaltyLogitsProcessor(1.6, len(ROWS[0]))),
    "a penalty on padding, too": processors(processing.RepetitionPenaltyLogitsProcessor(1.6)),
    "two penalties": processors(*[processing.RepetitionPenaltyLogitsProcessor(1.4)] * 2),
    "a bias after the penalty": processors(
        processing.RepetitionPenaltyLogitsProcessor(1.6),
        processing.SequenceBiasLogitsProcessor([[[16], 3.0]]),
    ),
    "a temperature that leaves ties alone": processors(
        processing.TemperatureLogitsWarper(1e44), processing.TopKLogitsWarper(3)
    ),
    "a processor that counts calls and rows": processors(CallsAndRows()),
    "a processor that mixes rows": processors(AcrossRows()),
    "a function": processors(lambda input_ids, scores: scores.roll(1, dims=-1)),
    "a criterion that counts calls and rows": criteria(AfterTokens()),
    "the same without an end": criteria(AfterTokens()) | {"eos_token_id": None},
    "a criterion over all rows": criteria(AllRowsSaid()) | {"eos_token_id": None},
    "a criterion that reads scores": criteria(ScoreAbove()) | KEPT,
    "a criterion of one row": criteria(stopping.ConfidenceCriteria(0.05)) | KEPT,
    "a short length criterion": criteria(stopping.MaxLengthCriteria(2)),
    "an end criterion": criteria(stopping.EosTokenCriteria([7, 16])),
}
"""What a call may ask for; names of GenerationConfig's fields where there is one."""


WARPERS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.5},
    "top_p of 0": {"top_p": 0.0},
    "min_p": {"min_p": 0.3},
    "the usual ones": {
        "temperature": 0.8,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
    },
    "top_h": {"top_h": 0.4},
    "typical_p": {"typical_p": 0.3},
    "epsilon_cutoff": {"epsilon_cutoff": 0.02},
    "eta_cutoff": {"eta_cutoff": 0.02},
    "renormalize_logits": {"renormalize_logits": True, "top_k": 5},
    "a watermark that counts calls": {"watermarking_config": SYNTH_ID},
    "at least so many": processors(processing.TopPLogitsWarper(0.01, min_tokens_to_keep=3)),
    "not minus infinity": processors(processing.TopKLogitsWarper(3, filter_value=-2.0)),
    "two temperatures": {"temperature": 3.0, **processors(processing.TemperatureLogitsWarper(0.2))},
    "another order": processors(processing.MinPLogitsWarper(0.2), processing.TemperatureLogitsWarper(3.0)),
}


def tokens(output: Any) -> list[list[int]]:
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    return sequences.tolist()


@pytest.mark.filterwarnings("ignore:Passing `.*` requires")
@pytest.mark.parametrize("num_rows", [pytest.param(1, marks=SLOW), 4])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_gives_stock_tokens(stock: Any, fast: Any, plain: list[list[int]], name: str, num_rows: int) -> None:
    options = COMMON | batch(ROWS[:num_rows]) | CALLS[name]
    expected = tokens(stock.generate(**copy.deepcopy(options)))
    assert tokens(stock.generate(**options, custom_generate=fast)) == expected
    if num_rows == 4:  # equality would be cheap if a call asked for nothing
        assert (expected == plain) == (name == "nothing")


@pytest.mark.parametrize("num_rows", [pytest.param(1, marks=SLOW), 4])
@pytest.mark.parametrize("name", WARPERS)
def test_a_sampled_call_gives_stock_tokens(
    stock: Any, fast: Any, name: str, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where stock draws with our noise."""
    options = COMMON | batch(ROWS[:num_rows]) | {"do_sample": True} | WARPERS[name]
    steps = iter(range(100))

    def draw(probs: torch.Tensor, num_samples: int) -> torch.Tensor:
        step = next(steps)
        noise = [
            gumbel(
                torch.tensor(GenerateOptions(seed=SEED).sampling(row).seed),
                torch.tensor([len(ROWS[row]) + step]),
                torch.arange(VOCAB_SIZE),
            )
            for row in range(num_rows)
        ]
        return (probs.log() + torch.cat(noise)).argmax(-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", draw)
    expected = tokens(stock.generate(**copy.deepcopy(options)))
    assert tokens(stock.generate(**options, custom_generate=fast)) == expected


@pytest.mark.parametrize("num_rows", [1, 4])
@pytest.mark.parametrize("name", ["nothing", "no_repeat_ngram_size", "a processor that counts calls and rows"])
def test_scores_and_logits_are_stocks(stock: Any, fast: Any, name: str, num_rows: int) -> None:
    """Of every step, those on the padding behind rows that have ended among them."""
    options = COMMON | batch(ROWS[:num_rows]) | KEPT | CALLS[name]
    expected = stock.generate(**copy.deepcopy(options))
    output = stock.generate(**options, custom_generate=fast)
    assert output.sequences.tolist() == expected.sequences.tolist()
    for kind in ("scores", "logits"):
        ours, theirs = torch.stack(getattr(output, kind)), torch.stack(getattr(expected, kind))
        assert ours.dtype == torch.float32 and not ours.is_inference()
        torch.testing.assert_close(ours, theirs)
    only = stock.generate(**options | {"output_scores": False}, custom_generate=fast)
    assert only.scores is None and len(only.logits) == len(only.sequences[0]) - options["input_ids"].shape[1]


def test_such_calls_accept_drafts(stock: Any, fast: Any) -> None:
    """Alone, and in a batch whose rows advance each at its own pace; less where they go in step."""
    for call, at_least in (("min_new_tokens", 1.3), ("a processor that mixes rows", 1.0)):
        for num_rows in (1, 4):
            options = COMMON | CALLS[call] | {"return_dict_in_generate": True, "max_new_tokens": 40}
            output = stock.generate(**options, **batch(ROWS[:num_rows]), custom_generate=fast)
            assert output.statistics.acceptance_length > at_least


def root_prefix_for_every_node(places: Sequence[Place], logits: torch.Tensor, tree: DraftTree, noise_at: Any) -> Any:
    """Sabotage of `choose_in_steps`: processors see at every node the text up to the root."""
    steps: Any = places[0].steps
    texts = torch.stack(steps._texts)
    chosen = torch.stack([steps._processors(texts, node.float()).argmax(-1) for node in logits.unbind(1)], 1)
    verdict = walk(tree, chosen)
    steps._texts = [torch.cat((texts[0], verdict.tokens[0, : int(verdict.num_accepted[0]) + 1]))]
    return chosen


@pytest.mark.parametrize("name", ["no_repeat_ngram_size", "exponential_decay_length_penalty", "a function"])
def test_the_prefix_of_another_node_is_noticed(
    stock: Any, fast: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "choose_in_steps", root_prefix_for_every_node)
    options = COMMON | batch(ROWS[:1]) | CALLS[name] | {"max_new_tokens": 30}
    expected = tokens(stock.generate(**options))
    is_equal = tokens(stock.generate(**options, custom_generate=fast)) == expected
    assert is_equal == (name == "a function")  # which reads no prefix


def kinds_prepared(stock: Any, argument: str) -> set[type]:
    """The classes of processors or criteria that the calls of this file prepare."""
    kinds: set[type] = set()

    def collect(model: Any, input_ids: torch.Tensor, **prepared: Any) -> torch.Tensor:
        kinds.update(map(type, prepared[argument]))
        return input_ids

    for call in [*CALLS.values(), *({"do_sample": True} | call for call in WARPERS.values())]:
        stock.generate(**COMMON | batch() | call, custom_generate=collect)
    return kinds


def classes_of(module: Any, base: type) -> set[type]:
    return {kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, base)} - {base}


OTHER_MODALITIES = ("Whisper", "Alternating", "Bark", "Dia", "ClassifierFree")
"""Processors of speech and music models, which are no targets."""


def test_every_class_of_transformers_is_tried_here(stock: Any) -> None:
    """Any would be called as it is; but that is only known to be right for those that were looked at."""
    known = classes_of(processing, LogitsProcessor)
    others = {kind for kind in known if kind.__name__.startswith(OTHER_MODALITIES)}
    assert known - others == kinds_prepared(stock, "logits_processor") & known
    assert known >= PREFIX_PROCESSORS
    known = classes_of(stopping, StoppingCriteria)
    assert known - {stopping.StopStringCriteria} == kinds_prepared(stock, "stopping_criteria") & known  # see test_api


FIELDS = sorted(name for name in vars(GenerationConfig()) if not name.startswith("_"))


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_honoured_neutral_or_refused(name: str) -> None:
    config = GenerationConfig()
    check_config(config)
    setattr(config, name, "something")
    if name in HONOURED_FIELDS | NEUTRAL_FIELDS:
        check_config(config)
        return
    with pytest.raises(ValueError, match=f"^{name}: not supported by draftwing, got 'something'"):
        check_config(config)


def test_every_honoured_field_is_tried() -> None:
    """Here, by its name; but for those that every call has, and those that need a tokenizer (see test_api)."""
    tried = {name for call in [COMMON, KEPT, *CALLS.values(), *WARPERS.values()] for name in call}
    elsewhere = {"stop_strings", "token_healing", "num_return_sequences", "bos_token_id"}
    assert not (NEUTRAL_FIELDS & HONOURED_FIELDS)
    assert HONOURED_FIELDS - tried == elsewhere


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "^num_beams: not supported by draftwing, got 2"),
        ({"prompt_lookup_num_tokens": 3}, "^prompt_lookup_num_tokens"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "^penalty_alpha"),
        ({"dola_layers": "low"}, "^dola_layers"),
        ({"output_attentions": True}, "^output_attentions"),
        ({"output_hidden_states": True}, "^output_hidden_states"),
        ({"position_ids": torch.tensor([[3, 4]])}, "^position_ids"),
        (
            {"inputs": None, "inputs_embeds": torch.zeros(1, 2, 32, dtype=torch.float64)},
            "^inputs_embeds",
        ),
        ({"labels": torch.tensor([[1, 2]])}, "^labels"),
        ({"synced_gpus": True}, "^synced_gpus"),
        ({"attention_mask": torch.tensor([[1, 0]])}, "^attention_mask: prompt 0 ends in padding"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_name(
    stock: Any, fast: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        stock.generate(**{"inputs": torch.tensor([[1, 2]])} | COMMON | options, custom_generate=fast)


def test_an_assistant_is_refused(stock: Any, fast: Any) -> None:
    """transformers keeps it from drop-ins, which would draft without it."""
    with pytest.raises(ValueError, match=r"^assistant_model: not beside draftwing"):
        stock.generate(**COMMON, **batch(), assistant_model=tiny_llama(seed=3), custom_generate=fast)


def test_token_types_are_refused() -> None:
    """GPT-2 adds an embedding of them, of type 0 too."""
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=VOCAB_SIZE, bos_token_id=0, eos_token_id=0)
    ids, fast = torch.tensor([[5, 6, 5, 6]]), draftwing.custom_generate(None, method="ngram")
    model = GPT2LMHeadModel(config).double().eval()
    common = {"max_new_tokens": 4, "pad_token_id": 0, "do_sample": False, "custom_generate": fast}
    with pytest.raises(ValueError, match=r"^token_type_ids: not supported by draftwing"):
        model.generate(ids, token_type_ids=torch.zeros_like(ids), **common)


@pytest.mark.parametrize("num_rows", [1, 4])
def test_inputs_that_change_nothing_are_taken(stock: Any, fast: Any, num_rows: int) -> None:
    prompts = batch(ROWS[:num_rows])
    expected = stock.generate(**COMMON, **prompts).tolist()
    positions = (prompts["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    for options in (
        {"position_ids": positions},
        {"past_key_values": DynamicCache()},
        {"past_key_values": StaticCache(stock.config, max_cache_len=64)},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"logits_to_keep": 1},
        {"prefill_chunk_size": 2},
    ):
        warns = pytest.warns(UserWarning) if "past_key_values" in options else nullcontext()
        with warns:
            assert stock.generate(**COMMON, **prompts, **options, custom_generate=fast).tolist() == expected
    with pytest.raises(ValueError, match=r"^cache_implementation: not supported by draftwing, got 'quantized'"):
        check_config(GenerationConfig(cache_implementation="quantized"))


def test_a_cache_that_stays_empty_is_warned_of(stock: Any, fast: Any) -> None:
    """Whoever goes on with it would have no context."""
    with pytest.warns(UserWarning, match=r"^past_key_values: .* stays empty"):
        output = stock.generate(
            **COMMON, **batch(), past_key_values=DynamicCache(), return_dict_in_generate=True, custom_generate=fast
        )
    assert output.past_key_values is None


@pytest.mark.parametrize("options", [{}, {"no_repeat_ngram_size": 2}, {"sequence_bias": {(3,): 1.0}} | KEPT])
def test_inference_mode_changes_nothing(stock: Any, fast: Any, options: dict[str, Any]) -> None:
    expected = tokens(stock.generate(**COMMON, **batch(), **options))
    with torch.inference_mode():
        assert tokens(stock.generate(**COMMON, **batch(), **options, custom_generate=fast)) == expected


@pytest.mark.parametrize("options", [{"suppress_tokens": list(range(VOCAB_SIZE))}, {"logits_processor": NOT_A_NUMBER}])
def test_nothing_to_draw_is_an_error(stock: Any, fast: Any, options: dict[str, Any]) -> None:
    """As transformers raises it."""
    with pytest.raises(ValueError, match=r"^scores: the processors left \["):
        stock.generate(**COMMON | {"do_sample": True}, **batch(), **options, custom_generate=fast)


def test_gaps_in_prompts_are_for_models_without_sliding_windows(stock: Any, fast: Any) -> None:
    """transformers' windows count what is masked, which is not read here."""
    gaps = {"input_ids": torch.tensor([[5, 6, 7, 3, 3, 5, 6]]), "attention_mask": torch.tensor([[1, 1, 1, 0, 0, 1, 1]])}
    assert tokens(stock.generate(**COMMON, **gaps, custom_generate=fast)) == tokens(stock.generate(**COMMON, **gaps))
    config = MistralConfig(**stock.config.to_dict() | {"sliding_window": 4, "architectures": None})
    mistral = MistralForCausalLM(config).double().eval()
    lookup = draftwing.custom_generate(None, method="ngram")
    with pytest.raises(ValueError, match=r"^attention_mask: prompt 0 has gaps"):
        mistral.generate(**COMMON, **gaps, custom_generate=lookup)
    expected = tokens(mistral.generate(**COMMON, **batch()))
    assert tokens(mistral.generate(**COMMON, **batch(), custom_generate=lookup)) == expected


@pytest.mark.parametrize("num_rows", [1, 4])
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_streamer_gets_each_step(stock: Any, fast: Any, num_rows: int, is_wrapped: bool) -> None:
    """The tokens of all rows, as from transformers; also where a function of the user's calls the drop-in."""

    def wrapper(*arguments: Any, **options: Any) -> Any:
        return fast(*arguments, **options)

    expected, streamed = Recorded(), Recorded()
    common = COMMON | batch(ROWS[:num_rows])
    stock.generate(**common, streamer=expected)
    stock.generate(**common, streamer=streamed, custom_generate=wrapper if is_wrapped else fast)
    assert streamed.puts == expected.puts
    assert streamed.has_ended


def test_a_numpy_integer_is_an_id(stock: Any, fast: Any, plain: list[list[int]]) -> None:
    common = COMMON | {"pad_token_id": np.int64(0), "eos_token_id": np.int64(EOS)}
    assert tokens(stock.generate(**common, **batch(), custom_generate=fast)) == plain


@pytest.mark.parametrize(
    "options", [{"do_sample": True}, {"repetition_penalty": 1.1}, {"do_sample": True, "top_p": 0.8}]
)
def test_torchs_default_dtype_changes_nothing(stock: Any, fast: Any, options: dict[str, Any]) -> None:
    common = COMMON | {"max_new_tokens": 40, "custom_generate": fast} | options
    expected = tokens(stock.generate(**common, **batch()))
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert tokens(stock.generate(**common, **batch())) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_cache_with_contents_is_refused(stock: Any, fast: Any) -> None:
    cache = DynamicCache()
    stock(torch.tensor([[1, 2]]), past_key_values=cache)
    with pytest.raises(ValueError, match=r"^past_key_values"):
        stock.generate(torch.tensor([[5, 6, 7]]), past_key_values=cache, **COMMON, custom_generate=fast)


class Adapter(torch.nn.Module):
    """Adds a product of low rank to a layer's output while it is active, as LoRA does."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.layer, self.is_active = layer, True
        torch.manual_seed(5)
        self.down = torch.nn.Linear(layer.in_features, 2, bias=False).double()
        self.up = torch.nn.Linear(2, layer.out_features, bias=False).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.layer(x)
        return output + self.up(self.down(x)) if self.is_active else output


def test_adapters_are_honoured_as_they_are_switched(fast: Any) -> None:
    stock = tiny_llama()
    attention = stock.model.layers[2].self_attn
    attention.q_proj = adapter = Adapter(attention.q_proj)
    outputs = []
    for is_active in (True, False, True):
        adapter.is_active = is_active
        outputs.append(stock.generate(**COMMON, **batch()).tolist())
        assert stock.generate(**COMMON, **batch(), custom_generate=fast).tolist() == outputs[-1]
    assert outputs[0] == outputs[2] != outputs[1]


def test_an_adapter_that_changes_prompts_is_refused(fast: Any) -> None:
    stock = tiny_llama()
    stock.prepare_inputs_for_generation = stock.prepare_inputs_for_generation
    with pytest.raises(ValueError, match=r"^prepare_inputs_for_generation: replaced on this model"):
        stock.generate(**COMMON, **batch(), custom_generate=fast)
