"""A LinearGroup's products by Triton's kernels, with the functions and arguments of
`products_torch`.

Neighbours whose weights adjoin in memory are one launch. What torch.compile has to see is a
registered op, inside which memory can be looked at, so packing works there as well.
"""

import functools
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluxfast.ops.linear import products_torch
from fluxfast.ops.linear.products_torch import adjoining, stack
from fluxfast.ops.registration import Op, is_traced
from fluxfast.ops.tensors import dense_rows


class _Span(NamedTuple):
    """Linears that go in one launch: their columns of y, their columns of s, and their LoRAs."""

    linears: slice
    cols: slice
    ranks: slice
    loras: slice


def _spans(
    outs: Sequence[int], ranks: Sequence[int], counts: Sequence[int], packed: bool
) -> list[_Span]:
    """All linears as one span if `packed`, else one each; ranks: Σ ranks of each linear."""
    cuts = [0, len(outs)] if packed else range(len(outs) + 1)
    cols, columns, of = ([0, *accumulate(sizes)] for sizes in (outs, ranks, counts))
    return [
        _Span(
            slice(lo, hi),
            slice(cols[lo], cols[hi]),
            slice(columns[lo], columns[hi]),
            slice(of[lo], of[hi]),
        )
        for lo, hi in pairwise(cuts)
    ]


def _linear_ranks(b: Sequence[Tensor], counts: Sequence[int]) -> list[int]:
    """The ranks of each linear's LoRAs, added up."""
    starts = [0, *accumulate(counts)]
    return [sum(t.shape[1] for t in b[lo:hi]) for lo, hi in pairwise(starts)]


def _packs(outs: Sequence[int]) -> bool:
    """Whether one launch can take linears of these widths side by side."""
    from fluxfast_kernels.matmul import SEGMENT_UNIT

    return len(outs) == 1 or all(n % SEGMENT_UNIT.value == 0 for n in outs)


@functools.lru_cache(maxsize=256)
def _segments(outs: tuple[int, ...], ranks: tuple[int, ...], device: torch.device) -> Any:
    """The kernels' table for linears in one launch; None for one alone.

    Made once, because a launch must not wait for a copy to the device.
    """
    from fluxfast_kernels.matmul import make_segments

    return None if len(outs) == 1 else make_segments(outs, ranks, device)


@functools.lru_cache(maxsize=256)
def _rank_scales(
    scales: tuple[float, ...], ranks: tuple[int, ...], device: torch.device
) -> Tensor | None:
    """Each LoRA's scale, for each of its ranks; None where all are 1."""
    if all(scale == 1 for scale in scales):
        return None
    values = [scale for scale, rank in zip(scales, ranks, strict=True) for _ in range(rank)]
    return torch.tensor(values, dtype=torch.float32).to(device)


def _packed_b(
    b: Sequence[Tensor], counts: Sequence[int], outs: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The linears' B [N, widest], each linear's LoRAs side by side in its own rows.

    The columns left over, where a linear has fewer ranks than the widest, are never read.
    """
    alike = all(t.dtype == b[0].dtype for t in b)
    if alike and all(n == 1 for n in counts) and all(t.shape[1] == b[0].shape[1] for t in b):
        return stack(b)
    widest = max(_linear_ranks(b, counts))
    packed = b[0].new_empty(sum(outs), widest, dtype=b[0].dtype if alike else dtype)
    row = first = 0
    for n, count in zip(outs, counts, strict=True):
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


def down(
    x: Tensor, x_scale: Tensor | None, a: list[Tensor], scales: list[float], dtype: torch.dtype
) -> Tensor:
    """s = scale · x Aᵀ [M, Σ ranks] in dtype."""
    if is_traced(x):
        (s,) = _down_op(x, x_scale, a, scales, dtype)
        return s
    from fluxfast_kernels.lora_linear import lora_down

    ranks = tuple(t.shape[0] for t in a)
    s = x.new_empty(x.shape[0], sum(ranks), dtype=dtype)
    scale = _rank_scales(tuple(scales), ranks, x.device)
    return lora_down(dense_rows(x), stack(a), s, scale=scale, x_scale=x_scale)


def down_grad(
    dy: Tensor, b: list[Tensor], scales: list[float], counts: list[int], outs: list[int]
) -> Tensor:
    """dS = scale · dy B [M, Σ ranks], each linear's from its own columns of dy."""
    if is_traced(dy):
        (ds,) = _down_grad_op(dy, b, scales, counts, outs)
        return ds
    from fluxfast_kernels.lora_linear import lora_down

    dy, ranks = dense_rows(dy), _linear_ranks(b, counts)
    ds = dy.new_empty(dy.shape[0], sum(ranks))
    scale = _rank_scales(tuple(scales), tuple(t.shape[1] for t in b), dy.device)
    for linears, cols, columns, own in _spans(outs, ranks, counts, _packs(outs)):
        if b[own]:
            packed = _packed_b(b[own], counts[linears], outs[linears], dy.dtype)
            lora_down(
                dy[:, cols], packed.T, ds[:, columns],
                scale=None if scale is None else scale[columns],
                segments=_segments(tuple(outs[linears]), tuple(ranks[linears]), dy.device),
            )  # fmt: skip
    return ds


def grad_a(ds: Tensor, x: Tensor, x_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """dA = dSᵀ x [Σ ranks, K]."""
    if is_traced(ds):
        (da,) = _grad_a_op(ds, x, x_scale, dtype)
        return da
    from fluxfast_kernels.lora_linear import lora_outer

    da = x.new_empty(ds.shape[1], x.shape[1], dtype=dtype)
    return lora_outer(dense_rows(x), ds, da, x_scale=x_scale, transposed=True)


def grad_b(dy: Tensor, s: Tensor, outs: list[int], ranks: list[int], dtype: torch.dtype) -> Tensor:
    """dB = dyᵀ s [N, widest], a linear's rows from its own columns of dy and of s [M, Σ ranks].

    ranks: the ranks of each linear's LoRAs, added up.
    """
    if is_traced(dy):
        (db,) = _grad_b_op(dy, s, outs, ranks, dtype)
        return db
    from fluxfast_kernels.lora_linear import lora_outer

    dy = dense_rows(dy)
    db = dy.new_empty(sum(outs), max(ranks), dtype=dtype)
    for linears, cols, columns, _ in _spans(outs, ranks, ranks, _packs(outs)):
        if widest := max(ranks[linears]):
            segments = _segments(tuple(outs[linears]), tuple(ranks[linears]), dy.device)
            lora_outer(dy[:, cols], s[:, columns], db[cols, :widest], segments=segments)
    return db


def wide(
    x: Tensor, x_scale: Tensor | None, weights: list[Tensor], w_scales: list[Tensor],
    biases: list[Tensor | None], s: Tensor | None, b: list[Tensor], counts: list[int], y: Tensor,
) -> None:  # fmt: skip
    """Writes x Wᵀ + s Bᵀ + bias to y [M, N]. W may be codes where x is values."""
    if is_traced(x):
        _wide_op(x, x_scale, weights, w_scales, biases, s, b, counts, y)
        return
    from fluxfast_kernels.matmul import matmul

    x, outs, ranks = dense_rows(x), [w.shape[0] for w in weights], _linear_ranks(b, counts)
    joined = adjoining(weights) if _packs(outs) else None
    for linears, cols, columns, own in _spans(outs, ranks, counts, joined is not None):
        w = weights[linears.start] if joined is None else joined
        y_i, bias = y[:, cols], _bias(biases[linears], outs[linears])
        u, v, segments = None, None, None
        if s is not None and b[own]:
            u, v = s[:, columns], _packed_b(b[own], counts[linears], outs[linears], y.dtype)
            segments = _segments(tuple(outs[linears]), tuple(ranks[linears]), x.device)
        if not w_scales and _library_takes(x, w):
            products_torch.product(x, w, bias, y_i)
            if u is not None:
                products_torch.add_up(y_i, u, b[own], counts[linears], outs[linears])
            continue
        scale = stack(w_scales[linears]) if w_scales else None
        matmul(
            x, w, x_scale=x_scale, w_scale=scale, bias=bias, u=u, v=v, segments=segments, out=y_i
        )


def for_dgrad(weights: list[Tensor], tokens: int) -> list[Tensor]:
    """Codes in the order in memory that dgrad of so many tokens wants.

    They come as they are, or as `.T` of transposed copies.
    """
    from fluxfast_kernels.launch import dgrad_transposes

    if not dgrad_transposes(tokens, weights[0].device):
        return weights
    joined = adjoining(weights)
    return [_transposed(w).T for w in (weights if joined is None else [joined])]


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
) -> None:  # fmt: skip
    """Writes dy W + dS A to dx [M, K], or adds it, for dy's columns from `col` on.

    Codes of dy are those of dy · w_scales. W may be codes where dy is values.
    """
    if is_traced(dy):
        _wide_dgrad_op(dy, dy_scale, col, weights, w_scales, ds, a, accumulate, dx)
        return
    from fluxfast_kernels.matmul import matmul

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
        if not w_scales and _library_takes(dy, w):
            products_torch.product(dy_i, w.T, None, dx, accumulate)
            if u is not None and v is not None:
                dx.addmm_(u, v.to(dx.dtype))
        else:
            if w_scales and dy_scale is None:
                dy_i = dy_i * stack(w_scales)[lo:hi].to(dy.dtype)
            v_t = None if v is None else v.T
            matmul(dy_i, w.T, x_scale=dy_scale, u=u, v=v_t, out=dx, accumulate=accumulate)
        # the first launch has all of dS A
        accumulate, u, v = True, None, None


def dropped(x: Tensor, p: float, seed: int) -> Tensor:
    """x · mask, where the mask is 0 with probability p and else 1 / (1 - p).

    The mask is a function of seed, row and column.
    """
    if is_traced(x):
        (y,) = _dropped_op(x, p, seed)
        return y
    from fluxfast_kernels.dropout import dropout

    return dropout(dense_rows(x), p, seed)


def keeps_codes(fmt: str, tokens: int, device: torch.device) -> bool:
    """Whether a product of values with a weight that is stored as codes reads the codes.

    Else the weight is decoded first.
    """
    from fluxfast_kernels.launch import wide_engine

    return wide_engine(fmt, tokens, device) == "codes"


def _library_takes(x: Tensor, w: Tensor) -> bool:
    from fluxfast_kernels.launch import wide_engine

    return x.dtype == w.dtype and wide_engine("float", x.shape[0], x.device) == "library"


# what torch.compile and tensor subclasses see


def _fake_down(x: Tensor, a: Sequence[Tensor], dtype: torch.dtype, **_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape[0], sum(t.shape[0] for t in a), dtype=dtype)]


def _fake_down_grad(dy: Tensor, b: Sequence[Tensor], **_: Any) -> list[Tensor]:
    return [dy.new_empty(dy.shape[0], sum(t.shape[1] for t in b))]


def _fake_grad_a(ds: Tensor, x: Tensor, dtype: torch.dtype, **_: Any) -> list[Tensor]:
    return [x.new_empty(ds.shape[1], x.shape[1], dtype=dtype)]


def _fake_grad_b(
    dy: Tensor, outs: Sequence[int], ranks: Sequence[int], dtype: torch.dtype, **_: Any
) -> list[Tensor]:
    return [dy.new_empty(sum(outs), max(ranks), dtype=dtype)]


_down_op = Op("linear_down", down, _fake_down)
_down_grad_op = Op("linear_ds", down_grad, _fake_down_grad)
_grad_a_op = Op("linear_da", grad_a, _fake_grad_a)
_grad_b_op = Op("linear_db", grad_b, _fake_grad_b)
_transposed_op = Op(
    "linear_transpose", _transposed, lambda w: [w.new_empty(w.shape[1], w.shape[0])]
)
_dropped_op = Op("linear_dropout", dropped, lambda x, **_: [x.new_empty(x.shape)])
_wide_op = Op("linear_fwd", wide, writes=["y"])
_wide_dgrad_op = Op("linear_dgrad", wide_dgrad, writes=["dx"])
