"""How the weights of a group's linears get ready for products: as floats, as codes, or merged with
adapters.

A group holds ready weights for one direction of one block and is then dropped, so decoded weights
live no longer than that. Whatever is made here is made side by side in one scratch tensor, so that
one product reads all linears of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fluxfast.ops import row_quant
from fluxfast.ops.linear import products_torch, products_triton
from fluxfast.ops.linear.adapters import Lora
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

    def to(self, dtype: torch.dtype, /) -> Tensor:
        """The weight as a new tensor."""
        raise NotImplementedError

    def stores(self, fmt: str, /) -> bool:
        """Whether `codes(fmt)` are the stored bytes, so that nothing has to be computed."""
        return False

    def codes(self, fmt: str, /) -> Quantized:
        """Codes [N, K] and row scales [N] fp32 for an 8-bit product; fmt "int8" or "e4m3"."""
        return row_quant.row_quant(self.to(torch.float32), fmt)

    def decode_into(self, out: Tensor, out_scale: Tensor | None = None, /) -> None:
        """Writes the weight into `out` [N, K], contiguous and of a floating dtype.

        With `out_scale` [N] fp32, `out` is int8 or float8_e4m3fn and gets what `codes` gives.
        """
        if out_scale is None:
            out.copy_(self.to(out.dtype))
            return
        codes = self.codes(row_quant.format_of(out.dtype))
        out.copy_(codes.q)
        out_scale.copy_(codes.scale)


Weight = Tensor | FrozenWeight


class Ready(NamedTuple):
    """The linears' weights [N, K] as products read them; row scales [N] where those are codes."""

    weights: list[Tensor]
    scales: list[Tensor]


def as_floats(weights: Sequence[Weight], dtype: torch.dtype, tokens: int, impl: str) -> Ready:
    """Weights for products of values in `dtype`, for so many tokens.

    Tensors are taken as they are, and so are stored codes where a product with few tokens is faster
    on them. Everything else is decoded.
    """
    tensors = [w.detach() for w in weights if isinstance(w, Tensor)]
    if len(tensors) == len(weights):
        return Ready(tensors, [])
    if impl == "triton":
        for fmt in FORMATS:
            stored = _stored_codes(weights, fmt)
            if stored is not None and products_triton.keeps_codes(fmt, tokens, weights[0].device):
                return stored
    decoded = _side_by_side(weights, dtype)
    for w, out in zip(weights, decoded, strict=True):
        if isinstance(w, Tensor):
            out.copy_(w.detach())
        else:
            w.decode_into(out)
    return Ready(decoded, [])


def as_codes(weights: Sequence[Weight], fmt: str, dtype: torch.dtype, impl: str) -> Ready:
    """Weights for 8-bit products: stored codes as they are, else codes that are made here."""
    codes = _stored_codes(weights, fmt) or _quantized(weights, fmt, impl)
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


def merged(weights: Sequence[Tensor], loras: Sequence[Sequence[Lora]], dtype: torch.dtype) -> Ready:
    """W + scale · B A of each linear; `loras` are those of each linear."""
    copies = _side_by_side(weights, dtype)
    for weight, own, out in zip(weights, loras, copies, strict=True):
        base = weight.to(dtype)
        for lora in own:
            a, b = lora.a.detach().to(dtype), lora.b.detach().to(dtype)
            base = torch.addmm(base, b, a, alpha=lora.scale, out=out)
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
    codes = _side_by_side(weights, FORMATS[fmt][0])
    scales = _side_by_side(weights, torch.float32, vectors=True)
    for w, q, scale in zip(weights, codes, scales, strict=True):
        if isinstance(w, Tensor):
            made = row_quant.forward(w.detach(), fmt, impl=impl)
            q.copy_(made.q)
            scale.copy_(made.scale)
        else:
            w.decode_into(q, scale)
    return Ready(codes, scales)


def _side_by_side(
    weights: Sequence[Weight], dtype: torch.dtype, *, vectors: bool = False
) -> list[Tensor]:
    """Uninitialised tensors of the weights' shapes, or of [N], one after the other in memory."""
    outs = [w.shape[0] for w in weights]
    shape = (sum(outs),) if vectors else (sum(outs), weights[0].shape[1])
    return list(torch.empty(shape, dtype=dtype, device=weights[0].device).split_with_sizes(outs))
