"""Quantising rows of weights to e4m3fn codes, by their bits.

`row_quant` needs a GPU that has the type; a weight that is only stored does not.
"""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels.aot import EVERY_TARGET, AotCase
from fluxfast_kernels.launch import arch_key, launch, row_numbers
from fluxfast_kernels.row_quant import check_rows, largest, scale_of

_ROUND = tl.constexpr(12582912.0)


@triton.jit
def encode_e4m3(b_x):
    """Codes [int8] of fp32 numbers that round to 448 or less; to nearest, halves to even."""
    b_bits = b_x.to(tl.int32, bitcast=True)
    b_size = b_bits & 0x7FFFFFFF
    # the exponent's bias differs by 120
    b_normal = (b_size + 0x7FFFF + ((b_size >> 20) & 1) - (120 << 23)) >> 20
    # below 2^-6 the unit is 2^-9
    b_subnormal = (b_size.to(tl.float32, bitcast=True) * 512.0 + _ROUND).to(
        tl.int32, bitcast=True
    ) & 0xFF
    return (tl.where(b_size < (121 << 23), b_subnormal, b_normal) | ((b_bits >> 24) & 0x80)).to(
        tl.int8
    )


@triton.jit
def quantize_row_e4m3(b_w):
    """Codes [int8] and the scale of one row; b_w [BLOCK] fp32 is zero where it is masked."""
    b_scale = scale_of(largest(b_w, 0), 448.0)
    return encode_e4m3(b_w * tl.div_rn(1.0, b_scale)), b_scale


@triton.jit
def quantize_e4m3_kernel(p_w, p_q, p_scale, stride_w, K: tl.constexpr, BLOCK: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BLOCK)
    m_k = o_k < K
    b_w = tl.load(p_w + i_row * stride_w + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_q, b_scale = quantize_row_e4m3(b_w)
    tl.store(p_q + i_row * K + o_k, b_q, mask=m_k)
    tl.store(p_scale + i_row, b_scale)


def quantize_e4m3(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [N, K] float8_e4m3fn and scales [N] fp32 of weight [N, K], rows any distance apart.

    scale = max|w| / 448, or 1 where that is no normal number; code = e4m3(w · (1/scale)).
    """
    check_rows("quantize_e4m3", weight=weight)
    rows, cols = weight.shape
    codes = torch.empty((rows, cols), dtype=torch.float8_e4m3fn, device=weight.device)
    scale = torch.empty(rows, device=weight.device)
    numbers = row_numbers("row_quant", cols, arch_key(weight.device))
    launch(
        quantize_e4m3_kernel, (rows,),
        weight, codes.view(torch.int8), scale, weight.stride(0), K=cols, **numbers,
        enable_fp_fusion=False,
    )  # fmt: skip
    return codes, scale


def aot_cases() -> Iterator[AotCase]:
    """What `fluxfast-bench aot` compiles of this op: launches at FLUX.1's sizes."""
    for cols in (3072, 15360):
        weight = torch.empty(3072, cols, dtype=torch.bfloat16, device="meta")
        yield f"bf16-{cols}", partial(quantize_e4m3, weight), EVERY_TARGET
