"""Train an EAGLE head or Medusa heads for a frozen target, in one process."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import nn

from draftwing.checkpoint.formats import HeadFormat, default_aux_layers
from draftwing.checkpoint.load import DraftNetwork, build_network, load_head, load_target, load_tokenizer, sizes_of
from draftwing.checkpoint.save import save_head, save_medusa, to_head
from draftwing.config import TrainConfig, check_keys
from draftwing.data.chat import Example
from draftwing.data.examples import (
    Collator,
    LengthGroupedOrder,
    as_training_rows,
    count_supervised,
    lengths_of,
    read_documents,
)
from draftwing.models.eagle import EagleModel
from draftwing.models.layers import DraftConfig
from draftwing.models.medusa import MedusaModel
from draftwing.models.target import TargetModel
from draftwing.training.medusa import MedusaTraining, new_medusa
from draftwing.training.objectives import HeadTraining
from draftwing.training.trainer import ResumableTrainer, new_trainer


def train_head(config: TrainConfig) -> dict[str, float]:
    """Train the recipe's head into `config.output`, in its published format; returns the held-out metrics."""
    torch.manual_seed(config.seed)
    is_cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if is_cuda and config.bf16 else torch.float32
    target = load_target(config.target, dtype, "cuda" if is_cuda else "cpu")
    tokenizer = load_tokenizer(config.target)
    documents = read_documents(config, tokenizer)
    head: DraftNetwork | MedusaModel
    if config.objective == "medusa":
        head = new_medusa(config, target).to(target.device)
    elif config.init_from:
        head = load_head(config.init_from, target, torch.float32, config.aux_layers or None).train()
    else:
        head = new_head(config, target, documents.train).to(target.device)
    module = (
        MedusaTraining(head, target, config) if isinstance(head, MedusaModel) else HeadTraining(head, target, config)
    )
    rows = as_training_rows(documents, config, target, head.config.feature_layers)
    trainer = new_trainer(config, module, rows.train, rows.held_out, Collator(tokenizer.pad_token_id or 0), HeadTrainer)
    trainer.train(resume_from_checkpoint=trainer.last_checkpoint())
    metrics: dict[str, float] = trainer.evaluate()
    if isinstance(head, MedusaModel):
        save_medusa(head, Path(config.output), config.target, torch.bfloat16)
    else:
        head_format: HeadFormat = "eagle1" if isinstance(head, EagleModel) else "eagle3"
        save_head(to_head(head, head_format), Path(config.output), sizes_of(target), dtype=torch.bfloat16)
    return metrics


def new_head(config: TrainConfig, target: TargetModel, train: Sequence[Example]) -> DraftNetwork:
    """A head shaped like one layer of its target (unless `architecture` says otherwise), started from the target."""

    def of_target(name: str, otherwise: Any) -> Any:
        return getattr(target.config, name, None) or otherwise

    num_heads = target.config.num_attention_heads
    sizes: dict[str, Any] = {
        "hidden_size": target.hidden_size,
        "intermediate_size": of_target("intermediate_size", 4 * target.hidden_size),
        "num_attention_heads": num_heads,
        "num_key_value_heads": of_target("num_key_value_heads", num_heads),
        "head_dim": of_target("head_dim", target.hidden_size // num_heads),
        "rms_norm_eps": of_target("rms_norm_eps", 1e-5),
        "max_position_embeddings": target.max_positions or 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "vocab_size": target.vocab_size,
        "draft_vocab_size": target.vocab_size,
        "target_hidden_size": target.hidden_size,
        **config.architecture,
    }
    check_keys(config.architecture, {field.name for field in dataclasses.fields(DraftConfig)})
    if config.objective == "eagle1":
        head = build_network(DraftConfig(**sizes), target, None)
        assert isinstance(head, EagleModel)
        _initialise(head)
        with torch.no_grad():
            head.embed_tokens.weight.copy_(target.embedding.weight)  # type: ignore[arg-type]
        head.embed_tokens.requires_grad_(False)
        return head
    target_ids = most_frequent_tokens(train, config.draft_vocab_size, target.vocab_size)
    sizes["aux_layers"] = config.aux_layers or default_aux_layers(target.num_layers)
    sizes["draft_vocab_size"] = target.vocab_size if target_ids is None else target_ids.numel()
    head = build_network(DraftConfig(**sizes), target, target_ids)
    assert not isinstance(head, EagleModel)
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


class KeepsMetrics(Protocol):
    """What HeadTrainer asks of a training module: HeadTraining and MedusaTraining."""

    def pop_metrics(self, training: bool) -> dict[str, float]: ...


class HeadTrainer(ResumableTrainer):
    """Batches rows of like length, and logs each step's loss and accuracy beside the total."""

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedOrder:
        return LengthGroupedOrder(
            lengths_of(self.train_dataset), self.args.per_device_train_batch_size, int(self.args.seed)
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        module = cast(KeepsMetrics, self.model)
        prefix = "eval_" if "eval_loss" in logs else ""
        if "loss" in logs or prefix:
            metrics = module.pop_metrics(training=not prefix)
            logs |= {prefix + name: round(value, 4) for name, value in metrics.items() if name != "loss"}
        super().log(logs, *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = model(**self._prepare_inputs(inputs))["loss"]
        return loss.detach(), None, None


def _initialise(head: DraftNetwork) -> None:
    for module in head.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
