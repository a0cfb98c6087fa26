"""A linear over a frozen weight of 8-bit codes, in 8-bit arithmetic: rows of x quantised as they
come, both directions.

    y  = x_scale · w_scale · (x_q W_qᵀ) + b            x_q, x_scale = row_quant(x)
    dx = dy_scale · (dy_q W_q)                          dy_q, dy_scale = row_quant(dy · w_scale)

Backward, the sum runs over W's rows, so its scales go into dy before that is quantised, and one W_q
serves both directions. Rounding has no gradient: dx is that of the product as if x had not been
rounded. The arithmetic is `linear_group`'s, which with `lora_linear` also has the product of float
rows with decoded codes (compute="same"), groups, and adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fluxfast.ops import dispatch
from fluxfast.ops.linear.group import LinearGroup, LinearParams
from fluxfast.ops.linear.lora_linear import codes_obstacle, lora_linear
from fluxfast.ops.row_quant import FORMATS, Quantized, RowOutput, row_quant_ref
from fluxfast.ops.tensors import full_dtype


class CodedWeight(NamedTuple):
    """A weight [N, K] stored as codes of `fmt` with a scale a row [N], as a LinearGroup takes it."""

    q: Tensor
    scale: Tensor
    fmt: str

    @property
    def shape(self) -> Sequence[int]:
        return self.q.shape

    @property
    def device(self) -> torch.device:
        return self.q.device

    def to(self, dtype: torch.dtype, /) -> Tensor:
        full = torch.promote_types(dtype, torch.float32)
        return (self.q.to(full) * self.scale[:, None]).to(dtype)

    def decode_into(self, out: Tensor, /) -> None:
        out.copy_(self.to(out.dtype))

    def stores(self, fmt: str, /) -> bool:
        return fmt == self.fmt

    def codes(self, fmt: str, /) -> Quantized:
        return (
            Quantized(self.q, self.scale)
            if fmt == self.fmt
            else row_quant_ref(self.to(torch.float32), fmt)
        )

    def codes_into(self, q: Tensor, scale: Tensor, /) -> None:
        codes = self.codes("int8" if q.dtype == torch.int8 else "e4m3")
        q.copy_(codes.q)
        scale.copy_(codes.scale)


def quant_matmul_ref(
    x: Tensor | Quantized,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    fmt: str = "int8",
) -> Tensor:
    """The maths in plain, differentiable torch, in fp32 (fp64 if x is): the gradient is that of the
    rounded product.
    """
    dtype = torch.float32 if isinstance(x, Quantized) else full_dtype(x)
    if isinstance(x, Quantized):
        values, out = x.q.to(dtype) * x.scale[..., None], torch.float32
    else:
        q, scale = row_quant_ref(x.detach(), fmt)
        # the rounded rows, with the gradient of x itself
        values, out = x.to(dtype) + (q.to(dtype) * scale[..., None] - x.to(dtype)).detach(), x.dtype
    y = values @ (weight_q.to(dtype) * weight_scale[:, None]).T
    return (y if bias is None else y + bias).to(out)


def quant_matmul(
    x: Tensor | Quantized,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    impl: str = "auto",
    *,
    fmt: str = "int8",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x Wᵀ + b for W = weight_scale · weight_q, in 8-bit arithmetic: [..., N].

    x [..., K], quantised to fmt ("int8" or "e4m3") a row at a time, or rows that are already;
    weight_q [N, K] codes of fmt, weight_scale [N] fp32, bias [N]. The result has x's dtype; of
    quantised rows `out_dtype`, fp32 unless said otherwise, and no gradient. Gradients: x alone; a
    bias that requires one is refused. Raises ValueError on another format, on shapes or dtypes that
    don't fit, or if `impl` can't do this call.
    """
    rows = x.q if isinstance(x, Quantized) else x
    _check(rows, isinstance(x, Quantized), weight_q, weight_scale, bias, fmt, out_dtype)
    linear = LinearParams(CodedWeight(weight_q, weight_scale, fmt), bias)
    if isinstance(x, Tensor):
        return lora_linear(x, [linear], impl, compute=fmt)
    dtype = out_dtype or torch.float32
    like = torch.empty(0, dtype=dtype, device=rows.device)
    cast = [t.detach() for t in (weight_scale, bias) if t is not None]
    backend = dispatch.resolve(
        "quant_matmul", impl, (like,), cast=cast, obstacle=codes_obstacle(rows, fmt)
    )
    with torch.no_grad():
        y, _ = LinearGroup([linear], dtype, compute=fmt, impl=backend).forward(RowOutput(None, *x))
    return y


def _check(
    rows: Tensor,
    quantized: bool,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    fmt: str,
    out_dtype: torch.dtype | None,
) -> None:
    if fmt not in FORMATS:
        raise ValueError(f"quant_matmul: the format is one of {sorted(FORMATS)}, not {fmt!r}")
    dtype, _ = FORMATS[fmt]
    if weight_q.dtype != dtype or (quantized and rows.dtype != dtype):
        raise ValueError(
            f"quant_matmul: codes of {fmt!r} are {dtype}, got weight_q {weight_q.dtype} and x "
            f"{rows.dtype}"
        )
    if out_dtype is not None and not quantized:
        raise ValueError(
            "quant_matmul: the result has x's dtype; out_dtype is for an x of codes, which have "
            "none of their own"
        )
    fits = weight_q.ndim == 2 and rows.ndim > 0 and rows.shape[-1] == weight_q.shape[1]
    n = weight_q.shape[:1]
    if not fits or weight_scale.shape != n or (bias is not None and bias.shape != n):
        raise ValueError(
            "quant_matmul: expected x [..., K], weight_q [N, K], weight_scale [N] and bias [N], "
            "got "
            f"x {list(rows.shape)}, weight_q {list(weight_q.shape)}, weight_scale "
            f"{list(weight_scale.shape)}, "
            f"bias {None if bias is None else list(bias.shape)}"
        )
