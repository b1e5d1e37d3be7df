"""An exported folder's model card, and its way to the Hugging Face hub."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

EXPORT_FILE = "export.json"
"""What `draftwing export` says of a folder that it has written."""
RUN_LOG, RESULTS = "training.json", "results.json"
"""What a draft's own folder may have beside its files: its training's record, and `draftwing eval --output`'s."""
FROM_RECIPE = ("objective", "loss", "max_steps", "batch_size", "sequence_length", "learning_rate", "ttt_steps", "seed")


def model_card(facts: Mapping[str, Any], draft: Path, folder: Path, license: str = "") -> str:
    """A model card: what the folder is for, how it is served, what it was trained on, what it brings, what to know.

    `facts` are those of EXPORT_FILE; `draft` is the folder that was exported to `folder`.
    """
    trained, measured = _read(draft, RUN_LOG), _read(draft, RESULTS)
    head = {"base_model": facts["target"], "license": license, "tags": "[speculative-decoding, draftwing]"}
    parts = [
        "---\n" + "".join(f"{key}: {value}\n" for key, value in head.items() if value) + "---",
        f"# A draft of {facts['target']} for {facts['engine']}",
        f"Exported by draftwing from `{facts['draft']}`. The target's tokens stay what they are; the draft makes them "
        "come faster.",
        f"```bash\n{facts['command']}\n"
        f'draftwing generate --target {facts["target"]} --draft {folder} --prompt "..."  # draftwing itself\n```',
        "\n".join(f"- {text}" for text in [*facts["faults"], *facts["notes"]]),
        "\n".join(_training(trained)),
        "\n".join(_acceptance(measured)),
        "" if license else "No licence was stated for this draft; its target's may bind it.",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _training(record: Mapping[str, Any]) -> Iterator[str]:
    """The training's data, settings, time and last figures."""
    recipe, figures = record.get("recipe") or {}, record.get("metrics") or {}
    if not recipe:
        return
    yield "## Training\n"
    data = recipe.get("data") or []
    named = ", ".join(Path(name).name for name in ([data] if isinstance(data, str) else data))
    rows = {"data": named, **{name: recipe[name] for name in FROM_RECIPE if name in recipe}}
    hardware = (record.get("provenance") or {}).get("device")
    rows |= {"seconds": record.get("seconds"), "hardware": hardware}
    rows |= {name.removeprefix("eval_"): value for name, value in figures.items() if "tau" in name or "loss" in name}
    yield "| | |\n|---|---|"
    for name, value in rows.items():
        if value not in (None, ""):
            yield f"| {name} | {value} |"


def _acceptance(record: Mapping[str, Any]) -> Iterator[str]:
    """Tokens per cycle (tau) by task, as `draftwing eval` has measured them."""
    rows = [row for row in record.get("rows") or [] if row.get("figures") and row["method"] != "plain"]
    if rows:
        yield "## Tokens per pass of the target (tau)\n"
        yield "| task | T | method | tau |\n|---|---|---|---|"
    for row in rows:
        tasks = {row["data"]: row["figures"]}
        tasks |= {f"{row['data']}, {category}": figures for category, figures in (row.get("by_category") or {}).items()}
        for task, figures in tasks.items():
            tau = figures["acceptance_length"]["value"]
            yield f"| {task} | {row['temperature']:g} | {row['method']} | {tau:.2f} |"


def _read(folder: Path, name: str) -> dict[str, Any]:
    """A record beside a draft's files; empty where there is none that can be read."""
    try:
        found = json.loads(((folder if folder.is_dir() else folder.parent) / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def push_folder(folder: Path, repository: str, private: bool = False) -> str:
    """Upload an exported folder in one commit; returns its page. Its texts name the repository, not the local folder.

    Args:
        repository: ORG/NAME; it is made where it is not there.
        private: a repository that is made now is.

    Raises:
        ValueError: a folder that `draftwing export` has not written, no token, or the hub says no.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if not (folder / EXPORT_FILE).is_file():
        raise ValueError(f"push-to-hub: {folder} has no {EXPORT_FILE}; `draftwing export` writes it")
    facts = _read(folder, EXPORT_FILE)
    if Path(str(facts.get("target"))).is_absolute():
        raise ValueError("push-to-hub: the target is a folder of this machine; export with its hub id (--verifier)")
    if not get_token():
        raise ValueError("push-to-hub: no token of the hub here; `hf auth login`, or set HF_TOKEN")
    named = {name: _as_published(folder / name, folder, repository) for name in ("README.md", EXPORT_FILE)}
    files = {file.name: file for file in sorted(folder.iterdir()) if file.is_file()}
    parts = [CommitOperationAdd(name, named.get(name, str(file))) for name, file in files.items()]
    api = HfApi()
    try:
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        api.create_commit(repository, parts, commit_message=f"A draft for {facts.get('engine')}")
    except Exception as error:  # the hub's client raises many kinds; the user needs the name and the reason
        said = " ".join(str(error).split())
        raise ValueError(f"push-to-hub: {repository}: {type(error).__name__}: {said}") from error
    return str(url)


def _as_published(file: Path, folder: Path, repository: str) -> bytes:
    """A text of the folder with the repository in the folder's place; llama.cpp reads a file that is fetched first."""
    text = file.read_text(encoding="utf-8")
    if f"{folder}/head.gguf" in text:
        name = repository.rpartition("/")[2]
        text = text.replace("```bash\n", f"```bash\nhf download {repository} --local-dir {name}\n")
        return text.replace(str(folder), name).encode()
    return text.replace(str(folder), repository).encode()
