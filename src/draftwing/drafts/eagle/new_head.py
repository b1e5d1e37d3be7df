"""EAGLE heads to train: a new one, or a trained one to continue; and how large it will be."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from draftwing.config import TrainConfig, check_keys
from draftwing.data.chat_template import Example
from draftwing.data.examples import count_supervised
from draftwing.drafts.eagle.build_head import build_network, counted_layers, expected_shapes
from draftwing.drafts.eagle.formats import HeadOptions, default_aux_layers, read_head
from draftwing.drafts.eagle.network import DraftNetwork, Eagle3Model
from draftwing.drafts.fit import Tensors, embedding_rows, load_strictly
from draftwing.drafts.load_draft import open_draft
from draftwing.drafts.objective import HeadSizes, head_to_continue
from draftwing.layers import DraftConfig
from draftwing.target.model import TargetModel

NOT_TO_CHOOSE = {
    *("has_fc", "own_lm_head"),
    *("vocab_size", "target_hidden_size", "aux_layers", "draft_vocab_size", "trained_length"),
}
"""What a new head always has, and what its target or keys of the recipe say."""


def new_config(stage: TrainConfig, target_config: Any, vocab_size: int) -> DraftConfig:
    """A head shaped like one layer of its target, unless `architecture` says otherwise.

    An `eagle3` head has feature layers and a draft vocabulary, too. `target_config` is the target's text configuration
    in transformers.

    Raises:
        ValueError: the recipe asks for what this target does not have.
    """

    def of_target(name: str, otherwise: Any) -> Any:
        return getattr(target_config, name, None) or otherwise

    to_choose = [field.name for field in dataclasses.fields(DraftConfig) if field.name not in NOT_TO_CHOOSE]
    check_keys(stage.architecture, to_choose, "architecture.")
    hidden_size, num_heads = int(target_config.hidden_size), target_config.num_attention_heads
    num_layers = int(target_config.num_hidden_layers)
    sizes: dict[str, Any] = {
        "hidden_size": hidden_size,
        "intermediate_size": of_target("intermediate_size", 4 * hidden_size),
        "num_attention_heads": num_heads,
        "num_key_value_heads": of_target("num_key_value_heads", num_heads),
        "head_dim": of_target("head_dim", hidden_size // num_heads),
        "rms_norm_eps": of_target("rms_norm_eps", 1e-5),
        "max_position_embeddings": of_target("max_position_embeddings", 2048),
        "trained_length": stage.sequence_length,
        "vocab_size": vocab_size,
        "draft_vocab_size": vocab_size,
        "target_hidden_size": hidden_size,
        **stage.architecture,
    }
    if problem := _window_problem(sizes.get("sliding_window"), stage):
        raise ValueError(f"architecture.{problem}")
    if sizes["hidden_size"] != hidden_size:  # it reads the target's embedding and starts from its output head
        raise ValueError(f"architecture.hidden_size: expected the target's {hidden_size}, got {sizes['hidden_size']}")
    if has_own_vocabulary(stage):
        if wrong := [layer for layer in stage.aux_layers if not 0 <= layer <= num_layers]:
            expected = f"numbers of hidden states from 0 to {num_layers}, the number of the target's layers"
            raise ValueError(f"aux_layers: expected {expected}, got {wrong[0]}")
        sizes["aux_layers"] = stage.aux_layers or default_aux_layers(num_layers)
        sizes["draft_vocab_size"] = min(stage.draft_vocab_size or vocab_size, vocab_size)
    return DraftConfig(**sizes)


def _window_problem(window: int | None, stage: TrainConfig) -> str | None:
    """Why a head with a sliding window would learn with more than it reads when it drafts."""
    if window is None or window >= stage.sequence_length:
        return None
    return f"sliding_window: training reads whole rows, so it must be at least the sequence_length, got {window}"


def has_own_vocabulary(stage: TrainConfig) -> bool:
    """Whether the stage's head has an output head of its own, over a draft vocabulary: EAGLE-3's has."""
    return stage.objective == "eagle3"


def new_head(stage: TrainConfig, target: TargetModel, train: Sequence[Example]) -> DraftNetwork:
    """A head that reads the target's embedding, or has a copy to train if the stage says so.

    An `eagle3` one starts from the target's output rows of the most frequent tokens of this data.
    """
    target_ids = None
    if has_own_vocabulary(stage):
        target_ids = most_frequent_tokens(train, stage.draft_vocab_size, target.vocab_size)
    config = new_config(stage, target.config, target.vocab_size)
    head = build_network(config, target, target_ids, own_embedding=stage.train_embedding)
    for module in head.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    with torch.no_grad():
        if isinstance(head, Eagle3Model):
            rows = next(target.output_head.parameters())
            head.lm_head.weight.copy_(rows if target_ids is None else rows[target_ids])
        if stage.train_embedding:
            head.embed_tokens.weight.copy_(embedding_rows(target.embedding))
    return head


def continued_head(stage: TrainConfig, target: TargetModel, train: Sequence[Example]) -> DraftNetwork:
    """The head of `init_from`, for this target; with a `draft_vocab_size`, over the most frequent tokens of this data.

    An embedding of its own is trained if the stage says so; a head without one gets a copy of the target's then.

    Raises:
        ValueError: a head of another kind, or for a target of another width or vocabulary.
    """
    head: DraftNetwork = head_to_continue(stage, target, HeadOptions(stage.aux_layers or None))
    if problem := _window_problem(head.config.sliding_window, stage):
        raise ValueError(f"init_from: {stage.init_from}: {problem}")
    if head.config.trained_length is not None or stage.sequence_length > head.config.window:
        longest = max(stage.sequence_length, head.config.window)
        head.config = dataclasses.replace(head.config, trained_length=longest)
    if stage.train_embedding and not hasattr(head, "embed_tokens"):
        own = {"embed_tokens.weight": embedding_rows(target.embedding)}
        head = _rebuilt(head, target, head.config, head.vocab.target_ids, own)
    if isinstance(head, Eagle3Model) and stage.draft_vocab_size is not None:
        if stage.draft_vocab_size < target.vocab_size and head.config.hidden_size != target.hidden_size:
            raise ValueError(
                "draft_vocab_size: a head of another width than its target's cannot take over its output rows"
            )
        head = _over(most_frequent_tokens(train, stage.draft_vocab_size, target.vocab_size), head, target)
    if hasattr(head, "embed_tokens"):
        head.embed_tokens.requires_grad_(stage.train_embedding)
    return head


def _over(new_ids: torch.Tensor | None, head: Eagle3Model, target: TargetModel) -> DraftNetwork:
    """The head over the draft vocabulary `new_ids`; rows of tokens that it did not have start from the target's."""
    old, size = head.vocab, target.vocab_size
    target_ids = torch.arange(size) if new_ids is None else new_ids
    rows = next(target.output_head.parameters()).detach().to(head.norm.weight).clone()
    old_ids = torch.arange(len(old)) if old.target_ids is None else old.target_ids
    if head.config.own_lm_head:
        rows[old_ids.to(rows.device)] = head.lm_head.weight.detach()
    sizes = dataclasses.replace(head.config, draft_vocab_size=target_ids.numel(), own_lm_head=True)
    return _rebuilt(head, target, sizes, new_ids, {"lm_head.weight": rows[target_ids.to(rows.device)]})


def _rebuilt(
    head: DraftNetwork, target: TargetModel, config: DraftConfig, target_ids: torch.Tensor | None, changed: Tensors
) -> DraftNetwork:
    """The head with another configuration or vocabulary, and some tensors changed or added."""
    tensors = {name: parameter.detach() for name, parameter in head.named_parameters()} | changed
    network = build_network(config, target, target_ids, own_embedding="embed_tokens.weight" in tensors)
    network = network.to(target.device)
    load_strictly(network, tensors)
    return network.train()


def continued_sizes(stage: TrainConfig, made_before: HeadSizes | None) -> HeadSizes:
    """The sizes of a continued head: those of `init_from`, a folder or a head yet to be made, but for what is named."""
    if made_before is None:
        files = open_draft(stage.init_from)
        head = read_head(files.values, files.tensors)
        shapes = {name: shape.numel() for name, shape in expected_shapes(head).items()}
        made_before = HeadSizes(shapes, counted_layers(head))
    made: DraftConfig = made_before.config
    if stage.train_embedding:
        own = {"embed_tokens.weight": made.vocab_size * made.hidden_size}
        made_before = HeadSizes({**made_before.shapes, **own}, made)
    if not has_own_vocabulary(stage):
        return made_before
    config = dataclasses.replace(made, aux_layers=stage.aux_layers or made.aux_layers)
    if not stage.draft_vocab_size:
        return HeadSizes(made_before.shapes, config)
    size = min(stage.draft_vocab_size, config.vocab_size)
    shapes = {**made_before.shapes, "lm_head.weight": size * config.hidden_size}
    return HeadSizes(shapes, dataclasses.replace(config, draft_vocab_size=size))


def most_frequent_tokens(train: Sequence[Example], size: int | None, vocab_size: int) -> torch.Tensor | None:
    """The `size` most frequent supervised tokens, ascending (ties to lower ids); None for the whole vocabulary."""
    if size is None or size >= vocab_size:
        return None
    counts = count_supervised(train, vocab_size)
    return counts.sort(descending=True, stable=True).indices[:size].sort().values
