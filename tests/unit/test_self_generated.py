"""Answers by our own engine: turn after turn, the target's own tokens, the same with and without drafting."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ngram, no_draft, tiny_llama
from transformers import PreTrainedTokenizerFast

from draftwing.config import TrainConfig
from draftwing.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from draftwing.decoding.engine import NewDrafter, Request
from draftwing.decoding.generate import Generation, start_generation
from draftwing.decoding.plan import TreePlan
from draftwing.models.target import TargetModel
from draftwing.training.self_generated import EngineAnswers, Shard, StartGeneration, read_prompts, regenerate


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["one two three, one two three"] * 4, vocab_size=280)


@pytest.fixture(scope="module")
def talker(tokenizer: PreTrainedTokenizerFast) -> TargetModel:
    """A random target over the tokenizer's vocabulary."""
    return TargetModel(tiny_llama(vocab_size=len(tokenizer)))


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Conversations of one or two answers, and texts."""
    rows: list[dict[str, Any]] = []
    for n in range(6):
        turns = [("user", f"one {n}"), ("assistant", "old"), ("user", "two"), ("assistant", "old too"), ("user", "!")]
        turns = turns if n % 2 else turns[:2]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
        rows.append({"text": f"one two three {n} " * 12})
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return TrainConfig(
        "self_generated", str(tmp_path / "out.jsonl"), target="x", data=str(path), sequence_length=120,
        prompt_length=20, max_new_tokens=10, batch_size=4,
    )  # fmt: skip


def engine(target: TargetModel, drafter: NewDrafter = no_draft, plan: str = "off") -> StartGeneration:
    def start(requests: Sequence[Request]) -> Generation:
        return start_generation(target, requests, drafter, TreePlan.parse(plan))

    return start


def answer(
    config: TrainConfig, tokenizer: Any, start: StartGeneration, eos: tuple[int, ...], shard: Shard | None = None
) -> list[dict[str, Any]]:
    regenerate(config, tokenizer, EngineAnswers(config, tokenizer, start, eos), shard)
    rows = [json.loads(line) for line in Path(config.output).read_text(encoding="utf-8").splitlines()]
    Path(config.output).unlink()
    return rows


def common_end(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Ends that a random model says soon: a third of the vocabulary."""
    return tuple(range(1, len(tokenizer), 3))


def spans(mask: list[int]) -> list[tuple[int, int]]:
    """Where a mask is set."""
    edges = [i for i in range(len(mask) + 1) if (mask[i - 1] if i else 0) != (mask[i] if i < len(mask) else 0)]
    return list(zip(edges[::2], edges[1::2], strict=True))


def test_answers_are_what_the_target_says_after_its_prompt(
    config: TrainConfig, tokenizer: PreTrainedTokenizerFast, talker: TargetModel
) -> None:
    greedy = TrainConfig(**config.as_dict() | {"temperatures": (0.0,)})
    eos = common_end(tokenizer)
    rows = answer(greedy, tokenizer, engine(talker), eos)
    num_answers = []
    for row in rows:
        start, stop = spans(row["loss_mask"])[-1]
        assert stop == len(row["input_ids"]), "a row ends with an answer"
        ids = torch.tensor([row["input_ids"][:start]])
        expected = talker.model.generate(
            ids, max_new_tokens=10, do_sample=False, eos_token_id=list(eos), pad_token_id=0
        )
        assert expected[0].tolist() == row["input_ids"]
        num_answers.append(tokenizer.decode(row["input_ids"]).count("<|assistant|>"))
    assert {0, 1, 2} <= set(num_answers)


def test_a_second_turn_reads_the_first_ones_answer(
    config: TrainConfig, tokenizer: PreTrainedTokenizerFast, talker: TargetModel
) -> None:
    rows = answer(config, tokenizer, engine(talker), common_end(tokenizer))
    both = [row for row in rows if tokenizer.decode(row["input_ids"]).count("<|assistant|>") == 2]
    assert both
    for row in both:
        text = tokenizer.decode(row["input_ids"])
        assert "old" not in text
        assert "<|user|>\ntwo<|end|>\n<|assistant|>\n" in text
        assert "!" not in text.split("two")[1].split("<|assistant|>")[0]
        assert len(spans(row["loss_mask"])) == 2


def test_a_row_ends_before_its_answer_would_be_rewritten(
    config: TrainConfig, tokenizer: PreTrainedTokenizerFast, talker: TargetModel
) -> None:
    """One row cannot hold an answer both as it was said and as the template shows it later."""
    template = CHAT_TEMPLATE.replace(
        "{{ message.content }}", "{{ '...' if message.role == 'assistant' and not loop.last else message.content }}"
    )
    rewriting = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, chat_template=template)
    rows = answer(config, rewriting, engine(talker), common_end(tokenizer))
    assert {len(spans(row["loss_mask"])) for row in rows} == {1}


def test_an_answer_that_hits_the_limit_is_the_last(
    config: TrainConfig, tokenizer: PreTrainedTokenizerFast, talker: TargetModel
) -> None:
    rows = answer(config, tokenizer, engine(talker), eos=())
    assert {sum(row["loss_mask"]) for row in rows} == {10}


@pytest.mark.parametrize("plan", ["chain:4", "chain:2"])
def test_drafting_changes_no_row(
    config: TrainConfig, tokenizer: PreTrainedTokenizerFast, talker: TargetModel, plan: str
) -> None:
    eos = common_end(tokenizer)[:20]
    expected = answer(config, tokenizer, engine(talker), eos)
    assert answer(config, tokenizer, engine(talker, ngram, plan), eos) == expected
    hotter = TrainConfig(**config.as_dict() | {"seed": 1})
    assert answer(hotter, tokenizer, engine(talker), eos) != expected


def test_shards_are_the_whole(config: TrainConfig, tokenizer: PreTrainedTokenizerFast, talker: TargetModel) -> None:
    eos = common_end(tokenizer)
    whole = answer(config, tokenizer, engine(talker), eos)
    parts = [answer(config, tokenizer, engine(talker), eos, Shard(number, 2)) for number in (1, 2)]
    assert [parts[n % 2][n // 2] for n in range(len(whole))] == whole


def test_rows_that_give_no_prompt_are_counted(config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    with Path(str(config.data)).open("a", encoding="utf-8") as file:
        for row in (
            {"text": "one"},
            {"messages": [{"role": "user", "content": "one"}]},
            {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "", "tool_calls": [1]}]},
            {"messages": [{"role": "user", "content": "one " * 99}, {"role": "assistant", "content": "two"}]},
            {"text": "one two three " * 20},
            {"input_ids": [5, 6, 7]},
        ):
            file.write(json.dumps(row) + "\n")
    prompts, counts = read_prompts(config, tokenizer)
    assert counts == {"rejected": 4, "too_long": 1}
    assert [prompt.number for prompt in prompts] == list(range(len(prompts)))
    rejects = Path(config.output).with_suffix(".rejects.jsonl").read_text(encoding="utf-8")
    reasons = ["leave nothing to say after a prompt of 20", "no assistant turn", "nobody runs the tools"]
    for reason in [*reasons, "input_ids: token ids cannot be regenerated"]:
        assert reason in rejects


def test_data_without_any_prompt_is_an_error(config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    short = TrainConfig(**config.as_dict() | {"sequence_length": 4, "prompt_length": 3})
    with pytest.raises(ValueError, match="has no prompt of at most 2 tokens"):
        read_prompts(short, tokenizer)
