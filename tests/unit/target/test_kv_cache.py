"""Slots: committing a path equals recomputing from scratch, rows are ragged, and padding is never read."""

import pytest
import torch

from draftwing.target.kv_cache import KVCache, LayerShape, visible_slots
from draftwing.target.model import TargetModel

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def target(stock_target: TargetModel) -> TargetModel:
    """Logits are those of the stock modules."""
    return stock_target


def positions_cache(batch_size: int, capacity: int, num_new: int) -> KVCache:
    """A one-layer cache whose `num_new` slots behind nothing hold keys 100, 101, ... and values of minus that."""
    cache = KVCache([LayerShape(1, 1, 1)], batch_size, capacity, torch.float64, CPU)
    write(cache, num_new, first=100)
    return cache


def write(cache: KVCache, num_new: int, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.arange(first, first + num_new, dtype=torch.float64).expand(cache.batch_size, num_new)[:, None, :, None]
    return cache.write(0, keys, -keys, cache.slots_behind(num_new), cache.num_read(num_new))


def test_each_layer_is_kept_where_it_lies() -> None:
    """A target that is split over devices: here a CPU and one that computes nothing."""
    meta = torch.device("meta")
    cache = KVCache([LayerShape(1, 2, 2), LayerShape(1, 2, 2, meta)], 2, 8, torch.float64, CPU)
    slots = cache.slots_behind(3)
    for layer, device in enumerate((CPU, meta)):
        new = torch.ones(2, 1, 3, 2, dtype=torch.float64, device=device)
        for part in cache.write(layer, new, new, slots, cache.num_read(3)):
            assert part.device == device and part.shape == (2, 1, 3, 2)
    cache.commit(torch.tensor([[0, 2], [0, 1]]), torch.tensor([2, 1]), max_kept=2)
    cache.copy_seat(0, 1, 2)
    cache.exchange(0, 1, 2)
    cache.part(1, 2).clear(0, 2)
    assert cache.lengths.tolist() == [2, 0]


def test_commit_gathers_the_path() -> None:
    cache = positions_cache(batch_size=2, capacity=10, num_new=5)
    # Row 0 keeps nodes 0, 2, 4; row 1 keeps its root. Entries past num_kept are 0, as walk() makes them.
    cache.commit(torch.tensor([[0, 2, 4], [0, 0, 0]]), torch.tensor([3, 1]), max_kept=3)
    assert cache.lengths.tolist() == [3, 1]
    keys, values = write(cache, num_new=1, first=7)
    assert keys[0, 0, :4, 0].tolist() == [100, 102, 104, 7]
    assert keys[1, 0, :2, 0].tolist() == [100, 7]
    assert torch.equal(values[0, 0, :4], -keys[0, 0, :4])


def test_commit_without_a_path_keeps_the_first_nodes() -> None:
    cache = positions_cache(batch_size=2, capacity=10, num_new=4)
    cache.commit(None, torch.tensor([0, 3]), max_kept=3)
    keys, _ = write(cache, num_new=1, first=7)
    assert keys[0, 0, 0, 0] == 7
    assert keys[1, 0, :4, 0].tolist() == [100, 101, 102, 7]


def test_the_host_bound_follows_commits_and_stays_within_capacity() -> None:
    cache = positions_cache(batch_size=1, capacity=6, num_new=3)
    assert cache.num_read(3) == 3
    cache.commit(None, torch.tensor([2]), max_kept=3)
    assert (cache.bound, cache.num_read(2)) == (3, 5)
    cache.commit(None, torch.tensor([0]), max_kept=9)
    assert (cache.bound, cache.num_read(2)) == (6, 6)


def test_writes_past_the_capacity_land_in_the_rows_trash_slot() -> None:
    """Padding of a short row may lie beyond its slots; neither its own nor its neighbour's tokens may suffer."""
    cache = positions_cache(batch_size=2, capacity=4, num_new=4)
    cache.commit(None, torch.tensor([3, 4]), max_kept=4)
    keys, _ = write(cache, num_new=3, first=7)  # row 0 has one slot left, row 1 none
    assert keys.shape[2] == 4
    assert keys[0, 0, :, 0].tolist() == [100, 101, 102, 7]
    assert keys[1, 0, :, 0].tolist() == [100, 101, 102, 103]


def test_layers_of_different_shapes_are_committed_alike() -> None:
    cache = KVCache([LayerShape(1, 2, 3), LayerShape(2, 2, 2)], 1, 8, torch.float64, CPU)
    slots, stored = cache.slots_behind(3), []
    torch.manual_seed(0)
    for layer, (heads, key_dim, value_dim) in enumerate([(1, 2, 3), (2, 2, 2)]):
        keys, values = torch.randn(1, heads, 3, key_dim).double(), torch.randn(1, heads, 3, value_dim).double()
        cache.write(layer, keys, values, slots, 3)
        stored.append((keys, values))
    cache.commit(torch.tensor([[0, 2]]), torch.tensor([2]), max_kept=2)
    for layer, (keys, values) in enumerate(stored):
        read_keys, read_values = cache.write(layer, keys[:, :, :1], values[:, :, :1], cache.slots_behind(1), 3)
        assert torch.equal(read_keys[:, :, :2], keys[:, :, [0, 2]])
        assert torch.equal(read_values[:, :, :2], values[:, :, [0, 2]])


@pytest.mark.usefixtures("machine")
def test_visible_slots() -> None:
    """Rows of 2 and 0 committed tokens; a tree of a root and two children; 6 slots are read."""
    ancestors = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool).expand(2, 3, 3)
    assert visible_slots(torch.tensor([2, 0]), ancestors, num_read=6).int().tolist() == [
        [
            [1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 1, 1, 0, 1, 0],
        ],
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 0, 1, 0, 0, 0],
        ],
    ]


@torch.no_grad()
def test_a_committed_path_equals_recomputing_from_scratch(target: TargetModel) -> None:
    """Ragged rows, two cycles of trees with rejections; then one more token's logits against the stock module."""
    prompts = [[1, 2, 3, 4, 5], [7, 8], [9, 8, 7]]
    parents = [0, 0, 0, 1, 2, 4]  # two branches: 0-1-3 and 0-2-4-5
    depths = torch.tensor([0, 1, 1, 2, 2, 3]).expand(3, 6)
    ancestors = torch.eye(6, dtype=torch.bool)
    for node, parent in enumerate(parents[1:], 1):
        ancestors[node] |= ancestors[parent]
    ancestors = ancestors.expand(3, 6, 6)
    cache = target.new_cache(3, capacity=24)
    padded = torch.tensor([prompt + [0] * (5 - len(prompt)) for prompt in prompts])
    target.prefill(padded, torch.tensor([5, 2, 3]), cache)
    sequences = [list(prompt) for prompt in prompts]
    for cycle, paths in enumerate([[[0, 2, 4, 5], [0, 1, 3], [0]], [[0, 1], [0], [0, 2, 4]]]):
        tokens = torch.arange(18).reshape(3, 6) + 20 + cycle
        target.forward_tree(tokens, depths, ancestors, cache)
        path = torch.tensor([row + [0] * (4 - len(row)) for row in paths])
        cache.commit(path, torch.tensor([len(row) for row in paths]), max_kept=4)
        for row, nodes in enumerate(paths):
            sequences[row] += tokens[row, nodes].tolist()

    one = torch.ones(3, 1, 1, dtype=torch.bool)
    logits = target.forward_tree(torch.full((3, 1), 6), torch.zeros(3, 1, dtype=torch.int64), one, cache).logits
    assert logits is not None
    assert cache.lengths.tolist() == [len(sequence) for sequence in sequences]
    for row, sequence in enumerate(sequences):
        fresh = target.model(input_ids=torch.tensor([[*sequence, 6]]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(logits[row, 0], fresh, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_every_node_of_a_tree_gets_the_logits_of_its_own_branch(target: TargetModel) -> None:
    prompt, tokens = [1, 2, 3], torch.tensor([[5, 6, 7, 8]])
    ancestors = torch.tensor([[[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]], dtype=torch.bool)
    cache = target.new_cache(1, capacity=10)
    target.prefill(torch.tensor([prompt]), torch.tensor([3]), cache)
    output = target.forward_tree(tokens, torch.tensor([[0, 1, 1, 2]]), ancestors, cache, feature_layers=(2, -1))
    assert output.logits is not None
    assert output.features is not None
    for node, branch in enumerate([[5], [5, 6], [5, 7], [5, 7, 8]]):
        fresh = target.model(input_ids=torch.tensor([prompt + branch]), use_cache=False, output_hidden_states=True)
        torch.testing.assert_close(output.logits[0, node], fresh.logits[0, -1], rtol=1e-9, atol=1e-9)
        features = torch.cat([fresh.hidden_states[layer][0, -1] for layer in (2, -1)])
        torch.testing.assert_close(output.features[0, node], features, rtol=1e-9, atol=1e-9)
