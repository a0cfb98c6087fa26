"""LayerNorm without an affine part, then a modulation a sample: forward and backward.

    y = xhat·(1 + scale) + shift,  xhat = (x - mean)·rstd
    dx = rstd·(g - mean(g) - xhat·mean(g·xhat)),  g = dy·(1 + scale)

One program holds one row of x in registers, so that x is read once. Three more things can be done
in the same pass, each of which saves the reads and writes of an op of its own: y is quantised
(`row_quant.quantize_row`); the gated residual before the norm, x = residual + gate·branch, is
computed first, and its backward last; the gradient that reaches x past the norm is added to dx. The
sums over tokens (dscale, dshift, dgate) are added up over ROWS rows by a program, and the partial
sums afterwards, so the same inputs give the same bits.

Shapes: x, y, dy, dx, branch [B, S, D]; scale, shift, gate [B, D], at any distance from sample to
sample (chunks of one modulation vector); mean, rstd [B, S] fp32. Rows may lie any distance apart.
All arithmetic is fp32.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels.aot import EVERY_TARGET, AotCase
from fluxfast_kernels.launch import arch_key, cdiv, launch, row_numbers
from fluxfast_kernels.row_quant import (
    OUTPUTS,
    check_rows,
    empty_outputs,
    quantize_row,
    row_strides,
    targets_of,
)


class LayerNormOut(NamedTuple):
    """What forward returns.

    y [B, S, D], its codes and their scales [B, S], each None where it was not asked for; mean and
    reciprocal standard deviation [B, S]; x [B, S, D] where the gated residual made it.
    """

    y: Tensor | None
    q: Tensor | None
    q_scale: Tensor | None
    mean: Tensor
    rstd: Tensor
    x: Tensor | None


class LayerNormGrads(NamedTuple):
    """What backward returns.

    dx [B, S, D] is the residual's gradient too. The rest comes where it was asked for, and is None
    else: dscale, dshift and dgate [B, D], the branch's gradient [B, S, D], its codes, and their
    scales [B, S].
    """

    dx: Tensor
    dscale: Tensor | None
    dshift: Tensor | None
    dgate: Tensor | None
    dbranch: Tensor | None
    dbranch_q: Tensor | None
    dbranch_q_scale: Tensor | None


@triton.jit(do_not_specialize=["S"])
def modulated_layer_norm_fwd_kernel(
    p_x,
    p_gate,
    p_branch,
    p_scale,
    p_shift,
    p_sum,
    p_y,
    p_q,
    p_q_scale,
    p_mean,
    p_rstd,
    stride_x_b,
    stride_x_s,
    stride_gate_b,
    stride_branch_b,
    stride_branch_s,
    stride_scale_b,
    stride_shift_b,
    S,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_s = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(1).to(tl.int64)
    i_row = i_b * S + i_s
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D

    b_x = tl.load(p_x + i_b * stride_x_b + i_s * stride_x_s + o_d, mask=m_d, other=0.0).to(
        tl.float32
    )
    if p_gate is not None:
        b_gate = tl.load(p_gate + i_b * stride_gate_b + o_d, mask=m_d, other=0.0).to(tl.float32)
        p_branch_row = p_branch + i_b * stride_branch_b + i_s * stride_branch_s
        b_x += b_gate * tl.load(p_branch_row + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_sum = b_x.to(p_sum.dtype.element_ty)
        tl.store(p_sum + i_row * D + o_d, b_sum, mask=m_d)
        # backward sees the rounded sum, so normalise that one
        b_x = b_sum.to(tl.float32)

    # the variance from centred values, of which x is still in registers: E[x²] - mean² would cancel
    b_mean = tl.sum(b_x, axis=0) / D
    b_centred = tl.where(m_d, b_x - b_mean, 0.0)
    b_rstd = tl.rsqrt(tl.sum(b_centred * b_centred, axis=0) / D + eps)
    b_scale = tl.load(p_scale + i_b * stride_scale_b + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_shift = tl.load(p_shift + i_b * stride_shift_b + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_y = b_centred * b_rstd * (1.0 + b_scale) + b_shift

    if p_y is not None:
        tl.store(p_y + i_row * D + o_d, b_y.to(p_y.dtype.element_ty), mask=m_d)
    if p_q is not None:
        b_q, b_q_scale = quantize_row(b_y, p_q.dtype.element_ty)
        tl.store(p_q + i_row * D + o_d, b_q, mask=m_d)
        tl.store(p_q_scale + i_row, b_q_scale)
    tl.store(p_mean + i_row, b_mean)
    tl.store(p_rstd + i_row, b_rstd)


@triton.jit(do_not_specialize=["S"])
def modulated_layer_norm_bwd_kernel(
    p_dy,
    p_x,
    p_scale,
    p_mean,
    p_rstd,
    p_add,
    p_gate,
    p_branch,
    p_col_scale,
    p_dx,
    p_dbranch,
    p_q,
    p_q_scale,
    p_partial,
    stride_dy_b,
    stride_dy_s,
    stride_x_b,
    stride_x_s,
    stride_scale_b,
    stride_add_b,
    stride_add_s,
    stride_gate_b,
    stride_branch_b,
    stride_branch_s,
    S,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    i_blk = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    # what belongs to the sample stays in registers for all ROWS rows of the program
    b_one_scale = 1.0 + tl.load(p_scale + i_b * stride_scale_b + o_d, mask=m_d, other=0.0).to(
        tl.float32
    )
    if p_gate is not None:
        b_gate = tl.load(p_gate + i_b * stride_gate_b + o_d, mask=m_d, other=0.0).to(tl.float32)
    if p_partial is not None:
        b_dscale = tl.zeros((BLOCK,), dtype=tl.float32)
        b_dshift = tl.zeros((BLOCK,), dtype=tl.float32)
        b_dgate = tl.zeros((BLOCK,), dtype=tl.float32)

    for i_r in range(ROWS):
        i_s = i_blk * ROWS + i_r
        i_row = i_b * S + i_s
        m_s = i_s < S
        # not m_d & m_s: the interpreter makes integers of a scalar mask that it broadcasts
        m_row = o_d < tl.where(m_s, D, 0)
        b_mean = tl.load(p_mean + i_row, mask=m_s, other=0.0)
        b_rstd = tl.load(p_rstd + i_row, mask=m_s, other=0.0)
        b_x = tl.load(p_x + i_b * stride_x_b + i_s * stride_x_s + o_d, mask=m_row, other=0.0).to(
            tl.float32
        )
        b_dy = tl.load(
            p_dy + i_b * stride_dy_b + i_s * stride_dy_s + o_d, mask=m_row, other=0.0
        ).to(tl.float32)
        # in masked columns x is 0 and xhat is not, but dy, and with it g, is 0 there
        b_xhat = (b_x - b_mean) * b_rstd
        b_g = b_dy * b_one_scale
        b_mean_g = tl.sum(b_g, axis=0) / D
        b_mean_gx = tl.sum(b_g * b_xhat, axis=0) / D
        b_dx = (b_g - b_mean_g - b_xhat * b_mean_gx) * b_rstd
        if p_add is not None:
            p_add_row = p_add + i_b * stride_add_b + i_s * stride_add_s
            b_dx += tl.load(p_add_row + o_d, mask=m_row, other=0.0).to(tl.float32)
        tl.store(p_dx + i_row * D + o_d, b_dx.to(p_dx.dtype.element_ty), mask=m_row)
        if p_partial is not None:
            b_dscale += b_dy * b_xhat
            b_dshift += b_dy
        if p_gate is not None:
            # dx is not 0 in masked columns, which must not enter a row's scale
            b_dbranch = tl.where(m_d, b_dx * b_gate, 0.0)
            if p_dbranch is not None:
                tl.store(
                    p_dbranch + i_row * D + o_d,
                    b_dbranch.to(p_dbranch.dtype.element_ty),
                    mask=m_row,
                )
            if p_q is not None:
                if p_col_scale is not None:
                    b_dbranch *= tl.load(p_col_scale + o_d, mask=m_d, other=0.0).to(tl.float32)
                b_q, b_q_scale = quantize_row(b_dbranch, p_q.dtype.element_ty)
                tl.store(p_q + i_row * D + o_d, b_q, mask=m_row)
                tl.store(p_q_scale + i_row, b_q_scale, mask=m_s)
            if p_partial is not None and p_branch is not None:
                p_branch_row = p_branch + i_b * stride_branch_b + i_s * stride_branch_s
                b_dgate += b_dx * tl.load(p_branch_row + o_d, mask=m_row, other=0.0).to(tl.float32)

    if p_partial is not None:
        # [2 or 3, B, blocks, D]: all of dscale's partial sums, then dshift's, then dgate's
        n_blk = tl.num_programs(0).to(tl.int64)
        n_sum = tl.num_programs(1) * n_blk * D
        p_sum = p_partial + (i_b * n_blk + i_blk) * D + o_d
        tl.store(p_sum, b_dscale, mask=m_d)
        tl.store(p_sum + n_sum, b_dshift, mask=m_d)
        if p_branch is not None:
            tl.store(p_sum + 2 * n_sum, b_dgate, mask=m_d)


def modulated_layer_norm_fwd(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-6,
    *,
    gate: Tensor | None = None,
    branch: Tensor | None = None,
    out: str = "same",
) -> LayerNormOut:
    """LayerNorm(x)·(1 + scale) + shift, as values, as codes, or as both.

    x, branch [B, S, D], any distance between rows; scale, shift, gate [B, D]; out one of
    `row_quant.OUTPUTS`. With a gate and a branch, x + gate·branch takes the place of x and is
    written as well, in the same pass. Raises ValueError on an unknown `out` or a last dimension
    that is not contiguous.
    """
    check_rows("modulated_layer_norm", x=x, gate=gate, branch=branch, scale=scale, shift=shift)
    batch, tokens, width = x.shape
    assert scale.shape == shift.shape == (batch, width) and (gate is None) == (branch is None)
    assert gate is None or gate.shape == scale.shape
    assert branch is None or branch.shape == x.shape
    total = None if gate is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y, q, q_scale = empty_outputs(x, out)
    mean = torch.empty((batch, tokens), dtype=torch.float32, device=x.device)
    rstd = torch.empty((batch, tokens), dtype=torch.float32, device=x.device)
    launch(
        modulated_layer_norm_fwd_kernel, (tokens, batch),
        x, gate, branch, scale, shift, total, y, q, q_scale, mean, rstd,
        *row_strides(x), 0 if gate is None else gate.stride(0), *row_strides(branch),
        scale.stride(0), shift.stride(0), tokens, float(eps), D=width,
        **row_numbers("modulated_layer_norm_fwd", width, arch_key(x.device)),
    )  # fmt: skip
    return LayerNormOut(y, q, q_scale, mean, rstd, total)


def modulated_layer_norm_bwd(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    *,
    add_to: Tensor | None = None,
    modulation: bool = False,
    gate: Tensor | None = None,
    branch: Tensor | None = None,
    out: str = "same",
    col_scale: Tensor | None = None,
) -> LayerNormGrads:
    """The gradient that reaches x through y, plus `add_to` [B, S, D], which reaches x past it.

    dy, x [B, S, D], any distance between rows; scale [B, D]; mean, rstd as forward gave them.
    `modulation` asks for dscale and dshift. With the gate [B, D] of x = residual + gate·branch
    comes the branch's gradient, as `out` says (`row_quant.OUTPUTS`); its codes are those of
    dbranch·col_scale, col_scale [D]. Given the branch and `modulation`, dgate comes too.
    """
    check_rows(
        "modulated_layer_norm", dy=dy, x=x, scale=scale, add_to=add_to, gate=gate, branch=branch
    )
    batch, tokens, width = x.shape
    assert (
        scale.shape == (batch, width)
        and dy.shape == x.shape
        and mean.is_contiguous()
        and rstd.is_contiguous()
    )
    assert add_to is None or add_to.shape == x.shape
    assert gate is None or gate.shape == scale.shape
    assert branch is None or (gate is not None and branch.shape == x.shape)
    table = "modulated_layer_norm_bwd_sums" if modulation else "modulated_layer_norm_bwd"
    numbers = row_numbers(table, width, arch_key(x.device))
    blocks = cdiv(tokens, numbers["ROWS"])
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dbranch = (None, None, None) if gate is None else empty_outputs(x, out)
    sums = None
    if modulation:
        shape = (2 if branch is None else 3, batch, blocks, width)
        sums = torch.empty(shape, dtype=torch.float32, device=x.device)
    launch(
        modulated_layer_norm_bwd_kernel, (blocks, batch),
        dy, x, scale, mean, rstd, add_to, gate, branch, col_scale, dx, *dbranch, sums,
        *row_strides(dy), *row_strides(x), scale.stride(0), *row_strides(add_to),
        0 if gate is None else gate.stride(0), *row_strides(branch),
        tokens, D=width, **numbers,
    )  # fmt: skip
    dscale, dshift, *dgate = (None, None) if sums is None else sums.sum(2).to(scale.dtype)
    return LayerNormGrads(dx, dscale, dshift, dgate[0] if dgate else None, *dbranch)


def aot_cases() -> Iterator[AotCase]:
    """What `fluxfast-bench aot` compiles of this op: launches at FLUX.1's sizes."""

    def meta(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x, mean = meta(dtype, 1, 4608, 3072), meta(torch.float32, 1, 4608)
        shift, scale, gate = meta(dtype, 1, 9216).chunk(3, dim=-1)
        bwd = partial(modulated_layer_norm_bwd, x, x, scale, mean, mean, add_to=x)
        name = str(dtype).removeprefix("torch.")
        for out in OUTPUTS if dtype == torch.bfloat16 else ("same",):
            where = targets_of(out)
            yield (
                f"{name}-{out}",
                partial(modulated_layer_norm_fwd, x, scale, shift, out=out),
                where,
            )
            yield (
                f"{name}-{out}-gated",
                partial(modulated_layer_norm_fwd, x, scale, shift, gate=gate, branch=x, out=out),
                where,
            )
            col_scale = None if out == "same" else meta(torch.float32, 3072)
            yield (
                f"{name}-{out}-gated",
                partial(bwd, gate=gate, out=out, col_scale=col_scale),
                where,
            )
            sums = partial(bwd, gate=gate, branch=x, modulation=True, out=out, col_scale=col_scale)
            yield f"{name}-{out}-gated-modulation", sums, where
        yield name, bwd, EVERY_TARGET
        yield f"{name}-modulation", partial(bwd, modulation=True), EVERY_TARGET
