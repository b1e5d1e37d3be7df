"""The target model: any Hugging Face causal LM, run over token trees against our slot cache.

The stock module does the arithmetic; tree mask and positions are arguments, and nothing is written onto it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from draftwing.target.attention import attention_forward, has_kernel, pack_mask
from draftwing.target.hidden_states import NORMED, recording
from draftwing.target.interface import ATTENTION, Role, check_interface
from draftwing.target.kv_cache import KVCache, LayerShape, visible_slots
from draftwing.target.logits import LogitTransform
from draftwing.target.packed import PACKED_DTYPES, PackedLinear, bits_depend_on_threads

LARGEST_GAPS = {torch.float64: 0.01, torch.float32: 0.01}
"""By dtype, 0.25 in shorter ones: how far a node's logits may be from its branch's, relative to these, by rounding."""


@dataclass(frozen=True)
class TargetOutput:
    """`logits [B, N, V]` (or only the last node's) and `features [B, N, F]` (None without feature layers)."""

    logits: torch.Tensor
    features: torch.Tensor | None


@dataclass(frozen=True)
class TreePass:
    """What one pass of the model reads.

    Attributes:
        tokens, positions: `[B, N]`.
        masks: what each node reads, as the attention implementation wants it (a mapping for several kinds of layers).
        cache: where the slots `[B, N]` of the nodes' keys and values lie.
        num_read: slots that attention reads, from a row's first.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    masks: Any
    cache: KVCache
    slots: torch.Tensor
    num_read: int


@dataclass(frozen=True)
class RowStates:
    """What training reads of the target: `features [B, S, F]` and `last_hidden [B, S, D]`, its final norm's output."""

    features: torch.Tensor
    last_hidden: torch.Tensor


class TargetModel:
    """A Hugging Face causal LM behind the calls that the cycle needs; its `role` begins the error messages.

    Raises:
        ValueError: the model's state cannot be rolled back (recurrent layers), it takes no positions, its attention
            implementation cannot take a tree mask, or it gives a small tree other logits than the tree's branches. The
            message names the model and the reason in one line.
    """

    deepest_tree: int | None = None
    """Levels below the root of a tree that is no chain at most; None: any number."""

    def __init__(self, model: PreTrainedModel, role: Role = "target") -> None:
        self.model = model
        self.role = role
        self.config = model.config.get_text_config()
        self.device = model.device
        self.dtype = model.dtype
        check_interface(model, role)
        with self._refusing("cannot be verified as a tree"):
            self._windows = attention_windows(self.config)
        self._layers, self.vocab_size = self._probe()
        self._query_groups = getattr(self.config, "num_attention_heads", 1) // self._layers[0].num_heads
        self._widest = max(max(layer.key_dim, layer.value_dim) for layer in self._layers)
        self._check_tree()

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def num_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the model's positions allow, None if its configuration sets no limit."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def is_split(self) -> bool:
        """Whether the model's parts lie on several devices (`device_map`)."""
        return len(set((getattr(self.model, "hf_device_map", None) or {}).values())) > 1

    @cached_property
    def best_single_row(self) -> int:
        """How many nodes a pass over one node of one row should be padded to.

        On a CPU the product of a single row rounds differently from that of several (`Product.least_rows`). And
        torch's own in float32 does not use all threads: two rows take half the time of one.
        """
        packed = [module.product for module in self.model.modules() if isinstance(module, PackedLinear)]
        others = 2 if self.device.type == "cpu" and self.dtype in PACKED_DTYPES else 1
        return max((product.least_rows for product in packed), default=others)

    @cached_property
    def bits_depend_on_threads(self) -> bool:
        """Whether some product rounds differently on another number of threads (`packed.bits_depend_on_threads`)."""
        return bits_depend_on_threads(self.model)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-sequence ids of the model's generation config."""
        eos = self.model.generation_config.eos_token_id
        return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)

    @property
    def output_head(self) -> nn.Module:
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Module)  # of any class: quantised models have their own
        return head

    @property
    def logit_transform(self) -> LogitTransform:
        """What the model does to the product of its output head."""
        return LogitTransform.of(self.config)

    def logits(self, last_hidden: torch.Tensor) -> torch.Tensor:
        """The model's logits `[..., V]` from the output of its final norm."""
        product: torch.Tensor = self.output_head(last_hidden)
        return self.logit_transform.apply(product)

    @property
    def embedding(self) -> nn.Module:
        embedding = self.model.get_input_embeddings()
        assert isinstance(embedding, nn.Module)
        return embedding

    @property
    def _decoder(self) -> nn.Module:
        """The part from the embeddings to the final norm. Of BERT's kin, `get_decoder` gives the output head."""
        decoder = self.model.get_decoder()
        part: nn.Module = self.model.base_model if isinstance(decoder, nn.Linear) else decoder
        return part

    def new_cache(self, batch_size: int, capacity: int, dtype: torch.dtype | None = None) -> KVCache:
        """Slots for `batch_size` rows of at most `capacity` tokens, tree nodes included. Default: `attention_dtype`."""
        return KVCache(self._layers, batch_size, capacity, dtype or self.attention_dtype, self.device)

    @property
    def attention_dtype(self) -> torch.dtype:
        """What keys and values are kept and attended in.

        A branch's keys do not lie in a tree in the order in which plain decoding has them, so sums over them round
        differently. On a CPU they are taken in float64, whose differences vanish when the result is rounded. Not so
        with another attention than ours.
        """
        return torch.float64 if self.has_our_attention and self.device.type == "cpu" else self.dtype

    @property
    def has_our_attention(self) -> bool:
        """Whether target/attention.py reads the cache: not where that keeps latents which the model expands (MLA)."""
        is_ours: bool = self.model.config._attn_implementation == ATTENTION
        return is_ours and not getattr(self.config, "kv_lora_rank", None)

    def forward_tree(
        self,
        tokens: torch.Tensor,
        depths: torch.Tensor,
        ancestors: torch.Tensor,
        cache: KVCache,
        feature_layers: tuple[int, ...] = (),
        last_logits_only: bool = False,
    ) -> TargetOutput:
        """One pass over a tree that continues each row's committed tokens, or over its last N of M nodes.

        A tree can be run in parts: the M - N nodes before are those of the passes since the last commit.

        Args:
            tokens: `[B, N]` token ids.
            depths: `[B, M]` distance from the root; a node's position is its row's length plus this.
            ancestors: `[B, N, M]` bool, True where the column's node is the row's node or an ancestor of it.
            feature_layers: numbers of the hidden states (hidden_states.py) that are concatenated into the features.
            last_logits_only: run the output head on the last node alone (prompt positions need no logits).
        """
        num_new, num_behind = ancestors.shape[1:]
        num_read = cache.num_read(num_behind)
        positions = cache.lengths[:, None] + depths[:, -num_new:]
        if self.max_positions is not None:  # nodes past the limit cannot be emitted, but must not index past a table
            positions = positions.clamp(max=self.max_positions - 1)
        visible = visible_slots(cache.lengths, ancestors, num_read)
        has_window = any(window is not None for window in self._windows.values())
        slot_positions = _slot_positions(cache.lengths, depths, num_read) if has_window else None
        masks = self._masks(visible, positions, slot_positions, cache.dtype)
        slots = cache.slots_behind(num_behind)[:, -num_new:]
        return self._run(TreePass(tokens, positions, masks, cache, slots, num_read), feature_layers, last_logits_only)

    def _run(self, tree: TreePass, feature_layers: tuple[int, ...], last_logits_only: bool) -> TargetOutput:
        """The pass itself, by the stock module."""
        with recording(self._decoder, self.num_layers, feature_layers) as states:
            output = self.model(
                input_ids=tree.tokens,
                position_ids=tree.positions,
                attention_mask=tree.masks,
                past_key_values=SlotCacheView(tree.cache, tree.slots, tree.num_read),
                use_cache=True,
                logits_to_keep=1 if last_logits_only else 0,
            )
        # A split target's states lie on several devices.
        features = [states[index].to(tree.tokens.device) for index in feature_layers]
        return TargetOutput(output.logits, torch.cat(features, dim=-1) if features else None)

    def prefill(
        self,
        tokens: torch.Tensor,
        num_valid: torch.Tensor,
        cache: KVCache,
        feature_layers: tuple[int, ...] = (),
        all_logits: bool = False,
    ) -> TargetOutput:
        """Append `num_valid [B]` of the prompt tokens `[B, C]` (right-padded).

        Returns their features, if wanted, and the logits of all of them or the last of each row's C.
        """
        batch_size, length = tokens.shape
        depths = torch.arange(length, device=self.device).expand(batch_size, length)
        causal = torch.ones(length, length, dtype=torch.bool, device=self.device).tril()
        ancestors = causal.expand(batch_size, length, length)
        output = self.forward_tree(tokens, depths, ancestors, cache, feature_layers, last_logits_only=not all_logits)
        cache.commit(None, num_valid, max_kept=length)
        return output

    @torch.no_grad()
    def read_rows(
        self,
        tokens: torch.Tensor,
        feature_layers: tuple[int, ...],
        positions: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
    ) -> RowStates:
        """One pass over whole rows of tokens `[B, S]`, right-padded or packed, without a cache; for training.

        In packed rows `positions [B, S]` restart with each document of `document_ids [B, S]`, and no slot reads
        another document's.
        """
        packed: dict[str, Any] = {}
        if document_ids is not None:
            assert positions is not None
            visible = (document_ids[:, :, None] == document_ids[:, None, :]).tril()
            masks = self._masks(visible, positions, positions, self.dtype)
            packed = {"position_ids": positions, "attention_mask": masks}
        with recording(self._decoder, self.num_layers, {*feature_layers, NORMED}) as states:
            self.model(input_ids=tokens, use_cache=False, logits_to_keep=1, **packed)
        states = {index: state.to(tokens.device) for index, state in states.items()}  # a split target's lie on several
        return RowStates(torch.cat([states[index] for index in feature_layers], dim=-1), states[NORMED])

    @torch.no_grad()
    def check_logits(self) -> None:
        """Compare the model's logits with `logits` of its last hidden state.

        Raises:
            ValueError: they differ, so the model does more behind its output head than is known here.
        """
        tokens = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        output = self.model(input_ids=tokens, use_cache=False, output_hidden_states=True)
        gap = output.logits.float() - self.logits(output.hidden_states[-1]).float()
        if gap.norm() > 0.01 * output.logits.float().norm():
            raise ValueError(
                f"{self.role}: {type(self.model).__name__} changes its logits behind the output head in a way that "
                "training does not know"
            )

    def _masks(
        self, visible: torch.Tensor, positions: torch.Tensor, slot_positions: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """The mask over `visible [B, N, S]`, by layer type where there are several; sliding windows need positions."""
        masks = {}
        for layer_type, window in self._windows.items():
            mask = visible
            if window is not None:
                assert slot_positions is not None
                mask = visible & (positions[:, :, None] - slot_positions[:, None, :] < window)
            mask = mask.unsqueeze(1)
            attention = self.model.config._attn_implementation
            if attention == "eager":
                mask = torch.zeros_like(mask, dtype=self.dtype).masked_fill_(~mask, torch.finfo(self.dtype).min)
            elif (
                attention == ATTENTION
                and self._query_groups > 1
                and not has_kernel(self.device, dtype, mask.shape[2], self._widest)
            ):
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
                mask = pack_mask(mask, self._query_groups)
            masks[layer_type] = mask
        return masks if len(masks) > 1 else next(iter(masks.values()))

    @torch.no_grad()
    def _probe(self) -> tuple[list[LayerShape], int]:
        """Each cache layer's sizes and the number of logits, read from a forward pass over one token."""
        cache, token = DynamicCache(), torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        with self._refusing("cannot run one token"):
            logits = self.model(input_ids=token, past_key_values=cache).logits
        name, shapes = type(self.model).__name__, []
        if not self._is_meta and bool(logits.isnan().any()):
            raise ValueError(f"{self.role}: {name} gives NaN: broken weights, or {self.dtype} overflows")
        for index, layer in enumerate(cache.layers):
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if keys is None or values is None:
                raise ValueError(
                    f"{self.role}: layer {index} of {name} keeps a recurrent state, which cannot be rolled back "
                    "after a rejected draft"
                )
            shapes.append(LayerShape(keys.shape[1], keys.shape[-1], values.shape[-1], keys.device))
        if not shapes:
            raise ValueError(f"{self.role}: {name} keeps no keys and values, so every pass would begin anew")
        return shapes, logits.shape[-1]

    @property
    def _is_meta(self) -> bool:
        return bool(self.device.type == "meta")

    @torch.no_grad()
    def _check_tree(self) -> None:
        """Run a chain that ends in two children, and compare the second with its branch alone by the stock module."""
        if self._is_meta:
            return
        length = 6  # two rows, for some modules cannot do with several
        tokens = torch.arange(1, length + 1, device=self.device).expand(2, length) % self.vocab_size
        depths = torch.arange(length, device=self.device).clamp(max=length - 2).expand(2, length)
        ancestors = torch.ones(2, length, length, dtype=torch.bool, device=self.device).tril()
        ancestors[:, -1, -2] = False
        branch = [*range(length - 2), length - 1]
        with self._refusing("cannot be run over trees"):
            logits = self.forward_tree(tokens, depths, ancestors, self.new_cache(2, length)).logits[1, -1].float()
            alone = self.model(input_ids=tokens[:1, branch], use_cache=False).logits[0, -1].float()
        finite = alone.isfinite()  # some models rule tokens out
        if not (logits - alone)[finite].norm() <= LARGEST_GAPS.get(self.dtype, 0.25) * alone[finite].norm():
            name = type(self.model).__name__
            raise ValueError(
                f"{self.role}: {name} gives the nodes of a tree other logits than their branches have alone: its "
                "attention does not follow masks and positions, or is not causal"
            )

    @contextmanager
    def _refusing(self, what: str) -> Iterator[None]:
        """Whatever the model raises inside, as a ValueError of one line that names it."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = one_line(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {one_line(error)}"
            if self.model.config._attn_implementation == ATTENTION and not isinstance(error, ValueError):
                reason += "; attn_implementation='sdpa' or 'eager' may help"
            raise ValueError(f"{self.role}: {type(self.model).__name__} {what}: {reason}") from error


def one_line(error: BaseException) -> str:
    """The first line of an error's message; transformers' go on for kilobytes."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class SlotCacheView(Cache):
    """What the Hugging Face modules see of a KVCache during one forward pass."""

    def __init__(self, cache: KVCache, slots: torch.Tensor, num_read: int) -> None:
        super().__init__(layers=[])
        self._cache = cache
        self._slots = slots
        self._num_read = num_read

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._cache.write(layer_idx, key_states, value_states, self._slots, self._num_read)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._cache.bound


def _slot_positions(lengths: torch.Tensor, depths: torch.Tensor, num_slots: int) -> torch.Tensor:
    """Position of the token in each slot, `[B, num_slots]`: its index if committed, else by its node's depth."""
    slots = torch.arange(num_slots, device=lengths.device)
    behind = slots - lengths[:, None]
    in_tree = lengths[:, None] + depths.gather(1, behind.clamp(0, depths.shape[1] - 1))
    return torch.where(behind < 0, slots, in_tree)


def attention_windows(config: Any) -> dict[str, int | None]:
    """The attention kinds of a model's layers and their sliding windows (None: all of the context).

    Raises:
        ValueError: a kind of attention that is not known; a window that transformers' caches know, its modules not.
    """
    window = _declared(config, "sliding_window")
    ignored = getattr(config, "sliding_window", None) if window is None else None
    cached = getattr(config, "layer_types", None) or ("sliding_attention",)
    if ignored and "sliding_attention" in cached and ignored < (getattr(config, "max_position_embeddings", 0) or 0):
        raise ValueError(
            f"its modules know no sliding_window, transformers' caches do, and config.json has {ignored}: its passes "
            "and its cached ones would differ; set it to null there"
        )
    if _declared(config, "use_sliding_window") is False:
        window = None
    kinds = set(_declared(config, "layer_types") or ())
    if not kinds:
        return {"full_attention": window}
    known = {"full_attention": None, "sliding_attention": window}
    for kind in sorted(kinds - known.keys()):
        raise ValueError(f"its layers of type {kind!r} have no mask of their own here")
    return {kind: known[kind] for kind in sorted(kinds)}


def _declared(config: Any, name: str) -> Any:
    """A field of a model's configuration; None if its class has no such field, since then no module reads it.

    transformers keeps every key of a config.json. What a hub repository's own code reads is not known.
    """
    kind: Callable[[], Any] = type(config)
    is_known = kind.__module__.startswith("transformers.models.")
    return None if is_known and not hasattr(_usual(kind), name) else getattr(config, name, None)


@cache
def _usual(kind: Callable[[], Any]) -> Any:
    """A configuration of this class as it is where a config.json says nothing."""
    return kind()


AttentionInterface.register(ATTENTION, attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
