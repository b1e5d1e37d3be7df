"""An exported folder's model card, and its way to the Hugging Face hub.

EXPORT_FILE holds facts and no path; the card and the command lines are written from them, for the place where the
folder is.
"""

import json
import re
import shlex
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from draftwing.drafts.eagle.gguf_head import HEAD_GGUF
from draftwing.files import write_text

EXPORT_FILE, CARD = "export.json", "README.md"
"""What `draftwing export` says of a folder that it has written, for programs and for people."""
RUN_LOG, RESULTS = "training.json", "results.json"
"""What a draft's own folder may have beside its files: its training's record, and `draftwing eval --output`'s."""
FROM_RECIPE = ("objective", "loss", "max_steps", "batch_size", "sequence_length", "learning_rate", "ttt_steps", "seed")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class ExportFacts:
    """What is on record of an exported folder.

    Attributes:
        to, engine: the engine as `--to` names it, and with the version whose loader was read.
        method: as the engine calls it, such as eagle3.
        depth: of the chains that the engine is told to draft.
        draft: the last part of its name.
        target: as the engine loads it.
        target_gguf: the name of the target's GGUF file, if the engine runs that.
        training: the settings and figures of the draft's training, by name.
        acceptance: tau (tokens per pass of the target) by task, temperature and method.
        files: the names of all that was written.
    """

    to: str
    engine: str
    method: str
    depth: int
    draft: str
    target: str
    target_gguf: str = ""
    license: str = ""
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)
    acceptance: list[dict[str, Any]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def write(self, folder: Path, place: str, target_gguf: str = "") -> None:
        """Write the record and the card of a folder that will lie at `place`."""
        write_text(folder / EXPORT_FILE, self.as_json())
        write_text(folder / CARD, self.card(place, target_gguf))

    def as_json(self) -> str:
        return json.dumps(vars(self), indent=2) + "\n"

    @staticmethod
    def read(folder: Path) -> "ExportFacts":
        """The record of an exported folder.

        Raises:
            ValueError: there is none, or it is not what `draftwing export` writes today.
        """
        file = folder / EXPORT_FILE
        if not file.is_file():
            raise ValueError(f"export: {folder} has no {EXPORT_FILE}; `draftwing export` writes it")
        try:
            facts = ExportFacts(**json.loads(file.read_text(encoding="utf-8")))
            for name, default in vars(ExportFacts("", "", "", 0, "", "")).items():
                if type(getattr(facts, name)) is not type(default):
                    raise TypeError(f"{name} is a {type(getattr(facts, name)).__name__}")
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"export: cannot read {file}: {error}; export the draft again") from None
        return facts

    def command(self, place: str, target_gguf: str = "") -> str:
        """The command line that starts the engine with the folder at `place`."""
        target, draft = shlex.quote(self.target), shlex.quote(place)
        if self.to in ("vllm", "speculators"):
            config = {"method": self.method, "model": place, "num_speculative_tokens": self.depth}
            named = shlex.quote(json.dumps(config, ensure_ascii=False))
            return f"vllm serve {target} --speculative-config {named}"
        if self.to == "sglang":
            return (
                f"python -m sglang.launch_server --model-path {target} --speculative-algorithm {self.method.upper()} "
                f"--speculative-draft-model-path {draft} --speculative-num-steps {self.depth} "
                f"--speculative-eagle-topk 1 --speculative-num-draft-tokens {self.depth + 1}"
            )
        if self.to == "llama.cpp":
            target, draft = shlex.quote(target_gguf or self.target_gguf), shlex.quote(str(Path(place) / HEAD_GGUF))
            return f"llama-server -m {target} -md {draft} --spec-type draft-eagle3 --spec-draft-n-max {self.depth}"
        return f"python -m eagle.evaluation.gen_ea_answer_llama3chat --base-model-path {target} --ea-model-path {draft}"

    def card(self, place: str, target_gguf: str = "", fetch: str = "") -> str:
        """A model card: what the folder is for, how it is served, what it was trained on, what it brings.

        `fetch` is a command line that brings the folder to `place`, where that is needed.
        """
        head = {"base_model": self.target, "license": self.license, "tags": "[speculative-decoding, draftwing]"}
        draft, target = shlex.quote(place), shlex.quote(self.target)
        here = f'draftwing generate --target {target} --draft {draft} --prompt "..."  # draftwing itself'
        commands = "\n".join(filter(None, (fetch, self.command(place, target_gguf), here)))
        parts = [
            "---\n" + "".join(f"{key}: {value}\n" for key, value in head.items() if value) + "---",
            f"# A draft of {self.target} for {self.engine}",
            f"Exported by draftwing from `{self.draft}`. The target's tokens stay what they are; the draft makes them "
            "come faster.",
            f"```bash\n{commands}\n```",
            "\n".join(f"- {text}" for text in [*self.faults, *self.notes]),
            "\n".join(self._training_lines()),
            "\n".join(self._acceptance_lines()),
            "" if self.license else "No licence was stated for this draft; its target's may bind it.",
        ]
        return "\n\n".join(filter(None, parts)) + "\n"

    def _training_lines(self) -> Iterator[str]:
        if self.training:
            yield "## Training\n\n| | |\n|---|---|"
        for name, value in self.training.items():
            yield f"| {name} | {value} |"

    def _acceptance_lines(self) -> Iterator[str]:
        if self.acceptance:
            yield "## Tokens per pass of the target (tau)\n\n| task | T | method | tau |\n|---|---|---|---|"
        for row in self.acceptance:
            yield f"| {row['task']} | {row['temperature']:g} | {row['method']} | {row['tau']:.2f} |"


def training_of(draft: Path) -> dict[str, Any]:
    """The data, settings, time and last figures of a draft's training, as far as they are on record."""
    record = _read(draft, RUN_LOG)
    recipe, figures = record.get("recipe") or {}, record.get("metrics") or {}
    if not recipe:
        return {}
    data = recipe.get("data") or []
    named = ", ".join(Path(name).name for name in ([data] if isinstance(data, str) else data))
    rows = {"data": named, **{name: recipe[name] for name in FROM_RECIPE if name in recipe}}
    hardware = (record.get("provenance") or {}).get("device")
    rows |= {"seconds": record.get("seconds"), "hardware": hardware}
    rows |= {name.removeprefix("eval_"): value for name, value in figures.items() if "tau" in name or "loss" in name}
    return {name: value for name, value in rows.items() if value not in (None, "")}


def acceptance_of(draft: Path, methods: Collection[str]) -> list[dict[str, Any]]:
    """Tau by task as `draftwing eval` has measured it with this draft, which `methods` decode with.

    The record has rows of other methods and drafts (`eagle3@other`) beside them, and rows in which nothing was drafted.
    """
    found = []
    for row in _read(draft, RESULTS).get("rows") or []:
        if re.split("[:+]", row["method"])[0] not in methods:
            continue
        tasks = {row["data"]: row.get("figures")}
        tasks |= {f"{row['data']}, {category}": figures for category, figures in (row.get("by_category") or {}).items()}
        for task, figures in tasks.items():
            if tau := (figures or {}).get("acceptance_length"):
                named = {"task": task, "temperature": row["temperature"], "method": row["method"]}
                found.append(named | {"tau": tau["value"]})
    return found


def _read(folder: Path, name: str) -> dict[str, Any]:
    """A record beside a draft's files; empty where there is none that can be read."""
    try:
        found = json.loads(((folder if folder.is_dir() else folder.parent) / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def check_publishing(repository: str, target: str) -> None:
    """Raise a ValueError where a draft of `target` could not be published as `repository`.

    That is: a name that nobody else can load, no token, or one that may not write there.
    """
    from huggingface_hub import HfApi, get_token

    if not HUB_NAME.fullmatch(repository):
        raise ValueError(f"push-to-hub: {repository}: expected ORG/NAME")
    if not HUB_NAME.fullmatch(target) or Path(target).exists():
        raise ValueError(f"push-to-hub: {target}: others load the target by its hub id; name it (--verifier ORG/NAME)")
    if not get_token():
        raise ValueError("push-to-hub: no token of the hub here; `hf auth login`, or set HF_TOKEN")
    try:
        who = HfApi().whoami()
    except Exception as error:
        raise _refused(repository, error) from error
    token = (who.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise ValueError("push-to-hub: the token may only read; `hf auth login` with one that writes")
    writable = {who["name"], *(org["name"] for org in who.get("orgs") or [] if org.get("roleInOrg") != "read")}
    if (owner := repository.partition("/")[0]) not in writable:
        raise ValueError(f"push-to-hub: the token may not write to {owner}, only to {', '.join(sorted(writable))}")


def push_folder(folder: Path, repository: str, *, is_private: bool = False, target: str = "", license: str = "") -> str:
    """Upload what `draftwing export` has written into a folder, in one commit; returns its page.

    The card and the record are written anew, for the repository in the folder's place.

    Args:
        repository: ORG/NAME; it is made where it is not there.
        is_private: a repository that is made now is hidden; one that is there stays as it is.
        target, license: instead of those on record.

    Raises:
        ValueError: a folder that is not whole, a target that others cannot load, no token, or the hub says no.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    facts = ExportFacts.read(folder)
    named = replace(facts, target=target or facts.target, license=license or facts.license)
    _check_whole(folder, facts, named.target)
    check_publishing(repository, named.target)
    place, fetch = repository, ""
    if facts.to == "llama.cpp":  # it reads files of this machine
        place = repository.rpartition("/")[2]
        fetch = f"hf download {repository} --local-dir {place}"
    written = {EXPORT_FILE: named.as_json().encode(), CARD: named.card(place, fetch=fetch).encode()}
    parts = [CommitOperationAdd(name, written.get(name, str(folder / name))) for name in facts.files]
    api = HfApi()
    try:
        url = api.create_repo(repository, private=is_private or None, exist_ok=True)
        api.create_commit(repository, parts, commit_message=f"A draft for {facts.engine}")
    except Exception as error:
        raise _refused(repository, error) from error
    return str(url)


def _check_whole(folder: Path, facts: ExportFacts, target: str) -> None:
    """Raise a ValueError where a file is missing, or says another target's name than the card will."""
    if missing := [name for name in facts.files if Path(name).name != name or not (folder / name).is_file()]:
        raise ValueError(f"push-to-hub: {folder} lacks {', '.join(missing)}; export the draft again")
    config = folder / "config.json"
    if target != facts.target and config.is_file() and json.dumps(facts.target) in config.read_text(encoding="utf-8"):
        raise ValueError(f"push-to-hub: {config} names {facts.target}; export the draft again with --verifier {target}")


def _refused(repository: str, error: Exception) -> ValueError:
    """The hub's client raises many kinds; the user needs the name and the reason."""
    return ValueError(f"push-to-hub: {repository}: {type(error).__name__}: {' '.join(str(error).split())}")
