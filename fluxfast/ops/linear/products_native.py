"""The gradients of a LinearGroup's adapters by the native module, in one pass over x and dy; fp32,
on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fluxfast.ops import dispatch, registration
from fluxfast.ops.tensors import dense_rows


def linear_lora_grads(
    x: Tensor,
    dy: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    cols: Sequence[int],
) -> list[Tensor]:
    """dA [r, K] of every adapter, then dB [n, r]: (scale · dy B)ᵀ x and dyᵀ (scale · x Aᵀ).

    x [M, K], dy [M, N], fp32; `cols` is where in dy each adapter's n columns begin.
    """
    x, dy = dense_rows(x), dense_rows(dy)
    a, b = ([t.contiguous() for t in tensors] for tensors in (a, b))
    if x.shape[0] == 0:
        return [torch.zeros_like(t) for t in (*a, *b)]
    grads = [torch.empty_like(t) for t in (*a, *b)]
    address = Tensor.data_ptr
    adapters = [
        (
            address(a_i),
            address(b_i),
            address(da),
            address(db),
            a_i.shape[0],
            col,
            b_i.shape[0],
            scale,
        )
        for a_i, b_i, da, db, col, scale in zip(
            a, b, grads, grads[len(a) :], cols, scales, strict=False
        )
    ]
    dispatch.native.lora_grads(
        x.data_ptr(), x.stride(0), dy.data_ptr(), dy.stride(0), adapters, *x.shape, torch.get_num_threads()
    )  # fmt: skip
    return grads


_op = registration.register(linear_lora_grads)


@_op.register_fake
def _(
    x: Tensor,
    dy: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    cols: Sequence[int],
) -> list[Tensor]:
    return [torch.empty_like(t) for t in (*a, *b)]


def adapter_grads(
    x: Tensor, dy: Tensor, a: list[Tensor], b: list[Tensor], scales: list[float], cols: list[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """`linear_lora_grads` as launcher or op: all dA, all dB."""
    grads = registration.launcher(x, linear_lora_grads, _op)(x, dy, a, b, scales, cols)
    return grads[: len(a)], grads[len(a) :]
