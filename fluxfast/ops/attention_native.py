"""Attention by the native module: fp32 on the CPU, no mask."""

from __future__ import annotations

import torch
from torch import Tensor

from fluxfast.ops import dispatch, registration
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
    """Whether it beats PyTorch's here: it was measured to with the vectors of x86, and has none of
    its own for others.
    """
    return dispatch.native.cpu_isa() in ("avx2", "avx512")


def attention_fwd(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """out [B, S, heads, head_dim], contiguous, and the log-sum-exp [B, heads, S]."""
    assert q.shape == k.shape == v.shape
    q, k, v = (dense_rows(x) for x in (q, k, v))
    out, lse = contiguous_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1])
    if q.numel() == 0:
        return [out, lse]
    tensors = [part for x in (q, k, v) for part in (x.data_ptr(), x.stride())]
    dispatch.native.attention_fwd(
        *tensors, out.data_ptr(), lse.data_ptr(), *q.shape, torch.get_num_threads()
    )
    return [out, lse]


def attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> list[Tensor]:
    """dq, dk, dv [B, S, heads, head_dim], contiguous."""
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


_fwd_op, _bwd_op = registration.register(attention_fwd), registration.register(attention_bwd)


@_fwd_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    return [contiguous_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1])]


@_bwd_op.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> list[Tensor]:
    return [contiguous_like(x) for x in (q, k, v)]


def forward(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    return registration.launcher(q, attention_fwd, _fwd_op)(q, k, v)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> list[Tensor]:
    return registration.launcher(q, attention_bwd, _bwd_op)(dout, q, k, v, out, lse)
