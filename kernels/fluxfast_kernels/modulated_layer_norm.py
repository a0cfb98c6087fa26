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

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels.aot import EVERY_TARGET, AotCase
from fluxfast_kernels.launch import arch_key, launch, row_numbers
from fluxfast_kernels.parts import Parts, PerPart
from fluxfast_kernels.row_programs import (
    pointers,
    program_rows,
    row_programs,
    sample_strides,
    vector_of,
)
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
    dscale: PerPart | None
    dshift: PerPart | None
    dgate: PerPart | None
    dbranch: Tensor | None
    dbranch_q: Tensor | None
    dbranch_q_scale: Tensor | None


@triton.jit(do_not_specialize=["S", "S_second", "B"])
def modulated_layer_norm_fwd_kernel(
    p_x,
    p_gate,
    p_gate_second,
    p_branch,
    p_scale,
    p_scale_second,
    p_shift,
    p_shift_second,
    p_sum,
    p_y,
    p_q,
    p_q_scale,
    p_mean,
    p_rstd,
    stride_x_b,
    stride_x_s,
    stride_gate_b,
    stride_gate_second_b,
    stride_branch_b,
    stride_branch_s,
    stride_scale_b,
    stride_scale_second_b,
    stride_shift_b,
    stride_shift_second_b,
    stride_y_b,
    stride_y_s,
    S,
    S_second,
    B,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_b, i_s, _, i_sample = program_rows(S, S_second, B, p_scale_second is not None, 1)
    i_row = i_b * S + i_s
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D

    b_x = tl.load(p_x + i_b * stride_x_b + i_s * stride_x_s + o_d, mask=m_d, other=0.0).to(
        tl.float32
    )
    if p_gate is not None:
        p_gate_own = vector_of(
            p_gate, p_gate_second, stride_gate_b, stride_gate_second_b, i_sample, B
        )
        b_gate = tl.load(p_gate_own + o_d, mask=m_d, other=0.0).to(tl.float32)
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
    p_scale_own = vector_of(
        p_scale, p_scale_second, stride_scale_b, stride_scale_second_b, i_sample, B
    )
    p_shift_own = vector_of(
        p_shift, p_shift_second, stride_shift_b, stride_shift_second_b, i_sample, B
    )
    b_scale = tl.load(p_scale_own + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_shift = tl.load(p_shift_own + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_y = b_centred * b_rstd * (1.0 + b_scale) + b_shift

    if p_y is not None:
        p_y_row = p_y + i_b * stride_y_b + i_s * stride_y_s
        tl.store(p_y_row + o_d, b_y.to(p_y.dtype.element_ty), mask=m_d)
    if p_q is not None:
        b_q, b_q_scale = quantize_row(b_y, p_q.dtype.element_ty)
        tl.store(p_q + i_row * D + o_d, b_q, mask=m_d)
        tl.store(p_q_scale + i_row, b_q_scale)
    tl.store(p_mean + i_row, b_mean)
    tl.store(p_rstd + i_row, b_rstd)


@triton.jit(do_not_specialize=["S", "S_second", "B"])
def modulated_layer_norm_bwd_kernel(
    p_dy,
    p_x,
    p_scale,
    p_scale_second,
    p_mean,
    p_rstd,
    p_add,
    p_gate,
    p_gate_second,
    p_branch,
    p_col_scale,
    p_col_scale_second,
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
    stride_scale_second_b,
    stride_add_b,
    stride_add_s,
    stride_gate_b,
    stride_gate_second_b,
    stride_branch_b,
    stride_branch_s,
    stride_dbranch_b,
    stride_dbranch_s,
    S,
    S_second,
    B,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    i_b, i_first, i_end, i_sample = program_rows(S, S_second, B, p_scale_second is not None, ROWS)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    # what belongs to the sample stays in registers for all ROWS rows of the program
    p_scale_own = vector_of(
        p_scale, p_scale_second, stride_scale_b, stride_scale_second_b, i_sample, B
    )
    b_one_scale = 1.0 + tl.load(p_scale_own + o_d, mask=m_d, other=0.0).to(tl.float32)
    if p_gate is not None:
        p_gate_own = vector_of(
            p_gate, p_gate_second, stride_gate_b, stride_gate_second_b, i_sample, B
        )
        b_gate = tl.load(p_gate_own + o_d, mask=m_d, other=0.0).to(tl.float32)
    if p_partial is not None:
        b_dscale = tl.zeros((BLOCK,), dtype=tl.float32)
        b_dshift = tl.zeros((BLOCK,), dtype=tl.float32)
        b_dgate = tl.zeros((BLOCK,), dtype=tl.float32)

    for i_r in range(ROWS):
        i_s = i_first + i_r
        i_row = i_b * S + i_s
        m_s = i_s < i_end
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
                p_dbranch_row = p_dbranch + i_b * stride_dbranch_b + i_s * stride_dbranch_s
                tl.store(p_dbranch_row + o_d, b_dbranch.to(p_dbranch.dtype.element_ty), mask=m_row)
            if p_q is not None:
                if p_col_scale is not None:
                    p_col = vector_of(p_col_scale, p_col_scale_second, 0, 0, i_sample, B)
                    b_dbranch *= tl.load(p_col + o_d, mask=m_d, other=0.0).to(tl.float32)
                b_q, b_q_scale = quantize_row(b_dbranch, p_q.dtype.element_ty)
                tl.store(p_q + i_row * D + o_d, b_q, mask=m_row)
                tl.store(p_q_scale + i_row, b_q_scale, mask=m_s)
            if p_partial is not None and p_branch is not None:
                p_branch_row = p_branch + i_b * stride_branch_b + i_s * stride_branch_s
                b_dgate += b_dx * tl.load(p_branch_row + o_d, mask=m_row, other=0.0).to(tl.float32)

    if p_partial is not None:
        # [2 or 3, programs, D]: all of dscale's partial sums, then dshift's, then dgate's
        n_blk = tl.num_programs(0).to(tl.int64)
        n_sum = tl.num_programs(1) * n_blk * D
        p_sum = p_partial + (i_b * n_blk + tl.program_id(0)) * D + o_d
        tl.store(p_sum, b_dscale, mask=m_d)
        tl.store(p_sum + n_sum, b_dshift, mask=m_d)
        if p_branch is not None:
            tl.store(p_sum + 2 * n_sum, b_dgate, mask=m_d)


def modulated_layer_norm_fwd(
    x: Tensor,
    scale: PerPart,
    shift: PerPart,
    eps: float = 1e-6,
    *,
    gate: PerPart | None = None,
    branch: Tensor | None = None,
    out: str = "same",
    y: Tensor | None = None,
    parts: Parts | None = None,
) -> LayerNormOut:
    """LayerNorm(x)·(1 + scale) + shift, as values, as codes, or as both.

    x, branch [B, S, D], any distance between rows; scale, shift, gate [B, D]; out one of
    `row_quant.OUTPUTS`. With a gate and a branch, x + gate·branch takes the place of x and is
    written as well, in the same pass. The values go to `y`, where it is given. With `parts`, rows
    are [R, D], and scale, shift and gate are pairs. Raises ValueError on an unknown `out` or a last
    dimension that is not contiguous.
    """
    check_rows("modulated_layer_norm", x=x, gate=gate, branch=branch, scale=scale, shift=shift, y=y)
    programs, width = row_programs(x, parts), x.shape[-1]
    assert (gate is None) == (branch is None) and (branch is None or branch.shape == x.shape)
    programs.check_vectors(width, scale, shift, gate)
    total = None if gate is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    values, q, q_scale = empty_outputs(x, out, y=y)
    mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    launch(
        modulated_layer_norm_fwd_kernel, programs.grid,
        x, *pointers(gate), branch, *pointers(scale), *pointers(shift),
        total, values, q, q_scale, mean, rstd,
        *row_strides(x), *sample_strides(gate), *row_strides(branch),
        *sample_strides(scale), *sample_strides(shift), *row_strides(values),
        *programs.sizes, float(eps), D=width,
        **row_numbers("modulated_layer_norm_fwd", width, arch_key(x.device)),
    )  # fmt: skip
    return LayerNormOut(values, q, q_scale, mean, rstd, total)


def modulated_layer_norm_bwd(
    dy: Tensor,
    x: Tensor,
    scale: PerPart,
    mean: Tensor,
    rstd: Tensor,
    *,
    add_to: Tensor | None = None,
    modulation: bool = False,
    gate: PerPart | None = None,
    branch: Tensor | None = None,
    out: str = "same",
    col_scale: PerPart | None = None,
    dbranch: Tensor | None = None,
    parts: Parts | None = None,
) -> LayerNormGrads:
    """The gradient that reaches x through y, plus `add_to` [B, S, D], which reaches x past it.

    dy, x [B, S, D], any distance between rows; scale [B, D]; mean, rstd as forward gave them.
    `modulation` asks for dscale and dshift. With the gate [B, D] of x = residual + gate·branch
    comes the branch's gradient, as `out` says (`row_quant.OUTPUTS`); its values go to `dbranch`,
    where it is given, and its codes are those of dbranch·col_scale, col_scale [D]. Given the branch
    and `modulation`, dgate comes too. With `parts`, rows are [R, D], and scale, gate, col_scale and
    the gradients of vectors are pairs.
    """
    check_rows(
        "modulated_layer_norm", dy=dy, x=x, scale=scale, add_to=add_to, gate=gate, branch=branch,
        col_scale=col_scale, dbranch=dbranch,
    )  # fmt: skip
    assert dy.shape == x.shape and mean.is_contiguous() and rstd.is_contiguous()
    assert add_to is None or add_to.shape == x.shape
    assert branch is None or (gate is not None and branch.shape == x.shape)
    width = x.shape[-1]
    table = "modulated_layer_norm_bwd_sums" if modulation else "modulated_layer_norm_bwd"
    numbers = row_numbers(table, width, arch_key(x.device))
    programs = row_programs(x, parts, numbers["ROWS"])
    programs.check_vectors(width, scale, gate)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    outputs = (None, None, None) if gate is None else empty_outputs(x, out, y=dbranch)
    count = 2 if branch is None else 3
    sums = programs.empty_sums(count, x) if modulation else None
    launch(
        modulated_layer_norm_bwd_kernel, programs.grid,
        dy, x, *pointers(scale), mean, rstd, add_to, *pointers(gate), branch, *pointers(col_scale),
        dx, *outputs, sums,
        *row_strides(dy), *row_strides(x), *sample_strides(scale), *row_strides(add_to),
        *sample_strides(gate), *row_strides(branch), *row_strides(outputs[0]),
        *programs.sizes, D=width, **numbers,
    )  # fmt: skip
    dscale, dshift, *dgate = [None, None] if sums is None else programs.add_up(sums, scale)
    return LayerNormGrads(dx, dscale, dshift, dgate[0] if dgate else None, *outputs)


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
            col_scale = None if out == "same" else meta(torch.float32, 3072)
            fwd = partial(modulated_layer_norm_fwd, x, scale, shift, out=out)
            yield f"{name}-{out}", fwd, where
            yield f"{name}-{out}-gated", partial(fwd, gate=gate, branch=x), where
            yield (
                f"{name}-{out}-gated",
                partial(bwd, gate=gate, out=out, col_scale=col_scale),
                where,
            )
            sums = partial(bwd, gate=gate, branch=x, modulation=True, out=out, col_scale=col_scale)
            yield f"{name}-{out}-gated-modulation", sums, where
        yield name, bwd, EVERY_TARGET
        yield f"{name}-modulation", partial(bwd, modulation=True), EVERY_TARGET
    yield from _aot_cases_of_parts(meta)


def _aot_cases_of_parts(meta: Callable[..., Tensor]) -> Iterator[AotCase]:
    """The launches of a double block whose text and image share one."""
    parts, x = Parts(rows=512, batch=1), meta(torch.bfloat16, 4608, 3072)
    mean = meta(torch.float32, 4608)
    vectors = meta(torch.bfloat16, 1, 9216).chunk(3, dim=-1)
    shift, scale, gate = ((vector, vector) for vector in vectors)
    fwd = partial(modulated_layer_norm_fwd, x, scale, shift, parts=parts)
    bwd = partial(modulated_layer_norm_bwd, x, x, scale, mean, mean, add_to=x, parts=parts)
    for out in OUTPUTS:
        col_scale = None if out == "same" else (meta(torch.float32, 3072),) * 2
        gated = partial(bwd, gate=gate, out=out, col_scale=col_scale)
        name, where = f"parts-{out}", targets_of(out)
        yield name, partial(fwd, out=out), where
        yield f"{name}-gated", partial(fwd, gate=gate, branch=x, out=out), where
        yield f"{name}-gated", gated, where
        yield f"{name}-gated-modulation", partial(gated, branch=x, modulation=True), where
    yield "parts", bwd, EVERY_TARGET
    yield "parts-modulation", partial(bwd, modulation=True), EVERY_TARGET
