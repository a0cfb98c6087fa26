"""Attention by the native module: fp32 on the CPU, no mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fluxfast.ops import dispatch
from fluxfast.ops.registration import Op, is_traced
from fluxfast.ops.tensors import contiguous_like, dense_rows

# the module's tiles are whole vectors of head_dim, of up to 16 floats
_HEAD_DIM_UNIT = 16


def obstacle(q: Tensor, masked: bool) -> str | None:
    """Why the module can't attend with q [B, S, heads, head_dim]; None where it can."""
    if not dispatch.HAS_NATIVE:
        return "the native module fluxfast._C was not built"
    if not q.is_cpu or q.dtype != torch.float32:
        return f"it computes in torch.float32 on the CPU, and q is {q.dtype} on {q.device}"
    if masked:
        return "it takes no mask"
    if q.shape[-1] % _HEAD_DIM_UNIT:
        return f"heads must be a multiple of {_HEAD_DIM_UNIT} wide, not {q.shape[-1]}"
    return None


def is_fastest() -> bool:
    """Whether it beats PyTorch's here.

    It was measured to with the vectors of x86; for other processors it has no vector code.
    """
    return dispatch.native.cpu_isa() in ("avx2", "avx512")


def forward(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """out [B, S, heads, head_dim], contiguous, and the log-sum-exp [B, heads, S]."""
    if is_traced(q):
        return _forward_op(q, k, v)
    assert q.shape == k.shape == v.shape
    q, k, v = (dense_rows(x) for x in (q, k, v))
    out, lse = _empty_outputs(q)
    if q.numel() == 0:
        return [out, lse]
    tensors = [part for x in (q, k, v) for part in (x.data_ptr(), x.stride())]
    dispatch.native.attention_fwd(
        *tensors, out.data_ptr(), lse.data_ptr(), *q.shape, torch.get_num_threads()
    )
    return [out, lse]


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> list[Tensor]:
    """dq, dk, dv [B, S, heads, head_dim], contiguous."""
    if is_traced(q):
        return _backward_op(dout, q, k, v, out, lse)
    inputs = [dense_rows(x) for x in (dout, q, k, v, out)]
    grads = [contiguous_like(x) for x in (q, k, v)]
    if q.numel() == 0:
        return grads
    tensors = [part for x in inputs for part in (x.data_ptr(), x.stride())]
    addresses = [grad.data_ptr() for grad in grads]
    dispatch.native.attention_bwd(
        *tensors, lse.contiguous().data_ptr(), *addresses, *q.shape, torch.get_num_threads()
    )
    return grads


def _empty_outputs(q: Tensor, **_: Any) -> list[Tensor]:
    return [contiguous_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1])]


def _fake_backward(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> list[Tensor]:
    return [contiguous_like(x) for x in (q, k, v)]


_forward_op = Op("attention_fwd", forward, _empty_outputs)
_backward_op = Op("attention_bwd", backward, _fake_backward)
