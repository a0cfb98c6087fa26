"""GELU in its tanh form, FLUX.1's activation: 0.5·x·(1 + tanh(sqrt(2/π)·(x + 0.044715 x³)))."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fluxfast.ops import dispatch, row_quant
from fluxfast.ops.parts import Parts, PerPart, dense_vectors, only
from fluxfast.ops.registration import Op, is_traced
from fluxfast.ops.row_quant import CodesOut, RowOutput
from fluxfast.ops.tensors import contiguous_like, dense_rows, full_dtype


def gelu_ref(x: Tensor) -> Tensor:
    """The maths in plain, differentiable torch: x of any shape and floating dtype."""
    return torch.nn.functional.gelu(x, approximate="tanh")


def forward(
    x: Tensor,
    *,
    prefix: Tensor | None = None,
    out: str = "same",
    into: Tensor | None = None,
    impl: str,
) -> tuple[RowOutput, tuple[Tensor]]:
    """Raw interface: what `out` asks for of [prefix | gelu(x)], and (x,) to keep for backward.

    x [..., K] and prefix [..., P], of the same dtype. The prefix's gradient is the first P columns
    of the output's; `backward` takes the rest. The values are written to `into` [..., P + K] where
    it is given and `out` asks for values: a column slice of a wider buffer will do.
    """
    assert into is None or out not in row_quant.FORMATS
    if impl == "ref":
        output = _forward_ref(x, prefix, out, into)
    elif is_traced(x):
        parts = _forward_op(x, prefix=prefix, out=out, into=into, impl=impl)
        output = row_quant.from_parts(parts, out, into)
    elif impl == "triton":
        from fluxfast_kernels import gelu as kernels

        head = None if prefix is None else _as_tokens(prefix)
        made = kernels.gelu_fwd(_as_tokens(x), out=out, prefix=head, y=_target(into))
        output = _like_rows(made, x, into)
    else:
        output = _forward_native(x, prefix, out, into)
    return output, (x,)


def backward(
    dy: Tensor, saved: Sequence[Tensor], needs: Sequence[bool], *, impl: str
) -> tuple[Tensor | None]:
    """Raw interface: (dx,)."""
    return (backward_rows(dy, saved, impl=impl).y if needs[0] else None,)


def backward_rows(
    dy: Tensor,
    saved: Sequence[Tensor],
    *,
    out: str = "same",
    col_scale: PerPart | None = None,
    dprefix: Tensor | None = None,
    into: Tensor | None = None,
    parts: Parts | None = None,
    impl: str,
) -> RowOutput:
    """Raw interface: dx in the form that dgrad reads; `out` as forward's.

    The codes are those of dx·col_scale, col_scale [K]. The values are written to `into` [..., K]
    where it is given and `out` asks for values: a column slice of a wider buffer will do. Where
    `dprefix` [..., P] is given, dy is the gradient of all of forward's output [..., P + K], and the
    prefix's part is written there. parts: see `ops.parts`; x is [R, K] then, and col_scale is a
    pair.
    """
    (x,) = saved
    assert into is None or out not in row_quant.FORMATS
    if dprefix is not None and impl != "triton":
        dprefix.copy_(dy[..., : dprefix.shape[-1]])
        dy, dprefix = dy[..., dprefix.shape[-1] :], None
    if impl == "ref":
        dtype = x.dtype if out == "same" else full_dtype(x)
        dx = torch.ops.aten.gelu_backward(dy.to(dtype), x.to(dtype), approximate="tanh")
        return row_quant.output_of(dx, x.dtype, out, only(col_scale), into)
    if is_traced(dy):
        options: dict[str, Any] = {"out": out, "col_scale": col_scale, "dprefix": dprefix}
        made = _backward_op(dy, saved, **options, into=into, parts=parts, impl=impl)
        return row_quant.from_parts(made, out, into)
    if impl == "triton":
        from fluxfast_kernels import gelu as kernels

        rows = kernels.gelu_bwd(
            _as_tokens(dy), _as_tokens(x), out=out, col_scale=dense_vectors(col_scale),
            dprefix=_target(dprefix), dx=_target(into), parts=parts,
        )  # fmt: skip
        return _like_rows(rows, x, into)
    return _backward_native(dy, x, out, only(col_scale), into)


def _forward_ref(x: Tensor, prefix: Tensor | None, out: str, into: Tensor | None) -> RowOutput:
    y = gelu_ref(x if out == "same" else x.to(full_dtype(x)))
    if prefix is not None:
        y = torch.cat((prefix.to(y.dtype), y), dim=-1)
    return row_quant.output_of(y, x.dtype, out, into=into)


def _forward_native(x: Tensor, prefix: Tensor | None, out: str, into: Tensor | None) -> RowOutput:
    x, rows, cols, stride = _as_rows(x)
    first = 0 if prefix is None else prefix.shape[-1]
    empty = into
    if empty is None:
        empty = x.new_empty(*x.shape[:-1], first + cols) if x.ndim else torch.empty_like(x)
    # rows that lie evenly apart are written where they are wanted, others are copied there
    y, _, _, y_stride = _as_rows(empty)
    if prefix is not None:
        y[..., :first] = prefix
    start = y.data_ptr() + first * y.element_size()
    dispatch.native.gelu_fwd(
        x.data_ptr(), stride, start, y_stride, rows, cols, torch.get_num_threads()
    )
    return row_quant.output_of(y, y.dtype, out, into=into, impl="native")


def _backward_native(
    dy: Tensor, x: Tensor, out: str, col_scale: Tensor | None, into: Tensor | None
) -> RowOutput:
    dy, _, _, dy_stride = _as_rows(dy)
    x, rows, cols, x_stride = _as_rows(x)
    # rows that lie evenly apart are written where they are wanted, others are copied there
    dx, _, _, dx_stride = _as_rows(contiguous_like(x) if into is None else into)
    dispatch.native.gelu_bwd(
        dy.data_ptr(), dy_stride, x.data_ptr(), x_stride, dx.data_ptr(), dx_stride,
        rows, cols, torch.get_num_threads(),
    )  # fmt: skip
    return row_quant.output_of(dx, dx.dtype, out, col_scale, into, impl="native")


def _fake_forward(
    x: Tensor, prefix: Tensor | None, out: str, into: Tensor | None, **_: Any
) -> list[Tensor]:
    width = None if prefix is None else prefix.shape[-1] + x.shape[-1]
    return row_quant.empty_parts(x, out, width, into)


def _fake_backward(
    saved: Sequence[Tensor], out: str, into: Tensor | None, **_: Any
) -> list[Tensor]:
    return row_quant.empty_parts(saved[0], out, into=into)


_forward_op = Op("gelu_fwd", forward, _fake_forward, writes=["into"])
_backward_op = Op("gelu_bwd", backward_rows, _fake_backward, writes=["dprefix", "into"])


def _as_rows(x: Tensor) -> tuple[Tensor, int, int, int]:
    """x (a copy if it must be), its number of rows, their length, and the distance between two."""
    cols = x.shape[-1] if x.ndim else 1
    rows = x.numel() // cols if cols else 0
    if x.is_contiguous():
        return x, rows, cols, cols
    # a slice of the columns of a wider contiguous tensor, as a packed projection gives it, is read
    # in place
    strides = x.stride()
    if strides[-1] == 1 and all(
        strides[i] == strides[i + 1] * x.shape[i + 1] for i in range(x.ndim - 2)
    ):
        return x, rows, cols, strides[-2]
    return x.contiguous(), rows, cols, cols


def _as_tokens(x: Tensor) -> Tensor:
    """x as the kernels take it, [B, S, K] or [R, K] with contiguous rows; a copy if it must be."""
    if x.ndim in (2, 3):
        return dense_rows(x)
    x, rows, cols, _ = _as_rows(x)
    return x.reshape(rows, cols)


def _target(into: Tensor | None) -> Tensor | None:
    """`_as_tokens` of the tensor that values are written to."""
    target = None if into is None else _as_tokens(into)
    # a copy would be written in its place
    assert into is None or (target is not None and target.data_ptr() == into.data_ptr())
    return target


def _like_rows(made: Sequence[Tensor | None], x: Tensor, into: Tensor | None) -> RowOutput:
    """What a kernel made of `_as_tokens(x)`, with x's leading dimensions; the values are `into`."""
    if x.ndim not in (2, 3):
        lead = x.shape[:-1]
        made = [
            None if part is None else part.reshape((*lead, *(part.shape[1:] if x.ndim else ())))
            for part in made
        ]
    y, q, q_scale = made
    return RowOutput(y if into is None else into, q, q_scale)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, out: str, impl: str) -> tuple[Tensor, ...]:
        output, saved = forward(x, out=out, impl=impl)
        ctx.save_for_backward(*saved)
        ctx.impl = impl
        return row_quant.autograd_outputs(ctx, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, None, None]:
        if dy is None:
            return None, None, None
        return *backward(dy, ctx.saved_tensors, ctx.needs_input_grad, impl=ctx.impl), None, None


@overload
def gelu(x: Tensor, impl: str = "auto", *, out: Literal["same"] = "same") -> Tensor: ...
@overload
def gelu(x: Tensor, impl: str = "auto", *, out: CodesOut) -> RowOutput: ...
def gelu(x: Tensor, impl: str = "auto", *, out: str = "same") -> Tensor | RowOutput:
    """GELU(x) in its tanh form; x of any shape. Backward keeps x only.

    `out` asks for the values ("same"), for their row-quantised codes ("int8", "e4m3"), or for both
    ("both-int8", "both-e4m3"); but for "same", a RowOutput comes back. A gradient comes in through
    the values only. Raises ValueError if `impl` can't do this call, or on another `out`. Source:
    diffusers' `GELU(approximate="tanh")`.
    """
    row_quant.check_out("gelu", out)
    backend = dispatch.resolve("gelu", impl, (x,))
    if backend == "ref":
        return row_quant.public_output(row_quant.ref_output(gelu_ref, x, out=out))
    return row_quant.public_output(row_quant.from_parts(_Gelu.apply(x, out, backend), out))
