"""Answers by our own engine: turn after turn, the target's own tokens, the same with and without drafting."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ngram, no_draft, tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from draftwing.config import TrainConfig
from draftwing.data.chat_template import encode_conversation, encode_row
from draftwing.engine.engine import NewDrafter, Request
from draftwing.engine.generation import Generation, start_generation
from draftwing.engine.tree_plan import TreePlan
from draftwing.prepare.self_generated import EngineAnswers, RunPart, StartGeneration, read_questions, regenerate
from draftwing.target.model import TargetModel
from draftwing.training.train_language_model import CHAT_TEMPLATE, train_tokenizer


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


def engine(
    target: TargetModel, drafter: NewDrafter = no_draft, plan: str = "off", end: int | None = None
) -> StartGeneration:
    """An engine whose target says the token `end` often, at temperatures around 1."""

    def start(requests: Sequence[Request]) -> Generation:
        if end is not None:
            requests = [
                replace(
                    request, sampling=replace(request.sampling, logit_bias={**request.sampling.logit_bias, end: 4.0})
                )
                for request in requests
            ]
        return start_generation(target, requests, drafter, TreePlan.parse(plan))

    return start


def answer(
    config: TrainConfig,
    tokenizer: Any,
    start: StartGeneration,
    eos: tuple[int, ...],
    shard: RunPart | None = None,
    vocab_size: int | None = None,
) -> list[dict[str, Any]]:
    regenerate(config, tokenizer, EngineAnswers(config, tokenizer, start, eos, vocab_size or len(tokenizer)), shard)
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
    for row in rows:
        start, stop = spans(row["loss_mask"])[-1]
        assert stop == len(row["input_ids"]), "a row ends with an answer"
        ids = torch.tensor([row["input_ids"][:start]])
        expected = talker.model.generate(
            ids, max_new_tokens=10, do_sample=False, eos_token_id=list(eos), pad_token_id=0
        )
        assert expected[0].tolist() == row["input_ids"]
    assert {len(row["input_ids"]) - sum(row["loss_mask"]) == 20 for row in rows} == {True, False}, "texts and chats"


def with_warm_turns(config: TrainConfig) -> TrainConfig:
    return TrainConfig(**config.as_dict() | {"temperatures": (1.0, 1.3), "sequence_length": 200})


def test_every_turn_has_the_very_tokens_that_were_chosen(
    config: TrainConfig, tokenizer: PreTrainedTokenizerFast, talker: TargetModel
) -> None:
    """A random target says bytes that are no text: decoded and tokenised again they would be others."""
    end, heard = tokenizer.eos_token_id, list[tuple[list[int], list[int]]]()
    start = engine(talker, end=end)

    def listen(requests: Sequence[Request]) -> Generation:
        generation = start(requests).run()
        heard.extend((list(r.prompt), out.tokens) for r, out in zip(requests, generation.outputs, strict=True))
        return generation

    rows = answer(with_warm_turns(config), tokenizer, listen, (end,))
    both = [row for row in rows if len(spans(row["loss_mask"])) == 2]
    assert both
    for row in rows:
        for first, stop in spans(row["loss_mask"]):
            assert (row["input_ids"][:first], row["input_ids"][first:stop]) in heard
    for row in both:
        (_, stop), (second, _) = spans(row["loss_mask"])
        between = tokenizer.decode(row["input_ids"][stop:second])
        assert between == "\n<|user|>\ntwo<|end|>\n<|assistant|>\n"
        said = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        answers = [row["input_ids"][first:stop] for first, stop in spans(row["loss_mask"])]
        assert [text + "<|end|>" * (tokens[-1] == end) for text, tokens in zip(said, answers, strict=True)] == [
            tokenizer.decode(tokens) for tokens in answers
        ]
    # Sabotage: what tokenising their text again would have given.
    again = [encode_conversation(row["messages"], tokenizer)[0].input_ids.tolist() for row in both]
    assert all(row["input_ids"] != ids[: len(row["input_ids"])] for row, ids in zip(both, again, strict=True))


def test_rows_are_read_as_their_ids_and_answered_anew_as_their_text(
    config: TrainConfig, tokenizer: PreTrainedTokenizerFast, talker: TargetModel, tmp_path: Path
) -> None:
    rows = answer(
        with_warm_turns(config), tokenizer, engine(talker, end=tokenizer.eos_token_id), (tokenizer.eos_token_id,)
    )
    for row in rows:
        (example,) = encode_row(row, tokenizer)
        assert example.input_ids.tolist() == row["input_ids"]
        assert ("messages" in row) != ("text" in row)
        assert row["text"] == tokenizer.decode(row["input_ids"], skip_special_tokens=True) if "text" in row else True
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if "messages" in row), encoding="utf-8")
    prompts, counts = read_questions(replace(config, data=str(path), output=str(tmp_path / "again.jsonl")), tokenizer)
    assert len(prompts) == 6
    assert counts["rejected"] == 0


def test_an_answer_that_ends_otherwise_than_the_template_writes_is_the_last(
    config: TrainConfig, tokenizer: PreTrainedTokenizerFast, talker: TargetModel
) -> None:
    other = tokenizer.pad_token_id  # <|endoftext|>
    rows = answer(with_warm_turns(config), tokenizer, engine(talker, end=other), (other,))
    assert {len(spans(row["loss_mask"])) for row in rows} == {1}
    assert any(row["input_ids"][-1] == other for row in rows)


def test_an_answer_that_the_template_refuses_is_the_last(
    config: TrainConfig, tokenizer: PreTrainedTokenizerFast, talker: TargetModel
) -> None:
    template = "{% if messages[1] is defined and messages[1].content != 'old' %}{{ raise_exception('no') }}{% endif %}"
    strict = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, chat_template=template + CHAT_TEMPLATE
    )
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    rows = answer(with_warm_turns(config), strict, engine(talker, end=end), (end,))
    assert {len(spans(row["loss_mask"])) for row in rows} == {1}


def test_templates_with_spaces_around_answers_and_tokenizers_that_eat_them(config: TrainConfig) -> None:
    """Llama 2's and Mistral's: the target says the space that the template writes before an answer."""
    words = ["<s>", "</s>", "[INST]", "[/INST]", "▁old", "▁one", "▁two", "▁!", "▁", *"0123456789", "▁too", "!", "▁yes"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="▁"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.add_special_tokens(["<s>", "</s>", "[INST]", "[/INST]"])
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
    )
    eating = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, eos_token="</s>")
    target = TargetModel(tiny_llama(vocab_size=len(words)))
    rows = answer(with_warm_turns(config), eating, engine(target, end=1), (1,))
    both = [row for row in rows if len(spans(row["loss_mask"])) == 2]
    assert both
    for row in both:
        (_, stop), (second, _) = spans(row["loss_mask"])
        assert [words[token] for token in row["input_ids"][stop:second]] == ["<s>", "[INST]", "▁two", "▁", "[/INST]"]


def test_tools_are_in_the_prompt_and_in_the_row(
    config: TrainConfig, tokenizer: PreTrainedTokenizerFast, talker: TargetModel
) -> None:
    telling = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, chat_template="{{ tools | tojson }}\n" + CHAT_TEMPLATE
    )
    tool = {"type": "function", "function": {"name": "add"}}
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    rows = [{"messages": messages, "tools": tools} for tools in ([tool], json.dumps([tool["function"]]))]
    Path(str(config.data)).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for row in answer(config, telling, engine(talker), eos=()):
        assert row["tools"] == [tool]
        first = spans(row["loss_mask"])[0][0]
        told = '[{"type": "function", "function": {"name": "add"}}]\n'
        assert telling.decode(row["input_ids"][:first]) == told + "<|user|>\none<|end|>\n<|assistant|>\n"


class TestVocabularies:
    def test_padding_is_never_chosen(
        self, config: TrainConfig, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Most ids of this target are no tokens; it would say them."""
        padded = TargetModel(tiny_llama(vocab_size=5 * len(tokenizer)))
        rows = answer(config, tokenizer, engine(padded), (), vocab_size=padded.vocab_size)
        assert max(token for row in rows for token in row["input_ids"]) < len(tokenizer)
        assert all(len(encode_row(row, tokenizer)[0]) == len(row["input_ids"]) for row in rows)
        error = " ".join(capsys.readouterr().err.split())
        assert f"{4 * len(tokenizer)} of the target's {5 * len(tokenizer)} ids are no tokens of its tokenizer" in error
        unaware = answer(config, tokenizer, engine(padded), ())  # sabotage: told of no padding
        assert max(token for row in unaware for token in row["input_ids"]) >= len(tokenizer)

    def test_a_prompt_that_the_target_cannot_read_becomes_a_row_that_says_so(
        self, config: TrainConfig, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        small = TargetModel(tiny_llama(vocab_size=200))
        rows = answer(config, tokenizer, engine(small), (), vocab_size=200)
        assert any(row.get("error", "").startswith("the prompt has the id 2") for row in rows)


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
    parts = [answer(config, tokenizer, engine(talker), eos, RunPart(number, 2)) for number in (1, 2)]
    assert [parts[n % 2][n // 2] for n in range(len(whole))] == whole


CALL = {"function": {"name": "add"}}


def test_rows_that_give_no_prompt_are_counted(config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    with Path(str(config.data)).open("a", encoding="utf-8") as file:
        for row in (
            {"text": "one"},
            {"messages": [{"role": "user", "content": "one"}]},
            {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "tool_calls": [CALL]}]},
            {"messages": [{"role": "user", "content": "one " * 99}, {"role": "assistant", "content": "two"}]},
            {"text": "one two three " * 20},
            {"input_ids": [5, 6, 7]},
        ):
            file.write(json.dumps(row) + "\n")
    prompts, counts = read_questions(config, tokenizer)
    assert counts == {"rejected": 4, "too_long": 1}
    assert [prompt.number for prompt in prompts] == list(range(len(prompts)))
    rejects = Path(config.output).with_suffix(".rejects.jsonl").read_text(encoding="utf-8")
    reasons = ["leave nothing to say after a prompt of 20", "no assistant turn", "nobody runs the tools"]
    for reason in [*reasons, "input_ids: token ids cannot be regenerated"]:
        assert reason in rejects


def test_data_without_any_prompt_is_an_error(config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    short = TrainConfig(**config.as_dict() | {"sequence_length": 4, "prompt_length": 3})
    with pytest.raises(ValueError, match="has no prompt of at most 2 tokens"):
        read_questions(short, tokenizer)
