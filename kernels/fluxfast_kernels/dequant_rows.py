"""Decoding int8 and e4m3 codes with one scale a row, w = code · scale.

Here is also what every decoder does with a row of weights once it is decoded: it is written in a
float dtype, or as int8 or e4m3 codes with one scale a row, which is what an 8-bit product takes.
The codes go to a scratch that is written once a direction. Values are computed in fp32 as
`fluxfast.quant` says, product by product (the launch forbids contraction of a·b + c), so that they
equal its references bit for bit.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels.aot import EVERY_TARGET, AotCase
from fluxfast_kernels.launch import arch_key, cdiv, interpreted, launch, row_numbers
from fluxfast_kernels.quantize_e4m3 import quantize_row_e4m3
from fluxfast_kernels.row_quant import quantize_row

# what a decoder's cases ahead of time write
OUTPUTS = (torch.bfloat16, torch.int8, torch.float8_e4m3fn)

_INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def round_to_bf16(b_y):
    """The upper 16 bits [int32] of fp32 numbers, rounded to nearest, halves to even."""
    b_bits = b_y.to(tl.int32, bitcast=True)
    return ((b_bits + 0x7FFF + ((b_bits >> 16) & 1)) >> 16) & 0xFFFF


@triton.jit
def row_and_block(K: tl.constexpr, BLOCK: tl.constexpr):
    """The row and the piece of it that this program decodes.

    Piece i is the columns [BLOCK · i, BLOCK · (i + 1)).
    """
    N_BLOCK: tl.constexpr = (K + BLOCK - 1) // BLOCK
    return (tl.program_id(0) // N_BLOCK).to(tl.int64), tl.program_id(0) % N_BLOCK


@triton.jit
def store_row(b_y, i_row, o_k, p_out, p_out_scale, K: tl.constexpr, TO_E4M3: tl.constexpr):
    """Writes decoded weights b_y fp32 of row i_row, columns o_k, as values or as codes.

    For codes it has to be a whole row, whose scale is written too.
    """
    m_k = o_k < K
    p_out += i_row * K + o_k
    if p_out_scale is None:
        if _INTERPRETED and p_out.dtype.element_ty == tl.bfloat16:
            # the interpreter cuts bits off
            b_y = (round_to_bf16(b_y) << 16).to(tl.float32, bitcast=True)
        tl.store(p_out, b_y.to(p_out.dtype.element_ty), mask=m_k)
    else:
        b_y = tl.where(m_k, b_y, 0.0)
        if TO_E4M3:
            b_q, b_scale = quantize_row_e4m3(b_y)
        else:
            b_q, b_scale = quantize_row(b_y, tl.int8)
        tl.store(p_out, b_q, mask=m_k)
        tl.store(p_out_scale + i_row, b_scale)


@triton.jit
def decode_e4m3(b_code):
    """fp32 values of e4m3fn codes [int8]: by their bits, because not every GPU has the type."""
    b_code = b_code.to(tl.int32)
    b_bits = ((b_code & 0x7F) << 20) | ((b_code & 0x80) << 24)
    # the exponent's bias differs by 120; a product with 2^120 mends that for subnormal numbers as
    # well
    return b_bits.to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def dequant_rows_kernel(
    p_code, p_scale, p_out, p_out_scale,
    K: tl.constexpr, FROM_E4M3: tl.constexpr, TO_E4M3: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_row, i_block = row_and_block(K, BLOCK)
    o_k = i_block * BLOCK + tl.arange(0, BLOCK)
    b_code = tl.load(p_code + i_row * K + o_k, mask=o_k < K, other=0)
    b_w = (decode_e4m3(b_code) if FROM_E4M3 else b_code.to(tl.float32)) * tl.load(p_scale + i_row)
    store_row(b_w, i_row, o_k, p_out, p_out_scale, K, TO_E4M3)


class DecoderLaunch(NamedTuple):
    """What decoders' launches share: grid, outputs as kernels take them, and launch numbers."""

    grid: tuple[int]
    outputs: tuple[Tensor, Tensor | None]
    numbers: dict[str, int]


def decoder_launch(out: Tensor, out_scale: Tensor | None, width: int) -> DecoderLaunch:
    """For a decoder that writes the rows of `out`, of `width` columns with their padding."""
    rows, cols = out.shape
    assert out.is_contiguous() and (out_scale is None) == (out.itemsize > 1)
    assert out_scale is None or (out_scale.shape == (rows,) and out_scale.is_contiguous())
    numbers = row_numbers(
        "dequant" if out_scale is None else "dequant_quantized", width, arch_key(out.device)
    )
    is_e4m3 = out.dtype == torch.float8_e4m3fn
    constants = {"K": cols, "TO_E4M3": int(is_e4m3), "enable_fp_fusion": False}
    outputs = (out.view(torch.int8) if is_e4m3 else out, out_scale)
    grid = (rows * cdiv(width, numbers["BLOCK"]),)
    return DecoderLaunch(grid, outputs, {**constants, **numbers})


def dequant_rows(
    packed: Tensor, scale: Tensor, out: Tensor, out_scale: Tensor | None = None
) -> None:
    """Decodes packed [N, K], int8 or float8_e4m3fn, with scale [N] fp32, into out [N, K].

    out is contiguous. In a float dtype it gets values; in int8 or float8_e4m3fn it gets codes,
    whose scales [N] fp32 go to out_scale.
    """
    assert (
        packed.is_contiguous()
        and packed.itemsize == 1
        and packed.shape == out.shape
        and scale.shape == packed.shape[:1]
    )
    is_e4m3 = int(packed.dtype == torch.float8_e4m3fn)
    grid, outputs, numbers = decoder_launch(out, out_scale, out.shape[1])
    parts = (packed.view(torch.int8), scale)
    launch(dequant_rows_kernel, grid, *parts, *outputs, FROM_E4M3=is_e4m3, **numbers)


def decoder_cases(
    decode: Any, parts: tuple[Any, ...], shape: tuple[int, int], name: str = ""
) -> Iterator[AotCase]:
    """`decode(*parts, out, out_scale)` ahead of time, for each of OUTPUTS."""
    for dtype in OUTPUTS:
        out = torch.empty(shape, dtype=dtype, device="meta")
        out_scale = torch.empty(shape[0], device="meta") if out.itemsize == 1 else None
        case = f"{name}{shape[1]}-{str(dtype).removeprefix('torch.')}"
        yield case, partial(decode, *parts, out, out_scale), EVERY_TARGET


def aot_cases() -> Iterator[AotCase]:
    """What `fluxfast-bench aot` compiles of this op: launches at FLUX.1's sizes."""
    for stored in (torch.int8, torch.float8_e4m3fn):
        for cols in (3072, 15360):
            codes, scale = (
                torch.empty(3072, cols, dtype=stored, device="meta"),
                torch.empty(3072, device="meta"),
            )
            name = f"{str(stored).removeprefix('torch.')}-"
            # codes of the type that is stored are copied, not made
            cases = decoder_cases(dequant_rows, (codes, scale), (3072, cols), name)
            yield from (case for case in cases if not case[0].endswith(name.removesuffix("-")))
