"""The Python API: `load` a target with a draft, then `generate` or `stream`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from os import PathLike
from typing import Any

import torch

from draftwing.checkpoint.formats import FROM_FILE, HeadOptions
from draftwing.checkpoint.load import (
    Draft,
    load_draft,
    load_target,
    load_tokenizer,
    read_acceptance,
    resolve_draft,
)
from draftwing.config import check_keys
from draftwing.decoding.acceptance import AcceptanceTable
from draftwing.decoding.auto_plan import AutoPlan
from draftwing.decoding.captured import RowsPool
from draftwing.decoding.costs import CycleCosts, cached_costs, measure_costs
from draftwing.decoding.experience import Experience
from draftwing.decoding.generate import Committed, Generation, Request, plain_plan
from draftwing.decoding.lookups import LookupPlan, LookupTrial
from draftwing.decoding.options import GenerateOptions
from draftwing.decoding.plan import Plan, TreePlan
from draftwing.decoding.rows import NewRows, Rows
from draftwing.decoding.statistics import Statistics
from draftwing.methods import (
    DRAFTLESS_METHODS,
    EAGLE_METHODS,
    default_plan,
    drafter_factory,
    resolve_method,
    suitable_draft,
    tree_shapes,
)
from draftwing.models.fused import pack_draft, pack_target
from draftwing.models.target import TargetModel
from draftwing.provenance import provenance
from draftwing.threads import free_cores, num_threads

HEAD_OPTIONS = tuple(HeadOptions.__dataclass_fields__)
LOAD_OPTIONS = ("draft", "dtype", "device", "method", "capture", "quantize", *HEAD_OPTIONS) + (
    "attn_implementation",
    "device_map",
    "revision",
    "trust_remote_code",
)
"""What `load` takes, the most used of `from_pretrained` among them; to suggest one for another."""

MOST_DRIFT, WATCHED_CYCLES = 2.0, 32
"""Of a generation's seconds over what measured costs say, in so many cycles at least, before they are measured anew."""


@dataclass
class Lessons:
    """What trees that size themselves know: a draft's `stored` acceptance counts, and what this process has learnt.

    `costs` and `experience` are by batch size (its next power of two) and by whether tokens are sampled.
    """

    stored: Mapping[str, Any] = field(default_factory=dict)
    costs: dict[tuple[int, bool], CycleCosts] = field(default_factory=dict)
    experience: dict[tuple[int, bool], Experience] = field(default_factory=dict)
    watched: dict[tuple[int, bool], tuple[AutoPlan, Statistics]] = field(default_factory=dict)
    """The last generation by these costs: what it expected, and what it took."""
    renewed: set[tuple[int, bool]] = field(default_factory=set)
    """Costs that were measured anew; once a process is enough."""

    def are_outdated(self, key: tuple[int, bool]) -> bool:
        """Whether cycles took so much less or more than these costs say that the machine must be another by now.

        It is not another one where other processes make cycles slow: that passes.
        """
        plan, taken = self.watched.pop(key, (None, Statistics()))
        if plan is None or taken.num_cycles < WATCHED_CYCLES or key in self.renewed:
            return False
        ratio = (taken.total_seconds - taken.seconds["prefill"]) / plan.expected_seconds
        return ratio < 1 / MOST_DRIFT or (ratio > MOST_DRIFT and not free_cores().are_shared)


@dataclass(frozen=True)
class GenerateOutput:
    """`sequences [B, S]` (prompts as given, then new tokens, padded), new `tokens` per row, why each ended, figures."""

    sequences: torch.Tensor
    tokens: list[list[int]]
    finish_reasons: list[str]
    statistics: Statistics


class SpeculativeModel:
    """A target that generates, optionally with a draft (EAGLE or Medusa heads, a smaller model) by one of METHODS.

    On a CUDA device cycles are captured: recorded once for each shape and replayed, unless `capture` is False.
    """

    def __init__(
        self,
        target: TargetModel,
        draft: Draft | None = None,
        tokenizer: Any = None,
        method: str | None = None,
        lessons: Lessons | None = None,
        capture: bool = True,
    ) -> None:
        self.target, self.draft, self.tokenizer = target, draft, tokenizer
        self.method = resolve_method(method, draft)
        self._lessons = lessons or Lessons()
        self._captures = capture and target.device.type == "cuda" and not target.is_split
        self._pools: dict[tuple[bool, int | None], RowsPool] = {}  # by what else a drafter is made with

    def with_method(self, method: str) -> "SpeculativeModel":
        """The same weights, decoding another way."""
        lessons = Lessons(self._lessons.stored)
        return SpeculativeModel(self.target, self.draft, self.tokenizer, method, lessons, self._captures)

    def with_draft(
        self,
        draft: str,
        method: str | None = None,
        head_options: HeadOptions = FROM_FILE,
    ) -> "SpeculativeModel":
        """The same target with a draft that is loaded for it; arguments and errors are those of `load`."""
        drafting = load_draft(draft, self.target, options=head_options, tokenizer=self.tokenizer)
        lessons = Lessons(read_acceptance(draft))
        return SpeculativeModel(self.target, pack_draft(drafting), self.tokenizer, method, lessons, self._captures)

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
        generation = self._start(unpad(input_ids, attention_mask), settings).run()
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
        generation = self.start(unpad(input_ids, attention_mask), **options)
        try:
            yield from generation.cycles()
        finally:
            generation.close()

    def start(self, prompts: Sequence[Sequence[int]], **options: Any) -> Generation:
        """A generation over prompts given as token ids, prefilled and ready to cycle."""
        return self._start(prompts, _read_options(options))

    def _start(self, prompts: Sequence[Sequence[int]], settings: GenerateOptions) -> Generation:
        settings.check(len(prompts), self.target.vocab_size)
        eos, decode = self._eos_token_ids(settings), None if self.tokenizer is None else self.tokenizer.decode
        requests = [settings.request(row, prompt, eos, decode) for row, prompt in enumerate(prompts)]
        return self.start_requests(requests, settings)

    def start_requests(self, requests: Sequence[Request], settings: GenerateOptions | None = None) -> Generation:
        """A generation over requests that have their own sampling and stops; of `settings` the drafting counts."""
        settings = settings or GenerateOptions()
        longest = max((len(request.prompt) + request.stop.max_new_tokens for request in requests), default=0)
        self._check_draft_positions(longest)
        with_lookup = self._looks_up(settings)
        plan = self._plan(settings, requests, with_lookup)
        factory = drafter_factory(self.method, self.draft, self.target, with_lookup, settings.draft_window)
        pool = self._pools.setdefault((with_lookup, settings.draft_window), RowsPool())
        generation = Generation(self.target, requests, factory, plan, settings.coupled, self._new_rows(pool))
        if isinstance(plan, AutoPlan):
            sampled = any(request.sampling.temperature > 0 for request in requests)
            self._lessons.watched[_bucket(len(requests)), sampled] = plan, generation.statistics
        return generation

    def costs(self, batch_size: int, sampled: bool = False) -> CycleCosts:
        """What a cycle of so many rows costs with this draft, from this process, the disk's cache or a measurement."""
        bucket, costs = _bucket(batch_size), self._lessons.costs
        is_outdated = self._lessons.are_outdated((bucket, sampled))
        if is_outdated:
            self._lessons.renewed.add((bucket, sampled))
        if (bucket, sampled) not in costs or is_outdated:
            assert self.draft is not None
            largest = tree_shapes(self.draft, self.target)[-1]
            factory = drafter_factory(self.method, self.draft, self.target)
            key = self._identity() | {"batch_size": bucket, "largest": repr(largest), "sampled": sampled}
            new_rows = self._new_rows(RowsPool())
            costs[bucket, sampled] = cached_costs(
                key,
                lambda: measure_costs(self.target, factory, bucket, largest, new_rows=new_rows, sampled=sampled),
                is_outdated,
            )
        return costs[bucket, sampled]

    def _new_rows(self, pool: RowsPool) -> NewRows:
        """What gives a generation its rows: the pool where cycles are captured."""
        return pool.take if self._captures else Rows

    def experience(self, batch_size: int, sampled: bool) -> Experience:
        """What earlier generations with as many rows, and at first the draft's stored counts, teach the next ones."""
        key = _bucket(batch_size), sampled
        experience = self._lessons.experience
        if key not in experience:
            stored = self._lessons.stored.get("sampled" if sampled else "greedy")
            table = AcceptanceTable() if stored is None else AcceptanceTable.from_dict(stored)
            experience[key] = Experience(table)
        return experience[key]

    def _looks_up(self, settings: GenerateOptions) -> bool:
        """Whether n-grams are merged into the trees."""
        if settings.ngram and self.method not in EAGLE_METHODS:
            raise ValueError(f"ngram: merges into EAGLE trees; the method is {self.method}")
        if settings.ngram is not None:
            return settings.ngram
        return self.method in EAGLE_METHODS and (settings.plan or default_plan(self.method)) == "auto"

    def _plan(self, settings: GenerateOptions, requests: Sequence[Request], with_lookup: bool) -> Plan:
        batch_size, device = len(requests), self.target.device
        off = plain_plan(self.target, batch_size)
        if settings.draft_window is not None and self.method not in EAGLE_METHODS:
            raise ValueError(f"draft_window: limits what an EAGLE head reads; the method is {self.method}")
        if self.method == "plain":
            return off
        plan = settings.plan or default_plan(self.method)
        if plan == "auto" and self.method in DRAFTLESS_METHODS:  # nothing to size: lookups cost next to nothing
            plan = default_plan(self.method)
        sampled = any(request.sampling.temperature > 0 for request in requests)
        if plan != "auto":
            plan = TreePlan.parse(plan) if isinstance(plan, str) else plan
            if not plan.depth:
                return off
            # A fixed plan's trees depend on its requests alone, not on the generations before: its trial is its own.
            return LookupPlan(plan, LookupTrial()) if with_lookup else plan
        assert self.draft is not None
        shapes = tree_shapes(self.draft, self.target)
        if with_lookup:
            shapes = tuple(shape.with_lookup() for shape in shapes)
        return AutoPlan(
            self.costs(batch_size, sampled),
            self.experience(batch_size, sampled),
            batch_size,
            shapes[-1],
            off,
            device,
            fixed_shapes=() if device.type == "cpu" else shapes,
        )

    def _identity(self) -> dict[str, Any]:
        """What a cycle's seconds depend on."""
        assert self.draft is not None
        draft = self.draft.config.to_dict() if isinstance(self.draft, TargetModel) else vars(self.draft.config)
        where = {"on": str(self.target.device), "dtype": str(self.target.dtype), "pass": type(self.target).__name__}
        network = self.draft.model if isinstance(self.draft, TargetModel) else self.draft
        parts = {type(part).__name__ for part in (self.draft, *network.modules())}  # packed and fused ones differ
        where["draft_pass"] = ", ".join(sorted(parts))
        where["captured"] = str(self._captures)
        where["attention"] = self.target.model.config._attn_implementation  # a user's own model has another
        where["threads"] = str(num_threads())
        return _machine() | where | {"target": self.target.config.to_dict(), "draft": draft}

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
        eos = settings.eos_token_ids
        return self.target.eos_token_ids if eos is None else eos

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
    capture: bool = True,
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
        device: of both models.
        method: one of METHODS; default: what the draft is made for (eagle2 for an EAGLE-1 file).
        capture: on a CUDA device, record cycles once and replay them (CUDA graphs).
        options: `quantize="int8"` (or int4, float8) keeps the target's linear layers in fewer bits, by torchao; files
            that are quantised already need none. The fields of HeadOptions (`aux_layers`, `rope_theta`, `norm_output`,
            ...) override what a head's file says (see `draftwing inspect`, `draftwing doctor`). Others go to
            transformers' `from_pretrained` of the target.

    Raises:
        ValueError: a name that cannot be loaded, a draft that does not fit, a model whose cache cannot be rolled back.
    """
    if not isinstance(target, str | PathLike):
        raise ValueError(
            f"target: expected a name, got {type(target).__name__}; for a model that is loaded already: "
            "model.generate(..., custom_generate=draftwing.custom_generate(draft))"
        )
    check_device(device)
    free_cores()  # looks while the models are loaded
    head_options = take_head_options(options)
    draft = None if draft is None or method in DRAFTLESS_METHODS else suitable_draft(draft, method)
    if draft is not None:
        resolve_draft(draft)  # a wrong name is known before the target is loaded
    try:
        loaded = pack_target(load_target(target, parse_dtype(dtype), device, **options))
    except ValueError as error:
        if isinstance(error.__cause__, TypeError):  # no such option; transformers says so when it makes the model
            check_keys([name for name in options if f"'{name}'" in str(error.__cause__)], LOAD_OPTIONS)
        raise
    tokenizer = load_tokenizer(target)
    if draft is None:
        return SpeculativeModel(loaded, None, tokenizer, method, capture=capture)
    return SpeculativeModel(loaded, tokenizer=tokenizer, capture=capture).with_draft(draft, method, head_options)


def take_head_options(options: dict[str, Any]) -> HeadOptions:
    """The fields of HeadOptions among the options, which are taken out of them."""
    return HeadOptions(**{name: options.pop(name) for name in tuple(options) if name in HEAD_OPTIONS})


def _bucket(batch_size: int) -> int:
    """The next power of two: batches of like size share what was measured and learnt."""
    return 1 << (batch_size - 1).bit_length()


@cache
def _machine() -> dict[str, Any]:
    made_by = provenance()
    return {name: made_by[name] for name in ("device", "cores", "torch", "transformers")}


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


def unpad(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[list[int]]:
    """The prompts of a padded batch `[B, S]` as lists of ids; the mask's zeros are dropped."""
    if not isinstance(input_ids, torch.Tensor) or input_ids.is_floating_point():
        raise ValueError(f"input_ids: expected a tensor of token ids [B, S], got {input_ids!r}")
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
