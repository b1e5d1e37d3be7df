"""Heads to train: a new one, or a trained one to continue."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from draftwing.config import TrainConfig, check_keys
from draftwing.data.chat import Example
from draftwing.data.examples import count_supervised
from draftwing.drafts.eagle.eagle1 import EagleModel
from draftwing.drafts.eagle.formats import HeadOptions, default_aux_layers
from draftwing.drafts.eagle.load import DraftNetwork, build_network, load_head
from draftwing.drafts.fit import load_strictly
from draftwing.layers import DraftConfig
from draftwing.target.model import TargetModel

OF_FILES_ALONE = {"has_fc", "own_lm_head"}
"""What a new head always has."""


def continued_head(config: TrainConfig, target: TargetModel, train: Sequence[Example]) -> DraftNetwork:
    """The head of `init_from`, for this target; with a `draft_vocab_size`, over the most frequent tokens of this data.

    Output rows of tokens that the head did not have start from the target's.

    Raises:
        ValueError: a head of another kind, or for a target of another width or vocabulary.
    """
    head = load_head(config.init_from, target, torch.float32, HeadOptions(config.aux_layers or None)).train()
    if isinstance(head, EagleModel) != (config.objective == "eagle1"):
        kind = "an EAGLE-1/2 head" if isinstance(head, EagleModel) else "an EAGLE-3 head"
        raise ValueError(f"init_from: {config.init_from} is {kind}, the objective is {config.objective}")
    if head.config.trained_length is not None or config.sequence_length > head.config.window:
        longest = max(config.sequence_length, head.config.window)
        head.config = dataclasses.replace(head.config, trained_length=longest)
    _freeze_embedding(head, config)
    if isinstance(head, EagleModel) or config.draft_vocab_size is None:
        return head
    old, size = head.vocab, target.vocab_size
    if config.draft_vocab_size < size and head.config.hidden_size != target.hidden_size:
        raise ValueError("draft_vocab_size: a head of another width than its target's cannot take over its output rows")
    new_ids = most_frequent_tokens(train, config.draft_vocab_size, size)
    target_ids = torch.arange(size) if new_ids is None else new_ids
    rows = next(target.output_head.parameters()).detach().to(head.norm.weight).clone()
    old_ids = torch.arange(len(old)) if old.target_ids is None else old.target_ids
    if head.config.own_lm_head:
        rows[old_ids.to(rows.device)] = head.lm_head.weight.detach()
    sizes = dataclasses.replace(head.config, draft_vocab_size=target_ids.numel(), own_lm_head=True)
    network = build_network(sizes, target, new_ids, own_embedding=hasattr(head, "embed_tokens")).to(target.device)
    tensors = {name: parameter.detach() for name, parameter in head.named_parameters()}
    load_strictly(network, tensors | {"lm_head.weight": rows[target_ids.to(rows.device)]})
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name != "embed_tokens.weight")
    return network.train()


def new_config(config: TrainConfig, target_config: Any, vocab_size: int) -> DraftConfig:
    """A head shaped like one layer of its target, unless `architecture` says otherwise.

    `target_config` is the target's text configuration in transformers.

    Raises:
        ValueError: the recipe asks for what this target does not have.
    """

    def of_target(name: str, otherwise: Any) -> Any:
        return getattr(target_config, name, None) or otherwise

    check_keys(config.architecture, {field.name for field in dataclasses.fields(DraftConfig)} - OF_FILES_ALONE)
    hidden_size, num_heads = int(target_config.hidden_size), target_config.num_attention_heads
    sizes: dict[str, Any] = {
        "hidden_size": hidden_size,
        "intermediate_size": of_target("intermediate_size", 4 * hidden_size),
        "num_attention_heads": num_heads,
        "num_key_value_heads": of_target("num_key_value_heads", num_heads),
        "head_dim": of_target("head_dim", hidden_size // num_heads),
        "rms_norm_eps": of_target("rms_norm_eps", 1e-5),
        "max_position_embeddings": of_target("max_position_embeddings", 2048),
        "trained_length": config.sequence_length,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "vocab_size": vocab_size,
        "draft_vocab_size": vocab_size,
        "target_hidden_size": hidden_size,
        **config.architecture,
    }
    if sizes["hidden_size"] != hidden_size:  # it reads the target's embedding and starts from its output head
        raise ValueError(f"architecture.hidden_size: expected the target's {hidden_size}, got {sizes['hidden_size']}")
    if config.objective == "eagle3":
        _check_layers(config.aux_layers, int(target_config.num_hidden_layers))
        sizes["aux_layers"] = config.aux_layers or default_aux_layers(int(target_config.num_hidden_layers))
        sizes["draft_vocab_size"] = min(config.draft_vocab_size or vocab_size, vocab_size)
    return DraftConfig(**sizes)


def _check_layers(layers: Sequence[int], num_layers: int) -> None:
    if wrong := [layer for layer in layers if not 0 <= layer <= num_layers]:
        expected = f"numbers of hidden states from 0 to {num_layers}, the number of the target's layers"
        raise ValueError(f"aux_layers: expected {expected}, got {wrong[0]}")


def new_head(config: TrainConfig, target: TargetModel, train: Sequence[Example]) -> DraftNetwork:
    """A head of `new_config`, started from the target."""
    sizes = new_config(config, target.config, target.vocab_size)
    if config.objective == "eagle1":
        head = build_network(sizes, target, None)
        assert isinstance(head, EagleModel)
        _initialise(head)
        with torch.no_grad():
            head.embed_tokens.weight.copy_(target.embedding.weight)  # type: ignore[arg-type]
        _freeze_embedding(head, config)
        return head
    target_ids = most_frequent_tokens(train, config.draft_vocab_size, target.vocab_size)
    head = build_network(sizes, target, target_ids)
    assert not isinstance(head, EagleModel)
    _freeze_embedding(head, config)
    _initialise(head)
    with torch.no_grad():
        rows = next(target.output_head.parameters())
        head.lm_head.weight.copy_(rows if target_ids is None else rows[target_ids])
    return head


def most_frequent_tokens(train: Sequence[Example], size: int | None, vocab_size: int) -> torch.Tensor | None:
    """The `size` most frequent supervised tokens, ascending (ties to lower ids); None for the whole vocabulary."""
    if size is None or size >= vocab_size:
        return None
    counts = count_supervised(train, vocab_size)
    return counts.sort(descending=True, stable=True).indices[:size].sort().values


def coverage(head: DraftNetwork, train: Sequence[Example]) -> float | None:
    """The share of the supervised tokens that the head's draft vocabulary has; None if it has all of the target's."""
    target_ids = head.vocab.target_ids
    if target_ids is None:
        return None
    counts = count_supervised(train, head.config.vocab_size)
    return float(counts[target_ids.cpu()].sum() / counts.sum().clamp(min=1))


def _freeze_embedding(head: DraftNetwork, config: TrainConfig) -> None:
    """Train a head's own embedding only if the recipe says so.

    Raises:
        ValueError: it says so, and the head reads its target's.
    """
    if hasattr(head, "embed_tokens"):
        head.embed_tokens.requires_grad_(config.train_embedding)
    elif config.train_embedding:
        raise ValueError("train_embedding: this head has no embedding of its own, it reads its target's")


def _initialise(head: DraftNetwork) -> None:
    for module in head.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
