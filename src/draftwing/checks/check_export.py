"""An exported folder in its engine: what is decoded there and here, or what a loader reads, beside each other."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from draftwing.checks.agreement import Agreement, compare, drafts_agree
from draftwing.checks.engine_task import EngineAnswer, EngineTask
from draftwing.checks.find_engine import Checker
from draftwing.checks.llama_server import llama_session
from draftwing.checks.loaders import Loaded, load_there
from draftwing.checks.ours import decode_here, load_here
from draftwing.checks.vllm import vllm_session
from draftwing.data.prompts import Prompt
from draftwing.drafts.kinds import family_of_files
from draftwing.drafts.load_draft import open_draft
from draftwing.drafts.publish import EXPORT_FILE
from draftwing.target.load import resolve_target

DEPTH, NUM_PROMPTS, NUM_TOKENS, SECONDS = 3, 6, 64, 600.0
"""What a check decodes, and how long an engine may take for its start, and for each answer."""
SESSIONS = {"vllm": vllm_session, "llama-server": llama_session}


@dataclass(frozen=True)
class Check:
    """What a check found: an agreement and an answer for each prompt where the checker decodes, else `loaded`."""

    engine: str
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
        found = [
            f"{row.prompt}: other tokens from new token {row.parted_at} on" for row in self.rows if not row.tokens_agree
        ]
        if not drafts_agree(self.rows):
            compared, equal = sum(row.num_compared for row in self.rows), sum(row.num_equal for row in self.rows)
            found.append(f"drafts: {compared - equal} of {compared} cycles accept another number of tokens than here")
        return found

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without the answers' tokens."""
        found = asdict(replace(self, answers=[])) | {"agrees": not self.problems, "problems": self.problems}
        return {name: value for name, value in found.items() if value not in ([], None) or name == "problems"}


@dataclass(frozen=True)
class CheckRequest:
    """What is to be checked: an exported folder, on which target, by whom, on which prompts.

    Attributes:
        reference: the folder that is decoded here, or compared with; None: the same folder, which is read back.
    """

    folder: Path
    engine: str
    target: str
    checker: Checker
    prompts: Sequence[Prompt]
    target_gguf: Path | None = None
    num_tokens: int = NUM_TOKENS
    seconds: float = SECONDS
    reference: Path | None = None

    @property
    def written(self) -> Path:
        """What the folder should mean."""
        return self.reference or self.folder


def written_for(folder: Path, engine: str | None = None, target: str | None = None) -> tuple[str, str]:
    """The engine and the target that a folder was exported for; what is given goes before what its record says.

    Raises:
        ValueError: something is not given, and there is no record.
    """
    try:
        facts = json.loads((folder / EXPORT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        facts = {}
    engine, target = engine or facts.get("to"), target or facts.get("target")
    if not engine or not target:
        option = "target" if engine else "to"
        raise ValueError(f"{option}: {folder} has no {EXPORT_FILE} that says so; name it (--{option})")
    return engine, target


def check_export(request: CheckRequest, say: Callable[[str], None] = lambda text: None) -> Check:
    """Run the checker on the folder; `say` is told what happens, for an engine takes a minute to start.

    Raises:
        ValueError: a folder that cannot be loaded here, an engine that does not start, ends or hangs.
    """
    checker = request.checker
    if checker.name not in SESSIONS:
        say(f"{checker.name} loads {request.folder}")
        loaded = load_there(checker.name, checker.at, request.folder, request.seconds, request.written)
        return Check(request.engine, checker.name, loaded.version, loaded=loaded)
    return _decode_and_compare(request, say)


def _decode_and_compare(request: CheckRequest, say: Callable[[str], None]) -> Check:
    files = open_draft(str(request.written))
    task = _job(request, family_of_files(files.values, files.tensors).methods[-1].name)
    model = load_here(task, str(request.written))
    names = [prompt.name for prompt in request.prompts]
    task = task.on([prompt.token_ids(model.tokenizer) for prompt in request.prompts])
    model.check(task.prompts, max_new_tokens=task.num_tokens)
    say(f"{request.checker.name} starts, which takes a minute or more")
    rows: list[Agreement] = []
    given: list[EngineAnswer] = []
    with SESSIONS[request.checker.name](request.checker.at, task) as session:
        for name, ours, theirs in zip(names, decode_here(model, task), session.answers, strict=True):
            rows.append(compare(name, ours, theirs, model.target.eos_token_ids))
            given.append(theirs)
            say(f"{len(rows)} of {len(names)} prompts")
    return Check(request.engine, request.checker.name, session.version, rows, given)


def _job(request: CheckRequest, method: str) -> EngineTask:
    if request.checker.name == "llama-server" and request.target_gguf is None:
        raise ValueError("target_gguf: llama.cpp's server runs the target's GGUF file; pass it (--target-gguf)")
    return EngineTask(
        folder=request.folder.absolute(),
        target=resolve_target(request.target),
        target_gguf=request.target_gguf,
        method=method,
        prompts=[],
        num_tokens=request.num_tokens,
        depth=DEPTH,
        seconds=request.seconds,
    )
