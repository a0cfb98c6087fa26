"""GELU in its tanh form: forward and backward.

It is computed as x·sigmoid(2u) with u = sqrt(2/π)·(x + 0.044715 x³). Where the output is quantised,
a program holds a whole row, because a row has one scale; else it takes a piece of one. Forward can
copy other columns, `prefix`, in front of its own. In a single block these are attention's output,
so that the next projection's input [attention | gelu(mlp)] is written, and quantised, once.
Backward can write the prefix's columns of dy apart, since attention's backward reads a contiguous
gradient.

Shapes: x, y, dy, dx [B, S, K], prefix [B, S, P], or matrices of rows [R, …]; rows may lie any
distance apart, in the outputs too.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels.aot import AotCase
from fluxfast_kernels.launch import arch_key, cdiv, launch, row_numbers
from fluxfast_kernels.parts import Parts, PerPart
from fluxfast_kernels.row_programs import pointers, vector_of_row
from fluxfast_kernels.row_quant import (
    OUTPUTS,
    check_rows,
    empty_outputs,
    quantize_row,
    row_strides,
    targets_of,
)


class GeluOut(NamedTuple):
    """Values in the input's dtype, or None; codes and their scales [B, S], or None."""

    y: Tensor | None
    q: Tensor | None
    q_scale: Tensor | None


# 2u' = _SLOPE + _SLOPE_2 x²: sqrt(8/π), and 3 · 0.044715 of it
_SLOPE = tl.constexpr(1.5957691216057308)
_SLOPE_2 = tl.constexpr(0.21406444881780076)
# -2u log2(e) = x (_LINEAR + _CUBIC x²)
_LINEAR = tl.constexpr(-2.302208198144325)
_CUBIC = tl.constexpr(-0.1029432395800235)


@triton.jit
def _sigmoid_2u(b_x, b_square):
    # 1/(1 + exp(-2u)) in seven instructions: tl.sigmoid's exponential and division look for numbers
    # that don't come up here, in thirteen more, and the kernel is bound by what it issues. No tanh:
    # the interpreter has none
    b_root = tl.rsqrt(1.0 + tl.exp2(b_x * (_LINEAR + _CUBIC * b_square)))
    return b_root * b_root


@triton.jit(do_not_specialize=["S"])
def gelu_fwd_kernel(
    p_x,
    p_prefix,
    p_y,
    p_q,
    p_q_scale,
    stride_x_b,
    stride_x_s,
    stride_prefix_b,
    stride_prefix_s,
    stride_y_b,
    stride_y_s,
    S,
    P: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # axis 1 has the pieces of a row; there is one where the row is quantised
    i_s = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    o_k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_k = o_k < P + K
    b_x = tl.load(
        p_x + i_b * stride_x_b + i_s * stride_x_s + o_k - P, mask=m_k & (o_k >= P), other=0.0
    ).to(tl.float32)
    b_y = b_x * _sigmoid_2u(b_x, b_x * b_x)
    if p_prefix is not None:
        p_prefix_row = p_prefix + i_b * stride_prefix_b + i_s * stride_prefix_s
        # one of the two is zero
        b_y += tl.load(p_prefix_row + o_k, mask=o_k < P, other=0.0).to(tl.float32)
    if p_y is not None:
        tl.store(
            p_y + i_b * stride_y_b + i_s * stride_y_s + o_k, b_y.to(p_y.dtype.element_ty), mask=m_k
        )
    if p_q is not None:
        b_q, b_q_scale = quantize_row(b_y, p_q.dtype.element_ty)
        i_row = i_b * S + i_s
        tl.store(p_q + i_row * (P + K) + o_k, b_q, mask=m_k)
        tl.store(p_q_scale + i_row, b_q_scale)


@triton.jit(do_not_specialize=["S", "first_rows"])
def gelu_bwd_kernel(
    p_dy,
    p_x,
    p_col_scale,
    p_col_scale_second,
    p_dprefix,
    p_dx,
    p_q,
    p_q_scale,
    stride_dy_b,
    stride_dy_s,
    stride_x_b,
    stride_x_s,
    stride_dprefix_b,
    stride_dprefix_s,
    stride_dx_b,
    stride_dx_s,
    S,
    first_rows,
    P: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_s = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    o_k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_k = (o_k >= P) & (o_k < P + K)
    b_x = tl.load(p_x + i_b * stride_x_b + i_s * stride_x_s + o_k - P, mask=m_k, other=0.0).to(
        tl.float32
    )
    p_dy_row = p_dy + i_b * stride_dy_b + i_s * stride_dy_s
    b_dy = tl.load(p_dy_row + o_k, mask=m_k, other=0.0).to(tl.float32)
    if p_dprefix is not None:
        p_dprefix_row = p_dprefix + i_b * stride_dprefix_b + i_s * stride_dprefix_s
        tl.store(p_dprefix_row + o_k, tl.load(p_dy_row + o_k, mask=o_k < P), mask=o_k < P)
    b_square = b_x * b_x
    b_sig = _sigmoid_2u(b_x, b_square)
    # (x·sigmoid(2u))' = sigmoid(2u) + x·sigmoid(2u)·(1 - sigmoid(2u))·2u'
    b_slope = _SLOPE + _SLOPE_2 * b_square
    b_dx = b_dy * b_sig * (1.0 + b_x * (1.0 - b_sig) * b_slope)
    if p_dx is not None:
        tl.store(
            p_dx + i_b * stride_dx_b + i_s * stride_dx_s + o_k - P,
            b_dx.to(p_dx.dtype.element_ty),
            mask=m_k,
        )
    if p_q is not None:
        if p_col_scale is not None:
            p_col = vector_of_row(p_col_scale, p_col_scale_second, i_s, first_rows)
            b_dx *= tl.load(p_col + o_k - P, mask=m_k, other=0.0).to(tl.float32)
        b_q, b_q_scale = quantize_row(b_dx, p_q.dtype.element_ty)
        i_row = i_b * S + i_s
        tl.store(p_q + i_row * K + o_k - P, b_q, mask=m_k)
        tl.store(p_q_scale + i_row, b_q_scale)


def _numbers(kernel: str, width: int, quantized: bool, device: torch.device) -> dict[str, int]:
    return dict(
        row_numbers(f"{kernel}_quantized" if quantized else kernel, width, arch_key(device))
    )


def gelu_fwd(
    x: Tensor, *, out: str = "same", prefix: Tensor | None = None, y: Tensor | None = None
) -> GeluOut:
    """[prefix | gelu(x)] as values, as codes, or as both.

    x [B, S, K] or [R, K], prefix likewise [..., P] and of the same dtype; out one of
    `row_quant.OUTPUTS`. The values go to `y` [..., P + K], where it is given. Raises ValueError on
    an unknown `out` or a last dimension that is not contiguous.
    """
    check_rows("gelu", x=x, prefix=prefix, y=y)
    (tokens, batch), cols = _tokens_and_batch(x), x.shape[-1]
    assert prefix is None or prefix.shape[:-1] == x.shape[:-1]
    width = cols if prefix is None else prefix.shape[-1] + cols
    values, q, q_scale = empty_outputs(x, out, width, y)
    numbers = _numbers("gelu_fwd", width, q is not None, x.device)
    launch(
        gelu_fwd_kernel, (tokens, cdiv(width, numbers["BLOCK"]), batch),
        x, prefix, values, q, q_scale, *row_strides(x), *row_strides(prefix), *row_strides(values),
        tokens,
        P=width - cols, K=cols, **numbers,
    )  # fmt: skip
    return GeluOut(values, q, q_scale)


def gelu_bwd(
    dy: Tensor,
    x: Tensor,
    *,
    out: str = "same",
    col_scale: PerPart | None = None,
    dprefix: Tensor | None = None,
    dx: Tensor | None = None,
    parts: Parts | None = None,
) -> GeluOut:
    """dx = dy·gelu'(x), as `out` says; the codes are those of dx·col_scale.

    dy, x [B, S, K] or [R, K]; col_scale [K]. The values go to `dx` where it is given: a slice of a
    wider buffer, say. Where `dprefix` [..., P] is given, dy is [..., P + K], and its first P
    columns are written there. With `parts`, rows are [R, K], and col_scale is a pair.
    """
    check_rows("gelu", dy=dy, x=x, col_scale=col_scale, dprefix=dprefix, dx=dx)
    (tokens, batch), cols = _tokens_and_batch(x), x.shape[-1]
    width = cols if dprefix is None else dprefix.shape[-1] + cols
    assert dy.shape == (*x.shape[:-1], width)
    assert dprefix is None or dprefix.shape[:-1] == x.shape[:-1]
    values, q, q_scale = empty_outputs(x, out, cols, dx)
    numbers = _numbers("gelu_bwd", width, q is not None, x.device)
    launch(
        gelu_bwd_kernel, (tokens, cdiv(width, numbers["BLOCK"]), batch),
        dy, x, *pointers(col_scale), dprefix, values, q, q_scale, *row_strides(dy),
        *row_strides(x), *row_strides(dprefix), *row_strides(values), tokens,
        0 if parts is None else parts.rows, P=width - cols, K=cols, **numbers,
    )  # fmt: skip
    return GeluOut(values, q, q_scale)


def _tokens_and_batch(x: Tensor) -> tuple[int, int]:
    return (x.shape[1], x.shape[0]) if x.ndim == 3 else (x.shape[0], 1)


def aot_cases() -> Iterator[AotCase]:
    """What `fluxfast-bench aot` compiles of this op: launches at FLUX.1's sizes."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.empty(1, 4608, 12288, dtype=dtype, device="meta")
        attn = torch.empty(1, 4608, 3072, dtype=dtype, device="meta")
        col_scale = torch.empty(12288, device="meta")
        name = str(dtype).removeprefix("torch.")
        for out in OUTPUTS if dtype == torch.bfloat16 else ("same",):
            where = targets_of(out)
            yield f"{name}-{out}", partial(gelu_fwd, x, out=out), where
            yield f"{name}-{out}-prefix", partial(gelu_fwd, x, out=out, prefix=attn), where
            scale = None if out == "same" else col_scale
            yield f"{name}-{out}", partial(gelu_bwd, x, x, out=out, col_scale=scale), where
            both = torch.empty(1, 4608, 15360, dtype=dtype, device="meta")
            bwd = partial(gelu_bwd, both, x, out=out, col_scale=scale, dprefix=attn)
            yield f"{name}-{out}-prefix", bwd, where
    # a double block's text and image, whose weights differ; without codes nothing else does
    rows, pair = x[0].bfloat16(), (col_scale, col_scale)
    for out in OUTPUTS[1:]:
        bwd = partial(gelu_bwd, rows, rows, out=out, col_scale=pair, parts=Parts(512, 1))
        yield f"parts-{out}", bwd, targets_of(out)
