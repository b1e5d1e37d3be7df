"""Why is acceptance low? Try the known reasons on what a target says, and name the one that explains it."""

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from draftwing.data.prompts import Prompt, has_chat_template
from draftwing.doctor.replay import Trace, Transcript, transcribe
from draftwing.doctor.suspects import Suspect
from draftwing.doctor.trials import Finding, Patient, StepCount, Trials, compare
from draftwing.engine.engine import Request, check_request, check_requests
from draftwing.engine.sampling import SamplingParams
from draftwing.engine.stopping import StopRule
from draftwing.intervals import FEWEST_PROMPTS

BATCH = 8
TEXT_GAIN = 2.0
"""Raw and templated prompts lead to other text, whose tau differs by up to 1.7 times without a fault, as measured."""
HOPELESS, PROMISING = 1.1, 1.5
"""A tau of draft models below which they predict next to nothing, and one from which a head is not called untrained in
doubt."""
POSITION_EDGES = (0, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
TEMPLATED, RAW = "through the chat template", "without the chat template"


@dataclass(frozen=True)
class Text:
    """What a target said to some prompts, and what it said to them `otherwise`: sampled, or another way of asking."""

    transcripts: Sequence[Transcript]
    otherwise: Mapping[str, Sequence[Transcript]] = field(default_factory=dict)

    @property
    def num_prompts(self) -> int:
        return sum(len(transcript.tokens) for transcript in self.transcripts)

    @property
    def overflows(self) -> bool:
        """Whether the target's features hold infinities or NaNs."""
        features = (rows for transcript in self.transcripts for rows in transcript.features.values())
        return any(not row.isfinite().all() for rows in features for row in rows)


@dataclass(frozen=True)
class Conclusion:
    """One sentence, whether it names a fault, and the options of `load` and `generate` that cure it."""

    sentence: str
    is_fault: bool = False
    cure: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Diagnosis:
    """The verdict and all that it rests on.

    Attributes:
        loaded: the draft as it was loaded.
        findings: the trials, each held against it, or against the draft with its first fault cured.
        otherwise: the draft as loaded, on other text.
        positions: tau by the root's position, from the first of a range to the last.
        clues: what the files give away.
    """

    verdict: Conclusion
    loaded: Finding
    findings: list[Finding]
    otherwise: list[Finding]
    positions: dict[str, float]
    clues: list[str]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready figures."""
        return {
            "sentence": self.verdict.sentence,
            "is_fault": self.verdict.is_fault,
            "cure": dict(self.verdict.cure),
            "flags": as_flags(self.verdict.cure),
            "loaded": self.loaded.as_dict(),
            "findings": [finding.as_dict() for finding in self.findings],
            "otherwise": [finding.as_dict() for finding in self.otherwise],
            "positions": self.positions,
            "clues": self.clues,
        }


def decode_prompts(
    patient: Patient,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    temperature: float,
    max_new_tokens: int,
    steps: StepCount,
) -> Text:
    """Decode the prompts plainly: as asked, at another temperature, and with or without the chat template."""
    has_template = has_chat_template(tokenizer)
    if not has_template:
        prompts = [as_raw(prompt) for prompt in prompts]
    stop = StopRule(max_new_tokens, patient.target.eos_token_ids)

    def requests_for(asked: Iterable[Prompt], degree: float) -> list[Request]:
        ids = (prompt.token_ids(tokenizer) for prompt in asked)
        return [Request(row, SamplingParams(degree, seed=seed), stop) for seed, row in enumerate(ids)]

    other = 0.0 if temperature > 0 else 1.0
    ways = {"": requests_for(prompts, temperature), f"temperature {other:g}": requests_for(prompts, other)}
    if any(prompt.messages for prompt in prompts):
        ways[RAW] = requests_for(map(as_raw, prompts), temperature)
    elif has_template:
        ways[TEMPLATED] = requests_for(map(as_chat, prompts), temperature)
    for requests in ways.values():
        check_requests(requests, partial(check_request, patient.target))  # all, before the first is decoded
    steps.expect(len(ways))
    texts: dict[str, list[Transcript]] = {}
    for name, requests in ways.items():
        steps.begin(f"the target alone, {name or 'as asked'}")
        layers = patient.feature_layers if name else patient.layers_of_suspects
        batches = (requests[first : first + BATCH] for first in range(0, len(requests), BATCH))
        texts[name] = [transcribe(patient.target, batch, layers) for batch in batches]
    return Text(texts.pop(""), texts)


def as_raw(prompt: Prompt) -> Prompt:
    """The same words, given without a chat template."""
    return Prompt(prompt.name, prompt.text or "\n".join(message["content"] for message in prompt.messages))


def as_chat(prompt: Prompt) -> Prompt:
    """The same words, as a user's message."""
    return Prompt(prompt.name, messages=prompt.messages or ({"role": "user", "content": prompt.text},))


def examine(patient: Patient, text: Text, clues: Sequence[str], steps: StepCount) -> Diagnosis:
    """Try every suspect on what the target said, then the best one with each other, and conclude.

    The transcripts hold `Patient.layers_of_suspects`. Nothing is tried on features that overflow, nor of a draft
    whose file is broken.
    """
    trials = Trials(patient, text.transcripts, steps)
    loaded = compare("as loaded", "", trials.loaded, trials.loaded)
    positions = tau_by_position(trials.loaded)
    if broken := _broken_numbers(patient, text):
        return Diagnosis(broken, loaded, [], [], positions, list(clues))
    steps.expect(len(text.otherwise))
    otherwise = []
    for name, transcripts in text.otherwise.items():
        steps.begin(name)
        traces = patient.traces(transcripts, {})
        otherwise.append(compare(name, "other text, no fault in itself", traces, trials.loaded, same_text=False))
    cure, traces = trials.find_cure()
    is_useful = trials.reads_features(cure, traces) if patient.is_head else loaded.tau.high >= HOPELESS
    cured = compare(cure.name, cure.fault, traces, trials.loaded, cure.options)
    if text.num_prompts < FEWEST_PROMPTS:
        got = f"{text.num_prompts}, with a tau of {loaded.tau.value:.2f}"
        verdict = Conclusion(f"Too few prompts to tell: {got}; give at least {FEWEST_PROMPTS} with --prompts.")
    else:
        verdict = conclude(loaded, cured, is_useful, otherwise, trials.findings)
    return Diagnosis(verdict, loaded, trials.findings, otherwise, positions, list(clues))


def _broken_numbers(patient: Patient, text: Text) -> Conclusion | None:
    """Which fault spoils every figure: features that overflow, or a draft's file with NaN or infinity in it."""
    if text.overflows:
        dtype = str(patient.target.dtype).removeprefix("torch.")
        cure = {"dtype": "float32" if patient.target.device.type == "cpu" else "bfloat16"}
        return Conclusion(f"Fault: the target's features overflow in {dtype}; pass {advice(cure)}.", True, cure)
    if patient.broken:
        return Conclusion(f"Fault: the draft's {'; '.join(patient.broken)}; fetch or train it anew.", True)
    return None


def conclude(
    loaded: Finding, cured: Finding, is_useful: bool | None, otherwise: Sequence[Finding], findings: Sequence[Finding]
) -> Conclusion:
    """The sentence that follows from the figures; `is_useful` is None where they don't say."""
    tau = f"{loaded.tau.value:.2f}"
    if cured.options and is_useful:
        sentence = f"Fault: {cured.means}; pass {advice(cured.options)}: tau {tau} becomes {cured.tau.value:.2f}."
        return Conclusion(sentence, True, cured.options)
    if is_useful is None and loaded.tau.low >= PROMISING:
        doubt = "whether the draft reads this target's features at all"
        return Conclusion(f"Too few prompts to tell {doubt} (tau {tau}); give more with --prompts or --max-new-tokens.")
    if not is_useful:
        sentence = f"Fault: the draft is untrained, or was made for another target (tau {tau}); pass another --draft."
        return Conclusion(sentence, True)
    for other in otherwise:
        if other.gain.low > 1 and other.gain.value >= TEXT_GAIN and other.name in (TEMPLATED, RAW):
            do = "give chat prompts (--chat, or rows with messages)" if other.name == TEMPLATED else "give raw prompts"
            sentence = f"Fault: the draft was not trained on prompts of this kind; {do}: tau {tau} becomes "
            return Conclusion(f"{sentence}{other.tau.value:.2f} {other.name}.", True)
    easier = [other for other in otherwise if other.name == "temperature 0" and other.gain.value > 1]
    reason = f", {easier[0].tau.value:.2f} at temperature 0: sampled text is harder" if easier else ""
    if doubtful := [finding for finding in findings if finding.may_be_cure]:
        best = max(doubtful, key=lambda finding: finding.gain.value)
        return Conclusion(
            f"Too few prompts to tell whether {best.means} ({advice(best.options)}: tau {tau} or "
            f"{best.tau.value:.2f}{reason}); give more with --prompts or --max-new-tokens."
        )
    tau += f" ({loaded.tau.low:.2f} to {loaded.tau.high:.2f})"
    return Conclusion(f"Nothing is wrong: a tau of {tau}{reason} is what this draft gives on these prompts.")


def advice(options: Mapping[str, Any]) -> str:
    """Options as a user passes them, in Python and to the commands."""
    return f"{Suspect('', options).name} ({as_flags(options)})"


def as_flags(options: Mapping[str, Any]) -> str:
    """Options of `load` and `generate` as the commands take them."""
    flags = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            flags.append(f"--{flag} {','.join(map(str, value))}")
        else:
            flags.append(f"--{flag} {shlex.quote(json.dumps(value) if isinstance(value, dict) else f'{value}')}")
    return " ".join(flags)


def tau_by_position(traces: Sequence[Trace]) -> dict[str, float]:
    """tau of the cycles whose roots have these positions."""
    edges = np.array(POSITION_EDGES)
    cycles = [(trace.positions[indices], emitted) for trace in traces for indices, emitted in [trace.cycles()]]
    ranges = np.searchsorted(edges, np.concatenate([positions for positions, _ in cycles]), side="right")
    emitted = np.concatenate([emitted for _, emitted in cycles])
    return {
        f"{edges[index - 1]}-{edges[index] - 1 if index < len(edges) else ''}": float(emitted[ranges == index].mean())
        for index in np.unique(ranges)
    }


def as_report(diagnosis: Diagnosis) -> Group:
    """The diagnosis as people read it; the sentence comes last."""
    table = Table(title="What the draft gives the target's own tokens", box=SIMPLE_HEAD, collapse_padding=True)
    table.add_column("variant", overflow="fold")
    for column in ("tau", "95 % interval", "probability"):
        table.add_column(column, justify="right")
    table.add_column("what it means if it is better", overflow="fold")
    for finding in (diagnosis.loaded, *diagnosis.findings, *diagnosis.otherwise):
        style = "bold green" if finding.is_cure else ""
        table.add_row(*_cells(finding), style=style, end_section=finding is diagnosis.loaded)
    return Group(table, *_remarks(diagnosis))


def _cells(finding: Finding) -> tuple[str, ...]:
    tau, evidence = finding.tau, finding.evidence
    probability = "" if evidence is None or not finding.means else f"x {evidence.value:.2f}"
    return finding.name, f"{tau.value:.2f}", f"{tau.low:.2f} - {tau.high:.2f}", probability, finding.means


def _remarks(diagnosis: Diagnosis) -> Iterator[str]:
    if len(diagnosis.positions) > 1:
        parts = ", ".join(f"{tau:.2f} at {positions}" for positions, tau in diagnosis.positions.items())
        yield f"tau by position: {parts}."
    for clue in diagnosis.clues:
        yield f"Note: {clue}."
