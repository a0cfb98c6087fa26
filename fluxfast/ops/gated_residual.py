"""The gated residual of a FLUX.1 block: out = x + gate·y, one gate per sample and channel."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fluxfast.ops import dispatch, row_quant
from fluxfast.ops.parts import (
    FormOfOperand,
    Parts,
    PerPart,
    dense_vectors,
    in_form_of,
    only,
    tensors_of,
)
from fluxfast.ops.registration import Op, is_traced
from fluxfast.ops.row_quant import RowOutput
from fluxfast.ops.tensors import contiguous_like, dense_rows, full_dtype


def gated_residual_ref(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """The maths in plain, differentiable torch.

    x, y [B, S, D]; gate [B, D]. Returns [B, S, D] in x's dtype.
    """
    return torch.addcmul(x, gate[:, None], y).to(x.dtype)


def forward(
    x: Tensor,
    gate: PerPart,
    y: Tensor,
    *,
    keep_y: bool = True,
    parts: Parts | None = None,
    impl: str,
) -> tuple[Tensor, tuple[PerPart, Tensor | None]]:
    """Raw interface: out, and (gate, y) to keep for backward.

    y is kept only if `keep_y`, and without it there is no dgate. parts: see `ops.parts`; x and y
    are [R, D] then, and gate is a pair.
    """
    if impl == "ref":
        out = gated_residual_ref(x, only(gate), y)
    elif is_traced(x):
        (out,) = _forward_op(x, gate, y, keep_y=keep_y, parts=parts, impl=impl)
    elif impl == "triton":
        from fluxfast_kernels import gated_residual as kernels

        out = kernels.gated_residual_fwd(
            dense_rows(x), dense_vectors(gate), dense_rows(y), parts=parts
        )
    else:
        out = _forward_native(dense_rows(x), dense_rows(only(gate)), dense_rows(y))
    return out, (gate, y if keep_y else None)


def backward(
    dout: Tensor,
    saved: tuple[PerPart, Tensor | None],
    needs: Sequence[bool],
    *,
    parts: Parts | None = None,
    impl: str,
) -> tuple[Tensor | None, FormOfOperand, Tensor | None]:
    """Raw interface: (dx, dgate, dy). dx is dout itself."""
    needs_x, needs_gate, needs_y = needs
    dx = dout if needs_x else None
    if not needs_gate and not needs_y:
        return dx, None, None
    rows, dgate = backward_rows(dout, saved, needs_gate=needs_gate, parts=parts, impl=impl)
    return dx, dgate, rows.y if needs_y else None


def backward_rows(
    dout: Tensor,
    saved: Sequence[PerPart | None],
    *,
    out: str = "same",
    col_scale: PerPart | None = None,
    needs_gate: bool = False,
    into: Tensor | None = None,
    parts: Parts | None = None,
    impl: str,
) -> tuple[RowOutput, FormOfOperand]:
    """Raw interface: dy in the form that dgrad reads, and dgate if needed; dx is dout itself.

    `out` as an op's that can quantise its output; the codes are those of dy·col_scale, with
    col_scale [D]. The values are written to `into`, where it is given and `out` asks for values.
    parts: see `ops.parts`; gate, col_scale and dgate are pairs then.
    """
    gate, y = saved
    assert gate is not None and (y is not None or not needs_gate)
    y = only(y) if needs_gate else None
    if impl == "ref":
        return _backward_ref(dout, only(gate), y, out, only(col_scale), into)
    if is_traced(dout):
        options: dict[str, Any] = {"out": out, "col_scale": col_scale, "needs_gate": needs_gate}
        made = iter(_backward_op(dout, (gate, y), **options, into=into, parts=parts, impl=impl))
        rows = row_quant.from_parts(made, out, into)
        return rows, in_form_of(gate, made) if needs_gate else None
    dout, y = dense_rows(dout), None if y is None else dense_rows(y)
    if impl == "triton":
        from fluxfast_kernels import gated_residual as kernels

        grads = kernels.gated_residual_bwd(
            dout, dense_vectors(gate), y,
            out=out, col_scale=dense_vectors(col_scale), dy=into, parts=parts,
        )  # fmt: skip
        return RowOutput(*grads[:3]), grads.dgate
    dy, dgate = _backward_native(dout, dense_rows(only(gate)), y)
    return row_quant.output_of(dy, dy.dtype, out, only(col_scale), into, impl=impl), dgate


def _forward_native(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    out = contiguous_like(x)
    dispatch.native.gated_residual_fwd(
        x.data_ptr(), *x.stride()[:2],
        gate.data_ptr(), gate.stride(0),
        y.data_ptr(), *y.stride()[:2],
        out.data_ptr(), *x.shape, torch.get_num_threads(),
    )  # fmt: skip
    return out


def _backward_native(dout: Tensor, gate: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
    dy = contiguous_like(dout)
    dgate = contiguous_like(gate) if y is not None else gate.new_empty(0)
    dispatch.native.gated_residual_bwd(
        dout.data_ptr(), *dout.stride()[:2],
        gate.data_ptr(), gate.stride(0),
        *((0, 0, 0) if y is None else (y.data_ptr(), *y.stride()[:2])),
        dy.data_ptr(), dgate.data_ptr(), *dout.shape, torch.get_num_threads(),
    )  # fmt: skip
    return dy, None if y is None else dgate


def _backward_ref(
    dout: Tensor,
    gate: Tensor,
    y: Tensor | None,
    out: str,
    col_scale: Tensor | None,
    into: Tensor | None,
) -> tuple[RowOutput, Tensor | None]:
    dtype = full_dtype(dout)
    dy = dout * gate[:, None] if out == "same" else dout.to(dtype) * gate[:, None]
    dgate = None if y is None else (dout.to(dtype) * y.to(dtype)).sum(1).to(gate.dtype)
    return row_quant.output_of(dy, dout.dtype, out, col_scale, into), dgate


def _fake_forward(x: Tensor, **_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape)]


def _fake_backward(
    dout: Tensor,
    saved: Sequence[PerPart],
    out: str,
    needs_gate: bool,
    into: Tensor | None,
    **_: Any,
) -> list[Tensor]:
    dgate = [g.new_empty(g.shape) for g in tensors_of(saved[0])] if needs_gate else []
    return [*row_quant.empty_parts(dout, out, into=into), *dgate]


_forward_op = Op("gated_residual_fwd", forward, _fake_forward)
_backward_op = Op("gated_residual_bwd", backward_rows, _fake_backward, writes=["into"])


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, y: Tensor, impl: str) -> Tensor:
        out, saved = forward(x, gate, y, keep_y=ctx.needs_input_grad[1], impl=impl)
        ctx.save_for_backward(*saved)
        ctx.impl = impl
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(dout, ctx.saved_tensors, ctx.needs_input_grad[:3], impl=ctx.impl), None


def gated_residual(x: Tensor, gate: Tensor, y: Tensor, impl: str = "auto") -> Tensor:
    """x + gate[:, None]·y.

    x, y [B, S, D]; gate [B, D]. Returns [B, S, D]. The gradient of x is the output's own, not a
    copy; y is kept for backward only where gate takes a gradient. Raises ValueError on shapes that
    don't fit, or if `impl` can't do this call. Source: diffusers' `FluxTransformerBlock`.
    """
    if x.ndim != 3 or y.shape != x.shape or gate.shape != (x.shape[0], x.shape[2]):
        raise ValueError(
            "gated_residual: expected x and y [B, S, D] and gate [B, D], "
            f"got x {list(x.shape)}, gate {list(gate.shape)}, y {list(y.shape)}"
        )
    # the gain of native code of our own is the sum for dgate in the pass that gives dy
    needs_gate = gate.requires_grad and torch.is_grad_enabled()
    ref_suffices = (
        None if needs_gate else "without a gradient of gate, torch.addcmul is one pass too"
    )
    backend = dispatch.resolve("gated_residual", impl, (x, gate, y), ref_suffices=ref_suffices)
    if backend == "ref":
        return gated_residual_ref(x, gate, y)
    return _GatedResidual.apply(x, gate, y, backend)
