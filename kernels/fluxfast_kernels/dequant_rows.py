"""Decoding int8 and e4m3 codes with one scale a row; and what every decoder does with a row of weights it has decoded.

    w = code · scale

A decoder gives the weight in a float dtype, or as int8 codes with one scale a row, which is what an 8-bit product takes: a
scratch that is written once a direction. Values are computed in fp32 as `fluxfast.quant` says, product by product (launched
without contraction of a·b + c), so that they equal its references bit for bit.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels._launch import AOT_TARGETS, AotCase, arch_key, cdiv, interpreted, launch, record_variants, row_numbers
from fluxfast_kernels.row_quant import quantize_row

_INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def round_to_bf16(b_y):
    """The upper 16 bits [int32] of fp32 numbers, rounded to nearest, halves to even."""
    b_bits = b_y.to(tl.int32, bitcast=True)
    return ((b_bits + 0x7FFF + ((b_bits >> 16) & 1)) >> 16) & 0xFFFF


@triton.jit
def store_row(b_y, m_k, o_k, i_row, K, p_y, p_q, p_q_scale):
    """Writes decoded weights b_y [BLOCK] fp32 of row i_row, columns o_k: as values to p_y, or, a whole row, as codes to p_q."""
    if p_y is not None:
        if _INTERPRETED and p_y.dtype.element_ty == tl.bfloat16:
            # the interpreter cuts bits off
            b_y = (round_to_bf16(b_y) << 16).to(tl.float32, bitcast=True)
        tl.store(p_y + i_row * K + o_k, b_y.to(p_y.dtype.element_ty), mask=m_k)
    if p_q is not None:
        b_q, b_scale = quantize_row(tl.where(m_k, b_y, 0.0), p_q.dtype.element_ty)
        tl.store(p_q + i_row * K + o_k, b_q, mask=m_k)
        tl.store(p_q_scale + i_row, b_scale)


@triton.jit
def decode_e4m3(b_code):
    """fp32 values of e4m3fn codes [int8]: by their bits, because not every GPU has the type."""
    b_code = b_code.to(tl.int32)
    # the exponent's bias differs by 120; a product with 2^120 mends that for subnormal numbers as well
    b_size = ((b_code & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where(b_code < 0, -b_size, b_size)


@triton.jit
def dequant_rows_kernel(
    p_code, p_scale, p_y, p_q, p_q_scale, K: tl.constexpr, E4M3: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    i_row = tl.program_id(1).to(tl.int64)
    o_k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_k = o_k < K
    b_code = tl.load(p_code + i_row * K + o_k, mask=m_k, other=0)
    b_w = (decode_e4m3(b_code) if E4M3 else b_code.to(tl.float32)) * tl.load(p_scale + i_row)
    store_row(b_w, m_k, o_k, i_row, K, p_y, p_q, p_q_scale)


def decoder_outputs(
    rows: int, cols: int, dtype: torch.dtype, device: torch.device, out: Tensor | None, out_scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Room for a decoder's output [rows, cols] in `dtype`, and for scales [rows] where that is int8, unless it is given."""
    out = torch.empty((rows, cols), dtype=dtype, device=device) if out is None else out
    assert out.shape == (rows, cols) and out.dtype == dtype and out.is_contiguous()
    if dtype != torch.int8:
        return out, None
    out_scale = torch.empty(rows, device=device) if out_scale is None else out_scale
    assert out_scale.shape == (rows,) and out_scale.is_contiguous()
    return out, out_scale


def launch_decoder(
    kernel: Any, parts: tuple[Tensor | int, ...], width: int, out: Tensor, out_scale: Tensor | None, **constants: int
) -> None:
    """Launches `kernel(*parts, values, codes, code scales, ...)` over the rows of `out`, each `width` columns with padding."""
    rows, cols = out.shape
    op = "dequant" if out_scale is None else "dequant_quantized"
    numbers = row_numbers(op, width, arch_key(out.device))
    outputs = (out, None, None) if out_scale is None else (None, out, out_scale)
    launch(
        kernel, (cdiv(width, numbers["BLOCK"]), rows), *parts, *outputs,
        K=cols, **constants, **numbers, enable_fp_fusion=False,
    )  # fmt: skip


def dequant_rows(
    packed: Tensor,
    scale: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    *,
    out: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The weight [N, K] of packed [N, K] int8 or float8_e4m3fn and scale [N] fp32.

    `dtype`: a float one, for values (and None); int8, for codes and their scales [N] fp32. They go to `out` and `out_scale`
    where these are given.
    """
    assert packed.is_contiguous() and packed.itemsize == 1 and scale.shape == packed.shape[:1]
    rows, cols = packed.shape
    out, out_scale = decoder_outputs(rows, cols, dtype, packed.device, out, out_scale)
    is_e4m3 = int(packed.dtype == torch.float8_e4m3fn)
    launch_decoder(dequant_rows_kernel, (packed.view(torch.int8), scale), cols, out, out_scale, E4M3=is_e4m3)
    return out, out_scale


def _aot_cases() -> Iterator[AotCase]:
    packed = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn}
    for name, stored in packed.items():
        for cols in (3072, 15360):
            codes, scale = torch.empty(3072, cols, dtype=stored, device="meta"), torch.empty(3072, device="meta")
            yield f"{name}-{cols}-bf16", partial(dequant_rows, codes, scale), tuple(AOT_TARGETS)
            if name == "e4m3":
                yield f"{name}-{cols}-int8", partial(dequant_rows, codes, scale, torch.int8), tuple(AOT_TARGETS)


AOT_VARIANTS = record_variants(_aot_cases())
