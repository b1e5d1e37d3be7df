"""A grammar's row has the tokens of a loop that masks one step at a time, beside ordinary rows in one batch."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import EOS, VOCAB_SIZE, generate, no_draft, requests_for, run, tiny_llama
from tape import TapeRecorder

from draftwing.engine import grammar as grammar_module
from draftwing.engine.engine import Engine, NewDrafter, Request
from draftwing.engine.noise import gumbel
from draftwing.engine.tree_plan import TreePlan
from draftwing.target.model import TargetModel

PROMPTS = [[1, 2, 3, 4, 5], [7], [9, 8, 7, 6]]


def odd_after_even(said: list[int]) -> torch.Tensor | None:
    """Odd and even tokens take turns, and a text of 8 may end, one of 12 must; anything goes after a 7."""
    assert EOS not in said, "nothing is asked behind an end"
    assert all(1 <= token < VOCAB_SIZE for token in said)
    if said and said[-1] == 7:
        return None
    mask = torch.arange(VOCAB_SIZE) % 2 == (said[-1] + 1) % 2 if said else torch.ones(VOCAB_SIZE, dtype=torch.bool)
    mask[0], mask[EOS] = False, len(said) >= 8
    if len(said) >= 12:
        mask[:] = torch.arange(VOCAB_SIZE) == EOS
    return mask


def constrained(temperature: float) -> list[Request]:
    """Some rows with a grammar, one without, one with penalties as well."""
    requests = requests_for(PROMPTS, temperature=temperature)
    with_penalty = replace(requests[2].sampling, frequency_penalty=1.0)
    return [
        replace(requests[0], allowed=odd_after_even),
        requests[1],
        replace(requests[2], sampling=with_penalty, allowed=odd_after_even),
    ]


@torch.inference_mode()
def by_hand(target: TargetModel, request: Request) -> list[int]:
    said: list[int] = []
    while len(said) < request.stop.max_new_tokens and EOS not in said:
        text = [*request.prompt, *said]
        scores = target.model(torch.tensor([text])).logits[0, -1]
        for token in said:
            scores[token] -= request.sampling.frequency_penalty
        mask = None if request.allowed is None else request.allowed(said)
        scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
        if request.sampling.temperature > 0:
            seed, position = torch.tensor(request.sampling.seed), torch.tensor([len(text)])
            scores = scores / request.sampling.temperature + gumbel(seed, position, torch.arange(len(scores)))[0]
        said.append(int(scores.argmax()))
    return said


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("method", ["eagle3", "draft_model"])
def test_tokens_are_the_loops(
    target: TargetModel, drafters: dict[str, NewDrafter], method: str, temperature: float
) -> None:
    requests = constrained(temperature)
    expected = [by_hand(target, request) for request in requests]
    assert run(target, requests) == expected
    for recorder in (None, TapeRecorder()):
        outputs = generate(target, requests, drafters[method], "tree:4x4x16", recorder=recorder, num_seats=2).outputs
        assert [seat.tokens for seat in outputs] == expected


@pytest.mark.parametrize("wrong", [torch.zeros(VOCAB_SIZE, dtype=torch.bool), torch.ones(3, dtype=torch.bool), "x"])
def test_a_grammar_that_fails_ends_its_row_alone(
    target: TargetModel, drafters: dict[str, NewDrafter], wrong: Any
) -> None:
    good, bad = constrained(0.0)[:2]
    bad = replace(bad, allowed=lambda said: None if len(said) < 3 else wrong)
    engine = Engine(target, drafters["eagle3"], 2, 64, TreePlan.chain(3))
    seats = [engine.admit(request) for request in (bad, good)]
    while not all(seat.finish_reason for seat in seats):
        engine.step()
    assert seats[0].finish_reason == "error" and isinstance(seats[0].error, ValueError | AttributeError)
    assert seats[1].tokens == by_hand(target, good)


@pytest.mark.parametrize("reached", [False, True])
def test_what_fails_at_a_draft_that_is_not_taken_is_nobodys_error(
    target: TargetModel, drafters: dict[str, NewDrafter], reached: bool
) -> None:
    (request,) = requests_for(PROMPTS[:1], eos=(), max_new_tokens=12)
    (expected,) = run(target, [request])
    failed = list[list[int]]()

    def allowed(said: list[int]) -> None:
        if said != expected[: len(said)] or (reached and len(said) == 6):
            failed.append(said)
            raise ValueError("nobody goes here")

    engine = Engine(target, drafters["eagle3"], 1, 64, TreePlan.parse("tree:4x4x16"))
    seat = engine.admit(replace(request, allowed=allowed))
    assert seat is not None
    while not seat.finish_reason:
        engine.step()
    assert failed, "drafts beside the text are asked about"
    assert (seat.finish_reason, bool(seat.error)) == (("error", True) if reached else ("length", False))
    assert seat.tokens == expected[: len(seat.tokens)]
    assert reached or seat.tokens == expected


def test_what_fails_behind_the_end_is_nobodys_error(target: TargetModel, drafters: dict[str, NewDrafter]) -> None:
    """A draft goes on behind the last token that is asked for; plain decoding would not ask there."""
    (request,) = requests_for(PROMPTS[:1], eos=(), max_new_tokens=12)
    (expected,) = run(target, [request])

    def allowed(said: list[int]) -> None:
        if len(said) >= 6:
            raise ValueError("behind the end")

    short = replace(request, allowed=allowed, stop=replace(request.stop, max_new_tokens=6))
    for name, drafter in drafters.items():
        engine = Engine(target, drafter, 1, 64, TreePlan.chain(4 if name != "medusa" else 3))
        seat = engine.admit(short)
        assert seat is not None
        while not seat.finish_reason:
            engine.step()
        assert (seat.finish_reason, seat.tokens) == ("length", expected[:6])


def test_a_prompt_that_is_still_read_asks_nothing() -> None:
    """Beside recorded cycles, whose seats go beyond the running ones."""
    target = TargetModel(tiny_llama(max_position_embeddings=1024, num_hidden_layers=1))
    engine = Engine(target, no_draft, 4, 900, TreePlan.off(), TapeRecorder())
    running = requests_for([[1, 2, 3], [4, 5], [6, 7, 8]], eos=(), max_new_tokens=20)
    (long,) = requests_for([[1 + index % 60 for index in range(700)]], eos=(), max_new_tokens=5, temperature=1.0)
    long = replace(long, allowed=lambda said: torch.arange(VOCAB_SIZE) % 2 == 1)
    seats = [engine.admit(request) for request in running]
    engine.step()
    seats.append(engine.admit(long))
    while not all(seat.finish_reason for seat in seats if seat is not None):
        engine.step()
    assert [seat.tokens for seat in seats if seat is not None] == run(target, [*running, long])


def ask_the_root_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """All nodes of a tree get the root's mask, as if their prefix were its."""
    masks = grammar_module.Grammar.masks
    monkeypatch.setattr(
        grammar_module.Grammar, "masks", lambda *arguments: masks(*arguments)[:1].expand(arguments[1].num_nodes, -1)
    )


def ask_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("draftwing.engine.sampling.forbid", lambda scores, *_: scores)


@pytest.mark.parametrize("sabotage", [ask_the_root_alone, ask_nothing])
def test_sabotage_is_noticed(
    target: TargetModel,
    drafters: dict[str, NewDrafter],
    sabotage: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests = constrained(0.8)
    expected = [by_hand(target, request) for request in requests]
    sabotage(monkeypatch)
    assert run(target, requests, drafters["draft_model"], "tree:4x4x16") != expected
