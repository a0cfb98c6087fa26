"""A LinearGroup's products by Triton's kernels, with the functions and arguments of
`products_torch`.

Neighbours whose weights adjoin in memory are one launch. What torch.compile has to see is a
registered op, inside which memory can be looked at, so packing works there as well.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fluxfast.ops.linear import products_torch, transposed_codes
from fluxfast.ops.linear.products_torch import adjoining, linear_ranks, stack
from fluxfast.ops.linear.thin_triton import (
    SecondLoras,
    down,
    grad_a,
    lora_grads,
    packed_b,
    packs,
    segments_of,
    spans,
)
from fluxfast.ops.registration import Op, is_traced
from fluxfast.ops.tensors import dense_rows

__all__ = ["SecondLoras", "down", "grad_a", "lora_grads"]


def _bias(biases: Sequence[Tensor | None], outs: Sequence[int]) -> Tensor | None:
    """The linears' biases as one vector, zeros for those that have none; None if none has."""
    like = next((bias for bias in biases if bias is not None), None)
    if like is None:
        return None
    return stack(
        [like.new_zeros(n) if bias is None else bias for bias, n in zip(biases, outs, strict=True)]
    )


class SecondLinears(NamedTuple):
    """The linears that a second part of the rows meets, from row `rows` on.

    The fields are as the arguments of `wide` and `wide_dgrad` of these names. The linears and their
    LoRAs are as many as the first part's, and alike in shape.
    """

    rows: int
    weights: list[Tensor]
    w_scales: list[Tensor]
    biases: Sequence[Tensor | None] = ()
    b: Sequence[Tensor] = ()
    a: Sequence[Tensor] = ()


def wide(
    x: Tensor, x_scale: Tensor | None, weights: list[Tensor], w_scales: list[Tensor],
    biases: list[Tensor | None], s: Tensor | None, b: list[Tensor], counts: list[int], y: Tensor,
    *, second: SecondLinears | None = None,
) -> None:  # fmt: skip
    """Writes x Wᵀ + s Bᵀ + bias to y [M, N]. W may be codes where x is values.

    With `second`, the rows from `second.rows` on meet its linears.
    """
    if second is not None and _library_takes(x, weights[0], adapted=s is not None):
        for rows, met in (
            (slice(second.rows), SecondLinears(0, weights, w_scales, biases, b)),
            (slice(second.rows, None), second),
        ):
            wide(
                x[rows], None if x_scale is None else x_scale[rows], met.weights, met.w_scales,
                list(met.biases), None if s is None else s[rows], list(met.b), counts, y[rows],
            )  # fmt: skip
        return
    if is_traced(x):
        _wide_op(x, x_scale, weights, w_scales, biases, s, b, counts, y, second=second)
        return
    from fluxfast_kernels.matmul import Second, matmul

    x, outs, ranks = dense_rows(x), [w.shape[0] for w in weights], linear_ranks(b, counts)
    first = SecondLinears(0, weights, w_scales, biases, b)
    parts = [first] if second is None else [first, second]
    joined = [adjoining(part.weights) for part in parts] if packs(outs) else [None]
    packed = [w for w in joined if w is not None]
    for linears, cols, columns, own in spans(outs, ranks, counts, len(packed) == len(parts)):
        y_i, u, segments = y[:, cols], None, None
        if s is not None and b[own]:
            u = s[:, columns]
            segments = segments_of(tuple(outs[linears]), tuple(ranks[linears]), x.device)
        # of each part what `Second` has after its first row
        operands: list[tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]] = []
        for i, part in enumerate(parts):
            w = packed[i] if len(packed) == len(parts) else part.weights[linears.start]
            scale = stack(part.w_scales[linears]) if w_scales else None
            v = None
            if u is not None:
                v = packed_b(part.b[own], counts[linears], outs[linears], y.dtype)
            operands.append((w, scale, _bias(part.biases[linears], outs[linears]), v))
        w, scale, bias, v = operands[0]
        if not w_scales and _library_takes(x, w, adapted=u is not None):
            products_torch.product(x, w, bias, y_i)
            if u is not None:
                products_torch.add_up(y_i, u, b[own], counts[linears], outs[linears])
            continue
        matmul(
            x, w, x_scale=x_scale, w_scale=scale, bias=bias, u=u, v=v, segments=segments, out=y_i,
            second=None if second is None else Second(second.rows, *operands[1]),
        )  # fmt: skip


def reads_transposed(device: torch.device) -> bool:
    """Whether dgrad on that device reads transposed copies of codes, where they are there."""
    from fluxfast_kernels.launch import arch_key, reads_transposed

    # torch.compile could not find them again
    return reads_transposed(arch_key(device)) and not torch.compiler.is_compiling()


def for_dgrad(weights: list[Tensor], tokens: int) -> list[Tensor]:
    """Codes in the order in memory that dgrad of so many tokens wants.

    They come as they are, or as `.T` of transposed copies: of those that are there already, or of
    new ones where they pay.
    """
    from fluxfast_kernels.launch import dgrad_transposes

    if (copies := transposed_codes.copies_of(weights)) is not None:
        return [copy.T for copy in copies]
    if not dgrad_transposes(tokens, weights[0].device):
        return weights
    joined = adjoining(weights)
    return [_transposed(w).T for w in (weights if joined is None else [joined])]


def quantize_both_ways(w: Tensor, q: Tensor, scale: Tensor, copy: Tensor) -> None:
    """Writes codes q [N, K] of w [N, K], their row scales [N] fp32, and q transposed [K, N]."""
    if is_traced(w):
        _both_ways_op(w, q, scale, copy)
        return
    from fluxfast_kernels.dequant_rows import quantize_both_ways

    quantize_both_ways(dense_rows(w), q, scale, copy)


def _transposed(w: Tensor) -> Tensor:
    """A contiguous [K, N] copy of the codes w [N, K]."""
    if is_traced(w):
        (t,) = _transposed_op(w)
        return t
    from fluxfast_kernels import quant_matmul

    return quant_matmul.transpose_codes(w)


def wide_dgrad(
    dy: Tensor, dy_scale: Tensor | None, col: int, weights: list[Tensor], w_scales: list[Tensor],
    ds: Tensor | None, a: list[Tensor], accumulate: bool, dx: Tensor,
    *, second: SecondLinears | None = None,
) -> None:  # fmt: skip
    """Writes dy W + dS A to dx [M, K], or adds it, for dy's columns from `col` on.

    Codes of dy are those of dy · w_scales. W may be codes where dy is values. With `second`, the
    rows from `second.rows` on meet its linears.
    """
    # values meet stored codes with the codes' scales folded into them, those of their part
    of_codes = len(w_scales) > 0 and dy_scale is None
    if second is not None and (of_codes or _library_takes(dy, weights[0], adapted=ds is not None)):
        for part, own in (
            (slice(second.rows), SecondLinears(0, weights, w_scales, a=a)),
            (slice(second.rows, None), second),
        ):
            wide_dgrad(
                dy[part], None if dy_scale is None else dy_scale[part], col, own.weights,
                own.w_scales, None if ds is None else ds[part], list(own.a), accumulate, dx[part],
            )  # fmt: skip
        return
    if is_traced(dy):
        _wide_dgrad_op(
            dy, dy_scale, col, weights, w_scales, ds, a, accumulate, dx, second=second
        )  # fmt: skip
        return
    from fluxfast_kernels.matmul import Second, matmul

    dy, stop, start = dense_rows(dy), col + dy.shape[1], 0
    first = SecondLinears(0, weights, w_scales, a=a)
    parts = [first] if second is None else [first, second]
    u, vs = ds, [None if ds is None else stack(part.a).T for part in parts]
    joined = [adjoining(part.weights) for part in parts]
    if any(w is None for w in joined):
        of_parts = [part.weights for part in parts]
    else:
        of_parts = [[w] for w in joined if w is not None]
    for of_linear in zip(*of_parts, strict=True):
        lo, hi = max(col, start), min(stop, start + of_linear[0].shape[0])
        ws = [w[max(lo - start, 0) : max(hi - start, 0)].T for w in of_linear]
        start += of_linear[0].shape[0]
        if lo >= hi:
            continue
        dy_i = dy[:, lo - col : hi - col]
        if not w_scales and _library_takes(dy, ws[0], adapted=u is not None):
            products_torch.product(dy_i, ws[0], None, dx, accumulate)
            if u is not None and vs[0] is not None:
                dx.addmm_(u, vs[0].T.to(dx.dtype))
        else:
            if of_codes:
                dy_i = dy_i * stack(w_scales)[lo:hi].to(dy.dtype)
            matmul(
                dy_i, ws[0], x_scale=dy_scale, u=u, v=vs[0], out=dx, accumulate=accumulate,
                second=None if second is None else Second(second.rows, ws[1], v=vs[1]),
            )  # fmt: skip
        # the first launch has all of dS A
        accumulate, u, vs = True, None, [None] * len(parts)


def dropped(x: Tensor, p: float, seed: Tensor, number: int) -> Tensor:
    """x · mask, where the mask is 0 with probability p and else 1 / (1 - p).

    The mask is a function of row, column, number, and seed, a tensor of one int64.
    """
    if is_traced(x):
        (y,) = _dropped_op(x, p, seed, number)
        return y
    from fluxfast_kernels.dropout import dropout

    return dropout(dense_rows(x), p, seed, number)


def keeps_codes(fmt: str, tokens: int, device: torch.device) -> bool:
    """Whether a product of values with a weight that is stored as codes reads the codes.

    Else the weight is decoded first.
    """
    from fluxfast_kernels.launch import wide_engine

    return wide_engine(fmt, tokens, device) == "codes"


def augments(tokens: int, device: torch.device) -> bool:
    """Whether a product of values takes adapters with an augmented weight, where there is one."""
    from fluxfast_kernels.launch import wide_engine

    compiling = torch.compiler.is_compiling()
    return not compiling and wide_engine("float", tokens, device) == "augmented"


def _library_takes(x: Tensor, w: Tensor, *, adapted: bool) -> bool:
    from fluxfast_kernels.launch import wide_engine

    engine = wide_engine("float", x.shape[0], x.device)
    # adapters that an augmented weight could not take are fused
    return x.dtype == w.dtype and engine in (("library",) if adapted else ("library", "augmented"))


# what torch.compile and tensor subclasses see


_transposed_op = Op(
    "linear_transpose", _transposed, lambda w: [w.new_empty(w.shape[1], w.shape[0])]
)
_both_ways_op = Op("linear_codes", quantize_both_ways, writes=["q", "scale", "copy"])
_dropped_op = Op("linear_dropout", dropped, lambda x, **_: [x.new_empty(x.shape)])
_wide_op = Op("linear_fwd", wide, writes=["y"])
_wide_dgrad_op = Op("linear_dgrad", wide_dgrad, writes=["dx"])
