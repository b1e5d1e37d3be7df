"""Medusa's heads as a kind of draft."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from draftwing.drafts.eagle.formats import HeadOptions
from draftwing.drafts.export_draft import Export, ExportRequest
from draftwing.drafts.family import Draft, DrafterOptions, DraftFiles, DraftReport, Kind, counted
from draftwing.drafts.fit import (
    TargetSizes,
    Tensors,
    broken_tensors,
    dtype_name,
    load_strictly,
    sizes_of,
    tensor_problems,
)
from draftwing.drafts.medusa.drafter import MedusaDrafter
from draftwing.drafts.medusa.files import expected_medusa_shapes, is_medusa, medusa_problems, read_medusa, to_vllm
from draftwing.drafts.medusa.network import MedusaModel
from draftwing.drafts.save import write_draft
from draftwing.engine.engine import NewDrafter
from draftwing.target.model import TargetModel
from draftwing.target.packed import pack_linears


@dataclass(frozen=True, kw_only=True)
class MedusaReport(DraftReport):
    """The facts of Medusa heads."""

    num_heads: int
    num_layers: int
    hidden_size: int
    vocab_size: int

    def rows(self) -> Iterator[tuple[str, str]]:
        blocks = counted(self.num_layers, "residual block")
        yield "network", f"{counted(self.num_heads, 'head')} of {blocks}, hidden size {self.hidden_size}"
        yield "vocabulary", f"{self.vocab_size:,} tokens"


class Medusa(Kind[MedusaModel]):
    """Several heads that read the target's last feature."""

    def drafter(self, draft: MedusaModel, target: TargetModel, wanted: DrafterOptions) -> NewDrafter:
        return lambda num_seats, num_slots: MedusaDrafter(draft, num_seats, target.dtype, target.device)

    def owns_files(self, values: Mapping[str, Any], tensors: Tensors) -> bool:
        return is_medusa(values, tensors)

    def owns(self, draft: Draft) -> bool:
        return isinstance(draft, MedusaModel)

    def build(
        self, files: DraftFiles, target: TargetModel, dtype: torch.dtype | None, options: HeadOptions, tokenizer: Any
    ) -> MedusaModel:
        heads = read_medusa(files.values, files.tensors)
        for problem in medusa_problems(heads.config, sizes_of(target)):
            raise ValueError(problem)
        network = MedusaModel(heads.config).to(device=target.device, dtype=dtype or target.dtype)
        load_strictly(network, heads.tensors)
        return network.eval()

    def prepack(self, draft: MedusaModel, compiles: bool | None = None) -> MedusaModel:
        pack_linears(draft)
        return draft

    def export(self, request: ExportRequest) -> Export:
        heads = read_medusa(request.files.values, request.files.tensors)
        other = [] if request.engine == "vllm" else ["it runs no Medusa heads"]
        return Export(
            write=lambda folder: write_draft(*to_vllm(heads), folder, request.dtype),
            method="medusa",
            depth=heads.config.num_heads,
            obstacles=other,
        )

    def meaning(self, files: DraftFiles, target: TargetSizes) -> tuple[Mapping[str, Any], Tensors]:
        heads = read_medusa(files.values, files.tensors)
        return vars(heads.config), heads.tensors

    def max_depth(self, draft: MedusaModel) -> int:
        return len(draft)

    def inspect(self, files: DraftFiles, target: TargetSizes | None, target_name: str | None) -> MedusaReport:
        heads, notes = read_medusa(files.values, files.tensors), []
        config, stated = heads.config, files.values.get("medusa_num_heads")
        problems = [] if target is None else medusa_problems(config, target)
        problems += tensor_problems(expected_medusa_shapes(config), heads.tensors) + broken_tensors(heads.tensors)
        if stated not in (None, config.num_heads):
            notes.append(
                f"config.json says medusa_num_heads {stated}, the file has {config.num_heads}, which are all used"
            )
        return MedusaReport(
            folder=str(files.folder),
            format="medusa",
            dtype=dtype_name(heads.tensors),
            num_parameters=sum(tensor.numel() for tensor in heads.tensors.values()),
            **vars(config),
            problems=problems,
            notes=notes,
        )
