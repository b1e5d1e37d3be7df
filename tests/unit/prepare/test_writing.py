"""Rows that the target writes by itself: what it is asked for, in which order seats are taken, and what is dropped."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_llama

from draftwing.config import TrainConfig
from draftwing.engine.engine import Event, Request, Seat
from draftwing.engine.sampling import SamplingParams
from draftwing.engine.stopping import StopRule
from draftwing.prepare.from_target import AHEAD, MARK, Author, Dropped, in_order, loops, read_prefixes, user_turn
from draftwing.prepare.self_generated import EngineAnswers
from draftwing.target.model import TargetModel
from draftwing.training.train_language_model import train_tokenizer

SYSTEM = "{% if messages[0]['role'] != 'system' %}<|system|>\nBe good.<|end|>\n{% endif %}"
TURNS = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}<|end|>\n{% endfor %}"
PLAIN_TEXT = "{% for m in messages %}[INST] {{ m.content }} [/INST]\n{% endfor %}"


@pytest.fixture
def tokenizer() -> Any:
    return train_tokenizer(["one two three, one two three"] * 4, vocab_size=280)


def test_a_template_says_how_a_request_begins_and_ends(tokenizer: Any) -> None:
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    turn = user_turn(tokenizer)
    assert (turn.opening, turn.end_ids, turn.end_texts) == ("<|user|>\n", (end,), ())
    tokenizer.chat_template = SYSTEM + TURNS
    turn = user_turn(tokenizer)
    assert turn.opening == "<|system|>\nBe good.<|end|>\n<|user|>\n"
    assert (turn.end_ids, turn.end_texts) == ((end,), ())
    tokenizer.chat_template = PLAIN_TEXT  # its marks are no tokens
    turn = user_turn(tokenizer)
    assert (turn.opening, turn.end_ids, turn.end_texts) == ("[INST] ", (), ("[/INST]",))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the target's tokenizer has no chat template"),
        ("<|assistant|>\n", "does not write a user's text"),
        ("{{ messages[0].content }}", "nothing behind it"),
        ("{{ raise_exception('no') }}", "the template refuses the conversation"),
    ],
)
def test_templates_that_do_not_say_it(tokenizer: Any, template: str | None, message: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        user_turn(tokenizer)


@pytest.mark.parametrize(
    ("tokens", "is_loop"),
    [
        ([7] * 32, True),
        ([7] * 31, False),
        ([*range(50), *[1, 2, 3] * 11, *range(60, 99)], True),  # amid other text
        ([*range(20)] * 3, True),
        ([*range(20)] * 2, False),  # said twice
        ([*range(200)], False),
        ([*range(100)] * 3, False),  # too far apart to be seen
        ([], False),
        ([1], False),
    ],
)
def test_loops(tokens: list[int], is_loop: bool) -> None:
    assert loops(tokens) == is_loop


@dataclass
class Desk:
    """An engine's seats without an engine: request r takes as many steps as its prompt says."""

    num_seats: int
    held: list[Seat] = field(default_factory=list)
    most: list[int] = field(default_factory=list)

    @property
    def num_free(self) -> int:
        return self.num_seats - len(self.held)

    def admit(self, request: Request) -> Seat:
        assert self.num_free
        seat = Seat(request, 0)
        self.held.append(seat)
        return seat

    def step(self) -> list[Event]:
        self.most.append(len(self.held))
        events = []
        for seat in list(self.held):
            seat.tokens.append(0)
            if len(seat.tokens) == seat.request.prompt[0]:
                seat.finish_reason = "length"
                self.held.remove(seat)
            events.append(Event(seat, [0], 0, []))
        return events


def asks(*steps: int) -> Generator[Request, Seat, list[int]]:
    """A task of texts of so many steps each."""
    got = []
    for number in steps:
        seat = yield Request([number], SamplingParams(), StopRule(100))
        got.append(len(seat.tokens))
    return got


@pytest.mark.parametrize("num_seats", [1, 2, 3, 50])
def test_results_come_in_order_whatever_the_seats(num_seats: int) -> None:
    wanted = [(9, 1), (1, 1), (2, 30), (3,), (), (1, 5, 2), (40,), (1,)] * 2
    num_begun = 0

    def tasks() -> Iterator[Any]:
        nonlocal num_begun
        for steps in wanted:
            num_begun += 1
            yield asks(*steps)

    desk = Desk(num_seats)
    found = list(in_order(desk, tasks(), lambda held: num_begun < len(wanted)))  # type: ignore[arg-type]
    assert found == [list(steps) for steps in wanted]
    assert sum(desk.most) == sum(map(sum, wanted))


def test_a_free_seat_is_taken_at_once() -> None:
    """Not batch by batch: while there is something to do no seat is idle."""
    desk, out = Desk(4), []
    tasks = (asks(3 + number % 9, 2) for number in count())
    for result in in_order(desk, tasks, lambda held: len(out) + held < 40):  # type: ignore[arg-type]
        out.append(result)
    assert len(out) == 40
    assert desk.most[:40] == [4] * 40


def test_only_so_many_are_ahead_of_a_slow_one() -> None:
    desk, begun = Desk(2), 0

    def tasks() -> Iterator[Any]:
        nonlocal begun
        for number in count():
            begun += 1
            yield asks(1 if number else 1000)

    results = in_order(desk, tasks(), lambda held: begun < 500)  # type: ignore[arg-type]
    assert next(results) == [1000]
    assert begun == AHEAD * 2


@pytest.fixture
def author(tokenizer: Any) -> Author:
    target = TargetModel(tiny_llama(vocab_size=len(tokenizer)))
    config = TrainConfig("self_generated", "out.jsonl", target="x", sequence_length=100, max_new_tokens=40, seed=3)
    end = tokenizer.eos_token_id
    answers = EngineAnswers(config, tokenizer, lambda _: None, (end,), target.vocab_size)  # type: ignore[arg-type, return-value]
    return Author(config, tokenizer, answers, (end,), max_request_tokens=50)


def said(request: Request, text: str, tokenizer: Any, reason: str = "eos") -> Seat:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Seat(request, 0, ids + [tokenizer.eos_token_id] * (reason == "eos"), reason)


def result_of(author: Author, tokenizer: Any, *texts: tuple[str, str]) -> Any:
    task = author.write(50)
    request = next(task)
    try:
        for text, reason in texts:
            request = task.send(said(request, text, tokenizer, reason))
    except StopIteration as end:
        return end.value
    raise AssertionError("another text is asked for")


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ([("one two", "length")], "cut-off requests"),
        ([("abc " * 40, "length")], "looping requests"),
        ([("abc " * 40, "eos")], "looping requests"),
        ([(" \n", "eos")], "empty requests"),
        ([("one <|assistant|> two", "eos")], "requests with special tokens"),
        ([("".join(map(chr, range(35, 126))) + "zyxwvutsrq", "eos")], "too long requests"),
        ([("one", "eos"), ("", "eos")], "empty answers"),
        ([("one", "eos"), ("yes " * 40, "eos")], "looping answers"),
    ],
)
def test_what_is_dropped(author: Author, tokenizer: Any, texts: list[tuple[str, str]], reason: str) -> None:
    dropped = result_of(author, tokenizer, *texts)
    assert isinstance(dropped, Dropped)
    assert dropped.reason == reason


@pytest.mark.parametrize("reason", ["eos", "length"])
def test_a_row(author: Author, tokenizer: Any, reason: str) -> None:
    row = result_of(author, tokenizer, (" one two\n", "eos"), ("three", reason))
    prompt = "<|user|>\none two<|end|>\n<|assistant|>\n"
    text = prompt + "three" + "<|end|>" * (reason == "eos")
    assert row["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    num_prompt = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    assert row["loss_mask"] == [0] * num_prompt + [1] * (len(row["input_ids"]) - num_prompt)
    assert row["messages"] == [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]
    assert (row["number"], row["held_out"], row["truncated"]) == (50, True, reason == "length")


def test_numbers_and_seeds_have_draws_of_their_own(author: Author, tokenizer: Any) -> None:
    def seeds(author: Author, number: int) -> list[int]:
        task = author.write(number)
        request = next(task)
        return [request.sampling.seed, task.send(said(request, "one", tokenizer)).sampling.seed]

    other = Author(replace(author._config, seed=4), tokenizer, author._answers, (1,), max_request_tokens=50)
    found = [seed for writer in (author, other) for number in range(40) for seed in seeds(writer, number)]
    assert len(set(found)) == len(found)


def test_requests_begin_with_a_prefix(author: Author, tokenizer: Any) -> None:
    """Which one, the seed and the number say; what the target goes on with stands behind it."""
    prefixes = ["one", "two three", "three, one"]
    writer = Author(author._config, tokenizer, author._answers, (1,), max_request_tokens=50, prefixes=prefixes)
    drawn = []
    for number in range(60):
        task = writer.write(number)
        request = next(task)
        prompt = tokenizer.decode(request.prompt)
        assert prompt.startswith("<|user|>\n")
        drawn.append(prompt.removeprefix("<|user|>\n"))
        asked = task.send(said(request, " two", tokenizer))
        assert tokenizer.decode(asked.prompt) == f"<|user|>\n{drawn[-1]} two<|end|>\n<|assistant|>\n"
    assert {*drawn} == {*prefixes}
    assert min(map(drawn.count, prefixes)) > 8
    assert next(writer.write(7)).prompt == next(writer.write(7)).prompt


def test_a_prefix_before_a_template_of_plain_text(author: Author, tokenizer: Any) -> None:
    """The opening's last space, which a word takes along, is before a prefix, and gone without one."""
    tokenizer.chat_template = PLAIN_TEXT
    for prefixes, prompt in ((["one"], "[INST] one"), ([], "[INST]")):
        writer = Author(author._config, tokenizer, author._answers, (1,), max_request_tokens=40, prefixes=prefixes)
        assert tokenizer.decode(next(writer.write(0)).prompt) == prompt


def test_a_prefix_alone_is_no_request(author: Author, tokenizer: Any) -> None:
    writer = Author(author._config, tokenizer, author._answers, (1,), max_request_tokens=50, prefixes=["one two"])
    assert result_of(writer, tokenizer, (" ", "eos")) == Dropped("empty requests", "one two")


def test_a_prefix_that_ends_the_turn(author: Author, tokenizer: Any) -> None:
    tokenizer.chat_template = PLAIN_TEXT
    with pytest.raises(ValueError, match=r"request_prefixes: 'one \[/INST\]' has '\[/INST\]' in it"):
        Author(author._config, tokenizer, author._answers, (1,), max_request_tokens=50, prefixes=["one [/INST]"])


def test_a_prefix_has_no_special_tokens(author: Author, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"request_prefixes: 'one <\|end\|>' has special tokens"):
        Author(author._config, tokenizer, author._answers, (1,), max_request_tokens=50, prefixes=["one <|end|>"])


def test_a_file_of_prefixes(tmp_path: Path) -> None:
    file = tmp_path / "prefixes.txt"
    file.write_text("Write \n\n  What is\nWrite\n", encoding="utf-8-sig")
    assert read_prefixes(str(file)) == ["Write", "What is", "Write"]
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"request_prefixes: .* cannot be read: 'utf-8'"):
        read_prefixes(str(file))
    file.write_text(" \n")
    with pytest.raises(ValueError, match=r"request_prefixes: .*prefixes\.txt has no text"):
        read_prefixes(str(file))
    with pytest.raises(ValueError, match=r"request_prefixes: .* cannot be read"):
        read_prefixes(str(tmp_path))


def test_there_must_be_room_for_an_answer(author: Author, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="sequence_length: 100 leaves no room for an answer behind a request of 99"):
        Author(author._config, tokenizer, author._answers, (1,), max_request_tokens=99)


def test_the_mark_is_no_word_of_a_template() -> None:
    assert MARK.isalnum()
