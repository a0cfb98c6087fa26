"""The adapters of a group's linears that run beside its wide product, each by itself.

A LoKr is one kernel, which reads codes of x where there are any. A kind that the group does not
know computes in plain torch, on values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from fluxfast.ops.linear import kron
from fluxfast.ops.linear.adapters import Adapter, Lora, is_random
from fluxfast.ops.linear.lokr import Lokr
from fluxfast.ops.linear.params import LinearParams
from fluxfast.ops.row_quant import RowOutput

# the masks of one adapter, and of the groups that share a seed, come from seeds of their own
_MASKS, _GROUPS = 3, 64


class Beside(NamedTuple):
    """An adapter that runs by itself, its columns of y, and its linear's place in the group."""

    adapter: Adapter
    cols: slice
    linear: int

    @property
    def mergeable(self) -> bool:
        """Whether it is the same for every row of x, so that a copy of W can have it in it."""
        return isinstance(self.adapter, Lokr) and not is_random(self.adapter)


class BesideGrads(NamedTuple):
    """What `BesideProducts.backward_beside` gives.

    grads: of each adapter, in order; a LoKr's are those of `Lokr.whole`. begun: whether dx has
    their part of it, so that the wide product has to add to it.
    """

    grads: list[tuple[Tensor, ...]]
    begun: bool


class Masks(NamedTuple):
    """What a LoKr's dropouts leave, drawn on the device; None for all.

    rows [N]: 1 or 0 for each row of ΔW; kept: one number, 0 where the whole adapter is dropped.
    """

    rows: Tensor | None = None
    kept: Tensor | None = None

    def all(self, g: Tensor | None, n: int) -> Tensor | None:
        """Both, and a row scale g [N] beside them, as one factor [N] of ΔW's rows."""
        found = [factor for factor in (*self, g) if factor is not None]
        return math.prod(found, start=found[0].new_ones(n)) if found else None


def beside(linears: Sequence[LinearParams]) -> list[Beside]:
    """The adapters that a group does not fuse."""
    ends = accumulate(p.weight.shape[0] for p in linears)
    return [
        Beside(adapter, slice(end - p.weight.shape[0], end), i)
        for i, (p, end) in enumerate(zip(linears, ends, strict=True))
        for adapter in p.adapters
        if not isinstance(adapter, Lora)
    ]


class BesideProducts:
    """Forward and backward of these adapters, for a group that has `impl` and its products.

    drawn: the masks that were drawn already, by the adapter's place in `besides`.
    """

    drawn: dict[int, Masks]
    impl: str
    dropout_seed: Tensor | None
    dropout_number: int
    besides: Sequence[Beside]

    def dropped(self, x: Tensor, p: float, number: int | None = None) -> Tensor:
        """x [M, K] with a mask of dropout p, which is a function of seed and number.

        number: None for that of the group, which its adapters share.
        """
        raise NotImplementedError

    def merges(self, tokens: int) -> bool:
        """Whether products read a copy of W that has all mergeable adapters in it."""
        raise NotImplementedError

    @property
    def row_scales(self) -> list[Tensor | None]:
        """Of each linear the row scale of weight decomposition; None for none."""
        raise NotImplementedError

    @property
    def reads_values(self) -> bool:
        """Whether one of them needs the values of x where there are codes."""
        return any(not isinstance(each.adapter, Lokr) for each in self.besides)

    def masks(self, each: Beside) -> Masks:
        """The masks of a LoKr's rank_dropout and module_dropout."""
        adapter = each.adapter
        if not isinstance(adapter, Lokr) or self.dropout_seed is None:
            return Masks()
        place = self._place(each)
        if place not in self.drawn:
            first, rows = self._number(each), each.cols.stop - each.cols.start
            self.drawn[place] = Masks(
                self._mask(rows, adapter.rank_dropout, first),
                self._mask(1, adapter.module_dropout, first + 1),
            )
        return self.drawn[place]

    def row_masks(self, linear: int) -> Masks:
        """The masks of the LoKr of a linear, which has no other adapter."""
        return next((self.masks(b) for b in self.besides if b.linear == linear), Masks())

    def _place(self, each: Beside) -> int:
        # by identity, since tensors of two adapters can't be compared
        return next(i for i, own in enumerate(self.besides) if own is each)

    def _number(self, each: Beside) -> int:
        return _GROUPS * (1 + self.dropout_number + _GROUPS * _MASKS * self._place(each))

    def _mask(self, count: int, p: float, number: int) -> Tensor | None:
        """Ones and zeros [count], each zero with probability p."""
        if p == 0:
            return None
        assert self.dropout_seed is not None
        ones = torch.ones(1, count, device=self.dropout_seed.device)
        return self.dropped(ones, p, number)[0] * (1 - p)

    def add_beside(
        self, x: RowOutput, y: Tensor, row_scales: Sequence[Tensor | None] | None = None
    ) -> None:
        """Adds what all of them give to y [M, N], except those that the wide product had in W.

        row_scales: others than those of weight decomposition.
        """
        if not self.besides:
            return
        scales = self.row_scales if row_scales is None else row_scales
        merges = self.merges(len(y))
        for each in self.besides:
            if merges and each.mergeable:
                continue
            y_cols = y[:, each.cols]
            if not isinstance(each.adapter, Lokr):
                each.adapter.add_to(y_cols, self._seen_by(each.adapter, x))
                continue
            adapter, cols = each.adapter, self.masks(each).all(scales[each.linear], y_cols.shape[1])
            p = adapter.out_dropout if self.dropout_seed is not None else 0.0
            out = torch.zeros_like(y_cols) if p else y_cols
            kron.add(*operand_of(x), *adapter.whole(), adapter.scale, cols, out, self.impl)
            if p:
                y_cols += self.dropped(out, p, self._number(each) + 2)

    def backward_beside(self, dy: Tensor, x: RowOutput, dx: Tensor | None) -> BesideGrads:
        """The gradients of each one's tensors, in their dtypes; writes their part of dx [M, K].

        dx may hold anything. The wide product adds to it afterwards, which costs a product less
        than it costs an adapter; where W has them all, dx is left as it is.
        """
        merges, begun, grads = self.merges(len(dy)), False, []
        for each in self.besides:
            own_dx = None if merges and each.mergeable else dx
            compute = (
                self._lokr_backward if isinstance(each.adapter, Lokr) else self._other_backward
            )
            grads.append(compute(each, dy[:, each.cols], x, own_dx, begun))
            begun = begun or own_dx is not None
        return BesideGrads(grads, begun)

    def _lokr_backward(
        self, each: Beside, dy: Tensor, x: RowOutput, dx: Tensor | None, accumulate: bool
    ) -> tuple[Tensor, ...]:
        adapter = each.adapter
        assert isinstance(adapter, Lokr)
        cols = self.masks(each).all(self.row_scales[each.linear], dy.shape[1])
        if self.dropout_seed is not None and adapter.out_dropout:
            dy = self.dropped(dy, adapter.out_dropout, self._number(each) + 2)
        return kron.backward(
            dy, *operand_of(x), *adapter.whole(), adapter.scale, cols, dx, accumulate, self.impl
        )

    def _other_backward(
        self, each: Beside, dy: Tensor, x: RowOutput, dx: Tensor | None, accumulate: bool
    ) -> tuple[Tensor, ...]:
        adapter = each.adapter
        if dx is not None and not accumulate:
            dx.zero_()
        seen = self._seen_by(adapter, x)
        if dx is None or not self._drops_input(adapter):
            grads = adapter.backward(dy, seen, dx)
        else:
            dropped_dx = torch.zeros_like(dx)
            grads = adapter.backward(dy, seen, dropped_dx)
            dx += self.dropped(dropped_dx, adapter.dropout)
        return tuple(grad.to(t.dtype) for grad, t in zip(grads, adapter.tensors, strict=True))

    def _drops_input(self, adapter: Adapter) -> bool:
        return self.dropout_seed is not None and adapter.dropout > 0

    def _seen_by(self, adapter: Adapter, x: RowOutput) -> Tensor:
        """The values [M, K] of x that an adapter sees."""
        assert x.y is not None
        return self.dropped(x.y, adapter.dropout) if self._drops_input(adapter) else x.y

    @property
    def runs_alike(self) -> bool:
        """Whether these adapters could run for a part of the rows alone, without masks."""
        return all(each.mergeable for each in self.besides)


def operand_of(x: RowOutput) -> tuple[Tensor, Tensor | None]:
    """What products read of x: its codes and their scales where there are any, else its values."""
    if x.q is not None:
        return x.q, x.q_scale
    assert x.y is not None
    return x.y, None
