"""The gated residual of a FLUX.1 block: out = x + gate·y, one gate per sample and channel."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fluxfast.ops import _impl


def gated_residual_ref(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """The maths in plain, differentiable torch: x, y [B, S, D], gate [B, D] → [B, S, D]."""
    return torch.addcmul(x, gate[:, None], y)


def gated_residual_fwd(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """out [B, S, D]; the launcher alone: fp32 on the CPU, no autograd."""
    x, gate, y = _impl.dense_rows(x), _impl.dense_rows(gate), _impl.dense_rows(y)
    out = _impl.contiguous_like(x)
    _impl.native.gated_residual_fwd(
        x.data_ptr(), *x.stride()[:2],
        gate.data_ptr(), gate.stride(0),
        y.data_ptr(), *y.stride()[:2],
        out.data_ptr(), *x.shape, torch.get_num_threads(),
    )  # fmt: skip
    return out


def gated_residual_bwd(dout: Tensor, gate: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """dy [B, S, D] and dgate [B, D]; without y there is no dgate (empty)."""
    dout, gate = _impl.dense_rows(dout), _impl.dense_rows(gate)
    dy = _impl.contiguous_like(dout)
    dgate = _impl.contiguous_like(gate) if y is not None else gate.new_empty(0)
    y_args: tuple[int, ...] = (0, 0, 0)
    if y is not None:
        y = _impl.dense_rows(y)
        y_args = (y.data_ptr(), *y.stride()[:2])
    _impl.native.gated_residual_bwd(
        dout.data_ptr(), *dout.stride()[:2],
        gate.data_ptr(), gate.stride(0),
        *y_args,
        dy.data_ptr(), dgate.data_ptr(), *dout.shape, torch.get_num_threads(),
    )  # fmt: skip
    return dy, dgate


_fwd_op = torch.library.custom_op("fluxfast::gated_residual_fwd", gated_residual_fwd, mutates_args=())
_bwd_op = torch.library.custom_op("fluxfast::gated_residual_bwd", gated_residual_bwd, mutates_args=())


@_fwd_op.register_fake
def _(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@_bwd_op.register_fake
def _(dout: Tensor, gate: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    return dout.new_empty(dout.shape), dout.new_empty(gate.shape if y is not None else (0,))


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(gate, y if ctx.needs_input_grad[1] else None)
        return _impl.launcher(x, gated_residual_fwd, _fwd_op)(x, gate, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        _, needs_gate, needs_y = ctx.needs_input_grad
        if not needs_gate and not needs_y:
            return dout, None, None
        gate, y = ctx.saved_tensors
        dy, dgate = _impl.launcher(dout, gated_residual_bwd, _bwd_op)(dout, gate, y)
        return dout, dgate if needs_gate else None, dy if needs_y else None


def gated_residual(x: Tensor, gate: Tensor, y: Tensor, impl: str = "auto") -> Tensor:
    """x + gate[:, None]·y.

    x, y [B, S, D]; gate [B, D]. Returns [B, S, D]. The gradient of x is the output's own, not a copy; y is kept for backward
    only where gate takes a gradient. Raises ValueError on shapes that don't fit, or if `impl` can't do this call.
    Source: diffusers' `FluxTransformerBlock`.
    """
    if x.ndim != 3 or y.shape != x.shape or gate.shape != (x.shape[0], x.shape[2]):
        raise ValueError(
            "gated_residual: expected x and y [B, S, D] and gate [B, D], "
            f"got x {list(x.shape)}, gate {list(gate.shape)}, y {list(y.shape)}"
        )
    # the gain of a kernel of our own is the sum for dgate in the pass that gives dy
    needs_gate = gate.requires_grad and torch.is_grad_enabled()
    ref_suffices = None if needs_gate else "without a gradient of gate, torch.addcmul is one pass too"
    if _impl.resolve("gated_residual", impl, (x, gate, y), ref_suffices=ref_suffices) == "ref":
        return gated_residual_ref(x, gate, y)
    return _GatedResidual.apply(x, gate, y)
