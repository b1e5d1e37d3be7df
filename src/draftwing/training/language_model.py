"""Train a small Llama target from scratch, tokenizer included: what the embedded model was made with."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from draftwing.config import TrainConfig, check_keys
from draftwing.data.chat import encode_row
from draftwing.data.corpus import Row
from draftwing.data.prompts import write_held_out_prompts
from draftwing.data.rows import Rejects, read_rows
from draftwing.data.tokenizer import END_OF_TEXT, train_tokenizer
from draftwing.training.processes import is_main_process, wait_for_others
from draftwing.training.trainer import new_trainer


def train_language_model(config: TrainConfig) -> dict[str, float]:
    """Train tokenizer and target on the recipe's data into `config.output`; returns the held-out metrics."""
    output = Path(config.output)
    rows = read_rows(config.data, config.max_rows, rejects=Rejects(output / "rejects.jsonl"))
    if is_main_process() and not (output / "tokenizer.json").exists():  # a resumed run keeps its vocabulary
        train_tokenizer((_row_text(row) for row in rows.train), config.vocab_size).save_pretrained(output)
    wait_for_others()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(output)
    torch.manual_seed(config.seed)
    model = new_target(config, tokenizer)
    trainer = new_trainer(
        config,
        model,
        train_dataset=blocks(rows.train, tokenizer, config.sequence_length),
        eval_dataset=blocks(rows.held_out, tokenizer, config.sequence_length)[: config.evaluate_rows],
    )
    metrics = trainer.run()
    if is_main_process():
        write_held_out_prompts(rows.held_out, output / "prompts.jsonl")
        model.to(torch.bfloat16).save_pretrained(output)
    return trainer.finish(metrics)


def new_target(config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A randomly initialised Llama with the recipe's architecture and the tokenizer's special tokens."""
    end_of_turn, end_of_text = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    check_keys(config.architecture, LlamaConfig().to_dict())
    llama_config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=[end_of_turn, end_of_text],
        pad_token_id=end_of_text,
        **config.architecture,
    )
    model = LlamaForCausalLM(llama_config)
    model.generation_config = GenerationConfig(eos_token_id=[end_of_turn, end_of_text], pad_token_id=end_of_text)
    return model


def blocks(rows: Iterable[Row], tokenizer: Any, length: int) -> list[dict[str, torch.Tensor]]:
    """All rows one after the other, each closed by the end-of-text token, cut into blocks of `length` tokens."""
    end_of_text = torch.tensor([tokenizer.convert_tokens_to_ids(END_OF_TEXT)])
    ids = [part for row in rows for part in (encode_row(row, tokenizer).input_ids, end_of_text)]
    stream = torch.cat(ids)
    stream = stream[: stream.numel() // length * length].view(-1, length)
    return [{"input_ids": block, "labels": block} for block in stream]


def _row_text(row: Row) -> str:
    return row["text"] if "text" in row else "\n".join(message["content"] for message in row["messages"])
