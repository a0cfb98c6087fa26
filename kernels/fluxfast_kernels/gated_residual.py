"""The gated residual, out = x + gate·y with one gate per sample and channel: forward and backward.

Backward, dy = gate·dout is written as values or as the codes that dgrad wants, and dx is dout
itself. dgate is a sum over tokens: each program adds ROWS rows up, and the partial sums are added
afterwards, so the same inputs give the same bits. `modulated_layer_norm` has the fused form, for
where a norm follows.

Shapes: x, y, dout, dy [B, S, D], rows any distance apart; gate [B, D], at any distance from sample
to sample.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels.aot import AotCase
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


class GatedResidualGrads(NamedTuple):
    """dy [B, S, D]; its codes and their scales [B, S]; dgate [B, D]; None where not asked for."""

    dy: Tensor | None
    dy_q: Tensor | None
    dy_q_scale: Tensor | None
    dgate: PerPart | None


@triton.jit(do_not_specialize=["S", "S_second", "B"])
def gated_residual_fwd_kernel(
    p_x,
    p_gate,
    p_gate_second,
    p_y,
    p_out,
    stride_x_b,
    stride_x_s,
    stride_gate_b,
    stride_gate_second_b,
    stride_y_b,
    stride_y_s,
    S,
    S_second,
    B,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # one program a row, of which FLUX.1 has enough to fill a device
    i_b, i_s, _, i_sample = program_rows(S, S_second, B, p_gate_second is not None, 1)
    # BLOCK is D rounded up to a power of two, which Triton wants: the mask cuts the rest off
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    b_x = tl.load(p_x + i_b * stride_x_b + i_s * stride_x_s + o_d, mask=m_d, other=0.0).to(
        tl.float32
    )
    b_y = tl.load(p_y + i_b * stride_y_b + i_s * stride_y_s + o_d, mask=m_d, other=0.0).to(
        tl.float32
    )
    p_gate_own = vector_of(p_gate, p_gate_second, stride_gate_b, stride_gate_second_b, i_sample, B)
    b_gate = tl.load(p_gate_own + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_out = b_x + b_gate * b_y
    tl.store(p_out + (i_b * S + i_s) * D + o_d, b_out.to(p_out.dtype.element_ty), mask=m_d)


@triton.jit(do_not_specialize=["S", "S_second", "B"])
def gated_residual_bwd_kernel(
    p_dout,
    p_gate,
    p_gate_second,
    p_y,
    p_col_scale,
    p_col_scale_second,
    p_dy,
    p_q,
    p_q_scale,
    p_sums,
    stride_dout_b,
    stride_dout_s,
    stride_gate_b,
    stride_gate_second_b,
    stride_y_b,
    stride_y_s,
    stride_dy_b,
    stride_dy_s,
    S,
    S_second,
    B,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    i_b, i_first, i_end, i_sample = program_rows(S, S_second, B, p_gate_second is not None, ROWS)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    # the gate is a sample's, so it stays in registers for all ROWS rows of the program
    p_gate_own = vector_of(p_gate, p_gate_second, stride_gate_b, stride_gate_second_b, i_sample, B)
    b_gate = tl.load(p_gate_own + o_d, mask=m_d, other=0.0).to(tl.float32)
    if p_sums is not None:
        b_dgate = tl.zeros((BLOCK,), dtype=tl.float32)

    for i_r in range(ROWS):
        i_s = i_first + i_r
        i_row = i_b * S + i_s
        m_s = i_s < i_end
        # not m_d & m_s: the interpreter makes integers of a scalar mask that it broadcasts
        m_row = o_d < tl.where(m_s, D, 0)
        b_dout = tl.load(
            p_dout + i_b * stride_dout_b + i_s * stride_dout_s + o_d, mask=m_row, other=0.0
        ).to(tl.float32)
        b_dy = b_dout * b_gate
        if p_dy is not None:
            p_dy_row = p_dy + i_b * stride_dy_b + i_s * stride_dy_s
            tl.store(p_dy_row + o_d, b_dy.to(p_dy.dtype.element_ty), mask=m_row)
        if p_q is not None:
            if p_col_scale is not None:
                p_col = vector_of(p_col_scale, p_col_scale_second, 0, 0, i_sample, B)
                b_dy *= tl.load(p_col + o_d, mask=m_d, other=0.0).to(tl.float32)
            b_q, b_q_scale = quantize_row(b_dy, p_q.dtype.element_ty)
            tl.store(p_q + i_row * D + o_d, b_q, mask=m_row)
            tl.store(p_q_scale + i_row, b_q_scale, mask=m_s)
        if p_sums is not None:
            b_y = tl.load(
                p_y + i_b * stride_y_b + i_s * stride_y_s + o_d, mask=m_row, other=0.0
            ).to(tl.float32)
            b_dgate += b_dout * b_y

    if p_sums is not None:
        # a row of partial sums a program, no atomics: the order of the sum is always the same
        i_program = i_b * tl.num_programs(0) + tl.program_id(0)
        tl.store(p_sums + i_program * D + o_d, b_dgate, mask=m_d)


def gated_residual_fwd(
    x: Tensor, gate: PerPart, y: Tensor, *, parts: Parts | None = None
) -> Tensor:
    """x + gate·y, in x's dtype. Raises ValueError if a last dimension is not contiguous.

    With `parts`, rows are [R, D], and gate is a pair.
    """
    check_rows("gated_residual", x=x, gate=gate, y=y)
    programs, width = row_programs(x, parts), x.shape[-1]
    programs.check_vectors(width, gate)
    assert y.shape == x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        gated_residual_fwd_kernel, programs.grid,
        x, *pointers(gate), y, out,
        *row_strides(x), *sample_strides(gate), *row_strides(y), *programs.sizes,
        D=width, **row_numbers("gated_residual_fwd", width, arch_key(x.device)),
    )  # fmt: skip
    return out


def gated_residual_bwd(
    dout: Tensor,
    gate: PerPart,
    y: Tensor | None = None,
    *,
    out: str = "same",
    col_scale: PerPart | None = None,
    dy: Tensor | None = None,
    parts: Parts | None = None,
) -> GatedResidualGrads:
    """dy = gate·dout, as `out` says (`row_quant.OUTPUTS`); dgate too, where y is given.

    The values go to `dy`, where it is given; the codes are those of dy·col_scale, col_scale [D].
    With `parts`, rows are [R, D], and gate, col_scale and dgate are pairs.
    """
    check_rows("gated_residual", dout=dout, gate=gate, y=y, col_scale=col_scale, dy=dy)
    width = dout.shape[-1]
    table = "gated_residual_bwd" if y is None else "gated_residual_bwd_sums"
    numbers = row_numbers(table, width, arch_key(dout.device))
    programs = row_programs(dout, parts, numbers["ROWS"])
    programs.check_vectors(width, gate)
    assert y is None or y.shape == dout.shape
    outputs = empty_outputs(dout, out, y=dy)
    sums = None if y is None else programs.empty_sums(1, dout)
    launch(
        gated_residual_bwd_kernel, programs.grid,
        dout, *pointers(gate), y, *pointers(col_scale), *outputs, sums,
        *row_strides(dout), *sample_strides(gate), *row_strides(y), *row_strides(outputs[0]),
        *programs.sizes, D=width, **numbers,
    )  # fmt: skip
    return GatedResidualGrads(*outputs, None if sums is None else programs.add_up(sums, gate)[0])


def aot_cases() -> Iterator[AotCase]:
    """What `fluxfast-bench aot` compiles of this op: launches at FLUX.1's sizes."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.empty(1, 4608, 3072, dtype=dtype, device="meta")
        gate = torch.empty(1, 9216, dtype=dtype, device="meta")[:, 6144:]
        name = str(dtype).removeprefix("torch.")
        yield name, partial(gated_residual_fwd, x, gate, x), targets_of("same")
        for out in OUTPUTS if dtype == torch.bfloat16 else ("same",):
            col_scale = None if out == "same" else torch.empty(3072, device="meta")
            bwd = partial(gated_residual_bwd, out=out, col_scale=col_scale)
            yield f"{name}-{out}", partial(bwd, x, gate), targets_of(out)
            yield f"{name}-{out}-dgate", partial(bwd, x, gate, x), targets_of(out)
    parts, x = (
        Parts(rows=512, batch=1),
        torch.empty(4608, 3072, dtype=torch.bfloat16, device="meta"),
    )
    gates = (x[:1], x[:1])
    yield "parts", partial(gated_residual_fwd, x, gates, x, parts=parts), targets_of("same")
    for out in OUTPUTS:
        pair = None if out == "same" else (torch.empty(3072, device="meta"),) * 2
        bwd = partial(gated_residual_bwd, x, gates, out=out, col_scale=pair, parts=parts)
        yield f"parts-{out}", bwd, targets_of(out)
        yield f"parts-{out}-dgate", partial(bwd, x), targets_of(out)
