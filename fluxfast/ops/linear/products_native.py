"""The gradients of a LinearGroup's LoRAs by the native module, in one pass over x and dy.

In fp32, on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fluxfast.ops import dispatch
from fluxfast.ops.registration import Op, is_traced
from fluxfast.ops.tensors import dense_rows


def lora_grads(
    x: Tensor,
    dy: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    cols: Sequence[int],
) -> tuple[list[Tensor], list[Tensor]]:
    """All dA [r, K] and all dB [n, r]: (scale · dy B)ᵀ x and dyᵀ (scale · x Aᵀ).

    x [M, K], dy [M, N], fp32; `cols` is where in dy the n columns of each LoRA begin.
    """
    if is_traced(x):
        grads = _grads_op(x, dy, a, b, scales, cols)
        return grads[: len(a)], grads[len(a) :]
    x, dy = dense_rows(x), dense_rows(dy)
    a, b = ([t.contiguous() for t in tensors] for tensors in (a, b))
    if x.shape[0] == 0:
        return [torch.zeros_like(t) for t in a], [torch.zeros_like(t) for t in b]
    d_a, d_b = [torch.empty_like(t) for t in a], [torch.empty_like(t) for t in b]
    loras = [
        (*(t.data_ptr() for t in (a_i, b_i, da, db)), a_i.shape[0], col, b_i.shape[0], scale)
        for a_i, b_i, da, db, col, scale in zip(a, b, d_a, d_b, cols, scales, strict=True)
    ]
    dispatch.native.lora_grads(
        x.data_ptr(), x.stride(0), dy.data_ptr(), dy.stride(0), loras, *x.shape,
        torch.get_num_threads(),
    )  # fmt: skip
    return d_a, d_b


def _fake_grads(a: Sequence[Tensor], b: Sequence[Tensor], **_: Any) -> list[Tensor]:
    return [torch.empty_like(t) for t in (*a, *b)]


_grads_op = Op("linear_lora_grads", lora_grads, _fake_grads)
