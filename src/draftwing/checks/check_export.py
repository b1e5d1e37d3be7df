"""An exported folder in its engine: what is decoded there and here, or what a loader reads, beside each other."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from draftwing.api import SpeculativeModel, load
from draftwing.checks.agreement import Agreement, EngineAnswer, compare, drafts_agree
from draftwing.checks.engine_process import EngineTask
from draftwing.checks.find_engine import Checker
from draftwing.checks.llama_server import llama_session
from draftwing.checks.loaders import Loaded, load_there
from draftwing.checks.vllm import vllm_session
from draftwing.data.prompts import Prompt
from draftwing.drafts.kinds import family_of
from draftwing.drafts.publish import ExportFacts
from draftwing.target.load import resolve_target

DEPTH, NUM_PROMPTS, NUM_TOKENS, SECONDS = 3, 6, 64, 600.0
"""What a check decodes, and how long an engine may take for its start, and for each answer."""
SESSIONS = {"vllm": vllm_session, "llama-server": llama_session}
"""The checkers that decode; the others load."""


@dataclass(frozen=True)
class Check:
    """What a check found.

    Attributes:
        to: the engine that the folder was exported to.
        checker, version: what has read the folder.
        rows: of a checker that decodes: what agreed of each prompt.
        answers: of a checker that decodes: its tokens and cycles of each prompt.
        loaded: of a checker that loads: what it read.
    """

    to: str
    checker: str
    version: str
    rows: list[Agreement] = field(default_factory=list)
    answers: list[EngineAnswer] = field(default_factory=list, repr=False)
    loaded: Loaded | None = None

    @property
    def problems(self) -> list[str]:
        """What does not agree, one sentence each."""
        if self.loaded is not None:
            return [f"{name}: it reads something else" for name in self.loaded.differing]
        parted = [row for row in self.rows if not row.tokens_agree]
        found = [f"{row.prompt}: other tokens from new token {row.parted_at} on" for row in parted]
        compared, equal = self._num_compared, self._num_equal
        if not compared:
            found.append("drafts: no cycle could be compared; take prompts with longer answers (--prompts)")
        elif not drafts_agree(self.rows):
            found.append(f"drafts: {compared - equal} of {compared} cycles accept another number of tokens than here")
        return found

    @property
    def conclusion(self) -> str:
        """All of it in a sentence."""
        if self.problems:
            return f"does not agree: {'; '.join(self.problems)}"
        if self.loaded is not None:
            return f"agrees: {self.checker} reads {self.loaded.num_fields} fields and {self.loaded.num_tensors} tensors"
        return (
            f"agrees: the same {sum(row.num_tokens for row in self.rows)} tokens, and as many drafted tokens accepted "
            f"in {self._num_equal} of {self._num_compared} cycles"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without the answers' tokens."""
        found = asdict(replace(self, answers=[])) | {"agrees": not self.problems, "problems": self.problems}
        return {name: value for name, value in found.items() if value not in ([], None) or name == "problems"}

    @property
    def _num_compared(self) -> int:
        return sum(row.num_compared for row in self.rows)

    @property
    def _num_equal(self) -> int:
        return sum(row.num_equal for row in self.rows)


@dataclass(frozen=True)
class CheckRequest:
    """What is to be checked: a folder that was exported `to` an engine, on which target, by whom, on which prompts.

    Attributes:
        reference: the folder that is decoded here, or compared with; None: the same folder, which is read back.
    """

    folder: Path
    to: str
    target: str
    checker: Checker
    prompts: Sequence[Prompt]
    target_gguf: Path | None = None
    num_tokens: int = NUM_TOKENS
    seconds: float = SECONDS
    reference: Path | None = None

    def __post_init__(self) -> None:
        if self.to == "llama.cpp" and self.target_gguf is None:
            raise ValueError("target_gguf: llama.cpp's server runs the target's GGUF file; pass it (--target-gguf)")

    @property
    def written(self) -> Path:
        """What the folder should mean."""
        return self.reference or self.folder


def written_for(folder: Path, to: str | None = None, target: str | None = None) -> tuple[str, str]:
    """Which engine and which target an exported folder is checked with: those given, else those on its record.

    Raises:
        ValueError: one is not given, and there is no record that can be read.
    """
    if to and target:
        return to, target
    try:
        facts = ExportFacts.read(folder)
    except ValueError as error:
        option = "target" if to else "to"
        raise ValueError(f"{option}: {error}; or name it (--{option})") from None
    return to or facts.to, target or facts.target


def check_export(request: CheckRequest, say: Callable[[str], None] = lambda text: None) -> Check:
    """Run the checker on the folder; `say` is told what happens, for an engine takes a minute to start.

    Raises:
        ValueError: a folder that cannot be loaded here, an engine that does not start, ends or hangs.
    """
    checker = request.checker
    if checker.name not in SESSIONS:
        say(f"{checker.name} loads {request.folder}")
        loaded = load_there(checker.name, checker.at, request.folder, request.seconds, request.written)
        return Check(request.to, checker.name, loaded.version, loaded=loaded)
    return _decode_and_compare(request, say)


def _decode_and_compare(request: CheckRequest, say: Callable[[str], None]) -> Check:
    model = load(request.target, draft=str(request.written), dtype="float32", draft_dtype="target")
    names = [prompt.name for prompt in request.prompts]
    task = EngineTask(
        folder=request.folder.absolute(),
        target=resolve_target(request.target),
        target_gguf=request.target_gguf,
        method=model.method,
        prompts=[prompt.token_ids(model.tokenizer) for prompt in request.prompts],
        num_tokens=request.num_tokens,
        depth=DEPTH,
        seconds=request.seconds,
    )
    model.check(task.prompts, max_new_tokens=task.num_tokens)
    say(f"{request.checker.name} starts, which takes a minute or more")
    rows: list[Agreement] = []
    given: list[EngineAnswer] = []
    with SESSIONS[request.checker.name](request.checker.at, task) as session:
        here = decode_here(model, task.prompts, task.num_tokens)
        for name, ours, theirs in zip(names, here, session.answers, strict=True):
            rows.append(compare(name, ours, theirs, model.target.eos_token_ids))
            given.append(theirs)
            say(f"{len(rows)} of {len(names)} prompts")
    return Check(request.to, request.checker.name, session.version, rows, given)


def decode_here(model: SpeculativeModel, prompts: Sequence[list[int]], num_tokens: int) -> Iterator[EngineAnswer]:
    """What draftwing decodes, as engines do: greedy chains of DEPTH, no lookups, the whole text read.

    The first token of each answer is decoded plainly: engines have it before they draft.
    """
    read_all = {"ngram": False, "draft_window": max(map(len, prompts)) + num_tokens + DEPTH + 1}
    drafting = {"plan": f"chain:{DEPTH}"} | {name: read_all[name] for name in family_of(model.method).takes}
    for prompt in prompts:
        plain = model.generate([prompt], max_new_tokens=1, plan="off", return_dict_in_generate=True)
        tokens = list(plain.tokens[0])  # type: ignore[union-attr]
        cycles: list[int] = []
        if tokens[-1] not in model.target.eos_token_ids:
            for committed in model.stream([[*prompt, *tokens]], max_new_tokens=num_tokens - 1, **drafting):
                cycles.append(len(committed.tokens[0]))
                tokens += committed.tokens[0]
        yield EngineAnswer(tokens, cycles)
