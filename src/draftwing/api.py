"""The Python API: `load` a target with a draft, then `generate` or `stream`."""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from os import PathLike
from typing import Any, NamedTuple

import torch

from draftwing.batches import Prompts, append_padded, read_prompts, unpad
from draftwing.config import DRAFT_DTYPES, check_keys
from draftwing.drafts.eagle.formats import FROM_FILE, HeadOptions
from draftwing.drafts.family import Draft, DrafterOptions
from draftwing.drafts.kinds import (
    PLAIN,
    check_drafting,
    family_of,
    new_drafter,
    resolve_method,
    suitable_draft,
)
from draftwing.drafts.load_draft import load_packed, read_acceptance, resolve_draft
from draftwing.engine.captured import CudaRecorder, Recorder
from draftwing.engine.engine import Engine, NewDrafter, Request, bucket, check_request, check_requests, depth_problem
from draftwing.engine.generation import Committed, Generation
from draftwing.engine.kept_engines import KeptEngines, sizes_to_keep
from draftwing.engine.memory import check_memory, seat_bytes
from draftwing.engine.options import GenerateOptions
from draftwing.engine.statistics import Statistics
from draftwing.engine.stopping import exact_decode
from draftwing.engine.tree_plan import Plan
from draftwing.plans.costs import CycleCosts
from draftwing.plans.lessons import Experience, Lessons
from draftwing.plans.planner import Planner
from draftwing.target.fused import pack_target
from draftwing.target.load import check_device, load_target, load_tokenizer, parse_dtype
from draftwing.target.model import TargetModel
from draftwing.target.row_pass import rounding_problem
from draftwing.threads import free_cores

logger = logging.getLogger(__name__)
HEAD_OPTIONS = tuple(HeadOptions.__dataclass_fields__)
LOAD_OPTIONS = (
    *("draft", "dtype", "device", "method", "capture", "remeasure", "quantize", "draft_dtype", *HEAD_OPTIONS),
    *("attn_implementation", "device_map", "revision", "trust_remote_code"),
)
"""What `load` takes, the most used of `from_pretrained` among them; to suggest one for another."""


@dataclass(frozen=True)
class GenerateOutput:
    """`sequences [B, S]` (prompts as given, then new tokens, padded), new `tokens` per row, why each ended, figures."""

    sequences: torch.Tensor
    tokens: list[list[int]]
    finish_reasons: list[str]
    statistics: Statistics


class _EngineKey(NamedTuple):
    """What else an engine's drafter is made with."""

    drafts: bool
    with_lookup: bool
    draft_window: int | None
    coupled: bool


class SpeculativeModel:
    """A target that generates, optionally with a draft, by one of the methods in drafts/kinds.py.

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
        self._planner = Planner(target, draft, self.method, self._lessons, self._recorder)
        self._kept = KeptEngines(target.device)

    def with_method(self, method: str) -> "SpeculativeModel":
        """The same weights, decoding another way."""
        lessons = self._lessons.of_another(self._lessons.stored)
        return SpeculativeModel(self.target, self.draft, self.tokenizer, method, lessons, self._captures)

    def with_draft(
        self,
        draft: str,
        method: str | None = None,
        head_options: HeadOptions = FROM_FILE,
        draft_dtype: str | None = None,
    ) -> "SpeculativeModel":
        """The same target with a draft that is loaded for it; arguments and errors are those of `load`."""
        _check_draft_dtype(draft_dtype)
        packed = load_packed(draft, self.target, head_options, self.tokenizer, draft_dtype)
        lessons = self._lessons.of_another(read_acceptance(draft))
        return SpeculativeModel(self.target, packed, self.tokenizer, method, lessons, self._captures)

    @property
    def device(self) -> torch.device:
        """Where the target lies."""
        return torch.device(self.target.device)

    @property
    def dtype(self) -> torch.dtype:
        """The target's."""
        dtype: torch.dtype = self.target.dtype
        return dtype

    @property
    def config(self) -> Any:
        """The target's configuration, as transformers has it."""
        return self.target.model.config

    def to(self, *args: Any, **kwargs: Any) -> "SpeculativeModel":
        """This model, where it is there already; arguments as `torch.nn.Module.to` has them.

        Raises:
            ValueError: another device or dtype; weights are laid out when they are loaded.
        """
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        here = None, self.device, torch.device(self.device.type)
        if device not in here or dtype not in (None, self.dtype):
            raise ValueError(f"to: the weights are laid out for {self.device} and {self.dtype}; give `load` the others")
        return self

    def generate(
        self,
        input_ids: Prompts,
        attention_mask: Any = None,
        return_dict_in_generate: bool = False,
        **options: Any,
    ) -> torch.Tensor | GenerateOutput:
        """Generate for a batch of prompts, the same tokens as plain decoding would.

        Args:
            input_ids: token ids `[B, S]`, or one prompt's `[S]`, as a tensor or lists; or the encoding that
                a tokenizer or `apply_chat_template(return_dict=True)` gives, mask included. Ragged
                prompts are padded on either side and `attention_mask [B, S]` tells.
            return_dict_in_generate: return a GenerateOutput with statistics instead of the ids `[B, S + new]`.
            options: the fields of GenerateOptions.

        Raises:
            ValueError: an option out of range, an empty or too long prompt; the message names the field.
        """
        settings = _read_options(options)
        input_ids, attention_mask = read_prompts(input_ids, attention_mask)
        requests = self.requests(unpad(input_ids, attention_mask), settings)
        generation = self.start_requests(requests, settings).run()
        rows = [output.tokens for output in generation.outputs]
        sequences = append_padded(input_ids, rows, self._pad_token_id(settings))
        if not return_dict_in_generate:
            return sequences
        reasons = [output.finish_reason or "" for output in generation.outputs]
        return GenerateOutput(sequences, rows, reasons, generation.statistics)

    def stream(self, input_ids: Prompts, attention_mask: Any = None, **options: Any) -> Iterator[Committed]:
        """Generate as `generate` does, yielding the tokens that each cycle commits, per row."""
        generation = self.start(unpad(*read_prompts(input_ids, attention_mask)), **options)
        try:
            yield from generation.cycles()
        finally:
            generation.close()

    def start(self, prompts: Sequence[Sequence[int]], **options: Any) -> Generation:
        """A generation over prompts given as token ids, prefilled and ready to cycle."""
        settings = _read_options(options)
        return self.start_requests(self.requests(prompts, settings), settings)

    def check(self, prompts: Sequence[Sequence[int]], **options: Any) -> None:
        """Raise the ValueError that `start` would raise for one of these prompts, or for the options."""
        settings = _read_options(options)
        self._check(self.requests(prompts, settings), settings)

    def requests(self, prompts: Sequence[Sequence[int]], settings: GenerateOptions) -> list[Request]:
        """What each prompt asks for."""
        settings.check(len(prompts), self.target.vocab_size)
        eos = self._eos_token_ids(settings)
        decode = None if self.tokenizer is None else exact_decode(self.tokenizer)
        return [settings.request(row, prompt, eos, decode) for row, prompt in enumerate(prompts)]

    def start_requests(
        self, requests: Sequence[Request], settings: GenerateOptions | None = None, num_seats: int | None = None
    ) -> Generation:
        """A generation over requests that have their own sampling and stops; of `settings` the drafting counts.

        At most `num_seats` of them are decoded at once (None: all); the next one comes when one has ended.
        """
        settings = settings or GenerateOptions()
        self._check(requests, settings)  # before anything is measured
        num_seats = min(num_seats or len(requests), len(requests))
        is_sampled = any(request.sampling.temperature > 0 for request in requests)
        most_new = max(request.stop.max_new_tokens for request in requests)
        key, plan = self._drafting(settings, most_new, [(num_seats, is_sampled)])
        longest = max(request.most_tokens for request in requests)
        engine = self._engine(key, num_seats, longest, plan)
        generation = Generation(engine, requests, partial(self._kept.keep, key), num_seats)
        if len(requests) == 1:
            self._planner.watch(plan, (1, is_sampled), generation.statistics)
        return generation

    def _engine(self, key: _EngineKey, num_seats: int, capacity: int, plan: Plan) -> Engine:
        """An engine for so many requests: a kept one that is large enough, or a new one."""
        if (kept := self._kept.take(key, num_seats, capacity, plan)) is not None:
            return kept
        drafter, sizes = self._new_drafter(key, plan), (num_seats, capacity)
        if self._captures:
            larger = sizes_to_keep(num_seats, capacity)
            of_a_seat = seat_bytes(self.target, drafter, larger[1], plan.largest)
            if self._kept.makes_room_for(2 * larger[0] * of_a_seat):  # half is for passes
                sizes = larger
        return Engine(self.target, drafter, *sizes, plan, self._recorder(), key.coupled)

    def _new_drafter(self, key: _EngineKey, plan: Plan) -> NewDrafter:
        wanted = DrafterOptions(key.with_lookup, key.draft_window, plan.largest)
        return new_drafter(self.method if key.drafts else PLAIN, self.draft, self.target, wanted)

    def engine(
        self, num_seats: int, capacity: int, settings: GenerateOptions | None = None, num_bytes: int | None = None
    ) -> Engine:
        """An engine for requests that come and go: so many seats of `capacity` tokens; `settings` say the drafting.

        `num_bytes` is what `seat_bytes` has told already, which takes as long as making a seat does.

        By default trees size themselves: then cycles of 1, 2, 4, ... seats are measured now, greedy and sampled ones.

        Raises:
            ValueError: more tokens than the models have positions, or more seats than memory has room for.
        """
        settings = settings or GenerateOptions(plan="auto")
        if num_seats < 1:
            raise ValueError(f"seats: expected at least 1, got {num_seats}")
        num_bytes = self.seat_bytes(capacity, settings) if num_bytes is None else num_bytes
        if not self.target.is_split:  # else each device has its layers' share
            check_memory(num_seats, capacity, num_bytes, self.device)
        powers = range(bucket(num_seats).bit_length())
        batches = [(2**power, sampled) for power, sampled in product(powers, (False, True))]
        key, plan = self._drafting(settings, capacity, batches)
        drafter = self._new_drafter(key, plan)
        return Engine(self.target, drafter, num_seats, capacity, plan, self._recorder(), key.coupled, keeps=True)

    def seat_bytes(self, capacity: int, settings: GenerateOptions) -> int:
        """Memory of one of an engine's seats; errors are those of `engine`."""
        most = self.target.max_positions or capacity
        if not 2 <= capacity <= most:
            raise ValueError(f"max_model_len: expected from 2 tokens to the model's {most} positions, got {capacity}")
        self._check_options(settings, capacity, capacity)
        key, plan = self._drafting(settings, capacity)
        return seat_bytes(self.target, self._new_drafter(key, plan), capacity, plan.largest)

    def _drafting(
        self, settings: GenerateOptions, max_new_tokens: int, measured: Iterable[tuple[int, bool]] = ()
    ) -> tuple[_EngineKey, Plan]:
        """What settings ask of an engine's drafter, and its plan; the arguments are those of Planner.plan."""
        plan = self._planner.plan(settings, max_new_tokens, measured)
        drafts, coupled = plan.largest.depth > 0, settings.coupled is not False
        return _EngineKey(drafts, self._planner.looks_up(settings), settings.draft_window, coupled), plan

    def _recorder(self) -> Recorder | None:
        return CudaRecorder(self.target.device) if self._captures else None

    def _check(self, requests: Sequence[Request], settings: GenerateOptions) -> None:
        check_requests(requests, partial(check_request, self.target))
        longest = max(request.most_tokens for request in requests)
        self._check_options(settings, longest, max(request.stop.max_new_tokens for request in requests))

    def _check_options(self, settings: GenerateOptions, longest: int, most_new: int) -> None:
        """Raise a ValueError for drafting that the method or the target does not know, or too many tokens.

        `longest` of a request, prompt and new ones; `most_new` of these.
        """
        check_drafting(self.method, settings.plan, settings.ngram, settings.draft_window, settings.coupled)
        shape = self._planner.fixed_shape(settings, most_new)
        if shape is not None and (problem := depth_problem(self.target, shape)):
            raise ValueError(problem)
        if torch.is_autocast_enabled(self.device.type):
            raise ValueError("torch.autocast: not supported by draftwing; load the model in the dtype it shall have")
        limit = family_of(self.method).kind.max_positions(self.draft)
        if limit is not None and longest > limit:
            raise ValueError(
                f"max_new_tokens: prompt and new tokens may be {longest} together, which would pass the draft "
                f"model's {limit} positions"
            )

    def costs(self, batch_size: int, sampled: bool = False) -> CycleCosts:
        """What a cycle of so many rows costs with this draft, from this process, the disk's cache or a measurement."""
        return self._planner.costs(batch_size, sampled)

    def experience(self, batch_size: int, sampled: bool) -> Experience:
        """What has been learnt of a draft by generations with as many rows."""
        return self._lessons.experience(batch_size, sampled)

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
    remeasure: bool = False,
    draft_dtype: str | None = None,
    **options: Any,
) -> SpeculativeModel:
    """Load a target and a draft, ready to generate.

    Args:
        target: one of EMBEDDED_TARGETS (`tiny` is part of this package), a folder, a GGUF file (dequantised once,
            into the cache) or a hub id.
        draft: an embedded target's name (its draft that suits `method`), one of EMBEDDED_DRAFTS, a folder or a hub
            id, of any family in drafts/kinds.py (a smaller language model needs the same tokenizer); None: no draft.
        dtype: of both models, `torch.float32` or "float32"; default: the target file's, but float32 on a CPU that has
            no bf16 products.
        device: of both models.
        method: one of those in drafts/kinds.py; default: what the draft is made for (eagle2 for an EAGLE-1 file). With
            one that needs no draft, none is loaded.
        capture: on a CUDA device, record cycles once and replay them (CUDA graphs).
        remeasure: measure anew what a cycle costs, by which trees size themselves; else it is kept on disk for 30 days.
        draft_dtype: "int8" keeps the linear layers of a draft head in 8 bits, "target" in the target's dtype. Default:
            "int8" in float32 on a CPU with a C compiler, else "target". The output stays the same; fewer drafts may be
            accepted.
        options: `quantize="int8"`, "int4" or "float8" keeps the target's linear layers in fewer bits. int8 in float32
            on a CPU with a C compiler is draftwing's own, the rest is torchao's. Files that are quantised already need
            none. The fields of HeadOptions (`aux_layers`, `rope_theta`, `norm_output`, ...) override what a head's file
            says (see `draftwing inspect`, `draftwing doctor`). Others go to transformers' `from_pretrained` of the
            target; those of HUB_OPTIONS (`revision`, `trust_remote_code`, ...) to its tokenizer's, too.

    Raises:
        ValueError: a name that cannot be loaded, a draft that does not fit, a model whose cache cannot be rolled back.
    """
    if not isinstance(target, str | PathLike):
        raise ValueError(
            f"target: expected a name, got {type(target).__name__}; for a model that is loaded already: "
            "model.generate(..., custom_generate=draftwing.custom_generate(draft))"
        )
    check_device(device)
    _check_draft_dtype(draft_dtype)
    free_cores()  # looks while the models are loaded
    head_options = take_head_options(options)
    given = (*head_options.given, *(() if draft_dtype is None else ("draft_dtype",)))
    draft = _draft_to_load(draft, method, given)  # a wrong name is known before the target is loaded
    try:
        loaded = pack_target(load_target(target, parse_dtype(dtype), device, **options))
    except ValueError as error:
        if isinstance(error.__cause__, TypeError):  # no such option; transformers says so when it makes the model
            check_keys([name for name in options if f"'{name}'" in str(error.__cause__)], LOAD_OPTIONS)
        raise
    if problem := rounding_problem(loaded):
        logger.warning("%s: a token may differ from plain decoding's where two logits nearly tie: %s", target, problem)
    lessons = Lessons(costs_since=time.time() if remeasure else 0.0)
    model = SpeculativeModel(loaded, None, load_tokenizer(target, **options), None, lessons, capture)
    if draft is None:
        return model if method is None else model.with_method(method)
    return model.with_draft(draft, method, head_options, draft_dtype)


def _draft_to_load(draft: str | None, method: str | None, head_options: Sequence[str]) -> str | None:
    """The draft that a method needs; None: it needs none, or none is given.

    Raises:
        ValueError: a draft that is not there, a method that needs one, `head_options` of a head that is not loaded.
    """
    if draft is not None and (method is None or family_of(method).needs_draft):
        draft = suitable_draft(draft, method)
        resolve_draft(draft)
        return draft
    if head_options:
        raise ValueError(f"{', '.join(head_options)}: for a draft head, and no draft is loaded")
    resolve_method(method, None)
    return None


def _check_draft_dtype(draft_dtype: str | None) -> None:
    """Raise a ValueError for a dtype that is not known."""
    if draft_dtype not in (None, *DRAFT_DTYPES):
        raise ValueError(f"draft_dtype: expected {' or '.join(DRAFT_DTYPES)}, got {draft_dtype!r}")


def take_head_options(options: dict[str, Any]) -> HeadOptions:
    """The fields of HeadOptions among the options, which are taken out of them."""
    return HeadOptions(**{name: options.pop(name) for name in tuple(options) if name in HEAD_OPTIONS})
