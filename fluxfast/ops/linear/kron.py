"""Products with a Kronecker product that is never formed: LoKr's.

They run in plain torch, by Triton's kernels or, in fp32 on the CPU, by the native module.

    y += y_cols · scale · (w1 ⊗ w2) x

w1 [O1, I1], w2 [O2, I2], x [M, I1 · I2] values or codes with a scale a row, y [M, O1 · O2]. y_cols
[O1 · O2] fp32, or None for ones. The formulas are those of `fluxfast_kernels.kron`. impl is as
`dispatch.resolve` gives it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fluxfast.ops import dispatch
from fluxfast.ops.linear.products_torch import values_of_codes
from fluxfast.ops.registration import Op, is_traced
from fluxfast.ops.tensors import dense_rows


def add(
    x: Tensor, x_scale: Tensor | None, w1: Tensor, w2: Tensor, scale: float,
    y_cols: Tensor | None, y: Tensor, impl: str,
) -> None:  # fmt: skip
    """Adds the product to y [M, O1 · O2]."""
    if impl == "ref":
        m, (o1, i1), (o2, i2) = len(x), w1.shape, w2.shape
        x, u, w2 = values_of_codes(x, x_scale, y.dtype), w1.to(y.dtype) * scale, w2.to(y.dtype)
        wide = (x.reshape(m * i1, i2) @ w2.T).view(m, i1, o2)
        # in operations that autograd can differentiate
        added = torch.bmm(u.expand(m, o1, i1), wide).flatten(1)
        y += added if y_cols is None else added * y_cols.to(y.dtype)
        return
    if is_traced(x):
        _add_op(x, x_scale, w1, w2, scale, y_cols, y, impl)
        return
    if impl == "native":
        _add_native(values_of_codes(x, x_scale, y.dtype), w1, w2, scale, y_cols, y)
        return
    from fluxfast_kernels.kron import kron_add

    kron_add(dense_rows(x), w1, _dense(w2), y, scale=scale, x_scale=x_scale, y_cols=y_cols)


def backward(
    dy: Tensor, x: Tensor, x_scale: Tensor | None, w1: Tensor, w2: Tensor, scale: float,
    y_cols: Tensor | None, dx: Tensor | None, accumulate: bool, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of w1 and w2 in their dtypes; that of x's values goes to dx, if given.

    It is added to what dx holds, or written without `accumulate`.
    """
    if impl == "ref":
        return _backward(dy, x, x_scale, w1, w2, scale, y_cols, dx, accumulate)
    if is_traced(x):
        dw1, dw2 = _backward_op(dy, x, x_scale, w1, w2, scale, y_cols, dx, accumulate, impl)
        return dw1, dw2
    if impl == "native":
        values = values_of_codes(x, x_scale, dy.dtype)
        if dx is not None and not accumulate:
            dx.zero_()
        return _backward_native(dy, values, w1, w2, scale, y_cols, dx)
    from fluxfast_kernels.kron import kron_backward

    dw1, dw2 = w1.new_empty(w1.shape), w2.new_empty(w2.shape)
    kron_backward(
        dense_rows(dy), dense_rows(x), w1, _dense(w2), dw1, dw2, dx,
        scale=scale, x_scale=x_scale, dy_cols=y_cols, accumulate=accumulate,
    )  # fmt: skip
    return dw1, dw2


def added_to_weight(weight: Tensor, w1: Tensor, w2: Tensor, scale: float, out: Tensor) -> Tensor:
    """W + scale · (w1 ⊗ w2), written to `out` [O1 · O2, I1 · I2], which is returned.

    Each element is a product of two numbers, and is added as it is made.
    """
    u, v = w1.detach().to(out.dtype), w2.detach().to(out.dtype)
    shape = (len(u), len(v), u.shape[1], v.shape[1])
    torch.addcmul(
        weight.view(shape), u[:, None, :, None], v[:, None], value=scale, out=out.view(shape)
    )
    return out


def _dense(w: Tensor) -> Tensor:
    """A factor one dimension of which is contiguous."""
    return w if 1 in w.stride() else w.contiguous()


def _backward(
    dy: Tensor, x: Tensor, x_scale: Tensor | None, w1: Tensor, w2: Tensor, scale: float,
    y_cols: Tensor | None, dx: Tensor | None, accumulate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    u, v = w1.to(dy.dtype) * scale, w2.to(dy.dtype)
    dy = dy if y_cols is None else dy * y_cols.to(dy.dtype)
    m, (o1, i1), (o2, i2) = len(dy), w1.shape, w2.shape
    dy, x = dy.reshape(m * o1, o2), values_of_codes(x, x_scale, dy.dtype).reshape(m, i1, i2)
    t = (dy @ v).view(m, o1, i2)
    if dx is not None:
        dx.view(m, i1, i2).baddbmm_(u.T.expand(m, i1, o1), t, beta=int(accumulate))
    # a small product a row, and their sum, cost less than to bring t and x in the order of one
    dw1 = scale * torch.bmm(t, x.transpose(1, 2)).sum(0)
    dw2 = dy.T @ torch.bmm(u.expand(m, o1, i1), x).view(m * o1, i2)
    return dw1.to(w1.dtype), dw2.to(w2.dtype)


def _add_native(
    x: Tensor, w1: Tensor, w2: Tensor, scale: float, y_cols: Tensor | None, y: Tensor
) -> None:
    if 0 in (*y.shape, *x.shape):
        return
    x, (o1, i1), (o2, i2) = dense_rows(x), w1.shape, w2.shape
    u, v = (w1.float() * scale).contiguous(), w2.float().T.contiguous()
    y_cols = None if y_cols is None else y_cols.float().contiguous()
    dispatch.native.kron_add(
        x.data_ptr(), x.stride(0), u.data_ptr(), v.data_ptr(), (o1, i1, o2, i2),
        0 if y_cols is None else y_cols.data_ptr(), y.data_ptr(), y.stride(0), len(y),
        torch.get_num_threads(),
    )  # fmt: skip


def _backward_native(
    dy: Tensor, x: Tensor, w1: Tensor, w2: Tensor, scale: float, y_cols: Tensor | None,
    dx: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if 0 in (*dy.shape, *x.shape):
        return torch.zeros_like(w1), torch.zeros_like(w2)
    dy, x = dense_rows(dy if y_cols is None else dy * y_cols), dense_rows(x)
    (o1, i1), (o2, i2) = w1.shape, w2.shape
    u, v = (w1.float() * scale).T.contiguous(), w2.float().contiguous()
    dw1, dw2 = u.new_empty(o1, i1), v.new_empty(o2, i2)
    dispatch.native.kron_grads(
        dy.data_ptr(), dy.stride(0), x.data_ptr(), x.stride(0), u.data_ptr(), v.data_ptr(),
        (i1, o1, i2, o2), dw1.data_ptr(), dw2.data_ptr(),
        *((0, 0) if dx is None else (dx.data_ptr(), dx.stride(0))), len(dy),
        torch.get_num_threads(),
    )  # fmt: skip
    return (scale * dw1).to(w1.dtype), dw2.to(w2.dtype)


def _fake_backward(w1: Tensor, w2: Tensor, **_: Any) -> list[Tensor]:
    return [w1.new_empty(w1.shape), w2.new_empty(w2.shape)]


_add_op = Op("linear_kron", add, writes=["y"])
_backward_op = Op("linear_kron_grads", backward, _fake_backward, writes=["dx"])
