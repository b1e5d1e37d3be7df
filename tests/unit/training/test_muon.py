"""Muon: which parameters it moves, and by what; the rest is AdamW's."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from draftwing.config import TrainConfig, from_mapping
from draftwing.training.muon import RMS, MuonAdamW, hidden_matrices, orthogonal

VOCABULARY, WIDTH = 40, 12
OPTIONS = {"lr": 0.01, "betas": (0.9, 0.95)}


def toy_model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, 30), nn.Linear(30, WIDTH), nn.Linear(WIDTH, VOCABULARY)
    return nn.Sequential(*layers)


def muon(model: nn.Module, weight_decay: float = 0.0) -> MuonAdamW:
    """The last layer's weight gives the logits."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = torch.optim.AdamW(trained, weight_decay=weight_decay, **OPTIONS).param_groups
    return MuonAdamW(groups, hidden_matrices(model, [model[3].weight]))


def move(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> nn.Module:
    for step in range(steps):
        optimizer.zero_grad()
        model((torch.arange(8) + step) % VOCABULARY).logsumexp(-1).square().sum().backward()
        optimizer.step()
    return model


def singular_values(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(matrix.double())


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16)])
def test_an_update_keeps_directions_and_evens_their_lengths(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    lengths = torch.linspace(0.2, 5, min(shape))
    result = orthogonal(left @ lengths.diag() @ right)
    turned = left.T @ result @ right.T
    torch.testing.assert_close(turned, turned.diagonal().diag(), atol=1e-4, rtol=0)
    assert 0.6 < turned.diagonal().min() <= turned.diagonal().max() < 1.3
    torch.testing.assert_close(result, left @ turned.diagonal().diag() @ right, atol=1e-4, rtol=0)


def test_nothing_has_no_direction() -> None:
    assert torch.equal(orthogonal(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_matrices_of_hidden_layers_are_moved_and_the_rest_is_adamws() -> None:
    start = toy_model()
    ours, adamw = copy.deepcopy(start), copy.deepcopy(start)
    move(ours, muon(ours))
    move(adamw, torch.optim.AdamW(adamw.parameters(), weight_decay=0.0, **OPTIONS))
    before, moved, expected = (dict(model.named_parameters()) for model in (start, ours, adamw))
    for name in before:
        if name in ("1.weight", "2.weight"):
            values = singular_values(moved[name] - before[name]) / (0.01 * RMS * 30**0.5)
            full = values[values > 0.01]  # 8 tokens cannot turn more directions than 8
            assert len(full) <= 8
            assert 0.3 < full.min() <= full.max() < 1.3
        else:
            assert torch.equal(moved[name], expected[name])


def test_output_matrices_are_told_by_what_they_are() -> None:
    """Not by their size, which a hidden matrix may share; a tied one is an embedding, too."""
    sizes = {"vocab_size": VOCABULARY, "intermediate_size": VOCABULARY, "hidden_size": 16, "num_attention_heads": 2}
    for is_tied in (False, True):
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, tie_word_embeddings=is_tied))
        hidden = hidden_matrices(model, [model.get_output_embeddings().weight])
        names = [name for name, parameter in model.named_parameters() if parameter in hidden]
        assert len(names) == 7
        assert not any("head" in name or "embed" in name for name in names)


def test_a_frozen_matrix_stays() -> None:
    model = toy_model()
    model[1].requires_grad_(False)
    before = model[1].weight.clone()
    move(model, muon(model, 0.1))
    assert torch.equal(model[1].weight, before)


def test_weights_decay_whoever_moves_them() -> None:
    kept, decayed, start = toy_model(), toy_model(), toy_model()
    move(kept, muon(kept))
    move(decayed, muon(decayed, 0.5))
    for index in (1, 3):
        shrunk = start[index].weight * 0.01 * 0.5
        torch.testing.assert_close(kept[index].weight - decayed[index].weight, shrunk, atol=1e-7, rtol=1e-4)


def test_its_state_is_saved_and_loaded() -> None:
    whole = toy_model()
    move(whole, muon(whole), steps=2)
    halves = toy_model()
    first = muon(halves)
    move(halves, first)
    second = muon(halves)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.zero_grad()
    halves((torch.arange(8) + 1) % VOCABULARY).logsumexp(-1).square().sum().backward()
    second.step()
    for parameter, expected in zip(halves.parameters(), whole.parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_shards_of_matrices_are_refused() -> None:
    recipe = {"objective": "eagle3", "output": "out", "target": "tiny", "optimizer": "muon", "parallel": "fsdp2"}
    with pytest.raises(ValueError, match=r"^optimizer: muon needs whole matrices"):
        from_mapping(TrainConfig, recipe)
