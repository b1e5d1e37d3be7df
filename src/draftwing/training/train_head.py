"""Train a head of any kind for a frozen target; an evaluation measures acceptance length, simulated and decoded."""

import dataclasses
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.trainer_pt_utils import get_length_grouped_indices

from draftwing.config import HeadStage, Stage, TrainConfig
from draftwing.data.chat_template import Example
from draftwing.data.examples import (
    Collator,
    as_training_rows,
    check_readable,
    count_supervised,
    fingerprint_of,
    lengths_of,
    read_documents,
)
from draftwing.drafts.fit import load_strictly
from draftwing.drafts.head_loss import HeadLoss
from draftwing.drafts.kinds import new_drafter, objective_named, resolve_method
from draftwing.drafts.objective import Objective
from draftwing.engine.engine import Request
from draftwing.engine.generation import start_generation
from draftwing.engine.sampling import SamplingParams
from draftwing.engine.stopping import StopRule
from draftwing.engine.tree_plan import TreePlan, TreeShape
from draftwing.target.load import load_tokenizer, read_target_config
from draftwing.target.model import TargetModel
from draftwing.training.frozen_target import frozen_target
from draftwing.training.loop import ResumableTrainer, WholeSteps, filled_up, new_trainer, wants_compile
from draftwing.training.processes import (
    is_main_process,
    num_processes,
    process_index,
    sum_over_processes,
    wait_for_others,
)

LEAST_COVERAGE = 0.8
"""Of the supervised tokens by a draft vocabulary; with less, many drafts end at a token that it lacks."""
DECODED_TOKENS = 64
"""New tokens per prompt where an evaluation decodes."""


def train_head(config: TrainConfig) -> dict[str, float]:
    """Train the recipe's head into `config.output`, in its published format; returns the held-out metrics."""
    torch.manual_seed(config.seed)
    plan = decode_plan(config)
    objective = objective_named(config.objective)
    # Mistakes are found before anything large is read.
    objective.check(config, read_target_config(config.target).get_text_config())
    target = frozen_target(config, config.target)
    tokenizer = load_tokenizer(config.target)
    documents = read_documents(config, tokenizer)
    check_readable(documents, target)
    head: Any = objective.make(config, target, documents.train).to(target.device)
    module = objective.training(head, target, config)
    if is_main_process():
        _show_coverage(head, documents.train)
    if wants_compile(config):
        module.compile_parts()
    rows = as_training_rows(documents, config, target, head.config.feature_layers)
    blank = lambda row: dataclasses.replace(row, loss_mask=torch.zeros_like(row.loss_mask))
    held_out = filled_up(rows.held_out, blank, config)
    tokens, collator = fingerprint_of(documents.train), Collator(tokenizer.pad_token_id or 0)
    trainer = new_trainer(config, module, rows.train, held_out, tokens, collator, HeadTrainer)
    assert isinstance(trainer, HeadTrainer)
    trainer.plan = plan
    num_prompts = min(config.decode_prompts, len(documents.held_out))
    trainer.prompts = [prompt_of(documents.held_out[index], config) for index in range(num_prompts)]
    metrics = trainer.run()
    trainer.save(Path(config.output))
    return trainer.finish(metrics)


def _show_coverage(head: Any, train: Sequence[Example]) -> None:
    """Say how much of what the rows say the head can draft at all, in yellow if that is little."""
    if (share := coverage(head, train)) is None:
        return
    text = f"the draft vocabulary of {len(head.vocab):,} tokens covers {share:.1%} of the supervised tokens"
    is_low = share < LEAST_COVERAGE
    text += "; no other one can be accepted: choose a larger draft_vocab_size" if is_low else ""
    Console(stderr=True).print(text, style="yellow" if is_low else "", markup=False, highlight=False, soft_wrap=True)


def coverage(head: Any, train: Sequence[Example]) -> float | None:
    """The share of the supervised tokens that the head's draft vocabulary has; None if it has all of the target's."""
    target_ids = head.vocab.target_ids
    if target_ids is None:
        return None
    counts = count_supervised(train, head.config.vocab_size)
    return float(counts[target_ids.cpu()].sum() / counts.sum().clamp(min=1))


def decode_plan(config: HeadStage) -> TreeShape:
    """The tree plan with which evaluations decode."""
    try:
        return TreePlan.parse(config.decode_plan) if config.decode_plan else TreePlan.chain(config.ttt_steps)
    except ValueError as error:
        raise ValueError(f"decode_plan: {error}") from None


def prompt_of(example: Example, config: Stage) -> list[int]:
    """What a held-out row's first answer answers; of a plain text, or a piece of one, its first tokens."""
    answer = int(example.loss_mask.int().argmax())
    length = answer or max(1, min(config.prompt_length, len(example) // 2))
    prompt: list[int] = example.input_ids[:length].tolist()
    return prompt


class HeadTrainer(ResumableTrainer):
    """Batches rows of like length, logs each step's loss and accuracy, keeps the best head, decodes `prompts`."""

    prompts: Sequence[Sequence[int]] = ()
    plan: TreeShape

    def order(self, generator: torch.Generator) -> list[int]:
        lengths, rows_per_step = lengths_of(self.train_dataset), int(self.settings["rows_per_step"])
        order: list[int] = get_length_grouped_indices(lengths, rows_per_step, generator=generator)
        return order

    def start(self) -> None:
        """Fit what a new head can know before its first step."""
        wanted = self._module.tokens_to_start
        if not wanted or self._module.stage.init_from:
            return
        mine, size = self._first_rows(wanted), self.config.batch_size
        shown = track(
            range(0, len(mine), size), "first weights", console=Console(stderr=True), disable=not is_main_process()
        )
        rows = ([self.train_dataset[index] for index in mine[first : first + size]] for first in shown)
        batches = (self._prepare_inputs(self.data_collator(batch)) for batch in rows)
        self._module.start(batches, sum_over_processes)

    def _first_rows(self, num_tokens: int) -> list[int]:
        """This process's share of a random sample of rows that have so many tokens together, in whole steps."""
        size, lengths = int(self.settings["rows_per_step"]), lengths_of(self.train_dataset)
        rows = list(WholeSteps(super().order, len(lengths), size, self.config.seed))
        totals = list(accumulate(lengths[row] for row in rows))
        num_steps = 1 + bisect_left(totals[size - 1 :: size], num_tokens)
        return rows[process_index() : num_steps * size : num_processes()]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], torch.Tensor]:
        """The batches of one optimizer step, and how many slots they supervise over all processes."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        masks = [{name: batch[name] for name in ("loss_mask", "document_ids") if name in batch} for batch in batches]
        counts = torch.stack([self._module.count_slots(**mask) for mask in masks]).sum(0)
        return batches, sum_over_processes(counts.to(self.args.device))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        prefix = "eval_" if "eval_loss" in logs else ""
        if "loss" in logs or prefix:
            metrics = self._module.pop_metrics(not prefix, sum_over_processes)
            logs |= {prefix + name: round(value, 6) for name, value in metrics.items()}
        self.check_figures(logs)  # a head that is no good cannot decode either
        if prefix and self.prompts:
            logs["eval_tau"] = round(self._decoded_tau(), 4)
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        best = self.state.best_metric
        if best is None or metrics["eval_tau_sim"] > best:
            self.state.best_metric = metrics["eval_tau_sim"]
            self.save(Path(self.config.output) / "best")
        return metrics

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = model(**self._prepare_inputs(inputs))["loss"]
        return loss.detach(), None, None

    def save(self, folder: Path) -> None:
        """Write the head as it is now, in its published format."""
        module = self._module
        tensors = whole_tensors(module.head)  # of all processes, so before the others leave
        if is_main_process():
            self._objective.save(module.head, tensors, folder, module.target, self.config.target)
        wait_for_others()

    @property
    def output_matrices(self) -> list[torch.Tensor]:
        return self._module.output_matrices

    @property
    def _module(self) -> HeadLoss:
        assert isinstance(self.model, HeadLoss)
        return self.model

    @property
    def _objective(self) -> Objective:
        return objective_named(self.config.objective)

    def _decoded_tau(self) -> float:
        """tau over `prompts`, of which each process decodes its share."""
        module = self._module
        mine = self.prompts[process_index() :: num_processes()]
        copy = copy_of(module.head, module.target, self._objective)
        counts = decode(copy, module.target, mine, self.plan)
        num_tokens, num_cycles = sum_over_processes(torch.tensor(counts, dtype=torch.float64)).tolist()
        return float(num_tokens / num_cycles)


def whole_tensors(head: nn.Module) -> dict[str, torch.Tensor]:
    """The head's parameters; those that are sharded are gathered, by all processes together."""
    weights = {name: parameter.detach() for name, parameter in head.named_parameters()}
    return {name: weight.full_tensor() if isinstance(weight, DTensor) else weight for name, weight in weights.items()}


def copy_of(head: nn.Module, target: TargetModel, objective: Objective) -> Any:
    """A whole copy of the head in the target's dtype, to decode with."""
    network: Any = objective.like(head, target).to(device=target.device, dtype=target.dtype)
    load_strictly(network, whole_tensors(head))
    return network.eval()


def decode(head: Any, target: TargetModel, prompts: Sequence[Sequence[int]], plan: TreeShape) -> tuple[int, int]:
    """Decode the prompts greedily, one by one; returns how many tokens came in how many cycles."""
    drafter = new_drafter(resolve_method(None, head), head, target)
    num_tokens = num_cycles = 0
    for prompt in prompts:
        room = DECODED_TOKENS if target.max_positions is None else target.max_positions - len(prompt)
        stop = StopRule(min(DECODED_TOKENS, room), target.eos_token_ids)
        generation = start_generation(target, [Request(prompt, SamplingParams(), stop)], drafter, plan).run()
        num_tokens += generation.statistics.num_tokens
        num_cycles += generation.statistics.num_cycles
    return num_tokens, num_cycles
