"""Tree verification on the stock modules of many model families: every node gets what a fresh forward pass gives it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import requests_for, run
from transformers import PreTrainedModel

from draftwing.drafts.inspect_draft import target_sizes
from draftwing.target.fused import FusedTarget, pack_target
from draftwing.target.interface import ATTENTION
from draftwing.target.load import load_target
from draftwing.target.model import TargetModel

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = 8
"""Shorter than the prompts, so that sliding windows matter."""
PROMPTS = [[5, 9, 33, 41, 2, 17, 60, 8, 8, 23, 11, 54, 3], [44, 6, 12, 61, 30, 19, 7, 7, 50]]
# 0 is the root; two children with subtrees of their own:  0 -> 1 -> {3 -> 5, 4}   0 -> 2 -> 6
PARENTS = [0, 0, 0, 1, 1, 3, 2]
BRANCHES = [[0], [0, 1], [0, 2], [0, 1, 3], [0, 1, 4], [0, 1, 3, 5], [0, 2, 6]]
ACCEPTED = [[0, 1, 3, 5], [0, 2]]
"""The path that each row commits."""


@dataclass(frozen=True)
class Family:
    """A family's classes in transformers and what its tiny configuration needs beyond SIZES."""

    model_class: str
    config_class: str
    overrides: dict[str, Any] = field(default_factory=dict)
    own_attention: str = "sdpa"
    dtype: torch.dtype = torch.float64  # grouped expert kernels know no float64
    takes_ours: bool = True


def family(prefix: str, own_attention: str = "sdpa", **overrides: Any) -> Family:
    return Family(f"{prefix}ForCausalLM", f"{prefix}Config", overrides, own_attention)


def experts(prefix: str, own_attention: str = "sdpa", **overrides: Any) -> Family:
    """A mixture of experts."""
    overrides = {"num_experts_per_tok": 2, **overrides}
    return Family(f"{prefix}ForCausalLM", f"{prefix}Config", overrides, own_attention, torch.float32)


MIXED_WINDOWS = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
GPT_SIZES = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
FAMILIES = {
    "llama": family("Llama"),
    "llama-with-keys-of-others": family("Llama", use_sliding_window=True, sliding_window=4096, max_window_layers=2),
    "qwen2": family("Qwen2"),
    "qwen2-windows": family("Qwen2", use_sliding_window=True, **MIXED_WINDOWS),
    "qwen2_moe": experts("Qwen2Moe", num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16),
    "qwen3": family("Qwen3", head_dim=16),
    "qwen3_moe": experts("Qwen3Moe", head_dim=8, num_experts=4, moe_intermediate_size=16),
    "mistral": family("Mistral", sliding_window=WINDOW),
    "mistral-with-keys-of-others": family("Mistral", sliding_window=WINDOW, use_sliding_window=False),
    "mixtral": experts("Mixtral", num_local_experts=4, sliding_window=WINDOW),
    "ministral": family("Ministral", head_dim=8, **MIXED_WINDOWS),
    "phi": family("Phi"),
    "phi3": family("Phi3", sliding_window=WINDOW),
    "gemma": family("Gemma", head_dim=8),
    "gemma2": family("Gemma2", "eager", head_dim=8, attn_logit_softcapping=2.0, **MIXED_WINDOWS),
    "gemma3": Family("Gemma3ForCausalLM", "Gemma3TextConfig", {"head_dim": 8, **MIXED_WINDOWS}),
    "gpt_oss": experts("GptOss", "eager", head_dim=8, num_local_experts=4, **MIXED_WINDOWS),
    "deepseek_v3": experts(
        "DeepseekV3",
        num_key_value_heads=4,
        moe_intermediate_size=16,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=12,
        first_k_dense_replace=1,
    ),
    "cohere": family("Cohere"),
    "cohere2": family("Cohere2", **MIXED_WINDOWS),
    "olmo2": family("Olmo2"),
    "olmo3": family("Olmo3", **MIXED_WINDOWS),
    "granite": family("Granite"),
    "glm4": family("Glm4", head_dim=8),
    "exaone4": family("Exaone4", **MIXED_WINDOWS),
    "smollm3": family("SmolLM3"),
    "seed_oss": family("SeedOss", head_dim=8),
    "nemotron": family("Nemotron"),
    "helium": family("Helium", head_dim=8),
    "starcoder2": family("Starcoder2", sliding_window=WINDOW),
    "modernbert-decoder": family(
        "ModernBertDecoder", local_attention=2 * WINDOW, layer_types=MIXED_WINDOWS["layer_types"]
    ),
    "stablelm": family("StableLm"),
    "gpt_neox": family("GPTNeoX"),
    "gpt2": Family("GPT2LMHeadModel", "GPT2Config", GPT_SIZES),
    "opt": family("OPT", ffn_dim=48, word_embed_proj_dim=32),
    "gpt_bigcode": Family("GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT_SIZES),
    "persimmon": family("Persimmon"),
    "biogpt": family("BioGpt"),
    "arcee": family("Arcee"),
    "apertus": family("Apertus"),
    "ernie4_5": family("Ernie4_5"),
    "hunyuan": family("HunYuanDenseV1", head_dim=8),
    "olmoe": experts("Olmoe", num_experts=4),
    "granitemoe": experts("GraniteMoe", num_local_experts=4),
    "minimax_m2": experts("MiniMaxM2", head_dim=8, num_local_experts=4),
    "falcon": Family("FalconForCausalLM", "FalconConfig", {"alibi": False}, takes_ours=False),
    "gptj": Family("GPTJForCausalLM", "GPTJConfig", {**GPT_SIZES, "rotary_dim": 4}, "eager", takes_ours=False),
    "codegen": Family("CodeGenForCausalLM", "CodeGenConfig", {**GPT_SIZES, "rotary_dim": 4}, "eager", takes_ours=False),
}
RECURRENT = {
    "mamba": family("Mamba", "eager"),
    "mamba2": family("Mamba2", "eager", num_heads=8, head_dim=8, n_groups=1),
    "jamba": family("Jamba"),
    "falcon_h1": family("FalconH1"),
    "nemotron_h": family("NemotronH"),
    "recurrent_gemma": family("RecurrentGemma"),
    "qwen3_next": experts(
        "Qwen3Next",
        num_hidden_layers=4,
        head_dim=8,
        num_experts=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
}


def build(family: Family, attention: str) -> PreTrainedModel:
    config = getattr(transformers, family.config_class)(**{**SIZES, **family.overrides})
    config._attn_implementation = attention
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, family.model_class)(config)
    return model.to(family.dtype).eval()


def fresh_logits(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """The stock model's logits at the last token, without any cache."""
    logits: torch.Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
    return logits


def ancestors() -> torch.Tensor:
    mask = torch.zeros(len(PARENTS), len(PARENTS), dtype=torch.bool)
    for node, branch in enumerate(BRANCHES):
        mask[node, branch] = True
    return mask.expand(len(PROMPTS), -1, -1)


def cases() -> list[Any]:
    return [
        pytest.param(family, attention, id=f"{name}-{attention}")
        for name, family in FAMILIES.items()
        for attention in ((ATTENTION, family.own_attention) if family.takes_ours else (family.own_attention,))
    ]


@pytest.mark.parametrize(("family", "attention"), cases())
@torch.inference_mode()
def test_every_node_gets_the_logits_of_its_own_branch(family: Family, attention: str) -> None:
    stock = build(family, family.own_attention)
    target = TargetModel(build(family, attention))
    tolerance = 1e-5 if family.dtype == torch.float64 else 1e-4  # several families compute norms or rope in float32

    def assert_same(logits: torch.Tensor, tokens: list[int]) -> None:
        expected = fresh_logits(stock, tokens)
        torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance * float(expected.abs().max()))

    cache = target.new_cache(len(PROMPTS), capacity=32)
    lengths = torch.tensor([len(prompt) for prompt in PROMPTS])
    padded = torch.tensor([prompt + [0] * (int(lengths.max()) - len(prompt)) for prompt in PROMPTS])
    target.prefill(padded, lengths, cache)

    nodes = torch.tensor([[21, 35, 47, 4, 58, 26, 39], [13, 62, 1, 28, 9, 40, 55]])
    depths = torch.tensor([len(branch) - 1 for branch in BRANCHES]).expand_as(nodes)
    output = target.forward_tree(nodes, depths, ancestors(), cache)
    assert output.logits is not None
    for row, prompt in enumerate(PROMPTS):
        for node, branch in enumerate(BRANCHES):
            assert_same(output.logits[row, node], prompt + nodes[row, branch].tolist())

    num_kept = torch.tensor([len(path) for path in ACCEPTED])
    path = torch.tensor([path + [0] * (4 - len(path)) for path in ACCEPTED])
    cache.commit(path, num_kept, max_kept=4)
    following = torch.tensor([[31], [52]])
    one_node = torch.ones(len(PROMPTS), 1, 1, dtype=torch.bool)
    output = target.forward_tree(following, torch.zeros_like(following), one_node, cache)
    assert output.logits is not None
    for row, prompt in enumerate(PROMPTS):
        committed = prompt + nodes[row, ACCEPTED[row]].tolist()
        assert_same(output.logits[row, 0], committed + following[row].tolist())


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_greedy_decoding_is_the_stock_generate(name: str) -> None:
    family = FAMILIES[name]
    stock = build(family, family.own_attention)
    stock.generation_config.eos_token_id = None
    expected = stock.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=16, do_sample=False, pad_token_id=0)
    target = TargetModel(build(family, ATTENTION if family.takes_ours else family.own_attention))
    (tokens,) = run(target, requests_for([PROMPTS[0]], max_new_tokens=16, eos=()))
    assert tokens == expected[0, len(PROMPTS[0]) :].tolist()


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_training_reads_the_hidden_states_that_transformers_gives(name: str) -> None:
    """But keeps none of the other layers'. Decoding reads the same, of every node."""
    family = FAMILIES[name]
    model = build(family, family.own_attention)
    target, ids = TargetModel(model), torch.tensor([PROMPTS[0]])
    num_layers = target.num_layers
    expected = model(ids, use_cache=False, output_hidden_states=True).hidden_states
    layers = (0, 1, num_layers - 1, -1)
    states = target.read_rows(ids, layers)
    assert torch.equal(states.features, torch.cat([expected[layer] for layer in layers], dim=-1))
    assert torch.equal(states.last_hidden, expected[-1])
    depths, causal = torch.arange(len(PROMPTS[0]))[None], torch.ones(len(PROMPTS[0]), len(PROMPTS[0])).tril().bool()
    decoded = target.forward_tree(ids, depths, causal[None], target.new_cache(1, 32), layers).features
    assert decoded is not None
    tolerance = 1e-5 if family.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(decoded, states.features, rtol=0, atol=tolerance * float(decoded.abs().max()))


@torch.inference_mode()
def test_the_last_layers_output_is_another_state_than_the_final_norms() -> None:
    """Number n is raw, as the servers capture it; transformers' last hidden state is number -1."""
    target, ids = TargetModel(build(FAMILIES["llama"], ATTENTION)), torch.tensor([PROMPTS[0]])
    raw, normed = target.read_rows(ids, (target.num_layers, -1)).features.chunk(2, dim=-1)
    assert not torch.allclose(raw, normed)
    torch.testing.assert_close(target.model.model.norm(raw), normed)
    fused = pack_target(TargetModel(build(FAMILIES["llama"], ATTENTION).float()))
    assert isinstance(fused, FusedTarget)
    depths, causal = torch.arange(len(PROMPTS[0]))[None], torch.ones(len(PROMPTS[0]), len(PROMPTS[0])).tril().bool()
    features = fused.forward_tree(ids, depths, causal[None], fused.new_cache(1, 32), (target.num_layers, -1)).features
    torch.testing.assert_close(features, torch.cat((raw, normed), dim=-1).float(), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_the_window_matters_in_these_tests() -> None:
    """A sabotaged twin: without its window the mistral above would fail."""
    family = FAMILIES["mistral"]
    target = TargetModel(build(family, ATTENTION))
    target._windows = {"full_attention": None}
    cache = target.new_cache(1, capacity=32)
    tokens = torch.tensor([PROMPTS[0]])
    positions = torch.arange(tokens.shape[1])[None]
    causal = torch.ones(1, tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
    logits = target.forward_tree(tokens, positions, causal, cache).logits
    assert logits is not None
    expected = fresh_logits(build(family, "sdpa"), PROMPTS[0])
    assert not torch.allclose(logits[0, -1], expected, atol=0.01)


@pytest.mark.parametrize("name", RECURRENT)
def test_a_recurrent_state_is_refused(name: str) -> None:
    model = build(RECURRENT[name], RECURRENT[name].own_attention)
    with pytest.raises(ValueError, match=f"{RECURRENT[name].model_class} keeps a recurrent state|linear_attention"):
        TargetModel(model)


@pytest.mark.parametrize("prefix", ["Bloom", "Mpt"])
def test_a_model_without_positions_is_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match=f"{prefix}ForCausalLM takes no position_ids"):
        TargetModel(build(family(prefix), "eager"))


def test_a_window_that_only_caches_read_is_refused() -> None:
    """transformers keeps every key of a config.json; its `generate` would forget what its own pass reads."""
    with pytest.raises(
        ValueError, match=r"^target: LlamaForCausalLM cannot be verified as a tree: its modules know no"
    ):
        TargetModel(build(family("Llama", sliding_window=WINDOW), ATTENTION))


def test_falcon_with_alibi_is_refused() -> None:
    """It takes position_ids and ignores them: its position bias comes from the mask."""
    model = build(family("Falcon", alibi=True), "sdpa")
    with pytest.raises(ValueError, match="alibi"):
        TargetModel(model)


def test_chunked_attention_is_refused() -> None:
    sizes = {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48}
    llama4 = Family("Llama4ForCausalLM", "Llama4TextConfig", sizes, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"target: Llama4ForCausalLM cannot be .* layers of type 'chunked_attention'"):
        TargetModel(build(llama4, ATTENTION))


def test_convolution_layers_are_refused() -> None:
    lfm2 = build(family("Lfm2", layer_types=["conv", "full_attention", "conv"]), ATTENTION)
    with pytest.raises(ValueError, match=r"recurrent state|layers of type 'conv'"):
        TargetModel(lfm2)


def test_a_model_that_ignores_our_attention_is_refused() -> None:
    """CodeGen's modules compute their own attention whatever the configuration says, with an additive mask."""
    model = build(FAMILIES["codegen"], ATTENTION)
    with pytest.raises(ValueError, match="attn_implementation"):
        TargetModel(model)


def test_a_window_over_slots_is_refused() -> None:
    overrides = {"attention_types": [[["global", "local", "global"], 1]], "window_size": WINDOW}
    model = build(Family("GPTNeoForCausalLM", "GPTNeoConfig", overrides), "eager")
    with pytest.raises(ValueError, match="local"):
        TargetModel(model)


def test_an_attention_that_takes_no_tree_mask_is_refused() -> None:
    model = build(FAMILIES["llama"], "sdpa")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        ValueError, match=r"target: Llama.* has attn_implementation 'flash_attention_2', which cannot take"
    ):
        TargetModel(model)


def test_a_family_with_closed_attention_loads_with_its_own(tmp_path: Path) -> None:
    """Falcon picks its attention from a table of its own, which ours is not in; the error says what to pass."""
    build(FAMILIES["falcon"], "sdpa").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"target: .*attn_implementation='sdpa' or 'eager'"):
        load_target(str(tmp_path), torch.float32)
    assert load_target(str(tmp_path), torch.float32, attn_implementation="sdpa").num_layers == 3


BERT = {"is_decoder": True, "num_key_value_heads": 4}
UNFIT = {
    "no cache": (
        Family("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", {**GPT_SIZES, "n_ctx": 128}),
        "eager",
        "keeps no keys",
    ),
    "no cache, xlm": (
        Family("XLMWithLMHeadModel", "XLMConfig", {"emb_dim": 32, "n_layers": 3, "n_heads": 4, "causal": True}),
        "eager",
        "keeps no keys and values",
    ),
    "both directions": (
        Family("BertLMHeadModel", "BertConfig", {**BERT, "is_decoder": False}),
        ATTENTION,
        "other logits than their branches have alone: .* not causal",
    ),
    "positions of its own": (Family("CamembertForCausalLM", "CamembertConfig", BERT), ATTENTION, "other logits"),
    "a mask of its own": (
        family("Doge"),
        ATTENTION,
        "RuntimeError: .*; attn_implementation='sdpa' or 'eager' may help",
    ),
}


@pytest.mark.parametrize(("unfit", "attention", "reason"), UNFIT.values(), ids=UNFIT)
@pytest.mark.parametrize("role", ["target", "draft"])
def test_what_does_not_run_is_refused_in_one_line(unfit: Family, attention: str, reason: str, role: Any) -> None:
    """Whatever a module raises over a small tree, or gives another result for than for a branch alone."""
    with pytest.raises(ValueError, match=f"^{role}: {unfit.model_class} .*{reason}") as caught:
        TargetModel(build(unfit, attention), role)
    assert "\n" not in str(caught.value)


def test_doge_and_bert_run_in_their_own_way() -> None:
    """The opposites of two above."""
    TargetModel(build(family("Doge"), "sdpa"))
    TargetModel(build(Family("BertLMHeadModel", "BertConfig", BERT), ATTENTION))


def test_a_model_that_gives_nan_is_refused() -> None:
    model = build(FAMILIES["llama"], ATTENTION)
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 5] = torch.nan
    with pytest.raises(
        ValueError, match=r"target: LlamaForCausalLM gives NaN: broken weights, or torch\.float64 overflows"
    ):
        TargetModel(model)


@pytest.mark.parametrize("name", ["Qwen2_5_VL", "Llava", "Whisper", "T5"])
def test_another_kind_of_model_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    """Of what AutoModelForCausalLM does not know it lists all that it knows, in kilobytes."""
    config = getattr(transformers, f"{name}Config")()
    config.architectures = [f"{name}ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=f"^target: cannot load .*{name}ForConditionalGeneration|no file named"
    ) as caught:
        load_target(str(tmp_path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_an_unknown_model_type_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "tomorrow", "architectures": ["TomorrowForCausalLM"]}')
    for read in (load_target, target_sizes):
        with pytest.raises(ValueError, match=r"^target: cannot .* `tomorrow`") as caught:
            read(str(tmp_path))
        assert "\n" not in str(caught.value)
