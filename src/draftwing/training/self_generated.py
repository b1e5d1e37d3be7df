"""Training rows that the target says itself: prompts from the data, answers by our own engine.

A head drafts for what its target says, not for what people wrote (EAGLE-3, arXiv 2503.01840, section 4).
"""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from draftwing.checkpoint.load import load_target, load_tokenizer
from draftwing.config import TrainConfig
from draftwing.data.chat import conversation, encode_row, render
from draftwing.data.corpus import Row
from draftwing.data.rows import read_rows
from draftwing.decoding.drafters import NoDrafter
from draftwing.decoding.generate import Generation, Request
from draftwing.decoding.plan import TreePlan
from draftwing.decoding.sampling import SamplingParams
from draftwing.decoding.stopping import StopRule
from draftwing.models.target import TargetModel


def write_self_generated(config: TrainConfig) -> dict[str, float]:
    """Write `config.output`, a JSONL file of `input_ids`, `loss_mask` (the answer) and `held_out`.

    Prompts alternate between the config's temperatures. A stopped run continues after its last complete batch.
    """
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    target = load_target(config.target, dtype, "cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(config.target)
    rows = read_rows(config.data, None, config.seed)
    shuffled = prompts(rows.train, tokenizer, config)
    random.Random(config.seed).shuffle(shuffled)
    held_out = prompts(rows.held_out, tokenizer, config)[: config.evaluate_rows]
    everything = [(prompt, True) for prompt in held_out] + [(prompt, False) for prompt in shuffled[: config.max_rows]]
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    num_done = _complete_lines(output)
    num_tokens = 0
    with output.open("a", encoding="utf-8") as file:
        starts = range(num_done, len(everything), config.batch_size)
        for start in track(starts, "self-generated rows", console=Console(stderr=True)):
            batch = everything[start : start + config.batch_size]
            for row in _answer(target, batch, start, config):
                file.write(json.dumps(row) + "\n")
                num_tokens += sum(row["loss_mask"])
            file.flush()
    return {"rows": len(everything), "new_tokens": num_tokens}


def prompts(rows: Sequence[Row], tokenizer: Any, config: TrainConfig) -> list[list[int]]:
    """Token ids to continue: a conversation up to its first answer, or the first tokens of each piece of a text."""
    found = []
    for row in rows:
        if "text" in row:
            ids = encode_row(row, tokenizer).input_ids.tolist()
            pieces = range(0, len(ids) - config.prompt_length, config.sequence_length)
            found += [ids[start : start + config.prompt_length] for start in pieces]
        else:
            turns = conversation(row)
            roles = [turn["role"] for turn in turns]
            if "assistant" in roles:
                text = render(turns[: roles.index("assistant")], tokenizer, add_generation_prompt=True)
                found.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return [ids for ids in found if 0 < len(ids) <= config.sequence_length // 2]


def _answer(
    target: TargetModel, batch: Sequence[tuple[list[int], bool]], first: int, config: TrainConfig
) -> Iterator[Row]:
    requests = [
        Request(
            prompt,
            SamplingParams(config.temperatures[index % len(config.temperatures)], seed=index),
            StopRule(config.sequence_length - len(prompt), target.eos_token_ids),
        )
        for index, (prompt, _) in enumerate(batch, first)
    ]
    generation = Generation(target, requests, lambda rows, capacity: NoDrafter(), TreePlan.off())
    for _ in generation.cycles():
        pass
    for (prompt, held_out), output in zip(batch, generation.outputs, strict=True):
        mask = [0] * len(prompt) + [1] * len(output.tokens)
        yield {"input_ids": prompt + output.tokens, "loss_mask": mask, "held_out": held_out}


def _complete_lines(path: Path) -> int:
    """Count a file's complete lines and cut off a partial last one, which a stopped run may have left."""
    if not path.exists():
        return 0
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        path.write_bytes(whole)
    return whole.count(b"\n")
