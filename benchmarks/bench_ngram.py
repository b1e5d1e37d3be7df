"""What n-grams add: plain, n-gram, EAGLE-3 and both merged, where the answer copies its prompt and elsewhere.

    python benchmarks/bench_ngram.py --measure speed --output speed.json
    python benchmarks/bench_ngram.py --measure position --positions 4096 --bucket 512 --output position.json

Two sets of prompts. `open-ended`: the embedded ones, continued freely. `edit`: each shows a function and asks for it
with one name changed. The embedded target cannot copy, so the answers of `edit` are prescribed (see FusedReplay): its
rows are those of a target that edits without a mistake. `position` follows tau along long open-ended outputs; for more
`--positions` than the target has, its rotary positions are stretched (YaRN, arXiv 2309.00071), which the embedded one
bears without training.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from bench_generate import as_row, print_table

from draftwing.api import SpeculativeModel, load
from draftwing.data.prompts import Prompt, read_prompts
from draftwing.embedded import EMBEDDED_PROMPTS
from draftwing.engine.generation import Generation
from draftwing.evaluation.compare import Start
from draftwing.evaluation.side_by_side import measure
from draftwing.provenance import write_record
from draftwing.target.fused import FusedTarget
from draftwing.target.kv_cache import KVCache
from draftwing.target.model import TargetModel, TargetOutput

SOURCE_TOKENS = 160
PRESCRIBED = 1e6
ALL = 10**6
"""Tokens that a draft window has at least if it hides none."""
TRAINED_POSITIONS = 512
"""Of the embedded target: its recipe's `sequence_length`."""


class FusedReplay(FusedTarget):
    """A target that says a prescribed `text` whatever it reads; its passes, their cost and features are true."""

    def __init__(self, target: TargetModel, text: Sequence[int]) -> None:
        super().__init__(target.model)
        self._text = torch.tensor(text, device=target.device)

    def forward_tree(
        self, tokens: torch.Tensor, depths: torch.Tensor, ancestors: torch.Tensor, cache: KVCache, *args: Any, **kw: Any
    ) -> TargetOutput:
        output = super().forward_tree(tokens, depths, ancestors, cache, *args, **kw)
        if output.logits.shape[1] == tokens.shape[1]:  # a prompt's pass has no logits to choose from
            following = (cache.lengths[:, None] + depths + 1).clamp(max=len(self._text) - 1)
            output.logits.scatter_(2, self._text[following][..., None], PRESCRIBED)
        return output


def main() -> int:
    options = parse_options()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    longer = {} if options.positions is None else stretched_to(options.positions)
    model = load(options.target, draft=options.draft, dtype=options.dtype, device=options.device, **longer)
    prompts = read_prompts(options.prompts)[: options.num_prompts]
    rows = (
        measure_speed(model, prompts, options)
        if options.measure == "speed"
        else measure_position(model, prompts, options)
    )
    if options.output:
        write_record(options.output, rows, vars(options))
    return 0


def stretched_to(num_positions: int) -> dict[str, Any]:
    """The configuration of the embedded target with so many positions."""
    trained = {"rope_theta": 10000.0, "original_max_position_embeddings": TRAINED_POSITIONS}
    rope = {"rope_type": "yarn", "factor": num_positions / TRAINED_POSITIONS, **trained}
    return {"max_position_embeddings": num_positions, "rope_parameters": rope}


def methods_of(model: SpeculativeModel) -> dict[str, Start]:
    return {
        "plain": model.with_method("plain").start,
        "ngram": model.with_method("ngram").start,
        "eagle3": partial(model.start, ngram=False),
        "eagle3+ngram": partial(model.start, ngram=True),
    }


def measure_speed(model: SpeculativeModel, prompts: list[Prompt], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of every method, set and temperature; a prescribed answer leaves nothing to sample."""
    edits = [edit_of(model, prompt) for prompt in prompts]
    answers = {tuple(prompt.token_ids(model.tokenizer)): answer for prompt, answer in edits}
    runs = [
        ("open-ended", options.temperatures, methods_of(model), prompts),
        ("edit", (0.0,), replayed_methods(model, answers), [prompt for prompt, _ in edits]),
    ]
    rows = []
    for name, temperatures, methods, prompts_of_set in runs:
        settings = temperatures, options.repeats, options.max_new_tokens
        of_set = [as_row(row) for row in measure(methods, prompts_of_set, model.tokenizer, *settings)]
        print_table(of_set, options)
        rows += [{"set": name} | row for row in of_set]
    return rows


def edit_of(model: SpeculativeModel, prompt: Prompt) -> tuple[Prompt, list[int]]:
    """A prompt that shows a function, and the text of prompt and answer: the function with one name changed.

    The function is what the target continues `prompt` with at temperature 1; greedy text would repeat itself.
    """
    ids = prompt.token_ids(model.tokenizer)
    generation = model.start([ids], max_new_tokens=SOURCE_TOKENS, temperature=1.0).run()
    function = model.tokenizer.decode(ids + generation.outputs[0].tokens, skip_special_tokens=True)
    ((name, _),) = Counter(re.findall(r"[a-z_]{4,}", function)).most_common(1)
    answer = re.sub(rf"\b{name}\b", "changed", function)
    shown = Prompt(prompt.name, f"{function}\n# The same with {name} changed:\n")
    answered = model.tokenizer(answer, add_special_tokens=False)["input_ids"]
    return shown, shown.token_ids(model.tokenizer) + answered


def replayed_methods(model: SpeculativeModel, edits: dict[tuple[int, ...], list[int]]) -> dict[str, Start]:
    """The methods over targets that answer each prompt as prescribed."""
    replays = {
        prompt: methods_of(SpeculativeModel(FusedReplay(model.target, text), model.draft, model.tokenizer))
        for prompt, text in edits.items()
    }

    def start(method: str, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any) -> Generation:
        (prompt,) = map(tuple, prompts)
        num_prescribed = len(edits[prompt]) - len(prompt)
        limit = min(max_new_tokens, num_prescribed)
        return replays[prompt][method](prompts, max_new_tokens=limit, eos_token_id=[], **options)

    return {method: partial(start, method) for method in methods_of(model)}


def measure_position(
    model: SpeculativeModel, prompts: list[Prompt], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """tau of the cycles that start in each bucket of output positions, up to the target's last position."""
    assert model.target.max_positions is not None
    methods: dict[str, Start] = {name: methods_of(model)[name] for name in ("eagle3", "eagle3+ngram")}
    for window in options.windows:
        methods[f"eagle3 window {window}"] = partial(model.start, ngram=False, draft_window=window)
    rows = []
    for temperature in options.temperatures:
        for method, start in methods.items():
            tokens: Counter[int] = Counter()
            cycles: Counter[int] = Counter()
            for prompt in (prompt.token_ids(model.tokenizer) for prompt in prompts):
                limit = model.target.max_positions - len(prompt)
                generation = start(
                    [prompt], max_new_tokens=limit, temperature=temperature, eos_token_id=[], plan=options.plan
                )
                position = 0
                for committed in generation.cycles():
                    bucket = position // options.bucket
                    cycles[bucket] += 1
                    tokens[bucket] += len(committed.tokens[0])
                    position += len(committed.tokens[0])
            tau = {f"{b * options.bucket}": tokens[b] / cycles[b] for b in sorted(cycles)}
            rows.append({"method": method, "temperature": temperature, "acceptance_length_from": tau})
            print(rows[-1])
    return rows


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", choices=("speed", "position"), default="speed")
    parser.add_argument("--target", default="tiny")
    parser.add_argument("--draft", default="tiny", help="an EAGLE-3 head")
    parser.add_argument("--prompts", default=EMBEDDED_PROMPTS)
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 1.0])
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--windows",
        nargs="*",
        type=int,
        default=[ALL],
        help="draft windows of the position measure (default: all tokens)",
    )
    parser.add_argument("--positions", type=int, help="stretch the embedded target to so many (default: its own)")
    parser.add_argument("--plan", default="tree:4x4x16", help="of the position measure (default: %(default)s)")
    parser.add_argument("--bucket", type=int, default=128, help="output positions in a bucket (default: 128)")
    parser.add_argument("--dtype", help="default: the package's own choice")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--output", help="write the figures with their provenance to this JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
