"""Quantising to nf4, in blocks of 64 along the flattened weight.

A code is that of the nearest level; max|w| of each block stays fp32 here.
"""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels.aot import EVERY_TARGET, AotCase
from fluxfast_kernels.dequant_nf4 import BLOCK_SIZE
from fluxfast_kernels.launch import arch_key, cdiv, launch, row_numbers

# bitsandbytes bounds the inverse of max|w| with this, which is not a normal number
_LEAST_ABSMAX = tl.constexpr(1e-38)
# the code of zero: what the half of a byte holds that no weight belongs to
_ZERO = tl.constexpr(7)


@triton.jit
def quantize_nf4_kernel(
    p_w, p_packed, p_absmax, p_bound, n, HAS_REST: tl.constexpr, BLOCK: tl.constexpr
):
    i_block = tl.program_id(0).to(tl.int64) * (BLOCK // BLOCK_SIZE)
    o_b = i_block + tl.arange(0, BLOCK // BLOCK_SIZE)
    o_w = o_b[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    b_w = tl.load(p_w + o_w, mask=o_w < n, other=0.0).to(tl.float32)
    b_top = tl.max(b_w.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
    b_divisor = tl.where(b_top < _LEAST_ABSMAX, _LEAST_ABSMAX, b_top)
    b_v = b_w * tl.div_rn(1.0, b_divisor)[:, None]
    if HAS_REST:
        # the last, shorter block is divided by max|w|, not multiplied by its inverse
        b_is_last = (o_b + 1) * BLOCK_SIZE > n
        b_v = tl.where(b_is_last[:, None], tl.div_rn(b_w, b_divisor[:, None]), b_v)
        b_top = tl.where(b_is_last, b_divisor, b_top)
    b_v = tl.minimum(tl.maximum(b_v, -1.0), 1.0)
    b_code = tl.zeros(b_v.shape, tl.int32)
    # a tie goes to the lower code
    for i in tl.static_range(15):
        b_code += (tl.load(p_bound + i) < b_v).to(tl.int32)
    b_high, b_low = tl.split(
        tl.reshape(tl.where(o_w < n, b_code, _ZERO), [BLOCK // BLOCK_SIZE, BLOCK_SIZE // 2, 2])
    )
    o_byte = o_b[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
    tl.store(p_packed + o_byte, ((b_high << 4) | b_low).to(tl.int8), mask=o_byte * 2 < n)
    tl.store(p_absmax + o_b, b_top, mask=o_b * BLOCK_SIZE < n)


def quantize_nf4(weight: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [ceil(n / 2)] uint8 and max|w| of each block [ceil(n / 64)] fp32.

    Two codes share a byte, the even one in the high bits. weight: n numbers, contiguous; bounds
    [15] fp32, ascending: a code is the number of bounds below w / max|w|.
    """
    assert weight.is_contiguous() and bounds.shape == (15,)
    n = weight.numel()
    packed = torch.empty(cdiv(n, 2), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(cdiv(n, BLOCK_SIZE.value), device=weight.device)
    numbers = row_numbers("quantize_nf4", max(n, BLOCK_SIZE.value), arch_key(weight.device))
    launch(
        quantize_nf4_kernel, (cdiv(n, numbers["BLOCK"]),),
        weight, packed.view(torch.int8), absmax, bounds, n,
        HAS_REST=int(n % BLOCK_SIZE.value != 0), **numbers, enable_fp_fusion=False,
    )  # fmt: skip
    return packed, absmax


def aot_cases() -> Iterator[AotCase]:
    """What `fluxfast-bench aot` compiles of this op: launches at FLUX.1's sizes."""
    for dtype in (torch.bfloat16, torch.float32):
        weight, bounds = (
            torch.empty(3072 * 3072, dtype=dtype, device="meta"),
            torch.empty(15, device="meta"),
        )
        yield (
            str(dtype).removeprefix("torch."),
            partial(quantize_nf4, weight, bounds),
            EVERY_TARGET,
        )
