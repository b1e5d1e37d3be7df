"""Real acceptance at real cost: a target of any larger shape that computes what a small trained model computes.

    python benchmarks/inflate.py --shape llama-3.1-8b --device cuda --plans auto chain:3 tree:10x8x60 --output r.json

The small model's weights lie in a corner of the large one's. What is read with the small model's numbers is its own or
zero; what is read with numbers that are zero is random, so that all of it is multiplied in earnest. Norms are rescaled,
for their means run over zeros too. Tokens that the small vocabulary lacks get logits far below all others. The head is
inflated alike. So tokens per second, tau and what trees size themselves to are those of a large model on real text.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from bench_cycle import SHAPES
from bench_generate import RANDOM, as_row, print_table, random_head
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from draftwing.api import SpeculativeModel
from draftwing.data.prompts import read_prompts
from draftwing.drafts.eagle.build_head import build_network
from draftwing.drafts.eagle.fused_layers import pack_head
from draftwing.drafts.eagle.network import Eagle3Model
from draftwing.drafts.kinds import suitable_draft
from draftwing.drafts.load_draft import load_draft
from draftwing.embedded import EMBEDDED_PROMPTS
from draftwing.evaluation.side_by_side import measure
from draftwing.provenance import write_record
from draftwing.target.fused import pack_target
from draftwing.target.interface import ATTENTION
from draftwing.target.load import load_target, load_tokenizer
from draftwing.target.model import TargetModel

RANDOM_SCALE = 0.02
TRACE, LOUDNESS = 1e-9, 3e13
"""What is added to a state's last number, too little to change a norm, and that number's weight in the last norm: their
product, over the state's own size, is what the logits of unused tokens fall below zero."""


@dataclass(frozen=True)
class Sizes:
    """What a Llama-like model or head is made of."""

    hidden: int
    inner: int
    heads: int
    key_heads: int
    head_dim: int
    vocab: int

    @staticmethod
    def of(config: Any, vocab: int) -> "Sizes":
        return Sizes(
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            vocab,
        )


@dataclass(frozen=True)
class Axis:
    """Where the small one's numbers stand among the large one's `size`."""

    size: int
    used: torch.Tensor

    def repeat(self, times: int) -> "Axis":
        """Several of them side by side."""
        return Axis(times * self.size, torch.cat([self.used + part * self.size for part in range(times)]))


class Corner:
    """The places of a small model's numbers in a large one's.

    Raises:
        ValueError: the large one has less of something, or pairs of a head that turn at other speeds.
    """

    def __init__(self, small: Sizes, large: Sizes) -> None:
        groups, large_groups = small.heads // small.key_heads, large.heads // large.key_heads
        fits = all(getattr(small, name) <= getattr(large, name) for name in Sizes.__dataclass_fields__)
        if not fits or groups > large_groups or large.head_dim % small.head_dim:
            raise ValueError(f"shape: {small} does not fit into {large}")
        if large.hidden == small.hidden or large.inner < small.inner + 2 * small.hidden:
            raise ValueError("shape: expected a larger hidden size, and an MLP wider by twice the small hidden size")
        self.small, self.large = small, large
        pairs = torch.arange(small.head_dim // 2) * (large.head_dim // small.head_dim)  # of the same speeds
        dims = torch.cat((pairs, large.head_dim // 2 + pairs))
        key_heads = torch.arange(small.key_heads)
        heads = (key_heads[:, None] * large_groups + torch.arange(groups)).flatten()
        sharing = torch.arange(small.key_heads * large_groups)  # all that read the small one's keys and values
        self.attended = (sharing[:, None] * large.head_dim + dims).flatten()
        self.hidden = Axis(large.hidden, torch.arange(small.hidden))
        self.inner = Axis(large.inner, torch.arange(small.inner))
        self.vocab = Axis(large.vocab, torch.arange(small.vocab))
        self.queries = Axis(large.heads * large.head_dim, (heads[:, None] * large.head_dim + dims).flatten())
        self.keys = Axis(large.key_heads * large.head_dim, (key_heads[:, None] * large.head_dim + dims).flatten())
        self.norm_scale = (small.hidden / large.hidden) ** 0.5
        self.query_scale = (large.head_dim / small.head_dim) ** 0.5

    def axes(self, name: str, num_inputs: int) -> tuple[Axis, Axis]:
        """Outputs and inputs of a product, by its name in a layer; some read several states side by side."""
        states = self.hidden.repeat(num_inputs // self.small.hidden)
        inputs = {"o_proj": self.queries, "down_proj": self.inner}.get(name, states)
        outputs = {"q_proj": self.queries, "k_proj": self.keys, "v_proj": self.keys, "lm_head": self.vocab} | {
            "gate_proj": self.inner,
            "up_proj": self.inner,
        }
        return outputs.get(name, self.hidden), inputs

    @torch.no_grad()
    def fill(self, goal: nn.Module, source: nn.Module | None) -> None:
        """Fill a large module's products and norms from those of a small one; without one they change no state."""
        modules = dict(source.named_modules()) if source is not None else {}
        for path, module in goal.named_modules():
            small: Any = modules.get(path)
            if isinstance(module, nn.Linear):
                self._fill_product(module.weight, path.rpartition(".")[2], None if small is None else small.weight)
            elif not isinstance(module, nn.Embedding) and "weight" in dict(module.named_parameters(recurse=False)):
                self._fill_norm(module.weight, None if small is None else small.weight)

    def _fill_product(self, weight: torch.Tensor, name: str, small: torch.Tensor | None) -> None:
        outputs, inputs = self.axes(name, self.small.hidden if small is None else small.shape[1])
        weight.normal_(0, RANDOM_SCALE)
        columns = inputs.used.to(weight.device)
        weight[:, self.attended.to(weight.device) if name == "o_proj" else columns] = 0
        if name not in ("o_proj", "down_proj"):
            weight[:, self.large.hidden - 1 :: self.large.hidden] = 0  # the traces in states
        if small is not None:
            scale = self.query_scale if name == "q_proj" else 1.0
            weight[outputs.used.to(weight.device)[:, None], columns] = (small * scale).to(weight)

    def _fill_norm(self, weight: torch.Tensor, small: torch.Tensor | None) -> None:
        used = weight.fill_(1).view(-1, self.large.hidden)[:, : self.small.hidden]
        used[:] = 1 if small is None else small.view(-1, self.small.hidden).to(weight)
        used *= self.norm_scale

    @torch.no_grad()
    def silence_unused(self, mlp: Any, norm: Any, head: nn.Linear) -> None:
        """Let a last MLP leave a trace in the state, from which the output head makes low logits of unused tokens.

        With silu, `silu(x) x + silu(-x) (-x)` is `x^2`: summed over a normed state, that is well above zero.
        """
        first, width = self.small.inner, self.small.hidden
        ones = torch.eye(width, dtype=head.weight.dtype, device=head.weight.device)
        for product in (mlp.gate_proj, mlp.up_proj):
            product.weight[first : first + 2 * width, :width] = torch.cat((ones, -ones))
        mlp.down_proj.weight[:, first : first + 2 * width] = 0
        mlp.down_proj.weight[-1, first : first + 2 * width] = TRACE / width
        norm.weight[-1] = LOUDNESS
        head.weight[self.small.vocab :, -1] = -1


def inflate_target(model: LlamaForCausalLM, shape: tuple[int, ...], device: torch.device) -> LlamaForCausalLM:
    """A model of a shape of bench_cycle.py with a small model's logits; its further layers change nothing."""
    layers, hidden, inner, heads, key_heads, head_dim, vocab, _ = shape
    small, config = model.config, LlamaConfig(**model.config.to_dict())
    corner = Corner(Sizes.of(small, small.vocab_size), Sizes(hidden, inner, heads, key_heads, head_dim, vocab))
    changes = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "rms_norm_eps": small.rms_norm_eps * corner.norm_scale**2,
        "tie_word_embeddings": False,
    }
    for name, value in changes.items():
        setattr(config, name, value)
    config._attn_implementation = ATTENTION
    default = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)
    with device, torch.no_grad():
        large = LlamaForCausalLM(config).eval()
        large.model.embed_tokens.weight[:, :] = 0
        large.model.embed_tokens.weight[: small.vocab_size, : small.hidden_size] = model.model.embed_tokens.weight.to(
            device
        )
    torch.set_default_dtype(default)
    for index, layer in enumerate(large.model.layers):
        corner.fill(layer, model.model.layers[index] if index < small.num_hidden_layers else None)
    corner.fill(large.model.norm, model.model.norm)
    head = nn.ModuleDict({"lm_head": large.lm_head})
    corner.fill(head, nn.ModuleDict({"lm_head": model.lm_head}))
    corner.silence_unused(large.model.layers[-1].mlp, large.model.norm, large.lm_head)
    large.generation_config = model.generation_config
    return large


def inflate_head(head: Eagle3Model, target: TargetModel, draft_vocab: int) -> Eagle3Model:
    """A head for an inflated target, of one of its layers' shape, with a small head's logits."""
    small, large = head.config, target.config
    if small.qk_norm or small.attention_bias or small.mlp_bias or not small.own_lm_head:
        raise ValueError("head: expected one without biases and norms of heads, with an output head of its own")
    sizes = Sizes.of(large, draft_vocab)
    corner = Corner(Sizes.of(small, small.draft_vocab_size), sizes)
    config = replace(
        small,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.inner,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_heads,
        head_dim=sizes.head_dim,
        vocab_size=target.vocab_size,
        draft_vocab_size=draft_vocab,
        target_hidden_size=sizes.hidden,
        rms_norm_eps=small.rms_norm_eps * corner.norm_scale**2,
    )
    unused = torch.arange(draft_vocab - small.draft_vocab_size) + small.vocab_size
    used = torch.arange(small.vocab_size) if head.vocab.target_ids is None else head.vocab.target_ids.cpu()
    network = build_network(config, target, torch.cat((used, unused))).to(target.device, head.dtype).eval()
    assert isinstance(network, Eagle3Model)
    network.vocab = network.vocab.to(target.device)
    corner.fill(network, head)
    last = network.layers[-1] if len(network.layers) else network.midlayer
    corner.silence_unused(last.mlp, network.norm, network.lm_head)
    return network


def main() -> int:
    options = parse_options()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    small = load_target("tiny", dtype)
    head = load_draft(suitable_draft("tiny", "eagle3"), small)
    tokenizer = load_tokenizer("tiny")
    target = pack_target(TargetModel(inflate_target(small.model, SHAPES[options.shape][1], device)))
    inflated = inflate_head(head, target, options.draft_vocab_size)
    pack_head(inflated)
    model = SpeculativeModel(target, inflated, tokenizer, "eagle3")
    methods = {"plain": model.with_method("plain").start}
    methods |= {f"eagle3 {plan}": partial(model.start, plan=plan, ngram=False) for plan in options.plans}
    if options.random_head:
        methods[RANDOM] = random_head(model, inflate_head(head, target, options.draft_vocab_size))
    prompts = read_prompts(EMBEDDED_PROMPTS)[: options.num_prompts]
    settings = options.temperatures, options.repeats, options.max_new_tokens
    rows = [as_row(row) for row in measure(methods, prompts, tokenizer, *settings)]
    options.target = f"{options.shape} with what tiny computes"
    print_table(rows, options)
    if options.output:
        write_record(options.output, rows, vars(options))
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[name for name in SHAPES if "llama" in name], default="llama-3.1-8b")
    parser.add_argument("--draft-vocab-size", type=int, default=32000)
    parser.add_argument("--plans", nargs="+", default=["auto", "chain:3", "tree:4x5x26", "tree:10x8x60"])
    parser.add_argument("--random-head", action="store_true", help="add a head that knows nothing, with plan auto")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 1.0])
    parser.add_argument("--num-prompts", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", help="write the figures with their provenance to this JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
