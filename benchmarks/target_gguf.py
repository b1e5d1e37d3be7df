"""A Llama target as a GGUF file in float32, as llama.cpp's converter writes it.

That converter knows tokenizers by a hash, and not the embedded target's, which is a byte-level BPE split like GPT-2's.
"""

import json
from pathlib import Path

import gguf
import torch
from transformers import AutoConfig, AutoTokenizer

from draftwing.drafts.eagle.gguf_head import halves_to_pairs
from draftwing.target.load import load_model

LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_target(folder: Path, file: Path) -> None:
    """Write the target of a folder."""
    config = AutoConfig.from_pretrained(folder)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name(folder.name)
    writer.add_file_type(0)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, folder, config.eos_token_id)
    state = load_model(str(folder), torch.float32).state_dict()
    for name, tensor in _renamed(state, config).items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _renamed(state: dict[str, torch.Tensor], config: AutoConfig) -> dict[str, torch.Tensor]:
    """The tensors under llama.cpp's names, rows of queries and keys in pairs."""
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    if not config.tie_word_embeddings:
        tensors["output.weight"] = state["lm_head.weight"]
    for layer in range(config.num_hidden_layers):
        for ours, theirs in LAYER.items():
            tensor = state[f"model.layers.{layer}.{ours}.weight"]
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(theirs)
            tensors[f"blk.{layer}.{theirs}.weight"] = tensor if heads is None else halves_to_pairs(tensor, heads)
    return tensors


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, end: int | list[int]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    special = set(tokenizer.all_special_tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])  # control and normal ones
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]])
    ends = [end] if isinstance(end, int) else end
    writer.add_eos_token_id(ends[0])
    writer.add_eot_token_id(ends[-1])
    writer.add_add_bos_token(False)
