"""Decoding int2, the format of `fluxfast.quant.int2`: 16 columns share a scale and a zero.

The scale has 8 bits and the zero 4:

    w = global_scale · value(scale) · (5·code - zero)
    value(byte) = (1 + m/8) · 2^(e - 31),  byte = e·8 + m
"""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels.aot import AotCase
from fluxfast_kernels.dequant_rows import decoder_cases, decoder_launch, row_and_block, store_row
from fluxfast_kernels.launch import cdiv, launch

GROUP = tl.constexpr(16)
UNIT = tl.constexpr(5)
# from a scale's byte to the bits of its value in fp32
SHIFT = tl.constexpr(20)
BIAS = tl.constexpr((127 - 31) << 3)


@triton.jit
def decode_int2(p_packed, p_scale, p_zero, p_global_scale, i_row, o_g, n_group):
    """Columns [GROUP · len(o_g)] fp32 of a row's groups o_g; zeros past its n_group groups."""
    m_g = o_g < n_group
    o_group = i_row * n_group + o_g
    o_byte = o_group[:, None] * (GROUP // 4) + tl.arange(0, GROUP // 4)[None, :]
    b_byte = tl.load(p_packed + o_byte, mask=m_g[:, None], other=0).to(tl.int32)
    b_scale = (tl.load(p_scale + o_group, mask=m_g, other=0).to(tl.int32) & 0xFF) + BIAS
    b_scale = (b_scale << SHIFT).to(tl.float32, bitcast=True) * tl.load(p_global_scale)
    b_zero = tl.load(p_zero + i_row * ((n_group + 1) // 2) + o_g // 2, mask=m_g, other=0).to(
        tl.int32
    )
    # two groups a byte, the even one in the high bits
    b_zero = (b_zero >> (4 - o_g % 2 * 4)) & 15
    # four columns a byte, the first in the highest bits
    b_code = tl.join(
        tl.join((b_byte >> 6) & 3, (b_byte >> 2) & 3), tl.join((b_byte >> 4) & 3, b_byte & 3)
    )
    b_step = UNIT * b_code - b_zero[:, None, None, None]
    b_w = b_step.to(tl.float32) * tl.where(m_g, b_scale, 0.0)[:, None, None, None]
    return tl.reshape(b_w, [o_g.shape[0] * GROUP])


@triton.jit
def dequant_int2_kernel(
    p_packed, p_scale, p_zero, p_global_scale, p_out, p_out_scale,
    K: tl.constexpr, TO_E4M3: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_row, i_block = row_and_block(K, BLOCK)
    o_g = i_block * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    b_w = decode_int2(
        p_packed, p_scale, p_zero, p_global_scale, i_row, o_g, (K + GROUP - 1) // GROUP
    )
    store_row(b_w, i_row, i_block * BLOCK + tl.arange(0, BLOCK), p_out, p_out_scale, K, TO_E4M3)


def dequant_int2(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    global_scale: Tensor,
    out: Tensor,
    out_scale: Tensor | None = None,
) -> None:
    """Decodes int2's parts into out [N, K]; groups = ceil(K / 16).

    packed [N, 4 · groups], scale [N, groups] and zero [N, ceil(groups / 2)] are uint8, global_scale
    [1] is fp32. Outputs as in `dequant_rows`.
    """
    rows, groups = out.shape[0], cdiv(out.shape[1], GROUP.value)
    assert packed.shape == (rows, groups * GROUP.value // 4) and scale.shape == (rows, groups)
    assert zero.shape == (rows, cdiv(groups, 2))
    assert packed.is_contiguous() and scale.is_contiguous() and zero.is_contiguous()
    parts = (*(part.view(torch.int8) for part in (packed, scale, zero)), global_scale)
    grid, outputs, numbers = decoder_launch(out, out_scale, groups * GROUP.value)
    launch(dequant_int2_kernel, grid, *parts, *outputs, **numbers)


def aot_cases() -> Iterator[AotCase]:
    """What `fluxfast-bench aot` compiles of this op: launches at FLUX.1's sizes."""
    meta = partial(torch.empty, dtype=torch.uint8, device="meta")
    for cols in (3072, 15360):
        groups = cols // GROUP.value
        parts = (
            meta(3072, cols // 4),
            meta(3072, groups),
            meta(3072, groups // 2),
            meta(1, dtype=torch.float32),
        )
        yield from decoder_cases(dequant_int2, parts, (3072, cols))
