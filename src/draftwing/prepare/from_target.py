"""Training rows without any data: the target writes its own requests, and answers them.

Behind the chat template's opening of a user's turn a chat model goes on with what users ask (arXiv 2406.08464). Each
number of a run has one request and one answer, drawn with seeds that the run's seed and the number give; what else is
decoded beside them, and what drafts, changes nothing. Rows are those of EngineAnswers, with their `number`.
A request may be given its first words, so that requests are of the kinds that users will ask.
"""

import itertools
import json
import logging
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.progress import TextColumn

from draftwing.config import SelfGeneratedStage
from draftwing.data.chat_template import encode_text, render
from draftwing.data.corpus import Row
from draftwing.data.fingerprint import contents_of
from draftwing.data.prompts import has_chat_template
from draftwing.data.rows import HELD_OUT_SHARE, Reject, Rejects
from draftwing.data.sources import SHOWN
from draftwing.engine.engine import Engine, Request, Seat
from draftwing.engine.options import row_seed
from draftwing.engine.sampling import SamplingParams
from draftwing.engine.statistics import Statistics
from draftwing.engine.stopping import StopRule, cut_at_stop, exact_decode
from draftwing.prepare.self_generated import (
    Dialogue,
    EngineAnswers,
    Question,
    RunPart,
    complete_lines,
    resume,
)
from draftwing.progress import progress_bar

logger = logging.getLogger(__name__)
MARK = "Q7Xw3Zk9"
"""Stands for a user's text where a template is asked what it writes around that."""
HELD_OUT_EVERY = round(1 / HELD_OUT_SHARE)
LOOP_TOKENS, LOOP_TURNS, LONGEST_PERIOD = 32, 3, 64
"""A text loops if a stretch of so many tokens, and of so many turns, repeats itself after at most so many."""
AHEAD = 8
"""Numbers for each seat that may be finished before one that is still written."""
MOST_IN_A_ROW = 100
"""Numbers that may be dropped one after another; then the target is given up."""
Result = TypeVar("Result")
Task = Generator[Request, Seat, Result]
"""Asks for one text after another, and returns what it makes of them."""


@dataclass(frozen=True)
class Dropped:
    """A number that gives no row: why, and the beginning of its request."""

    reason: str
    request: str = ""


@dataclass(frozen=True)
class UserTurn:
    """How a chat template opens a user's turn, and what ends it: ids, or a text where it has no token."""

    opening: str
    end_ids: tuple[int, ...]
    end_texts: tuple[str, ...]


def user_turn(tokenizer: Any) -> UserTurn:
    """What a tokenizer's chat template writes around a first request.

    Raises:
        ValueError: it has no chat template, or one that does not write a user's text as it is.
    """
    if not has_chat_template(tokenizer):
        raise ValueError("from_target: the target's tokenizer has no chat template, so it is never asked anything")
    opening, mark, behind = render([{"role": "user", "content": MARK}], tokenizer, True).partition(MARK)
    behind = behind.strip()
    if not mark or not behind:
        raise ValueError("from_target: the chat template does not write a user's text, or nothing behind it")
    end = encode_text(behind, tokenizer)[0]
    is_token = end in tokenizer.added_tokens_decoder
    return UserTurn(opening, (end,) if is_token else (), () if is_token else (behind.splitlines()[0],))


@dataclass(frozen=True)
class Beginning:
    """The ids that a request is sampled behind: the opening of a user's turn and a prefix; and the prefix alone."""

    ids: list[int]
    prefix: list[int]


class Author:
    """Writes a number's request and answer: a Task that returns its row, or why there is none.

    `config` has seed, temperatures (of the answers, in turn), lengths and the target's name. Each number draws one of
    the `prefixes`, with which its request begins.

    Raises:
        ValueError: no room for an answer, or a prefix with special tokens or the end of a turn.
    """

    def __init__(
        self,
        config: SelfGeneratedStage,
        tokenizer: Any,
        answers: EngineAnswers,
        eos_token_ids: tuple[int, ...],
        temperature: float = 1.0,
        max_request_tokens: int = 256,
        prefixes: Sequence[str] = (),
    ) -> None:
        self._config, self._tokenizer, self._answers = config, tokenizer, answers
        self.temperature, self.max_request_tokens, self.prefixes = temperature, max_request_tokens, tuple(prefixes)
        turn = user_turn(tokenizer)
        self._beginnings = [self._beginning(turn, prefix) for prefix in self.prefixes or ("",)]
        self._stop = StopRule(
            max_request_tokens,
            tuple({*turn.end_ids, *eos_token_ids}),
            turn.end_texts,
            exact_decode(tokenizer),
        )
        num_begun = max(len(beginning.ids) for beginning in self._beginnings)
        room = config.sequence_length - num_begun - max_request_tokens
        if room < 1:
            raise ValueError(
                f"sequence_length: {config.sequence_length} leaves no room for an answer behind a request "
                f"of {max_request_tokens} tokens and the {num_begun} that begin it"
            )

    def _beginning(self, turn: UserTurn, prefix: str) -> Beginning:
        prefix_ids = encode_text(prefix, self._tokenizer)
        if not {*prefix_ids}.isdisjoint((*self._tokenizer.all_special_ids, *turn.end_ids)):
            raise ValueError(f"request_prefixes: {prefix!r} has special tokens")
        if ends := [text for text in turn.end_texts if text in prefix]:
            raise ValueError(f"request_prefixes: {prefix!r} has {ends[0]!r} in it, which ends a user's turn")
        return Beginning(encode_text((turn.opening + prefix).rstrip(" "), self._tokenizer), prefix_ids)

    def write(self, number: int) -> Task[Row | Dropped]:
        """The row of a number."""
        seed = self._config.seed
        asking = row_seed(seed, 2 * number)
        beginning = random.Random(asking).choice(self._beginnings)
        sampling = SamplingParams(self.temperature, logit_bias=self._answers.bias, seed=asking)
        request = self._read_request((yield Request(beginning.ids, sampling, self._stop)), beginning.prefix)
        if isinstance(request, Dropped):
            return request
        messages = {"role": "user", "content": request}, {"role": "assistant", "content": ""}
        dialogue = Dialogue(Question(number, number % HELD_OUT_EVERY == 0, messages), self._tokenizer)
        if not self._answers.room(dialogue):
            return Dropped("too long requests", request)
        answer = yield self._answers.request(dialogue, row_seed(seed, 2 * number + 1))
        said = answer.tokens[:-1] if answer.finish_reason == "eos" else answer.tokens
        if not said:
            return Dropped("empty answers", request)
        if loops(said):
            return Dropped("looping answers", request)
        dialogue.take(answer)
        return {"number": number} | dialogue.row()

    def _read_request(self, seat: Seat, prefix: list[int]) -> str | Dropped:
        """The text of a request, or what is wrong with it."""
        said = seat.tokens[:-1] if seat.finish_reason == "eos" else seat.tokens
        text, continuation = (
            cut_at_stop(tokens, self._stop.stop_strings, self._tokenizer).strip() for tokens in (prefix + said, said)
        )
        if seat.finish_reason == "length":
            return Dropped("looping requests" if loops(said) else "cut-off requests", text)
        if not continuation:
            return Dropped("empty requests", text)
        if not {*said}.isdisjoint(self._tokenizer.all_special_ids):
            return Dropped("requests with special tokens", text)
        return Dropped("looping requests", text) if loops(said) else text


def read_prefixes(path: str) -> list[str]:
    """The texts that a file has, one a line; one that is there twice is drawn twice as often.

    Raises:
        ValueError: no file of UTF-8 text, or no text in it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"request_prefixes: {path} cannot be read: {error}") from error
    prefixes = [prefix for line in lines if (prefix := line.strip())]
    if not prefixes:
        raise ValueError(f"request_prefixes: {path} has no text")
    return prefixes


def loops(tokens: list[int]) -> bool:
    """Whether some stretch of a text repeats itself again and again."""
    ids = np.array(tokens)
    for period in range(1, min(LONGEST_PERIOD, len(ids) // LOOP_TURNS) + 1):
        differs = np.flatnonzero(ids[period:] != ids[:-period])
        same = np.diff(np.concatenate(([-1], differs, [len(ids) - period]))) - 1
        if same.max(initial=0) + period >= max(LOOP_TURNS * period, LOOP_TOKENS):
            return True
    return False


def in_order(engine: Engine, tasks: Iterator[Task[Result]], may_begin: Callable[[int], bool]) -> Iterator[Result]:
    """Run tasks on an engine's seats, each taken anew as soon as it is free; results in the order of the tasks.

    What a running task asks for comes before new tasks. One of those begins if it `may_begin` beside so many others
    whose results are not out yet.
    """
    waiting: deque[tuple[int, Request]] = deque()
    seated: dict[Seat, int] = {}
    running: dict[int, Task[Result]] = {}
    results: dict[int, Result] = {}
    begun = itertools.count()
    num_out = num_held = 0

    def go_on(index: int, seat: Seat | None) -> None:
        try:
            waiting.append((index, next(running[index]) if seat is None else running[index].send(seat)))
        except StopIteration as end:
            results[index] = end.value
            del running[index]

    while True:
        while num_out in results:
            yield results.pop(num_out)
            num_out, num_held = num_out + 1, num_held - 1
        while engine.num_free and (waiting or (num_held < AHEAD * engine.num_seats and may_begin(num_held))):
            if not waiting:
                index, num_held = next(begun), num_held + 1
                running[index] = next(tasks)
                go_on(index, None)
                continue
            index, request = waiting.popleft()
            seat = engine.admit(request)
            assert seat is not None
            seated[seat] = index
        if seated:
            for event in engine.step():
                if event.seat.finish_reason:
                    go_on(seated.pop(event.seat), event.seat)
        elif num_out not in results:
            return


@dataclass
class Kept:
    """The rows of a file: what was asked in them, the last number, and their counts."""

    requests: set[str] = field(default_factory=set)
    last: int = -1
    num_answer_tokens: int = 0
    num_truncated: int = 0

    @staticmethod
    def of_file(output: Path) -> "Kept":
        """The rows that an earlier run has written.

        Raises:
            ValueError: rows of another kind.
        """
        kept = Kept()
        if output.exists():
            with output.open(encoding="utf-8") as file:
                for row in map(json.loads, file):
                    if not row.keys() >= {"number", "messages", "loss_mask", "truncated"}:
                        raise ValueError(
                            f"output: {output} has rows that were not written by --from-target; use another output"
                        )
                    kept.take(row)
        return kept

    def take(self, result: Row | Dropped) -> Row | Dropped:
        """Count a row in, unless it is dropped or asks what another one has asked."""
        if isinstance(result, Dropped):
            return result
        request = result["messages"][0]["content"]
        key = " ".join(request.split()).casefold()
        if key in self.requests:
            return Dropped("duplicate requests", request)
        self.requests.add(key)
        self.last = result["number"]
        self.num_answer_tokens += sum(result["loss_mask"])
        self.num_truncated += result["truncated"]
        return result


def write_from_target(
    config: SelfGeneratedStage, author: Author, engine: Engine, num_rows: int, shard: RunPart | None = None
) -> dict[str, float]:
    """Write `config.output` until it has the shard's part of so many rows; a stopped run goes on where it was.

    Dropped numbers are listed beside it (.rejects.jsonl). Returns counts and rates.

    Raises:
        ValueError: the file was begun with other settings; too many numbers give nothing.
    """
    shard = shard or RunPart()
    output, wanted = Path(config.output), len(range(shard.number - 1, num_rows, shard.count))
    num_done = resume(output, _settings(config, author, shard, engine), contents_of(config))
    rejects_file = output.with_suffix(".rejects.jsonl")
    rejects = Rejects(rejects_file, complete_lines(rejects_file) if num_done else 0)
    kept = Kept.of_file(output)
    if num_done:
        logger.info("resuming from %s: %d of %d rows are there", output, num_done, wanted)
    last = max((kept.last, *(reject.line for reject in rejects.found)))
    numbers = itertools.count(shard.number - 1 if last < 0 else last + shard.count, shard.count)
    written, read = itertools.tee(numbers)
    statistics, began = Statistics(), time.perf_counter()
    engine.count_into(statistics)
    results = in_order(engine, map(author.write, written), lambda num_held: len(kept.requests) + num_held < wanted)
    with output.open("a", encoding="utf-8") as file, _shown(wanted, len(kept.requests), statistics) as show:
        num_in_a_row = 0
        for number, result in zip(read, map(kept.take, results), strict=False):
            if isinstance(result, Dropped):
                rejects.add(Reject(config.target, number, result.reason, result.request[:SHOWN]))
                num_in_a_row += 1
                if num_in_a_row == MOST_IN_A_ROW:
                    raise ValueError(
                        f"from_target: {num_in_a_row} numbers in a row gave no row, the last one for: {result.reason}; "
                        f"see {rejects_file}"
                    )
                continue
            num_in_a_row = 0
            file.write(json.dumps(result) + "\n")
            file.flush()
            show(len(kept.requests))
    seconds = time.perf_counter() - began
    figures: dict[str, float] = {"rows": len(kept.requests), "answer_tokens": kept.num_answer_tokens}
    figures |= {"truncated_answers": kept.num_truncated, "dropped": len(rejects)}
    figures |= {name.replace(" ", "_"): n for name, n in sorted(Counter(r.reason for r in rejects.found).items())}
    figures |= {"new_tokens": statistics.num_tokens, "acceptance_length": round(statistics.acceptance_length, 2)}
    return figures | {"tokens_per_second": round(statistics.num_tokens / seconds, 1)}


def _settings(config: SelfGeneratedStage, author: Author, shard: RunPart, engine: Engine) -> dict[str, Any]:
    """What decides the rows; how many there are to be may change."""
    names = ("target", "seed", "sequence_length", "max_new_tokens", "temperatures")
    settings = {name: getattr(config, name) for name in names} | {"shard": f"{shard.number}/{shard.count}"}
    settings |= {"request_temperature": author.temperature, "max_request_tokens": author.max_request_tokens}
    settings["request_prefixes"] = list(author.prefixes) or None
    return settings | {"data": "from the target", "dtype": str(engine.target.dtype).removeprefix("torch.")}


@contextmanager
def _shown(wanted: int, num_done: int, statistics: Statistics) -> Iterator[Callable[[int], None]]:
    """A progress bar with the tokens per second."""
    with progress_bar(TextColumn("{task.fields[rate]:.0f} tokens/s")) as progress:
        shown = progress.add_task("rows of the target's own", total=wanted, completed=num_done, rate=0.0)
        began = time.perf_counter()

        def show(num_rows: int) -> None:
            rate = statistics.num_tokens / (time.perf_counter() - began)
            progress.update(shown, completed=num_rows, rate=rate)

        yield show
