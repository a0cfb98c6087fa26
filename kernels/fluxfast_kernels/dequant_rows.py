"""Decoding int8 and e4m3 codes with one scale a row, w = code · scale; and weights in a float type,
which are their own values, for a product that wants them as codes both ways (`decoder`).
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels.aot import AotCase
from fluxfast_kernels.decoder import OUTPUTS, decoder_cases, decoder_launch, write_rows
from fluxfast_kernels.launch import launch


@triton.jit
def decode_e4m3(b_code):
    """fp32 values of e4m3fn codes [int8]: by their bits, because not every GPU has the type."""
    b_code = b_code.to(tl.int32)
    b_bits = ((b_code & 0x7F) << 20) | ((b_code & 0x80) << 24)
    # the exponent's bias differs by 120; a product with 2^120 mends that for subnormal numbers as
    # well
    return b_bits.to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def load_rows(p_w, o_row, i_block, stride, K: tl.constexpr, BLOCK: tl.constexpr):
    """Columns of the rows o_row, which are `stride` apart, as they lie in memory."""
    o_k = i_block * BLOCK + tl.arange(0, BLOCK)[None, :]
    return tl.load(p_w + o_row[:, None] * stride + o_k, mask=o_k < K, other=0)


@triton.jit
def decode_int8_rows(parts, o_row, i_block, K: tl.constexpr, BLOCK: tl.constexpr):
    p_code, p_scale = parts
    b_code = load_rows(p_code, o_row, i_block, K, K, BLOCK)
    return b_code.to(tl.float32) * tl.load(p_scale + o_row)[:, None]


@triton.jit
def decode_e4m3_rows(parts, o_row, i_block, K: tl.constexpr, BLOCK: tl.constexpr):
    p_code, p_scale = parts
    b_code = load_rows(p_code, o_row, i_block, K, K, BLOCK)
    return decode_e4m3(b_code) * tl.load(p_scale + o_row)[:, None]


@triton.jit
def decode_float_rows(parts, o_row, i_block, K: tl.constexpr, BLOCK: tl.constexpr):
    p_w, stride_w = parts
    return load_rows(p_w, o_row, i_block, stride_w, K, BLOCK).to(tl.float32)


@triton.jit
def dequant_rows_kernel(
    p_code, p_scale, p_out, p_out_scale, p_out_t, stride_out, stride_t, N,
    K: tl.constexpr, TO_E4M3: tl.constexpr, FROM_E4M3: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    write_rows(
        decode_e4m3_rows if FROM_E4M3 else decode_int8_rows, (p_code, p_scale),
        p_out, p_out_scale, p_out_t, stride_out, stride_t, N, K, TO_E4M3, ROWS, BLOCK,
    )  # fmt: skip


@triton.jit
def quantize_both_ways_kernel(
    p_w, stride_w, p_out, p_out_scale, p_out_t, stride_out, stride_t, N,
    K: tl.constexpr, TO_E4M3: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    write_rows(
        decode_float_rows, (p_w, stride_w),
        p_out, p_out_scale, p_out_t, stride_out, stride_t, N, K, TO_E4M3, ROWS, BLOCK,
    )  # fmt: skip


def dequant_rows(
    packed: Tensor,
    scale: Tensor,
    out: Tensor,
    out_scale: Tensor | None = None,
    transposed: Tensor | None = None,
) -> None:
    """Decodes packed [N, K], int8 or float8_e4m3fn, with scale [N] fp32, into out [N, K].

    Outputs as in `decoder_launch`.
    """
    assert (
        packed.is_contiguous()
        and packed.itemsize == 1
        and packed.shape == out.shape
        and scale.shape == packed.shape[:1]
    )
    is_e4m3 = int(packed.dtype == torch.float8_e4m3fn)
    parts = (packed.view(torch.int8), scale)
    grid, outputs, numbers = decoder_launch(out, out_scale, transposed)
    launch(dequant_rows_kernel, grid, *parts, *outputs, FROM_E4M3=is_e4m3, **numbers)


def quantize_both_ways(w: Tensor, out: Tensor, out_scale: Tensor, transposed: Tensor) -> None:
    """Quantises w [N, K], of a float dtype with rows any distance apart, as `row_quant` does.

    out [N, K] and out_scale [N] get what `row_quant` gives, transposed [K, N] the codes in the
    other order.
    """
    assert w.shape == out.shape and (w.stride(1) == 1 or w.shape[1] <= 1)
    parts = (w, w.stride(0))
    grid, outputs, numbers = decoder_launch(out, out_scale, transposed)
    launch(quantize_both_ways_kernel, grid, *parts, *outputs, **numbers)


def aot_cases() -> Iterator[AotCase]:
    """What `fluxfast-bench aot` compiles of this op: launches at FLUX.1's sizes."""
    for cols in (3072, 15360):
        shape, scale = (3072, cols), torch.empty(3072, device="meta")
        for stored in (torch.int8, torch.float8_e4m3fn):
            codes = torch.empty(shape, dtype=stored, device="meta")
            # codes of the type that is stored are copied, not made
            made = tuple(dtype for dtype in OUTPUTS if dtype != stored)
            name = f"{str(stored).removeprefix('torch.')}-"
            yield from decoder_cases(dequant_rows, (codes, scale), shape, name, made)
        floats = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for name, call, targets in decoder_cases(
            quantize_both_ways, (floats,), shape, "bf16-", OUTPUTS[1:]
        ):
            if name.endswith("-both"):
                yield name, call, targets
