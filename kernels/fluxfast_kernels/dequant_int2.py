"""Decoding int2: 16 columns share an 8-bit scale and a 4-bit zero, the format of `fluxfast.quant.int2`.

w = global_scale · value(scale) · (5·code - zero),    value(byte) = (1 + m/8) · 2^(e - 31), byte = e·8 + m
"""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels._launch import AOT_TARGETS, AotCase, record_variants
from fluxfast_kernels.dequant_rows import decoder_outputs, launch_decoder, store_row

GROUP = tl.constexpr(16)
UNIT = tl.constexpr(5)
# from a scale's byte to the bits of its value in fp32
SHIFT = tl.constexpr(20)
BIAS = tl.constexpr((127 - 31) << 3)


@triton.jit
def decode_int2(p_packed, p_scale, p_zero, p_global_scale, i_row, o_g, n_group):
    """Columns [GROUP · len(o_g)] fp32 of the groups o_g of row i_row; zeros past the last of its n_group groups."""
    m_g = o_g < n_group
    o_group = i_row * n_group + o_g
    o_byte = o_group[:, None] * (GROUP // 4) + tl.arange(0, GROUP // 4)[None, :]
    b_byte = tl.load(p_packed + o_byte, mask=m_g[:, None], other=0).to(tl.int32)
    b_scale = (tl.load(p_scale + o_group, mask=m_g, other=0).to(tl.int32) & 0xFF) + BIAS
    b_scale = (b_scale << SHIFT).to(tl.float32, bitcast=True) * tl.load(p_global_scale)
    b_zero = tl.load(p_zero + i_row * ((n_group + 1) // 2) + o_g // 2, mask=m_g, other=0).to(tl.int32)
    # two groups a byte, the even one in the high bits
    b_zero = (b_zero >> (4 - o_g % 2 * 4)) & 15
    # four columns a byte, the first in the highest bits
    b_code = tl.join(tl.join((b_byte >> 6) & 3, (b_byte >> 2) & 3), tl.join((b_byte >> 4) & 3, b_byte & 3))
    b_step = UNIT * b_code - b_zero[:, None, None, None]
    b_w = b_step.to(tl.float32) * tl.where(m_g, b_scale, 0.0)[:, None, None, None]
    return tl.reshape(b_w, [o_g.shape[0] * GROUP])


@triton.jit
def dequant_int2_kernel(
    p_packed, p_scale, p_zero, p_global_scale, p_y, p_q, p_q_scale, K: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    i_row = tl.program_id(1).to(tl.int64)
    i_block = tl.program_id(0)
    o_g = i_block * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    b_w = decode_int2(p_packed, p_scale, p_zero, p_global_scale, i_row, o_g, (K + GROUP - 1) // GROUP)
    o_k = i_block * BLOCK + tl.arange(0, BLOCK)
    store_row(b_w, o_k < K, o_k, i_row, K, p_y, p_q, p_q_scale)


def dequant_int2(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    global_scale: Tensor,
    cols: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    out: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The weight [N, cols] of packed [N, 4 · groups], scale [N, groups], zero [N, ceil(groups / 2)] uint8 and global_scale [1].

    Outputs as `dequant_rows`.
    """
    rows, groups = scale.shape
    assert groups == -(-cols // GROUP.value) and packed.shape == (rows, groups * GROUP.value // 4)
    assert zero.shape == (rows, -(-groups // 2))
    assert packed.is_contiguous() and scale.is_contiguous() and zero.is_contiguous()
    out, out_scale = decoder_outputs(rows, cols, dtype, packed.device, out, out_scale)
    parts = (*(part.view(torch.int8) for part in (packed, scale, zero)), global_scale)
    launch_decoder(dequant_int2_kernel, parts, groups * GROUP.value, out, out_scale)
    return out, out_scale


def _aot_cases() -> Iterator[AotCase]:
    meta = partial(torch.empty, dtype=torch.uint8, device="meta")
    for cols in (3072, 15360):
        groups = cols // GROUP.value
        parts = meta(3072, cols // 4), meta(3072, groups), meta(3072, groups // 2), meta(1, dtype=torch.float32)
        for dtype in (torch.bfloat16, torch.int8):
            name = f"{cols}-{str(dtype).removeprefix('torch.')}"
            yield name, partial(dequant_int2, *parts, cols, dtype), tuple(AOT_TARGETS)


AOT_VARIANTS = record_variants(_aot_cases())
