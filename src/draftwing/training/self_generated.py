"""Training rows that the target says itself: prompts from the data, answers by our own engine or by an endpoint.

A head drafts for what its target says, not for what people wrote (EAGLE-3, arXiv 2503.01840, section 4).
"""

import json
import logging
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from draftwing.checkpoint.load import load_target, load_tokenizer
from draftwing.config import TrainConfig
from draftwing.data.chat import Example, Message, conversation, encode_conversation, encode_row
from draftwing.data.corpus import Row
from draftwing.data.rows import Rejects, made_from, select_rows
from draftwing.data.shards import check_same_run
from draftwing.data.sources import RowRef
from draftwing.decoding.drafters import NoDrafter
from draftwing.decoding.generate import Generation, Request, RowOutput, plain_plan
from draftwing.decoding.sampling import SamplingParams
from draftwing.decoding.stopping import StopRule
from draftwing.files import write_text
from draftwing.training.checkpoints import contents_of, data_content_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """What is to be answered: a conversation, all of its answers, or the beginning of a text, as token ids.

    The `number` counts over all shards of a run; it gives seed and temperature.
    """

    number: int
    held_out: bool
    messages: tuple[Message, ...] = ()
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Shard:
    """Part `number` of `count`, counted from 1."""

    number: int = 1
    count: int = 1


StartGeneration = Callable[[Sequence[Request]], Generation]
Answer = Callable[[Sequence[Prompt]], Iterator[Row]]
"""Answers prompts, one row for each and in their order; a row that cannot be answered has an `error`."""


def write_self_generated(config: TrainConfig) -> dict[str, float]:
    """Write `config.output`, a JSONL file of `input_ids`, `loss_mask` (the answers) and `held_out`."""
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    target = load_target(config.target, dtype, "cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(config.target)

    def start(requests: Sequence[Request]) -> Generation:
        return Generation(target, requests, lambda rows, capacity: NoDrafter(), plain_plan(target, len(requests)))

    return regenerate(config, tokenizer, EngineAnswers(config, tokenizer, start, target.eos_token_ids))


def regenerate(
    config: TrainConfig, tokenizer: Any, answer: Answer, shard: Shard | None = None, source: str = ""
) -> dict[str, float]:
    """Write a row for each prompt of the data (of a shard's prompts) to `config.output`.

    Prompts alternate between the config's temperatures. A stopped run continues after its last complete line.
    `source` names who answers, if not the config's target.

    Raises:
        ValueError: no row can be used, or the file was begun with other settings.
    """
    shard = shard or Shard()
    output = Path(config.output)
    prompts, counts = read_prompts(config, tokenizer)
    names = ("data", "max_rows", "seed", "sequence_length", "prompt_length", "max_new_tokens", "temperatures")
    settings = {name: getattr(config, name) for name in names} | {"source": source or config.target}
    settings |= {"prompts": len(prompts), "shard": f"{shard.number}/{shard.count}"}
    num_done = _resume(output, settings, contents_of(config) | data_content_of(config))
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


def read_prompts(config: TrainConfig, tokenizer: Any) -> tuple[list[Prompt], dict[str, float]]:
    """The prompts of a recipe's data, `evaluate_rows` held-out ones first, and counts of rows that give none.

    A conversation's first question, or the first tokens of each piece of a text, must leave room for an answer: at
    most half of `sequence_length`.
    """
    selection = select_rows(config.data, None, config.seed)
    rejects = Rejects(Path(config.output).with_suffix(".rejects.jsonl"))
    found: dict[bool, list[Prompt]] = {}
    num_long = 0
    for held_out, refs in ((True, selection.held_out), (False, selection.train)):
        candidates = list(_candidates(refs, held_out, config, tokenizer, rejects))
        found[held_out] = [prompt for prompt, length in candidates if 0 < length <= config.sequence_length // 2]
        num_long += len(candidates) - len(found[held_out])
    rejects.sort()
    rejects.check(len(selection.train) + len(selection.held_out))
    random.Random(config.seed).shuffle(found[False])
    chosen = [*found[True][: config.evaluate_rows], *found[False][: config.max_rows]]
    if not chosen:
        raise ValueError(f"data: {config.data} has no prompt of at most {config.sequence_length // 2} tokens")
    numbered = [Prompt(number, p.held_out, p.messages, p.ids) for number, p in enumerate(chosen)]
    return numbered, {"rejected": len(rejects), "too_long": num_long}


def _candidates(
    refs: Sequence[RowRef], held_out: bool, config: TrainConfig, tokenizer: Any, rejects: Rejects
) -> Iterator[tuple[Prompt, int]]:
    """Prompts of rows with their lengths in tokens."""

    def make(row: Row) -> list[tuple[Prompt, int]]:
        if "input_ids" in row and row.keys().isdisjoint(("text", "messages", "conversations")):
            raise ValueError("input_ids: token ids cannot be regenerated; expected messages, conversations or text")
        if "text" in row:
            ids = tuple(encode_row(row, tokenizer)[0].input_ids.tolist())
            starts = range(0, len(ids) - config.prompt_length, config.sequence_length)
            if not starts:
                raise ValueError(
                    f"text: {len(ids)} tokens leave nothing to say after a prompt of {config.prompt_length}"
                )
            pieces = [ids[start : start + config.prompt_length] for start in starts]
            return [(Prompt(0, held_out, ids=piece), len(piece)) for piece in pieces]
        messages = conversation(row)
        roles = [message["role"] for message in messages]
        if "assistant" not in roles:
            raise ValueError("messages: no assistant turn to regenerate")
        if "tool" in roles or any(message.get("tool_calls") for message in messages):
            raise ValueError("messages: tool calls cannot be regenerated: nobody runs the tools")
        (first,) = encode_conversation(messages[: roles.index("assistant")], tokenizer, add_generation_prompt=True)
        return [(Prompt(0, held_out, tuple(messages)), len(first))]

    shown = track(refs, "reading prompts", console=Console(stderr=True), disable=len(refs) < 1000)
    for prompts in made_from(shown, make, rejects):
        yield from prompts


class EngineAnswers:
    """Answers by our own engine, whatever it drafts with: batch by batch, a conversation's turns one after another."""

    def __init__(
        self, config: TrainConfig, tokenizer: Any, start: StartGeneration, eos_token_ids: tuple[int, ...]
    ) -> None:
        self._config, self._tokenizer, self._start, self._eos = config, tokenizer, start, eos_token_ids

    def __call__(self, prompts: Sequence[Prompt]) -> Iterator[Row]:
        for first in range(0, len(prompts), self._config.batch_size):
            batch = [_Dialogue(prompt, self._tokenizer) for prompt in prompts[first : first + self._config.batch_size]]
            while waiting := [dialogue for dialogue in batch if self._room(dialogue)]:
                generation = self._start([self._request(dialogue) for dialogue in waiting]).run()
                for dialogue, output in zip(waiting, generation.outputs, strict=True):
                    dialogue.take(output)
            yield from (dialogue.row() for dialogue in batch)

    def _room(self, dialogue: "_Dialogue") -> int:
        """Tokens that the dialogue's next answer may have; 0 if it has no next one."""
        if dialogue.prompt is None:
            return 0
        room = self._config.sequence_length - len(dialogue.prompt)
        return max(0, min(room, self._config.max_new_tokens or room))

    def _request(self, dialogue: "_Dialogue") -> Request:
        config, number = self._config, dialogue.number
        assert dialogue.prompt is not None
        temperature = config.temperatures[number % len(config.temperatures)]
        return Request(
            dialogue.prompt.input_ids.tolist(),
            SamplingParams(temperature, seed=config.seed + number),
            StopRule(self._room(dialogue), self._eos),
        )


class _Dialogue:
    """A conversation being answered. `prompt` is what the next answer continues, None if there is none to come."""

    def __init__(self, prompt: Prompt, tokenizer: Any) -> None:
        self.number, self._held_out, self._tokenizer = prompt.number, prompt.held_out, tokenizer
        self._said: list[Message] = []
        self._rest = deque(prompt.messages)
        self._answered: Example | None = None
        if prompt.messages:
            self._open()
        else:
            ids = torch.tensor(prompt.ids)
            self.prompt: Example | None = Example(ids, torch.zeros(len(ids), dtype=torch.bool))

    def _open(self) -> None:
        """Go on to the next turn of the assistant."""
        self.prompt = None
        while self._rest and self._rest[0]["role"] != "assistant":
            self._said.append(self._rest.popleft())
        if self._rest:
            self._rest.popleft()
            *rewritten, prompt = encode_conversation(self._said, self._tokenizer, add_generation_prompt=True)
            if not rewritten:  # one row cannot hold answers that its later turns show otherwise: it ends there
                self.prompt = prompt

    def take(self, output: RowOutput) -> None:
        """Take in the answer to `prompt`; the tokens count, not their text."""
        assert self.prompt is not None
        tokens = torch.tensor(output.tokens)
        self._answered = Example(
            torch.cat((self.prompt.input_ids, tokens)),
            torch.cat((self.prompt.loss_mask, torch.ones(len(tokens), dtype=torch.bool))),
        )
        if output.finish_reason == "length":  # what would follow has no end of turn before it
            self._rest.clear()
        text = self._tokenizer.decode(output.tokens, skip_special_tokens=True)
        self._said.append({"role": "assistant", "content": text})
        self._open()

    def row(self) -> Row:
        assert self._answered is not None
        ids, mask = self._answered.input_ids.tolist(), self._answered.loss_mask.int().tolist()
        return {"input_ids": ids, "loss_mask": mask, "held_out": self._held_out}


def _resume(output: Path, settings: dict[str, Any], contents: dict[str, str]) -> int:
    """How many rows an earlier run has written with the same settings, which are kept beside its output.

    The `contents` of its inputs count where that run has kept them.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = output.with_suffix(".run.json")
    num_done = _complete_lines(output)
    if num_done and beside.exists():
        earlier = json.loads(beside.read_text(encoding="utf-8"))
        check_same_run(output, earlier, settings)
        check_same_run(output, earlier, {name: value for name, value in contents.items() if name in earlier})
    write_text(beside, json.dumps(settings | contents) + "\n")
    return num_done


def _complete_lines(path: Path) -> int:
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
