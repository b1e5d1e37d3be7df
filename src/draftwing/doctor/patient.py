"""A draft that can be loaded again with other options, and what its files alone give away."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from draftwing.doctor.replay import Trace, Transcript, replay
from draftwing.doctor.suspects import Suspect, head_suspects, precision_suspects
from draftwing.drafts.eagle.formats import FROM_FILE, HeadOptions, verifier_name
from draftwing.drafts.family import Draft, DrafterOptions
from draftwing.drafts.fit import broken_tensors
from draftwing.drafts.kinds import FAMILIES, family_of_files, new_drafter
from draftwing.drafts.load_draft import check_head_options, open_draft
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
