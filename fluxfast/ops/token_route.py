"""Routing tokens around blocks (TREAD): gather the tokens that go through, scatter them back. Each
is the other's backward.

    gather   out = x[idx]                       backward: scatter of dout into zeros
    scatter  out = base, out[idx] = y           backward: dbase = dout with zeros at idx, dy = gather of dout

idx is distinct within a sample and names rows that x (base) has, in any order; that is not checked,
since on a GPU it would have to be waited for.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fluxfast.ops import dispatch, registration
from fluxfast.ops.tensors import dense_rows

_NO_NATIVE = "the native module doesn't route tokens"


def _rows(idx: Tensor, width: int) -> Tensor:
    return idx.long()[..., None].expand(-1, -1, width)


def token_gather_ref(x: Tensor, idx: Tensor) -> Tensor:
    """The maths in plain, differentiable torch: x [B, S, D], idx [B, K] → [B, K, D]."""
    return x.gather(1, _rows(idx, x.shape[2]))


def token_scatter_ref(base: Tensor, y: Tensor, idx: Tensor) -> Tensor:
    """The maths in plain, differentiable torch: base [B, S, D], y [B, K, D], idx [B, K] → [B, S,
    D].
    """
    return base.scatter(1, _rows(idx, base.shape[2]), y)


def token_gather_fwd(x: Tensor, idx: Tensor) -> Tensor:
    """The rows idx [B, K] of x [B, S, D]: [B, K, D]. The launcher alone, on Triton."""
    from fluxfast_kernels import token_route as kernels

    return kernels.token_gather(dense_rows(x), dense_rows(idx))


def token_scatter_fwd(base: Tensor | None, y: Tensor | None, idx: Tensor, tokens: int) -> Tensor:
    """base [B, tokens, D] with y [B, K, D] in the rows idx [B, K]; one of the two may be absent,
    which means zeros.
    """
    from fluxfast_kernels import token_route as kernels

    base = None if base is None else dense_rows(base)
    y = None if y is None else dense_rows(y)
    return kernels.token_scatter(base, y, kernels.inverse_index(idx, tokens))


_gather_op = torch.library.custom_op(
    "fluxfast::token_gather_fwd", token_gather_fwd, mutates_args=()
)
_scatter_op = torch.library.custom_op(
    "fluxfast::token_scatter_fwd", token_scatter_fwd, mutates_args=()
)


@_gather_op.register_fake
def _(x: Tensor, idx: Tensor) -> Tensor:
    return x.new_empty((*idx.shape, x.shape[2]))


@_scatter_op.register_fake
def _(base: Tensor | None, y: Tensor | None, idx: Tensor, tokens: int) -> Tensor:
    given = y if base is None else base
    assert given is not None
    return given.new_empty((idx.shape[0], tokens, given.shape[2]))


def _gather(x: Tensor, idx: Tensor, impl: str) -> Tensor:
    return (
        token_gather_ref(x, idx)
        if impl == "ref"
        else registration.launcher(x, token_gather_fwd, _gather_op)(x, idx)
    )


def _scatter(base: Tensor | None, y: Tensor | None, idx: Tensor, tokens: int, impl: str) -> Tensor:
    given = y if base is None else base
    assert given is not None
    if impl != "ref":
        return registration.launcher(given, token_scatter_fwd, _scatter_op)(base, y, idx, tokens)
    base = given.new_zeros((idx.shape[0], tokens, given.shape[2])) if base is None else base
    return token_scatter_ref(
        base, base.new_zeros(()).expand(*idx.shape, base.shape[2]) if y is None else y, idx
    )


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
        return (
            *gather_backward(dout, ctx.saved_tensors, needs, tokens=ctx.tokens, impl=ctx.impl),
            None,
            None,
        )


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
        return (
            *scatter_backward(dout, ctx.saved_tensors, ctx.needs_input_grad[:2], impl=ctx.impl),
            None,
            None,
        )


def token_gather(x: Tensor, idx: Tensor, impl: str = "auto") -> Tensor:
    """The rows idx of each sample: x [B, S, D], idx [B, K] or, for all samples alike, [K] → [B, K,
    D].

    idx is int32 or int64, distinct within a sample, in any order. Backward keeps idx only. Raises
    ValueError on shapes that don't fit, or if `impl` can't do this call. Source: TREAD, arXiv
    2501.04765.
    """
    idx = _check("token_gather", idx, x=x)
    backend = dispatch.resolve("token_gather", impl, (x,), native_obstacle=_NO_NATIVE)
    return token_gather_ref(x, idx) if backend == "ref" else _TokenGather.apply(x, idx, backend)


def token_scatter(base: Tensor, y: Tensor, idx: Tensor, impl: str = "auto") -> Tensor:
    """A copy of base [B, S, D] whose rows idx ([B, K] or [K]) are those of y [B, K, D], which
    `token_gather` took out.

    Backward keeps idx only; the gradient of base is zero in the rows that y replaced. Raises
    ValueError on shapes or dtypes that don't fit, or if `impl` can't do this call. Source: TREAD,
    arXiv 2501.04765.
    """
    idx = _check("token_scatter", idx, base=base, y=y)
    if y.shape != (*idx.shape, base.shape[2]) or y.dtype != base.dtype:
        raise ValueError(
            f"token_scatter: expected y [B, K, D] = {[*idx.shape, base.shape[2]]} in {base.dtype}, "
            f"got {list(y.shape)} in {y.dtype}"
        )
    backend = dispatch.resolve("token_scatter", impl, (base, y), native_obstacle=_NO_NATIVE)
    return (
        token_scatter_ref(base, y, idx)
        if backend == "ref"
        else _TokenScatter.apply(base, y, idx, backend)
    )


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
