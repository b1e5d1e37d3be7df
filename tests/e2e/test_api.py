"""The Python API, on the small models of conftest: batches, options, the drop-in, errors."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import EOS, VOCAB_SIZE, costs, new_head, requests_for, run, tiny_llama
from transformers import (
    AutoTokenizer,
    BatchEncoding,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation import StopStringCriteria

import draftwing
from draftwing.api import GenerateOutput, SpeculativeModel
from draftwing.config import TrainConfig
from draftwing.drafts.eagle.network import DraftNetwork
from draftwing.drafts.medusa.network import MedusaModel
from draftwing.embedded import EMBEDDED
from draftwing.engine.options import GenerateOptions, row_seed
from draftwing.engine.tree_plan import TreePlan
from draftwing.target.model import TargetModel


@pytest.fixture(scope="module")
def model(target: TargetModel, heads: dict[str, DraftNetwork]) -> SpeculativeModel:
    return SpeculativeModel(target, heads["eagle3"])


def padded(prompts: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, prompts))
    ids, mask = torch.zeros(len(prompts), longest, dtype=torch.int64), torch.zeros(len(prompts), longest)
    for row, prompt in enumerate(prompts):
        columns = slice(longest - len(prompt), None) if side == "left" else slice(0, len(prompt))
        ids[row, columns] = torch.tensor(prompt)
        mask[row, columns] = 1
    return ids, mask.long()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_ragged_batch_padded_on_either_side(
    model: SpeculativeModel, target: TargetModel, prompts: list[list[int]], side: str
) -> None:
    ids, mask = padded(prompts, side)
    output = model.generate(
        ids, mask, max_new_tokens=24, eos_token_id=EOS, return_dict_in_generate=True, plan="tree:4x4x16"
    )
    assert isinstance(output, GenerateOutput)
    assert output.tokens == run(target, requests_for(prompts))
    assert output.sequences[:, : ids.shape[1]].equal(ids)
    longest = max(map(len, output.tokens))
    assert output.sequences.shape == (4, ids.shape[1] + longest)
    assert all(reason in ("eos", "length") for reason in output.finish_reasons)


def test_streamed_tokens_are_the_generated_ones(model: SpeculativeModel, prompts: list[list[int]]) -> None:
    ids, mask = padded(prompts, "left")
    options = {"max_new_tokens": 16, "temperature": 1.0, "eos_token_id": EOS}
    streamed: list[list[int]] = [[] for _ in prompts]
    for committed in model.stream(ids, mask, **options):
        for row, tokens in enumerate(committed.tokens):
            assert committed.num_accepted[row] <= len(tokens)
            streamed[row] += tokens
    output = model.generate(ids, mask, return_dict_in_generate=True, **options)
    assert isinstance(output, GenerateOutput)
    assert streamed == output.tokens


def test_statistics_add_up(model: SpeculativeModel) -> None:
    output = model.generate(
        torch.tensor([[1, 2, 3]]), max_new_tokens=20, plan="chain:5", eos_token_id=[], return_dict_in_generate=True
    )
    assert isinstance(output, GenerateOutput)
    figures = output.statistics
    assert figures.num_tokens == 20
    assert figures.acceptance_length == 20 / figures.num_cycles
    assert len(figures.acceptance_rate) == 5
    assert all(0 <= rate <= 1 for rate in figures.acceptance_rate)
    assert min(figures.seconds[stage] for stage in ("prefill", "draft", "verify", "commit")) > 0


def test_the_model_is_left_as_it_was(model: SpeculativeModel) -> None:
    """Also after a generation is abandoned in the middle."""
    stock = model.target.model
    ids = torch.tensor([[1, 2, 3, 4]])
    before = stock(ids).logits
    next(model.stream(ids, max_new_tokens=16))
    assert stock(ids).logits.equal(before)


@pytest.mark.parametrize("sampled", [False, True])
def test_transformers_drop_in(heads: dict[str, DraftNetwork], sampled: bool) -> None:
    stock = tiny_llama()
    stock.set_attn_implementation("sdpa")
    ids = torch.tensor([[5, 6, 7], [0, 8, 9]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    common = {"max_new_tokens": 12, "eos_token_id": EOS, "pad_token_id": 0, "do_sample": sampled}
    fast = stock.generate(
        ids, attention_mask=mask, custom_generate=draftwing.custom_generate(heads["eagle3"], seed=3), **common
    )
    if sampled:
        again = stock.generate(
            ids, attention_mask=mask, custom_generate=draftwing.custom_generate(heads["eagle1"], seed=3), **common
        )
    else:
        again = stock.generate(ids, attention_mask=mask, **common)
    assert fast.tolist() == again.tolist()


def test_drop_in_takes_its_seed_from_torch(heads: dict[str, DraftNetwork]) -> None:
    stock = tiny_llama()
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        generate = draftwing.custom_generate(heads["eagle3"])
        ids = torch.tensor([[5, 6, 7]])
        outputs.append(
            stock.generate(ids, max_new_tokens=16, do_sample=True, pad_token_id=0, custom_generate=generate).tolist()
        )
    assert outputs[0] == outputs[1] != outputs[2]


def test_loading_a_draft_leaves_the_seed_alone(tiny_and_head: tuple[Any, Any, Any]) -> None:
    """The first call, which loads it, draws what later ones draw; and torch's generator goes on as without drafts."""
    stock, tokenizer, _ = tiny_and_head
    prompt, fast = tokenizer("def main(args):", return_tensors="pt"), draftwing.custom_generate("tiny", plan="chain:3")
    outputs = []
    for _ in range(2):
        torch.manual_seed(7)
        outputs.append(stock.generate(**prompt, max_new_tokens=8, do_sample=True, custom_generate=fast).tolist())
    assert outputs[0] == outputs[1]
    state = torch.get_rng_state()
    stock.generate(**prompt, max_new_tokens=2, do_sample=False, custom_generate=draftwing.custom_generate("tiny"))
    assert torch.get_rng_state().equal(state)


def test_drop_in_leaves_the_training_mode_and_returns_statistics(heads: dict[str, DraftNetwork]) -> None:
    stock = tiny_llama().train()
    stock.model.layers[0].eval()  # a part may be frozen
    modes = [module.training for module in stock.modules()]
    generate = draftwing.custom_generate(heads["eagle3"])
    output = stock.generate(
        torch.tensor([[5, 6]]), max_new_tokens=4, pad_token_id=0, custom_generate=generate, return_dict_in_generate=True
    )
    assert output.sequences.shape == (1, 6)
    assert output.statistics.num_tokens == 4
    assert output.statistics.acceptance_length >= 1
    assert [module.training for module in stock.modules()] == modes


@pytest.fixture(scope="module")
def tiny_and_head() -> tuple[Any, Any, Any]:
    """The embedded target as transformers loads it, its tokenizer, and a drop-in with the embedded head."""
    folder = EMBEDDED / "target"
    model = LlamaForCausalLM.from_pretrained(folder, dtype="float32")
    return model, AutoTokenizer.from_pretrained(folder), draftwing.custom_generate("tiny", plan="chain:3")


def test_drop_in_feeds_a_streamer(tiny_and_head: tuple[Any, Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    stock, tokenizer, fast = tiny_and_head
    prompt = tokenizer("def main(args):", return_tensors="pt")
    common = {"max_new_tokens": 12, "do_sample": False, "custom_generate": fast}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=300)
    ids = stock.generate(**prompt, **common, streamer=streamer)
    new = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :])
    assert "".join(streamer) == new != ""
    stock.generate(**prompt, **common, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == new + "\n"


def test_drop_in_ends_a_streamer_where_it_fails(tiny_and_head: tuple[Any, Any, Any]) -> None:
    """Its reader would wait for ever."""
    stock, tokenizer, fast = tiny_and_head
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=1)
    with pytest.raises(ValueError, match="output_attentions"):
        stock.generate(
            torch.tensor([[5, 6]]), max_new_tokens=4, custom_generate=fast, output_attentions=True, streamer=streamer
        )
    assert "".join(streamer) == ""


def test_drop_in_stops_at_strings(tiny_and_head: tuple[Any, Any, Any]) -> None:
    """As transformers does with its own `stop_strings`, whose tokenizer no drop-in gets to see."""
    stock, tokenizer, plain = tiny_and_head
    prompt = tokenizer("def main(args):", return_tensors="pt")
    common = {"max_new_tokens": 24, "do_sample": False}
    text = tokenizer.decode(stock.generate(**prompt, **common)[0, prompt["input_ids"].shape[1] :])
    fast = draftwing.custom_generate("tiny", plan="chain:3", stop=text[8:12], tokenizer=tokenizer)
    expected = stock.generate(**prompt, **common, stop_strings=text[8:12], tokenizer=tokenizer)
    assert expected.shape[1] < prompt["input_ids"].shape[1] + 24
    assert stock.generate(**prompt, **common, custom_generate=fast).equal(expected)
    criterion = StopStringCriteria(tokenizer, [text[8:12]])
    assert stock.generate(**prompt, **common, custom_generate=plain, stopping_criteria=[criterion]).equal(expected)
    with pytest.raises(ValueError, match="stop: stop strings need a tokenizer"):
        stock.generate(**prompt, **common, custom_generate=draftwing.custom_generate("tiny", stop="arg"))


@pytest.mark.parametrize("end", [{}, {"eos_token_id": None}], ids=["padded", "without an end"])
def test_drop_in_stops_rows_at_strings(tiny_and_head: tuple[Any, Any, Any], end: dict[str, Any]) -> None:
    """Rows that have ended are padded, or go on with the others where no end-of-sequence id is known."""
    stock, tokenizer, _ = tiny_and_head
    stock = copy.deepcopy(stock)
    stock.generation_config.update(**end)
    ids = torch.tensor(tokenizer(["def main(args):", "import numpy as"]).input_ids[:1] * 2)
    ids[1, 0] = 7
    common = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 3}
    text = tokenizer.decode(stock.generate(ids, **common)[0, ids.shape[1] :])
    expected = stock.generate(ids, **common, stop_strings=text[8:12], tokenizer=tokenizer).tolist()
    fast = draftwing.custom_generate("tiny", plan="chain:3", stop=text[8:12], tokenizer=tokenizer)
    assert stock.generate(ids, **common, custom_generate=fast).tolist() == expected
    fast = draftwing.custom_generate("tiny", plan="chain:3")
    criteria = [StopStringCriteria(tokenizer, text[8:12])]
    assert stock.generate(ids, **common, custom_generate=fast, stopping_criteria=criteria).tolist() == expected


def test_drop_in_returns_several_sequences(heads: dict[str, DraftNetwork]) -> None:
    fast = draftwing.custom_generate(heads["eagle3"], seed=3, plan="chain:3")
    common = {"max_new_tokens": 6, "do_sample": True, "pad_token_id": 0, "custom_generate": fast}
    ids = torch.tensor([[5, 6, 7], [1, 8, 9]])
    twice = tiny_llama().generate(ids, num_return_sequences=2, **common)
    assert twice.tolist() == tiny_llama().generate(ids.repeat_interleave(2, 0), **common).tolist()


@pytest.mark.parametrize("draft", ["tiny", "tiny-medusa", "tiny-draft"])
def test_a_kept_drop_in_follows_its_model(tiny_and_head: tuple[Any, Any, Any], draft: str) -> None:
    """To another dtype, by loading its draft anew; one that was loaded by hand must be loaded by hand."""
    stock, tokenizer, _ = tiny_and_head
    stock = copy.deepcopy(stock)
    prompt, common = tokenizer("def main(args):", return_tensors="pt"), {"max_new_tokens": 8, "do_sample": False}
    by_name = draftwing.custom_generate(draft, plan="chain:2")
    by_hand = draftwing.custom_generate(draftwing.load("tiny", draft=draft).draft, plan="chain:2")
    for dtype in (torch.float32, torch.float64, torch.float32):
        stock = stock.to(dtype)
        expected = stock.generate(**prompt, **common)
        assert stock.generate(**prompt, **common, custom_generate=by_name).equal(expected)
        if dtype == torch.float32 or draft == "tiny-draft":  # a model that drafts may have a dtype of its own
            assert stock.generate(**prompt, **common, custom_generate=by_hand).equal(expected)
            continue
        with pytest.raises(ValueError, match=r"^draft: is torch.float32 on cpu, expected torch.float64 on cpu"):
            stock.generate(**prompt, **common, custom_generate=by_hand)


@pytest.mark.parametrize(
    "options",
    [
        {"draft": "tiny", "plan": TreePlan(3, 2, 6), "ngram": True, "draft_window": 16, "coupled": False},
        {"draft": "tiny", "method": "eagle2", "plan": "chain:3"},
        {"draft": "tiny", "plan": "chain:3", "rope_theta": 20000.0},
        {"draft": None, "method": "ngram"},
    ],
)
def test_drop_in_takes_drafting_options(tiny_and_head: tuple[Any, Any, Any], options: dict[str, Any]) -> None:
    stock, tokenizer, _ = tiny_and_head
    prompt = tokenizer("def main(args):", return_tensors="pt")
    common = {"max_new_tokens": 12, "do_sample": False}
    fast = stock.generate(**prompt, **common, custom_generate=draftwing.custom_generate(**options))
    assert fast.equal(stock.generate(**prompt, **common))


def test_drop_in_names_a_wrong_option(heads: dict[str, DraftNetwork]) -> None:
    with pytest.raises(ValueError, match="draft_windw: unknown key; did you mean 'draft_window'"):
        draftwing.custom_generate("tiny", draft_windw=8)
    with pytest.raises(ValueError, match="rope_theta: for a draft that is loaded by its name"):
        draftwing.custom_generate(heads["eagle3"], rope_theta=1.0)
    generate = draftwing.custom_generate(heads["eagle3"], draft_window=0)  # reaches the drafter
    with pytest.raises(ValueError, match="draft_window"):
        tiny_llama().generate(torch.tensor([[1, 2]]), max_new_tokens=4, pad_token_id=0, custom_generate=generate)


def test_a_batchs_row_is_the_row_alone_with_its_own_seed(model: SpeculativeModel) -> None:
    """And runs whose seeds are neighbours have no row in common."""
    ids, common = [5, 6, 7], {"max_new_tokens": 16, "temperature": 1.5}
    rows = {}
    for seed in (0, 1, 2):
        batch = model.start([ids] * 3, seed=seed, **common).run()
        for row, output in enumerate(batch.outputs):
            rows[seed, row] = output.tokens
            (alone,) = model.start([ids], seed=row_seed(seed, row), **common).run().outputs
            assert alone.tokens == output.tokens
    assert row_seed(7, 0) == 7
    assert len({tuple(tokens) for tokens in rows.values()}) == 9
    seeds = [row_seed(seed, row) for seed in (0, 1, 2**31 - 1, 2**32 - 1) for row in range(100)]
    assert len(set(seeds)) == 400
    assert 0 <= row_seed(2**63 - 1, 3) < 2**63


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("plain", {"ngram": True}, "ngram: merges into EAGLE trees; the method is plain"),
        ("plain", {"draft_window": 4}, "draft_window: .* the method is plain"),
        ("plain", {"coupled": False}, "coupled: .* the method is plain"),
        ("plain", {"plan": "chain:3"}, "plan: plain drafts nothing"),
        ("plain", {"plan": "chain"}, "plan: expected off, "),
        ("ngram", {"ngram": True}, "ngram: .* the method is ngram"),
        ("ngram", {"coupled": False}, "coupled: .* the method is ngram"),
        ("ngram", {"plan": "tree:2x2x3"}, "plan: n-gram drafting has one continuation"),
        ("lookahead", {"coupled": False}, "coupled: .* the method is lookahead"),
        ("lookahead", {"plan": "chain:3"}, "plan: plans lookahead:WxNxG are for the method lookahead"),
        ("eagle3", {"plan": "lookahead:3x3x3"}, "plan: plans lookahead:WxNxG are for the method lookahead"),
    ],
)
def test_a_drafting_option_without_a_use_is_refused(
    model: SpeculativeModel, method: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.with_method(method).generate(torch.tensor([[1, 2, 3]]), **options)


@pytest.mark.parametrize("plan", [None, "auto", "off"])
def test_plain_decoding_takes_the_plans_that_leave_it_plain(model: SpeculativeModel, plan: str | None) -> None:
    plain = model.with_method("plain").start([[1, 2, 3]], plan=plan, max_new_tokens=4, ngram=False).run()
    assert plain.statistics.acceptance_length == 1


def test_a_plan_is_no_deeper_than_what_is_asked_for(model: SpeculativeModel) -> None:
    deep, fit = (model.start([[1, 2, 3]], plan=plan, max_new_tokens=8).run() for plan in ("chain:1000", "chain:8"))
    assert deep.outputs[0].tokens == fit.outputs[0].tokens
    assert deep.statistics.reached_at == fit.statistics.reached_at


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(0, 3, dtype=torch.int64), "input_ids: expected at least one prompt"),
        (torch.ones(1, 250, dtype=torch.int64), "max_new_tokens: prompt 0 has 250 tokens"),
        (torch.tensor([[VOCAB_SIZE]]), "input_ids: prompt 0 has ids outside"),
    ],
)
def test_prompts_are_looked_at_before_costs_are_measured(
    model: SpeculativeModel, monkeypatch: pytest.MonkeyPatch, ids: torch.Tensor, message: str
) -> None:
    monkeypatch.setattr(SpeculativeModel, "costs", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(ValueError, match=message):
        model.generate(ids, plan="auto", max_new_tokens=16)


def test_options_of_a_head_without_a_head_are_refused() -> None:
    for options in ({}, {"draft": "tiny", "method": "plain"}):
        with pytest.raises(ValueError, match="aux_layers, norm_output: for a draft head, and no draft is loaded"):
            draftwing.load("no/such/target", aux_layers=(1, 2, 3), norm_output=True, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**70}, r"seed: expected an integer from 0 to 2\^63-1"),
        ({"seed": []}, "seed: expected one per row, got 0 for 1 rows"),
        ({"seed": [1, 2]}, "seed: expected one per row, got 2 for 1 rows"),
        ({"eos_token_id": "a"}, "eos_token_id: expected ids from 0 to 63, got 'a'"),
        ({"eos_token_id": [3, VOCAB_SIZE]}, "eos_token_id: expected ids from 0 to 63, got 64"),
        ({"eos_token_id": -3}, "eos_token_id: expected ids from 0 to 63, got -3"),
        ({"seed": None}, "seed: expected an integer or one per row, got None"),
        ({"max_new_tokens": 2.5}, "max_new_tokens: expected an integer of at least 1, got 2.5"),
        ({"eos_token_id": torch.tensor(2)}, "eos_token_id: expected a token id or several"),
        ({"stop": 3}, "stop: expected a string or several, got 3"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias: expected token ids as keys, got 'a'"),
        ({"logit_bias": {7: "a"}}, r"logit_bias\[7\]: expected a number below infinity, got 'a'"),
        ({"logit_bias": [(7, 1.0)]}, "logit_bias: expected token ids with what is added"),
        ({"do_sample": "yes"}, "do_sample: expected True or False, got 'yes'"),
        ({"coupled": 3}, "coupled: expected True or False, got 3"),
        ({"plan": 3}, "plan: expected a plan's name or a TreePlan, got 3"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 255}, "max_new_tokens.*256 positions"),
        ({"logit_bias": {VOCAB_SIZE: 1.0}}, "logit_bias"),
        ({"stop": ["x"]}, "stop.*tokenizer"),
        ({"plan": "tree:3"}, "plan"),
        ({"temperatur": 1.0}, "temperatur"),
    ],
)
def test_bad_options_name_the_field(model: SpeculativeModel, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(torch.tensor([[1, 2, 3]]), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), None, "prompt 0 is empty"),
        (torch.tensor([[1, 2]]), torch.tensor([[0, 0]]), "prompt 0 is empty"),
        (torch.zeros(0, 3, dtype=torch.int64), None, "input_ids: expected at least one prompt"),
        (torch.zeros(1, 1, 2, dtype=torch.int64), None, r"input_ids: expected shape \[B, S\], got \[1, 1, 2\]"),
        ([], None, "prompt 0 is empty"),
        ([[1, 2], [3]], None, r"input_ids: expected numbers in rows of one length \[B, S\], got"),
        ("some text", None, "input_ids: expected numbers in rows"),
        (["some", "text"], None, "input_ids: expected numbers in rows"),
        (torch.tensor([[1.0]]), None, "input_ids: expected token ids"),
        (torch.tensor([[True]]), None, "input_ids: expected token ids"),
        ({"attention_mask": [1]}, None, "input_ids: missing"),
        ({"input_ids": [1], "token_type_ids": [0]}, None, "token_type_ids: unknown key"),
        (torch.tensor([[1, 2]]), torch.tensor([[1]]), "attention_mask"),
        (torch.tensor([[VOCAB_SIZE]]), None, "outside the vocabulary"),
    ],
)
def test_bad_prompts_name_the_field(
    model: SpeculativeModel, ids: torch.Tensor, mask: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(ids, mask)


def test_prompts_come_as_a_tokenizer_gives_them(model: SpeculativeModel, prompts: list[list[int]]) -> None:
    """Tensors or lists, one row or several, alone or with their mask in an encoding."""
    options: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": []}
    expected = model.generate(torch.tensor([[1, 2, 3]]), **options)
    assert isinstance(expected, torch.Tensor)
    encoding = BatchEncoding({"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1]})
    for ids in ([1, 2, 3], torch.tensor([1, 2, 3]), [[1, 2, 3]], encoding, encoding.convert_to_tensors("pt", True)):
        assert expected.equal(model.generate(ids, **options))  # type: ignore[arg-type]
    assert expected.equal(model.generate(**encoding, **options))  # type: ignore[arg-type]
    assert [token for step in model.stream(encoding, **options) for token in step.tokens[0]] == expected[0, 3:].tolist()
    ids, mask = padded(prompts, "left")
    both = model.generate(BatchEncoding({"input_ids": ids, "attention_mask": mask}), **options)
    assert isinstance(both, torch.Tensor)
    assert both.equal(model.generate(ids, mask, **options))  # type: ignore[arg-type]


def test_a_chat_is_generated_from(tiny_and_head: tuple[Any, Any, Any]) -> None:
    model = draftwing.load("tiny", draft="tiny")
    encoding = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "def f("}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    options: dict[str, Any] = {"max_new_tokens": 6, "plan": "chain:2"}
    expected = model.generate(encoding["input_ids"], **options)
    assert isinstance(expected, torch.Tensor)
    assert expected.equal(model.generate(encoding, **options))  # type: ignore[arg-type]
    assert expected.equal(model.generate(**encoding, **options))  # type: ignore[arg-type]


def test_options_that_are_none_are_neutral(model: SpeculativeModel) -> None:
    neutral = {name: None for name, value in vars(GenerateOptions()).items() if name not in ("max_new_tokens", "seed")}
    plain = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=6)
    assert isinstance(plain, torch.Tensor)
    assert plain.equal(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=6, **neutral))  # type: ignore[arg-type]


@pytest.mark.parametrize("prompts", [torch.zeros(0, 3, dtype=torch.int64), torch.zeros(1, 0, dtype=torch.int64)])
def test_prompts_are_looked_at_before_anything_is_measured(
    model: SpeculativeModel, prompts: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SpeculativeModel, "costs", lambda *args, **kwargs: pytest.fail("costs were measured"))
    with pytest.raises(ValueError, match=r"^input_ids"):
        model.generate(prompts)


def test_a_model_says_where_it_is(model: SpeculativeModel) -> None:
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float64)
    assert model.config is model.target.model.config
    assert model.to("cpu") is model.to(torch.float64) is model.to(device="cpu", dtype=torch.float64) is model
    for other in ("meta", torch.float32, "cuda:0"):
        with pytest.raises(ValueError, match=r"^to: the weights are laid out for cpu and torch.float64"):
            model.to(other)


def test_autocast_is_refused(model: SpeculativeModel, heads: dict[str, DraftNetwork]) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ValueError, match=r"^torch.autocast: not supported by draftwing"):
            model.generate([1, 2, 3])
        fast = draftwing.custom_generate(heads["eagle3"])
        with pytest.raises(ValueError, match=r"^torch.autocast: not supported by draftwing"):
            tiny_llama().generate(torch.tensor([[1, 2]]), max_new_tokens=2, pad_token_id=0, custom_generate=fast)


def test_positions_that_depend_on_the_length_are_refused() -> None:
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    )  # fmt: skip
    with pytest.raises(ValueError, match="'dynamic' positions"):
        TargetModel(LlamaForCausalLM(config))


def test_a_tree_may_reach_past_the_last_position() -> None:
    """Learned positions are a table; near its end, drafted nodes would index past it."""
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=32, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    target = TargetModel(GPT2LMHeadModel(config).double().eval())
    head = new_head(TrainConfig(objective="eagle1", output="", target="x"), target, []).double()
    ids = torch.tensor([[1, 2, 3]])
    options = {"max_new_tokens": 29, "eos_token_id": []}
    fast = SpeculativeModel(target, head).generate(ids, plan="tree:4x4x16", **options)
    assert isinstance(fast, torch.Tensor)
    assert fast.equal(SpeculativeModel(target).generate(ids, **options))


def test_a_draft_model_must_have_the_positions(target: TargetModel) -> None:
    """Up to its last position it drafts; beyond it would only guess, so that is refused."""
    model = SpeculativeModel(target, TargetModel(tiny_llama(seed=3, max_position_embeddings=32), role="draft"))
    ids = torch.tensor([[1, 2, 3]])
    fast = model.generate(ids, max_new_tokens=29, eos_token_id=[], plan="tree:4x4x16")
    plain = model.with_method("plain").generate(ids, max_new_tokens=29, eos_token_id=[])
    assert isinstance(fast, torch.Tensor)
    assert fast.tolist() == plain.tolist()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"max_new_tokens: .* 33 .* the draft model's 32 positions"):
        model.generate(ids, max_new_tokens=30)


def test_a_vocabulary_that_is_padded_differently_is_the_same(tmp_path: Path) -> None:
    """The tokenizers tell: the draft's further ids are padding of its embedding, and are never drafted."""
    small = tiny_llama(vocab_size=4160, num_hidden_layers=1)
    small.save_pretrained(tmp_path)
    draftwing.load("tiny").tokenizer.save_pretrained(tmp_path)
    model = draftwing.load("tiny", draft=str(tmp_path), dtype="float64")
    assert (model.method, model.target.vocab_size) == ("draft_model", 4096)
    prompt = model.tokenizer("def f(", return_tensors="pt")
    fast, plain = (
        each.generate(**prompt, max_new_tokens=8, temperature=1.0) for each in (model, model.with_method("plain"))
    )
    assert fast.tolist() == plain.tolist()  # type: ignore[union-attr]


def test_drop_in_with_a_draft_model(draft_model: TargetModel) -> None:
    stock, ids = tiny_llama(), torch.tensor([[5, 6, 7], [1, 8, 9]])
    common = {"max_new_tokens": 12, "eos_token_id": EOS, "pad_token_id": 0, "do_sample": False}
    fast = stock.generate(ids, custom_generate=draftwing.custom_generate(draft_model), **common)
    assert fast.tolist() == stock.generate(ids, **common).tolist()


def test_an_unknown_device_is_named() -> None:
    with pytest.raises(ValueError, match="device: 'warp'"):
        draftwing.load("tiny", device="warp")


def test_load_names_what_was_meant() -> None:
    with pytest.raises(ValueError, match="drafts: unknown key; did you mean 'draft'"):
        draftwing.load("tiny", drafts="tiny")
    with pytest.raises(ValueError, match=r"target: expected a name, got LlamaForCausalLM; .*custom_generate"):
        draftwing.load(tiny_llama())  # type: ignore[arg-type]


def test_a_method_must_suit_its_head(model: SpeculativeModel, target: TargetModel) -> None:
    with pytest.raises(ValueError, match="EAGLE-3"):
        model.with_method("eagle1")
    with pytest.raises(ValueError, match="needs a draft head"):
        SpeculativeModel(target, None, method="eagle3")
    with pytest.raises(ValueError, match="expected one of"):
        model.with_method("hydra")
    with pytest.raises(ValueError, match="medusa cannot use this draft, which is an EAGLE-3 head"):
        model.with_method("medusa")


def test_medusa_heads_draft(target: TargetModel, medusa_heads: MedusaModel) -> None:
    """By the paper's tree, which is cut to the heads, and by trees that size themselves."""
    model, ids = SpeculativeModel(target, medusa_heads), torch.tensor([[1, 2, 3]])
    plain = model.with_method("plain").generate(ids, max_new_tokens=20)
    assert model.method == "medusa"
    assert isinstance(plain, torch.Tensor)
    for plan in (None, "auto", "tree:4x8x40"):
        output = model.generate(ids, max_new_tokens=20, plan=plan, return_dict_in_generate=True)
        assert isinstance(output, GenerateOutput)
        assert output.sequences.equal(plain)
        assert len(output.statistics.acceptance_rate) <= len(medusa_heads)


def test_lookahead_needs_no_draft(model: SpeculativeModel, target: TargetModel) -> None:
    ids = torch.tensor([[1, 2, 3], [4, 4, 5]])
    plain = SpeculativeModel(target).generate(ids, max_new_tokens=20)
    assert isinstance(plain, torch.Tensor)
    for method in (model.with_method("lookahead"), SpeculativeModel(target, method="lookahead")):
        for plan in (None, "auto", "off", "lookahead:3x3x3"):
            assert plain.equal(method.generate(ids, max_new_tokens=20, plan=plan))
    with pytest.raises(ValueError, match="lookahead:WxNxG are for the method lookahead"):
        model.generate(ids, plan="lookahead:3x3x3")


def test_drafts_that_are_not_embedded_yet_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from draftwing.drafts import load_draft

    missing = {name: tmp_path / name for name in load_draft.EMBEDDED_DRAFTS}
    monkeypatch.setattr(load_draft, "EMBEDDED_DRAFTS", missing)
    for name, method in (("tiny-medusa", "medusa"), ("tiny-draft", "draft_model")):
        with pytest.raises(ValueError, match=f"draft: {name} is not part of this installation"):
            draftwing.load("tiny", draft="tiny", method=method)


def test_ngram_needs_no_head_and_joins_one(model: SpeculativeModel, target: TargetModel) -> None:
    ids = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4, 1, 2]])
    plain = SpeculativeModel(target).generate(ids, max_new_tokens=20)
    assert isinstance(plain, torch.Tensor)
    assert plain.equal(SpeculativeModel(target, method="ngram").generate(ids, max_new_tokens=20))
    assert plain.equal(model.generate(ids, max_new_tokens=20, ngram=True, draft_window=8))
    with pytest.raises(ValueError, match="draft_window"):
        model.generate(ids, draft_window=0)
    with pytest.raises(ValueError, match="takes chain:DEPTH"):
        SpeculativeModel(target, method="ngram").generate(ids, plan="tree:2x3x7")
    for setting in ({"ngram": True}, {"draft_window": 8}):  # what would be ignored is refused
        with pytest.raises(ValueError, match="the method is plain"):
            SpeculativeModel(target).generate(ids, **setting)


def test_lookups_compete_where_trees_size_themselves(model: SpeculativeModel, target: TargetModel) -> None:
    """Unless they are turned off, and elsewhere if they are asked for; methods without EAGLE trees have none."""

    def looks_up(model: SpeculativeModel, **options: Any) -> bool:
        return model._planner.looks_up(GenerateOptions(**options))

    assert looks_up(model) and looks_up(model, plan="auto")
    assert not looks_up(model, ngram=False)
    assert not looks_up(model, plan="tree:4x4x16") and looks_up(model, plan="tree:4x4x16", ngram=True)
    assert not looks_up(model.with_method("plain"))
    ids = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4, 1, 2]])
    plain = SpeculativeModel(target).generate(ids, max_new_tokens=20)
    assert isinstance(plain, torch.Tensor)
    for options in ({"plan": "auto"}, {"plan": "auto", "ngram": False}, {"plan": "tree:2x3x7", "ngram": True}):
        assert plain.equal(model.generate(ids, max_new_tokens=20, **options))


def test_a_fixed_plan_does_the_same_again(model: SpeculativeModel) -> None:
    """Its lookups' pauses are those of one generation, so that what came before changes no count."""
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    options: dict[str, Any] = {"plan": "tree:2x2x6", "ngram": True, "max_new_tokens": 60, "temperature": 1.5}

    def counts() -> tuple[int, list[int], list[int]]:
        figures = model.start(ids.tolist(), **options).run().statistics
        return figures.num_cycles, figures.accepted_at, figures.reached_at

    assert counts() == counts() == counts()


def test_measured_costs_belong_to_one_kind_of_pass(
    target: TargetModel, heads: dict[str, DraftNetwork], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's own model has another attention than what `load` makes, and other seconds."""
    keys: list[str] = []
    monkeypatch.setattr(
        "draftwing.plans.planner.cached_costs", lambda key, *_: keys.append(json.dumps(key, default=str))
    )
    for _ in range(2):
        SpeculativeModel(target, heads["eagle3"]).costs(1)
    assert keys[0] == keys[1]
    monkeypatch.setattr(target.model.config, "_attn_implementation", "sdpa")
    SpeculativeModel(target, heads["eagle3"]).costs(1)
    assert keys[2] != keys[0]
    SpeculativeModel(target, heads["eagle3"]).costs(1, sampled=True)
    assert keys[3] != keys[2]
    monkeypatch.setattr("draftwing.plans.costs.num_threads", lambda: 7)
    SpeculativeModel(target, heads["eagle3"]).costs(1, sampled=True)
    assert keys[4] != keys[3], "and to a number of threads"


@pytest.mark.parametrize(
    ("factor", "are_shared", "is_renewed"),
    [(1.0, False, False), (100.0, False, True), (100.0, True, True), (0.01, False, True), (0.01, True, False)],
)
def test_costs_of_another_machine_are_measured_anew(
    target: TargetModel,
    heads: dict[str, DraftNetwork],
    monkeypatch: pytest.MonkeyPatch,
    factor: float,
    are_shared: bool,
    is_renewed: bool,
) -> None:
    """Where a text's cycles took much less or more than was measured; more not while others use the cores."""
    asked: list[bool] = []
    model = SpeculativeModel(target, heads["eagle3"])
    monkeypatch.setattr("draftwing.plans.lessons.WATCHED_CYCLES", 10)
    monkeypatch.setattr(
        "draftwing.plans.planner.cached_costs", lambda key, measure, since: asked.append(since > 0) or invented
    )
    monkeypatch.setattr("draftwing.plans.lessons.free_cores", lambda: SimpleNamespace(are_shared=are_shared))
    invented = costs()
    for _ in range(3):
        generation = model.start([[1, 2, 3]], plan="auto", max_new_tokens=80)
        assert generation.run().statistics.num_cycles >= 10
        plan, _ = model._lessons.watched[1, False]
        for stage in generation.statistics.seconds:  # what it took is invented too
            generation.statistics.seconds[stage] = plan.expected_seconds / factor / 4
        generation.statistics.seconds["prefill"] = 1e9
    assert asked == [False, True][: 1 + is_renewed], "once is enough"


def test_a_few_cycles_say_nothing_of_the_machine(target: TargetModel, heads: dict[str, DraftNetwork]) -> None:
    model = SpeculativeModel(target, heads["eagle3"])
    model._lessons.costs[1, False] = costs(plain=1e6)
    model.generate(torch.tensor([[1, 2, 3]]), plan="auto", max_new_tokens=8)
    assert not model._lessons.are_outdated((1, False))


def test_cycles_without_drafts_say_nothing_of_the_machine(
    target: TargetModel, heads: dict[str, DraftNetwork], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan that is never asked expects no seconds."""
    monkeypatch.setattr("draftwing.plans.lessons.WATCHED_CYCLES", 10)
    model = SpeculativeModel(target, heads["eagle3"])
    model._lessons.costs[1, False] = costs()
    (request,) = requests_for([[1, 2, 3]], max_new_tokens=40, eos=())
    model.start_requests([replace(request, drafts=False)], GenerateOptions(plan="auto")).run()
    assert not model._lessons.are_outdated((1, False))
