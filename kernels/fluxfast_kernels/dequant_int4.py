"""Decoding int4, the format of `fluxfast.quant.int4`: 64 columns share a scale and a zero.

    w = scale · (16·code - zero)

The scale is bf16, the zero a byte.
"""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels.aot import AotCase
from fluxfast_kernels.decoder import decoder_cases, decoder_launch, write_rows
from fluxfast_kernels.launch import cdiv, launch

GROUP = tl.constexpr(64)
UNIT = tl.constexpr(16)


@triton.jit
def decode_int4(parts, o_row, i_block, K: tl.constexpr, BLOCK: tl.constexpr):
    """Columns [BLOCK · i_block, BLOCK · (i_block + 1)) fp32 of the rows o_row; zeros past K's last
    group.
    """
    p_packed, p_scale, p_zero = parts
    N_GROUP: tl.constexpr = (K + GROUP - 1) // GROUP
    o_g = i_block * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    m_g = (o_g < N_GROUP)[None, :]
    o_group = o_row[:, None] * N_GROUP + o_g[None, :]
    o_byte = o_group[:, :, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, None, :]
    b_byte = tl.load(p_packed + o_byte, mask=m_g[:, :, None], other=0).to(tl.int32)
    b_scale = tl.load(p_scale + o_group, mask=m_g, other=0.0).to(tl.float32)
    b_zero = tl.load(p_zero + o_group, mask=m_g, other=0).to(tl.int32) & 0xFF
    # the even column in the high bits
    b_code = tl.join((b_byte >> 4) & 15, b_byte & 15)
    b_step = UNIT * b_code - b_zero[:, :, None, None]
    return tl.reshape(b_step.to(tl.float32) * b_scale[:, :, None, None], [o_row.shape[0], BLOCK])


@triton.jit
def dequant_int4_kernel(
    p_packed, p_scale, p_zero, p_out, p_out_scale, p_out_t, stride_out, stride_t, N,
    K: tl.constexpr, TO_E4M3: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    write_rows(
        decode_int4, (p_packed, p_scale, p_zero),
        p_out, p_out_scale, p_out_t, stride_out, stride_t, N, K, TO_E4M3, ROWS, BLOCK,
    )  # fmt: skip


def dequant_int4(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    out: Tensor,
    out_scale: Tensor | None = None,
    transposed: Tensor | None = None,
) -> None:
    """Decodes int4's parts into out [N, K]; groups = ceil(K / 64).

    packed [N, 32 · groups] and zero [N, groups] are uint8, scale [N, groups] is bf16. Outputs as in
    `decoder_launch`.
    """
    rows, groups = out.shape[0], cdiv(out.shape[1], GROUP.value)
    assert packed.shape == (rows, groups * GROUP.value // 2) and scale.shape == zero.shape == (
        rows,
        groups,
    )
    assert packed.is_contiguous() and scale.is_contiguous() and zero.is_contiguous()
    parts = (packed.view(torch.int8), scale, zero.view(torch.int8))
    grid, outputs, numbers = decoder_launch(out, out_scale, transposed, groups * GROUP.value)
    launch(dequant_int4_kernel, grid, *parts, *outputs, **numbers)


def aot_cases() -> Iterator[AotCase]:
    """What `fluxfast-bench aot` compiles of this op: launches at FLUX.1's sizes."""
    meta = partial(torch.empty, dtype=torch.uint8, device="meta")
    for cols in (3072, 15360):
        groups = cols // GROUP.value
        parts = meta(3072, cols // 2), meta(3072, groups, dtype=torch.bfloat16), meta(3072, groups)
        yield from decoder_cases(dequant_int4, parts, (3072, cols))
