"""EAGLE heads to train: a new one, or a trained one to continue; and how large it will be."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from draftwing.config import Eagle3Stage, EagleStage, check_keys
from draftwing.data.chat_template import Example
from draftwing.data.examples import count_supervised
from draftwing.drafts.eagle.eagle1 import EagleModel
from draftwing.drafts.eagle.eagle3 import Eagle3Model
from draftwing.drafts.eagle.formats import HeadOptions, default_aux_layers, read_head
from draftwing.drafts.eagle.load_head import DraftNetwork, build_network, counted_layers, expected_shapes, load_head
from draftwing.drafts.fit import load_strictly
from draftwing.drafts.load_draft import read_draft_files, resolve_draft
from draftwing.drafts.objective import HeadSizes
from draftwing.layers import DraftConfig
from draftwing.target.model import TargetModel

Head = TypeVar("Head", EagleModel, Eagle3Model)
OF_FILES_ALONE = {"has_fc", "own_lm_head"}
"""What a new head always has."""


def continued_eagle1(stage: EagleStage, target: TargetModel) -> EagleModel:
    """The head of `init_from`, for this target.

    Raises:
        ValueError: a head of another kind, or for a target of another width or vocabulary.
    """
    return _continued(stage, target, EagleModel)


def continued_eagle3(stage: Eagle3Stage, target: TargetModel, train: Sequence[Example]) -> Eagle3Model:
    """The same; with a `draft_vocab_size`, over the most frequent tokens of this data.

    Raises:
        ValueError: as above.
    """
    head = _continued(stage, target, Eagle3Model)
    if stage.draft_vocab_size is None:
        return head
    if stage.draft_vocab_size < target.vocab_size and head.config.hidden_size != target.hidden_size:
        raise ValueError("draft_vocab_size: a head of another width than its target's cannot take over its output rows")
    return _over(most_frequent_tokens(train, stage.draft_vocab_size, target.vocab_size), head, target)


def _continued(stage: EagleStage, target: TargetModel, kind: type[Head]) -> Head:
    head = load_head(stage.init_from, target, torch.float32, HeadOptions(stage.aux_layers or None)).train()
    if not isinstance(head, kind):
        found = "an EAGLE-1/2 head" if isinstance(head, EagleModel) else "an EAGLE-3 head"
        raise ValueError(f"init_from: {stage.init_from} is {found}, the objective is {stage.objective}")
    if head.config.trained_length is not None or stage.sequence_length > head.config.window:
        longest = max(stage.sequence_length, head.config.window)
        head.config = dataclasses.replace(head.config, trained_length=longest)
    _freeze_embedding(head, stage)
    return head


def _over(new_ids: torch.Tensor | None, head: Eagle3Model, target: TargetModel) -> Eagle3Model:
    """The head over the draft vocabulary `new_ids`; rows of tokens that it did not have start from the target's."""
    old, size = head.vocab, target.vocab_size
    target_ids = torch.arange(size) if new_ids is None else new_ids
    rows = next(target.output_head.parameters()).detach().to(head.norm.weight).clone()
    old_ids = torch.arange(len(old)) if old.target_ids is None else old.target_ids
    if head.config.own_lm_head:
        rows[old_ids.to(rows.device)] = head.lm_head.weight.detach()
    sizes = dataclasses.replace(head.config, draft_vocab_size=target_ids.numel(), own_lm_head=True)
    network = build_network(sizes, target, new_ids, own_embedding=hasattr(head, "embed_tokens")).to(target.device)
    assert isinstance(network, Eagle3Model)
    tensors = {name: parameter.detach() for name, parameter in head.named_parameters()}
    load_strictly(network, tensors | {"lm_head.weight": rows[target_ids.to(rows.device)]})
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name != "embed_tokens.weight")
    return network.train()


def eagle1_config(stage: EagleStage, target_config: Any, vocab_size: int) -> DraftConfig:
    """A head shaped like one layer of its target, unless `architecture` says otherwise.

    `target_config` is the target's text configuration in transformers.

    Raises:
        ValueError: the recipe asks for what this target does not have.
    """
    return DraftConfig(**_one_layer(stage, target_config, vocab_size))


def eagle3_config(stage: Eagle3Stage, target_config: Any, vocab_size: int) -> DraftConfig:
    """The same, with feature layers and a draft vocabulary."""
    sizes, num_layers = _one_layer(stage, target_config, vocab_size), int(target_config.num_hidden_layers)
    _check_layers(stage.aux_layers, num_layers)
    sizes["aux_layers"] = stage.aux_layers or default_aux_layers(num_layers)
    sizes["draft_vocab_size"] = min(stage.draft_vocab_size or vocab_size, vocab_size)
    return DraftConfig(**sizes)


def _one_layer(stage: EagleStage, target_config: Any, vocab_size: int) -> dict[str, Any]:
    def of_target(name: str, otherwise: Any) -> Any:
        return getattr(target_config, name, None) or otherwise

    check_keys(stage.architecture, {field.name for field in dataclasses.fields(DraftConfig)} - OF_FILES_ALONE)
    hidden_size, num_heads = int(target_config.hidden_size), target_config.num_attention_heads
    sizes: dict[str, Any] = {
        "hidden_size": hidden_size,
        "intermediate_size": of_target("intermediate_size", 4 * hidden_size),
        "num_attention_heads": num_heads,
        "num_key_value_heads": of_target("num_key_value_heads", num_heads),
        "head_dim": of_target("head_dim", hidden_size // num_heads),
        "rms_norm_eps": of_target("rms_norm_eps", 1e-5),
        "max_position_embeddings": of_target("max_position_embeddings", 2048),
        "trained_length": stage.sequence_length,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "vocab_size": vocab_size,
        "draft_vocab_size": vocab_size,
        "target_hidden_size": hidden_size,
        **stage.architecture,
    }
    if sizes["hidden_size"] != hidden_size:  # it reads the target's embedding and starts from its output head
        raise ValueError(f"architecture.hidden_size: expected the target's {hidden_size}, got {sizes['hidden_size']}")
    return sizes


def _check_layers(layers: Sequence[int], num_layers: int) -> None:
    if wrong := [layer for layer in layers if not 0 <= layer <= num_layers]:
        expected = f"numbers of hidden states from 0 to {num_layers}, the number of the target's layers"
        raise ValueError(f"aux_layers: expected {expected}, got {wrong[0]}")


def new_eagle1(stage: EagleStage, target: TargetModel) -> EagleModel:
    """A head with the target's embedding."""
    head = build_network(eagle1_config(stage, target.config, target.vocab_size), target, None)
    assert isinstance(head, EagleModel)
    _initialise(head)
    with torch.no_grad():
        head.embed_tokens.weight.copy_(target.embedding.weight)  # type: ignore[arg-type]
    _freeze_embedding(head, stage)
    return head


def new_eagle3(stage: Eagle3Stage, target: TargetModel, train: Sequence[Example]) -> Eagle3Model:
    """A head with the target's output matrix, over the most frequent tokens of this data."""
    target_ids = most_frequent_tokens(train, stage.draft_vocab_size, target.vocab_size)
    head = build_network(eagle3_config(stage, target.config, target.vocab_size), target, target_ids)
    assert isinstance(head, Eagle3Model)
    _freeze_embedding(head, stage)
    _initialise(head)
    with torch.no_grad():
        rows = next(target.output_head.parameters())
        head.lm_head.weight.copy_(rows if target_ids is None else rows[target_ids])
    return head


def read_sizes(name: str) -> HeadSizes:
    """The sizes of a head in a folder or on the hub."""
    head = read_head(*read_draft_files(resolve_draft(name)))
    return HeadSizes({name: shape.numel() for name, shape in expected_shapes(head).items()}, counted_layers(head))


def continued_sizes(sizes: HeadSizes, stage: Eagle3Stage) -> HeadSizes:
    """The sizes of a continued head: its own, but for what the recipe names."""
    config = dataclasses.replace(sizes.config, aux_layers=stage.aux_layers or sizes.config.aux_layers)
    if not stage.draft_vocab_size:
        return HeadSizes(sizes.shapes, config)
    size = min(stage.draft_vocab_size, config.vocab_size)
    shapes = {**sizes.shapes, "lm_head.weight": size * config.hidden_size}
    return HeadSizes(shapes, dataclasses.replace(config, draft_vocab_size=size))


def most_frequent_tokens(train: Sequence[Example], size: int | None, vocab_size: int) -> torch.Tensor | None:
    """The `size` most frequent supervised tokens, ascending (ties to lower ids); None for the whole vocabulary."""
    if size is None or size >= vocab_size:
        return None
    counts = count_supervised(train, vocab_size)
    return counts.sort(descending=True, stable=True).indices[:size].sort().values


def _freeze_embedding(head: DraftNetwork, stage: EagleStage) -> None:
    """Train a head's own embedding only if the recipe says so.

    Raises:
        ValueError: it says so, and the head reads its target's.
    """
    if hasattr(head, "embed_tokens"):
        head.embed_tokens.requires_grad_(stage.train_embedding)
    elif stage.train_embedding:
        raise ValueError("train_embedding: this head has no embedding of its own, it reads its target's")


def _initialise(head: DraftNetwork) -> None:
    for module in head.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
