"""Peak memory and tokens per second of an EAGLE-3 training step: fused, and with logits and scores that exist.

    python benchmarks/bench_train_step.py                                        # a small shape, on a CPU
    python benchmarks/bench_train_step.py --shape llama-3.1-8b --device cuda --dtype bfloat16
    python benchmarks/bench_train_step.py --steps 0 --output memory.json         # memory only, of the first step

Weights and tokens are random. The target's forward pass is part of a step, the optimizer is not. Each variant runs in
a process of its own, `fused` being what `draftwing train` does, `logits` the same with the logits of all steps in
memory, `scores` with the attention scores of all steps too. Memory is that of a step above what was held before it:
CUDA's peak of allocated bytes, on a CPU the growth of the process' peak resident set.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from draftwing.config import TrainConfig
from draftwing.drafts.eagle import objective
from draftwing.drafts.eagle.network import Eagle3Model
from draftwing.drafts.eagle.objective import Eagle3Training
from draftwing.layers import DraftConfig, DraftVocab
from draftwing.losses.ttt import additive_mask
from draftwing.provenance import write_record
from draftwing.target.interface import ATTENTION
from draftwing.target.model import TargetModel

NUM_DOCUMENTS = 4


@dataclass(frozen=True)
class Shape:
    """Sizes of a target; its head has those of one layer. `sequence_length` is the default of a row."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    vocab_size: int
    draft_vocab_size: int
    sequence_length: int


SHAPES = {
    "small": Shape(256, 704, 4, 8, 2, 32000, 8000, 1024),
    "llama-3.1-8b": Shape(4096, 14336, 32, 32, 8, 128256, 32000, 2048),
}


class WithLogits(Eagle3Training):
    """The same loss by plain autograd over materialised logits."""

    def _loss(
        self, outputs: torch.Tensor, last_hidden: torch.Tensor, valid: torch.Tensor, step_weights: torch.Tensor
    ) -> torch.Tensor:
        head, ids = self.head, self.head.vocab.target_ids
        assert isinstance(head, Eagle3Model)
        assert ids is not None
        with torch.no_grad():
            logits = self.target.logits(last_hidden)
            best = logits.argmax(-1)
            teacher = logits[:, ids].float().softmax(-1)
        log_probs = head.lm_head(outputs).float().log_softmax(-1)
        losses = -(teacher[:, None] * log_probs).sum(-1) * (valid & (self._draft_ids[best] >= 0)[:, None])
        return (losses * step_weights).sum()


class WithScores:
    """The same attention by plain autograd over materialised scores."""

    def __init__(self, document_ids: torch.Tensor) -> None:
        self._mask = additive_mask(document_ids, torch.float32)
        self._past: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        groups, length = queries.shape[1] // keys.shape[1], queries.shape[2]
        self._past.append((keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)))
        (first_keys, first_values), *own = self._past
        scores = [queries @ first_keys.transpose(2, 3) + self._mask]
        scores += [(queries * step_keys).sum(-1, keepdim=True) for step_keys, _ in own]
        weights = (torch.cat(scores, dim=-1) / queries.shape[-1] ** 0.5).float().softmax(-1).to(values.dtype)
        output = weights[..., :length] @ first_values
        for index, (_, step_values) in enumerate(own, start=length):
            output = output + weights[..., index : index + 1] * step_values
        return output.transpose(1, 2)


VARIANTS: dict[str, tuple[type[Eagle3Training], Any]] = {
    "fused": (Eagle3Training, objective.TttAttention),
    "logits": (WithLogits, objective.TttAttention),
    "scores": (WithLogits, WithScores),
}


def main() -> int:
    options = parse_options()
    if options.variant:
        print(json.dumps(measure(options)))
        return 0
    rows = []
    for variant in VARIANTS:
        command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
        rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    print_rows(rows)
    if options.output:
        write_record(options.output, rows, vars(options))
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One variant's figures: the first step's memory, then the speed of `steps` more."""
    torch.set_num_threads(options.threads or torch.get_num_threads())
    torch.manual_seed(0)
    shape = SHAPES[options.shape]
    length = options.sequence_length or shape.sequence_length
    module, batch = new_training(shape, options), new_batch(shape, options.batch_size, length, options.device)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:  # an accumulated gradient is no part of a step's own memory
        parameter.grad = torch.zeros_like(parameter)
    held = peak_bytes(options.device)
    loss = run_step(module, batch, options)
    row: dict[str, Any] = {
        "variant": options.variant,
        "loss": loss,
        "step_bytes": peak_bytes(options.device) - held,
        "peak_bytes": peak_bytes(options.device),
    }
    if options.steps:
        start = time.perf_counter()
        for _ in range(options.steps):
            run_step(module, batch, options)
        row["tokens_per_second"] = options.steps * batch["input_ids"].numel() / (time.perf_counter() - start)
    return row


def run_step(module: Eagle3Training, batch: dict[str, torch.Tensor], options: argparse.Namespace) -> float:
    with torch.autocast(options.device, torch.bfloat16, enabled=options.dtype == "bfloat16"):
        loss = module(**batch)["loss"]
    loss.backward()
    return float(loss.detach())  # waits for the device


def peak_bytes(device: str) -> int:
    """The most memory held so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def new_training(shape: Shape, options: argparse.Namespace) -> Eagle3Training:
    training_class, objective.TttAttention = VARIANTS[options.variant]  # type: ignore[misc]
    target_config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads,
        vocab_size=shape.vocab_size,
        max_position_embeddings=4096,
        attn_implementation=ATTENTION,
    )
    with torch.device(options.device):
        torch.set_default_dtype(getattr(torch, options.dtype))
        target = TargetModel(LlamaForCausalLM(target_config).eval())
        torch.set_default_dtype(torch.float32)
        head_config = DraftConfig(
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_key_value_heads,
            head_dim=shape.hidden_size // shape.num_heads,
            vocab_size=shape.vocab_size,
            draft_vocab_size=shape.draft_vocab_size,
            target_hidden_size=shape.hidden_size,
            max_position_embeddings=4096,
            aux_layers=(1, shape.num_layers // 2, shape.num_layers - 1),
        )
        vocab = DraftVocab(torch.arange(shape.draft_vocab_size), shape.vocab_size)
        head = Eagle3Model(head_config, vocab, target.embedding, target.output_head)
    config = TrainConfig(objective="eagle3", output="", target="unused", ttt_steps=options.ttt_steps)
    return training_class(head, target, config)


def new_batch(shape: Shape, batch_size: int, length: int, device: str) -> dict[str, torch.Tensor]:
    """Packed rows of random tokens, all supervised, a few documents each."""
    input_ids = torch.randint(0, shape.vocab_size, (batch_size, length), device=device)
    document_ids = (torch.arange(length, device=device) * NUM_DOCUMENTS // length).expand(batch_size, length)
    return {
        "input_ids": input_ids,
        "loss_mask": torch.ones_like(input_ids, dtype=torch.bool),
        "document_ids": document_ids.contiguous(),
    }


def print_rows(rows: list[dict[str, Any]]) -> None:
    table = Table(title="A training step")
    for name in ("variant", "loss", "MiB of the step", "peak MiB", "tokens/s"):
        table.add_column(name, justify="right")
    for row in rows:
        mebibytes = (f"{row[name] / 2**20:,.0f}" for name in ("step_bytes", "peak_bytes"))
        speed = f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else ""
        table.add_row(row["variant"], f"{row['loss']:.4f}", *mebibytes, speed)
    Console().print(table)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--sequence-length", type=int, help="tokens of a row (default: the shape's)")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--ttt-steps", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="timed steps after the first (default: 5; 0: memory only)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 is autocast")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--variant", choices=VARIANTS, help="run this one, in this process, and print its figures")
    parser.add_argument("--output", help="write the figures with their provenance to this JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
