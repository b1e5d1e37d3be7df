"""EAGLE heads as kinds of draft: EAGLE-1/2 heads and EAGLE-3 heads differ in their network alone."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from draftwing.drafts.eagle.build_head import build_head
from draftwing.drafts.eagle.drafter import EagleDrafter
from draftwing.drafts.eagle.export_head import export_head
from draftwing.drafts.eagle.formats import HeadFormat, HeadOptions, format_of, read_head
from draftwing.drafts.eagle.fused_layers import pack_head
from draftwing.drafts.eagle.inspect_head import HeadReport, inspect_head
from draftwing.drafts.eagle.network import DraftNetwork, Eagle3Model, EagleModel
from draftwing.drafts.export_draft import Export, ExportRequest
from draftwing.drafts.family import Draft, DrafterOptions, DraftFiles, Kind
from draftwing.drafts.fit import TargetSizes, Tensors
from draftwing.drafts.ngram import NgramDrafter
from draftwing.engine.drafter import Drafter
from draftwing.engine.engine import NewDrafter
from draftwing.target.model import TargetModel


class _Head(Kind[DraftNetwork]):
    """What both kinds of EAGLE heads do alike; `formats` are those of their files, `model` is their network."""

    formats: tuple[HeadFormat, ...]
    model: type[DraftNetwork]

    def owns_files(self, values: Mapping[str, Any], tensors: Tensors) -> bool:
        return format_of(values, tensors) in self.formats

    def owns(self, draft: Draft) -> bool:
        return isinstance(draft, self.model)

    def drafter(self, draft: DraftNetwork, target: TargetModel, wanted: DrafterOptions) -> NewDrafter:
        def new(num_seats: int, num_slots: int) -> Drafter:
            ngram = NgramDrafter(num_seats, num_slots, target.device) if wanted.with_lookup else None
            return EagleDrafter(draft, num_seats, num_slots, ngram, wanted.window)

        return new

    def build(
        self, files: DraftFiles, target: TargetModel, dtype: torch.dtype | None, options: HeadOptions, tokenizer: Any
    ) -> DraftNetwork:
        return build_head(files, target, dtype, options)

    def prepack(self, draft: DraftNetwork, compiles: bool | None = None) -> DraftNetwork:
        pack_head(draft, compiles)
        return draft

    def inspect(self, files: DraftFiles, target: TargetSizes | None, target_name: str | None) -> HeadReport:
        return inspect_head(files, target)

    def export(self, request: ExportRequest) -> Export:
        return export_head(request)

    def meaning(self, files: DraftFiles, target: TargetSizes) -> tuple[Mapping[str, Any], Tensors]:
        head = read_head(files.values, files.tensors, target)
        ids = {} if head.target_ids is None else {"target_ids": head.target_ids}
        return vars(replace(head.config, fc_bias=False)), head.tensors | ids


class Eagle1(_Head):
    """Heads that predict features."""

    formats, model = ("eagle1",), EagleModel


class Eagle3(_Head):
    """Heads that predict tokens from fused features."""

    formats, model = ("eagle3", "speculators"), Eagle3Model
