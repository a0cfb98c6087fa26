"""Decoding nf4, the format of `fluxfast.quant.nf4`: blocks of 64 along the flattened weight.

A code is one of sixteen levels, and the max|w| of each block is quantised in turn:

    w = level[code] · (value[absmax] · nested_absmax + offset)
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels.aot import AotCase
from fluxfast_kernels.decoder import decoder_cases, decoder_launch, weight_of_row, write_rows
from fluxfast_kernels.launch import cdiv, launch

BLOCK_SIZE = tl.constexpr(64)
NESTED_BLOCK_SIZE = tl.constexpr(256)


@triton.jit
def absmax_of(parts, o_row, o_b, m_b):
    """max|w| [fp32] of the blocks o_b of the rows o_row; zero where it is masked."""
    _, p_absmax, p_nested, p_offset, _, p_value, p_weight = parts
    b_offset = tl.load(p_offset + tl.load(p_weight + o_row))[:, None]
    b_absmax = tl.load(p_value + (tl.load(p_absmax + o_b, mask=m_b, other=0).to(tl.int32) & 0xFF))
    b_absmax = (
        b_absmax * tl.load(p_nested + o_b // NESTED_BLOCK_SIZE, mask=m_b, other=0.0) + b_offset
    )
    return tl.where(m_b, b_absmax, 0.0)


@triton.jit
def decode_blocks(parts, o_row, i_block, K: tl.constexpr, BLOCK: tl.constexpr):
    """Columns [BLOCK · i_block, BLOCK · (i_block + 1)) fp32 of the rows o_row; zeros from K on.

    K is a multiple of BLOCK_SIZE.
    """
    p_packed, _, _, _, p_level, _, _ = parts
    o_b = i_block * (BLOCK // BLOCK_SIZE) + tl.arange(0, BLOCK // BLOCK_SIZE)[None, :]
    m_b = o_b < K // BLOCK_SIZE
    o_b = o_row[:, None] * (K // BLOCK_SIZE) + o_b
    o_byte = o_b[:, :, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, None, :]
    b_byte = tl.load(p_packed + o_byte, mask=m_b[:, :, None], other=0).to(tl.int32)
    # the even weight in the high bits; all sixteen levels lie in one line of the cache, so that a
    # warp reads them in one go
    b_w = tl.join(tl.load(p_level + ((b_byte >> 4) & 15)), tl.load(p_level + (b_byte & 15)))
    b_absmax = absmax_of(parts, o_row, o_b, m_b)
    return tl.reshape(b_w * b_absmax[:, :, None, None], [o_row.shape[0], BLOCK])


@triton.jit
def decode_weights(parts, o_row, i_block, K: tl.constexpr, BLOCK: tl.constexpr):
    """The same weight by weight, where a row begins within a block."""
    p_packed, _, _, _, p_level, _, _ = parts
    o_k = i_block * BLOCK + tl.arange(0, BLOCK)[None, :]
    m_w, o_w = o_k < K, o_row[:, None] * K + o_k
    b_byte = tl.load(p_packed + o_w // 2, mask=m_w, other=0).to(tl.int32)
    b_level = tl.load(p_level + ((b_byte >> (4 - (o_w % 2).to(tl.int32) * 4)) & 15))
    return b_level * absmax_of(parts, o_row, o_w // BLOCK_SIZE, m_w)


@triton.jit
def dequant_nf4_kernel(
    p_packed, p_absmax, p_nested, p_offset, p_level, p_value, p_weight,
    p_out, p_out_scale, p_out_t, stride_out, stride_t, N,
    K: tl.constexpr, TO_E4M3: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    write_rows(
        decode_blocks if ALIGNED else decode_weights,
        (p_packed, p_absmax, p_nested, p_offset, p_level, p_value, p_weight),
        p_out, p_out_scale, p_out_t, stride_out, stride_t, N, K, TO_E4M3, ROWS, BLOCK,
    )  # fmt: skip


def dequant_nf4(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    tables: tuple[Tensor, Tensor],
    out: Tensor,
    out_scale: Tensor | None = None,
    transposed: Tensor | None = None,
    outs: Sequence[int] = (),
) -> None:
    """Decodes nf4's parts into out [N, K]; blocks = ceil(N·K / 64).

    packed [ceil(N·K / 2)] and absmax [blocks] are uint8, nested_absmax [ceil(blocks / 256)] and
    offset [1] fp32. `tables` has the levels [16] and the values of absmax [256], fp32, on the
    weight's device. Of several weights, one below the other, `outs` are the rows of each, which
    fill whole nested blocks; offset has a number for each. Outputs as in `decoder_launch`.
    """
    blocks = cdiv(out.numel(), BLOCK_SIZE.value)
    assert packed.shape == (cdiv(out.numel(), 2),) and absmax.shape == (blocks,)
    assert nested_absmax.shape == (cdiv(blocks, NESTED_BLOCK_SIZE.value),)
    owners = weight_of_row(tuple(outs) or (len(out),), out.device)
    parts = (
        packed.view(torch.int8),
        absmax.view(torch.int8),
        nested_absmax,
        offset,
        *tables,
        owners,
    )
    is_aligned = int(out.shape[1] % BLOCK_SIZE.value == 0)
    grid, outputs, numbers = decoder_launch(out, out_scale, transposed)
    launch(dequant_nf4_kernel, grid, *parts, *outputs, ALIGNED=is_aligned, **numbers)


def aot_cases() -> Iterator[AotCase]:
    """What `fluxfast-bench aot` compiles of this op: launches at FLUX.1's sizes."""
    meta = partial(torch.empty, device="meta")
    tables = meta(16), meta(256)
    # the last one's rows begin within blocks
    for cols in (3072, 15360, 3000):
        blocks = cdiv(3072 * cols, BLOCK_SIZE.value)
        packed, absmax = meta(3072 * cols // 2, dtype=torch.uint8), meta(blocks, dtype=torch.uint8)
        nested, offset = meta(cdiv(blocks, NESTED_BLOCK_SIZE.value)), meta(1)
        yield from decoder_cases(
            dequant_nf4, (packed, absmax, nested, offset, tables), (3072, cols)
        )
