"""A Llama-like target's pass on a GPU, in which a token has the same bits in a tree, in a batch and alone.

Every sum is laid out by row_layout.py: products, norms and splits by the weight's shape (row_products.py), attention by
positions (row_attention.py). Prompts are read by the same pass, so that it does not matter in what parts, or with which
others, one is read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from draftwing.target.attention import has_triton, on_device, serves_row_kernels
from draftwing.target.fused import ARCHITECTURES, FusedTarget, Layer, epsilon
from draftwing.target.hidden_states import NORMED
from draftwing.target.interface import Role
from draftwing.target.kv_cache import KVCache
from draftwing.target.model import TargetModel, TargetOutput
from draftwing.target.packed import JoinedProduct, PackedLinear, Product
from draftwing.target.row_layout import TREE_LEVELS, Places, RowNorm, RowProduct, Tiles, part_starts

FIRST_POSITIONS = 1024
"""Rows that the tables of rotations begin with."""
WIDEST = 128
"""Numbers of a key or a value at most."""


@dataclass(frozen=True)
class Kernels:
    """What the pass is made of: functions of row_products.py and row_attention.py."""

    multiply: Callable[..., torch.Tensor]
    multiply_split: Callable[..., torch.Tensor]
    multiply_gated: Callable[..., torch.Tensor]
    add_splits: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    normalise: Callable[..., torch.Tensor]
    project_heads: Callable[..., torch.Tensor]
    attend: Callable[..., torch.Tensor]

    @staticmethod
    def of_triton() -> "Kernels":
        from draftwing.target import row_attention, row_products

        modules = (row_products, row_attention)
        found = {name: getattr(module, name) for module in modules for name in KERNELS if hasattr(module, name)}
        return Kernels(**found)


KERNELS = tuple(Kernels.__dataclass_fields__)


@dataclass(frozen=True)
class RowLayer:
    """One decoder layer, and the norm behind it: the next layer's, or the model's last."""

    queries_keys_values: RowProduct
    heads_norm: RowNorm | None
    attention_output: RowProduct
    mlp_norm: RowNorm
    gate_up: RowProduct
    down: RowProduct
    next_norm: RowNorm


class RowTarget(FusedTarget):
    """A FusedTarget on a GPU for which `row_problem` finds nothing."""

    deepest_tree = TREE_LEVELS - 1

    def __init__(self, model: PreTrainedModel, role: Role = "target", kernels: Kernels | None = None) -> None:
        super().__init__(model, role)
        self._kernels = kernels or Kernels.of_triton()
        decoder: Any = model.model
        norms = [read_norm(layer.input_layernorm) for layer in decoder.layers[1:]] + [read_norm(decoder.norm)]
        parts = zip(self._decoder_layers, decoder.layers, norms, strict=True)
        self._row_layers = [_read_layer(*part) for part in parts]
        self._first_norm = read_norm(decoder.layers[0].input_layernorm)
        head: Any = self.output_head
        self._head = read_product(head.product, most_splits=1)
        self._rotations: list[tuple[torch.Tensor, torch.Tensor]] = []  # recordings go on reading outgrown ones
        self._starts: dict[int, torch.Tensor] = {}

    def new_cache(self, batch_size: int, capacity: int, dtype: torch.dtype | None = None) -> KVCache:
        self._reserve(capacity + 1)
        return super().new_cache(batch_size, capacity, dtype)

    def forward_tree(
        self,
        tokens: torch.Tensor,
        depths: torch.Tensor,
        ancestors: torch.Tensor,
        cache: KVCache,
        feature_layers: tuple[int, ...] = (),
        last_logits_only: bool = False,
    ) -> TargetOutput:
        batch_size, num_nodes, num_behind = ancestors.shape
        starts = self._starts_of(cache.num_read(num_behind))
        num_positions = min(self.max_positions or self._num_positions, self._num_positions)
        places = Places.of(cache.lengths, depths, ancestors, cache.num_slots, starts, num_positions)
        with on_device(self.device):
            embedded: torch.Tensor = self.embedding(tokens)
            hidden = self._run_layers(embedded.flatten(0, 1), places, cache, feature_layers)
            spread = {index: state.view(batch_size, num_nodes, -1) for index, state in hidden.items()}
            last = spread[NORMED][:, -1:] if last_logits_only else spread[NORMED]
            logits = self._kernels.multiply(last.flatten(0, 1).contiguous(), self._head)
        features = [spread[index] for index in feature_layers]
        return TargetOutput(logits.view(*last.shape[:2], -1), torch.cat(features, dim=-1) if features else None)

    def _run_layers(
        self, x: torch.Tensor, places: Places, cache: KVCache, wanted: tuple[int, ...]
    ) -> dict[int, torch.Tensor]:
        """The wanted hidden states `[R, D]` and the last one's norm, from the embedded tokens."""
        kernels, hidden = self._kernels, {0: x}
        cos, sin = self._rotations[-1]
        scale = self._layers[0].key_dim ** -0.5
        inputs = kernels.normalise(x, self._first_norm)
        for index, layer in enumerate(self._row_layers):
            keys, values = cache.layer(index)
            queries = kernels.project_heads(
                inputs, layer.queries_keys_values, layer.heads_norm, cos, sin, keys, values, places
            )
            attended = kernels.attend(queries, keys, values, places, scale)
            output, down = layer.attention_output, layer.down
            x, inputs = kernels.add_splits(x, kernels.multiply_split(attended, output), output.bias, layer.mlp_norm)
            gated = kernels.multiply_gated(inputs, layer.gate_up)
            x, inputs = kernels.add_splits(x, kernels.multiply_split(gated, down), down.bias, layer.next_norm)
            if index + 1 in wanted:
                hidden[index + 1] = x
        return hidden | {NORMED: inputs}

    @property
    def _num_positions(self) -> int:
        """Of the tables of rotations."""
        return len(self._rotations[-1][0]) if self._rotations else 0

    @torch.no_grad()
    def _reserve(self, num_positions: int) -> None:
        """Make room in the tables of cosines and sines, `[positions, dim / 2]`."""
        if num_positions <= self._num_positions:
            return
        size = max(FIRST_POSITIONS, 1 << (num_positions - 1).bit_length())
        like = torch.empty(1, dtype=self.dtype, device=self.device)
        tables = self._rotary(like, torch.arange(size, device=self.device)[None])
        cos, sin = (table[0, :, : table.shape[-1] // 2].contiguous() for table in tables)
        self._rotations.append((cos, sin))

    def _starts_of(self, num_positions: int) -> torch.Tensor:
        """The parts of so many positions, on the device; kept, since a recording cannot bring them from the host."""
        starts = part_starts(max(1, num_positions))
        if len(starts) not in self._starts:
            self._starts[len(starts)] = torch.tensor(starts, dtype=torch.int32, device=self.device)
        return self._starts[len(starts)]


def rounding_problem(target: TargetModel) -> str | None:
    """Why a node's logits may round otherwise in a tree than decoded alone, None if they have the same bits.

    Where two logits are nearly equal, a token may then differ from plain decoding's.
    """
    if isinstance(target, RowTarget):
        return None
    if target.is_split:
        return "its parts lie on several devices"
    if target.device.type != "cpu":
        return row_problem(target) or "its pass is not the row pass"
    if target.bits_depend_on_threads:
        return "some of its products are torch's own"
    return None if target.has_our_attention else "its attention is not draftwing's"


def row_problem(target: TargetModel) -> str | None:
    """Why a packed target on a GPU cannot have RowTarget's pass, None if it can."""
    if not isinstance(target, FusedTarget):
        return f"its pass is its own: not one of {', '.join(ARCHITECTURES)} with dense weights and full attention"
    head, (dim, rotated) = target.output_head, target.head_dims
    if target.dtype not in (torch.bfloat16, torch.float16):
        return f"its dtype is {str(target.dtype).removeprefix('torch.')}, not bfloat16 or float16"
    if dim % 16 or dim > WIDEST or rotated != dim:
        return f"its heads have {dim} dimensions of which {rotated} are rotated, expected all of up to {WIDEST}"
    if not (isinstance(head, PackedLinear) and isinstance(head.product, JoinedProduct)):
        return "its output head is not packed"
    if not has_triton():
        return "Triton cannot compile kernels here: it wants a C compiler and Python's headers"
    if not serves_row_kernels(target.device):
        return "its kernels want an NVIDIA GPU of compute capability 8.0 or later"
    return target.row_failure


def read_product(product: Product, most_splits: int = 4) -> RowProduct:
    assert isinstance(product, JoinedProduct)
    num_outputs, num_inputs = product.weight.shape
    return RowProduct(product.weight, product.bias, Tiles.of(num_outputs, num_inputs, most_splits))


def read_norm(norm: Any) -> RowNorm:
    return RowNorm(norm.weight.detach(), epsilon(norm))


def _read_layer(layer: Layer, module: Any, next_norm: RowNorm) -> RowLayer:
    heads_norm = None
    if layer.heads_norm is not None:
        heads_norm = RowNorm(layer.heads_norm.weight.contiguous(), epsilon(module.self_attn.q_norm))
    return RowLayer(
        read_product(layer.queries_keys_values),
        heads_norm,
        read_product(layer.attention_output),
        read_norm(module.post_attention_layernorm),
        read_product(layer.gate_up, most_splits=1),
        read_product(layer.down),
        next_norm,
    )


PARENTS, DEPTHS = (0, 0, 0, 1), (0, 1, 1, 2)
"""The tree: two children of the root, one of which has a child."""
LONGEST_PROMPT = 70
"""Tokens before it: more than a tail has positions, so that a part is read too."""
MOST_APART = 0.2
"""Root mean square of the difference of two passes' logits over their standard deviation: bfloat16 has some 0.03."""


@torch.no_grad()
def row_target(fused: FusedTarget, kernels: Kernels | None = None) -> FusedTarget:
    """The target with RowTarget's pass; `fused` itself, which then holds the reason, where that fails its trial."""
    try:
        ours = RowTarget(fused.model, fused.role, kernels)
        fused.row_failure = _failure(ours, FusedTarget(fused.model, fused.role))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton's are of many kinds
        first_line = next(iter(str(error).splitlines()), "")
        fused.row_failure = f"its kernels fail here: {type(error).__name__}: {first_line}"
    return fused if fused.row_failure else ours


def _failure(ours: RowTarget, fused: FusedTarget) -> str | None:
    """What a trial finds wrong, None if nothing."""
    in_tree = _tree_logits(ours)
    for node, logits in enumerate(in_tree):
        if not torch.equal(logits, _plain_logits(ours, node)):
            return "a node of a tree has other bits than decoded alone here"
    expected = _tree_logits(fused).float()
    apart = (in_tree.float() - expected).square().mean().sqrt() / expected.std()
    if not apart <= MOST_APART:  # NaN compares as false
        return f"its kernels compute something else here: logits are {apart:.2g} standard deviations apart"
    return None


def _tree_logits(target: TargetModel) -> torch.Tensor:
    """`[N, V]` of the tree's nodes."""
    ancestors = torch.zeros(1, len(PARENTS), len(PARENTS), dtype=torch.bool)
    for node in range(len(PARENTS)):
        ancestors[0, node, _path(node)] = True
    tokens, depths = _tokens(target, list(range(len(PARENTS)))), torch.tensor([DEPTHS], device=target.device)
    return target.forward_tree(tokens, depths, ancestors.to(target.device), _prefilled(target)).logits[0]


def _plain_logits(target: TargetModel, node: int) -> torch.Tensor:
    """A node's `[V]` when its path is decoded token by token."""
    cache, seen = _prefilled(target), torch.ones(1, 1, 1, dtype=torch.bool, device=target.device)
    for ancestor in _path(node):
        tokens = _tokens(target, [ancestor])
        logits = target.forward_tree(tokens, torch.zeros_like(tokens), seen, cache).logits[0, 0]
        cache.commit(None, torch.ones_like(tokens[0]), max_kept=1)
    return logits


def _prefilled(target: TargetModel) -> KVCache:
    """A cache of one row that has read a prompt."""
    room = (target.max_positions or LONGEST_PROMPT + len(PARENTS)) - len(PARENTS)
    length = max(1, min(LONGEST_PROMPT, room))
    cache = target.new_cache(1, length + len(PARENTS))
    tokens = _tokens(target, list(range(len(PARENTS), len(PARENTS) + length)))
    target.prefill(tokens, torch.tensor([length], device=target.device), cache)
    return cache


def _tokens(target: TargetModel, numbers: list[int]) -> torch.Tensor:
    """`[1, N]`, other ones for other numbers."""
    return torch.tensor([numbers], device=target.device) * 7 % target.vocab_size


def _path(node: int) -> list[int]:
    return [*_path(PARENTS[node]), node] if node else [0]
