"""Quantising to int4 and int2: for each group of columns the grid of the least squared error.

The search, its names, and why its sums may run in any order are in `fluxfast.quant.affine`, and its
numbers in `Int4` and `Int2`. The bytes are the same as the reference's: the kernel is launched
without contraction of a·b + c, and every division is IEEE's.
"""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels.aot import EVERY_TARGET, AotCase
from fluxfast_kernels.decoder import round_to_bf16, row_and_block
from fluxfast_kernels.dequant_int2 import BIAS, SHIFT
from fluxfast_kernels.launch import arch_key, cdiv, launch, row_numbers

_ROUND = tl.constexpr(12582912.0)
_INFINITY = tl.constexpr(0x7F800000)
# half of the last bit that a scale's byte keeps
_HALF = tl.constexpr(1 << 19)


@triton.jit
def _round(b):
    return (b + _ROUND) - _ROUND


@triton.jit
def _clamp(b, TOP: tl.constexpr):
    return tl.minimum(tl.maximum(b, 0.0), TOP)


@triton.jit
def _inverse(b):
    """1 / b, and 0 of 0."""
    return tl.where(b > 0.0, tl.div_rn(1.0, tl.where(b > 0.0, b, 1.0)), 0.0)


@triton.jit
def _codes(b_u, b_per_size, b_z, TOP: tl.constexpr):
    return _round(_clamp(b_u * b_per_size[:, None] + b_z[:, None], TOP))


@triton.jit
def _store_scale(b_scale, p_global_scale):
    """What a scale is stored as [int32], and the value that this stands for.

    Without a global scale it is int4's bf16, with one int2's byte.
    """
    if p_global_scale is None:
        b_stored = round_to_bf16(b_scale)
        return b_stored, (b_stored << 16).to(tl.float32, bitcast=True)
    else:
        b_global = tl.load(p_global_scale)
        b_bits = (b_scale * tl.div_rn(1.0, b_global)).to(tl.int32, bitcast=True) + _HALF
        b_stored = tl.minimum(tl.maximum((b_bits >> SHIFT) - BIAS, 0), 255)
        return b_stored, ((b_stored + BIAS) << SHIFT).to(tl.float32, bitcast=True) * b_global


@triton.jit
def quantize_affine_kernel(
    p_w,
    p_packed,
    p_scale,
    p_zero,
    p_global_scale,
    stride_w,
    least_step,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    TOP: tl.constexpr,
    UNIT: tl.constexpr,
    PER_GRAIN: tl.constexpr,
    SHRINKS: tl.constexpr,
    REFITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    GROUPS: tl.constexpr = BLOCK // GROUP
    N_GROUP: tl.constexpr = (K + GROUP - 1) // GROUP
    i_row, i_block = row_and_block(N_GROUP * GROUP, BLOCK)
    o_g = i_block * GROUPS + tl.arange(0, GROUPS)
    m_g = o_g < N_GROUP
    o_k = o_g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    b_w = tl.load(p_w + i_row * stride_w + o_k, mask=o_k < K, other=0.0).to(tl.float32)
    # as integers, magnitudes keep their order, and NaN and infinity come out on top
    b_top = tl.max(b_w.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    b_low = tl.minimum(tl.min(b_w, axis=1), 0.0)
    b_high = tl.maximum(tl.max(b_w, axis=1), 0.0)
    if p_global_scale is not None:
        least_step = tl.maximum(
            tl.load(p_global_scale) * (UNIT * 2.3283064365386963e-10), least_step
        )
    b_step = b_high * (1.0 / TOP) - b_low * (1.0 / TOP)
    b_step = tl.where(b_step < least_step, 0.0, b_step)
    b_per_step = _inverse(b_step)
    # weights in units of the step, on a grain so coarse that all sums below are exact in fp32
    b_u = _round(b_w * b_per_step[:, None] * PER_GRAIN) * (1.0 / PER_GRAIN)
    b_u_low, b_u_high, b_u_sum = b_low * b_per_step, b_high * b_per_step, tl.sum(b_u, axis=1)

    b_least = tl.full([GROUPS], 1e38, tl.float32)
    b_best_stored = tl.zeros([GROUPS], tl.int32)
    b_best_zero = tl.zeros([GROUPS], tl.float32)
    b_best_per_size = tl.zeros([GROUPS], tl.float32)
    # the search starts from every pair of shrunk ends; each grid is fitted to its own codes REFITS
    # times
    for i in tl.static_range(len(SHRINKS) * len(SHRINKS)):
        b_start = b_u_low * SHRINKS[i // len(SHRINKS)]
        b_size = (b_u_high * SHRINKS[i % len(SHRINKS)] - b_start) * (1.0 / TOP)
        for _ in tl.static_range(REFITS + 1):
            b_stored, b_scale = _store_scale(b_size * b_step * (1.0 / UNIT), p_global_scale)
            b_size = b_scale * UNIT * b_per_step
            b_per_size = _inverse(b_size)
            b_zero = _round(_clamp(-b_start * b_per_size * UNIT, UNIT * TOP))
            b_z = b_zero * (1.0 / UNIT)
            b_q = _codes(b_u, b_per_size, b_z, TOP)
            b_q_sum, b_qq_sum, b_uq_sum = (
                tl.sum(b_q, axis=1),
                tl.sum(b_q * b_q, axis=1),
                tl.sum(b_u * b_q, axis=1),
            )
            b_error = (b_size * b_size) * ((b_qq_sum - 2.0 * b_z * b_q_sum) + GROUP * (b_z * b_z))
            b_error -= 2.0 * b_size * (b_uq_sum - b_z * b_u_sum)
            # of equal errors the first one found stays, as in the reference
            b_better = b_error < b_least
            b_least = tl.where(b_better, b_error, b_least)
            b_best_stored = tl.where(b_better, b_stored, b_best_stored)
            b_best_zero = tl.where(b_better, b_zero, b_best_zero)
            b_best_per_size = tl.where(b_better, b_per_size, b_best_per_size)
            # least squares: the line through (code, weight)
            b_covariance = GROUP * b_uq_sum - b_u_sum * b_q_sum
            b_variance = GROUP * b_qq_sum - b_q_sum * b_q_sum
            b_fits = (b_covariance > 0.0) & (b_variance > 0.0)
            b_fitted = tl.div_rn(b_covariance, tl.where(b_fits, b_variance, 1.0))
            b_start = tl.where(
                b_fits, (b_u_sum - b_fitted * b_q_sum) * (1.0 / GROUP), -(b_z * b_size)
            )
            b_size = tl.where(b_fits, b_fitted, b_size)

    b_code = _codes(b_u, b_best_per_size, b_best_zero * (1.0 / UNIT), TOP).to(tl.int32)
    o_group = i_row * N_GROUP + o_g
    if p_global_scale is None:
        # what isn't finite shows in the scale
        tl.store(
            p_scale + o_group,
            tl.where(b_top >= _INFINITY, 0x7F80, b_best_stored).to(tl.int16),
            mask=m_g,
        )
        tl.store(p_zero + o_group, b_best_zero.to(tl.int32).to(tl.int8), mask=m_g)
        b_high_code, b_low_code = tl.split(tl.reshape(b_code, [GROUPS, GROUP // 2, 2]))
        b_byte = (b_high_code << 4) | b_low_code
        o_byte = o_group[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
    else:
        tl.store(p_scale + o_group, b_best_stored.to(tl.int8), mask=m_g)
        b_even, b_odd = tl.split(tl.reshape(b_best_zero.to(tl.int32), [GROUPS // 2, 2]))
        o_pair = i_block * (GROUPS // 2) + tl.arange(0, GROUPS // 2)
        p_pair = p_zero + i_row * ((N_GROUP + 1) // 2) + o_pair
        tl.store(p_pair, ((b_even << 4) | b_odd).to(tl.int8), mask=o_pair * 2 < N_GROUP)
        b_02, b_13 = tl.split(tl.reshape(b_code, [GROUPS, GROUP // 4, 2, 2]))
        b_0, b_2 = tl.split(b_02)
        b_1, b_3 = tl.split(b_13)
        b_byte = (b_0 << 6) | (b_1 << 4) | (b_2 << 2) | b_3
        o_byte = o_group[:, None] * (GROUP // 4) + tl.arange(0, GROUP // 4)[None, :]
    tl.store(p_packed + o_byte, b_byte.to(tl.int8), mask=m_g[:, None])


def quantize_affine(
    weight: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    global_scale: Tensor | None,
    *,
    group: int,
    top: int,
    unit: int,
    grain: float,
    shrinks: tuple[float, ...],
    refits: int,
    least_step: float,
) -> None:
    """Quantises weight [N, K] into the parts given: int4's, or with a global scale int2's.

    The rows of the weight may lie any distance apart. The other arguments are the fields of
    `fluxfast.quant.affine.Affine`, and the step below which a group becomes zeros.
    """
    rows, cols = weight.shape
    assert weight.stride(1) == 1 and scale.shape == (rows, cdiv(cols, group))
    numbers = row_numbers(
        "quantize_affine", max(scale.shape[1], 2) * group, arch_key(weight.device)
    )
    launch(
        quantize_affine_kernel, (rows * cdiv(scale.shape[1] * group, numbers["BLOCK"]),),
        weight, packed.view(torch.int8),
        scale.view(torch.int16 if global_scale is None else torch.int8),
        zero.view(torch.int8), global_scale, weight.stride(0), least_step,
        K=cols, GROUP=group, TOP=top, UNIT=unit, PER_GRAIN=1 / grain, SHRINKS=shrinks,
        REFITS=refits,
        **numbers, enable_fp_fusion=False,
    )  # fmt: skip


def aot_cases() -> Iterator[AotCase]:
    """What `fluxfast-bench aot` compiles of this op: launches at FLUX.1's sizes."""
    meta = partial(torch.empty, device="meta")
    byte = partial(meta, dtype=torch.uint8)
    search = partial(quantize_affine, least_step=2.0**-100)
    int4 = partial(search, group=64, top=15, unit=16, grain=2**-8, shrinks=(1.0, 0.92), refits=2)
    int2 = partial(
        search, group=16, top=3, unit=5, grain=2**-10, shrinks=(1.0, 0.75, 0.5), refits=1
    )
    n, k = 3072, 3072
    scale4 = meta(n, k // 64, dtype=torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        weight, name = meta(n, k, dtype=dtype), str(dtype).removeprefix("torch.")
        yield (
            f"int4-{name}",
            partial(int4, weight, byte(n, k // 2), scale4, byte(n, k // 64), None),
            EVERY_TARGET,
        )
        parts = byte(n, k // 4), byte(n, k // 16), byte(n, k // 32), meta(1)
        yield f"int2-{name}", partial(int2, weight, *parts), EVERY_TARGET
