"""LayerNorm without an affine part, then a per-sample modulation: y = LayerNorm(x)·(1 + scale) + shift."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fluxfast.ops import _impl


def modulated_layer_norm_ref(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """The maths in plain, differentiable torch: x [B, S, D], scale and shift [B, D] → [B, S, D].

    Computes in fp32 (fp64 if x is) and rounds once, to x's dtype.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    xhat = torch.nn.functional.layer_norm(x.to(dtype), x.shape[-1:], eps=eps)
    return torch.addcmul(shift[:, None].to(dtype), xhat, 1 + scale[:, None].to(dtype)).to(x.dtype)


def modulated_layer_norm_fwd(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y [B, S, D], and each row's mean and reciprocal standard deviation, stats [2, B, S].

    The launcher alone: fp32 on the CPU, no autograd.
    """
    x, scale, shift = _impl.dense_rows(x), _impl.dense_rows(scale), _impl.dense_rows(shift)
    y = _impl.contiguous_like(x)
    stats = x.new_empty(2, *x.shape[:2])
    _impl.native.modulated_layer_norm_fwd(
        x.data_ptr(), *x.stride()[:2],
        scale.data_ptr(), scale.stride(0),
        shift.data_ptr(), shift.stride(0),
        y.data_ptr(), stats.data_ptr(), *x.shape, eps, torch.get_num_threads(),
    )  # fmt: skip
    return y, stats


def modulated_layer_norm_bwd(dy: Tensor, x: Tensor, stats: Tensor, scale: Tensor, modulation: bool) -> tuple[Tensor, Tensor]:
    """dx [B, S, D], and dscale and dshift as [2, B, D] (empty unless `modulation`)."""
    dy, x, scale = _impl.dense_rows(dy), _impl.dense_rows(x), _impl.dense_rows(scale)
    dx = _impl.contiguous_like(x)
    dmodulation = x.new_empty(2, *scale.shape) if modulation else x.new_empty(0)
    _impl.native.modulated_layer_norm_bwd(
        dy.data_ptr(), *dy.stride()[:2],
        x.data_ptr(), *x.stride()[:2],
        scale.data_ptr(), scale.stride(0),
        stats.data_ptr(), dx.data_ptr(), dmodulation.data_ptr(), *x.shape, torch.get_num_threads(),
    )  # fmt: skip
    return dx, dmodulation


_fwd_op = torch.library.custom_op("fluxfast::modulated_layer_norm_fwd", modulated_layer_norm_fwd, mutates_args=())
_bwd_op = torch.library.custom_op("fluxfast::modulated_layer_norm_bwd", modulated_layer_norm_bwd, mutates_args=())


@_fwd_op.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(2, *x.shape[:2])


@_bwd_op.register_fake
def _(dy: Tensor, x: Tensor, stats: Tensor, scale: Tensor, modulation: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(2, *scale.shape) if modulation else x.new_empty(0)


class _ModulatedLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
        y, stats = _impl.launcher(x, modulated_layer_norm_fwd, _fwd_op)(x, scale, shift, eps)
        ctx.save_for_backward(x, stats, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _, needs_scale, needs_shift, _ = ctx.needs_input_grad
        modulation = needs_scale or needs_shift
        dx, dmodulation = _impl.launcher(dy, modulated_layer_norm_bwd, _bwd_op)(dy, *ctx.saved_tensors, modulation)
        dscale, dshift = dmodulation if modulation else (None, None)
        return dx, dscale if needs_scale else None, dshift if needs_shift else None, None


def modulated_layer_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6, impl: str = "auto") -> Tensor:
    """LayerNorm(x)·(1 + scale[:, None]) + shift[:, None].

    x [B, S, D]; scale, shift [B, D]. Returns [B, S, D]. Backward keeps x, scale, and each row's mean and reciprocal standard
    deviation; dscale and dshift are computed only where asked for.
    Raises ValueError on shapes that don't fit, or if `impl` can't do this call. Source: diffusers' `AdaLayerNormZero`.
    """
    if x.ndim != 3 or scale.shape != (x.shape[0], x.shape[2]) or shift.shape != scale.shape:
        raise ValueError(
            "modulated_layer_norm: expected x [B, S, D] and scale and shift [B, D], "
            f"got x {list(x.shape)}, scale {list(scale.shape)}, shift {list(shift.shape)}"
        )
    if _impl.resolve("modulated_layer_norm", impl, (x, scale, shift)) == "ref":
        return modulated_layer_norm_ref(x, scale, shift, eps)
    return _ModulatedLayerNorm.apply(x, scale, shift, eps)
