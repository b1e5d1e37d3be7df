"""Build EAGLE heads for their target. Strict: every tensor and every field is accounted for."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from draftwing.drafts.eagle.fields import sort_fields
from draftwing.drafts.eagle.formats import HeadFile, HeadOptions, count_features, read_head
from draftwing.drafts.eagle.network import DraftNetwork, Eagle3Model, EagleModel, Shared
from draftwing.drafts.family import DraftFiles
from draftwing.drafts.fit import TargetSizes, load_strictly, sizes_of
from draftwing.layers import DraftConfig, DraftVocab
from draftwing.target.model import TargetModel


def build_head(files: DraftFiles, target: TargetModel, dtype: torch.dtype | None, options: HeadOptions) -> DraftNetwork:
    """A head for `target`, on its device and by default in its dtype; `options` override what its file says.

    Raises:
        ValueError: a missing, unknown or misshapen tensor, an unknown field, or a head made for another target.
    """
    head = read_head(files.values, files.tensors, sizes_of(target), options)
    unknown = sort_fields(files.values, files.tensors, head.is_eagle3).refused
    for problem in [*fit_problems(head, sizes_of(target)), *unknown]:
        raise ValueError(problem)
    if not head.config.own_lm_head and _is_tied(files.values) and not _is_tied(target.config.to_dict()):
        raise ValueError(
            "tie_word_embeddings: the head's output head is its embedding, which is the target's, whose own is another"
        )
    network = build_network(head.config, target, head.target_ids, own_embedding="embed_tokens.weight" in head.tensors)
    # Converted before it is filled: a float64 file stays exact.
    network = network.to(device=target.device, dtype=dtype or target.dtype)
    load_strictly(network, head.tensors)
    return network.eval()


def _is_tied(values: Mapping[str, Any]) -> bool:
    return bool(values.get("transformer_layer_config", values).get("tie_word_embeddings"))


def build_network(
    config: DraftConfig, target: TargetModel, target_ids: torch.Tensor | None, own_embedding: bool = False
) -> DraftNetwork:
    """A network for `target`, to be filled."""

    def target_head(output: torch.Tensor) -> torch.Tensor:  # a function: copies share it
        return target.logits(output.to(target.dtype))

    return _network(config, target_ids, target.embedding, target_head, own_embedding)


def network_shapes(config: DraftConfig, own_embedding: bool = False) -> dict[str, torch.Size]:
    """The shapes of the parameters of `build_network`'s network, which is not built in memory and needs no target."""
    of_target = torch.nn.Identity()
    with torch.device("meta"):
        network = _network(config, None, of_target, of_target, own_embedding)
    return {name: parameter.shape for name, parameter in network.named_parameters()}


def _network(
    config: DraftConfig, target_ids: torch.Tensor | None, embedding: Shared, output_head: Shared, own_embedding: bool
) -> DraftNetwork:
    """EAGLE-3 if the configuration names feature layers, else EAGLE-1."""
    if not config.aux_layers:
        return EagleModel(config, embedding, output_head, own_embedding)
    return Eagle3Model(config, DraftVocab(target_ids, config.vocab_size), embedding, output_head, own_embedding)


def expected_shapes(head: HeadFile) -> dict[str, torch.Size]:
    """The parameters that a head's network has."""
    return network_shapes(counted_layers(head), own_embedding="embed_tokens.weight" in head.tensors)


def counted_layers(head: HeadFile) -> DraftConfig:
    """A head's configuration with as many feature layers as its weights read; an EAGLE-3 file need not name them."""
    if not head.is_eagle3 or head.config.aux_layers:
        return head.config
    num_features = count_features(head.tensors, head.config.target_hidden_size)
    return dataclasses.replace(head.config, aux_layers=tuple(range(1, num_features + 1)))


def fit_problems(head: HeadFile, target: TargetSizes) -> list[str]:
    """One sentence for each way in which a head does not fit its target."""
    config, problems = head.config, []
    if config.target_hidden_size != target.hidden_size:
        problems.append(
            f"hidden_size: the head reads features of width {config.target_hidden_size}, "
            f"the target's have {target.hidden_size}"
        )
    if config.vocab_size != target.vocab_size:
        problems.append(
            f"vocab_size: the head was made for {config.vocab_size} tokens, the target has {target.vocab_size}"
        )
    if config.hidden_size != target.hidden_size and "embed_tokens.weight" not in head.tensors:
        problems.append(
            f"embed_tokens.weight: missing, and the target's embedding has width {target.hidden_size} instead of "
            f"the head's {config.hidden_size}"
        )
    if config.aux_layers and not -1 <= min(config.aux_layers) <= max(config.aux_layers) <= target.num_layers:
        problems.append(f"aux_layers: {config.aux_layers} go beyond the target's {target.num_layers} layers")
    if not config.has_fc and config.hidden_size != target.hidden_size:
        problems.append(
            f"fc.weight: missing, and the target's states have width {target.hidden_size} instead of "
            f"the head's {config.hidden_size}"
        )
    if not config.own_lm_head and config.hidden_size != target.hidden_size:
        problems.append(
            f"lm_head.weight: missing, and the target's output head reads width {target.hidden_size} "
            f"instead of the head's {config.hidden_size}"
        )
    if head.is_eagle3 and not config.aux_layers:
        problems.append("aux_layers: the file names none and the target has no default")
    return problems
