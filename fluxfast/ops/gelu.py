"""GELU in its tanh form, FLUX.1's activation: 0.5·x·(1 + tanh(u)), u = sqrt(2/π)·(x + 0.044715 x³)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fluxfast.ops import _impl


def gelu_ref(x: Tensor) -> Tensor:
    """The maths in plain, differentiable torch: x of any shape and floating dtype."""
    return torch.nn.functional.gelu(x, approximate="tanh")


def gelu_fwd(x: Tensor) -> Tensor:
    """y, contiguous, of x's shape; the launcher alone: fp32 on the CPU, no autograd."""
    x, rows, cols, stride = _as_rows(x)
    y = _impl.contiguous_like(x)
    _impl.native.gelu_fwd(x.data_ptr(), stride, y.data_ptr(), rows, cols, torch.get_num_threads())
    return y


def gelu_bwd(dy: Tensor, x: Tensor) -> Tensor:
    """dx, contiguous, of x's shape."""
    dy, _, _, dy_stride = _as_rows(dy)
    x, rows, cols, x_stride = _as_rows(x)
    dx = _impl.contiguous_like(x)
    _impl.native.gelu_bwd(dy.data_ptr(), dy_stride, x.data_ptr(), x_stride, dx.data_ptr(), rows, cols, torch.get_num_threads())
    return dx


def _as_rows(x: Tensor) -> tuple[Tensor, int, int, int]:
    """x (a copy if it must be), and its number of rows, their length, and the distance between two of them."""
    cols = x.shape[-1] if x.ndim else 1
    rows = x.numel() // cols if cols else 0
    if x.is_contiguous():
        return x, rows, cols, cols
    # a slice of the columns of a wider contiguous tensor, as a packed projection gives it, is read in place
    strides = x.stride()
    if strides[-1] == 1 and all(strides[i] == strides[i + 1] * x.shape[i + 1] for i in range(x.ndim - 2)):
        return x, rows, cols, strides[-2]
    return x.contiguous(), rows, cols, cols


_fwd_op = torch.library.custom_op("fluxfast::gelu_fwd", gelu_fwd, mutates_args=())
_bwd_op = torch.library.custom_op("fluxfast::gelu_bwd", gelu_bwd, mutates_args=())


@_fwd_op.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@_bwd_op.register_fake
def _(dy: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _impl.launcher(x, gelu_fwd, _fwd_op)(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return _impl.launcher(dy, gelu_bwd, _bwd_op)(dy, x)


def gelu(x: Tensor, impl: str = "auto") -> Tensor:
    """GELU(x) in its tanh form; x of any shape. Backward keeps x only.

    Raises ValueError if `impl` can't do this call. Source: diffusers' `GELU(approximate="tanh")`.
    """
    if _impl.resolve("gelu", impl, (x,)) == "ref":
        return gelu_ref(x)
    return _Gelu.apply(x)
