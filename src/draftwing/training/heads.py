"""Train an EAGLE head or Medusa heads for a frozen target, in one process."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from draftwing.checkpoint.formats import HeadFormat, default_aux_layers
from draftwing.checkpoint.load import DraftNetwork, build_network, load_head, load_target, load_tokenizer, sizes_of
from draftwing.checkpoint.save import save_head, save_medusa, to_head
from draftwing.config import TrainConfig, check_keys
from draftwing.data.chat import Example, encode_row
from draftwing.data.corpus import Row
from draftwing.data.rows import read_rows
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
    rows = read_rows(config.data, config.max_rows, config.seed)
    train = examples(rows.train, tokenizer, config.sequence_length)
    held_out = examples(rows.held_out, tokenizer, config.sequence_length)[: config.evaluate_rows]
    head: DraftNetwork | MedusaModel
    if config.objective == "medusa":
        head = new_medusa(config, target).to(target.device)
    elif config.init_from:
        head = load_head(config.init_from, target, torch.float32, config.aux_layers or None).train()
    else:
        head = new_head(config, target, train).to(target.device)
    module = (
        MedusaTraining(head, target, config) if isinstance(head, MedusaModel) else HeadTraining(head, target, config)
    )
    trainer = new_trainer(config, module, train, held_out, Collator(tokenizer.pad_token_id or 0), HeadTrainer)
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
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for example in train:
        counts += torch.bincount(example.input_ids[example.loss_mask], minlength=vocab_size)
    return counts.sort(descending=True, stable=True).indices[:size].sort().values


def examples(rows: Sequence[Row], tokenizer: Any, length: int) -> list[Example]:
    """Tokenise rows; long ones are cut into pieces of `length` tokens, pieces with nothing supervised are left out."""
    pieces = []
    for row in rows:
        example = encode_row(row, tokenizer)
        for start in range(0, len(example), length):
            piece = Example(example.input_ids[start : start + length], example.loss_mask[start : start + length])
            if piece.loss_mask[2:].any():
                pieces.append(piece)
    return pieces


class Collator:
    """Pads examples on the right to the longest of the batch."""

    def __init__(self, pad_token_id: int) -> None:
        self._pad = pad_token_id

    def __call__(self, batch: list[Example]) -> dict[str, torch.Tensor]:
        ids = nn.utils.rnn.pad_sequence([e.input_ids for e in batch], batch_first=True, padding_value=self._pad)
        mask = nn.utils.rnn.pad_sequence([e.loss_mask for e in batch], batch_first=True, padding_value=False)
        return {"input_ids": ids, "loss_mask": mask}


class LengthGroupedOrder(Sampler[int]):
    """An order of rows by epoch that puts rows of like length together; a function of (seed, epoch), so it resumes."""

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed, self._epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return iter(get_length_grouped_indices(self._lengths, self._batch_size, generator=generator))


class KeepsMetrics(Protocol):
    """What HeadTrainer asks of a training module: HeadTraining and MedusaTraining."""

    def pop_metrics(self, training: bool) -> dict[str, float]: ...


class HeadTrainer(ResumableTrainer):
    """Batches rows of like length, and logs each step's loss and accuracy beside the total."""

    def _get_train_sampler(self, train_dataset: Any = None) -> "LengthGroupedOrder":
        lengths = [len(example) for example in self.train_dataset]
        return LengthGroupedOrder(lengths, self.args.per_device_train_batch_size, int(self.args.seed))

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
