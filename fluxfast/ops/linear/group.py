"""Linears that read the same x, as one product.

`lora_linear` and the blocks' own forward and backward are made of it.

    forward    s  = scale · x Aᵀ           y  = x Wᵀ + s Bᵀ + b
    backward   dS = scale · dy B           dx = dy W + dS A        dA = dSᵀ x        dB = dyᵀ s

`compute` says in what the wide products run: "same" (x's dtype), or "int8" / "e4m3", where x comes
as codes with a scale a row, and W as codes with a scale a row of its own. W's scales are folded
into dy before dy is quantised, so that one W serves both directions. The low-rank products read the
same codes of x.

FLUX.1's normalised inputs have a few channels that are far larger than the others and would leave
those no codes to speak of. With `outliers` = n, the n largest channels of x stay out of the codes.
They meet their columns of W in x's dtype, in the epilogue, like one more LoRA. They are chosen anew
in each product, on the device, so that nothing has to be calibrated or remembered for backward.

Where an adapter decomposes its linear's weight, the weight's rows have one scale more
(`decomposed`), B comes with it, and all products stay as they are.

Adapters of other kinds than LoRA run beside the wide product (`beside`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fluxfast.ops import row_quant
from fluxfast.ops.linear import products_torch, products_triton, weights
from fluxfast.ops.linear.adapters import Adapter, Lora
from fluxfast.ops.linear.augmented import AugmentedProducts, Fill, Placed, RowsAt, fill, placed
from fluxfast.ops.linear.beside import Beside, BesideGrads, BesideProducts, beside, operand_of
from fluxfast.ops.linear.decomposed import Decompositions, Narrow, WithNorms
from fluxfast.ops.linear.lokr import Lokr
from fluxfast.ops.linear.lora_products import LoraProducts
from fluxfast.ops.linear.one_lora import OneLora
from fluxfast.ops.linear.outliers import outliers_apart
from fluxfast.ops.linear.params import LinearParams, loras_of
from fluxfast.ops.linear.products_torch import stack
from fluxfast.ops.linear.weights import Ready
from fluxfast.ops.row_quant import FORMATS, Quantized, RowOutput

COMPUTE = ("same", *FORMATS)


class LinearGroup(AugmentedProducts, LoraProducts, BesideProducts, OneLora):
    """Linears with their adapters, ready for products with x [..., in] of `dtype`.

    It belongs where autograd records nothing: in an autograd.Function, or where no tensor of a call
    asks for a gradient.

    compute: one of COMPUTE. outliers: how many channels of x 8-bit products leave out. impl: as
    `dispatch.resolve` gave it. dropout_seed: what the masks of the adapters' dropout are drawn
    from, one int64 on x's device, or None where dropout is off; a forward pass that is computed
    again needs the same one. dropout_number: which of the groups that share the seed this is.
    dgrad: whether `backward` will ask for dx.
    """

    # of a group without adapters
    own_loras: Sequence[Sequence[Lora]] = ()
    loras: Sequence[Lora] = ()
    besides: Sequence[Beside] = ()
    drops = False
    decompositions = Decompositions((), torch.float32, "ref")
    # the tokens from which on adapters go into a copy of W
    _merges_from: float = math.inf

    # the weights without and with the scales of weight decomposition, once they are made
    _plain: Ready | None = None
    _ready: Ready | None = None
    _before_scaling: Tensor | None = None
    # whether the adapters lie beside the weights, if that is where products read them
    _is_filled = False

    def __init__(
        self,
        linears: Sequence[LinearParams],
        dtype: torch.dtype,
        *,
        compute: str = "same",
        outliers: int = 0,
        impl: str,
        dropout_seed: Tensor | None = None,
        dropout_number: int = 0,
        dgrad: bool = False,
    ) -> None:
        self.linears, self.dtype, self.compute, self.impl = linears, dtype, compute, impl
        # a group's rows are all alike (`pair.LinearPair` has two parts)
        self.parts = None
        self.outliers = 0 if compute == "same" else min(outliers, linears[0].weight.shape[1])
        self.dropout_seed, self.dropout_number = dropout_seed, dropout_number
        self.dgrad = dgrad
        self.outs = [p.weight.shape[0] for p in linears]
        self.adapters = [adapter for p in linears for adapter in p.adapters]
        self.products = products_triton if impl == "triton" else products_torch
        shape, rank = (sum(self.outs), linears[0].weight.shape[1]), 0
        if self.adapters:
            rank = self._set_adapters(max(shape))
        else:
            self.counts = [0] * len(linears)
        super().__init__(shape, rank)
        # one linear, which torch's own function computes
        self.is_one = (
            len(linears) == 1
            and compute == "same"
            and impl != "triton"
            and not self.decompositions.exist
        )

    def _set_adapters(self, widest: int) -> int:
        """Sorts the adapters by how they run; returns the ranks of all LoRAs together."""
        # the LoRAs of each linear, and all of them
        self.own_loras = [loras_of(p) for p in self.linears]
        self.loras = [lora for own in self.own_loras for lora in own]
        self.counts = [len(own) for own in self.own_loras]
        self.drops = self.dropout_seed is not None and any(lora.dropout > 0 for lora in self.loras)
        self.drawn = {}
        if len(self.adapters) > len(self.loras):
            self.besides = beside(self.linears)
        if any(getattr(adapter, "magnitude", None) is not None for adapter in self.adapters):
            self.decompositions = Decompositions(self.linears, self.dtype, self.impl)
            for i in self.decompositions:
                self.decompositions.masks[i] = self.row_masks(i)
        if self._may_merge():
            self._merges_from = widest
        return sum(lora.a.shape[0] for lora in self.loras)

    @property
    def form(self) -> str:
        """What forward and backward read of x: the `out=` of the op that makes it."""
        if self.compute == "same" or self.outliers:
            return "same"
        needs_values = self.drops or self.reads_values
        return f"both-{self.compute}" if needs_values else self.compute

    def as_input(self, x: Tensor) -> RowOutput:
        """Values [..., in] in `form`, for an x that none of our ops wrote."""
        if self.form == "same":
            return RowOutput(x, None, None)
        codes = row_quant.forward(x, self.compute, impl=self.impl)
        return RowOutput(None if self.form in FORMATS else x, *codes)

    def fold(self) -> Tensor | None:
        """W's row scales [N] fp32, which go into dy [..., N] before it is quantised for dgrad.

        None where dy is not quantised.
        """
        return None if self.compute == "same" else stack(self.weights(0).scales)

    def forward(
        self, x: RowOutput, out: Tensor | None = None, kept: Narrow = None
    ) -> tuple[Tensor, Narrow]:
        """y [..., N], written to `out` where that is given, and what backward keeps: `down(x)`.

        What an earlier forward returned for the same x need not be computed again.
        """
        if self.is_one and out is None:
            return self._forward_one(x, kept)
        rows = flat_rows(x)
        values = operand_of(x)[0]
        y = out
        if y is None:
            shape = (*values.shape[:-1], self._outs)
            y = torch.empty(shape, dtype=self.dtype, device=values.device)
        y_rows = y.view(-1, self._outs)
        room = self.room(rows.y)
        if kept is None:
            kept = self._down(rows, room)
        elif room is not None:
            assert isinstance(kept, Tensor)
            room.copy_(kept)
        s = self.recall(kept)
        if room is None:
            self._wide(rows, s, y_rows, self.weights(y_rows.shape[0]), self.b, self.biases)
        else:
            assert rows.y is not None
            self.forward_augmented(rows.y, y_rows)
        self.add_beside(rows, y_rows)
        return y, kept

    def _forward_one(self, x: RowOutput, kept: Narrow) -> tuple[Tensor, Narrow]:
        """`forward` of one linear, which takes torch fewer steps where it makes y itself."""
        assert x.y is not None
        if (short := self.short_forward(x.y, kept)) is not None:
            return short
        rows, bias = flat_rows(x), self.linears[0].bias
        s = self.narrow(rows) if kept is None else self.recall(kept)
        (weight,) = self.weights(operand_of(rows)[0].shape[0]).weights
        y = products_torch.linear(x.y, weight, bias)
        y_rows = y.view(-1, self._outs)
        if s is not None:
            products_torch.add_up(y_rows, s, self.b, self.counts, self.outs)
        self.add_beside(rows, y_rows)
        return y, s

    def _wide(
        self, x: RowOutput, s: Tensor | None, y: Tensor, ready: Ready, b: list[Tensor],
        biases: Sequence[Tensor | None],
    ) -> None:  # fmt: skip
        """Writes x Wᵀ + s Bᵀ + b to y [M, N]."""
        counts, operand = self.counts, operand_of(x)
        if self.outliers:
            operand, s, b, counts = outliers_apart(
                operand[0], s, ready, b, counts, self.outliers, self.compute, self.impl
            )
        self.products.wide(*operand, *ready.operands, list(biases), s, b, counts, y)

    def down(self, x: RowOutput, *, copy: Tensor | None = None) -> Narrow:
        """What `forward` returns beside y, for callers that have y already.

        That is s, or None where backward does not need it; with weight decomposition, s and the
        norms of the weights.
        """
        return self._down(flat_rows(x), copy)

    def _down(self, rows: RowOutput, copy: Tensor | None) -> Narrow:
        s = self.narrow(rows, copy=copy)
        return WithNorms(s, self.decompositions.norms) if self.decompositions.exist else s

    def recall(self, kept: Narrow) -> Tensor | None:
        """s of what `down` gave, whose norms then need not be computed again."""
        if isinstance(kept, WithNorms):
            self.decompositions.norms = kept.norms
            return kept.s
        return kept

    def backward(
        self,
        dy: Tensor,
        x: RowOutput,
        kept: Narrow,
        *,
        codes: Sequence[tuple[int, Quantized]] = (),
        need_dx: bool = True,
        out: Tensor | None = None,
    ) -> tuple[Tensor | None, list[tuple[Tensor, ...]]]:
        """dx [..., K] (None if not needed), and the gradients of each adapter's tensors, in order.

        dy: values [..., N]; x in `form`, as forward had it. dx is written to `out` where that is
        given. codes: where dy's producers quantised it with `fold()`, its codes, in parts that
        cover the columns in order; each part comes with its first column and its own row scales.
        """
        short = self.short_backward(dy, x.y, kept, need_dx=need_dx) if out is None else None
        if short is not None:
            return short
        dy_rows, rows, s = dy.reshape(-1, dy.shape[-1]), flat_rows(x), self.recall(kept)
        room = self.room(dy_rows)
        ds, lora_grads = self.lora_backward(dy_rows, rows, s, room)
        dx, dx_rows = None, None
        if need_dx:
            width = self.linears[0].weight.shape[1]
            dx = out
            if dx is None:
                shape = (*dy.shape[:-1], width)
                dx = torch.empty(shape, dtype=self.dtype, device=dy.device)
            dx_rows = dx.view(-1, width)
        others = self.backward_beside(dy_rows, rows, dx_rows)
        if dx_rows is not None:
            if room is not None and not self.drops:
                self.backward_augmented(dy_rows, dx_rows, others.begun)
            else:
                self._dgrad(dy_rows, codes, ds, dx_rows, others.begun)
        return dx, self.in_order(lora_grads, others, dy_rows, rows, s)

    def in_order(
        self, lora_grads: Sequence[tuple[Tensor, ...]], beside: BesideGrads, dy: Tensor,
        x: RowOutput, s: Tensor | None = None,
    ) -> list[tuple[Tensor, ...]]:  # fmt: skip
        """The gradients of each adapter's tensors, in order: of the LoRAs, and of those beside."""
        fused, others = iter(lora_grads), iter(beside.grads)
        grads = [next(fused if isinstance(a, Lora) else others) for a in self.adapters]
        for i in self.decompositions:
            first = sum(len(p.adapters) for p in self.linears[:i])
            grads[first] = self._decomposed_grads(i, dy, x, s, grads[first])
        return [
            adapter.of_tensors(own) if isinstance(adapter, Lokr) else own
            for adapter, own in zip(self.adapters, grads, strict=True)
        ]

    @property
    def biases(self) -> list[Tensor | None]:
        """The bias of every linear."""
        return [p.bias for p in self.linears]

    @property
    def pairs(self) -> bool:
        """Whether its products can be had for a part of the rows by themselves."""
        return not (self.drops or self.outliers or self.decompositions.exist) and self.runs_alike

    def merges(self, tokens: int) -> bool:
        """Whether adapters go into a copy of W, which takes fewer operations for many tokens.

        Those are the LoRAs, and each LoKr without masks. Only on the CPU and in fp32: W in 16 bits
        would round away what they add to it.
        """
        return tokens >= self._merges_from

    def _may_merge(self) -> bool:
        return (
            self.impl == "native"
            and self.compute == "same"
            and not self.drops
            and not self.decompositions.exist
            and (len(self.loras) > 0 or any(each.mergeable for each in self.besides))
        )

    def _mergeable_of_each(self) -> list[list[Adapter]]:
        """Of each linear, the adapters that `merges` is about."""
        lokrs = [(each.linear, each.adapter) for each in self.besides if each.mergeable]
        return [
            [*loras, *(lokr for linear, lokr in lokrs if linear == i)]
            for i, loras in enumerate(self.own_loras)
        ]

    def dropped(self, x: Tensor, p: float, number: int | None = None) -> Tensor:
        assert self.dropout_seed is not None
        number = self.dropout_number if number is None else number
        return self.products.dropped(x, p, self.dropout_seed, number)

    @property
    def row_scales(self) -> list[Tensor | None]:
        if not self.decompositions.exist:
            return [None] * len(self.linears)
        return self.decompositions.row_scales

    def weights(self, tokens: int) -> Ready:
        """The weights for products with so many tokens, with all row scales; made once a group."""
        if self._ready is None:
            stored = [p.weight for p in self.linears]
            if self.compute != "same":
                plain = weights.as_codes(
                    stored, self.compute, self.dtype, self.impl, dgrad=self.dgrad
                )
            else:
                rank = 0 if self.decompositions.exist else self.rank
                plain = weights.as_floats(stored, self.dtype, tokens, self.impl, rank)
            if self.merges(tokens):
                plain = weights.merged(plain.weights, self._mergeable_of_each(), self.dtype)
            self._plain, self._ready = plain, self.decompositions.scaled(plain)
        return self._ready

    def weights_of_rows(self, tokens: int) -> list[RowsAt]:
        if self.impl != "triton" or self.compute != "same" or self.rank == 0:
            return []
        if self.decompositions.exist:
            return []
        place = self.weights(tokens).augmented
        if place is None:
            return []
        if not self._is_filled:
            fill([self._fill(place)])
            self._is_filled = True
        return [RowsAt(slice(None), place)]

    def _fill(self, place: Placed) -> Fill:
        return Fill(place, self.own_loras, self.biases)

    def fill_in_place(self) -> Fill | None:
        """What goes into the augmented weight in which the weights live; None where there is none.

        Whoever asks for it does it.
        """
        augments = self.compute == "same" and not self.decompositions.exist
        place = in_place(self.linears) if augments else None
        if place is None or place.within.dtype != self.dtype:
            return None
        self._is_filled = True
        return self._fill(place)

    def _dgrad(
        self,
        dy: Tensor,
        codes: Sequence[tuple[int, Quantized]],
        ds: Tensor | None,
        dx: Tensor,
        accumulate: bool,
    ) -> None:
        """Writes dy W + dS A to dx [M, K], or adds it."""
        ready = self.weights(len(dx))
        parts: list[tuple[int, Tensor, Tensor | None]] = [(0, dy, None)]
        if self.compute != "same":
            if not codes:
                codes = [(0, row_quant.forward(dy, self.compute, self.fold(), impl=self.impl))]
            parts = [
                (col, q.reshape(-1, q.shape[-1]), scale.reshape(-1)) for col, (q, scale) in codes
            ]
            ready = ready._replace(weights=self.products.for_dgrad(ready.weights, len(dx)))
        fuses = ds is not None and not self.drops
        for i, (col, part, scale) in enumerate(parts):
            # the first product has all of dS A
            own_ds, a = (ds, self.a) if fuses and i == 0 else (None, [])
            adds = accumulate or i > 0
            self.products.wide_dgrad(part, scale, col, *ready.operands, own_ds, a, adds, dx)
        if ds is not None and not fuses:
            self.add_dropped(ds, dx)

    def _decomposed_grads(
        self, i: int, dy: Tensor, x: RowOutput, s: Tensor | None, grads: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """The gradients of the adapter that decomposes the weight of linear i, all of them.

        It needs the product as it was before g, which is computed again: backward overwrites y.
        """
        if self._before_scaling is None:
            self._before_scaling = dy.new_empty(dy.shape)
            self.weights(len(dy))
            assert self._plain is not None
            b, none = [lora.b for lora in self.loras], [None] * len(self.linears)
            self._wide(x, s, self._before_scaling, self._plain, b, none)
            self.add_beside(x, self._before_scaling, none)
        cols = slice(sum(self.outs[:i]), sum(self.outs[: i + 1]))
        return self.decompositions.grads(i, dy[:, cols], self._before_scaling[:, cols], grads)


def flat_rows(x: RowOutput) -> RowOutput:
    """The same with all leading dimensions as one."""
    y, q, scale = x
    if y is not None and q is None:
        return RowOutput(y.reshape(-1, y.shape[-1]), None, None)
    return RowOutput(
        None if y is None else y.reshape(-1, y.shape[-1]),
        None if q is None else q.reshape(-1, q.shape[-1]),
        None if scale is None else scale.reshape(-1),
    )


def fill_in_place(groups: Sequence[LinearGroup], *, filled: bool = False) -> None:
    """Copies adapters to where the weights of their group live, all groups in one launch.

    A group whose weights live elsewhere does it by itself, once a product reads them. filled: that
    they are there already.
    """
    fills = [group.fill_in_place() for group in groups]
    if not filled:
        fill([each for each in fills if each is not None])


def in_place(linears: Sequence[LinearParams]) -> Placed | None:
    """The augmented weight in which the weights of a group live, with room for its LoRAs."""
    stored = [p.weight for p in linears if isinstance(p.weight, Tensor)]
    rank = sum(lora.a.shape[0] for p in linears for lora in loras_of(p))
    return placed(stored, rank) if rank and len(stored) == len(linears) else None
