"""Decoding nf4: blocks of 64 along the flattened weight, sixteen levels, max|w| quantised in turn (`fluxfast.quant.nf4`).

w = level[code] · (value[absmax] · nested_absmax + offset)
"""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels._launch import AOT_TARGETS, AotCase, cdiv, record_variants
from fluxfast_kernels.dequant_rows import decoder_outputs, launch_decoder, store_row
from fluxfast_kernels.row_quant import row_quant

BLOCK_SIZE = tl.constexpr(64)
NESTED_BLOCK_SIZE = tl.constexpr(256)


@triton.jit
def decode_nf4(p_packed, p_absmax, p_nested, p_offset, p_level, p_value, o_b, n_byte):
    """Weights [BLOCK_SIZE · len(o_b)] fp32 of the blocks o_b; zeros in blocks that begin past the last of n_byte bytes."""
    m_b = o_b * (BLOCK_SIZE // 2) < n_byte
    o_byte = o_b[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
    b_byte = tl.load(p_packed + o_byte, mask=o_byte < n_byte, other=0).to(tl.int32)
    b_absmax = tl.load(p_value + (tl.load(p_absmax + o_b, mask=m_b, other=0).to(tl.int32) & 0xFF))
    b_absmax = b_absmax * tl.load(p_nested + o_b // NESTED_BLOCK_SIZE, mask=m_b, other=0.0) + tl.load(p_offset)
    # the even weight in the high bits; all sixteen levels lie in one line of the cache, so that a warp reads them in one go
    b_w = tl.join(tl.load(p_level + ((b_byte >> 4) & 15)), tl.load(p_level + (b_byte & 15)))
    return tl.reshape(b_w * tl.where(m_b, b_absmax, 0.0)[:, None, None], [o_b.shape[0] * BLOCK_SIZE])


@triton.jit
def dequant_nf4_kernel(
    p_packed, p_absmax, p_nested, p_offset, p_level, p_value, n_byte, p_y, p_q, p_q_scale, K: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    i_row = tl.program_id(1).to(tl.int64)
    o_k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # a row begins with a block
    o_b = i_row * (K // BLOCK_SIZE) + tl.program_id(0) * (BLOCK // BLOCK_SIZE) + tl.arange(0, BLOCK // BLOCK_SIZE)
    b_w = decode_nf4(p_packed, p_absmax, p_nested, p_offset, p_level, p_value, o_b, n_byte)
    store_row(b_w, o_k < K, o_k, i_row, K, p_y, p_q, p_q_scale)


def dequant_nf4(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    shape: tuple[int, int],
    tables: tuple[Tensor, Tensor],
    dtype: torch.dtype = torch.bfloat16,
    *,
    out: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The weight [N, K] of packed [ceil(N·K / 2)] and absmax [blocks] uint8, nested_absmax [ceil(blocks / 256)] and offset [1].

    `tables`: the levels [16] and the values of absmax [256], fp32, on the weight's device. Outputs as `dequant_rows`. Codes of
    rows that don't begin with a block are made in two passes.
    """
    rows, cols = shape
    blocks = -(-rows * cols // BLOCK_SIZE.value)
    assert packed.shape == (-(-rows * cols // 2),) and absmax.shape == (blocks,)
    assert nested_absmax.shape == (-(-blocks // NESTED_BLOCK_SIZE.value),)
    aligned = cols % BLOCK_SIZE.value == 0
    if dtype == torch.int8 and not aligned:
        values, _ = dequant_nf4(packed, absmax, nested_absmax, offset, shape, tables, torch.float32)
        return row_quant(values, "int8")
    out, out_scale = decoder_outputs(rows, cols, dtype, packed.device, out, out_scale)
    parts = (packed.view(torch.int8), absmax.view(torch.int8), nested_absmax, offset, *tables, packed.numel())
    flat = out if aligned else out.view(1, -1)
    launch_decoder(dequant_nf4_kernel, parts, cdiv(flat.shape[1], BLOCK_SIZE.value) * BLOCK_SIZE.value, flat, out_scale)
    return out, out_scale


def _aot_cases() -> Iterator[AotCase]:
    meta = partial(torch.empty, device="meta")
    tables = meta(16), meta(256)
    for cols in (3072, 15360):
        blocks = 3072 * cols // BLOCK_SIZE.value
        packed, absmax = meta(3072 * cols // 2, dtype=torch.uint8), meta(blocks, dtype=torch.uint8)
        nested, offset = meta(blocks // NESTED_BLOCK_SIZE.value), meta(1)
        for dtype in (torch.bfloat16, torch.int8):
            name = f"{cols}-{str(dtype).removeprefix('torch.')}"
            yield name, partial(dequant_nf4, packed, absmax, nested, offset, (3072, cols), tables, dtype), tuple(AOT_TARGETS)


AOT_VARIANTS = record_variants(_aot_cases())
