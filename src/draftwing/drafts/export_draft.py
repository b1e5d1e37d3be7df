"""Write a draft as another engine reads it right, or say why that engine would not.

Engines take many a file without a word and then draft worse: an option that is not read, feature layers in the other
convention, a bias that is dropped. The tokens stay right, only acceptance falls, so nobody notices. Such heads are
refused here with the reason. What is written is read back and compared, tensor by tensor, before it gets its name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from draftwing.config import suggestion
from draftwing.drafts.family import ENGINES, DraftFiles
from draftwing.drafts.fit import TargetSizes, Tensors
from draftwing.drafts.inspect_draft import target_sizes
from draftwing.drafts.kinds import family_of_files
from draftwing.drafts.load_draft import open_draft
from draftwing.drafts.publish import CARD, EXPORT_FILE, ExportFacts, acceptance_of, training_of
from draftwing.files import whole_folder


@dataclass(frozen=True)
class ExportRequest:
    """What is to be written: for which engine, of which draft, for which target.

    Attributes:
        target_name: as the engine will load it.
        target_embedding: the target's own embedding, called where a head or an engine needs it.
        target_gguf: the target's GGUF file, whose tokenizer a GGUF head carries.
    """

    engine: str
    files: DraftFiles
    target: TargetSizes
    target_name: str
    target_embedding: Callable[[], nn.Module]
    dtype: torch.dtype | None = None
    target_gguf: Path | None = None


@dataclass(frozen=True)
class Export:
    """What a family answers: how to write the files, and what is to be said of them.

    Attributes:
        write: writes them into an empty folder.
        method: as the engine calls it, such as eagle3.
        depth: of the chains that the engine is told to draft.
        added: tensors that the engine wants in the files, and that the draft does without.
        obstacles: reasons why the engine cannot load the draft; nothing is written.
        faults: reasons why it would draft worse there than here; written on demand only.
        notes: things worth knowing.
    """

    write: Callable[[Path], None]
    method: str
    depth: int = 3
    added: Tensors = field(default_factory=dict)
    obstacles: Sequence[str] = ()
    faults: Sequence[str] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Exported:
    """A folder that was written: the engine's command line, and the faults and notes that go with it."""

    folder: Path
    engine: str
    command: str
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def export_draft(
    name: str,
    target: str,
    engine: str,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    verifier: str = "",
    target_gguf: Path | None = None,
    force: bool = False,
    license: str = "",
) -> Exported:
    """Write the draft `name` for an engine into the folder `output`, which must not exist or be empty.

    Args:
        target: its target; the config and at most the embedding are read.
        dtype: of the weights; default: the file's.
        verifier: the target's name where the engine runs; default: `target`.
        force: write also what would draft worse there.
        license: the draft's, for its model card.

    Raises:
        ValueError: an engine that is not known, a draft that does not fit the target or that the engine does not read
            or reads wrong, or a folder that holds something.
    """
    if engine not in ENGINES:
        raise ValueError(f"to: no such engine: {engine!r}; {suggestion(engine, ENGINES)}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output: {output} exists and is not empty")
    files, sizes = open_draft(name), target_sizes(target)
    kind = family_of_files(files.values, files.tensors).kind
    for problem in kind.inspect(files, sizes, target).problems:
        raise ValueError(f"draft: {problem}")
    named = verifier or target
    request = ExportRequest(engine, files, sizes, named, cache(lambda: target_embedding(target)), dtype, target_gguf)
    export = kind.export(request)
    if export.obstacles:
        raise ValueError(f"draft: {ENGINES[engine]} cannot load it: {'; '.join(export.obstacles)}")
    if export.faults and not force:
        raise ValueError(
            f"draft: {ENGINES[engine]} would load it and draft worse: {'; '.join(export.faults)}. "
            "Pass force (--force) to write it all the same"
        )
    with whole_folder(output) as partial:
        export.write(partial)
        written = open_draft(str(partial))
        options, tensors = kind.meaning(files, sizes)
        check_same((options, tensors | export.added), kind.meaning(written, sizes), dtype)
        facts = _facts(request, export, Path(name).name, license, partial)
        facts.write(partial, str(output), str(target_gguf or ""))
    command = facts.command(str(output), str(target_gguf or ""))
    return Exported(output, engine, command, facts.faults, facts.notes)


def check_same(
    one: tuple[Mapping[str, Any], Tensors], other: tuple[Mapping[str, Any], Tensors], dtype: torch.dtype | None
) -> None:
    """Raise a ValueError where two drafts, as options and tensors, are not the same but for the weights' dtype."""
    for name in one[0].keys() | other[0].keys():
        if one[0].get(name) != other[0].get(name):
            raise ValueError(f"{name}: {one[0].get(name)!r} became {other[0].get(name)!r} in the written files")
    for name in sorted(one[1].keys() | other[1].keys()):
        before, after = one[1].get(name), other[1].get(name)
        if before is None or after is None:
            raise ValueError(f"{name}: is in one of the files alone")
        if dtype is not None and before.is_floating_point() and after.dtype == dtype:  # GGUF keeps norms in float32
            before = before.to(dtype)
        if before.shape != after.shape or not torch.equal(before.to(torch.float64), after.to(torch.float64)):
            raise ValueError(f"{name}: other numbers in the written files")


def target_embedding(name: str) -> nn.Module:
    """A target's embedding; nothing else of it is kept."""
    from draftwing.target.load import load_model

    embedding: nn.Module = load_model(name).get_input_embeddings()
    return embedding


def _facts(request: ExportRequest, export: Export, draft: str, license: str, folder: Path) -> ExportFacts:
    """What is to be on record of the files that were written into `folder`."""
    own = request.files
    methods = [method.name for method in family_of_files(own.values, own.tensors).methods]
    return ExportFacts(
        to=request.engine,
        engine=ENGINES[request.engine],
        method=export.method,
        depth=export.depth,
        draft=draft,
        target=request.target_name,
        target_gguf=request.target_gguf.name if request.target_gguf else "",
        license=license,
        faults=list(export.faults),
        notes=list(export.notes),
        training=training_of(own.folder),
        acceptance=acceptance_of(own.folder, methods),
        files=sorted([CARD, EXPORT_FILE, *(file.name for file in folder.iterdir())]),
    )
