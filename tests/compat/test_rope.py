"""The draft networks' arithmetic against transformers' Llama: rotary frequencies, rotation, and whole layers."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from draftwing.drafts.eagle.network import Eagle3Model, EagleModel
from draftwing.layers import ACTIVATIONS, DecoderLayer, DraftConfig, DraftVocab
from draftwing.rotary import Rotary, rope_frequencies, rope_scale
from draftwing.target.attention import grouped_attention

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "default-500000": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3.1": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "llama3-short": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 32.0, "original_max_position_embeddings": 128},
    "yarn-gpt-oss": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "yarn-deepseek": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
    },
    "yarn-attention-factor": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "attention_factor": 1.5,
        "original_max_position_embeddings": 1024,
    },
}
CONFIG = DraftConfig(
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=64,
    draft_vocab_size=48,
    target_hidden_size=24,
    rms_norm_eps=1e-5,
    max_position_embeddings=128,
)
LENGTH = 12


def llama_config(rope: dict[str, Any], head_dim: int = CONFIG.head_dim) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=CONFIG.hidden_size,
        intermediate_size=CONFIG.intermediate_size,
        num_attention_heads=CONFIG.num_attention_heads,
        num_key_value_heads=CONFIG.num_key_value_heads,
        head_dim=head_dim,
        rms_norm_eps=CONFIG.rms_norm_eps,
        max_position_embeddings=4096,
        rope_parameters=dict(rope),
        attn_implementation="sdpa",
    )


@pytest.mark.filterwarnings("ignore:.*implicit factor")
@pytest.mark.parametrize("head_dim", [16, 128])
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_frequencies_are_transformers(rope: dict[str, Any], head_dim: int) -> None:
    theirs = LlamaRotaryEmbedding(llama_config(rope, head_dim)).inv_freq
    torch.testing.assert_close(rope_frequencies(head_dim, rope).float(), theirs, rtol=2e-6, atol=0)
    if rope["rope_type"] in ROPE_INIT_FUNCTIONS:
        theirs, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](llama_config(rope, head_dim), torch.device("cpu"))
        torch.testing.assert_close(rope_frequencies(head_dim, rope).float(), theirs, rtol=2e-6, atol=0)
        assert rope_scale(rope) == pytest.approx(scale, rel=1e-12)


def test_the_llama3_cases_stretch_and_interpolate() -> None:
    """Each of the three bands (kept, between, stretched) is there, or the comparison above would show little."""
    plain = rope_frequencies(128, ROPES["default-500000"])
    ratios = rope_frequencies(128, ROPES["llama3.1"]) / plain
    assert ratios[0] == 1.0
    assert ratios[-1] == 1 / 8
    assert ((ratios > 1 / 8) & (ratios < 1)).any()


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_rotation_is_transformers(rope: dict[str, Any]) -> None:
    torch.manual_seed(0)
    queries, keys = torch.randn(2, 4, LENGTH, 16), torch.randn(2, 2, LENGTH, 16)
    positions = torch.randint(0, 300, (2, LENGTH))
    cos, sin = LlamaRotaryEmbedding(llama_config(rope))(queries, positions)
    expected = apply_rotary_pos_emb(queries, keys, cos, sin)
    rotation = Rotary(16, rope, num_positions=300)(positions)
    for ours, theirs in zip((rotation.apply(queries), rotation.apply(keys)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)  # theirs has angles in float32


def test_the_table_grows_with_the_positions() -> None:
    rotary = Rotary(16, ROPES["llama3.1"], num_positions=4)
    angles = torch.outer(torch.arange(70000, dtype=torch.float64), rope_frequencies(16, ROPES["llama3.1"]))
    for num_positions in (4, 5000, 70000):  # the last fills several blocks
        rotary.reserve(num_positions)
        positions = torch.tensor([[0, 3, num_positions - 1]])
        assert torch.equal(rotary(positions).cos[0, 0], angles.cos().repeat(1, 2)[positions[0]].float())
        assert torch.equal(rotary(positions).sin[0, 0, :, 8:], angles.sin()[positions[0]].float())


def test_tables_hold_what_was_asked_for_whatever_the_file_says() -> None:
    """A config.json of a million positions: by its numbers alone two tables of 500 MB."""
    rotary = Rotary(128, ROPES["default"], num_positions=1_010_000)
    assert rotary.cos.shape[0] <= 2048
    for num_positions in range(2100, 9000, 100):  # one generation after the other, each a little longer
        rotary.reserve(num_positions)
    kept = sum(table.shape[0] for table in rotary._outgrown) / 2
    assert kept <= rotary.cos.shape[0] <= 2 * 9000, "captured cycles go on reading outgrown tables"


@pytest.mark.parametrize("rope", ["default", "yarn-attention-factor"])
def test_a_part_of_each_head_may_be_rotated(rope: str) -> None:
    """`partial_rotary_factor`: the first dimensions turn as those of a smaller head, the others stay."""
    torch.manual_seed(0)
    x, positions = torch.randn(2, 4, LENGTH, 16), torch.randint(0, 300, (2, LENGTH))
    whole, half = Rotary(8, ROPES[rope], 300), Rotary(16, ROPES[rope] | {"partial_rotary_factor": 0.5}, 300)
    expected = torch.cat((whole(positions).apply(x[..., :8]), x[..., 8:]), dim=-1)
    assert torch.equal(half(positions).apply(x), expected)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope", "proportional"])
def test_other_types_are_refused(rope_type: str) -> None:
    with pytest.raises(
        ValueError, match=f"rope_type: expected one of default, linear, llama3, yarn, got '{rope_type}'"
    ):
        rope_frequencies(16, {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_type": "linear"}, r"rope_parameters\.factor: linear needs a number, got None"),
        ({"rope_type": "yarn", "factor": "4"}, r"rope_parameters\.factor: yarn needs a number, got '4'"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor: expected more than 0 and at most 1, got 1.5"),
    ],
)
def test_settings_that_lack_something_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rope_frequencies(16, settings)


class Norm(nn.Module):
    """RMSNorm from its formula; transformers' own rounds to float32."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True) + CONFIG.rms_norm_eps).sqrt()


def attend(layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Causal attention without a cache."""
    mask = torch.ones(queries.shape[2], queries.shape[2], dtype=torch.bool).tril()[None, None]
    return grouped_attention(queries, keys, values, mask).transpose(1, 2)


def randomise(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
        if parameter.ndim == 1:
            parameter.data += 1


def exact(rotary: Rotary) -> Rotary:
    """Its tables in float64; they start in the default dtype."""
    rotary._fill(LENGTH, torch.float64, None)
    return rotary


def cos_sin(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Llama's position embeddings in float64: each half of a head holds every frequency once."""
    angles = positions[..., None] * rope_frequencies(CONFIG.head_dim, CONFIG.rope_parameters)
    return angles.cos().repeat(1, 1, 2), angles.sin().repeat(1, 1, 2)


def as_llama_layer(ours: DecoderLayer, has_input_norm: bool = True) -> LlamaDecoderLayer:
    """A transformers layer with our weights (strict: the names are the same)."""
    theirs = LlamaDecoderLayer(llama_config(CONFIG.rope_parameters), layer_idx=0).double().eval()
    if not has_input_norm:
        theirs.input_layernorm = nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    if has_input_norm:
        theirs.input_layernorm = Norm(theirs.input_layernorm.weight.detach())
    theirs.post_attention_layernorm = Norm(theirs.post_attention_layernorm.weight.detach())
    return theirs


@torch.inference_mode()
def test_a_decoder_layer_is_transformers() -> None:
    torch.manual_seed(0)
    layer = DecoderLayer(CONFIG, layer=0).double()
    randomise(layer)
    x = torch.randn(2, LENGTH, CONFIG.hidden_size, dtype=torch.float64)
    positions = torch.arange(LENGTH).expand(2, LENGTH)
    rotation = exact(Rotary(CONFIG.head_dim, CONFIG.rope_parameters, LENGTH))
    theirs = as_llama_layer(layer)(x, position_embeddings=cos_sin(positions), attention_mask=None)
    torch.testing.assert_close(layer(x, rotation(positions), attend), theirs, rtol=0, atol=1e-12)


@torch.inference_mode()
def test_eagle1_is_fc_and_llama_layers_of_which_the_first_has_no_input_norm() -> None:
    config = dataclasses.replace(CONFIG, num_hidden_layers=2, fc_bias=True, draft_vocab_size=64, target_hidden_size=32)
    head = nn.Linear(32, 64, bias=False).double()
    model = EagleModel(config, nn.Identity(), head, own_embedding=True).double()
    randomise(model)
    exact(model.rotary)
    torch.manual_seed(1)
    features = torch.randn(2, LENGTH, 32, dtype=torch.float64)
    tokens = torch.randint(0, 64, (2, LENGTH))
    positions = torch.arange(LENGTH).expand(2, LENGTH)

    joined = torch.cat((model.embed_tokens.weight[tokens], features), dim=-1)
    x = joined @ model.fc.weight.T + model.fc.bias
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, DecoderLayer)
        theirs = as_llama_layer(layer, has_input_norm=index > 0)
        x = theirs(x, position_embeddings=cos_sin(positions), attention_mask=None)

    output = model(model.project(features), tokens, positions, attend)
    torch.testing.assert_close(output, x, rtol=0, atol=1e-11)
    torch.testing.assert_close(model.feed_back(output), x, rtol=0, atol=1e-11)
    torch.testing.assert_close(model.logits(output), head(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ACTIVATIONS)
@torch.inference_mode()
def test_activations_are_transformers(name: str) -> None:
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[name](x), ACT2FN[name](x), rtol=0, atol=1e-7)  # gelu_fast rounds a constant


EAGLE3_OPTIONS = [
    {},
    {"norm_before_residual": True, "norm_before_fc": True},
    {"fc_norm": True, "norm_output": True},
    {"fc_bias": True, "attention_bias": True, "output_bias": True, "mlp_bias": True},
]


@pytest.mark.parametrize("options", EAGLE3_OPTIONS, ids=lambda options: "-".join(options) or "published")
@torch.inference_mode()
def test_eagle3_is_a_llama_layer_over_embedding_and_state(options: dict[str, bool]) -> None:
    config = dataclasses.replace(CONFIG, aux_layers=(1, 3, 5), **options)  # type: ignore[arg-type]
    embedding = nn.Embedding(64, 32).double()
    target_ids = torch.arange(0, 48)
    model = Eagle3Model(config, DraftVocab(target_ids, 64), embedding, nn.Identity()).double()
    randomise(model)
    exact(model.rotary)
    torch.manual_seed(1)
    features = torch.randn(2, LENGTH, 3 * config.target_hidden_size, dtype=torch.float64)
    tokens = torch.randint(0, 64, (2, LENGTH))
    positions = torch.arange(LENGTH).expand(2, LENGTH)

    fused_input = features
    if config.fc_norm:
        parts = [Norm(n.weight.detach())(part) for n, part in zip(model.fc_norm, features.chunk(3, -1), strict=True)]
        fused_input = torch.cat(parts, dim=-1)
    if config.norm_before_fc:
        fused_input = Norm(model.input_norm.weight.detach())(features)
    state = functional.linear(fused_input, model.fc.weight, model.fc.bias)
    torch.testing.assert_close(model.project(features), state, rtol=0, atol=1e-11)

    layer = model.midlayer
    normed = Norm(layer.hidden_norm.weight.detach())(state)
    joined = torch.cat((Norm(layer.input_layernorm.weight.detach())(embedding(tokens)), normed), dim=-1)
    attention = LlamaAttention(llama_config(config.rope_parameters), layer_idx=0).double().eval()
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        setattr(attention, name, getattr(layer.self_attn, name))
    llama = llama_config(config.rope_parameters)
    llama.mlp_bias = config.mlp_bias
    mlp = LlamaMLP(llama).double()
    mlp.load_state_dict(layer.mlp.state_dict())
    residual = normed if config.norm_before_residual else state
    x = residual + attention(joined, position_embeddings=cos_sin(positions), attention_mask=None)[0]
    x = x + mlp(Norm(layer.post_attention_layernorm.weight.detach())(x))

    output = model(state, tokens, positions, attend)
    last_norm = Norm(model.norm.weight.detach())
    torch.testing.assert_close(output, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.logits(output), last_norm(x) @ model.lm_head.weight.T, rtol=0, atol=1e-9)
    expected_state = last_norm(x) if config.norm_output else x
    torch.testing.assert_close(model.feed_back(output), expected_state, rtol=0, atol=1e-10)
