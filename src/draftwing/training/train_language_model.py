"""Train a small Llama from scratch: a target with its tokenizer (the embedded one), or a draft model for a target."""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from draftwing.config import LanguageModelStage, check_keys
from draftwing.data import fingerprint
from draftwing.data.chat_template import Example, encode_row, normalise
from draftwing.data.corpus import Row
from draftwing.data.features import check_positions
from draftwing.data.prepared import REJECTS
from draftwing.data.prompts import write_held_out_prompts
from draftwing.data.rows import Rejects, read_rows
from draftwing.files import open_to_others
from draftwing.target.load import load_tokenizer
from draftwing.target.model import TargetModel
from draftwing.training.frozen_target import frozen_target
from draftwing.training.loop import ResumableTrainer, filled_up, new_trainer
from draftwing.training.processes import is_main_process, num_processes, sum_over_processes, wait_for_others

Block = dict[str, torch.Tensor]
IGNORED = -100
"""The label of tokens that nothing is learnt from, as in transformers."""


def train_language_model(config: LanguageModelStage) -> dict[str, float]:
    """Train on the recipe's data into `config.output`, tokenizer included; returns the held-out metrics.

    With a `tokenizer` that is the tokenizer; with a `teacher` the model learns its distributions instead of the tokens,
    where the rows say that it spoke (their `loss_mask`).
    """
    output = Path(config.output)
    tokenizer = _tokenizer(config)
    make = partial(_with_documents, tokenizer=tokenizer, is_new=not config.tokenizer)
    found = read_rows(config.data, config.max_rows, rejects=Rejects(output / REJECTS), make=make)
    target = _load_teacher(config, tokenizer)
    torch.manual_seed(config.seed)
    model = new_model(config, tokenizer, len(tokenizer) if target is None else target.vocab_size)
    for limit in (model.config.max_position_embeddings, None if target is None else target.max_positions):
        check_positions(config.sequence_length, limit, "set it to at most")
    is_masked = target is not None
    held_out = blocks(_documents(found.held_out), tokenizer, config.sequence_length, is_masked)[: config.evaluate_rows]
    if is_masked:
        blank = lambda block: block | {"labels": torch.full_like(block["labels"], IGNORED)}
        held_out = filled_up(held_out, blank, config)
    train = blocks(_documents(found.train), tokenizer, config.sequence_length, is_masked)
    trainer = new_trainer(
        config,
        model,
        train_dataset=train,
        eval_dataset=held_out,
        rows=fingerprint.of_tensors(tensor for block in train for tensor in block.values()),
        trainer_class=ResumableTrainer if target is None else DistillationTrainer,
    )
    if target is not None:
        assert isinstance(trainer, DistillationTrainer)
        trainer.teacher = target
    metrics = trainer.run()
    if is_main_process():
        model.to(torch.bfloat16).save_pretrained(output)
        open_to_others(*output.glob("*.safetensors"))
        if not config.tokenizer:
            write_held_out_prompts([row for row, _ in found.held_out], output / "prompts.jsonl")
    return trainer.finish(metrics)


class DistillationTrainer(ResumableTrainer):
    """Teaches a draft model the distributions of a frozen target, its `teacher`."""

    teacher: TargetModel

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._evaluated = torch.zeros(2, dtype=torch.float64)
        """Summed loss and number of learnt tokens of an evaluation, so far, in this process."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """The mean over the learnt tokens of the step's batches in all processes (whose gradients are averaged)."""
        assert num_items_in_batch is not None
        loss = self._summed_loss(model, inputs) * (num_processes() / num_items_in_batch.clamp(min=1))
        return (loss, {}) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            total = self._summed_loss(model, inputs).detach()
        num_learnt = (inputs["labels"][:, 1:] != IGNORED).sum()
        self._evaluated += torch.stack((total.double(), num_learnt.double())).cpu()
        return total, None, None  # of which the Trainer's own mean is over batches: `log` has the one over tokens

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "eval_loss" in logs:
            total, num_learnt = sum_over_processes(self._evaluated).tolist()
            self._evaluated.zero_()
            logs["eval_loss"] = total / max(num_learnt, 1)
        super().log(logs, *args, **kwargs)

    def _summed_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = model(input_ids=inputs["input_ids"], use_cache=False).logits
        with torch.no_grad():
            teacher_logits = self.teacher.model(input_ids=inputs["input_ids"], use_cache=False).logits
        return distillation_loss(logits, teacher_logits, inputs["labels"])


def distillation_loss(logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy with the teacher's distributions, logits `[B, S, V]` twice, where labels are not IGNORED.

    Slot t predicts the token at t + 1, so its label is `labels [B, S]` at t + 1.
    """
    is_learnt = labels[:, 1:] != IGNORED
    teacher_probs = teacher_logits[:, :-1][is_learnt].float().softmax(-1)
    return functional.cross_entropy(logits[:, :-1][is_learnt].float(), teacher_probs, reduction="sum")


def _load_teacher(config: LanguageModelStage, tokenizer: Any) -> TargetModel | None:
    if not config.teacher:
        return None
    target = frozen_target(config, config.teacher)
    if len(tokenizer) > target.vocab_size:
        raise ValueError(
            f"tokenizer: it has {len(tokenizer)} tokens and the target {target.vocab_size}; a draft model learns from "
            "a target of the same tokenizer"
        )
    return target


def new_model(config: LanguageModelStage, tokenizer: Any, vocab_size: int) -> LlamaForCausalLM:
    """A randomly initialised Llama with the recipe's architecture and the tokenizer's special tokens."""
    end_of_turn, end_of_text = tokenizer.eos_token_id, _end_of_text(tokenizer)
    check_keys(config.architecture, LlamaConfig().to_dict(), "architecture.")
    ends: dict[str, Any] = {"eos_token_id": [end_of_turn, end_of_text], "pad_token_id": end_of_text}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, bos_token_id=None, **ends, **config.architecture))
    model.generation_config = GenerationConfig(**ends)
    return model


def blocks(documents: Iterable[Example], tokenizer: Any, length: int, is_masked: bool = False) -> list[Block]:
    """All documents one after the other, each closed by the end-of-text token, cut into blocks of `length` tokens.

    If it `is_masked`, the tokens outside of their loss masks are read but not learnt; neither is a block's first,
    which nothing predicts.
    """
    end_of_text, not_said = torch.tensor([_end_of_text(tokenizer)]), torch.tensor([False])
    examples = list(documents)
    if not examples:
        return []
    ids = torch.cat([part for example in examples for part in (example.input_ids, end_of_text)])
    labels = ids
    if is_masked:
        is_said = torch.cat([part for example in examples for part in (example.loss_mask, not_said)])
        labels = torch.where(is_said, ids, IGNORED)
        labels[::length] = IGNORED
    whole = ids.numel() // length * length
    pairs = zip(ids[:whole].view(-1, length), labels[:whole].view(-1, length), strict=True)
    return [{"input_ids": block, "labels": block_labels} for block, block_labels in pairs]


def _end_of_text(tokenizer: Any) -> int:
    """The id that separates rows: our own tokenizers', and the end of sequence of others."""
    return int(tokenizer.get_vocab().get(END_OF_TEXT, tokenizer.eos_token_id))


def _tokenizer(config: LanguageModelStage) -> Any:
    """The tokenizer of the run, kept in its folder: a resumed run keeps its vocabulary."""
    output = Path(config.output)
    if is_main_process() and not (output / "tokenizer.json").exists():
        if config.tokenizer:
            tokenizer = load_tokenizer(config.tokenizer)
        else:
            texts = read_rows(config.data, config.max_rows, rejects=Rejects(output / REJECTS), make=_row_text)
            tokenizer = train_tokenizer(texts.train, config.vocab_size)
        tokenizer.save_pretrained(output)
    wait_for_others()
    return PreTrainedTokenizerFast.from_pretrained(output)


def _row_of_text(row: Row) -> Row:
    """The row, normalised, for a tokenizer that is trained here."""
    row = normalise(row)
    if "input_ids" in row:
        raise ValueError("input_ids: a tokenizer that is trained here has other ids; expected messages or a text")
    return row


def _row_text(row: Row) -> str:
    """What a tokenizer learns from."""
    row = _row_of_text(row)
    if "text" in row:
        return str(row["text"])
    return "\n".join(message.get("content") or "" for message in row["messages"])


def _with_documents(row: Row, tokenizer: Any, is_new: bool) -> tuple[Row, list[Example]]:
    """A row and its documents; a new tokenizer's come from text alone."""
    row = _row_of_text(row) if is_new else normalise(row)
    return row, encode_row(row, tokenizer)


def _documents(found: Iterable[tuple[Row, list[Example]]]) -> Iterator[Example]:
    return (document for _, documents in found for document in documents)


END_OF_TEXT = "<|endoftext|>"
END_OF_TURN = "<|end|>"
ROLE_TOKENS = ["<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE vocabulary of `vocab_size` entries, special tokens included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, END_OF_TURN, *ROLE_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[END_OF_TEXT, *ROLE_TOKENS],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
