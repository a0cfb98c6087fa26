"""A LinearGroup's products on Triton: registered ops over the kernels, which pack what they are
given where it lies.

Linears come as lists, one entry a linear (weights, row scales, biases) or an adapter (A, B,
scales), with `adapters`, how many of them each linear has. Neighbours whose weights adjoin in
memory are one launch; so packing is looked for where memory can be looked at, inside the ops, and
torch.compile need not know of it.
"""

import functools
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluxfast.ops import registration
from fluxfast.ops.linear import products_torch
from fluxfast.ops.linear.products_torch import adjoining, stack
from fluxfast.ops.tensors import dense_rows


class _Span(NamedTuple):
    """Linears that go in one launch, and what is theirs: columns of y, columns of s, and adapters."""

    linears: slice
    cols: slice
    ranks: slice
    adapters: slice


def _spans(
    outs: Sequence[int], ranks: Sequence[int], adapters: Sequence[int], packed: bool
) -> list[_Span]:
    """All linears as one span if `packed`, else one each. ranks, adapters: of each linear, Σ ranks
    and number of adapters.
    """
    cuts = [0, len(outs)] if packed else range(len(outs) + 1)
    cols, columns, of = ([0, *accumulate(sizes)] for sizes in (outs, ranks, adapters))
    return [
        _Span(
            slice(lo, hi),
            slice(cols[lo], cols[hi]),
            slice(columns[lo], columns[hi]),
            slice(of[lo], of[hi]),
        )
        for lo, hi in pairwise(cuts)
    ]


def _linear_ranks(b: Sequence[Tensor], adapters: Sequence[int]) -> list[int]:
    """The ranks of each linear's adapters, added up."""
    starts = [0, *accumulate(adapters)]
    return [sum(t.shape[1] for t in b[lo:hi]) for lo, hi in pairwise(starts)]


def _packs(outs: Sequence[int]) -> bool:
    """Whether one launch can take linears of these widths side by side."""
    from fluxfast_kernels._matmul import SEGMENT_UNIT

    return len(outs) == 1 or all(n % SEGMENT_UNIT.value == 0 for n in outs)


@functools.lru_cache(maxsize=256)
def _segments(outs: tuple[int, ...], ranks: tuple[int, ...], device: torch.device) -> Any:
    """The kernels' table for linears in one launch; None for one alone. Made once: a launch must
    not wait for a copy.
    """
    from fluxfast_kernels._matmul import make_segments

    return None if len(outs) == 1 else make_segments(outs, ranks, device)


@functools.lru_cache(maxsize=256)
def _rank_scales(
    scales: tuple[float, ...], ranks: tuple[int, ...], device: torch.device
) -> Tensor | None:
    """Each adapter's scale, for each of its ranks; None where all are 1."""
    if all(scale == 1 for scale in scales):
        return None
    values = [scale for scale, rank in zip(scales, ranks, strict=True) for _ in range(rank)]
    return torch.tensor(values, dtype=torch.float32).to(device)


def _packed_b(
    b: Sequence[Tensor], adapters: Sequence[int], outs: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The linears' B [N, widest], each linear's adapters side by side in its own rows; what is left
    over is never read.
    """
    alike = all(t.dtype == b[0].dtype for t in b)
    if alike and all(n == 1 for n in adapters) and all(t.shape[1] == b[0].shape[1] for t in b):
        return stack(b)
    packed = b[0].new_empty(
        sum(outs), max(_linear_ranks(b, adapters)), dtype=b[0].dtype if alike else dtype
    )
    row = first = 0
    for n, count in zip(outs, adapters, strict=True):
        col = 0
        for t in b[first : first + count]:
            packed[row : row + n, col : col + t.shape[1]] = t
            col += t.shape[1]
        row, first = row + n, first + count
    return packed


def _bias(biases: Sequence[Tensor | None], outs: Sequence[int]) -> Tensor | None:
    """The linears' biases as one vector, zeros for those that have none; None if none has."""
    like = next((bias for bias in biases if bias is not None), None)
    if like is None:
        return None
    return stack(
        [like.new_zeros(n) if bias is None else bias for bias, n in zip(biases, outs, strict=True)]
    )


def linear_down(
    x: Tensor, x_scale: Tensor | None, a: list[Tensor], scales: list[float], dtype: torch.dtype
) -> list[Tensor]:
    """s = scale · x Aᵀ [M, Σ ranks] in dtype; x [M, K] values, or codes with a scale a row."""
    from fluxfast_kernels.lora_linear import lora_down

    scale = _rank_scales(tuple(scales), tuple(t.shape[0] for t in a), x.device)
    return [lora_down(dense_rows(x), stack(a), scale=scale, x_scale=x_scale, out_dtype=dtype)]


def linear_ds(
    dy: Tensor, b: list[Tensor], scales: list[float], adapters: list[int], outs: list[int]
) -> list[Tensor]:
    """dS = scale · dy B [M, Σ ranks], each linear's from its own columns of dy [M, N]."""
    from fluxfast_kernels.lora_linear import lora_ds

    dy, ranks = dense_rows(dy), _linear_ranks(b, adapters)
    ds = dy.new_empty(dy.shape[0], sum(ranks))
    scale = _rank_scales(tuple(scales), tuple(t.shape[1] for t in b), dy.device)
    for linears, cols, columns, own in _spans(outs, ranks, adapters, _packs(outs)):
        if b[own]:
            packed = _packed_b(b[own], adapters[linears], outs[linears], dy.dtype)
            segments = _segments(tuple(outs[linears]), tuple(ranks[linears]), dy.device)
            lora_ds(
                dy[:, cols],
                packed,
                ds[:, columns],
                scale=None if scale is None else scale[columns],
                segments=segments,
            )
    return [ds]


def linear_db(
    dy: Tensor, s: Tensor, outs: list[int], ranks: list[int], dtype: torch.dtype
) -> list[Tensor]:
    """dB = dyᵀ s [N, widest], a linear's rows from its own columns of dy [M, N] and of s [M, Σ
    ranks].
    """
    from fluxfast_kernels.lora_linear import lora_db

    dy = dense_rows(dy)
    db = dy.new_empty(sum(outs), max(ranks), dtype=dtype)
    for linears, cols, columns, _ in _spans(outs, ranks, ranks, _packs(outs)):
        if widest := max(ranks[linears]):
            segments = _segments(tuple(outs[linears]), tuple(ranks[linears]), dy.device)
            lora_db(dy[:, cols], s[:, columns], db[cols, :widest], segments=segments)
    return [db]


def linear_da(ds: Tensor, x: Tensor, x_scale: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """dA = dSᵀ x [Σ ranks, K]; x [M, K] as `linear_down` takes it."""
    from fluxfast_kernels.lora_linear import lora_da

    return [lora_da(dense_rows(x), ds, x_scale=x_scale, grad_dtype=dtype)]


def linear_fwd(
    x: Tensor,
    x_scale: Tensor | None,
    weights: list[Tensor],
    w_scales: list[Tensor],
    biases: list[Tensor | None],
    s: Tensor | None,
    b: list[Tensor],
    adapters: list[int],
    y: Tensor,
) -> None:
    """y [M, N] = x Wᵀ + s Bᵀ + bias; x and W values, or codes with a scale a row (W's codes with
    x's values, too).
    """
    from fluxfast_kernels import lora_linear, quant_matmul

    x, outs, ranks = dense_rows(x), [w.shape[0] for w in weights], _linear_ranks(b, adapters)
    joined = adjoining(weights) if _packs(outs) else None
    for linears, cols, columns, own in _spans(outs, ranks, adapters, joined is not None):
        w = weights[linears.start] if joined is None else joined
        y_i, bias = y[:, cols], _bias(biases[linears], outs[linears])
        u, v, segments = None, None, None
        if s is not None and b[own]:
            u, v = s[:, columns], _packed_b(b[own], adapters[linears], outs[linears], y.dtype)
            segments = _segments(tuple(outs[linears]), tuple(ranks[linears]), x.device)
        if w_scales:
            quant_matmul.quant_matmul(
                x, x_scale, w, stack(w_scales[linears]), bias=bias, lora_s=u, lora_b=v, segments=segments,
                out=y_i, out_dtype=y.dtype,
            )  # fmt: skip
        elif _library_takes(x, w):
            products_torch.product(x, w, bias, y_i)
            if u is not None:
                products_torch.add_up(y_i, u, b[own], adapters[linears], outs[linears])
        else:
            lora_linear.lora_matmul(x, w, bias=bias, lora_s=u, lora_b=v, segments=segments, out=y_i)


def linear_dgrad(
    dy: Tensor,
    dy_scale: Tensor | None,
    col: int,
    weights: list[Tensor],
    w_scales: list[Tensor],
    ds: Tensor | None,
    a: list[Tensor],
    accumulate: bool,
    dx: Tensor,
) -> None:
    """dx [M, K] = (or, with `accumulate`, +=) dy W + dS A, for dy's columns from `col` on.

    dy: values, or codes of dy · w_scales with a scale a row. With values and w_scales, W is codes.
    """
    from fluxfast_kernels import lora_linear, quant_matmul

    dy, stop, start = dense_rows(dy), col + dy.shape[1], 0
    u, v = ds, None if ds is None else stack(a)
    joined = adjoining(weights)
    for weight in weights if joined is None else [joined]:
        lo, hi = max(col, start), min(stop, start + weight.shape[0])
        w = weight[max(lo - start, 0) : max(hi - start, 0)]
        start += weight.shape[0]
        if lo >= hi:
            continue
        dy_i = dy[:, lo - col : hi - col]
        if w_scales:
            if dy_scale is None:
                dy_i = dy_i * stack(w_scales)[lo:hi].to(dy.dtype)
            quant_matmul.quant_matmul_dgrad(
                dy_i,
                dy_scale,
                w,
                lora_ds=u,
                lora_a=v,
                out=dx,
                out_dtype=dx.dtype,
                accumulate=accumulate,
            )
        elif _library_takes(dy, w):
            products_torch.product(dy_i, w.T, None, dx, accumulate)
            if u is not None and v is not None:
                dx.addmm_(u, v.to(dx.dtype))
        else:
            lora_linear.lora_matmul_dgrad(
                dy_i, w, lora_ds=u, lora_a=v, out=dx, accumulate=accumulate
            )
        # the first launch has all of dS A
        accumulate, u, v = True, None, None


def linear_transpose(w: Tensor) -> list[Tensor]:
    """A contiguous [K, N] copy of the codes w [N, K]."""
    from fluxfast_kernels.quant_matmul import transpose_codes

    return [transpose_codes(w)]


def _library_takes(x: Tensor, w: Tensor) -> bool:
    from fluxfast_kernels._launch import wide_engine

    return x.dtype == w.dtype and wide_engine("float", x.shape[0], x.device) == "library"


def keeps_codes(fmt: str, tokens: int, device: torch.device) -> bool:
    """Whether a product of values with a weight stored as codes reads the codes, in place of
    decoding them first.
    """
    from fluxfast_kernels._launch import wide_engine

    return wide_engine(fmt, tokens, device) == "codes"


def linear_dropout(x: Tensor, p: float, seed: int) -> list[Tensor]:
    """x [M, K] · mask, the mask 0 with probability p and else 1 / (1 - p): a function of seed, row
    and column.
    """
    from fluxfast_kernels.dropout import dropout

    return [dropout(dense_rows(x), p, seed)]


_down_op, _ds_op, _db_op = (
    registration.register(linear_down),
    registration.register(linear_ds),
    registration.register(linear_db),
)
_da_op, _dropout_op = registration.register(linear_da), registration.register(linear_dropout)
_transpose_op = registration.register(linear_transpose)
_fwd_op = torch.library.custom_op("fluxfast::linear_fwd", linear_fwd, mutates_args=("y",))
_dgrad_op = torch.library.custom_op("fluxfast::linear_dgrad", linear_dgrad, mutates_args=("dx",))


@_down_op.register_fake
def _(
    x: Tensor, x_scale: Tensor | None, a: list[Tensor], scales: list[float], dtype: torch.dtype
) -> list[Tensor]:
    return [x.new_empty(x.shape[0], sum(t.shape[0] for t in a), dtype=dtype)]


@_ds_op.register_fake
def _(
    dy: Tensor, b: list[Tensor], scales: list[float], adapters: list[int], outs: list[int]
) -> list[Tensor]:
    return [dy.new_empty(dy.shape[0], sum(t.shape[1] for t in b))]


@_db_op.register_fake
def _(dy: Tensor, s: Tensor, outs: list[int], ranks: list[int], dtype: torch.dtype) -> list[Tensor]:
    return [dy.new_empty(sum(outs), max(ranks), dtype=dtype)]


@_da_op.register_fake
def _(ds: Tensor, x: Tensor, x_scale: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    return [x.new_empty(ds.shape[1], x.shape[1], dtype=dtype)]


@_transpose_op.register_fake
def _(w: Tensor) -> list[Tensor]:
    return [w.new_empty(w.shape[1], w.shape[0])]


@_dropout_op.register_fake
def _(x: Tensor, p: float, seed: int) -> list[Tensor]:
    return [x.new_empty(x.shape)]


@_fwd_op.register_fake
def _(*args: Any) -> None:
    return None


@_dgrad_op.register_fake
def _(*args: Any) -> None:
    return None


# the products as LinearGroup calls them


def down(
    x: Tensor, x_scale: Tensor | None, a: list[Tensor], scales: list[float], dtype: torch.dtype
) -> Tensor:
    return registration.launcher(x, linear_down, _down_op)(x, x_scale, a, scales, dtype)[0]


def down_grad(
    dy: Tensor, b: list[Tensor], scales: list[float], adapters: list[int], outs: list[int]
) -> Tensor:
    return registration.launcher(dy, linear_ds, _ds_op)(dy, b, scales, adapters, outs)[0]


def grad_a(ds: Tensor, x: Tensor, x_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return registration.launcher(ds, linear_da, _da_op)(ds, x, x_scale, dtype)[0]


def grad_b(dy: Tensor, s: Tensor, outs: list[int], ranks: list[int], dtype: torch.dtype) -> Tensor:
    return registration.launcher(dy, linear_db, _db_op)(dy, s, outs, ranks, dtype)[0]


def wide(x: Tensor, *args: Any) -> None:
    registration.launcher(x, linear_fwd, _fwd_op)(x, *args)


def for_dgrad(weights: list[Tensor], tokens: int) -> list[Tensor]:
    """Codes in the order in memory that dgrad of so many tokens wants: as they are, or `.T` of
    transposed copies.
    """
    from fluxfast_kernels._launch import dgrad_transposes

    if not dgrad_transposes(tokens, weights[0].device):
        return weights
    joined = adjoining(weights)
    whole = weights if joined is None else [joined]
    return [registration.launcher(w, linear_transpose, _transpose_op)(w)[0].T for w in whole]


def wide_dgrad(dy: Tensor, *args: Any) -> None:
    registration.launcher(dy, linear_dgrad, _dgrad_op)(dy, *args)


def dropped(x: Tensor, p: float, seed: int) -> Tensor:
    return registration.launcher(x, linear_dropout, _dropout_op)(x, p, seed)[0]
