"""The linears of a double block's two streams, as one product on the rows of both.

Text and image have linears of their own, alike in shape. Their rows lie in one tensor (`parts`), so
that each kernel is launched once for both, and picks the weights by the row. A double block then
takes half the launches, and the text's few rows fill a GPU together with the image's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from fluxfast.ops import row_quant
from fluxfast.ops.linear import products_triton as products
from fluxfast.ops.linear.adapters import Lora
from fluxfast.ops.linear.augmented import AugmentedProducts, RowsAt
from fluxfast.ops.linear.beside import BesideGrads, operand_of
from fluxfast.ops.linear.decomposed import Narrow, WithNorms
from fluxfast.ops.linear.grad_places import runs_of
from fluxfast.ops.linear.group import LinearGroup, flat_rows
from fluxfast.ops.linear.products_triton import SecondLinears, SecondLoras
from fluxfast.ops.parts import Parts
from fluxfast.ops.row_quant import Quantized, RowOutput

# the gradients of the adapters of the text's linears, and of the image's
PairGrads = tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]


def pairs(txt: LinearGroup, img: LinearGroup) -> bool:
    """Whether two groups can be a `LinearPair`.

    Their linears and LoRAs are alike in shape, and they have nothing that takes all rows at once:
    outliers, dropout, weight decomposition, adapters of unknown kinds.
    """
    return (
        txt.impl == img.impl == "triton"
        and txt.pairs
        and img.pairs
        and _shapes(txt) == _shapes(img)
    )


def _shapes(group: LinearGroup) -> list[object]:
    """What has to be alike: of each linear its weight, whether it has a bias, and its LoRAs."""
    return [
        (
            p.weight.shape,
            (p.weight.dtype, p.weight.stride()) if isinstance(p.weight, Tensor) else None,
            p.bias is None,
            [(a.a.shape, a.a.dtype, a.b.dtype) for a in p.adapters if isinstance(a, Lora)],
        )
        for p in group.linears
    ]


class LinearPair(AugmentedProducts):
    """Two groups of linears, the text's and the image's, for products with x [R, in] of both.

    It has the methods of `LinearGroup` that a fused block calls.
    """

    def __init__(self, txt: LinearGroup, img: LinearGroup, parts: Parts) -> None:
        self.txt, self.img, self.parts = txt, img, parts
        self.form = img.form
        shape = (sum(img.outs), img.linears[0].weight.shape[1])
        super().__init__(shape, img.rank)

    def as_input(self, x: Tensor) -> RowOutput:
        """As `LinearGroup.as_input`."""
        return self.img.as_input(x)

    def fold(self) -> tuple[Tensor, Tensor] | None:
        """`LinearGroup.fold` of the text's linears and of the image's."""
        txt, img = self.txt.fold(), self.img.fold()
        return None if txt is None or img is None else (txt, img)

    def weights_of_rows(self, tokens: int) -> list[RowsAt]:
        of_parts = [group.weights_of_rows(tokens) for group in (self.txt, self.img)]
        rows = (slice(self.parts.rows), slice(self.parts.rows, None))
        return [
            RowsAt(part, own.weight)
            for part, of_part in zip(rows, of_parts, strict=True)
            for own in of_part
            if all(of_parts)
        ]

    def forward(
        self, x: RowOutput, out: Tensor | None = None, kept: Narrow = None
    ) -> tuple[Tensor, Narrow]:
        """y [R, N], and s [R, Σ ranks], as `LinearGroup.forward`."""
        rows, txt, img = flat_rows(x), self.txt, self.img
        values, y = operand_of(rows)[0], out
        if y is None:
            y = values.new_empty((len(values), sum(img.outs)), dtype=img.dtype)
        room, s = self.room(rows.y), self.recall(kept)
        if s is None:
            s = self.down(x, copy=room)
        elif room is not None:
            room.copy_(s)
        if room is not None:
            assert rows.y is not None
            self.forward_augmented(rows.y, y)
            self._add_beside(rows, y)
            return y, s
        ready, other = txt.weights(len(values)), img.weights(len(values))
        products.wide(
            *operand_of(rows), *ready.operands, txt.biases, s, txt.b, txt.counts, y,
            second=SecondLinears(self.parts.rows, *other.operands, img.biases, img.b),
        )  # fmt: skip
        self._add_beside(rows, y)
        return y, s

    def _parts(self) -> tuple[tuple[LinearGroup, slice], tuple[LinearGroup, slice]]:
        """The two groups, each with its rows."""
        return (self.txt, slice(self.parts.rows)), (self.img, slice(self.parts.rows, None))

    def _add_beside(self, x: RowOutput, y: Tensor) -> None:
        for group, rows in self._parts():
            if group.besides:
                group.add_beside(_rows_of(x, rows), y[rows])

    def recall(self, kept: Narrow) -> Tensor | None:
        """As `LinearGroup.recall`."""
        assert not isinstance(kept, WithNorms)
        return kept

    def down(self, x: RowOutput, *, copy: Tensor | None = None) -> Tensor | None:
        """As `LinearGroup.down`."""
        txt, img = self.txt, self.img
        if not txt.loras:
            return None
        return products.down(
            *operand_of(flat_rows(x)), txt.a, txt.scales, img.dtype,
            second=SecondLoras(self.parts.rows, img.a, img.scales), copy=copy,
        )  # fmt: skip

    def backward(
        self,
        dy: Tensor,
        x: RowOutput,
        kept: Narrow,
        *,
        codes: Sequence[tuple[int, Quantized]] = (),
        need_dx: bool = True,
    ) -> tuple[Tensor | None, PairGrads]:
        """dx [R, K] (None if not needed), and the gradients of the adapters of each part."""
        rows = flat_rows(x)
        room = self.room(dy)
        ds, lora_grads = self._lora_backward(dy, rows, self.recall(kept), room)
        dx = None
        if need_dx:
            dx = dy.new_empty((len(dy), self.img.linears[0].weight.shape[1]), dtype=self.img.dtype)
        others = self._backward_beside(dy, rows, dx)
        if dx is not None:
            begun = any(each.begun for each in others)
            if room is None:
                self._dgrad(dy, codes, ds, dx, begun)
            else:
                self.backward_augmented(dy, dx, begun)
        txt, img = (
            group.in_order(own, beside, dy[part], _rows_of(rows, part))
            for own, beside, (group, part) in zip(lora_grads, others, self._parts(), strict=True)
        )
        return dx, (txt, img)

    def _backward_beside(self, dy: Tensor, x: RowOutput, dx: Tensor | None) -> list[BesideGrads]:
        """Of each part; if one begins dx, the rows of a part that has nothing to write are zero."""
        found = [
            group.backward_beside(dy[part], _rows_of(x, part), None if dx is None else dx[part])
            for group, part in self._parts()
        ]
        if dx is not None and any(each.begun for each in found):
            for each, (_, part) in zip(found, self._parts(), strict=True):
                if not each.begun:
                    dx[part].zero_()
        return found

    def _dgrad(
        self, dy: Tensor, codes: Sequence[tuple[int, Quantized]], ds: Tensor | None, dx: Tensor,
        accumulate: bool,
    ) -> None:  # fmt: skip
        txt, img = self.txt, self.img
        ready, other = (group.weights(len(dx)) for group in (txt, img))
        parts: list[tuple[int, Tensor, Tensor | None]] = [(0, dy, None)]
        if img.compute != "same":
            if not codes:
                quantized = row_quant.forward(
                    dy, img.compute, self.fold(), parts=self.parts, impl=img.impl
                )
                codes = [(0, quantized)]
            parts = [(col, *quantized) for col, quantized in codes]
            ready, other = (
                group._replace(weights=products.for_dgrad(group.weights, len(dx)))
                for group in (ready, other)
            )
        for i, (col, part, scale) in enumerate(parts):
            # the first product has all of dS A
            first = ds is not None and i == 0
            products.wide_dgrad(
                part, scale, col, *ready.operands, ds if first else None, txt.a if first else [],
                accumulate or i > 0, dx,
                second=SecondLinears(self.parts.rows, *other.operands, a=img.a if first else []),
            )  # fmt: skip

    def _lora_backward(
        self, dy: Tensor, x: RowOutput, s: Tensor | None, room: Tensor | None
    ) -> tuple[Tensor | None, PairGrads]:
        """dS [R, Σ ranks], written to `room` where there is some, and (dA, dB) of every LoRA."""
        txt, img = self.txt, self.img
        if not txt.loras:
            return None, ([], [])
        assert s is not None
        rows, runs = self.parts.rows, runs_of([txt.loras, img.loras], txt.counts)
        ds, d_b = products.lora_grads(
            dy, s, txt.b, txt.scales, txt.counts, txt.outs, txt.b[0].dtype,
            second=SecondLoras(rows, img.b, img.scales), out=room, db=runs.d_b,
        )  # fmt: skip
        d_a = products.grad_a(ds, *operand_of(x), txt.a[0].dtype, second_row=rows, da=runs.d_a)
        of_txt, of_img = (
            group.lora_grads_of(grad_a.split_with_sizes([len(a) for a in group.a]), grad_b, runs)
            for group, grad_a, grad_b in zip((txt, img), d_a, d_b, strict=True)
        )
        return ds, (of_txt, of_img)


def _rows_of(x: RowOutput, rows: slice) -> RowOutput:
    """Some rows of x [R, in]."""
    return RowOutput(*(None if t is None else t[rows] for t in x))


AnyGroup: TypeAlias = LinearGroup | LinearPair
