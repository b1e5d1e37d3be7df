"""The pass that gives a token the same bits in a tree, in a batch and alone: its layout in row_emulation.py, and its
kernels in Triton's interpreter (if that is installed) or on a GPU."""

import re
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from conftest import generate, language_model, new_head, requests_for, run
from row_emulation import EMULATED, multiply_split
from tape import Tape
from torch.nn import functional
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from draftwing.api import SpeculativeModel
from draftwing.config import TrainConfig
from draftwing.data.chat_template import Example
from draftwing.engine.engine import MOST_LEVELS, Engine
from draftwing.engine.options import GenerateOptions
from draftwing.engine.tree_plan import TreePlan
from draftwing.target import packed, row_pass
from draftwing.target.fused import FusedTarget
from draftwing.target.interface import ATTENTION
from draftwing.target.kv_cache import KVCache
from draftwing.target.model import TargetModel
from draftwing.target.packed import JoinedProduct, PackedLinear, pack_linears
from draftwing.target.row_layout import TAIL, TREE_LEVELS, Places, RowNorm, RowProduct, Tiles, part_starts
from draftwing.target.row_pass import Kernels, RowTarget, rounding_problem, row_problem, row_target

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _interprets() -> bool:
    if find_spec("triton") is None:
        return False
    import triton

    return DEVICE == "cuda" or triton.__version__ >= "3.7" or np.__version__ < "2.4"


needs_triton = pytest.mark.skipif(not _interprets(), reason="Triton is missing, or cannot loop with this numpy")


@pytest.fixture(params=["emulated", pytest.param("triton", marks=needs_triton)])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return EMULATED if request.param == "emulated" else Kernels.of_triton()


def device_of(kernels: Kernels) -> str:
    return "cpu" if kernels is EMULATED else DEVICE


def random(*shape: int, device: str, seed: int = 0) -> torch.Tensor:
    """In float16, which the interpreter multiplies as a GPU does (bfloat16 it may not)."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).half().to(device)


def close(output: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(output.double(), expected.double(), atol=2e-2, rtol=1e-2)


# ------------------------------------------------------------------------------------------------------------- layout


def test_parts_are_the_first_of_a_longer_contexts() -> None:
    assert part_starts(1) == (0, 128)
    assert part_starts(1025) == (*range(0, 1024, 128), 1024, 1280)
    longest = part_starts(100_000)
    assert np.diff(longest).max() == 1024
    for num_positions in (31, 128, 1300, 2048, 2049, 9000):
        starts = part_starts(num_positions)
        assert starts == longest[: len(starts)]
        assert starts[-2] < num_positions <= starts[-1]


def test_splits_are_the_weights_own() -> None:
    assert Tiles.of(6144, 4096).splits == 1  # the shapes of an 8B model: queries, keys and values
    assert Tiles.of(4096, 4096).splits == 2
    assert Tiles.of(28672, 4096) == Tiles(128, 128, 1, 8, 4)
    assert Tiles.of(64, 100_000).splits == 4
    assert Tiles.of(64, 100_000, most_splits=1).splits == 1
    assert Tiles(64, 128, 3, 4, 5).split_length(1000) == 384  # the last split has less


#          0 root
#        1     2
#      3   4     5
#      6
TREE = [0, 0, 0, 1, 1, 2, 3]
DEPTHS = [0, 1, 1, 2, 2, 2, 3]


def path_to(node: int) -> list[int]:
    return [*path_to(TREE[node]), node] if node else [0]


def ancestors_of(*rows: list[int]) -> torch.Tensor:
    """`[B, N, N]` of TREE's nodes."""
    seen = torch.zeros(len(TREE), len(TREE), dtype=torch.bool)
    for node in range(len(TREE)):
        seen[node, path_to(node)] = True
    return seen.expand(len(rows) or 1, -1, -1)


def places_of(lengths: list[int], num_slots: int, device: str = "cpu", starts: tuple[int, ...] | None = None) -> Places:
    """Of TREE behind contexts of these lengths."""
    starts = starts or part_starts(max(lengths) + len(TREE))
    tensors = (torch.tensor(lengths), torch.tensor([DEPTHS] * len(lengths)), ancestors_of(*[[]] * len(lengths)))
    on_device = (tensor.to(device) for tensor in tensors)
    return Places.of(*on_device, num_slots, torch.tensor(starts, dtype=torch.int32, device=device), num_slots)


def alone(lengths: list[int], num_slots: int, device: str = "cpu", starts: tuple[int, ...] | None = None) -> Places:
    """Of one node behind each context."""
    starts = starts or part_starts(max(lengths) + 1)
    rows = len(lengths)
    tensors = (torch.tensor(lengths), torch.zeros(rows, 1, dtype=torch.int64), torch.ones(rows, 1, 1, dtype=torch.bool))
    on_device = (tensor.to(device) for tensor in tensors)
    return Places.of(*on_device, num_slots, torch.tensor(starts, dtype=torch.int32, device=device), num_slots)


def test_places() -> None:
    places = places_of([62, 3], num_slots=100)
    assert places.positions.tolist() == [62, 63, 63, 64, 64, 64, 65, 3, 4, 4, 5, 5, 5, 6]
    assert places.slots.tolist() == [*range(62, 69), *range(103, 110)]
    assert places.limits.tolist() == [0, 0, 0, 32, 32, 32, 32] + [0] * 7
    assert places.num_parts.tolist() == [0, 0, 0, 1, 1, 1, 1] + [0] * 7
    # Node 6 stands at position 65: slots 32 to 61 are committed, its ancestors are nodes 0, 1 and 3.
    assert places.tails[6].tolist() == [*range(32, 62), 62, 63, 65, 68] + [-1] * (TAIL - 34)
    # Node 5 of the second row, at position 5 there; its tail begins at -32.
    assert places.tails[12].tolist() == [-1] * 32 + [100, 101, 102, 103, 105, 108] + [-1] * (TAIL - 38)


def test_nodes_beyond_the_last_slot_and_position_stay_within() -> None:
    places = Places.of(
        torch.tensor([9]), torch.tensor([DEPTHS]), ancestors_of(), 11, torch.tensor([0, 128], dtype=torch.int32), 10
    )
    assert places.positions.max() == 9
    assert places.slots.max() == places.tails.max() == 10


@pytest.mark.parametrize(("length", "num_slots"), [(290, 1000), (290, 120), (900, 1000)])
def test_nodes_that_nobody_looks_at_read_nothing_beyond(length: int, num_slots: int) -> None:
    """Of a seat that does not run, behind a longer text than those for which the parts are, or of padding."""
    starts = torch.tensor(part_starts(130), dtype=torch.int32)
    places = Places.of(torch.tensor([length]), torch.tensor([DEPTHS]), ancestors_of(), num_slots, starts, 100)
    assert (places.limits <= min(256, num_slots)).all()
    assert (places.num_parts <= 2).all()
    assert places.slots.max() < num_slots
    assert places.tails.max() < num_slots


def test_places_are_made_without_the_host() -> None:
    starts = torch.tensor([0, 128], dtype=torch.int32)
    tree = torch.tensor([62]), torch.tensor([DEPTHS]), ancestors_of()
    with Tape():
        Places.of(*tree, 100, starts, 100)


def test_a_chain_of_any_depth_reads_all_before_it() -> None:
    """A prompt is one; what lies before the tails is in slots that are positions."""
    causal = torch.ones(1, 200, 200, dtype=torch.bool).tril()
    depths, starts = torch.arange(200)[None], torch.tensor(part_starts(300), dtype=torch.int32)
    places = Places.of(torch.tensor([50]), depths, causal, 300, starts, 300)
    for node, (limit, tail) in enumerate(zip(places.limits.tolist(), places.tails.tolist(), strict=True)):
        assert [*range(limit), *(slot for slot in tail if slot >= 0)] == list(range(50 + node + 1))


# ----------------------------------------------------------------------------------------------------------- products


def product_of(num_outputs: int, num_inputs: int, splits: int, device: str, tiles: int = 32) -> RowProduct:
    weight = random(num_outputs, num_inputs, device=device) / num_inputs**0.5
    return RowProduct(weight, random(num_outputs, device=device, seed=1), Tiles(tiles, 32, splits, 4, 2))


@pytest.mark.parametrize(("num_outputs", "num_inputs", "splits"), [(96, 160, 1), (64, 256, 2), (40, 72, 2)])
def test_products_are_the_formula(kernels: Kernels, num_outputs: int, num_inputs: int, splits: int) -> None:
    device = device_of(kernels)
    product = product_of(num_outputs, num_inputs, splits, device)
    x, residual = random(19, num_inputs, device=device, seed=2), random(19, num_outputs, device=device, seed=3)
    expected = functional.linear(x.double(), product.weight.double(), product.bias.double())
    norm = RowNorm(random(num_outputs, device=device, seed=4), 1e-5)
    y, normed = kernels.add_splits(residual, kernels.multiply_split(x, product), product.bias, norm)
    close(y, expected + residual.double())
    close(normed, functional.rms_norm(y.double(), (num_outputs,), norm.weight.double(), 1e-5))
    close(kernels.normalise(y, norm), normed)  # another kernel, compiled apart
    if splits == 1:
        close(kernels.multiply(x, product), expected)
        gate, up = expected.chunk(2, dim=-1)
        close(kernels.multiply_gated(x, product), functional.silu(gate) * up)


@pytest.mark.parametrize("splits", [1, 2])
def test_a_row_has_the_same_bits_among_any_others(kernels: Kernels, splits: int) -> None:
    device = device_of(kernels)
    product, x = product_of(64, 128, splits, device), random(40, 128, device=device, seed=2)
    norm, residual = RowNorm(random(64, device=device), 1e-5), random(40, 64, device=device, seed=3)

    def outputs(first: int, last: int) -> torch.Tensor:
        rows = x[first:last]
        added = kernels.add_splits(residual[first:last], kernels.multiply_split(rows, product), product.bias, norm)
        more = [kernels.multiply(rows, product), kernels.multiply_gated(rows, product)] if splits == 1 else []
        return torch.cat([*added, *more], dim=1)

    among_all = outputs(0, 40)
    for first, last in ((0, 1), (17, 18), (39, 40), (3, 6), (5, 25)):
        assert torch.equal(outputs(first, last), among_all[first:last])


# -------------------------------------------------------------------------------------------------------------- heads


@needs_triton
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("dim", "lengths"), [(64, [5, 9, 3]), (32, [0])], ids=str)
def test_heads_rotate_in_their_product_with_the_bits_of_two_kernels(
    dim: int, lengths: list[int], has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head of one tile and of two, more rows than a tile has, a tree in a batch.

    Of numbers whose sums are exact: the interpreter's matrix product rounds an output by its place in the tile.
    """
    from draftwing.target import row_attention, row_products

    monkeypatch.setattr(row_products, "MOST_ROWS", 16)
    weight, x, bias = (
        random(*shape, device=DEVICE, seed=seed).mul(16).round().div(16)
        for seed, shape in enumerate([(4 * dim, 96), (len(lengths) * len(TREE), 96), (4 * dim,)])
    )
    product = RowProduct(weight, bias if has_bias else None, Tiles(32, 32, 1, 4, 2))  # of two query heads
    cos, sin = random(20, dim // 2, device=DEVICE, seed=3), random(20, dim // 2, device=DEVICE, seed=4)
    places = places_of(lengths, 17, DEVICE)
    assert row_attention.turns_in_tiles(product, None, dim)

    def projected() -> list[torch.Tensor]:
        slots = [torch.zeros(len(lengths) * 17, 1, dim, dtype=torch.float16, device=DEVICE) for _ in range(2)]
        return [row_attention.project_heads(x, product, None, cos, sin, *slots, places), *slots]

    in_one = projected()
    monkeypatch.setattr(row_attention, "turns_in_tiles", lambda *parts: False)
    for ours, expected in zip(in_one, projected(), strict=True):
        assert ours.any() and torch.equal(ours, expected)


@needs_triton
def test_which_heads_rotate_in_their_product() -> None:
    from draftwing.target.row_attention import turns_in_tiles

    def product(num_outputs: int, num_inputs: int) -> RowProduct:
        weight = torch.empty(num_outputs, num_inputs, device="meta")
        return RowProduct(weight, None, Tiles.of(num_outputs, num_inputs))

    assert turns_in_tiles(product(6144, 4096), None, 128)  # of an 8B model
    assert not turns_in_tiles(product(6144, 4096), RowNorm(torch.ones(40, 128), 1e-5), 128)
    assert not turns_in_tiles(product(2560, 2048), None, 80)  # a tile has parts of two heads
    assert not turns_in_tiles(product(1024, 4096), None, 64)  # split


# ---------------------------------------------------------------------------------------------------------- attention

HEADS, KEY_HEADS, DIM = 4, 2, 16


def slabs(rows: int, num_slots: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(random(rows * num_slots, KEY_HEADS, DIM, device=device, seed=seed) for seed in (5, 6))


def committed(
    keys: torch.Tensor, values: torch.Tensor, lengths: list[int], node: int, garbage: float
) -> list[torch.Tensor]:
    """Slots after a commit of the path to a node in all rows; all behind them are garbage."""
    num_slots, path = len(keys) // len(lengths), path_to(node)
    moved = []
    for slab in (keys, values):
        rows = slab.clone().unflatten(0, (len(lengths), num_slots))
        for row, length in zip(rows, lengths, strict=True):
            row[length : length + len(path)] = row[[length + ancestor for ancestor in path]]
            row[length + len(path) :] = garbage
        moved.append(rows.flatten(0, 1))
    return moved


def explicit(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The formula in float64: `[B, N, Hq, dim]` attended by row."""
    output, num_slots = [], len(keys) // len(lengths)
    for row, length in enumerate(lengths):
        for node in range(len(TREE)):
            slots = [*range(length), *(length + ancestor for ancestor in path_to(node))]
            key, value = (
                slab[[row * num_slots + slot for slot in slots]].double().repeat_interleave(HEADS // KEY_HEADS, 1)
                for slab in (keys, values)
            )
            scores = (queries[row * len(TREE) + node].double() * key).sum(-1) * DIM**-0.5
            output.append((scores.softmax(0)[..., None] * value).sum(0).flatten())
    return torch.stack(output)


def same_bits(
    kernels: Kernels, lengths: list[int], starts: Callable[[int], tuple[int, ...]] = part_starts, garbage: float = 7.0
) -> bool:
    """Whether each node attends in the tree as it does alone, behind its committed ancestors, alone and in a batch."""
    device, num_slots = device_of(kernels), max(lengths) + len(TREE) + 3
    keys, values = slabs(len(lengths), num_slots, device)
    queries = random(len(lengths) * len(TREE), HEADS, DIM, device=device, seed=7)
    places = places_of(lengths, num_slots, device, starts(max(lengths) + len(TREE)))
    in_tree = kernels.attend(queries, keys, values, places, DIM**-0.5).view(len(lengths), len(TREE), -1)
    close(in_tree.flatten(0, 1), explicit(queries, keys, values, lengths))
    is_same = True
    for node in (0, 4, 5, 6):
        after = [length + DEPTHS[node] for length in lengths]
        one = queries.view(len(lengths), len(TREE), HEADS, DIM)[:, node].contiguous()
        moved = committed(keys, values, lengths, node, garbage)
        places = alone(after, num_slots, device, starts(max(after) + 1))
        is_same &= torch.equal(kernels.attend(one, *moved, places, DIM**-0.5), in_tree[:, node])
        first = [slab[:num_slots] for slab in moved]
        places = alone(after[:1], num_slots, device, starts(after[0] + 1))
        is_same &= torch.equal(kernels.attend(one[:1], *first, places, DIM**-0.5), in_tree[:1, node])
    return is_same


@pytest.mark.parametrize(
    "lengths", [[1, 30], [31, 29], [62, 61], [63, 95], [128, 0], [157, 160], [191, 253], [319, 40]], ids=str
)
def test_a_nodes_attention_has_the_same_bits_alone(lengths: list[int]) -> None:
    """At lengths around the ends of tails, of blocks and of parts; others' slots hold garbage."""
    assert same_bits(EMULATED, lengths, garbage=float("nan"))


@pytest.mark.parametrize("lengths", [[1053, 1054], [1310, 1183]], ids=str)
def test_the_same_where_parts_get_longer(lengths: list[int]) -> None:
    assert same_bits(EMULATED, lengths)


@needs_triton
@pytest.mark.parametrize("lengths", [[30, 62], [157, 190]], ids=str)
def test_the_kernels_do_so_too(lengths: list[int]) -> None:
    assert same_bits(Kernels.of_triton(), lengths, garbage=float("nan"))


OF_ATTENTION = ("_multiply_rotated", "_rotate", "_attend", "_join_parts")


def count_launches(module: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The grids with which a kernel is launched from now on."""
    kernel, grids = getattr(module, name), []

    class Counted:
        def __getitem__(self, grid: Any) -> Any:
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(module, name, Counted())
    return grids


@needs_triton
def test_the_kernels_join_many_parts_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from draftwing.target import row_attention

    monkeypatch.setattr(row_attention, "JOINED_AT_ONCE", 2)  # of a tail and two parts
    monkeypatch.setattr(row_attention, "BLOCK_ROWS", 16)  # 4 nodes of 4 heads
    monkeypatch.setitem(globals(), "HEADS", 4 * KEY_HEADS)
    kernels, launches = Kernels.of_triton(), count_launches(row_attention, "_attend", monkeypatch)
    device = device_of(kernels)
    queries, keys_values = random(len(TREE), HEADS, DIM, device=device, seed=7), slabs(1, 210, device)
    places, outputs = places_of([195], 210, device), []
    assert places.num_parts.tolist() == [2] * len(TREE)
    for most_scratch, num_launches in ((1, 2), (1 << 28, 1)):
        monkeypatch.setattr(row_attention, "MOST_SCRATCH", most_scratch)
        launches.clear()
        outputs.append(kernels.attend(queries, *keys_values, places, DIM**-0.5))
        assert len(launches) == num_launches
    assert torch.equal(*outputs)
    close(outputs[0], explicit(queries, *keys_values, [195]))


def test_bits_differ_where_parts_follow_the_context() -> None:
    """The sabotaged twin: two parts of whatever the context's length is."""

    def halves(num_positions: int) -> tuple[int, ...]:
        return 0, num_positions // 2, num_positions

    assert same_bits(EMULATED, [100])
    assert not same_bits(EMULATED, [100], starts=halves)


# ---------------------------------------------------------------------------------------------------------- the pass

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "head_dim": DIM,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
    "attn_implementation": ATTENTION,
}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama with biases": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
}
TOO_DEEP = f"plan: expected a chain, or a tree of at most {TREE_LEVELS - 1} levels"
TOKENS = [8, 9, 10, 11, 12, 13, 14]


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, without_native: None) -> None:
    """Layers are packed, and keys kept, as a GPU's are; weights are split although they are small."""
    monkeypatch.setattr(packed, "PackedProduct", JoinedProduct)
    monkeypatch.setattr(packed, "_can_pack", lambda layer: True)
    monkeypatch.setattr(TargetModel, "attention_dtype", property(lambda self: self.dtype))
    monkeypatch.setattr(TargetModel, "best_single_row", 1)
    monkeypatch.setattr(Tiles, "of", staticmethod(_small_tiles))


def _small_tiles(num_outputs: int, num_inputs: int, most_splits: int = 4) -> Tiles:
    return Tiles(32, 16, min(2, most_splits), 4, 2)


@torch.no_grad()
def random_model(family: str) -> PreTrainedModel:
    """A small model, its biases and norms not at their initial zeros and ones."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def packed_model(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = random_model(family).to(dtype)
    pack_linears(model)
    return model


def prefilled(target: TargetModel, length: int, rows: int = 1, step: int = 512) -> KVCache:
    """Rows of which the first has read a prompt of so many tokens, some in each pass, the others less."""
    cache = target.new_cache(rows, length + 20)
    tokens = (torch.arange(rows * length).view(rows, length) * 7) % SIZES["vocab_size"]
    for start in range(0, length, step):
        num_valid = (length - 5 * torch.arange(rows) - start).clamp(0, step)
        cache.bound = start
        target.prefill(tokens[:, start : start + step], num_valid, cache)
    return cache


def tree_logits(target: TargetModel, length: int, rows: int = 1) -> torch.Tensor:
    """`[B, N, V]` of TREE behind prompts."""
    tokens, depths = torch.tensor([TOKENS] * rows), torch.tensor([DEPTHS] * rows)
    ancestors = ancestors_of(*[[]] * rows)
    return target.forward_tree(tokens, depths, ancestors, prefilled(target, length, rows)).logits


def plain_logits(target: TargetModel, length: int, node: int, step: int = 512) -> torch.Tensor:
    """The node's logits `[V]` when its path is decoded token by token."""
    cache, seen = prefilled(target, length, step=step), torch.ones(1, 1, 1, dtype=torch.bool)
    for ancestor in path_to(node):
        tokens = torch.tensor([[TOKENS[ancestor]]])
        logits = target.forward_tree(tokens, torch.zeros_like(tokens), seen, cache).logits[0, 0]
        cache.commit(None, torch.tensor([1]), max_kept=1)
    return logits


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_the_pass_computes_what_the_stock_modules_do(family: str) -> None:
    stock, ours = TargetModel(packed_model(family)), RowTarget(packed_model(family), kernels=EMULATED)
    tokens, depths, wanted = torch.tensor([TOKENS]), torch.tensor([DEPTHS]), (0, 1, 2, -1)
    outputs = [
        target.forward_tree(tokens, depths, ancestors_of(), prefilled(target, 37), wanted) for target in (stock, ours)
    ]
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs[1].features, outputs[0].features, atol=1e-4, rtol=1e-4)


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="compiled kernels do not read a CPU's memory; see test_cuda.py")
@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("family", ["llama with biases", "qwen3"])
@torch.inference_mode()
def test_the_kernels_compute_what_is_emulated(family: str) -> None:
    emulated, ours = (RowTarget(packed_model(family), kernels=kernels) for kernels in (EMULATED, Kernels.of_triton()))
    torch.testing.assert_close(tree_logits(ours, 5), tree_logits(emulated, 5), atol=1e-3, rtol=1e-3)


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="compiled kernels do not read a CPU's memory; see test_cuda.py")
@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize(("splits", "per_layer"), [(1, 8), (2, 9)])
@torch.inference_mode()
def test_launches_of_a_layer(splits: int, per_layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the first norm and the output head; at the 8B shape queries, keys and values are not split."""
    from draftwing.target import row_attention, row_products

    def tiles(num_outputs: int, num_inputs: int, most_splits: int = 4) -> Tiles:
        return Tiles(DIM, 16, min(splits, most_splits), 4, 2)

    monkeypatch.setattr(Tiles, "of", staticmethod(tiles))
    target = RowTarget(packed_model("llama"))
    cache, tokens = target.new_cache(1, 30), torch.tensor([[8]])
    counted = {row_products: ("_multiply", "_join_splits"), row_attention: OF_ATTENTION}
    launches = [count_launches(module, name, monkeypatch) for module, names in counted.items() for name in names]
    target.forward_tree(tokens, torch.zeros_like(tokens), torch.ones(1, 1, 1, dtype=torch.bool), cache)
    assert sum(map(len, launches)) == 2 + per_layer * SIZES["num_hidden_layers"]


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("length", [9, 31, 63])
@torch.inference_mode()
def test_each_node_of_a_tree_has_the_bits_of_plain_decoding(length: int) -> None:
    target = RowTarget(packed_model("llama", torch.float16), kernels=EMULATED)
    in_tree, in_batch = tree_logits(target, length), tree_logits(target, length, rows=2)
    assert torch.equal(in_batch[0], in_tree[0])
    for node in (0, 5, 6):
        assert torch.equal(in_tree[0, node], plain_logits(target, length, node))


@pytest.mark.usefixtures("_as_on_a_gpu")
@torch.inference_mode()
def test_it_does_not_matter_in_what_parts_a_prompt_is_read() -> None:
    target = RowTarget(packed_model("llama", torch.float16), kernels=EMULATED)
    whole = plain_logits(target, 70, 1)
    for step in (1, 32, 41):
        assert torch.equal(plain_logits(target, 70, 1, step), whole)


@pytest.mark.usefixtures("_as_on_a_gpu")
@torch.inference_mode()
def test_bits_differ_where_splits_follow_the_rows() -> None:
    """The sabotaged twin."""
    sabotaged = replace(EMULATED, multiply_split=split_by_rows)
    target = RowTarget(packed_model("llama"), kernels=sabotaged)
    in_tree = tree_logits(target, 9)
    assert not all(torch.equal(in_tree[0, node], plain_logits(target, 9, node)) for node in (0, 5, 6))


@pytest.mark.usefixtures("_as_on_a_gpu")
@torch.inference_mode()
def test_tokens_are_plain_decodings() -> None:
    """Behind a draft that is often wrong, in trees and in chains deeper than a tail."""
    target = RowTarget(packed_model("llama", torch.float16), kernels=EMULATED)
    model = random_model("llama")
    for parameter in model.parameters():
        parameter += 0.02 * torch.randn_like(parameter)
    draft = language_model(TargetModel(model, role="draft"))
    requests = requests_for([[1, 2, 3], [5] * 30], max_new_tokens=6, temperature=0.7)
    plain = [*run(target, requests[:1]), *run(target, requests[1:])]
    for plan in ("tree:3x3x7", "chain:34"):
        assert run(target, requests, draft, plan) == plain


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_a_tree_that_is_too_deep_is_refused() -> None:
    target = RowTarget(packed_model("llama"), kernels=EMULATED)
    draft = language_model(TargetModel(random_model("llama"), role="draft"))
    with pytest.raises(ValueError, match=TOO_DEEP):
        run(target, requests_for([[1, 2, 3]]), draft, "tree:2x32x40")


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_an_engine_that_is_kept_serves_no_tree_that_a_new_one_refuses() -> None:
    target = RowTarget(packed_model("llama"), kernels=EMULATED)
    draft = language_model(TargetModel(random_model("llama"), role="draft"))
    engine = Engine(target, draft, 1, 80, TreePlan.chain(60))
    assert engine.can_serve(1, 80, TreePlan.chain(60))
    assert engine.can_serve(1, 80, TreePlan(2, TREE_LEVELS - 1, 60))
    assert not engine.can_serve(1, 80, TreePlan(2, TREE_LEVELS, 60))
    assert not engine.can_serve(1, 80, TreePlan.chain(TREE_LEVELS).with_lookup())
    assert not engine.can_serve(1, 80, TreePlan.chain(MOST_LEVELS + 1))


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_options_are_refused_before_anything_starts() -> None:
    """A chain becomes a tree by its lookup, which the message names; levels that cannot be emitted do not count."""
    target = RowTarget(packed_model("llama"), kernels=EMULATED)
    config = TrainConfig(objective="eagle3", output="", target="unused", draft_vocab_size=48, aux_layers=(0, 1, 2))
    unpacked, text = TargetModel(random_model("llama")), Example(torch.arange(60), torch.ones(60, dtype=torch.bool))
    model, prompts = SpeculativeModel(target, new_head(config, unpacked, [text])), [[1, 2, 3]]
    for plan, options in (("chain:40", {}), ("tree:2x31x40", {}), ("chain:40", {"ngram": True, "max_new_tokens": 20})):
        model.check(prompts, plan=plan, **options)
    for call in (model.check, model.start):
        with pytest.raises(ValueError, match=TOO_DEEP + ".*, got tree:2x40x60$"):
            call(prompts, plan="tree:2x40x60")
        with pytest.raises(ValueError, match=TOO_DEEP + ".*, got chain:40 with a lookup.*ngram=False"):
            call(prompts, plan="chain:40", ngram=True)
    with pytest.raises(ValueError, match=TOO_DEEP):
        model.engine(1, 80, GenerateOptions(plan="tree:2x40x60"))


# -------------------------------------------------------------------------------------------------------- who gets it


def split_by_rows(x: torch.Tensor, product: RowProduct) -> torch.Tensor:
    """What a library does that has few rows."""
    splits = 1 if len(x) > 1 else product.tiles.splits
    return multiply_split(x, replace(product, tiles=replace(product.tiles, splits=splits)))


def attend_otherwise(queries: torch.Tensor, keys: Any, values: Any, places: Places, scale: float) -> torch.Tensor:
    """The same bits for each node, but not the formula's."""
    return EMULATED.attend(queries, keys, 10 * values, places, -scale)


def not_compiled(*arguments: Any) -> torch.Tensor:
    raise RuntimeError("PassManager::run failed\nand more")


TRIALS = {
    "as it should be": ({}, None),
    "other bits": ({"multiply_split": split_by_rows}, "a node of a tree has other bits"),
    "another formula": ({"attend": attend_otherwise}, "standard deviations apart"),
    "constant logits": ({"multiply": lambda *parts: EMULATED.multiply(*parts) * 0 + 1}, "standard deviations apart"),
    "an exception": ({"attend": not_compiled}, "its kernels fail here: RuntimeError: PassManager::run failed$"),
}


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("kind", TRIALS)
def test_kernels_that_fail_on_this_device_are_left_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotaged in each way; the FusedTarget is kept, and the reason is told."""
    sabotage, reason = TRIALS[kind]
    fused = FusedTarget(packed_model("llama"))
    chosen = row_target(fused, replace(EMULATED, **sabotage))
    monkeypatch.setattr(row_pass, "has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    if reason is None:
        assert type(chosen) is RowTarget and fused.row_failure is None and rounding_problem(chosen) is None
    else:
        assert chosen is fused and re.search(reason, fused.row_failure or "")
        fused.dtype = torch.bfloat16  # as one that was tried on a GPU
        assert row_problem(fused) == fused.row_failure


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_no_memory_is_no_fault_of_the_kernels() -> None:
    def attend(*arguments: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("of the device")

    with pytest.raises(torch.OutOfMemoryError):
        row_target(FusedTarget(packed_model("llama")), replace(EMULATED, attend=attend))


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_who_has_the_same_bits_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def problem(target: TargetModel) -> str:
        return row_problem(target) or "none"

    monkeypatch.setattr(row_pass, "has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert problem(FusedTarget(packed_model("llama", torch.bfloat16))) == "none"
    assert "its dtype is float32" in problem(FusedTarget(packed_model("llama")))
    assert "its pass is its own" in problem(TargetModel(packed_model("llama", torch.bfloat16)))
    with monkeypatch.context() as patch:
        patch.setitem(SIZES, "head_dim", 24)
        assert "its heads have 24 dimensions" in problem(FusedTarget(packed_model("qwen3", torch.bfloat16)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8.0" in problem(FusedTarget(packed_model("llama", torch.bfloat16)))
    monkeypatch.setattr(row_pass, "has_triton", lambda: False)
    assert "Triton cannot compile" in problem(FusedTarget(packed_model("llama", torch.bfloat16)))


def test_statistics_say_who_has_not() -> None:
    """On a CPU: packed products and sums in float64 have the same bits, others have not."""
    stock = TargetModel(random_model("llama"))
    assert rounding_problem(stock) == "some of its products are torch's own"
    statistics = generate(stock, requests_for([[1, 2]], max_new_tokens=1)).statistics
    assert statistics.as_dict()["rounding_problem"] == rounding_problem(stock)
    ours = TargetModel(packed_model("llama"))
    if isinstance(ours.output_head, PackedLinear):  # a CPU that oneDNN packs for
        assert rounding_problem(ours) is None
        ours.model.config._attn_implementation = "sdpa"
        assert rounding_problem(ours) == "its attention is not draftwing's"


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_weights_that_are_no_linear_layers_are_not_packed(family: str) -> None:
    """Conv1D, and experts in one parameter; the layers beside them are packed."""
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, "attn_implementation": ATTENTION}
    model: PreTrainedModel = (
        GPT2LMHeadModel(GPT2Config(**sizes))
        if family == "gpt2"
        else MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2, sliding_window=None))
    )
    target = TargetModel(model.eval())
    pack_linears(target.model)
    assert target.bits_depend_on_threads
    assert rounding_problem(target) == "some of its products are torch's own"


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_a_gpus_other_passes_promise_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_pass, "row_problem", lambda target: None)
    fused = FusedTarget(packed_model("llama"), role="draft")
    fused.device = torch.device("cuda")
    assert rounding_problem(fused) == "its pass is not the row pass"
