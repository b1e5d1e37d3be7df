"""Load a draft in other ways and measure each on the same tokens of its target.

Evidence is the probability that the draft gives the target's own tokens, down chains from every position: it tells
variants apart that accept the same few tokens. tau says what a fault costs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from draftwing.doctor.replay import Trace, Transcript, replay
from draftwing.doctor.suspects import NOTHING, Suspect, head_suspects, precision_suspects
from draftwing.drafts.eagle.formats import FROM_FILE, HeadOptions, verifier_name
from draftwing.drafts.family import Draft, DrafterOptions
from draftwing.drafts.fit import broken_tensors
from draftwing.drafts.kinds import FAMILIES, family_of_files, new_drafter
from draftwing.drafts.load_draft import check_head_options, open_draft
from draftwing.intervals import Interval, Sums, ratio_interval
from draftwing.target.model import TargetModel

DEPTH = 5
"""Of the chains that are drafted."""
LEAST_SIMILARITY = 0.5
"""Mean cosine between the embeddings of a file and its target: a copy has 1, one trained on 0.9, another target's 0."""
LEVEL = 0.99
"""Of the intervals that decide: about 15 variants are tried, and at 95 % one of 20 would seem better by chance."""
LEAST_GAIN = 1.03
"""A cure makes the target's tokens at least so many times as probable (geometric mean). In the embedded models rounding
changes less than 1 %; the mildest faults, feature layers next to the right ones or another rope_theta, 5 to 9 %."""
LEAST_USE = 1.2
"""So many times as probable they are at least with the right features as with misplaced ones, if a head reads them."""


class Patient:
    """A draft's files and what it was loaded with, to be loaded again with other options.

    Raises:
        ValueError: as `load_draft`.
    """

    def __init__(self, name: str, target: TargetModel, options: HeadOptions = FROM_FILE, tokenizer: Any = None) -> None:
        self.name, self.target, self.options, self._tokenizer = name, target, options, tokenizer
        self._files = open_draft(name)
        self.values, self.tensors = self._files.values, self._files.tensors
        self._family = family_of_files(self.values, self.tensors)
        if not self._family.has_doctor:
            known = ", ".join(family.name for family in FAMILIES if family.has_doctor)
            raise ValueError(f"draft: {name} holds {self._family.name}; the doctor knows {known}")
        self.is_head = self._family.has_head_options
        check_head_options(options, self._family, self._files.folder)
        self.broken = broken_tensors(self.tensors)
        """Of the file's tensors, those that hold NaN or infinity."""
        self.draft: Draft = self.load({})

    def load(self, options: Mapping[str, Any]) -> Draft:
        """The draft with some options of `load` changed."""
        dtype = getattr(torch, options["dtype"]) if "dtype" in options else None
        fields = {name: value for name, value in options.items() if name in HeadOptions.__dataclass_fields__}
        chosen = HeadOptions(**self.options.given | fields)
        kind = self._family.kind
        return kind.prepack(kind.build(self._files, self.target, dtype, chosen, self._tokenizer), compiles=False)

    def suspects(self, longest: int) -> list[Suspect]:
        """What to try, on rows of at most so many tokens."""
        if not self.is_head:
            return precision_suspects(self.target)
        return head_suspects(self.draft.config, self.options, self.tensors, self.target, longest)

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """The numbers of the hidden states that the draft reads."""
        return self._family.kind.feature_layers(self.draft)

    @property
    def layers_of_suspects(self) -> tuple[int, ...]:
        """The numbers of the hidden states that the draft and its variants read."""
        layers = {*self.feature_layers}
        layers.update(*(suspect.options.get("aux_layers", ()) for suspect in self.suspects(longest=0)))
        return tuple(sorted(layers))

    def traces(self, transcripts: Sequence[Transcript], options: Mapping[str, Any]) -> list[Trace]:
        """What the draft does with some options of `load` and `generate` changed."""
        draft, target = self.load(options), self.target
        drafter = new_drafter(
            self._family.methods[-1].name, draft, target, DrafterOptions(window=options.get("draft_window"))
        )
        replays = (replay(transcript, drafter, DEPTH, draft.dtype, target.device) for transcript in transcripts)
        return [trace for traces in replays for trace in traces]

    def clues(self, target_name: str, longest: int) -> list[str]:
        """What the files say against this draft, target and length of rows, without any measurement."""
        if not self.is_head:
            return []
        clues = []
        verifier = verifier_name(self.values)
        if verifier and Path(verifier).name != Path(target_name).name:
            clues.append(f"config.json says that the head was made for {verifier}")
        num_positions = self.draft.config.max_position_embeddings
        if num_positions < longest:
            clues.append(f"max_position_embeddings is {num_positions}, and rows have up to {longest} tokens")
        similarity = self._embedding_similarity()
        if similarity is not None and similarity < LEAST_SIMILARITY:
            clues.append(f"the file's embedding is not the target's (mean cosine {similarity:.2f})")
        return clues

    def _embedding_similarity(self) -> float | None:
        """Mean cosine of some rows of the file's embedding and the target's, None where they cannot be compared."""
        own = self.tensors.get("embed_tokens.weight", self.tensors.get("model.embed_tokens.weight"))
        theirs = getattr(self.target.embedding, "weight", None)
        if own is None or theirs is None or own.shape != theirs.shape:
            return None
        rows = torch.linspace(0, len(own) - 1, min(len(own), 1000)).long()
        theirs = theirs.detach()[rows.to(theirs.device)]
        return float(functional.cosine_similarity(own[rows].float(), theirs.float().cpu(), dim=1).mean())


@dataclass(frozen=True)
class Finding:
    """A variant beside what it is held against: the draft as loaded, or that with its first fault cured.

    Attributes:
        tau: tokens per cycle of chains of DEPTH, with its interval over prompts.
        gain: its tau over that of the draft it is held against.
        evidence: how many times as probable it makes the target's tokens; None where those are others.
    """

    name: str
    means: str
    tau: Interval
    gain: Interval
    evidence: Interval | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_cure(self) -> bool:
        evidence = self.evidence
        return evidence is not None and evidence.value >= LEAST_GAIN and evidence.low > 1 and self.gain.value > 1

    @property
    def may_be_cure(self) -> bool:
        """So few prompts do not prove it, nor that it is none: both intervals reach as far as a cure's figures."""
        if self.evidence is None or self.is_cure:
            return False
        return self.evidence.high >= LEAST_GAIN and self.gain.high > 1

    def as_dict(self) -> dict[str, Any]:
        intervals = {"tau": self.tau, "gain": self.gain, "evidence": self.evidence}
        figures = {name: interval and vars(interval) for name, interval in intervals.items()}
        return {"name": self.name, "means": self.means, "options": dict(self.options), **figures}


class StepCount:
    """Counts measurements, for a progress bar: `show` is told what comes, how many steps are done, and of how many."""

    def __init__(self, show: Callable[[str, int, int], None] = lambda what, done, total: None) -> None:
        self._show = show
        self._done = self._total = 0

    def expect(self, count: int) -> None:
        self._total += count

    def begin(self, what: str) -> None:
        self._show(what, self._done, self._total)
        self._done += 1


class Trials:
    """A draft as loaded, and the trials of every suspect, on what its target said."""

    def __init__(self, patient: Patient, transcripts: Sequence[Transcript], steps: StepCount) -> None:
        self._patient, self._transcripts, self._steps = patient, transcripts, steps
        self._suspects = patient.suspects(max(transcript.longest for transcript in transcripts))
        steps.expect(1)
        steps.begin("as loaded")
        self.loaded = patient.traces(transcripts, {})
        self.findings: list[Finding] = []

    def reads_features(self, suspect: Suspect, traces: Sequence[Trace]) -> bool | None:
        """Whether a variant makes use of the target's features: it is tried with misplaced ones. None: not sure."""
        self._steps.expect(1)
        self._steps.begin("misplaced features (a control)")
        misplaced = [transcript.misplaced() for transcript in self._transcripts]
        control = compare(
            ", ".join(filter(None, (suspect.name, "misplaced features"))),
            "a control: much worse if the draft reads the features",
            self._patient.traces(misplaced, suspect.options),
            traces,
        )
        self.findings.append(control)
        assert control.evidence is not None
        if control.evidence.high < 1 and control.evidence.value < 1 / LEAST_USE:
            return True
        return None if control.evidence.low < 1 / LEAST_USE else False

    def find_cure(self) -> tuple[Suspect, list[Trace]]:
        """The suspect that explains most, joined with the next if that explains more still; else NOTHING.

        What does harm to the draft as loaded is not tried a second time.
        """
        best, traces, suspects = NOTHING, self.loaded, self._suspects
        for _ in range(2):
            trials = list(self._try_beside(best, traces, suspects))
            self.findings += [trial.finding for trial in trials]
            cures = [trial for trial in trials if trial.finding.is_cure]
            if not cures:
                break
            cure = max(cures, key=lambda trial: trial.evidence.value)
            best, traces = best.joined(cure.suspect), cure.traces
            suspects = [trial.suspect for trial in trials if trial.evidence.high >= 1]
            suspects = [suspect for suspect in suspects if not suspect.options.keys() & best.options.keys()]
        return best, traces

    def _try_beside(self, best: Suspect, base: list[Trace], suspects: Sequence[Suspect]) -> Iterator["_Trial"]:
        self._steps.expect(len(suspects))
        for suspect in suspects:
            joined = best.joined(suspect)
            self._steps.begin(joined.name)
            try:
                traces = self._patient.traces(self._transcripts, joined.options)
            except ValueError:  # the file contradicts it: ids outside the vocabulary, a RoPE type that we lack
                continue
            yield _Trial(suspect, compare(joined.name, suspect.fault, traces, base, joined.options), traces)


@dataclass(frozen=True)
class _Trial:
    """A suspect, tried beside another or alone."""

    suspect: Suspect
    finding: Finding
    traces: list[Trace]

    @property
    def evidence(self) -> Interval:
        assert self.finding.evidence is not None  # it is on the same text
        return self.finding.evidence


def compare(
    name: str,
    means: str,
    traces: Sequence[Trace],
    base: Sequence[Trace],
    options: Mapping[str, Any] = NOTHING.options,
    same_text: bool = True,
) -> Finding:
    """A finding from the traces of the same prompts, and from those that it is held against."""
    ours, theirs = _tokens_and_cycles(traces), _tokens_and_cycles(base)
    evidence = _likelihood_ratio(traces, base) if same_text else None
    return Finding(name, means, ratio_interval(ours), ratio_interval(ours, theirs, LEVEL), evidence, options)


def _likelihood_ratio(traces: Sequence[Trace], base: Sequence[Trace]) -> Interval:
    """Geometric mean over tokens and depths of the probability, divided by that of `base`."""
    differences = [float(np.nansum(one.log_probs - other.log_probs)) for one, other in zip(traces, base, strict=True)]
    counts = [float(np.isfinite(trace.log_probs).sum()) for trace in traces]
    mean = ratio_interval((differences, counts), level=LEVEL)
    value, low, high = np.exp((mean.value, mean.low, mean.high)).tolist()
    return Interval(value, low, high)


def _tokens_and_cycles(traces: Sequence[Trace]) -> Sums:
    emitted = [trace.cycles()[1] for trace in traces]
    return [float(row.sum()) for row in emitted], [float(len(row)) for row in emitted]
