"""What every decoder of weights does with rows that it has decoded.

They are written in a float dtype; or as int8 or e4m3 codes with one scale a row, which is what an
8-bit product takes. Forward reads the codes row by row. A GPU whose 8-bit tensor cores want the
contraction contiguous reads them column by column in dgrad, and there one launch can write them
both ways. Values are computed in fp32 as `fluxfast.quant` says,
product by product (the launch forbids contraction of a·b + c), so that they equal its references
bit for bit.
"""

import functools
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels.aot import EVERY_TARGET, AotCase
from fluxfast_kernels.launch import (
    LaunchTable,
    arch_key,
    cdiv,
    constant,
    interpreted,
    launch_numbers,
    reads_transposed,
    row_numbers,
)
from fluxfast_kernels.quantize_e4m3 import encode_e4m3, quantize_row_e4m3
from fluxfast_kernels.row_quant import largest, quantize_row, round_to_int8, scale_of

# what a decoder's cases ahead of time write
OUTPUTS = (torch.bfloat16, torch.int8, torch.float8_e4m3fn)
# the targets whose dgrad reads transposed codes
BOTH_WAYS_TARGETS = tuple(filter(reads_transposed, EVERY_TARGET))

# Rows and columns of a tile that is written both ways. 32 rows are the least of which a transposed
# tile fills whole sectors of memory. Not measured yet.
BOTH_WAYS: LaunchTable = {"default": {"ROWS": 32, "BLOCK": 128, "num_warps": 8}}

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
def store_row(
    b_y, i_row, o_k, p_out, p_out_scale, stride_out, K: tl.constexpr, TO_E4M3: tl.constexpr
):
    """Writes decoded weights b_y fp32 of row i_row, columns o_k, as values or as codes.

    For codes it has to be a whole row, whose scale is written too.
    """
    m_k = o_k < K
    p_out += i_row * stride_out + o_k
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
def decode_masked(
    decode: tl.constexpr, parts, o_row, i_block, K: tl.constexpr, BLOCK: tl.constexpr
):
    """Columns of the rows o_row, as `decode` gives them, with zeros from column K on."""
    m_k = i_block * BLOCK + tl.arange(0, BLOCK) < K
    return tl.where(m_k[None, :], decode(parts, o_row, i_block, K, BLOCK), 0.0)


@triton.jit
def write_both_ways(
    decode: tl.constexpr, parts, p_out, p_out_scale, p_out_t, stride_out, stride_t, N,
    K: tl.constexpr, TO_E4M3: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes codes and scales of ROWS rows to out [N, K], and the codes to out_t [K, N] as well.

    A scale needs its whole row, so rows are decoded twice; the second time they come from a cache.
    """
    N_BLOCK: tl.constexpr = (K + BLOCK - 1) // BLOCK
    TOP: tl.constexpr = 448.0 if TO_E4M3 else 127.0
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < N
    # rows past the last one are read as that, and not written
    o_read = tl.minimum(o_row, N - 1)
    b_top = tl.zeros([ROWS], tl.int32)
    for i_block in range(N_BLOCK):
        b_y = decode_masked(decode, parts, o_read, i_block, K, BLOCK)
        b_top = tl.maximum(b_top, largest(b_y, 1))
    b_scale = scale_of(b_top, TOP)
    tl.store(p_out_scale + o_row, b_scale, mask=m_row)
    b_per_scale = tl.div_rn(1.0, b_scale)[:, None]
    for i_block in range(N_BLOCK):
        b_v = decode_masked(decode, parts, o_read, i_block, K, BLOCK) * b_per_scale
        b_q = encode_e4m3(b_v) if TO_E4M3 else round_to_int8(b_v)
        o_k = (i_block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        m_q = m_row[:, None] & (o_k < K)[None, :]
        tl.store(p_out + o_row[:, None] * stride_out + o_k[None, :], b_q, mask=m_q)
        p_t = p_out_t + o_k[:, None] * stride_t + o_row[None, :]
        tl.store(p_t, tl.trans(b_q), mask=tl.trans(m_q))


@triton.jit
def write_rows(
    decode: tl.constexpr, parts, p_out, p_out_scale, p_out_t, stride_out, stride_t, N,
    K: tl.constexpr, TO_E4M3: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The whole of a decoder's kernel.

    `decode(parts, o_row, i_block, K, BLOCK)` gives the columns [BLOCK · i_block, BLOCK ·
    (i_block + 1)) of the rows o_row, fp32; those from K on may hold anything.
    """
    if p_out_t is None:
        i_row, i_block = row_and_block(K, BLOCK)
        b_y = decode(parts, i_row + tl.arange(0, ROWS), i_block, K, BLOCK)
        o_k = i_block * BLOCK + tl.arange(0, BLOCK)
        b_y = tl.reshape(b_y, [BLOCK])
        store_row(b_y, i_row, o_k, p_out, p_out_scale, stride_out, K, TO_E4M3)
    else:
        write_both_ways(
            decode, parts, p_out, p_out_scale, p_out_t, stride_out, stride_t, N,
            K, TO_E4M3, ROWS, BLOCK,
        )  # fmt: skip


@functools.lru_cache(maxsize=64)
def weight_of_row(outs: tuple[int, ...], device: torch.device) -> Tensor:
    """Which of several weights, one below the other, each row belongs to: [Σ outs] int8.

    Made once, because a launch must not wait for a copy to the device.
    """
    numbers = torch.arange(len(outs), dtype=torch.int8)
    return constant(numbers.repeat_interleave(torch.tensor(outs)).to(device))


class DecoderLaunch(NamedTuple):
    """What decoders' launches share: grid, arguments behind a decoder's parts, launch numbers."""

    grid: tuple[int]
    outputs: tuple[Any, ...]
    numbers: dict[str, int]


def decoder_launch(
    out: Tensor, out_scale: Tensor | None, transposed: Tensor | None, width: int | None = None
) -> DecoderLaunch:
    """For a decoder whose kernel is `write_rows`.

    out [N, K]: in a float dtype it gets values; in int8 or float8_e4m3fn it gets codes, whose
    scales [N] fp32 go to out_scale. transposed [K, N], of out's dtype, gets the same codes in the
    other order. The rows of both may be any distance apart. width: the columns of a row with their
    padding, where parts have any.
    """
    rows, cols = out.shape
    assert (out.stride(1) == 1 or cols <= 1) and (out_scale is None) == (out.itemsize > 1)
    assert out_scale is None or (out_scale.shape == (rows,) and out_scale.is_contiguous())
    if transposed is None:
        op = "dequant" if out_scale is None else "dequant_quantized"
        numbers = {"ROWS": 1, **row_numbers(op, width or cols, arch_key(out.device))}
        programs = rows * cdiv(width or cols, numbers["BLOCK"])
    else:
        assert out_scale is not None and transposed.dtype == out.dtype
        assert transposed.shape == (cols, rows) and (transposed.stride(1) == 1 or rows <= 1)
        numbers = dict(launch_numbers(BOTH_WAYS, out.device))
        programs = cdiv(rows, numbers["ROWS"])
    is_e4m3 = out.dtype == torch.float8_e4m3fn
    q, t = (x.view(torch.int8) if is_e4m3 and x is not None else x for x in (out, transposed))
    strides = out.stride(0), 0 if transposed is None else transposed.stride(0)
    constants = {"K": cols, "TO_E4M3": int(is_e4m3), "enable_fp_fusion": False}
    return DecoderLaunch((programs,), (q, out_scale, t, *strides, rows), {**constants, **numbers})


def decoder_cases(
    decode: Any,
    parts: tuple[Any, ...],
    shape: tuple[int, int],
    name: str = "",
    outputs: tuple[torch.dtype, ...] = OUTPUTS,
) -> Iterator[AotCase]:
    """`decode(*parts, out, out_scale, transposed)` ahead of time, for each dtype of `outputs`."""
    for dtype in outputs:
        out = torch.empty(shape, dtype=dtype, device="meta")
        case = f"{name}{shape[1]}-{str(dtype).removeprefix('torch.')}"
        if out.itemsize > 1:
            yield case, partial(decode, *parts, out), EVERY_TARGET
            continue
        scaled = partial(decode, *parts, out, torch.empty(shape[0], device="meta"))
        yield case, scaled, EVERY_TARGET
        transposed = torch.empty(shape[::-1], dtype=dtype, device="meta")
        yield f"{case}-both", partial(scaled, transposed), BOTH_WAYS_TARGETS
