"""`draftwing eval`: methods x data sets x temperatures on one target, interleaved turn by turn, resumable."""

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch

from draftwing.data.prompts import Prompt
from draftwing.drafts.kinds import PLAIN
from draftwing.engine.stopping import text_behind
from draftwing.evaluation.compare import WARM_UP_TOKENS, Decode, Decoded, decode_in_turn, merged
from draftwing.evaluation.journal import Journal, Run

Cell = tuple[str, float, str]
"""Data set, temperature, method: one row of the results."""


@dataclass(frozen=True)
class PromptSet:
    """A named list of prompts."""

    name: str
    prompts: Sequence[Prompt]

    @property
    def num_turns(self) -> int:
        return sum(prompt.num_turns for prompt in self.prompts)

    @property
    def fingerprint(self) -> str:
        """Tells prompt sets apart by their content."""
        content = json.dumps([asdict(prompt) for prompt in self.prompts])
        return f"{len(self.prompts)} prompts, sha256 {hashlib.sha256(content.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Skipped:
    """A turn that was not decoded, and why. `prompt` is its number in the data set."""

    data: str
    prompt: int
    name: str
    turn: int
    reason: str


@dataclass(frozen=True)
class Evaluation:
    """What is measured. `methods` must hold `plain`, which comes first and whose output is the reference.

    Attributes:
        rivals: other engines; sampled, they draw with noise of their own, so that only greedy output is compared.
        max_positions: the most tokens, prompt and new ones, that every model can read; None: no limit.
        seed: of each data set's first prompt; the next has one more.
        is_strict: what a method raises ends the evaluation.
    """

    methods: Mapping[str, Decode]
    data: Sequence[PromptSet]
    temperatures: Sequence[float]
    tokenizer: Any
    max_new_tokens: int
    rivals: Mapping[str, Decode] = field(default_factory=dict)
    max_positions: int | None = None
    seed: int = 0
    repeats: int = 1
    is_strict: bool = False

    @property
    def all_methods(self) -> dict[str, Decode]:
        return {PLAIN: self.methods[PLAIN], **self.methods, **self.rivals}

    @property
    def num_decodings(self) -> int:
        """How often a prompt is decoded in all."""
        turns = sum(data.num_turns for data in self.data)
        return turns * len(self.temperatures) * len(self.all_methods) * self.repeats


@dataclass
class Remarks:
    """What became of an evaluation beside its runs: turns left out, and methods that failed, by cell."""

    skipped: list[Skipped] = field(default_factory=list)
    failures: dict[Cell, str] = field(default_factory=dict)


def evaluate(
    evaluation: Evaluation,
    journal: Journal,
    remarks: Remarks,
    advance: Callable[[int], None] = lambda decodings: None,
) -> None:
    """Make every run that the journal does not have yet.

    A method that raises is left out of the rest of its cell, and tried again by the next call. `advance` is called
    with how many decodings are done or need none.
    """
    for data in evaluation.data:
        for temperature in evaluation.temperatures:
            _warm_up(evaluation, journal, data, temperature)
            for index, prompt in enumerate(data.prompts):
                _Conversation(evaluation, journal, remarks, data.name, temperature, index).run(prompt, advance)


def _warm_up(evaluation: Evaluation, journal: Journal, data: PromptSet, temperature: float) -> None:
    """Decode a few tokens that nobody counts: first calls pay for lazy initialisations and measured costs.

    On a GPU kernels are compiled for prompts of several sizes besides, and cycles recorded.
    """
    num_done = sum(run.data == data.name and run.temperature == temperature for run in journal.runs.values())
    if num_done == data.num_turns * len(evaluation.all_methods):
        return
    # Empty prompts are skipped, so that nothing would be warmed up by one.
    prompts = [ids for prompt in data.prompts if (ids := prompt.token_ids(evaluation.tokenizer))]
    if not prompts:
        return
    limit = min(WARM_UP_TOKENS, evaluation.max_new_tokens)
    options = {"temperature": temperature, "max_new_tokens": limit, "seed": evaluation.seed}
    shortest, longest = min(prompts, key=len), max(prompts, key=len)
    for ids in (shortest, longest) if has_gpu() and len(shortest) < len(longest) else (shortest,):
        for outcome in decode_in_turn(evaluation.all_methods, ids, 1, **options).values():
            if isinstance(outcome, Exception) and evaluation.is_strict:
                raise outcome


def has_gpu() -> bool:
    """Whether methods may run where kernels are compiled at their first call."""
    return torch.cuda.is_available()


@dataclass
class _Conversation:
    """The turns of one prompt at one temperature; each but the first follows plain decoding's answer."""

    evaluation: Evaluation
    journal: Journal
    remarks: Remarks
    data: str
    temperature: float
    index: int

    def run(self, prompt: Prompt, advance: Callable[[int], None]) -> None:
        per_turn = len(self.evaluation.all_methods) * self.evaluation.repeats
        num_turns = prompt.num_turns
        for turn in range(1, num_turns + 1):
            left = num_turns + 1 - turn
            ids = prompt.token_ids(self.evaluation.tokenizer)
            if reason := self._unfit(ids):
                self._skip(prompt.name, turn, left, reason)
                return advance(per_turn * left)
            self._run_turn(prompt, turn, ids)
            advance(per_turn)
            if prompt.later_turns:
                plain = self.journal.runs.get((self.data, self.temperature, self.index, turn, PLAIN))
                if plain is None:
                    self._skip(prompt.name, turn + 1, left - 1, "plain decoding gave no answer to go on from")
                    return advance(per_turn * (left - 1))
                prompt = prompt.followed_by(self._text(plain.tokens))
        return None

    def _unfit(self, ids: Sequence[int]) -> str | None:
        limit, new = self.evaluation.max_positions, self.evaluation.max_new_tokens
        if not ids:
            return "the prompt is empty"
        if limit is not None and len(ids) + new > limit:
            return f"{len(ids)} tokens and {new} new ones would pass {limit} positions"
        return None

    def _skip(self, name: str, turn: int, num_turns: int, reason: str) -> None:
        for missing in range(turn, turn + num_turns):
            why = reason if missing == turn else "it follows a skipped turn"
            skipped = Skipped(self.data, self.index, name, missing, why)
            if skipped not in self.remarks.skipped:  # every temperature skips it
                self.remarks.skipped.append(skipped)

    def _run_turn(self, prompt: Prompt, turn: int, ids: Sequence[int]) -> None:
        """Decode one turn with the methods that have not yet, and journal what they did."""
        key = self.data, self.temperature, self.index, turn
        missing = {
            name: decode
            for name, decode in self.evaluation.all_methods.items()
            if (*key, name) not in self.journal.runs
            and (self.data, self.temperature, name) not in self.remarks.failures
        }
        outcomes = decode_in_turn(
            missing,
            ids,
            self.evaluation.repeats,
            temperature=self.temperature,
            max_new_tokens=self.evaluation.max_new_tokens,
            seed=self.evaluation.seed + self.index,
        )
        for method, outcome in outcomes.items():  # plain is the first
            if isinstance(outcome, Exception):
                if self.evaluation.is_strict:
                    raise outcome
                cell = self.data, self.temperature, method
                self.remarks.failures[cell] = f"{type(outcome).__name__}: {outcome} (prompt {prompt.name})"
            else:
                reference = outcome[-1] if method == PLAIN else self.journal.runs.get((*key, PLAIN))
                expected = None if reference is None else reference.tokens
                identical = self._is_identical(method, outcome, expected)
                self.journal.add(_as_run(key, method, prompt, len(ids), outcome, identical))
        if (plain := self.journal.runs.get((*key, PLAIN))) is not None:
            self._compare_earlier(key, plain.tokens)

    def _compare_earlier(self, key: tuple[str, float, int, int], expected: list[int] | None) -> None:
        """Compare what an earlier run, in which plain decoding had failed, could not."""
        for method in self.evaluation.all_methods:
            run = self.journal.runs.get((*key, method))
            if run is not None and run.identical is None:
                identical = self._is_identical(method, [run], expected)
                if identical is not None:
                    self.journal.add(replace(run, identical=identical))

    def _is_identical(self, method: str, repeats: Sequence[Decoded | Run], expected: list[int] | None) -> bool | None:
        if expected is None or (self.temperature > 0 and method in self.evaluation.rivals):
            return None
        return all(one.tokens == expected if one.text is None else one.text in self._texts(expected) for one in repeats)

    def _text(self, tokens: list[int] | None) -> str:
        text: str = self.evaluation.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _texts(self, tokens: list[int]) -> set[str]:
        """How other engines may write these tokens: decoders differ in a first space, and in spaces before marks."""
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        decode = partial(self.evaluation.tokenizer.decode, **options)
        return {self._text(tokens), decode(tokens), text_behind(tokens, decode)}


def _as_run(
    key: tuple[str, float, int, int],
    method: str,
    prompt: Prompt,
    num_prompt_tokens: int,
    decoded: Sequence[Decoded],
    identical: bool | None,
) -> Run:
    last, counts, repeats = decoded[-1], merged(decoded), len(decoded)
    has_cycles = last.statistics is not None
    peaks = [one.peak_bytes for one in decoded if one.peak_bytes is not None]
    return Run(
        *key,
        method=method,
        name=prompt.name,
        category=prompt.category,
        num_prompt_tokens=num_prompt_tokens,
        num_tokens=last.num_tokens,
        seconds=statistics.median(one.seconds for one in decoded),
        num_cycles=counts.num_cycles / repeats if has_cycles else None,
        accepted_at=[count / repeats for count in counts.accepted_at],
        reached_at=[count / repeats for count in counts.reached_at],
        stages={stage: s / repeats for stage, s in counts.seconds.items()} if has_cycles else {},
        peak_bytes=max(peaks, default=None),
        identical=identical,
        tokens=last.tokens,
        text=last.text,
    )
