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
from fluxfast_kernels.launch import arch_key, cdiv, launch, row_numbers
from fluxfast_kernels.row_quant import (
    OUTPUTS,
    check_rows,
    empty_outputs,
    quantize_row,
    row_strides,
    targets_of,
)


class GatedResidualGrads(NamedTuple):
    """dy [B, S, D], or None; its codes and their scales [B, S], or None; dgate [B, D], or None."""

    dy: Tensor | None
    dy_q: Tensor | None
    dy_q_scale: Tensor | None
    dgate: Tensor | None


@triton.jit(do_not_specialize=["S"])
def gated_residual_fwd_kernel(
    p_x,
    p_gate,
    p_y,
    p_out,
    stride_x_b,
    stride_x_s,
    stride_gate_b,
    stride_y_b,
    stride_y_s,
    S,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # one program a row, of which FLUX.1 has enough to fill a device; offsets are 64-bit, because
    # B·S·D may be more than 2³¹
    i_s = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(1).to(tl.int64)
    # BLOCK is D rounded up to a power of two, which Triton wants: the mask cuts the rest off
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    b_x = tl.load(p_x + i_b * stride_x_b + i_s * stride_x_s + o_d, mask=m_d, other=0.0).to(
        tl.float32
    )
    b_y = tl.load(p_y + i_b * stride_y_b + i_s * stride_y_s + o_d, mask=m_d, other=0.0).to(
        tl.float32
    )
    b_gate = tl.load(p_gate + i_b * stride_gate_b + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_out = b_x + b_gate * b_y
    tl.store(p_out + (i_b * S + i_s) * D + o_d, b_out.to(p_out.dtype.element_ty), mask=m_d)


@triton.jit(do_not_specialize=["S"])
def gated_residual_bwd_kernel(
    p_dout,
    p_gate,
    p_y,
    p_col_scale,
    p_dy,
    p_q,
    p_q_scale,
    p_sums,
    stride_dout_b,
    stride_dout_s,
    stride_gate_b,
    stride_y_b,
    stride_y_s,
    S,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    i_blk = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    # the gate is a sample's, so it stays in registers for all ROWS rows of the program
    b_gate = tl.load(p_gate + i_b * stride_gate_b + o_d, mask=m_d, other=0.0).to(tl.float32)
    if p_sums is not None:
        b_dgate = tl.zeros((BLOCK,), dtype=tl.float32)

    for i_r in range(ROWS):
        i_s = i_blk * ROWS + i_r
        i_row = i_b * S + i_s
        m_s = i_s < S
        # not m_d & m_s: the interpreter makes integers of a scalar mask that it broadcasts
        m_row = o_d < tl.where(m_s, D, 0)
        b_dout = tl.load(
            p_dout + i_b * stride_dout_b + i_s * stride_dout_s + o_d, mask=m_row, other=0.0
        ).to(tl.float32)
        b_dy = b_dout * b_gate
        if p_dy is not None:
            tl.store(p_dy + i_row * D + o_d, b_dy.to(p_dy.dtype.element_ty), mask=m_row)
        if p_q is not None:
            if p_col_scale is not None:
                b_dy *= tl.load(p_col_scale + o_d, mask=m_d, other=0.0).to(tl.float32)
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
        tl.store(p_sums + (i_b * tl.num_programs(0) + i_blk) * D + o_d, b_dgate, mask=m_d)


def gated_residual_fwd(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate·y, in x's dtype. Raises ValueError if a last dimension is not contiguous."""
    check_rows("gated_residual", x=x, gate=gate, y=y)
    batch, tokens, width = x.shape
    assert y.shape == x.shape and gate.shape == (batch, width)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        gated_residual_fwd_kernel, (tokens, batch),
        x, gate, y, out, *row_strides(x), gate.stride(0), *row_strides(y), tokens,
        D=width, **row_numbers("gated_residual_fwd", width, arch_key(x.device)),
    )  # fmt: skip
    return out


def gated_residual_bwd(
    dout: Tensor,
    gate: Tensor,
    y: Tensor | None = None,
    *,
    out: str = "same",
    col_scale: Tensor | None = None,
) -> GatedResidualGrads:
    """dy = gate·dout, as `out` says (`row_quant.OUTPUTS`); dgate too, where y is given.

    The codes are those of dy·col_scale, col_scale [D].
    """
    check_rows("gated_residual", dout=dout, gate=gate, y=y, col_scale=col_scale)
    batch, tokens, width = dout.shape
    assert gate.shape == (batch, width) and (y is None or y.shape == dout.shape)
    table = "gated_residual_bwd" if y is None else "gated_residual_bwd_sums"
    numbers = row_numbers(table, width, arch_key(dout.device))
    blocks = cdiv(tokens, numbers["ROWS"])
    outputs = empty_outputs(dout, out)
    sums = (
        None
        if y is None
        else torch.empty((batch, blocks, width), dtype=torch.float32, device=dout.device)
    )
    launch(
        gated_residual_bwd_kernel, (blocks, batch),
        dout, gate, y, col_scale, *outputs, sums,
        *row_strides(dout), gate.stride(0), *row_strides(y), tokens, D=width, **numbers,
    )  # fmt: skip
    return GatedResidualGrads(*outputs, None if sums is None else sums.sum(1).to(gate.dtype))


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
