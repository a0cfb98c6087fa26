"""The thin products of a LinearGroup's adapters by Triton's kernels.

They are part of `products_triton`, which has the wide ones: one side of a thin product is as short
as the adapters' ranks.
"""

import functools
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluxfast.ops.linear.products_torch import linear_ranks, stack
from fluxfast.ops.registration import Op, is_traced
from fluxfast.ops.tensors import dense_rows
from fluxfast_kernels.launch import constant


class Span(NamedTuple):
    """Linears that go in one launch: their columns of y, their columns of s, and their LoRAs."""

    linears: slice
    cols: slice
    ranks: slice
    loras: slice


def spans(
    outs: Sequence[int], ranks: Sequence[int], counts: Sequence[int], packed: bool
) -> list[Span]:
    """All linears as one span if `packed`, else one each; ranks: Σ ranks of each linear."""
    cuts = [0, len(outs)] if packed else range(len(outs) + 1)
    cols, columns, of = ([0, *accumulate(sizes)] for sizes in (outs, ranks, counts))
    return [
        Span(
            slice(lo, hi),
            slice(cols[lo], cols[hi]),
            slice(columns[lo], columns[hi]),
            slice(of[lo], of[hi]),
        )
        for lo, hi in pairwise(cuts)
    ]


def packs(outs: Sequence[int]) -> bool:
    """Whether one launch can take linears of these widths side by side."""
    from fluxfast_kernels.product_tile import SEGMENT_UNIT

    return len(outs) == 1 or all(n % SEGMENT_UNIT.value == 0 for n in outs)


@functools.lru_cache(maxsize=256)
def segments_of(outs: tuple[int, ...], ranks: tuple[int, ...], device: torch.device) -> Any:
    """The kernels' table for linears in one launch; None for one alone.

    Made once, because a launch must not wait for a copy to the device.
    """
    from fluxfast_kernels.product_tile import make_segments

    if len(outs) == 1:
        return None
    segments = make_segments(outs, ranks, device)
    return segments._replace(table=constant(segments.table))


@functools.lru_cache(maxsize=256)
def _rank_scales(
    scales: tuple[float, ...], ranks: tuple[int, ...], device: torch.device
) -> Tensor | None:
    """Each LoRA's scale, for each of its ranks; None where all are 1."""
    if all(scale == 1 for scale in scales):
        return None
    values = [scale for scale, rank in zip(scales, ranks, strict=True) for _ in range(rank)]
    return constant(torch.tensor(values, dtype=torch.float32).to(device))


def packed_b(
    b: Sequence[Tensor], counts: Sequence[int], outs: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The linears' B [N, widest], each linear's LoRAs side by side in its own rows.

    The columns left over, where a linear has fewer ranks than the widest, are never read.
    """
    alike = all(t.dtype == b[0].dtype for t in b)
    if alike and all(n == 1 for n in counts) and all(t.shape[1] == b[0].shape[1] for t in b):
        return stack(b)
    widest = max(linear_ranks(b, counts))
    packed = b[0].new_empty(sum(outs), widest, dtype=b[0].dtype if alike else dtype)
    row = first = 0
    for n, count in zip(outs, counts, strict=True):
        col = 0
        for t in b[first : first + count]:
            packed[row : row + n, col : col + t.shape[1]] = t
            col += t.shape[1]
        row, first = row + n, first + count
    return packed


class SecondLoras(NamedTuple):
    """The LoRAs of a second part of the rows, from row `rows` on: their A (or B) and their scales.

    They are as many as the first part's, of the same shapes and in the same order.
    """

    rows: int
    tensors: list[Tensor]
    scales: list[float]


def _scales_of_parts(
    scales: list[float], second: SecondLoras | None, ranks: tuple[int, ...], device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """The scales of each rank in both parts; None for both where all are 1."""
    if second is None:
        return _rank_scales(tuple(scales), ranks, device), None
    both = _rank_scales((*scales, *second.scales), 2 * ranks, device)
    return (None, None) if both is None else (both[: sum(ranks)], both[sum(ranks) :])


def down(
    x: Tensor,
    x_scale: Tensor | None,
    a: list[Tensor],
    scales: list[float],
    dtype: torch.dtype,
    *,
    second: SecondLoras | None = None,
    copy: Tensor | None = None,
) -> Tensor:
    """s = scale · x Aᵀ [M, Σ ranks] in dtype, written to `copy` as well where that is given.

    With `second`, the rows from `second.rows` on meet its A.
    """
    if is_traced(x):
        (s,) = _down_op(x, x_scale, a, scales, dtype, second=second, copy=copy)
        return s
    from fluxfast_kernels.lora_linear import SecondDown, lora_down

    ranks = tuple(t.shape[0] for t in a)
    s = x.new_empty(x.shape[0], sum(ranks), dtype=dtype)
    scale, scale_2 = _scales_of_parts(scales, second, ranks, x.device)
    part = None if second is None else SecondDown(second.rows, stack(second.tensors), scale_2)
    return lora_down(
        dense_rows(x), stack(a), s, scale=scale, x_scale=x_scale, second=part, copy=copy
    )


def lora_grads(
    dy: Tensor,
    s: Tensor,
    b: list[Tensor],
    scales: list[float],
    counts: list[int],
    outs: list[int],
    dtype: torch.dtype,
    *,
    second: SecondLoras | None = None,
    out: Tensor | None = None,
    db: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Any]:
    """dS = scale · dy B [M, Σ ranks] in dy's dtype, and dB = dyᵀ s [N, widest] in `dtype`.

    Each linear's are from its own columns of dy and of s [M, Σ ranks]. dS is written to `out` where
    that is given. With `second`, the rows from `second.rows` on meet its B, and dB is
    [2, N, widest]: that of either part. db: tensors [N, widest], one for each part, to which dB is
    written.
    """
    if is_traced(dy) and db is not None:
        ds, elsewhere = lora_grads(dy, s, b, scales, counts, outs, dtype, second=second, out=out)
        return ds, _copied(db, elsewhere)
    if is_traced(dy):
        *of_s, of_b = _lora_grads_op(dy, s, b, scales, counts, outs, dtype, second=second, out=out)
        return of_s[0] if out is None else out, of_b
    from fluxfast_kernels import lora_grads as kernels

    dy, ranks = dense_rows(dy), linear_ranks(b, counts)
    ds = dy.new_empty(dy.shape[0], sum(ranks)) if out is None else out
    made: Any = db
    if db is None:
        made = dy.new_empty((1 if second is None else 2, sum(outs), max(ranks)), dtype=dtype)
    scale, scale_2 = _scales_of_parts(scales, second, tuple(t.shape[1] for t in b), dy.device)
    for linears, cols, columns, own in spans(outs, ranks, counts, packs(outs)):
        if not b[own]:
            for of_part in made:
                of_part[cols] = 0
            continue
        widest, sizes = max(ranks[linears]), (counts[linears], outs[linears])
        rows = [of_part[cols, :widest] for of_part in made]
        part = None
        if second is not None:
            part = kernels.SecondGrads(
                second.rows, packed_b(second.tensors[own], *sizes, dy.dtype), rows[1],
                None if scale_2 is None else scale_2[columns],
            )  # fmt: skip
        kernels.lora_grads(
            dy[:, cols], s[:, columns], packed_b(b[own], *sizes, dy.dtype), ds[:, columns],
            rows[0],
            scale=None if scale is None else scale[columns],
            segments=segments_of(tuple(outs[linears]), tuple(ranks[linears]), dy.device),
            second=part,
        )  # fmt: skip
    return ds, made[0] if second is None else made


def grad_a(
    ds: Tensor,
    x: Tensor,
    x_scale: Tensor | None,
    dtype: torch.dtype,
    *,
    second_row: int | None = None,
    da: Sequence[Tensor] | None = None,
) -> Any:
    """dA = dSᵀ x [Σ ranks, K]; with `second_row`, where the second part of the rows begins, those
    of both parts [2, Σ ranks, K]. da: tensors [Σ ranks, K], one for each part, to which it is
    written.
    """
    if is_traced(ds) and da is not None:
        return _copied(da, grad_a(ds, x, x_scale, dtype, second_row=second_row))
    if is_traced(ds):
        return _grad_a_op(ds, x, x_scale, dtype, second_row=second_row)[0]
    from fluxfast_kernels.lora_linear import SecondOuter, lora_outer

    x = dense_rows(x)
    made: Any = da
    if da is None:
        parts = 1 if second_row is None else 2
        made = x.new_empty((parts, ds.shape[1], x.shape[1]), dtype=dtype)
    part = None if second_row is None else SecondOuter(second_row, made[1])
    lora_outer(x, ds, made[0], x_scale=x_scale, transposed=True, second=part)
    return made[0] if second_row is None else made


def _copied(places: Sequence[Tensor], made: Any) -> Any:
    """The places of one part, or of each of two, with what was made for them copied there."""
    for place, of_part in zip(places, [made] if len(places) == 1 else made, strict=True):
        place.copy_(of_part)
    return places[0] if len(places) == 1 else places


# what torch.compile and tensor subclasses see


def _fake_down(x: Tensor, a: Sequence[Tensor], dtype: torch.dtype, **_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape[0], sum(t.shape[0] for t in a), dtype=dtype)]


def _fake_lora_grads(
    dy: Tensor,
    b: Sequence[Tensor],
    counts: Sequence[int],
    outs: Sequence[int],
    dtype: torch.dtype,
    out: Tensor | None,
    second: SecondLoras | None = None,
    **_: Any,
) -> list[Tensor]:
    ranks, parts = linear_ranks(b, counts), [] if second is None else [2]
    ds = [dy.new_empty(dy.shape[0], sum(ranks))] if out is None else []
    return [*ds, dy.new_empty(*parts, sum(outs), max(ranks), dtype=dtype)]


def _fake_grad_a(
    ds: Tensor, x: Tensor, dtype: torch.dtype, second_row: int | None = None, **_: Any
) -> list[Tensor]:
    parts = [] if second_row is None else [2]
    return [x.new_empty(*parts, ds.shape[1], x.shape[1], dtype=dtype)]


_down_op = Op("linear_down", down, _fake_down, writes=["copy"])
_lora_grads_op = Op("linear_ds_db", lora_grads, _fake_lora_grads, writes=["out"])
_grad_a_op = Op("linear_da", grad_a, _fake_grad_a)
