"""Training rows that the target says itself: prompts from the data, answers by our own engine or by an endpoint.

A head drafts for what its target says, not for what people wrote (EAGLE-3, arXiv 2503.01840, section 4). Rows of our
engine have the token ids that it chose, in every turn, and beside them the conversation or text for people to read.
"""

import json
import logging
import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from draftwing.config import SelfGeneratedStage
from draftwing.data.chat_template import encode_row, encode_text, normalise, render
from draftwing.data.corpus import Row
from draftwing.data.features import check_positions
from draftwing.data.fingerprint import contents_of, of_data
from draftwing.data.messages import Message
from draftwing.data.rows import Rejects, made_from, select_rows
from draftwing.data.sources import RowRef
from draftwing.engine.drafter import NoDrafter
from draftwing.engine.engine import Request, Seat
from draftwing.engine.generation import Generation, start_generation
from draftwing.engine.sampling import SamplingParams
from draftwing.engine.stopping import StopRule, exact_decode
from draftwing.engine.tree_plan import TreePlan
from draftwing.files import check_unchanged, write_text
from draftwing.target.load import load_target, load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """What is to be answered: a conversation, all of its answers, or the beginning of a text, as token ids.

    The `number` counts over all shards of a run; it gives seed and temperature. The target is told of the `tools`.
    """

    number: int
    held_out: bool
    messages: tuple[Message, ...] = ()
    ids: tuple[int, ...] = ()
    tools: tuple[Message, ...] = ()


@dataclass(frozen=True)
class RunPart:
    """Part `number` of `count`, counted from 1."""

    number: int = 1
    count: int = 1


StartGeneration = Callable[[Sequence[Request]], Generation]
Answer = Callable[[Sequence[Question]], Iterator[Row]]
"""Answers prompts, one row for each and in their order; a row that cannot be answered has an `error`."""


def write_self_generated(config: SelfGeneratedStage) -> dict[str, float]:
    """Write `config.output`, a JSONL file of the rows of EngineAnswers."""
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    target = load_target(config.target, dtype, "cuda" if torch.cuda.is_available() else "cpu")
    check_positions(config.sequence_length, target.max_positions, "set it to at most")
    tokenizer = load_tokenizer(config.target)

    def start(requests: Sequence[Request]) -> Generation:
        return start_generation(target, requests, lambda *_: NoDrafter(), TreePlan.off())

    answers = EngineAnswers(config, tokenizer, start, target.eos_token_ids, target.vocab_size)
    return regenerate(config, tokenizer, answers)


def regenerate(
    config: SelfGeneratedStage, tokenizer: Any, answer: Answer, shard: RunPart | None = None, source: str = ""
) -> dict[str, float]:
    """Write a row for each prompt of the data (of a shard's prompts) to `config.output`.

    Prompts alternate between the config's temperatures. A stopped run continues after its last complete line.
    `source` names who answers, if not the config's target.

    Raises:
        ValueError: no row can be used, or the file was begun with other settings.
    """
    shard = shard or RunPart()
    output = Path(config.output)
    prompts, counts = read_questions(config, tokenizer)
    names = ("data", "max_rows", "seed", "sequence_length", "prompt_length", "max_new_tokens", "temperatures")
    settings = {name: getattr(config, name) for name in names} | {"source": source or config.target}
    settings |= {"prompts": len(prompts), "shard": f"{shard.number}/{shard.count}"}
    num_done = resume(output, settings, contents_of(config) | of_data(config.data))
    mine = prompts[shard.number - 1 :: shard.count]
    if num_done:
        logger.info("resuming from %s: %d of %d rows are there", output, num_done, len(mine))
    num_tokens = num_failed = 0
    shown = track(answer(mine[num_done:]), "self-generated rows", len(mine), num_done, console=Console(stderr=True))
    with output.open("a", encoding="utf-8") as file:
        for row in shown:
            file.write(json.dumps(row) + "\n")
            file.flush()
            num_tokens += sum(row.get("loss_mask", ()))
            num_failed += "error" in row
    return {"rows": len(mine), "new_tokens": num_tokens, "failed": num_failed, **counts}


def count_answers(output: Path) -> dict[str, float]:
    """The figures of all of a file's rows, those of earlier parts of its run too."""
    figures: dict[str, float] = {"new_tokens": 0, "failed": 0}
    with output.open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            figures["new_tokens"] += sum(row.get("loss_mask", ()))
            figures["failed"] += "error" in row
    return figures


def read_questions(config: SelfGeneratedStage, tokenizer: Any) -> tuple[list[Question], dict[str, float]]:
    """The prompts of a recipe's data, `evaluate_rows` held-out ones first, and counts of rows that give none.

    A conversation's first question, or the first tokens of each piece of a text, must leave room for an answer: at
    most half of `sequence_length`.
    """
    selection = select_rows(config.data, None, config.seed)
    rejects = Rejects(Path(config.output).with_suffix(".rejects.jsonl"))
    found: dict[bool, list[Question]] = {}
    num_long = 0
    for held_out, refs in ((True, selection.held_out), (False, selection.train)):
        candidates = list(_candidates(refs, held_out, config, tokenizer, rejects))
        found[held_out] = [prompt for prompt, length in candidates if 0 < length <= config.sequence_length // 2]
        num_long += len(candidates) - len(found[held_out])
    rejects.finish(len(selection.train) + len(selection.held_out))
    random.Random(config.seed).shuffle(found[False])
    chosen = [*found[True][: config.evaluate_rows], *found[False][: config.max_rows]]
    if not chosen:
        raise ValueError(f"data: {config.data} has no prompt of at most {config.sequence_length // 2} tokens")
    numbered = [replace(prompt, number=number) for number, prompt in enumerate(chosen)]
    return numbered, {"rejected": len(rejects), "too_long": num_long}


def _candidates(
    refs: Sequence[RowRef], held_out: bool, config: SelfGeneratedStage, tokenizer: Any, rejects: Rejects
) -> Iterator[tuple[Question, int]]:
    """Prompts of rows with their lengths in tokens."""

    def make(row: Row) -> list[tuple[Question, int]]:
        if "input_ids" in row and row.keys().isdisjoint(("text", "messages", "conversations")):
            raise ValueError("input_ids: token ids cannot be regenerated; expected messages, conversations or text")
        row = normalise({name: value for name, value in row.items() if name != "input_ids"})
        if "text" in row:
            return [(Question(0, held_out, ids=piece), len(piece)) for piece in _pieces(row["text"], config, tokenizer)]
        messages, tools = row["messages"], row.get("tools", ())
        roles = [message["role"] for message in messages]
        if "assistant" not in roles:
            raise ValueError("messages: no assistant turn to regenerate")
        if "tool" in roles or any("tool_calls" in message for message in messages):
            raise ValueError("messages: tool calls cannot be regenerated: nobody runs the tools")
        if roles[0] == "assistant":
            raise ValueError("messages: turn 0 is an answer; expected what it answers before it")
        first = encode_text(render(messages[: roles.index("assistant")], tokenizer, True, tools or None), tokenizer)
        return [(Question(0, held_out, tuple(messages), tools=tuple(tools)), len(first))]

    shown = track(refs, "reading prompts", console=Console(stderr=True), disable=len(refs) < 1000)
    for prompts in made_from(shown, make, rejects):
        yield from prompts


def _pieces(text: str, config: SelfGeneratedStage, tokenizer: Any) -> list[tuple[int, ...]]:
    """The first `prompt_length` tokens of each `sequence_length` tokens of a text."""
    ids = tuple(encode_row({"text": text}, tokenizer)[0].input_ids.tolist())
    starts = range(0, len(ids) - config.prompt_length, config.sequence_length)
    if not starts:
        raise ValueError(f"text: {len(ids)} tokens leave nothing to say after a prompt of {config.prompt_length}")
    return [ids[start : start + config.prompt_length] for start in starts]


class EngineAnswers:
    """Answers by our own engine, whatever it drafts with: batch by batch, a conversation's turns one after another.

    A row has `input_ids`, `loss_mask` (the answers), `held_out`, and for people `messages` and `tools`, or `text`.
    Ids that the target's `vocab_size` has beyond the tokenizer's (padding) are never chosen.
    """

    def __init__(
        self,
        config: SelfGeneratedStage,
        tokenizer: Any,
        start: StartGeneration,
        eos_token_ids: tuple[int, ...],
        vocab_size: int,
    ) -> None:
        self._config, self._tokenizer, self._start, self._eos = config, tokenizer, start, eos_token_ids
        self._vocab_size = vocab_size
        known = {*tokenizer.get_vocab().values(), *eos_token_ids}
        self.bias = {token: -math.inf for token in range(len(tokenizer), vocab_size) if token not in known}

    def __call__(self, prompts: Sequence[Question]) -> Iterator[Row]:
        self.say_what_is_never_chosen()
        for first in range(0, len(prompts), self._config.batch_size):
            batch = [Dialogue(prompt, self._tokenizer) for prompt in prompts[first : first + self._config.batch_size]]
            while waiting := [dialogue for dialogue in batch if self.room(dialogue)]:
                seeds = [self._config.seed + dialogue.number for dialogue in waiting]
                generation = self._start(list(map(self.request, waiting, seeds))).run()
                for dialogue, output in zip(waiting, generation.outputs, strict=True):
                    dialogue.take(output)
            yield from (dialogue.row() for dialogue in batch)

    def say_what_is_never_chosen(self) -> None:
        """A line on stderr, if there are such ids."""
        if self.bias:
            note = f"{len(self.bias)} of the target's {self._vocab_size} ids are no tokens of its tokenizer"
            Console(stderr=True).print(f"{note}: they are never chosen", highlight=False, soft_wrap=True)

    def room(self, dialogue: "Dialogue") -> int:
        """Tokens that the dialogue's next answer may have; 0 if it has no next one, or one that cannot be had."""
        if not dialogue.is_open or max(dialogue.ids) >= self._vocab_size:
            return 0
        room = self._config.sequence_length - len(dialogue.ids)
        return max(0, min(room, self._config.max_new_tokens or room))

    def request(self, dialogue: "Dialogue", seed: int) -> Request:
        """What the dialogue's next answer is asked for by; the temperatures take turns by its number."""
        config = self._config
        temperature = config.temperatures[dialogue.number % len(config.temperatures)]
        return Request(
            list(dialogue.ids),
            SamplingParams(temperature, logit_bias=self.bias, seed=seed),
            StopRule(self.room(dialogue), self._eos),
        )


class Dialogue:
    """A conversation, or a text, being answered: the tokens so far, and whether another answer is to come.

    Tokens that were chosen stay as they are. A template's text is only asked what stands between two answers.
    """

    def __init__(self, prompt: Question, tokenizer: Any) -> None:
        self.number, self._prompt, self._tokenizer = prompt.number, prompt, tokenizer
        self._said: list[Message] = []
        self._rest = deque(prompt.messages)
        self._row: Row = {}
        self.is_open = True
        if prompt.messages:
            self._hear()
            self._text = self._render(add_generation_prompt=True)
            self.ids = encode_text(self._text, tokenizer)
        else:
            self.ids = list(prompt.ids)
        self._mask = [0] * len(self.ids)

    def _hear(self) -> None:
        """Take in what is said up to the next answer, whose place that is."""
        while self._rest and self._rest[0]["role"] != "assistant":
            self._said.append(self._rest.popleft())
        self.is_open = bool(self._rest)
        if self._rest:
            self._rest.popleft()

    def take(self, output: Seat) -> None:
        """Take in the answer to the tokens so far, and what stands between it and the next one."""
        self.ids += output.tokens
        self._mask += [1] * len(output.tokens)
        has_ended = output.finish_reason == "eos"
        text = exact_decode(self._tokenizer)(output.tokens[:-1] if has_ended else output.tokens)
        self._said.append({"role": "assistant", "content": text})
        self._row = {"input_ids": list(self.ids), "loss_mask": list(self._mask), "held_out": self._prompt.held_out}
        self._row |= self._readable(has_ended)
        between = self._between(text, output.tokens[-1]) if has_ended else None
        self.is_open = between is not None
        if between is not None:
            self.ids += between
            self._mask += [0] * len(between)

    def _between(self, answer: str, end: int) -> list[int] | None:
        """The tokens between an answer, which ended with the token `end`, and the next one; None if it is the last.

        It is also the last if the template does not write the answer and that token behind its prompt, or writes them
        otherwise later on: a row cannot hold them both ways.
        """
        try:
            through = self._render(add_generation_prompt=False)
            self._hear()
            whole = self._render(add_generation_prompt=True)
        except ValueError:  # the template refuses what was said
            return None
        if not (self.is_open and through.startswith(self._text) and whole.startswith(through)):
            return None
        rest, end_text = whole[len(self._text) :].lstrip(), exact_decode(self._tokenizer)([end])
        if not rest.startswith(answer.strip()):
            return None
        rest = rest[len(answer.strip()) :]
        rest = rest if rest.startswith(end_text) else rest.lstrip()  # templates may write spaces around an answer
        if not rest.startswith(end_text):
            return None
        self._text = whole
        ids = encode_text(rest, self._tokenizer)  # begins with the end, so that what follows is no text's beginning
        return ids[1:] if ids[:1] == [end] else encode_text(rest[len(end_text) :], self._tokenizer)

    def _render(self, add_generation_prompt: bool) -> str:
        return render(self._said, self._tokenizer, add_generation_prompt, list(self._prompt.tools) or None)

    def _readable(self, has_ended: bool) -> Row:
        """What people read of the row."""
        if not self._prompt.messages:
            return {"text": self._tokenizer.decode(self.ids, skip_special_tokens=True)}
        tools = {"tools": list(self._prompt.tools)} if self._prompt.tools else {}
        return {"messages": list(self._said), "truncated": not has_ended} | tools

    def row(self) -> Row:
        """The row with its last answer; one without any says why."""
        reason = f"the prompt has the id {max(self.ids)}, which the target has not"
        return self._row or {"error": reason, "held_out": self._prompt.held_out}


def resume(output: Path, settings: dict[str, Any], contents: dict[str, str]) -> int:
    """How many rows an earlier run has written with the same settings, which are kept beside its output.

    The `contents` of its inputs count where that run has kept them.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = output.with_suffix(".run.json")
    num_done = complete_lines(output)
    if num_done and beside.exists():
        earlier = json.loads(beside.read_text(encoding="utf-8"))
        known = {name: value for name, value in contents.items() if name in earlier}
        check_unchanged(earlier, settings | known, output)
    write_text(beside, json.dumps(settings | contents) + "\n")
    return num_done


def complete_lines(path: Path) -> int:
    """Count a file's complete lines and cut off a partial last one, which a stopped run may have left."""
    if not path.exists():
        return 0
    num_lines = end = 0
    with path.open("r+b") as file:
        for line in file:
            if line.endswith(b"\n"):
                num_lines, end = num_lines + 1, end + len(line)
        file.truncate(end)
    return num_lines
