"""What a cycle costs, stage by stage, beside the least it could cost: a target and head of any shape, random weights.

    python benchmarks/bench_cycle.py --shape tiny
    python benchmarks/bench_cycle.py --shape llama-3.1-8b --device cuda --dtype bfloat16 --context 1024 --output r.json
    python benchmarks/bench_cycle.py --shape 240m --save build/240m  # only writes the target, for other engines
    python benchmarks/bench_cycle.py --shape 240m --threads 4 --llama-bench path/to/llama-bench build/240m.gguf

The least is reading every weight that a token needs once, at the bandwidth measured in the same run. Beside it
stand plain decoding by this engine, by transformers' `generate` (its own attention and cache), and by llama.cpp. On a
CUDA device cycles are captured. A random head's drafts are never accepted, so tokens per second are worked out with a
published tau, not measured here.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, PreTrainedModel, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM

from draftwing.drafts.eagle.build_head import build_network
from draftwing.drafts.eagle.drafter import EagleDrafter
from draftwing.drafts.eagle.formats import default_aux_layers
from draftwing.drafts.eagle.fused_layers import pack_head
from draftwing.engine.captured import CudaRecorder
from draftwing.engine.sampling import uncoupled_rank
from draftwing.engine.tree_plan import TreePlan
from draftwing.layers import DraftConfig
from draftwing.plans.costs import CycleCosts, measure_costs
from draftwing.provenance import write_record
from draftwing.target.fused import pack_target
from draftwing.target.interface import ATTENTION
from draftwing.target.load import load_tokenizer
from draftwing.target.model import TargetModel

# Layers, width, MLP width, heads, key/value heads, head width, vocabulary, whether the embedding is the output head.
SHAPES: dict[str, tuple[type[LlamaConfig] | type[Qwen3Config], tuple[int, ...]]] = {
    "tiny": (LlamaConfig, (12, 256, 704, 4, 2, 64, 4096, 1)),
    "240m": (LlamaConfig, (16, 1024, 2816, 16, 16, 64, 32768, 1)),
    "llama-3.2-1b": (LlamaConfig, (16, 2048, 8192, 32, 8, 64, 128256, 1)),
    "llama-3.1-8b": (LlamaConfig, (32, 4096, 14336, 32, 8, 128, 128256, 0)),
    "qwen3-8b": (Qwen3Config, (36, 4096, 12288, 32, 8, 128, 151936, 0)),
}
PUBLISHED_TAU = {("llama-3.1-8b", "tree:10x8x60"): 5.39}
"""EAGLE-3 on MT-bench at temperature 0 as SGLang measured it (sglang issue 4247)."""


def main() -> int:
    options = parse_options()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    model = random_target(options.shape, device, dtype)
    if options.save:
        model.save_pretrained(options.save)
        load_tokenizer("tiny").save_pretrained(options.save)  # converters want one; its 4096 tokens fit every shape
        return 0
    transformers_seconds = stock_seconds(model, options) if not options.no_transformers else None
    llama_cpp = run_llama_bench(model, options) if options.llama_bench else None
    target = TargetModel(model)
    head = random_head(target, options.draft_vocab_size, dtype)
    needed = weight_bytes(target.model)
    bandwidth = memory_bandwidth(device)
    compiles = False if options.no_compile else None
    target = pack_target(target, compiles)
    pack_head(head, compiles)
    recorder = CudaRecorder(device) if device.type == "cuda" and not options.no_capture else None

    def new_drafter(rows: int, capacity: int) -> EagleDrafter:
        return EagleDrafter(head, rows, capacity)

    plans = [TreePlan.parse(plan) for plan in options.plans]
    largest = max(plans, key=lambda plan: (plan.num_nodes, plan.width))
    costs = measure_costs(
        *(target, new_drafter, options.batch_size, largest, options.rounds, (options.context,), recorder),
        sampled=options.sampled,
        most_seconds=math.inf,
    )
    kv_bytes = kv_cache_bytes(target, options)
    result = {
        "weight_bytes": needed,
        "kv_bytes": kv_bytes,
        "bytes_per_second": bandwidth,
        "least_seconds": (needed + kv_bytes) / bandwidth,
        "transformers_seconds": transformers_seconds,
        "llama_cpp": llama_cpp,
        "costs": costs.as_dict(),
        "launches": launches(target, head, options) if not options.no_launches else None,
        "cycles": [
            cycle_row(plan, PUBLISHED_TAU.get((options.shape, text)), text, costs, llama_cpp)
            for plan, text in zip(plans, options.plans, strict=True)
        ],
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }
    print_tables(result, options)
    if options.output:
        write_record(options.output, result, vars(options))
    return 0


def random_target(shape: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the shape whose weights are noise, made on the device."""
    config_class, sizes = SHAPES[shape]
    layers, hidden, intermediate, heads, kv_heads, head_dim, vocab, tied = sizes
    config = config_class(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        tie_word_embeddings=bool(tied),
        max_position_embeddings=131072,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation=ATTENTION,
    )
    model_class = Qwen3ForCausalLM if config_class is Qwen3Config else LlamaForCausalLM
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with device, torch.no_grad():
        model = model_class(config)
    torch.set_default_dtype(default)
    return model.eval()


def random_head(target: TargetModel, draft_vocab_size: int, dtype: torch.dtype) -> Any:
    """An EAGLE-3 head shaped like one layer of the target, of noise."""
    config = target.config
    sizes = DraftConfig(
        hidden_size=target.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab_size=target.vocab_size,
        draft_vocab_size=min(draft_vocab_size, target.vocab_size),
        target_hidden_size=target.hidden_size,
        aux_layers=default_aux_layers(target.num_layers),
    )
    ids = torch.arange(sizes.draft_vocab_size) if sizes.draft_vocab_size < target.vocab_size else None
    return build_network(sizes, target, ids).to(target.device, dtype).eval()


def weight_bytes(model: nn.Module) -> int:
    """Bytes that a decoding step has to read: all weights but the embedding's rows that are not looked up."""
    embedding = model.get_input_embeddings().weight
    is_tied = embedding is model.get_output_embeddings().weight
    read = [weight for weight in model.parameters() if is_tied or weight is not embedding]
    return sum(weight.numel() * weight.element_size() for weight in read)


def kv_cache_bytes(target: TargetModel, options: argparse.Namespace) -> int:
    """Bytes of the keys and values of every row's context."""
    config, size = target.config, torch.empty((), dtype=target.attention_dtype).element_size()
    a_token = 2 * target.num_layers * config.num_key_value_heads * config.head_dim * size
    return int(a_token * options.context * options.batch_size)


def memory_bandwidth(device: torch.device) -> float:
    """Bytes per second, the best of a few: that a sum reads on a GPU, else that a copy reads and writes."""
    source = torch.ones((1 << 30 if device.type == "cuda" else 1 << 28) // 4, device=device)
    goal = torch.empty_like(source)
    seconds = []
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        if device.type == "cuda":
            source.sum()
        else:
            goal.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return (1 if device.type == "cuda" else 2) * source.numel() * 4 / min(seconds)


class _Operations(TorchDispatchMode):
    """Counts what is dispatched."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def launches(target: TargetModel, head: Any, options: argparse.Namespace) -> dict[str, float]:
    """What a pass over one node starts, by its layers, and what a further draft level of 10 nodes does, eagerly."""
    cache, zero = target.new_cache(1, options.context + 1), torch.zeros(1, 1, dtype=torch.int64, device=target.device)
    cache.bound = options.context
    drafter = EagleDrafter(head, 1, options.context + 64)
    drafter.bound = options.context
    a_pass = started(lambda: target.forward_tree(zero, zero, zero[:, None] == 0, cache), target.device)
    short, long = (
        started(partial(drafter.grow, zero[0], TreePlan(10, depth, 12), uncoupled_rank), target.device)
        for depth in (3, 4)
    )
    return {"layer": a_pass / target.num_layers, "level": long - short}


def started(step: Callable[[], object], device: torch.device) -> int:
    """How many kernels and copies a step starts on a CUDA device, or operations elsewhere; it is run before."""
    step()
    step()
    if device.type != "cuda":
        with _Operations() as operations:
            step()
        return operations.count
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize(device)
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def stock_seconds(model: PreTrainedModel, options: argparse.Namespace) -> float:
    """Seconds per token of transformers' own greedy `generate` with its own attention."""
    model.set_attn_implementation("sdpa")
    prompt = torch.randint(model.config.vocab_size, (options.batch_size, options.context), device=model.device)
    seconds = {}
    for num_new in (4, 4, 36):  # the first is the warm-up; the difference leaves the prefill out
        synchronize(model.device)
        start = time.perf_counter()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=num_new,
            min_new_tokens=num_new,
            do_sample=False,
            pad_token_id=0,
        )
        synchronize(model.device)
        seconds[num_new] = time.perf_counter() - start
    model.set_attn_implementation(ATTENTION)
    return (seconds[36] - seconds[4]) / 32


def run_llama_bench(model: PreTrainedModel, options: argparse.Namespace) -> dict[str, Any]:
    """What llama-bench reports of decoding one token at a time after the context, and seconds per token (the median).

    It chooses no tokens, and its caches are float16.

    Raises:
        ValueError: the GGUF file has another number of weights.
    """
    program, weights = options.llama_bench
    sizes = {"-p": 0, "-n": 64, "-d": options.context, "-t": torch.get_num_threads(), "-r": 5}
    command = [program, "-m", weights, "-o", "json", *(str(part) for pair in sizes.items() for part in pair)]
    (report,) = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    if report["model_n_params"] != model.num_parameters():
        raise ValueError(f"llama-bench: {weights} has {report['model_n_params']} weights, not {model.num_parameters()}")
    return {"seconds": statistics.median(report["samples_ns"]) / report["n_gen"] / 1e9, **report}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cycle_row(
    plan: TreePlan, tau: float | None, text: str, costs: CycleCosts, llama_cpp: dict[str, Any] | None
) -> dict[str, Any]:
    """A plan's cycle from its parts."""
    seconds = costs.at(costs.contexts[0]).cycle(plan)
    return {
        "plan": text,
        "seconds": seconds,
        "draft_seconds": costs.extend[0] + costs.levels(plan),
        "over_plain": seconds / costs.plain[0],
        "over_llama_cpp": seconds / llama_cpp["seconds"] if llama_cpp else None,
        "published_tau": tau,
        "tokens_per_second": tau / seconds if tau else None,
    }


def print_tables(result: dict[str, Any], options: argparse.Namespace) -> None:
    costs, least = result["costs"], result["least_seconds"]
    title = f"{options.shape}, {options.dtype}, batch {options.batch_size}, context {options.context}, {options.device}"
    table = Table(title=title)
    for column in ("part", "ms", "over the least"):
        table.add_column(column, justify="left" if column == "part" else "right")
    bandwidth = result["bytes_per_second"] / 1e9
    parts = [(f"least: {1e-9 * result['weight_bytes']:.2f} GB of weights at {bandwidth:.0f} GB/s", least)]
    if result["transformers_seconds"] is not None:
        parts.append(("transformers' generate, a token", result["transformers_seconds"]))
    if rival := result["llama_cpp"]:
        parts.append((f"llama.cpp, {rival['model_type']}, a token", rival["seconds"]))
    parts.append(("plain decoding, a token", costs["plain"][0]))
    parts += [(f"target's pass, {n} nodes", s) for n, s in zip(costs["num_nodes"], costs["verify"][0], strict=True)]
    parts.append(("draft: reading the committed tokens, and the first level", costs["extend"][0]))
    parts += [(f"draft: a level of {w}", s) for w, s in zip(costs["widths"], costs["draft_step"][0], strict=True)]
    parts.append(("commit and host", costs["fixed"][0]))
    for name, seconds in parts:
        table.add_row(name, f"{1000 * seconds:.3f}", f"{seconds / least:.2f}")
    if started := result["launches"]:
        unit = "kernels" if options.device.startswith("cuda") else "operations"
        table.caption = (
            f"{unit}: {started['layer']:.1f} a layer of the target's pass, {started['level']:.0f} a draft level"
        )
    cycles = Table(title="A cycle; its time over a token's is the tau that breaks even")
    for column in ("plan", "ms", "draft's share", "over plain", "over llama.cpp", "tokens/s at tau"):
        cycles.add_column(column, justify="left" if column == "plan" else "right")
    for row in result["cycles"]:
        speed = f"{row['tokens_per_second']:.0f} at {row['published_tau']}" if row["published_tau"] else ""
        share = f"{100 * row['draft_seconds'] / row['seconds']:.0f} %"
        over_rival = f"{row['over_llama_cpp']:.2f}" if row["over_llama_cpp"] else ""
        cycles.add_row(
            row["plan"], f"{1000 * row['seconds']:.3f}", share, f"{row['over_plain']:.2f}", over_rival, speed
        )
    console = Console(width=118)
    console.print(table)
    console.print(cycles)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--context", type=int, default=128, help="committed tokens a row (default: 128)")
    parser.add_argument("--draft-vocab-size", type=int, default=32000)
    parser.add_argument("--plans", nargs="+", default=["chain:3", "tree:4x5x26", "tree:10x8x60"])
    parser.add_argument("--rounds", type=int, default=20, help="of one cycle of each kind; medians count (default: 20)")
    parser.add_argument("--sampled", action="store_true", help="at temperature 1 instead of greedily")
    parser.add_argument("--no-capture", action="store_true", help="run cycles eagerly on a CUDA device")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out of the target's pass")
    parser.add_argument("--no-launches", action="store_true", help="do not count kernels, or operations on a CPU")
    parser.add_argument("--no-transformers", action="store_true", help="leave transformers' generate out")
    parser.add_argument(
        "--llama-bench", nargs=2, metavar=("PROGRAM", "GGUF"), help="time llama.cpp too, on a target that --save wrote"
    )
    parser.add_argument("--save", metavar="FOLDER", help="write the target, with a tokenizer, and stop")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--output", help="write the figures with their provenance to this JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
