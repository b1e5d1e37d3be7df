"""The Python API: `load` a target with a draft, then `generate` or `stream`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch

from draftwing.checkpoint.formats import FROM_FILE, HeadOptions
from draftwing.checkpoint.load import (
    Draft,
    load_draft,
    load_target,
    load_tokenizer,
    read_acceptance,
)
from draftwing.config import check_keys
from draftwing.decoding.acceptance import AcceptanceTable
from draftwing.decoding.auto_plan import AutoPlan
from draftwing.decoding.costs import CycleCosts, cached_costs, measure_costs
from draftwing.decoding.drafters import Drafter, NoDrafter
from draftwing.decoding.drafters.draft_model import DraftModelDrafter
from draftwing.decoding.drafters.eagle import EagleDrafter
from draftwing.decoding.drafters.lookahead import LookaheadDrafter
from draftwing.decoding.drafters.medusa import MedusaDrafter
from draftwing.decoding.drafters.ngram import NgramDrafter
from draftwing.decoding.experience import Experience
from draftwing.decoding.generate import Committed, Generation, Request
from draftwing.decoding.plan import Plan, TreePlan
from draftwing.decoding.sampling import SamplingParams
from draftwing.decoding.statistics import Statistics
from draftwing.decoding.stopping import StopRule
from draftwing.models.eagle3 import Eagle3Model
from draftwing.models.fused import FusedTarget, can_fuse
from draftwing.models.medusa import MedusaModel
from draftwing.models.packed import pack_linears
from draftwing.models.target import TargetModel
from draftwing.provenance import provenance

LARGEST_ON_CPU = TreePlan(width=4, depth=8, num_nodes=32)
FIXED_SHAPES = tuple(
    map(TreePlan.parse, ("chain:2", "chain:4", "tree:4x4x16", "tree:6x5x30", "tree:8x6x48", "tree:10x8x60"))
)
"""Where every shape is worth capturing: what `auto` chooses among, the largest last."""
EAGLE_METHODS = ("eagle1", "eagle2", "eagle3")
HEAD_OPTIONS = tuple(HeadOptions.__dataclass_fields__)
DRAFTLESS_METHODS = ("plain", "ngram", "lookahead")
METHODS = (*DRAFTLESS_METHODS, *EAGLE_METHODS, "medusa", "draft_model")


@dataclass
class Lessons:
    """What trees that size themselves know: a draft's `stored` acceptance counts, and what this process has learnt.

    `costs` are by batch size (its next power of two), `experience` by that and by whether tokens are sampled.
    """

    stored: Mapping[str, Any] = field(default_factory=dict)
    costs: dict[int, CycleCosts] = field(default_factory=dict)
    experience: dict[tuple[int, bool], Experience] = field(default_factory=dict)


@dataclass(frozen=True)
class GenerateOutput:
    """`sequences [B, S]` (prompts as given, then new tokens, padded), new `tokens` per row, why each ended, figures."""

    sequences: torch.Tensor
    tokens: list[list[int]]
    finish_reasons: list[str]
    statistics: Statistics


@dataclass(frozen=True)
class GenerateOptions:
    """Everything `generate` takes beside the prompts; None is neutral, and without a temperature decoding is greedy.

    Of the model's generation config only end-of-sequence and padding ids are read; its temperature, top_p, ... are not.

    Attributes:
        seed: one seed per row, or a single one, which gives row b the seed `seed + b`.
        stop: stop strings; a row ends with the token that completes one.
        plan: `auto`, `off`, `chain:DEPTH`, `tree:WIDTHxDEPTHxNODES`, `eagle1`, `medusa`, `lookahead:WxNxG` (for that
            method alone) or a TreePlan; None is the method's default. `auto` sizes each tree by what it is expected to
            bring; the first time on a machine it measures what a cycle costs, for a second or two.
        ngram: with an EAGLE method, let a continuation looked up in the text compete for the nodes of each tree.
        draft_window: let an EAGLE head read the last so many tokens only, as past the lengths it was trained on.
        coupled: rank draft candidates with the target's own noise; the same output, more of it drafted when sampling.
        is_done: a further end, called with a row and its new tokens after each (slow).
    """

    max_new_tokens: int = 128
    temperature: float | None = None
    do_sample: bool | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | Sequence[int] = 0
    eos_token_id: int | Sequence[int] | None = None
    stop: Sequence[str] | str = ()
    plan: str | TreePlan | None = None
    coupled: bool = True
    ngram: bool = False
    draft_window: int | None = None
    is_done: Callable[[int, Sequence[int]], bool] | None = None

    def sampling(self, row: int) -> SamplingParams:
        """The sampling parameters of one row."""
        temperature = self.temperature
        if temperature is None:
            temperature = 1.0 if self.do_sample else 0.0
        if self.do_sample is False:
            temperature = 0.0
        return SamplingParams(
            temperature=temperature,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            logit_bias=self.logit_bias,
            seed=self._seed_of(row),
        )

    def _seed_of(self, row: int) -> int:
        if isinstance(self.seed, int):
            return (self.seed + row) % 2**63 if self.seed >= 0 else self.seed
        if row >= len(self.seed):
            raise ValueError(f"seed: {len(self.seed)} seeds for more rows; expected one per row")
        return self.seed[row]


class SpeculativeModel:
    """A target that generates, optionally with a draft (EAGLE or Medusa heads, a smaller model) by one of METHODS."""

    def __init__(
        self,
        target: TargetModel,
        draft: Draft | None = None,
        tokenizer: Any = None,
        method: str | None = None,
        lessons: Lessons | None = None,
    ) -> None:
        self.target, self.draft, self.tokenizer = target, draft, tokenizer
        self.method = resolve_method(method, draft)
        self._lessons = lessons or Lessons()

    def with_method(self, method: str) -> "SpeculativeModel":
        """The same weights, decoding another way."""
        return SpeculativeModel(self.target, self.draft, self.tokenizer, method, Lessons(self._lessons.stored))

    def with_draft(
        self,
        draft: str,
        method: str | None = None,
        head_options: HeadOptions = FROM_FILE,
    ) -> "SpeculativeModel":
        """The same target with a draft that is loaded for it; arguments and errors are those of `load`."""
        drafting = load_draft(draft, self.target, options=head_options, tokenizer=self.tokenizer)
        pack_linears(drafting.model if isinstance(drafting, TargetModel) else drafting)
        return SpeculativeModel(self.target, drafting, self.tokenizer, method, Lessons(read_acceptance(draft)))

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        return_dict_in_generate: bool = False,
        **options: Any,
    ) -> torch.Tensor | GenerateOutput:
        """Generate for a batch of prompts, the same tokens as plain decoding would.

        Args:
            input_ids: `[B, S]`; ragged prompts are padded on either side and `attention_mask [B, S]` tells.
            return_dict_in_generate: return a GenerateOutput with statistics instead of the ids `[B, S + new]`.
            options: the fields of GenerateOptions.

        Raises:
            ValueError: an option out of range, an empty or too long prompt; the message names the field.
        """
        settings = _read_options(options)
        generation = self._start(unpad(input_ids, attention_mask), settings)
        for _ in generation.cycles():
            pass
        rows = [output.tokens for output in generation.outputs]
        sequences = append_padded(input_ids, rows, self._pad_token_id(settings))
        if not return_dict_in_generate:
            return sequences
        reasons = [output.finish_reason or "" for output in generation.outputs]
        return GenerateOutput(sequences, rows, reasons, generation.statistics)

    def stream(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **options: Any
    ) -> Iterator[Committed]:
        """Generate as `generate` does, yielding the tokens that each cycle commits, per row."""
        yield from self.start(unpad(input_ids, attention_mask), **options).cycles()

    def start(self, prompts: Sequence[Sequence[int]], **options: Any) -> Generation:
        """A generation over prompts given as token ids, prefilled and ready to cycle."""
        return self._start(prompts, _read_options(options))

    def _start(self, prompts: Sequence[Sequence[int]], settings: GenerateOptions) -> Generation:
        stop = (settings.stop,) if isinstance(settings.stop, str) else tuple(settings.stop)
        eos = self._eos_token_ids(settings)
        requests = [
            Request(
                prompt=prompt,
                sampling=settings.sampling(row),
                stop=StopRule(
                    max_new_tokens=settings.max_new_tokens,
                    eos_token_ids=eos,
                    stop_strings=stop,
                    decode=None if self.tokenizer is None else self.tokenizer.decode,
                    is_done=settings.is_done and partial(settings.is_done, row),
                ),
            )
            for row, prompt in enumerate(prompts)
        ]
        return self.start_requests(requests, settings)

    def start_requests(self, requests: Sequence[Request], settings: GenerateOptions | None = None) -> Generation:
        """A generation over requests that have their own sampling and stops; of `settings` the drafting counts."""
        settings = settings or GenerateOptions()
        longest = max((len(request.prompt) + request.stop.max_new_tokens for request in requests), default=0)
        self._check_draft_positions(longest)
        plan = self._plan(settings, requests)
        new_drafter = partial(self._new_drafter, with_lookup=settings.ngram, window=settings.draft_window)
        return Generation(self.target, requests, new_drafter, plan, settings.coupled)

    def costs(self, batch_size: int) -> CycleCosts:
        """What a cycle of so many rows costs with this draft, from this process, the disk's cache or a measurement."""
        bucket = 1 << (batch_size - 1).bit_length()
        costs = self._lessons.costs
        if bucket not in costs:
            largest = self._shapes()[-1]
            key = self._identity() | {"batch_size": bucket, "largest": repr(largest)}
            costs[bucket] = cached_costs(key, lambda: measure_costs(self.target, self._new_drafter, bucket, largest))
        return costs[bucket]

    def experience(self, batch_size: int, sampled: bool) -> Experience:
        """What earlier generations with as many rows, and at first the draft's stored counts, teach the next ones."""
        key = 1 << (batch_size - 1).bit_length(), sampled
        experience = self._lessons.experience
        if key not in experience:
            stored = self._lessons.stored.get("sampled" if sampled else "greedy")
            table = AcceptanceTable() if stored is None else AcceptanceTable.from_dict(stored)
            experience[key] = Experience(table)
        return experience[key]

    def _plan(self, settings: GenerateOptions, requests: Sequence[Request]) -> Plan:
        batch_size, device = len(requests), self.target.device
        off = TreePlan.off(self.target.best_single_row if batch_size == 1 else 1)
        if settings.ngram and self.method not in EAGLE_METHODS:
            raise ValueError(f"ngram: merges into EAGLE trees; the method is {self.method}")
        if settings.draft_window is not None and self.method not in EAGLE_METHODS:
            raise ValueError(f"draft_window: limits what an EAGLE head reads; the method is {self.method}")
        if self.method == "plain":
            return off
        plan = settings.plan or default_plan(self.method)
        if plan == "auto" and self.method in DRAFTLESS_METHODS:  # nothing to size: lookups cost next to nothing
            plan = default_plan(self.method)
        if plan != "auto":
            plan = TreePlan.parse(plan) if isinstance(plan, str) else plan
            plan = plan.with_lookup() if settings.ngram else plan
            return plan if plan.depth else off
        shapes = self._shapes()
        if settings.ngram:
            shapes = tuple(shape.with_lookup() for shape in shapes)
        sampled = any(request.sampling.temperature > 0 for request in requests)
        return AutoPlan(
            self.costs(batch_size),
            self.experience(batch_size, sampled),
            batch_size,
            shapes[-1],
            off,
            device,
            fixed_shapes=() if device.type == "cpu" else shapes,
        )

    def _shapes(self) -> tuple[TreePlan, ...]:
        """The shapes that trees which size themselves have, or on a CPU their bound; the largest last."""
        shapes = (LARGEST_ON_CPU,) if self.target.device.type == "cpu" else FIXED_SHAPES
        if isinstance(self.draft, MedusaModel):
            shapes = tuple(shape.cut_to(len(self.draft)) for shape in shapes)
        num_tokens = self.target.vocab_size if self.draft is None else draft_vocab_size(self.draft)
        return tuple(dict.fromkeys(shape.at_most(num_tokens) for shape in shapes))

    def _identity(self) -> dict[str, Any]:
        """What a cycle's seconds depend on."""
        assert self.draft is not None
        draft = self.draft.config.to_dict() if isinstance(self.draft, TargetModel) else vars(self.draft.config)
        where = {"on": str(self.target.device), "dtype": str(self.target.dtype), "pass": type(self.target).__name__}
        where["attention"] = self.target.model.config._attn_implementation  # a user's own model has another
        return _machine() | where | {"target": self.target.config.to_dict(), "draft": draft}

    def _new_drafter(
        self, batch_size: int, capacity: int, with_lookup: bool = False, window: int | None = None
    ) -> Drafter:
        device = self.target.device
        if self.method == "ngram":
            return NgramDrafter(batch_size, capacity, device)
        if self.method == "lookahead":
            return LookaheadDrafter(batch_size, capacity, device)
        if self.draft is None or self.method == "plain":
            return NoDrafter()
        if isinstance(self.draft, TargetModel):
            return DraftModelDrafter(self.draft, self.target.vocab_size, batch_size, capacity)
        if isinstance(self.draft, MedusaModel):
            return MedusaDrafter(self.draft, batch_size, self.target.dtype, device)
        dtype = next(self.draft.parameters()).dtype
        ngram = NgramDrafter(batch_size, capacity, device) if with_lookup else None
        return EagleDrafter(self.draft, batch_size, capacity, dtype, device, ngram, window)

    def _check_draft_positions(self, num_tokens: int) -> None:
        """Raise a ValueError where a draft model would have to read more tokens than it has positions."""
        if self.method != "draft_model":
            return
        assert isinstance(self.draft, TargetModel)
        limit = self.draft.max_positions
        if limit is not None and num_tokens > limit:
            raise ValueError(
                f"max_new_tokens: prompt and new tokens may be {num_tokens} together, which would pass the draft "
                f"model's {limit} positions"
            )

    def _eos_token_ids(self, settings: GenerateOptions) -> tuple[int, ...]:
        eos = settings.eos_token_id
        if eos is None:
            return self.target.eos_token_ids
        return (eos,) if isinstance(eos, int) else tuple(eos)

    def _pad_token_id(self, settings: GenerateOptions) -> int:
        pad = self.target.model.generation_config.pad_token_id
        return pad if pad is not None else (self._eos_token_ids(settings) or (0,))[0]


def _read_options(options: dict[str, Any]) -> GenerateOptions:
    check_keys(options, GenerateOptions.__dataclass_fields__)
    return GenerateOptions(**options)


def load(
    target: str,
    draft: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    method: str | None = None,
    **options: Any,
) -> SpeculativeModel:
    """Load a target and a draft, ready to generate.

    Args:
        target: `tiny` (the embedded model), a folder or a hub id.
        draft: `tiny` (the embedded draft that suits `method`), `tiny-eagle1`, `tiny-medusa`, `tiny-draft`, a folder or
            a hub id of an EAGLE head, of Medusa heads or of a smaller causal language model with the same tokenizer;
            None: no draft.
        dtype: of both models, `torch.float32` or "float32"; default: the target file's, but float32 on a CPU that has
            no bf16 products.
        method: one of METHODS; default: what the draft is made for (eagle2 for an EAGLE-1 file).
        options: the fields of HeadOptions (`aux_layers`, `rope_theta`, `norm_output`, ...) override what a head's file
            says (see `draftwing inspect`, `draftwing doctor`); others go to transformers' `from_pretrained`.

    Raises:
        ValueError: a name that cannot be loaded, a draft that does not fit, a model whose cache cannot be rolled back.
    """
    check_device(device)
    head_options = HeadOptions(**{name: options.pop(name) for name in tuple(options) if name in HEAD_OPTIONS})
    loaded = load_target(target, parse_dtype(dtype), device, **options)
    pack_linears(loaded.model)
    if can_fuse(loaded.model):
        loaded = FusedTarget(loaded.model)
    draft = draft and suitable_draft(draft, method)
    tokenizer = load_tokenizer(target)
    if draft is None or method in DRAFTLESS_METHODS:
        return SpeculativeModel(loaded, None, tokenizer, method)
    return SpeculativeModel(loaded, tokenizer=tokenizer).with_draft(draft, method, head_options)


@cache
def _machine() -> dict[str, Any]:
    made_by = provenance()
    return {name: made_by[name] for name in ("device", "threads", "cores", "torch", "transformers")}


def suitable_draft(draft: str, method: str | None) -> str:
    """The embedded draft that suits the method, if `draft` is `tiny`; other names are left as they are."""
    suitable = {"eagle1": "tiny-eagle1", "eagle2": "tiny-eagle1", "medusa": "tiny-medusa", "draft_model": "tiny-draft"}
    return suitable.get(method or "", draft) if draft == "tiny" else draft


def draft_vocab_size(draft: Draft) -> int:
    """How many tokens a draft chooses from."""
    return draft.vocab_size if isinstance(draft, TargetModel) else len(draft.vocab)


def default_plan(method: str) -> str:
    """A method's plan unless one is named: the papers' shapes, and trees that size themselves for the others."""
    fixed = {"plain": "off", "eagle1": "eagle1", "medusa": "medusa", "ngram": "chain:6"}
    return (fixed | {"lookahead": "lookahead:15x5x15"}).get(method, "auto")


def check_device(device: str | torch.device) -> None:
    """Raise a ValueError for a device that torch does not know or does not see."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {str(device)!r} is not available: {str(error).splitlines()[0]}") from None


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype from its name; None stays None."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if dtype not in known:
        raise ValueError(f"dtype: expected one of {', '.join(known)}, got {dtype!r}")
    return known[dtype]


def resolve_method(method: str | None, draft: Draft | None) -> str:
    """The method to decode with, checked against the draft at hand."""
    if method is not None and method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if method in ("ngram", "lookahead"):
        return method
    if draft is None:
        if method not in (None, "plain"):
            raise ValueError(f"method: {method} needs a draft head or a draft model")
        return "plain"
    kind, methods = _methods_of(draft)
    if method not in (None, "plain", *methods):
        raise ValueError(f"method: {method} cannot use this draft, which is {kind}")
    return method or methods[0]


def serves(method: str, draft: Draft | None) -> bool:
    """Whether a method can decode with this draft, or without any."""
    try:
        resolve_method(method, draft)
    except ValueError:
        return False
    return True


def _methods_of(draft: Draft) -> tuple[str, tuple[str, ...]]:
    """What a draft is, and the methods that use it, the default first."""
    if isinstance(draft, TargetModel):
        return "a language model", ("draft_model",)
    if isinstance(draft, MedusaModel):
        return "Medusa heads", ("medusa",)
    if isinstance(draft, Eagle3Model):
        return "an EAGLE-3 head", ("eagle3",)
    return "an EAGLE-1/2 head", ("eagle2", "eagle1")


def unpad(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[list[int]]:
    """The prompts of a padded batch `[B, S]` as lists of ids; the mask's zeros are dropped."""
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids: expected shape [B, S], got {list(input_ids.shape)}")
    if attention_mask is None:
        rows: list[list[int]] = input_ids.tolist()
        return rows
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: expected shape {list(input_ids.shape)} as input_ids, got {list(attention_mask.shape)}"
        )
    return [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]


def append_padded(input_ids: torch.Tensor, rows: list[list[int]], pad_token_id: int) -> torch.Tensor:
    """`input_ids [B, S]` followed by each row's new tokens, padded on the right to one length."""
    longest = max(map(len, rows))
    new = [row + [pad_token_id] * (longest - len(row)) for row in rows]
    return torch.cat((input_ids, torch.tensor(new, device=input_ids.device)), dim=1)
