"""Outputs of drafted decoding that differ from plain decoding's of the same target, quantised or not.

    python benchmarks/bench_flips.py --quantize int8 --output docs/results/tiny_cpu_flips_int8_float32.json

Of each prompt the first parts are prompts too: with 2 cuts the first half and all of it. Differences come from rounding
alone: a row's products may depend on how many rows pass with it.
"""

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from draftwing.api import load
from draftwing.data.prompts import read_prompts
from draftwing.embedded import EMBEDDED_PROMPTS
from draftwing.provenance import write_record


def main() -> int:
    options = parse_options()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    model = load(options.target, options.draft, options.dtype, options.device, quantize=options.quantize)
    whole = [prompt.token_ids(model.tokenizer) for prompt in read_prompts(options.prompts)]
    cuts = range(1, options.cuts + 1)
    prompts = [ids[: max(1, len(ids) * cut // options.cuts)] for cut in cuts for ids in whole]
    rows = []
    for temperature in options.temperatures:
        num_tokens = num_cycles = num_different = 0
        for seed, prompt in enumerate(track(prompts, f"T = {temperature:g}", console=Console(stderr=True))):
            drafted, plain = (
                one.start(
                    [prompt],
                    temperature=temperature,
                    seed=seed,
                    max_new_tokens=options.max_new_tokens,
                    plan=options.plan if one is model else "off",
                ).run()
                for one in (model, model.with_method("plain"))
            )
            num_tokens += plain.statistics.num_tokens
            num_cycles += drafted.statistics.num_cycles
            num_different += drafted.outputs[0].tokens != plain.outputs[0].tokens
        rows.append(
            {
                "temperature": temperature,
                "prompts": len(prompts),
                "different": num_different,
                "tokens": num_tokens,
                "acceptance_length": num_tokens / num_cycles,
            }
        )
        print(rows[-1])
    if options.output:
        write_record(options.output, rows, vars(options))
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="tiny")
    parser.add_argument("--draft", default="tiny")
    parser.add_argument("--quantize")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plan", default="tree:4x4x16")
    parser.add_argument("--prompts", type=Path, default=EMBEDDED_PROMPTS)
    parser.add_argument("--cuts", type=int, default=2, help="prompts that are made of each (default: 2)")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
