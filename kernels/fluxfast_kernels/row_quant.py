"""Quantising the rows of a matrix: one scale a row, int8 or e4m3fn.

    scale = max|y| / top,  q = round(y · (1/scale)),  y ≈ q · scale

top is 127 for int8 and 448 for e4m3fn, the largest number of each.

Rounding is to nearest, halves to even. A row whose scale would not be a normal fp32 number (all
zeros, in practice) gets scale 1 and codes 0. A NaN or an infinity anywhere in a row makes that
row's scale NaN or infinite, so it shows in the product. `quantize_row` is what the ops that
quantise their own output call, or its three parts where a row is in several pieces; `row_quant` is
for a tensor that no such op wrote.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels.aot import E4M3_TARGETS, EVERY_TARGET, AotCase
from fluxfast_kernels.launch import arch_key, interpreted, launch, row_numbers
from fluxfast_kernels.parts import Parts, PerPart
from fluxfast_kernels.row_programs import pointers, vector_of_row

FORMATS = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn}
# what an op that can quantise its own output may be asked for: values, codes and scales, or both
OUTPUTS = ("same", "int8", "e4m3", "both-int8", "both-e4m3")

# 1.5·2²³: adding it to |v| < 2²² rounds v to an integer, halves to even, and leaves that integer in
# the low bits
_ROUND = tl.constexpr(12582912.0)
_LEAST_NORMAL = tl.constexpr(1.1754943508222875e-38)
_INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def magnitude_bits(b_y):
    """The bits of |b_y|, fp32.

    As integers, magnitudes keep their order, NaN comes out on top, and the largest of a row is
    found with one instruction a warp.
    """
    return b_y.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def largest(b_y, axis: tl.constexpr):
    """max|y| along an axis, as the bits [int32] of an fp32 number; a NaN is largest of all."""
    return tl.max(magnitude_bits(b_y), axis=axis)


@triton.jit
def scale_of(b_largest, TOP: tl.constexpr):
    """The scale of rows whose `largest` bits are given: TOP is the largest code."""
    b_scale = tl.div_rn(b_largest.to(tl.float32, bitcast=True), TOP)
    return tl.where(b_scale < _LEAST_NORMAL, 1.0, b_scale)


@triton.jit
def row_scale(b_largest, DTYPE: tl.constexpr):
    """`scale_of` for codes of DTYPE."""
    return scale_of(b_largest, 127.0 if DTYPE.is_int() else 448.0)


@triton.jit
def round_to_int8(b_v):
    """int8 codes of fp32 numbers between -127 and 127; to nearest, halves to even."""
    # the clamp is never felt, but it keeps the compiler from fusing product and sum, which would
    # round differently
    b_v = tl.minimum(tl.maximum(b_v, -127.0), 127.0) + _ROUND
    return b_v.to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def encode(b_y, b_scale, DTYPE: tl.constexpr):
    """Codes of DTYPE of numbers b_y, fp32, of a row with this scale."""
    b_v = b_y * tl.div_rn(1.0, b_scale)
    if DTYPE.is_int():
        b_q = round_to_int8(b_v)
    else:
        if _INTERPRETED:
            # the interpreter's cast drops the carry of its rounding: hand it values that need none
            b_step = tl.maximum(b_v.to(tl.int32, bitcast=True) & 0x7F800000, 121 << 23) - (3 << 23)
            b_step = b_step.to(tl.float32, bitcast=True)
            b_v = ((b_v / b_step + _ROUND) - _ROUND) * b_step
        b_q = b_v.to(DTYPE)
    return b_q


@triton.jit
def quantize_row(b_y, DTYPE: tl.constexpr):
    """Codes of DTYPE and the scale of one row; b_y [BLOCK] fp32 is zero where it is masked."""
    b_scale = row_scale(tl.max(magnitude_bits(b_y), axis=0), DTYPE)
    return encode(b_y, b_scale, DTYPE), b_scale


@triton.jit(do_not_specialize=["first_rows"])
def row_quant_kernel(
    p_x,
    p_col_scale,
    p_col_scale_second,
    p_q,
    p_scale,
    stride_x,
    first_rows,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_m = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BLOCK)
    m_k = o_k < K
    b_y = tl.load(p_x + i_m * stride_x + o_k, mask=m_k, other=0.0).to(tl.float32)
    if p_col_scale is not None:
        p_col = vector_of_row(p_col_scale, p_col_scale_second, i_m, first_rows)
        b_y *= tl.load(p_col + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_q, b_scale = quantize_row(b_y, p_q.dtype.element_ty)
    tl.store(p_q + i_m * K + o_k, b_q, mask=m_k)
    tl.store(p_scale + i_m, b_scale)


def row_quant(
    x: Tensor, fmt: str, *, col_scale: PerPart | None = None, parts: Parts | None = None
) -> tuple[Tensor, Tensor]:
    """Codes [M, K] and scales [M] fp32 of the rows of x, or of x · col_scale.

    With col_scale [K] a weight's row scales are folded into the gradient before dgrad; with `parts`
    it is a pair. x [M, K], rows any distance apart; fmt "int8" or "e4m3". Raises ValueError on
    another format or a column stride that is not 1.
    """
    if fmt not in FORMATS:
        raise ValueError(f"row_quant: the format is one of {sorted(FORMATS)}, not {fmt!r}")
    _, q, scale = empty_outputs(x, fmt)
    assert q is not None and scale is not None
    check_rows("row_quant", x=x, col_scale=col_scale)
    rows, cols = x.shape
    launch(
        row_quant_kernel, (rows,),
        x, *pointers(col_scale), q, scale, x.stride(0), 0 if parts is None else parts.rows,
        K=cols, **row_numbers("row_quant", cols, arch_key(x.device)),
    )  # fmt: skip
    return q, scale


def empty_outputs(
    x: Tensor, out: str, width: int | None = None, y: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Room for an op's output: values in x's dtype (`y` if given), codes, and a scale a row.

    Those that `out` does not ask for are None. The shape is x's, with `width` columns where that is
    given. Raises ValueError if `out` is not one of OUTPUTS.
    """
    if out not in OUTPUTS:
        raise ValueError(f"the output is one of {OUTPUTS}, not {out!r}")
    shape = (*x.shape[:-1], width or x.shape[-1])
    if out in FORMATS:
        y = None
    elif y is None:
        y = torch.empty(shape, dtype=x.dtype, device=x.device)
    assert y is None or y.shape == shape
    if out == "same":
        return y, None, None
    codes = torch.empty(shape, dtype=FORMATS[out.removeprefix("both-")], device=x.device)
    return y, codes, torch.empty(shape[:-1], dtype=torch.float32, device=x.device)


def row_strides(x: Tensor | None) -> tuple[int, int]:
    """Elements from one sample of x [B, S, D] to the next, and from one row to the next.

    The first is 0 for rows [R, D], and both are for an absent x.
    """
    if x is None:
        return 0, 0
    return (x.stride(0) if x.ndim == 3 else 0), x.stride(-2)


def targets_of(out: str) -> Sequence[str]:
    """The targets that can write what `out` asks for."""
    return E4M3_TARGETS if out.endswith("e4m3") else EVERY_TARGET


def check_rows(op: str, **operands: PerPart | None) -> None:
    """Raises ValueError if a tensor's last dimension is not contiguous.

    Kernels take rows any distance apart, but not columns.
    """
    for name, operand in operands.items():
        for tensor in operand if isinstance(operand, tuple) else (operand,):
            if tensor is not None and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
                raise ValueError(
                    f"{op}: {name} {list(tensor.shape)} must have a contiguous last dimension, got "
                    f"stride {tensor.stride(-1)}; "
                    "call .contiguous() on it"
                )


def aot_cases() -> Iterator[AotCase]:
    """What `fluxfast-bench aot` compiles of this op: launches at FLUX.1's sizes."""
    # the output of attention + MLP (forward); the gradients of a double and of a single block's
    # first projection
    for cols, col_scaled in ((15360, False), (9216, True), (21504, True)):
        x = torch.empty(4608, cols, dtype=torch.bfloat16, device="meta")
        col_scale = torch.empty(cols, device="meta") if col_scaled else None
        for fmt in FORMATS:
            yield (
                f"bf16-{cols}-{fmt}",
                partial(row_quant, x, fmt, col_scale=col_scale),
                targets_of(fmt),
            )
            if col_scale is not None:
                pair = partial(
                    row_quant, x, fmt, col_scale=(col_scale, col_scale), parts=Parts(512, 1)
                )
                yield f"bf16-{cols}-{fmt}-parts", pair, targets_of(fmt)
