"""Decoding int4: 64 columns share a bf16 scale and a zero, w = scale · (16·code - zero): `fluxfast.quant.int4`'s format."""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels._launch import AOT_TARGETS, AotCase, record_variants
from fluxfast_kernels.dequant_rows import decoder_outputs, launch_decoder, store_row

GROUP = tl.constexpr(64)
UNIT = tl.constexpr(16)


@triton.jit
def decode_int4(p_packed, p_scale, p_zero, i_row, o_g, n_group):
    """Columns [GROUP · len(o_g)] fp32 of the groups o_g of row i_row; zeros past the last of its n_group groups."""
    m_g = o_g < n_group
    o_group = i_row * n_group + o_g
    o_byte = o_group[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
    b_byte = tl.load(p_packed + o_byte, mask=m_g[:, None], other=0).to(tl.int32)
    b_scale = tl.load(p_scale + o_group, mask=m_g, other=0.0).to(tl.float32)
    b_zero = tl.load(p_zero + o_group, mask=m_g, other=0).to(tl.int32) & 0xFF
    # the even column in the high bits
    b_code = tl.join((b_byte >> 4) & 15, b_byte & 15)
    b_step = UNIT * b_code - b_zero[:, None, None]
    return tl.reshape(b_step.to(tl.float32) * b_scale[:, None, None], [o_g.shape[0] * GROUP])


@triton.jit
def dequant_int4_kernel(
    p_packed, p_scale, p_zero, p_y, p_q, p_q_scale, K: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    i_row = tl.program_id(1).to(tl.int64)
    i_block = tl.program_id(0)
    o_g = i_block * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    b_w = decode_int4(p_packed, p_scale, p_zero, i_row, o_g, (K + GROUP - 1) // GROUP)
    o_k = i_block * BLOCK + tl.arange(0, BLOCK)
    store_row(b_w, o_k < K, o_k, i_row, K, p_y, p_q, p_q_scale)


def dequant_int4(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    cols: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    out: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The weight [N, cols] of packed [N, 32 · groups] uint8, scale [N, groups] bf16 and zero [N, groups] uint8.

    Outputs as `dequant_rows`.
    """
    rows, groups = scale.shape
    assert groups == -(-cols // GROUP.value) and packed.shape == (rows, groups * GROUP.value // 2) and zero.shape == scale.shape
    assert packed.is_contiguous() and scale.is_contiguous() and zero.is_contiguous()
    out, out_scale = decoder_outputs(rows, cols, dtype, packed.device, out, out_scale)
    parts = (packed.view(torch.int8), scale, zero.view(torch.int8))
    launch_decoder(dequant_int4_kernel, parts, groups * GROUP.value, out, out_scale)
    return out, out_scale


def _aot_cases() -> Iterator[AotCase]:
    meta = partial(torch.empty, device="meta")
    for cols in (3072, 15360):
        groups = cols // GROUP.value
        packed, zero = meta(3072, cols // 2, dtype=torch.uint8), meta(3072, groups, dtype=torch.uint8)
        scale = meta(3072, groups, dtype=torch.bfloat16)
        for dtype in (torch.bfloat16, torch.int8):
            name = f"{cols}-{str(dtype).removeprefix('torch.')}"
            yield name, partial(dequant_int4, packed, scale, zero, cols, dtype), tuple(AOT_TARGETS)


AOT_VARIANTS = record_variants(_aot_cases())
