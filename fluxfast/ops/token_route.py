"""Routing tokens around blocks (TREAD): gather the tokens that go through, scatter them back.

    gather   out = x[idx]              backward: dx = zeros, dx[idx] = dout
    scatter  out = base, out[idx] = y  backward: dbase = dout, dbase[idx] = 0; dy = dout[idx]

idx is distinct within a sample and names rows that x (base) has, in any order. That is not checked,
because a check on a GPU would have to be waited for.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fluxfast.ops import dispatch
from fluxfast.ops.registration import Op, is_traced
from fluxfast.ops.tensors import dense_rows

_NO_NATIVE = "the native module doesn't route tokens"


def _rows(idx: Tensor, width: int) -> Tensor:
    return idx.long()[..., None].expand(-1, -1, width)


def token_gather_ref(x: Tensor, idx: Tensor) -> Tensor:
    """The maths in plain, differentiable torch: x [B, S, D], idx [B, K] → [B, K, D]."""
    return x.gather(1, _rows(idx, x.shape[2]))


def token_scatter_ref(base: Tensor, y: Tensor, idx: Tensor) -> Tensor:
    """The maths in plain, differentiable torch: base [B, S, D], y [B, K, D], idx [B, K]."""
    return base.scatter(1, _rows(idx, base.shape[2]), y)


def gather_forward(x: Tensor, idx: Tensor, *, impl: str) -> tuple[Tensor, tuple[Tensor]]:
    """Raw interface of `token_gather`: out, and (idx,) to keep for backward; idx [B, K]."""
    return _gather(x, idx, impl), (idx,)


def gather_backward(
    dout: Tensor, saved: Sequence[Tensor], needs: Sequence[bool], *, tokens: int, impl: str
) -> tuple[Tensor | None]:
    """Raw interface of `token_gather`: (dx,); tokens: how many x has a sample."""
    return (_scatter(None, dout, saved[0], tokens, impl) if needs[0] else None,)


def scatter_forward(
    base: Tensor, y: Tensor, idx: Tensor, *, impl: str
) -> tuple[Tensor, tuple[Tensor]]:
    """Raw interface of `token_scatter`: out, and (idx,) to keep for backward; idx [B, K]."""
    return _scatter(base, y, idx, base.shape[1], impl), (idx,)


def scatter_backward(
    dout: Tensor, saved: Sequence[Tensor], needs: Sequence[bool], *, impl: str
) -> tuple[Tensor | None, Tensor | None]:
    """Raw interface of `token_scatter`: (dbase, dy)."""
    (idx,) = saved
    dbase = _scatter(dout, None, idx, dout.shape[1], impl) if needs[0] else None
    return dbase, _gather(dout, idx, impl) if needs[1] else None


def _gather(x: Tensor, idx: Tensor, impl: str) -> Tensor:
    """The rows idx [B, K] of x [B, S, D]: [B, K, D]."""
    if impl == "ref":
        return token_gather_ref(x, idx)
    if is_traced(x):
        (out,) = _gather_op(x, idx, impl)
        return out
    from fluxfast_kernels import token_route as kernels

    return kernels.token_gather(dense_rows(x), dense_rows(idx))


def _scatter(base: Tensor | None, y: Tensor | None, idx: Tensor, tokens: int, impl: str) -> Tensor:
    """base [B, tokens, D] with y [B, K, D] in the rows idx [B, K]; an absent one means zeros."""
    given = y if base is None else base
    assert given is not None
    if impl == "ref":
        batch, kept, width = *idx.shape, given.shape[2]
        base = given.new_zeros((batch, tokens, width)) if base is None else base
        y = base.new_zeros(()).expand(batch, kept, width) if y is None else y
        return token_scatter_ref(base, y, idx)
    if is_traced(given):
        (out,) = _scatter_op(base, y, idx, tokens, impl)
        return out
    from fluxfast_kernels import token_route as kernels

    base, y = (None if t is None else dense_rows(t) for t in (base, y))
    return kernels.token_scatter(base, y, kernels.inverse_index(idx, tokens))


def _fake_gather(x: Tensor, idx: Tensor, **_: Any) -> list[Tensor]:
    return [x.new_empty((*idx.shape, x.shape[2]))]


def _fake_scatter(
    base: Tensor | None, y: Tensor | None, idx: Tensor, tokens: int, **_: Any
) -> list[Tensor]:
    given = y if base is None else base
    assert given is not None
    return [given.new_empty((idx.shape[0], tokens, given.shape[2]))]


_gather_op = Op("token_gather_fwd", _gather, _fake_gather)
_scatter_op = Op("token_scatter_fwd", _scatter, _fake_scatter)


class _TokenGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, idx: Tensor, impl: str) -> Tensor:
        out, saved = gather_forward(x, idx, impl=impl)
        ctx.save_for_backward(*saved)
        ctx.tokens, ctx.impl = x.shape[1], impl
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:1]
        (dx,) = gather_backward(dout, ctx.saved_tensors, needs, tokens=ctx.tokens, impl=ctx.impl)
        return dx, None, None


class _TokenScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, y: Tensor, idx: Tensor, impl: str) -> Tensor:
        out, saved = scatter_forward(base, y, idx, impl=impl)
        ctx.save_for_backward(*saved)
        ctx.impl = impl
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:2]
        return *scatter_backward(dout, ctx.saved_tensors, needs, impl=ctx.impl), None, None


def token_gather(x: Tensor, idx: Tensor, impl: str = "auto") -> Tensor:
    """The rows idx of each sample of x [B, S, D]: [B, K, D].

    idx [B, K], or [K] for all samples alike, is int32 or int64, distinct within a sample, in any
    order. Backward keeps idx only. Raises ValueError on shapes that don't fit, or if `impl` can't
    do this call. Source: TREAD, arXiv 2501.04765.
    """
    idx = _check("token_gather", idx, x=x)
    backend = dispatch.resolve("token_gather", impl, (x,), native_obstacle=_NO_NATIVE)
    return token_gather_ref(x, idx) if backend == "ref" else _TokenGather.apply(x, idx, backend)


def token_scatter(base: Tensor, y: Tensor, idx: Tensor, impl: str = "auto") -> Tensor:
    """A copy of base [B, S, D] whose rows idx are those of y [B, K, D].

    idx as `token_gather` takes it. Backward keeps idx only; the gradient of base is zero in the
    rows that y replaced. Raises ValueError on shapes or dtypes that don't fit, or if `impl` can't
    do this call. Source: TREAD, arXiv 2501.04765.
    """
    idx = _check("token_scatter", idx, base=base, y=y)
    if y.shape != (*idx.shape, base.shape[2]) or y.dtype != base.dtype:
        raise ValueError(
            f"token_scatter: expected y [B, K, D] = {[*idx.shape, base.shape[2]]} in {base.dtype}, "
            f"got {list(y.shape)} in {y.dtype}"
        )
    backend = dispatch.resolve("token_scatter", impl, (base, y), native_obstacle=_NO_NATIVE)
    if backend == "ref":
        return token_scatter_ref(base, y, idx)
    return _TokenScatter.apply(base, y, idx, backend)


def _check(op: str, idx: Tensor, **tensors: Tensor) -> Tensor:
    """idx as [B, K]."""
    for name, tensor in tensors.items():
        if tensor.ndim != 3 or tensor.device != idx.device:
            raise ValueError(
                f"{op}: expected {name} of three dimensions on idx's device ({idx.device}), "
                f"got {list(tensor.shape)} on {tensor.device}"
            )
    (batch, tokens, _), *_ = (tensor.shape for tensor in tensors.values())
    if (
        idx.dtype not in (torch.int32, torch.int64)
        or idx.ndim not in (1, 2)
        or idx.shape[:-1] not in ((), (batch,))
    ):
        raise ValueError(
            f"{op}: expected idx [K] or [{batch}, K], int32 or int64, got {list(idx.shape)} "
            f"{idx.dtype}"
        )
    if idx.shape[-1] > tokens:
        raise ValueError(f"{op}: idx names {idx.shape[-1]} distinct rows of {tokens}")
    return idx.expand(batch, -1)
