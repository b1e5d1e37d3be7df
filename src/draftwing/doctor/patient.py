"""A draft that can be loaded again with other options, and what its files alone give away."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from draftwing.doctor.replay import Recording, Trace, replay
from draftwing.doctor.suspects import Suspect, head_suspects, precision_suspects
from draftwing.drafts.eagle.formats import FROM_FILE, HeadOptions, is_language_model, verifier_name
from draftwing.drafts.eagle.fused_layers import pack_draft
from draftwing.drafts.fit import broken_tensors
from draftwing.drafts.kinds import new_drafter, resolve_method
from draftwing.drafts.load import DraftNetwork, build_head, load_draft, read_draft_files, resolve_draft
from draftwing.drafts.medusa.files import is_medusa
from draftwing.target.model import TargetModel

DEPTH = 5
"""Of the chains that are drafted."""
LEAST_SIMILARITY = 0.5
"""Mean cosine between the embeddings of a file and its target: a copy has 1, one trained on 0.9, another target's 0."""


class Patient:
    """A draft's files and what it was loaded with, to be loaded again with other options.

    Raises:
        ValueError: as `load_draft`.
    """

    draft: DraftNetwork | TargetModel

    def __init__(self, name: str, target: TargetModel, options: HeadOptions = FROM_FILE, tokenizer: Any = None) -> None:
        self.name, self.target, self.options, self._tokenizer = name, target, options, tokenizer
        self.values, self.tensors = read_draft_files(resolve_draft(name))
        if is_medusa(self.values, self.tensors):
            raise ValueError(f"draft: {name} holds Medusa heads; the doctor knows EAGLE heads and draft models")
        self.is_head = not is_language_model(self.values, self.tensors)
        self.broken = broken_tensors(self.tensors)
        """Of the file's tensors, those that hold NaN or infinity."""
        self.draft = self.load({})

    def load(self, options: Mapping[str, Any]) -> DraftNetwork | TargetModel:
        """The draft with some options of `load` changed."""
        dtype = getattr(torch, options["dtype"]) if "dtype" in options else None
        if self.is_head:
            fields = {name: value for name, value in options.items() if name in HeadOptions.__dataclass_fields__}
            chosen = HeadOptions(**self.options.given | fields)
            head = build_head(self.values, self.tensors, self.target, dtype, chosen)
            return pack_draft(head, compiles=False)  # as for decoding
        model = load_draft(self.name, self.target, dtype, self.options, self._tokenizer)
        assert isinstance(model, TargetModel)
        return pack_draft(model, compiles=False)

    def suspects(self, longest: int) -> list[Suspect]:
        """What to try, on rows of at most so many tokens."""
        if isinstance(self.draft, TargetModel):
            return precision_suspects(self.target)
        return head_suspects(self.draft.config, self.options, self.tensors, self.target, longest)

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """The numbers of the hidden states that the draft reads."""
        return () if isinstance(self.draft, TargetModel) else self.draft.config.feature_layers

    @property
    def layers_of_suspects(self) -> tuple[int, ...]:
        """The numbers of the hidden states that the draft and its variants read."""
        layers = {*self.feature_layers}
        layers.update(*(suspect.options.get("aux_layers", ()) for suspect in self.suspects(longest=0)))
        return tuple(sorted(layers))

    def traces(self, recordings: Sequence[Recording], options: Mapping[str, Any]) -> list[Trace]:
        """What the draft does with some options of `load` and `generate` changed."""
        draft, target = self.load(options), self.target
        method, window = resolve_method(None, draft), options.get("draft_window")
        drafter = new_drafter(method, draft, target, window=window)
        replays = (replay(recording, drafter, DEPTH, draft.dtype, target.device) for recording in recordings)
        return [trace for traces in replays for trace in traces]

    def clues(self, target_name: str, longest: int) -> list[str]:
        """What the files say against this draft, target and length of rows, without any measurement."""
        if isinstance(self.draft, TargetModel):
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
