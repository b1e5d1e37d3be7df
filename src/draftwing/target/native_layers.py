"""native/layers.c for tensors: a CPU's products and decoder layers in float32."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from draftwing import native
from draftwing.layers import Attend
from draftwing.target.attention import CacheAttention

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
"""What weights may be kept in: their numbers in layers.c."""
NormNumbers = tuple[torch.Tensor, float]
"""An RMS norm's weight, without gaps, and its epsilon."""


class _Product(ctypes.Structure):
    _fields_ = [
        *((name, native.pointer) for name in ("panels", "scale", "bias")),
        *((name, native.size) for name in ("inputs", "outputs", "kind")),
    ]


class _Norm(ctypes.Structure):
    _fields_ = [("weight", native.pointer), ("eps", ctypes.c_float)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Product) for name in ("queries_keys_values", "attention_output", "gate_up", "down")),
        *((name, _Norm) for name in ("embedding_norm", "input_norm", "heads_norm", "mlp_norm")),
        *((name, native.size) for name in ("heads", "key_heads", "dim")),
    ]


class _Draft(ctypes.Structure):
    _fields_ = [
        ("embeddings", native.pointer),
        ("fc", _Product),
        ("hidden_norm", _Norm),
        ("layers", native.pointer),
        ("num_layers", native.size),
    ]


class _Pass(ctypes.Structure):
    _fields_ = [
        *((name, native.pointer) for name in ("cos", "signed_sin", "slots", "positions", "visible")),
        *(
            (name, native.size)
            for name in ("batch_stride", "node_stride", "batch", "nodes", "turned", "read", "slots_per_seat")
        ),
        ("scratch", native.pointer),
        ("threads", native.size),
    ]


class Panels:
    """A product's weight `[outputs, inputs]` in layers.c's layout, and its bias `[outputs]`.

    A float32 weight is kept in 16 bits if these hold it exactly. An int8 weight has a `scale [outputs]`, and the rows
    that it multiplies are rounded to 16 bits.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor | None = None) -> None:
        self.num_outputs, self.num_inputs = weight.shape
        width = native.loaded().panel_width()
        weight = _narrowest(weight)
        self.kept_in, missing = weight.dtype, -self.num_outputs % width
        together = 2 if weight.dtype == torch.int8 else 1  # inputs that lie side by side
        padded = torch.nn.functional.pad(weight, (0, -self.num_inputs % together, 0, missing))
        panels = padded.view(-1, width, padded.shape[1] // together, together).transpose(1, 2).contiguous()
        self._kept = panels, *(None if part is None else part.float().contiguous() for part in (scale, bias))
        addresses = map(native.address, self._kept)
        self.struct = _Product(*addresses, self.num_inputs, self.num_outputs, KINDS[self.kept_in])

    def multiply(self, x: torch.Tensor, added: torch.Tensor | None = None, overwrite: bool = False) -> torch.Tensor:
        """`x [..., inputs] @ weight.T + bias`, plus `added [R, outputs]`, which it may `overwrite`.

        Raises:
            TypeError: they are not float32, or not on the CPU.
        """
        for read in (x, added):
            if read is not None and (read.dtype != torch.float32 or read.device.type != "cpu"):
                raise TypeError(f"expected float32 on the CPU, got {read.dtype} on {read.device}")
        rows = x.reshape(-1, self.num_inputs).contiguous()
        if added is not None and not added.is_contiguous():
            added, overwrite = added.contiguous(), False
        out = rows.new_empty(len(rows), self.num_outputs) if added is None or not overwrite else added
        work = len(rows) * self.num_inputs * self.num_outputs
        pointers = rows.data_ptr(), native.address(added), out.data_ptr()
        native.loaded().multiply(ctypes.byref(self.struct), len(rows), *pointers, native.threads(work))
        return out.view(*x.shape[:-1], self.num_outputs)


class NativeLayers:
    """Decoder layers, one behind the other, as layers.c runs them."""

    def __init__(self, indices: Sequence[int], structs: Sequence[_Layer], kept: Sequence[Any]) -> None:
        self._indices, self._kept = indices, kept  # what the structures point to
        self._structs = (_Layer * len(structs))(*structs)
        self._work = max(
            sum(product.inputs * product.outputs for product in _products(struct)) for struct in self._structs
        )

    @staticmethod
    def of(
        index: int,
        products: Sequence[Panels],
        norms: Sequence[NormNumbers | None],
        num_heads: int,
        num_key_heads: int,
    ) -> "NativeLayers":
        """One layer. Its products are those of queries, keys and values, of the attention's output, of gate and up,
        and of the MLP's output; its norms those of the embedding, of the input, of heads, and before the MLP."""
        dim = products[0].num_outputs // (num_heads + 2 * num_key_heads)
        structs = *(product.struct for product in products), *map(_norm, norms)
        struct = _Layer(*structs, num_heads, num_key_heads, dim)
        return NativeLayers([index], [struct], (products, norms))

    @staticmethod
    def joined(parts: Sequence["NativeLayers"]) -> "NativeLayers":
        """All of these, in their order."""
        return NativeLayers(
            [index for part in parts for index in part._indices],
            [struct for part in parts for struct in part._structs],
            [part._kept for part in parts],
        )

    def run(
        self,
        nodes: "NativePass",
        x: torch.Tensor,
        embedding: torch.Tensor | None = None,
        overwrite: bool = False,
        first: int = 0,
        last: int | None = None,
    ) -> torch.Tensor:
        """The states `[R, D]` behind layers `first .. last - 1`, from those before, which it may `overwrite`.

        A layer that reads it has the `embedding [R, D]`.
        """
        x = x if overwrite and x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)
        embedding = None if embedding is None else embedding.contiguous()
        given = self.given(nodes, first, last)
        native.loaded().run_layers(*given, native.address(embedding), x.data_ptr())
        return x

    @property
    def address(self) -> tuple[Any, int]:
        """Where their structures lie, and how many there are."""
        return ctypes.addressof(self._structs), len(self._structs)

    def given(self, nodes: "NativePass", first: int = 0, last: int | None = None) -> tuple[Any, ...]:
        """What layers.c reads of some of them: their structures, how many, the pass, and their keys and values."""
        indices = self._indices[first:last]
        structs = ctypes.byref(self._structs, first * ctypes.sizeof(_Layer))
        keys, values = zip(*map(nodes.cache.layer, indices), strict=True)
        struct = nodes.struct(structs, len(indices), self._work)
        return structs, len(indices), struct, _addresses(keys), _addresses(values)


class NativePass:
    """What the layers of a pass share: rotations `[R, 1, turned]`, and the cache, in whose `slots [B, N]` keys and
    values are written, and of whose first S slots of each seat the nodes read the `visible [B, N, S]` ones."""

    def __init__(
        self, cos: torch.Tensor, signed_sin: torch.Tensor, attend: CacheAttention, positions: torch.Tensor | None
    ) -> None:
        self.cache, visible = attend.cache, attend.mask[:, 0]
        visible = visible if visible.stride(-1) == 1 else visible.contiguous()
        cos, signed_sin, slots = (tensor.contiguous() for tensor in (cos, signed_sin, attend.slots))
        positions = None if positions is None else positions.contiguous()
        self._kept, self._scratch = (cos, signed_sin, slots, positions, visible), torch.empty(0)
        self._struct = _Pass(
            *map(native.address, self._kept),
            *visible.stride()[:2],
            *slots.shape,
            cos.shape[-1],
            visible.shape[-1],
            self.cache.num_slots,
        )

    @staticmethod
    def of(
        cos: torch.Tensor, signed_sin: torch.Tensor, attend: Attend, positions: torch.Tensor | None = None
    ) -> "NativePass | None":
        """If layers.c takes these rotations, of which rows have those at `positions [B, N]`, and this cache."""
        if not isinstance(attend, CacheAttention) or attend.mask.dtype != torch.bool:
            return None
        if not (native.serves(cos) and attend.cache.dtype == torch.float32):
            return None
        if cos.shape[-1] > attend.cache.layer(0)[0].shape[-1]:  # an odd number of them, which torch refuses
            return None
        return NativePass(cos, signed_sin, attend, positions)

    def struct(self, layers: Any, count: int, work: int) -> Any:
        """For so many layers, and so many multiplications of a row."""
        struct = self._struct
        num_rows = struct.batch * struct.nodes
        struct.threads = threads = native.threads(num_rows * work)
        size = native.loaded().scratch_size(layers, count, num_rows, struct.read, threads)
        if len(self._scratch) < size:
            self._scratch = torch.empty(size, dtype=torch.float32)
            struct.scratch = self._scratch.data_ptr()
        return ctypes.byref(struct)


class NativeDraft:
    """An EAGLE network as layers.c runs it.

    Its layers read `fc [embedding; hidden]`, or the hidden state, or its norm. `read_out` is the norm and the product
    of a network that has an output head of its own.
    """

    def __init__(
        self,
        embeddings: torch.Tensor,
        fc: Panels | None,
        hidden_norm: NormNumbers | None,
        layers: NativeLayers,
        read_out: tuple[NormNumbers, Panels] | None,
    ) -> None:
        self._kept, self._layers, self._read_out = (embeddings, fc, hidden_norm), layers, read_out
        self._norm = _norm(read_out and read_out[0])
        fc_struct = _Product() if fc is None else fc.struct
        self._struct = _Draft(embeddings.data_ptr(), fc_struct, _norm(hidden_norm), *layers.address)

    def run(self, nodes: NativePass, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The outputs `[B, N, D]` from `hidden [B, N, D]` and the `tokens [B, N]` one step ahead."""
        hidden, tokens, x = hidden.contiguous(), tokens.contiguous(), hidden.new_empty(hidden.shape)
        joined = hidden.new_empty(2, hidden.numel())
        _, _, *given = self._layers.given(nodes)
        read = hidden.data_ptr(), tokens.data_ptr(), joined.data_ptr()
        native.loaded().run_draft(ctypes.byref(self._struct), *given, *read, x.data_ptr())
        return x

    def logits(self, x: torch.Tensor) -> torch.Tensor | None:
        """Of outputs `[B, N, D]`; None without an output head, or without C."""
        if self._read_out is None or not native.serves(x):
            return None
        x, (_, head) = x.contiguous(), self._read_out
        normed, logits = torch.empty_like(x), x.new_empty(*x.shape[:-1], head.num_outputs)
        num_rows = x.numel() // head.num_inputs
        native.loaded().read_out(
            ctypes.byref(self._norm), ctypes.byref(head.struct), num_rows, x.data_ptr(), normed.data_ptr(),
            logits.data_ptr(), native.threads(num_rows * head.num_inputs * head.num_outputs),
        )  # fmt: skip
        return logits


def normalise(x: torch.Tensor, weight: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """As fused.py's, of `x [R, D]` or `[R, H, dim]`."""
    heads, dim = (1, x.shape[1]) if x.dim() == 2 else x.shape[1:]
    out = x.new_empty(x.shape)
    weight_stride = dim if weight.dim() == 2 else 0
    rows = x.data_ptr(), x.stride(0), len(x), heads, dim
    native.loaded().normalise(
        *rows, weight.data_ptr(), weight_stride, eps.item(), out.data_ptr(), native.threads(x.numel())
    )
    return out


def _norm(norm: NormNumbers | None) -> _Norm:
    return _Norm() if norm is None else _Norm(norm[0].data_ptr(), norm[1])


def _products(layer: _Layer) -> list[_Product]:
    return [layer.queries_keys_values, layer.attention_output, layer.gate_up, layer.down]


def _addresses(tensors: Sequence[torch.Tensor]) -> Any:
    return (native.pointer * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _narrowest(weight: torch.Tensor) -> torch.Tensor:
    """The same numbers in 16 bits, if these hold them."""
    for dtype in (torch.bfloat16, torch.float16) if weight.dtype == torch.float32 else ():
        if torch.equal((narrow := weight.to(dtype)).float(), weight):
            return narrow
    return weight
