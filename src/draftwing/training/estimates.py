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
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from draftwing.config import TrainConfig
from draftwing.drafts.eagle.formats import read_head
from draftwing.drafts.eagle.load import counted_layers, expected_shapes, network_shapes
from draftwing.drafts.load import read_draft_files, resolve_draft
from draftwing.drafts.medusa.files import expected_medusa_shapes
from draftwing.drafts.medusa.network import MedusaConfig
from draftwing.layers import DraftConfig
from draftwing.target.load import resolve_target
from draftwing.training.heads import new_config

REACHED = 0.4
"""The assumed share of the rate of large products that a training step reaches."""
LOGIT_CHUNK = 5 * 2**25
"""Numbers that live at a time where a head's logits and their loss are taken, chunk by chunk."""
Shapes = dict[str, int]
"""Number of elements by parameter name."""


@dataclass(frozen=True)
class StagePlan:
    """What one stage would take. Sizes in bytes and for one process, but `disk`; times in seconds, None if unknown."""

    objective: str
    output: str
    target_params: int
    target_active_params: int
    trained_params: int
    frozen_params: int
    rows_per_step: int
    most_tokens: int
    memory: Mapping[str, int]
    disk: Mapping[str, int]
    flops_per_step: float
    seconds: float | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return dataclasses.asdict(self) | {"memory_total": sum(self.memory.values())}


def plan_stages(stages: Sequence[TrainConfig], num_processes: int, flops_per_second: float) -> list[StagePlan]:
    """Plan each stage; a target or head that an earlier stage makes need not exist yet.

    Raises:
        ValueError: a target's configuration cannot be read.
    """
    targets: dict[str, Any] = {}

    def read(name: str) -> Any:
        return targets[name] if name in targets else read_target_config(name)

    heads: dict[str, tuple[Shapes, DraftConfig]] = {}
    plans = []
    for stage in stages:
        if stage.objective == "language_model":
            teacher = read(stage.teacher) if stage.teacher else None
            vocab_size = stage.vocab_size if teacher is None else teacher.get_text_config().vocab_size
            targets[stage.output] = LlamaConfig(vocab_size=vocab_size, **stage.architecture)
            plans.append(_plan_target(stage, targets[stage.output], teacher, num_processes, flops_per_second))
            continue
        full_config = read(stage.target)
        target, text_config = count_params(full_config), full_config.get_text_config()
        if stage.objective == "self_generated":
            plans.append(_plan_rows(stage, target, text_config, num_processes))
            continue
        if stage.objective == "medusa":
            plans.append(_plan_medusa(stage, (target, text_config), num_processes, flops_per_second))
            continue
        heads[stage.output] = head = _describe_head(stage, text_config, heads)
        plans.append(_plan_head(stage, (target, text_config), head, num_processes, flops_per_second))
    return plans


def read_target_config(name: str) -> Any:
    """A target's configuration, from a folder (of which only config.json is read), the hub or its cache."""
    try:
        return AutoConfig.from_pretrained(resolve_target(name))
    except (OSError, ValueError) as error:
        raise ValueError(f"target: cannot read the configuration of {name!r}: {str(error).splitlines()[0]}") from error


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


def _describe_head(
    stage: TrainConfig, target: Any, made_before: Mapping[str, tuple[Shapes, DraftConfig]]
) -> tuple[Shapes, DraftConfig]:
    """The head that a stage trains; that of `init_from` keeps its own shape, but for what the recipe names."""
    if stage.init_from:
        shapes, config = made_before.get(stage.init_from) or _read_head(stage.init_from)
        if stage.objective == "eagle3":
            config = dataclasses.replace(config, aux_layers=stage.aux_layers or config.aux_layers)
            if stage.draft_vocab_size:
                size = min(stage.draft_vocab_size, config.vocab_size)
                config = dataclasses.replace(config, draft_vocab_size=size)
                shapes = shapes | {"lm_head.weight": size * config.hidden_size}
        return shapes, config
    config = new_config(stage, target, target.vocab_size)
    return {name: shape.numel() for name, shape in network_shapes(config).items()}, config


def _read_head(name: str) -> tuple[Shapes, DraftConfig]:
    head = read_head(*read_draft_files(resolve_draft(name)))
    config = counted_layers(head)
    return {name: shape.numel() for name, shape in expected_shapes(head).items()}, config


def _plan_target(stage: TrainConfig, config: Any, teacher: Any, num_processes: int, rate: float) -> StagePlan:
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
    return StagePlan(
        **_common(stage, target, target_active, num_processes),
        trained_params=total,
        frozen_params=0,
        memory=memory,
        disk=disk,
        flops_per_step=flops,
        seconds=stage.max_steps * flops / rate,
    )


def _plan_rows(stage: TrainConfig, params: Shapes, config: Any, num_processes: int) -> StagePlan:
    """A stage in which the target answers rows: it decodes, and nothing is trained."""
    cached = 2 * config.num_hidden_layers * _key_size(config)
    memory = {
        "target": sum(params.values()) * _bytes(stage),
        "keys and values": _tokens(stage) * cached * _bytes(stage),
    }
    disk = {"rows, if max_rows is set": (stage.max_rows or 0) * stage.sequence_length * 10}  # digits, mask, commas
    common = _common(stage, params, active_params(params, config), num_processes)
    common |= {"rows_per_step": stage.batch_size, "most_tokens": (stage.max_rows or 0) * stage.sequence_length}
    return StagePlan(
        **common, trained_params=0, frozen_params=0, memory=memory, disk=disk, flops_per_step=0.0, seconds=None
    )


def _plan_head(
    stage: TrainConfig,
    of_target: tuple[Shapes, Any],
    of_head: tuple[Shapes, DraftConfig],
    num_processes: int,
    rate: float,
) -> StagePlan:
    (params, target), (head, config) = of_target, of_head
    frozen = 0 if stage.train_embedding else head.get("embed_tokens.weight", 0)
    trained, active, tokens = sum(head.values()) - frozen, active_params(params, target), _tokens(stage)
    steps = stage.ttt_steps if config.aux_layers else stage.feature_steps
    size = _bytes(stage)
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    # What a step of the head keeps for its backward pass, uncompiled: what attention and the MLP read, queries, keys,
    # values, attention's output before and behind the merger, four widths of the MLP; as float32 what the norms read,
    # the residuals, what the output head reads and its gradient.
    kept = 3 * config.hidden_size + 3 * queries + 2 * keys + 4 * config.intermediate_size
    kept_wide = 7 * config.hidden_size
    teacher_rows = config.draft_vocab_size * target.hidden_size if config.draft_vocab_size < config.vocab_size else 0
    logits = min(LOGIT_CHUNK, 5 * tokens * steps * config.draft_vocab_size)
    memory = _frozen_target_memory(stage, params, target, num_processes, config.feature_layers)
    memory |= _trained_memory(stage, trained, frozen, num_processes)
    memory |= {
        "activations": tokens * steps * (kept * size + kept_wide * 4),
        # A chunk, and the output head's gradient; the target's rows of the draft vocabulary.
        "logits": 4 * (logits + head.get("lm_head.weight", 0)) + size * teacher_rows,
    }
    once, read = (
        head.get("fc.weight", 0),
        head.get("embed_tokens.weight", 0) - frozen,
    )  # a trained embedding: no product
    backward = 6.0 * (once + steps * (trained - once - read)) + 6.0 * stage.sequence_length * queries
    flops = (_forward_flops(stage, active, target) + backward) * tokens * stage.accumulation_steps
    return StagePlan(
        **_common(stage, params, active, num_processes),
        trained_params=trained,
        frozen_params=frozen,
        memory=memory,
        disk=_head_disk(stage, trained, frozen),
        flops_per_step=flops,
        seconds=stage.max_steps * flops / rate,
    )


def _plan_medusa(stage: TrainConfig, of_target: tuple[Shapes, Any], num_processes: int, rate: float) -> StagePlan:
    (params, target), tokens = of_target, _tokens(stage)
    shapes = expected_medusa_shapes(MedusaConfig(target.hidden_size, target.vocab_size, stage.medusa_heads))
    trained = sum(shape.numel() for shape in shapes.values())
    active = active_params(params, target)
    logits = min(LOGIT_CHUNK, 5 * tokens * target.vocab_size)
    memory = _frozen_target_memory(stage, params, target, num_processes, (-1,))
    memory |= _trained_memory(stage, trained, 0, num_processes)
    memory |= {
        "activations": tokens * stage.medusa_heads * 4 * target.hidden_size * _bytes(stage),
        "logits": 4 * (logits + target.vocab_size * target.hidden_size),
    }
    flops = (_forward_flops(stage, active, target) + 6.0 * trained) * tokens * stage.accumulation_steps
    return StagePlan(
        **_common(stage, params, active, num_processes),
        trained_params=trained,
        frozen_params=0,
        memory=memory,
        disk=_head_disk(stage, trained, 0),
        flops_per_step=flops,
        seconds=stage.max_steps * flops / rate,
    )


def _frozen_target_memory(
    stage: TrainConfig, params: Shapes, target: Any, num_processes: int, feature_layers: Sequence[int] = ()
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


def _trained_memory(stage: TrainConfig, trained: int, frozen: int, num_processes: int) -> dict[str, int]:
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


def _autocast_bytes(stage: TrainConfig) -> int:
    """Bytes of the copy of a trained number that autocast multiplies with."""
    return 2 if stage.bf16 else 0


def _forward_flops(stage: TrainConfig, active: int, target: Any) -> float:
    """Operations of the target's pass, for one token."""
    queries = int(target.num_attention_heads) * _head_dim(target)
    return 2.0 * active + 2.0 * stage.sequence_length * queries * int(target.num_hidden_layers)


def _head_disk(stage: TrainConfig, trained: int, frozen: int) -> dict[str, int]:
    return {
        "checkpoints": (4 * (trained + frozen) + 8 * trained) * (stage.keep_checkpoints + 1),
        "heads (last and best)": 2 * 2 * (trained + frozen),
    }


def _common(stage: TrainConfig, params: Shapes, active: int, num_processes: int) -> dict[str, Any]:
    rows = stage.batch_size * stage.accumulation_steps * num_processes
    return {
        "objective": stage.objective,
        "output": stage.output,
        "target_params": sum(params.values()),
        "target_active_params": active,
        "rows_per_step": rows,
        "most_tokens": rows * stage.sequence_length * stage.max_steps,
    }


def _tokens(stage: TrainConfig) -> int:
    """Slots of one process's forward pass, if all rows are full."""
    return stage.batch_size * stage.sequence_length


def _bytes(stage: TrainConfig) -> int:
    """Bytes of a number in products."""
    return 2 if stage.bf16 else 4


def _key_size(config: Any) -> int:
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(num_heads) * _head_dim(config)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
