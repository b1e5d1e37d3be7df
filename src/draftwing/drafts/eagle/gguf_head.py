"""EAGLE-3 heads as GGUF files, which llama.cpp reads: written from our terms, and read back as an EAGLE-3 file.

Two conventions differ from the published files: d2t holds absolute ids, and the rows of queries and keys that RoPE
turns together lie side by side instead of half a head apart.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from draftwing.drafts.eagle.fields import LAYER_IDS
from draftwing.drafts.eagle.formats import HeadFile
from draftwing.drafts.fit import Tensors
from draftwing.layers import DraftConfig
from draftwing.target.hidden_states import NORMED

FIELDS_BEGIN, STRING = 4096, 8
"""Bytes in which a file names its architecture, as its first field; the format's number of a text."""
HEAD_GGUF = "head.gguf"
ARCHITECTURE = "eagle3"
NAMES = {
    "fc.weight": "fc.weight",
    "lm_head.weight": "output.weight",
    "norm.weight": "output_norm.weight",
    "embed_tokens.weight": "token_embd.weight",
    "input_norm.weight": "enc.output_norm.weight",
    "midlayer.input_layernorm.weight": "blk.0.attn_norm.weight",
    "midlayer.hidden_norm.weight": "blk.0.attn_norm_2.weight",
    "midlayer.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    "midlayer.self_attn.q_proj.weight": "blk.0.attn_q.weight",
    "midlayer.self_attn.k_proj.weight": "blk.0.attn_k.weight",
    "midlayer.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    "midlayer.self_attn.o_proj.weight": "blk.0.attn_output.weight",
    "midlayer.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
    "midlayer.mlp.up_proj.weight": "blk.0.ffn_up.weight",
    "midlayer.mlp.down_proj.weight": "blk.0.ffn_down.weight",
}
"""Our parameters' names and the file's."""
KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "vocab_size": "vocab_size",
    "target_hidden_size": "target_hidden_size",
}
"""Numbers that our configuration and config.json have under the first name, and the file under the second."""
TURNED = {"blk.0.attn_q.weight": "num_attention_heads", "blk.0.attn_k.weight": "num_key_value_heads"}
"""Tensors whose rows RoPE turns, and how many heads they have."""
UNPACKED = ("F16", "BF16", "F32", "F64", "I32", "I64")
"""llama.cpp's names of types whose numbers stand in the file as they are."""
FILE_TYPES = {torch.float32: ("F32", 0), torch.float16: ("F16", 1), torch.bfloat16: ("BF16", 32)}
"""llama.cpp's names of dtypes, and its numbers of files in which most tensors have them."""


def write_gguf(head: HeadFile, target_gguf: Path, file: Path, dtype: torch.dtype | None = None) -> None:
    """Write a head with the tokenizer of its target's file; weights in `dtype` (default: theirs), norms in float32.

    Raises:
        ValueError: the package gguf is missing, the target's file cannot be read, or a dtype that has no number there.
    """
    gguf = _package()
    dtype = dtype or head.tensors["fc.weight"].dtype
    if dtype not in FILE_TYPES:
        raise ValueError(f"dtype: GGUF files hold float32, float16 or bfloat16, got {dtype}")
    writer = gguf.GGUFWriter(file, ARCHITECTURE)
    try:
        writer.add_name("EAGLE-3 head")
        writer.add_file_type(FILE_TYPES[dtype][1])
        for key, value in _fields(head.config).items():
            _add(writer, f"{ARCHITECTURE}.{key}", value)
        _copy_tokenizer(writer, target_gguf)
        for name, tensor in head.tensors.items():
            _add_tensor(writer, NAMES[name], tensor, head.config, dtype)
        if head.target_ids is not None:
            writer.add_tensor("d2t", head.target_ids.to(torch.int64).cpu().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _fields(config: DraftConfig) -> dict[str, Any]:
    """What the file says of a head, under llama.cpp's keys."""
    assert NORMED not in config.aux_layers, "three numbered layers are fused"
    return {
        **{key: getattr(config, name) for name, key in KEYS.items()},
        "block_count": 1,
        "attention.value_length": config.head_dim,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "rope.dimension_count": int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0)),
        "target_layers": list(config.aux_layers),
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": config.norm_before_fc,
        **({} if config.trained_length is None else {"trained_length": config.trained_length}),  # a key of our own
    }


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_array(key, value)


def _add_tensor(writer: Any, name: str, tensor: torch.Tensor, config: DraftConfig, dtype: torch.dtype) -> None:
    gguf = _package()
    if name in TURNED:
        tensor = halves_to_pairs(tensor, getattr(config, TURNED[name]))
    if tensor.ndim == 1:  # norms are always float32 there
        dtype = torch.float32
    values = tensor.to(dtype).float().cpu().contiguous().numpy()
    kind = gguf.GGMLQuantizationType[FILE_TYPES[dtype][0]]
    writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def _copy_tokenizer(writer: Any, target_gguf: Path) -> None:
    """Copy the fields of a target's tokenizer as they are."""
    gguf = _package()
    fields = _reader(target_gguf).fields
    copied = {key: value for key, value in fields.items() if key.startswith("tokenizer.")}
    if not copied:
        raise ValueError(f"target_gguf: {target_gguf} holds no tokenizer")
    for key, value in copied.items():
        kind, *inner = value.types
        is_array = kind == gguf.GGUFValueType.ARRAY
        writer.add_key_value(key, value.contents(), kind, sub_type=inner[-1] if is_array and inner else None)


def is_head(file: Path) -> bool:
    """Whether a GGUF file holds an EAGLE-3 head, by its beginning alone: reading all fields takes seconds."""
    with file.open("rb") as opened:
        _, key, behind = opened.read(FIELDS_BEGIN).partition(b"general.architecture")
    value = struct.pack("<IQ", STRING, len(ARCHITECTURE)) + ARCHITECTURE.encode()
    return bool(key) and behind.startswith(value)


def read_gguf(file: Path) -> tuple[dict[str, Any], Tensors]:
    """A GGUF head as the config.json and tensors of an EAGLE-3 file.

    Raises:
        ValueError: the package gguf is missing, or the file holds something else.
    """
    reader = _reader(file)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    if fields.get("general.architecture") != ARCHITECTURE:
        raise ValueError(f"draft: {file} is no EAGLE-3 head; its architecture is {fields.get('general.architecture')}")
    values = _values(file, {key.removeprefix(f"{ARCHITECTURE}."): value for key, value in fields.items()})
    ours = {theirs: name for name, theirs in NAMES.items()}
    tensors: Tensors = {}
    for entry in reader.tensors:
        tensor = _tensor(entry)
        if entry.name == "d2t":
            tensors["d2t"] = tensor - torch.arange(len(tensor))
        else:
            if entry.name in TURNED:
                tensor = _pairs_to_halves(tensor, values[TURNED[entry.name]])
            tensors[ours.get(entry.name, entry.name)] = tensor
    values["draft_vocab_size"] = len(tensors.get("lm_head.weight", ())) or values["vocab_size"]
    return values, tensors


def _values(file: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json that says the same."""
    for key in ("rope.scaling.type", "attention.sliding_window"):
        if fields.get(key) not in (None, "none", 0):
            raise ValueError(f"draft: {file} has {ARCHITECTURE}.{key} {fields[key]!r}, which is not read here")
    try:
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLMEagle3"],
            **{name: _shortest(fields[key]) for name, key in KEYS.items()},
            "rope_theta": _shortest(fields["rope.freq_base"]),
            "partial_rotary_factor": fields["rope.dimension_count"] / fields["attention.key_length"],
            LAYER_IDS: list(fields["target_layers"]),
            "norm_before_residual": bool(fields.get("norm_before_residual", False)),
            "norm_before_fc": bool(fields.get("norm_before_fc", False)),
            "trained_length": fields.get("trained_length"),
        }
    except KeyError as error:
        raise ValueError(f"draft: {file} lacks the field {ARCHITECTURE}.{error.args[0]}") from None


def _shortest(value: float) -> float:
    """A whole number as it is; else the shortest that is this float32: 1e-05, where the file has 9.99999974e-06."""
    return value if isinstance(value, int) else float(str(np.float32(value)))


def _tensor(entry: Any) -> torch.Tensor:
    """A tensor of the file, in the dtype that it has there."""
    if entry.tensor_type.name not in UNPACKED:
        raise ValueError(f"draft: {entry.name} is quantised ({entry.tensor_type.name}); quantised heads are not read")
    shape = [int(size) for size in reversed(entry.shape)]
    if entry.tensor_type.name == "BF16":
        raw = np.ascontiguousarray(entry.data).view(np.int16)
        return torch.from_numpy(raw.copy()).view(torch.bfloat16).reshape(shape)
    return torch.from_numpy(np.array(entry.data)).reshape(shape)


def halves_to_pairs(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows `[heads, half, i]` as `[heads, i, half]`."""
    turned: torch.Tensor = weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return turned


def _pairs_to_halves(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    turned: torch.Tensor = weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return turned


def _reader(file: Path) -> Any:
    gguf = _package()
    try:
        return gguf.GGUFReader(file)
    except (OSError, ValueError, IndexError, KeyError) as error:  # a file that is cut, or of another kind
        raise ValueError(f"gguf: cannot read {file}: {type(error).__name__}: {error}") from error


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise ValueError('gguf: GGUF files need the package gguf: pip install "draftwing[gguf]"') from None
    return gguf
