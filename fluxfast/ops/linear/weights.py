"""How the weights of a group's linears get ready for products: as floats, as codes, or merged with
adapters.

A group holds ready weights for one direction of one block and is then dropped, so decoded weights
live no longer than that. Whatever is made here is made side by side in one scratch tensor, so that
one product reads all linears of the group.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from fluxfast.ops import row_quant
from fluxfast.ops.linear import augmented, kron, products_torch, products_triton, transposed_codes
from fluxfast.ops.linear.adapters import Adapter, Lora
from fluxfast.ops.linear.lokr import Lokr
from fluxfast.ops.linear.products_torch import adjoining
from fluxfast.ops.row_quant import FORMATS, Quantized


class FrozenWeight:
    """A frozen weight [N, K] that is stored in some other form and decoded each time it is used.

    A subclass must define `to`. The other members follow from it, and a subclass overrides those
    that it can do without decoding to fp32 first.
    """

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        rows, cols = shape
        self.shape, self.device = (rows, cols), device

    def identity(self) -> tuple[Hashable, tuple[Tensor, ...]] | None:
        """What says how it is decoded, and all tensors that it is decoded from.

        None where nobody but the weight itself knows them; then no launch plan reads it.
        """
        return None

    def to(self, dtype: torch.dtype, /) -> Tensor:
        """The weight as a new tensor."""
        raise NotImplementedError

    def stores(self, fmt: str, /) -> bool:
        """Whether `codes(fmt)` are the stored bytes, so that nothing has to be computed."""
        return False

    def joined(self, others: Sequence[FrozenWeight], /, *, codes: bool) -> FrozenWeight | None:
        """This weight and the others below it as one [ΣN, K], for `decode_into` in one launch.

        codes: whether it will write codes. None where they do not lie so in memory, or where that
        would not be one launch.
        """
        return None

    def codes(self, fmt: str, /) -> Quantized:
        """Codes [N, K] and row scales [N] fp32 for an 8-bit product; fmt "int8" or "e4m3"."""
        return row_quant.row_quant(self.to(torch.float32), fmt)

    def decode_into(
        self, out: Tensor, out_scale: Tensor | None = None, /, *, transposed: Tensor | None = None
    ) -> None:
        """Writes the weight into `out` [N, K] of a floating dtype.

        The rows of `out` may be any distance apart; its columns adjoin. With `out_scale` [N] fp32,
        `out` is int8 or float8_e4m3fn and gets what `codes` gives, and `transposed` [K, N], where
        it is given, gets the same codes in the other order.
        """
        if out_scale is None:
            out.copy_(self.to(out.dtype))
            return
        codes = self.codes(row_quant.format_of(out.dtype))
        out.copy_(codes.q)
        out_scale.copy_(codes.scale)
        if transposed is not None:
            transposed.copy_(codes.q.T)


Weight = Tensor | FrozenWeight


class Ready(NamedTuple):
    """The linears' weights [N, K] as products read them; row scales [N] where those are codes.

    augmented: the matrix in which the weights lie, where it has room for the adapters.
    """

    weights: list[Tensor]
    scales: list[Tensor]
    augmented: augmented.Placed | None = None

    @property
    def operands(self) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and scales, as products take them that are not augmented."""
        return self.weights, self.scales


def as_floats(
    weights: Sequence[Weight], dtype: torch.dtype, tokens: int, impl: str, rank: int
) -> Ready:
    """Weights for products of values in `dtype`, for so many tokens and ranks of adapters.

    Tensors are taken as they are, and so are stored codes where a product with few tokens is faster
    on them. Everything else is decoded.
    """
    augments = impl == "triton" and rank > 0 and products_triton.augments(tokens, weights[0].device)
    tensors = [w for w in weights if isinstance(w, Tensor)]
    if len(tensors) == len(weights):
        fits = augments and tensors[0].dtype == dtype
        return Ready(tensors, [], augmented.placed(tensors, rank) if fits else None)
    if impl == "triton":
        for fmt in FORMATS:
            stored = _stored_codes(weights, fmt)
            if stored is not None and products_triton.keeps_codes(fmt, tokens, weights[0].device):
                return stored
    place = None
    if augments:
        outs, cols = [w.shape[0] for w in weights], weights[0].shape[1]
        place = augmented.scratch(outs, cols, rank, dtype, weights[0].device)
    decoded = _side_by_side(weights, dtype) if place is None else place.weight
    for w, rows in _runs(weights, codes=False):
        if isinstance(w, Tensor):
            decoded[rows].copy_(w)
        else:
            w.decode_into(decoded[rows])
    return Ready(_split(decoded, weights), [], place)


def as_codes(
    weights: Sequence[Weight], fmt: str, dtype: torch.dtype, impl: str, *, dgrad: bool = False
) -> Ready:
    """Weights for 8-bit products: stored codes as they are, else codes that are made here.

    dgrad: whether they serve dgrad as well, so that where it reads codes transposed, such ones are
    made along with those that are made.
    """
    if (codes := _stored_codes(weights, fmt)) is None:
        if dgrad and impl == "triton" and products_triton.reads_transposed(weights[0].device):
            codes = _quantized_both_ways(weights, fmt)
        else:
            codes = _quantized(weights, fmt, impl)
    if impl == "triton":
        return codes
    # off the GPU, products may read codes as floats
    outs = [w.shape[0] for w in weights]
    joined = adjoining(codes.weights)
    if joined is None:
        return codes._replace(
            weights=[products_torch.readable(q, impl, dtype) for q in codes.weights]
        )
    whole = products_torch.readable(joined, impl, dtype)
    return codes._replace(weights=list(whole.split_with_sizes(outs)))


def merged(
    weights: Sequence[Tensor], adapters: Sequence[Sequence[Adapter]], dtype: torch.dtype
) -> Ready:
    """A copy of each linear's W, to which its own `adapters` are added."""
    copies = _split(_side_by_side(weights, dtype), weights)
    for weight, own, out in zip(weights, adapters, copies, strict=True):
        base = weight.to(dtype)
        for adapter in own:
            if isinstance(adapter, Lora):
                a, b = adapter.a.to(dtype), adapter.b.to(dtype)
                base = torch.addmm(base, b, a, alpha=adapter.scale, out=out)
            else:
                assert isinstance(adapter, Lokr)
                w1, w2 = adapter.whole()
                base = kron.added_to_weight(base, w1, w2, adapter.scale, out)
        if not own:
            out.copy_(base)
    return Ready(copies, [])


def _stored_codes(weights: Sequence[Weight], fmt: str) -> Ready | None:
    """The bytes that the weights are stored in, if all of them are codes of `fmt`."""
    codes = [w.codes(fmt) for w in weights if not isinstance(w, Tensor) and w.stores(fmt)]
    if len(codes) < len(weights):
        return None
    return Ready([c.q for c in codes], [c.scale for c in codes])


def _quantized(weights: Sequence[Weight], fmt: str, impl: str) -> Ready:
    tensors = [w for w in weights if isinstance(w, Tensor)]
    if len(tensors) == len(weights) and (joined := adjoining(tensors)) is not None:
        outs = [w.shape[0] for w in weights]
        q, scale = row_quant.forward(joined, fmt, impl=impl)
        return Ready(list(q.split_with_sizes(outs)), list(scale.split_with_sizes(outs)))
    q, scale = _room_for_codes(weights, fmt)
    for w, rows in _runs(weights, codes=True):
        if isinstance(w, Tensor):
            made = row_quant.forward(w, fmt, impl=impl)
            q[rows].copy_(made.q)
            scale[rows].copy_(made.scale)
        else:
            w.decode_into(q[rows], scale[rows])
    return Ready(_split(q, weights), _split(scale, weights))


def _quantized_both_ways(weights: Sequence[Weight], fmt: str) -> Ready:
    """The same by Triton's kernels, with a transposed copy of the codes."""
    q, scale = _room_for_codes(weights, fmt)
    copy = q.new_empty(q.shape[::-1])
    for w, rows in _runs(weights, codes=True):
        if isinstance(w, Tensor):
            products_triton.quantize_both_ways(w, q[rows], scale[rows], copy[:, rows])
        else:
            w.decode_into(q[rows], scale[rows], transposed=copy[:, rows])
    ready = Ready(_split(q, weights), _split(scale, weights))
    for codes, columns in zip(ready.weights, _split(copy.T, weights), strict=True):
        transposed_codes.remember(codes, columns.T)
    return ready


def _runs(weights: Sequence[Weight], *, codes: bool) -> list[tuple[Weight, slice]]:
    """The weights and the rows of each in one [ΣN, K] of all.

    They come as one weight where one launch can write them all. codes: whether it writes codes.
    """
    first, *others = weights
    tensors = [w for w in weights if isinstance(w, Tensor)]
    frozen = [w for w in others if not isinstance(w, Tensor)]
    whole: Weight | None = None
    if len(tensors) == len(weights):
        whole = adjoining(tensors)
    elif not tensors and not isinstance(first, Tensor):
        whole = first.joined(frozen, codes=codes) if others else first
    ends = list(accumulate(w.shape[0] for w in weights))
    if whole is not None:
        return [(whole, slice(0, ends[-1]))]
    return [(w, slice(end - w.shape[0], end)) for w, end in zip(weights, ends, strict=True)]


def _room_for_codes(weights: Sequence[Weight], fmt: str) -> tuple[Tensor, Tensor]:
    """Uninitialised codes [ΣN, K] and row scales [ΣN] fp32."""
    q = _side_by_side(weights, FORMATS[fmt][0])
    return q, torch.empty(len(q), device=q.device)


def _side_by_side(weights: Sequence[Weight], dtype: torch.dtype) -> Tensor:
    """An uninitialised [ΣN, K] for all the weights, one below the other."""
    shape = sum(w.shape[0] for w in weights), weights[0].shape[1]
    return torch.empty(shape, dtype=dtype, device=weights[0].device)


def _split(rows: Tensor, weights: Sequence[Weight]) -> list[Tensor]:
    """Each weight's rows."""
    return list(rows.split_with_sizes([w.shape[0] for w in weights]))
