"""What a recipe would take, from configurations alone: parameters, memory, disk, time. Nothing is loaded or run.

Parameters are exact (the networks are built on the meta device). Memory is the sum of what a step keeps, as the
comments below say; allocators and libraries add some. Time is products / rate: the rate is measured or given, what
share of it a run reaches is assumed.
"""

import dataclasses
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from draftwing.config import LanguageModelStage, SelfGeneratedStage, Stage, TrainConfig
from draftwing.drafts.kinds import objective_named
from draftwing.drafts.objective import HeadSizes
from draftwing.losses.fused_head import CHUNK_ELEMENTS, LEAST_ROWS
from draftwing.target.load import read_target_config

REACHED = 0.4
"""The assumed share of the rate of large products that a training step reaches."""
LOGIT_TENSORS = 5
"""Tensors of a chunk's logits that live at a time where their loss is taken."""
Shapes = dict[str, int]
"""Number of elements by parameter name."""


@dataclass(frozen=True)
class StageEstimate:
    """What one stage would take. Sizes in bytes and for one process, but `disk`; times in seconds, None if unknown."""

    objective: str
    output: str
    target_params: int
    target_active_params: int
    rows_per_step: int
    most_tokens: int
    memory: Mapping[str, int]
    disk: Mapping[str, int]
    trained_params: int = 0
    frozen_params: int = 0
    flops_per_step: float = 0.0
    seconds: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return dataclasses.asdict(self) | {"memory_total": sum(self.memory.values())}


def estimate_stages(stages: Sequence[TrainConfig], num_processes: int, flops_per_second: float) -> list[StageEstimate]:
    """Plan each stage; a target or head that an earlier stage makes need not exist yet.

    Raises:
        ValueError: a target's configuration cannot be read.
    """
    targets: dict[str, Any] = {}

    def read(name: str) -> Any:
        return targets[name] if name in targets else read_target_config(name)

    heads: dict[str, HeadSizes] = {}
    plans = []
    for stage in stages:
        if stage.objective == "language_model":
            teacher = read(stage.teacher) if stage.teacher else None
            vocab_size = stage.vocab_size if teacher is None else teacher.get_text_config().vocab_size
            targets[stage.output] = LlamaConfig(vocab_size=vocab_size, **stage.architecture)
            plans.append(_estimate_target(stage, targets[stage.output], teacher, num_processes, flops_per_second))
            continue
        full_config = read(stage.target)
        target, text_config = count_params(full_config), full_config.get_text_config()
        if stage.objective == "self_generated":
            plans.append(_estimate_rows(stage, target, text_config))
            continue
        heads[stage.output] = head = objective_named(stage.objective).sizes(stage, text_config, heads)
        plans.append(_estimate_head(stage, (target, text_config), head, num_processes, flops_per_second))
    return plans


def count_params(config: Any) -> Shapes:
    """Every parameter of a causal language model with this configuration."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


def active_params(params: Shapes, config: Any) -> int:
    """How many numbers multiply for one token: all but the embedding, and of the experts those that are chosen."""
    num_experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    share = config.num_experts_per_tok / num_experts if num_experts else 1.0
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    active = sum(size * (share if ".experts." in name else 1.0) for name, size in params.items())
    return int(active) - embedding


def measure_rate() -> float:
    """Floating-point operations per second of large products here: bf16 on a GPU, float32 on a CPU; takes a second."""
    is_cuda = torch.cuda.is_available()
    size, dtype = (8192, torch.bfloat16) if is_cuda else (1024, torch.float32)
    matrix = torch.ones(size, size, dtype=dtype, device="cuda" if is_cuda else "cpu")
    matrix @ matrix
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.5:
        matrix @ matrix
        if is_cuda:
            torch.cuda.synchronize()
        count += 1
    return count * 2 * size**3 / (time.perf_counter() - start)


def _estimate_target(
    stage: LanguageModelStage, config: Any, teacher: Any, num_processes: int, rate: float
) -> StageEstimate:
    """A language model's stage; its `teacher`, if it has one, is the target."""
    params = count_params(config)
    total, active, tokens = sum(params.values()), active_params(params, config), _tokens(stage)
    width = config.num_hidden_layers * (10 * config.hidden_size + 4 * config.intermediate_size)
    memory = {
        "weights, gradients and optimizer": total * (16 + _autocast_bytes(stage) + (4 if num_processes > 1 else 0)),
        "activations": tokens * width * _bytes(stage),
        "logits": 3 * tokens * config.vocab_size * 4,  # as float32, their softmax and its gradient
    }
    flops = 6.0 * active
    target, target_active = params, active
    if teacher is not None:
        text_config = teacher.get_text_config()
        target = count_params(teacher)
        target_active = active_params(target, text_config)
        memory |= _frozen_target_memory(stage, target, text_config, num_processes)
        memory["logits"] *= 2
        flops += _forward_flops(stage, target_active, text_config)
    flops *= tokens * stage.accumulation_steps
    disk = {"checkpoints": 12 * total * (stage.keep_checkpoints + 1), "result": 2 * total}
    return StageEstimate(
        **_common(stage, target, target_active, num_processes),
        trained_params=total,
        memory=memory,
        disk=disk,
        flops_per_step=flops,
        seconds=stage.max_steps * flops / rate,
    )


def _estimate_rows(stage: SelfGeneratedStage, params: Shapes, config: Any) -> StageEstimate:
    """A stage in which the target answers rows: it decodes, and nothing is trained."""
    cached = 2 * config.num_hidden_layers * _key_size(config)
    memory = {
        "target": sum(params.values()) * _bytes(stage),
        "keys and values": _tokens(stage) * cached * _bytes(stage),
    }
    disk = {"rows, if max_rows is set": (stage.max_rows or 0) * stage.sequence_length * 10}  # digits, mask, commas
    common = _common(stage, params, active_params(params, config), num_processes=1)
    common |= {"rows_per_step": stage.batch_size, "most_tokens": (stage.max_rows or 0) * stage.sequence_length}
    return StageEstimate(**common, memory=memory, disk=disk)


def _estimate_head(
    stage: TrainConfig, of_target: tuple[Shapes, Any], sizes: HeadSizes, num_processes: int, rate: float
) -> StageEstimate:
    params, target = of_target
    costs = objective_named(stage.objective).costs(stage, target, sizes)
    trained, active, tokens = sizes.num_elements - costs.frozen, active_params(params, target), _tokens(stage)
    size, most_logits = _bytes(stage), max(CHUNK_ELEMENTS["cuda"], LEAST_ROWS * sizes.config.draft_vocab_size)
    logits = LOGIT_TENSORS * min(most_logits, tokens * costs.logits)
    memory = _frozen_target_memory(stage, params, target, num_processes, sizes.config.feature_layers)
    memory |= _trained_memory(stage, trained, costs.frozen, num_processes)
    memory |= {
        "activations": tokens * (costs.kept * size + costs.kept_wide * 4),
        # A chunk, and the output head's gradient; the target's rows of the draft vocabulary.
        "logits": 4 * (logits + costs.output_gradient) + size * costs.teacher_rows,
    }
    flops = (_forward_flops(stage, active, target) + costs.flops) * tokens * stage.accumulation_steps
    return StageEstimate(
        **_common(stage, params, active, num_processes),
        trained_params=trained,
        frozen_params=costs.frozen,
        memory=memory,
        disk=_head_disk(stage, trained, costs.frozen),
        flops_per_step=flops,
        seconds=stage.max_steps * flops / rate,
    )


def _frozen_target_memory(
    stage: Stage, params: Shapes, target: Any, num_processes: int, feature_layers: Sequence[int] = ()
) -> dict[str, int]:
    """Bytes of a frozen target and of its pass.

    `feature_layers` are those that a head reads; a teacher has none, of which the logits are read.
    """
    widest = 3 * (getattr(target, "intermediate_size", None) or 4 * target.hidden_size) + 6 * target.hidden_size
    # The states that are read, and the last, are put together, as float32 too.
    states = (2 * len(feature_layers) + 1) * target.hidden_size if feature_layers else 0
    wide = len(feature_layers) * target.hidden_size * 4
    whole, size = sum(params.values()), _bytes(stage)
    if stage.shard_target:
        layers = _layer_sizes(params)
        # Of the layers a share, and two that are gathered.
        whole += sum(layers) // num_processes + 2 * max(layers) - sum(layers)
    return {"target": whole * size, "target's pass": _tokens(stage) * ((widest + states) * size + wide)}


def _layer_sizes(params: Shapes) -> list[int]:
    """The parameters of each decoder layer."""
    layers: dict[str, int] = {}
    for name, num_elements in params.items():
        if match := re.match(r".*?\.\d+\.", name):
            layers[match[0]] = layers.get(match[0], 0) + num_elements
    return list(layers.values())


def _trained_memory(stage: Stage, trained: int, frozen: int, num_processes: int) -> dict[str, int]:
    """Bytes of a head with so many `trained` and `frozen` numbers, and of what the optimizer keeps of it."""
    is_sharded = stage.parallel == "fsdp2"
    shards = num_processes if is_sharded else 1
    whole = trained if shards > 1 else 0  # gathered for a pass
    buckets = trained if num_processes > 1 and not is_sharded else 0  # in which DDP sums gradients
    return {
        "head: weights": 4 * (trained // shards + whole + frozen) + _autocast_bytes(stage) * trained,
        "head: gradients": 4 * (trained // shards + whole + buckets),
        "head: optimizer": 8 * trained // shards,
    }


def _autocast_bytes(stage: Stage) -> int:
    """Bytes of the copy of a trained number that autocast multiplies with."""
    return 2 if stage.bf16 else 0


def _forward_flops(stage: Stage, active: int, target: Any) -> float:
    """Operations of the target's pass, for one token."""
    queries = int(target.num_attention_heads) * _head_dim(target)
    return 2.0 * active + 2.0 * stage.sequence_length * queries * int(target.num_hidden_layers)


def _head_disk(stage: Stage, trained: int, frozen: int) -> dict[str, int]:
    return {
        "checkpoints": (4 * (trained + frozen) + 8 * trained) * (stage.keep_checkpoints + 1),
        "heads (last and best)": 2 * 2 * (trained + frozen),
    }


def _common(stage: Stage, params: Shapes, active: int, num_processes: int) -> dict[str, Any]:
    rows = stage.batch_size * stage.accumulation_steps * num_processes
    return {
        "objective": stage.objective,
        "output": stage.output,
        "target_params": sum(params.values()),
        "target_active_params": active,
        "rows_per_step": rows,
        "most_tokens": rows * stage.sequence_length * stage.max_steps,
    }


def _tokens(stage: Stage) -> int:
    """Slots of one process's forward pass, if all rows are full."""
    return stage.batch_size * stage.sequence_length


def _bytes(stage: Stage) -> int:
    """Bytes of a number in products."""
    return 2 if stage.bf16 else 4


def _key_size(config: Any) -> int:
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(num_heads) * _head_dim(config)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
