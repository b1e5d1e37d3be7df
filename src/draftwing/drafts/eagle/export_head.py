"""EAGLE heads for other engines: what each one reads, what it takes in silence and gets wrong, and its files.

Read in the engines' loaders (drafts/export_draft.py has the versions). docs/export.md has the table.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from draftwing.drafts.eagle.formats import HeadFile, default_or_none, read_head
from draftwing.drafts.eagle.gguf_head import HEAD_GGUF, write_gguf
from draftwing.drafts.eagle.save_head import write_head
from draftwing.drafts.export_draft import Export, ExportRequest
from draftwing.drafts.fit import Tensors, embedding_rows
from draftwing.drafts.save import write_draft
from draftwing.layers import DraftConfig
from draftwing.target.hidden_states import NORMED

OPTION_READERS = {
    "norm_before_residual": ("vllm", "speculators", "llama.cpp"),
    "norm_before_fc": ("vllm", "sglang", "speculators", "llama.cpp"),
    "fc_norm": ("vllm", "sglang", "speculators"),
    "norm_output": ("vllm", "sglang", "speculators"),
}
"""Who reads an option of EAGLE-3 heads; the others ignore it."""
TAKES_TARGETS_EMBEDDING = ("eagle", "sglang")
"""Who puts the target's embedding in the place of a head's own."""


def export_head(request: ExportRequest) -> Export:
    """How a head is written for an engine, and what is wrong with it there."""
    head = read_head(request.files.values, request.files.tensors, request.target)
    if head.is_eagle3:
        head = replace(head, format="speculators" if request.engine == "speculators" else "eagle3")
    obstacles = [*_obstacles(head, request)]
    added = {} if obstacles else _added_tensors(head, request)
    head = replace(head, tensors=head.tensors | added)
    faults = [] if obstacles else [*_faults(head, request, added)]
    writer = _write_gguf if request.engine == "llama.cpp" else _write_folder
    return Export(
        write=lambda folder: writer(head, request, folder),
        method="eagle3" if head.is_eagle3 else "eagle",
        added=added,
        obstacles=obstacles,
        faults=faults,
        notes=[*_notes(head.config, request.engine)],
    )


def _obstacles(head: HeadFile, request: ExportRequest) -> Iterator[str]:
    """Why an engine cannot load a head, or would fill a part of it with random numbers."""
    config, engine = head.config, request.engine
    if not head.is_eagle3 and engine in ("speculators", "llama.cpp"):
        yield "it reads EAGLE-3 heads alone, and this is an EAGLE-1 head"
    if config.qk_norm:
        yield "no engine reads norms of a head's queries and keys"
    if config.hidden_act not in ("silu", "swish"):
        yield f"hidden_act: it computes silu alone, and the head has {config.hidden_act}"
    given = [name for name in ("attention_bias", "output_bias", "mlp_bias") if getattr(config, name)]
    if given and (engine != "vllm" or config.attention_bias != config.output_bias):
        yield f"{', '.join(given)}: biases of a head's layer are not read there"
    if head.is_eagle3 and len(config.aux_layers) != 3 and config.aux_layers != (NORMED,):
        yield f"aux_layers: it fuses three layers, and the head reads {len(config.aux_layers)}"
    if config.aux_layers == (NORMED,) and engine not in ("vllm", "sglang"):
        yield "aux_layers: it fuses three layers, and the head reads the last state alone"
    if head.is_eagle3 and config.fc_bias:
        yield "fc.bias: no engine reads a bias behind an EAGLE-3 head's fc"
    if head.is_eagle3 and not config.own_lm_head and engine != "vllm":
        yield "lm_head.weight: it wants an output head, and this one uses the target's"
    if engine == "llama.cpp":
        yield from _gguf_obstacles(config, request)


def _gguf_obstacles(config: DraftConfig, request: ExportRequest) -> Iterator[str]:
    for name, readers in OPTION_READERS.items():
        if getattr(config, name) and "llama.cpp" not in readers:
            yield f"{name}: its files have no place for this option; {', '.join(readers)} read it"
    if config.sliding_window is not None:
        yield "sliding_window: its files have no place for this option"
    if config.num_hidden_layers > 1:
        yield f"num_hidden_layers: it runs one layer, and the head has {config.num_hidden_layers}"
    if config.rope_parameters.get("rope_type", "default") != "default":
        yield f"rope_parameters: {config.rope_parameters['rope_type']} was not tried there"
    if request.target_gguf is None:
        yield "a head carries its target's tokenizer; pass the target's GGUF file (--target-gguf)"


def _faults(head: HeadFile, request: ExportRequest, added: Tensors) -> Iterator[str]:
    """What an engine takes without a word and then drafts worse with; `added` tensors are what the head got for it."""
    config, engine = head.config, request.engine
    for name, readers in OPTION_READERS.items():
        if getattr(config, name) and engine not in readers:
            yield f"{name}: it does not read this option; {', '.join(readers)} do"
    if config.sliding_window is not None:
        yield f"sliding_window: it does not read this option, and the head reads {config.sliding_window} tokens"
    usual = default_or_none(request.target.num_layers)
    if engine == "eagle" and head.is_eagle3 and config.aux_layers != usual:
        yield f"aux_layers: it always reads the layers {usual}, and the head was trained on {config.aux_layers}"
    if engine == "vllm" and config.fc_bias:
        yield "fc.bias: it drops this tensor"
    own = head.tensors.get("embed_tokens.weight")
    if own is not None and engine in TAKES_TARGETS_EMBEDDING and not _is_same(own, request.target_embedding()):
        if "embed_tokens.weight" in added:
            yield "embed_tokens.weight: it reads the target's embedding without the scale that the target gives it"
        else:
            yield "embed_tokens.weight: it puts the target's embedding in this one's place, and they differ"


def _is_same(own: torch.Tensor, embedding: nn.Module) -> bool:
    """Whether a head's embedding is a copy of the target's weights, in the coarser of the two dtypes."""
    weight = embedding.get_parameter("weight")
    dtype = min((own.dtype, weight.dtype), key=lambda dtype: dtype.itemsize)
    return own.shape == weight.shape and torch.equal(own.to(dtype), weight.to(dtype))


def _notes(config: DraftConfig, engine: str) -> Iterator[str]:
    if config.trained_length is not None:
        option = " (SGLang: --speculative-draft-window-size)" if engine == "sglang" else ""
        yield (
            f"the head was trained on {config.trained_length} tokens, and draftwing lets it read no more; there it "
            f"reads the whole text and gets worse in long ones{option}"
        )


def _write_folder(head: HeadFile, request: ExportRequest, folder: Path) -> None:
    """Write a head as it is published, its config.json with what this engine alone wants."""
    values, tensors = write_head(head, request.target, request.target_name)
    if request.engine == "vllm" and not head.is_eagle3:  # it takes the key for the attention's biases, which none has
        values.pop("bias", None)
    if request.engine == "sglang" and not head.is_eagle3:
        values["architectures"] = ["LlamaForCausalLMEagle"]
    if request.engine == "eagle":
        values |= {"pretraining_tp": 1, "bias": head.config.fc_bias}
    write_draft(values, tensors, folder, request.dtype)


def _added_tensors(head: HeadFile, request: ExportRequest) -> Tensors:
    """What published EAGLE-1 files have and a head of ours may lack: the embedding, and for SGLang the bias.

    SGLang's EAGLE-1 always has a bias, which stays random where the file has none. EAGLE-3 heads need no embedding,
    also where the target scales its own: they norm what they read of it.
    """
    added: Tensors = {}
    if head.is_eagle3:
        return added
    dtype = head.tensors["fc.weight"].dtype
    if "embed_tokens.weight" not in head.tensors:
        added["embed_tokens.weight"] = embedding_rows(request.target_embedding()).to(dtype)
    if request.engine == "sglang" and not head.config.fc_bias:
        added["fc.bias"] = torch.zeros(head.config.hidden_size, dtype=dtype)
    return added


def _write_gguf(head: HeadFile, request: ExportRequest, folder: Path) -> None:
    assert request.target_gguf is not None
    write_gguf(head, request.target_gguf, folder / HEAD_GGUF, request.dtype)
