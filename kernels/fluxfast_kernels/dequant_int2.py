"""Decoding int2, the format of `fluxfast.quant.int2`: 16 columns share a scale and a zero.

The scale has 8 bits and the zero 4:

    w = global_scale · value(scale) · (5·code - zero)
    value(byte) = (1 + m/8) · 2^(e - 31),  byte = e·8 + m
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

GROUP = tl.constexpr(16)
UNIT = tl.constexpr(5)
# from a scale's byte to the bits of its value in fp32
SHIFT = tl.constexpr(20)
BIAS = tl.constexpr((127 - 31) << 3)


@triton.jit
def decode_int2(parts, o_row, i_block, K: tl.constexpr, BLOCK: tl.constexpr):
    """Columns [BLOCK · i_block, BLOCK · (i_block + 1)) fp32 of the rows o_row; zeros past K's last
    group.
    """
    p_packed, p_scale, p_zero, p_global_scale, p_weight = parts
    N_GROUP: tl.constexpr = (K + GROUP - 1) // GROUP
    o_g = i_block * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)[None, :]
    m_g = o_g < N_GROUP
    o_group = o_row[:, None] * N_GROUP + o_g
    o_byte = o_group[:, :, None] * (GROUP // 4) + tl.arange(0, GROUP // 4)[None, None, :]
    b_byte = tl.load(p_packed + o_byte, mask=m_g[:, :, None], other=0).to(tl.int32)
    b_scale = (tl.load(p_scale + o_group, mask=m_g, other=0).to(tl.int32) & 0xFF) + BIAS
    b_global = tl.load(p_global_scale + tl.load(p_weight + o_row))[:, None]
    b_scale = (b_scale << SHIFT).to(tl.float32, bitcast=True) * b_global
    o_zero = o_row[:, None] * ((N_GROUP + 1) // 2) + o_g // 2
    b_zero = tl.load(p_zero + o_zero, mask=m_g, other=0).to(tl.int32)
    # two groups a byte, the even one in the high bits
    b_zero = (b_zero >> (4 - o_g % 2 * 4)) & 15
    # four columns a byte, the first in the highest bits
    b_code = tl.join(
        tl.join((b_byte >> 6) & 3, (b_byte >> 2) & 3), tl.join((b_byte >> 4) & 3, b_byte & 3)
    )
    b_step = UNIT * b_code - b_zero[:, :, None, None, None]
    b_w = b_step.to(tl.float32) * tl.where(m_g, b_scale, 0.0)[:, :, None, None, None]
    return tl.reshape(b_w, [o_row.shape[0], BLOCK])


@triton.jit
def dequant_int2_kernel(
    p_packed, p_scale, p_zero, p_global_scale, p_weight,
    p_out, p_out_scale, p_out_t, stride_out, stride_t, N,
    K: tl.constexpr, TO_E4M3: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    write_rows(
        decode_int2, (p_packed, p_scale, p_zero, p_global_scale, p_weight),
        p_out, p_out_scale, p_out_t, stride_out, stride_t, N, K, TO_E4M3, ROWS, BLOCK,
    )  # fmt: skip


def dequant_int2(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    global_scale: Tensor,
    out: Tensor,
    out_scale: Tensor | None = None,
    transposed: Tensor | None = None,
    outs: Sequence[int] = (),
) -> None:
    """Decodes int2's parts into out [N, K]; groups = ceil(K / 16).

    packed [N, 4 · groups], scale [N, groups] and zero [N, ceil(groups / 2)] are uint8, global_scale
    [1] is fp32. Of several weights, one below the other, `outs` are the rows of each, and
    global_scale has a number for each. Outputs as in `decoder_launch`.
    """
    rows, groups = out.shape[0], cdiv(out.shape[1], GROUP.value)
    assert packed.shape == (rows, groups * GROUP.value // 4) and scale.shape == (rows, groups)
    assert zero.shape == (rows, cdiv(groups, 2))
    assert packed.is_contiguous() and scale.is_contiguous() and zero.is_contiguous()
    owners = weight_of_row(tuple(outs) or (rows,), out.device)
    parts = (*(part.view(torch.int8) for part in (packed, scale, zero)), global_scale, owners)
    grid, outputs, numbers = decoder_launch(out, out_scale, transposed, groups * GROUP.value)
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
