"""AdamW for many bf16 (or fp32) tensors in one launch, with stochastic rounding.

    m ← m + (1 - β1)(g - m),  v ← β2 v + (1 - β2) g²
    p ← p (1 - lr·weight_decay) - lr/(1 - β1^t) · m / (sqrt(v/(1 - β2^t)) + eps)

All of it is fp32, and each result is rounded once, where it is stored: to bf16 stochastically (16
random bits are added below its last one and the sum is cut off there, which keeps the mean), to
fp32 not at all. The bits are Philox's for the key `seed` and the counter (element, step), three of
its four words for the three results of two neighbours. They depend on nothing else: a resumed run
goes on bit for bit, and how tensors are cut into blocks does not matter.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels.aot import EVERY_TARGET, AotCase
from fluxfast_kernels.launch import OPTIM_LAUNCH, launch, launch_numbers
from fluxfast_kernels.update_tables import (
    TRITON_DTYPES,
    GradientTable,
    UpdateTable,
    gradient_table,
    pointer,
    update_table,
)


@triton.jit
def _round_stochastically(b_x, b_random):
    """fp32 numbers rounded to one of the two nearest that bf16 holds; b_random has 16 random bits.

    NaN stays NaN.
    """
    b_bits = (b_x.to(tl.int32, bitcast=True) + b_random) & -65536
    return tl.where(b_x == b_x, b_bits.to(tl.float32, bitcast=True), b_x)


@triton.jit
def _sixteen_bits(b_word):
    """The two halves of each word, for two neighbouring elements."""
    return tl.interleave(b_word & 0xFFFF, b_word >> 16).to(tl.int32)


@triton.jit
def _update(
    p_param, p_m, p_v, p_grad, o_x, m_x, OTHER: tl.constexpr, b_pair, beta1, beta2, eps, decay,
    step_size, bias2, seed, step,
    DTYPE: tl.constexpr,
):  # fmt: skip
    b_grad = tl.load(p_grad + o_x, mask=m_x, other=OTHER).to(tl.float32)
    b_m = tl.load(p_m + o_x, mask=m_x, other=OTHER).to(tl.float32)
    b_v = tl.load(p_v + o_x, mask=m_x, other=OTHER).to(tl.float32)
    b_p = tl.load(p_param + o_x, mask=m_x, other=OTHER).to(tl.float32)
    b_m += (1.0 - beta1) * (b_grad - b_m)
    b_v = beta2 * b_v + (1.0 - beta2) * b_grad * b_grad
    b_p = b_p * decay - step_size * b_m / (tl.sqrt(b_v) / bias2 + eps)
    if DTYPE.is_bf16():
        b_low = (b_pair & 0xFFFFFFFF).to(tl.uint32)
        b_high = (b_pair >> 32).to(tl.uint32)
        b_zero = tl.zeros_like(b_low)
        b_word_p, b_word_m, b_word_v, _ = tl.philox(
            seed, b_low, b_high, b_zero + step.to(tl.uint32), b_zero
        )
        b_p = _round_stochastically(b_p, _sixteen_bits(b_word_p))
        b_m = _round_stochastically(b_m, _sixteen_bits(b_word_m))
        b_v = _round_stochastically(b_v, _sixteen_bits(b_word_v))
    tl.store(p_param + o_x, b_p.to(DTYPE), mask=m_x)
    tl.store(p_m + o_x, b_m.to(DTYPE), mask=m_x)
    tl.store(p_v + o_x, b_v.to(DTYPE), mask=m_x)


@triton.jit(do_not_specialize=["seed", "step"])
def adamw_kernel(
    p_rows,
    p_grads,
    p_blocks,
    beta1,
    beta2,
    eps,
    decay,
    step_size,
    bias2,
    seed,
    step,
    DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # which tensor, and which block of it: programs of many small tensors run in one launch
    p_block = p_blocks + tl.program_id(0).to(tl.int64) * 2
    i_t = tl.load(p_block).to(tl.int64)
    i_first = tl.load(p_block + 1).to(tl.int64) * BLOCK
    p_row = p_rows + i_t * 5
    p_param = pointer(p_row, DTYPE, ALIGNED)
    p_m = pointer(p_row + 1, DTYPE, ALIGNED)
    p_v = pointer(p_row + 2, DTYPE, ALIGNED)
    p_grad = pointer(p_grads + i_t, GRAD_DTYPE, ALIGNED)
    b_size = tl.load(p_row + 3)
    o_x = i_first + tl.arange(0, BLOCK)
    b_pair = tl.load(p_row + 4) + i_first // 2 + tl.arange(0, BLOCK // 2)
    # a mask whose edge may lie anywhere would break every access into single elements: only the
    # last block has one
    if i_first + BLOCK <= b_size:
        _update(
            p_param, p_m, p_v, p_grad, o_x, None, None, b_pair, beta1, beta2, eps, decay, step_size,
            bias2, seed, step, DTYPE
        )  # fmt: skip
    else:
        m_x = o_x < b_size
        _update(
            p_param, p_m, p_v, p_grad, o_x, m_x, 0.0, b_pair, beta1, beta2, eps, decay, step_size,
            bias2, seed, step, DTYPE
        )  # fmt: skip


def adamw_table(
    params: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor]
) -> UpdateTable:
    """The table of the tensors that `adamw_step` updates.

    There is at least one, and all are contiguous, of one dtype and on one device. The table holds
    as long as none of them gets other memory. Raises ValueError if they are not contiguous, or not
    of one dtype, bf16 or fp32.
    """
    groups = list(zip(params, exp_avgs, exp_avg_sqs, strict=True))
    dtype, device = params[0].dtype, params[0].device
    for group in groups:
        if dtype not in TRITON_DTYPES or any(
            t.dtype != dtype or not t.is_contiguous() for t in group
        ):
            raise ValueError(
                "adamw: parameters and moments must be contiguous and of one dtype, bfloat16 or "
                "float32, got "
                f"{[(t.dtype, list(t.shape), list(t.stride())) for t in group]}"
            )
    block = launch_numbers(OPTIM_LAUNCH, device)["BLOCK"]
    return update_table((params, exp_avgs, exp_avg_sqs), block)


def adamw_step(
    table: UpdateTable,
    grads: GradientTable,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    seed: int,
) -> None:
    """One update of the table's tensors, in place; `step` counts from 1, `seed` is any int64."""
    (beta1, beta2), device = betas, table.rows.device
    launch(
        adamw_kernel, (table.blocks.shape[0],), table.rows, grads.addresses, table.blocks,
        float(beta1), float(beta2), float(eps), 1.0 - lr * weight_decay, lr / (1.0 - beta1**step),
        math.sqrt(1.0 - beta2**step), seed, step,
        DTYPE=TRITON_DTYPES[table.params[0].dtype], GRAD_DTYPE=TRITON_DTYPES[grads.dtype],
        ALIGNED=table.aligned and grads.aligned,
        **launch_numbers(OPTIM_LAUNCH, device),
    )  # fmt: skip


def aot_cases() -> Iterator[AotCase]:
    """What `fluxfast-bench aot` compiles of this op: launches at FLUX.1's sizes."""
    for dtype in (torch.bfloat16, torch.float32):
        tensors = [torch.empty(16, 3072, dtype=dtype, device="meta") for _ in range(4)]
        for aligned in (True, False):
            table = adamw_table(*([t] for t in tensors[:3]))._replace(aligned=aligned)
            update = partial(
                adamw_step,
                table,
                gradient_table(table, tensors[3:]),
                lr=1e-4,
                betas=(0.9, 0.999),
                eps=1e-6,
                weight_decay=0.01,
                step=7,
                seed=1 << 40,
            )
            name = str(dtype).removeprefix("torch.")
            yield name if aligned else f"{name}-unaligned", update, EVERY_TARGET
