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

Adapters of other kinds than LoRA run beside the wide product (`adapters.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluxfast.ops import row_quant
from fluxfast.ops.linear import products_native, products_torch, products_triton, weights
from fluxfast.ops.linear.adapters import Adapter, Lora
from fluxfast.ops.linear.augmented import AugmentedProducts, Fill, Placed, RowsAt, fill, placed
from fluxfast.ops.linear.grad_places import NO_RUNS, Runs, in_places, runs_of
from fluxfast.ops.linear.products_torch import stack
from fluxfast.ops.linear.weights import FrozenWeight, Ready
from fluxfast.ops.row_quant import FORMATS, Quantized, RowOutput

COMPUTE = ("same", *FORMATS)


class LinearParams(NamedTuple):
    """One linear of a group: weight [out, in], bias [out] or None, and its adapters."""

    weight: Tensor | FrozenWeight
    bias: Tensor | None
    adapters: tuple[Adapter, ...] = ()


def loras_of(linear: LinearParams) -> list[Lora]:
    """The adapters of a linear that a group fuses."""
    return [adapter for adapter in linear.adapters if isinstance(adapter, Lora)]


class _SameDropout(NamedTuple):
    """Neighbouring LoRAs with the same dropout: that dropout, and their columns of s."""

    dropout: float
    ranks: slice
    loras: list[Lora]


class LinearGroup(AugmentedProducts):
    """Linears with their adapters, ready for products with x [..., in] of `dtype`.

    compute: one of COMPUTE. outliers: how many channels of x 8-bit products leave out. impl: as
    `dispatch.resolve` gave it. dropout_seed: what the masks of the adapters' dropout are drawn
    from, one int64 on x's device, or None where dropout is off; a forward pass that is computed
    again needs the same one. dropout_number: which of the groups that share the seed this is.
    dgrad: whether `backward` will ask for dx.
    """

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
        self.dropout_seed, self._dropout_number = dropout_seed, dropout_number
        self.dgrad = dgrad
        self.outs = [p.weight.shape[0] for p in linears]
        self.adapters = [adapter for p in linears for adapter in p.adapters]
        # the LoRAs of each linear, and all of them
        self._own_loras = [loras_of(p) for p in linears]
        self.loras = [lora for own in self._own_loras for lora in own]
        self.counts = [len(own) for own in self._own_loras]
        self._drops = any(self._is_dropped(adapter) for adapter in self.adapters)
        self._products = products_triton if impl == "triton" else products_torch
        self._ready: Ready | None = None
        shape = (sum(self.outs), linears[0].weight.shape[1])
        super().__init__(shape, rank=sum(len(lora.a) for lora in self.loras))
        # whether the adapters lie beside the weights, if that is where products read them
        self._is_filled = False

    @property
    def form(self) -> str:
        """What forward and backward read of x: the `out=` of the op that makes it."""
        if self.compute == "same" or self.outliers:
            return "same"
        needs_values = self._drops or len(self.loras) < len(self.adapters)
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
        self, x: RowOutput, out: Tensor | None = None, s: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """y [..., N], written to `out` where that is given, and s [M, Σ ranks].

        s is kept for backward; it is None where backward does not need it. An s that an earlier
        forward returned for the same x need not be computed again.
        """
        rows = flat_rows(x)
        values = operand_of(x)[0]
        y = out
        if y is None:
            shape = (*values.shape[:-1], sum(self.outs))
            y = torch.empty(shape, dtype=self.dtype, device=values.device)
        y_rows = y.view(-1, y.shape[-1])
        room = self.room(rows.y)
        if s is None:
            s = self.down(x, copy=room)
        elif room is not None:
            room.copy_(s)
        if room is None:
            self._wide(rows, s, y_rows)
        else:
            assert rows.y is not None
            self.forward_augmented(rows.y, y_rows)
        for adapter, cols in self._beside():
            adapter.add_to(y_rows[:, cols], self._seen_by(adapter, rows))
        return y, s

    def _wide(self, x: RowOutput, s: Tensor | None, y: Tensor) -> None:
        """Writes x Wᵀ + s Bᵀ + b to y [M, N]."""
        ready, b, counts, operand = self.weights(len(y)), self.b, self.counts, operand_of(x)
        if self.outliers:
            operand, s, b, counts = self._split_outliers(operand[0], s, ready)
        self._products.wide(*operand, *ready.operands, self.biases, s, b, counts, y)

    def down(self, x: RowOutput, *, copy: Tensor | None = None) -> Tensor | None:
        """s = scale · x Aᵀ [M, Σ ranks], each LoRA on its own dropped x.

        It is what `forward` returns beside y, for callers that have y already. Triton's kernels
        write it to `copy` as well, where that is given.
        """
        rows = flat_rows(x)
        if not self.loras or self.merges(len(operand_of(rows)[0])):
            return None
        columns = []
        for same in self._by_dropout():
            a, scales = (
                [lora.a.detach() for lora in same.loras],
                [lora.scale for lora in same.loras],
            )
            seen = self._seen_by_loras(same.dropout, rows)
            copies = {} if copy is None else {"copy": copy[:, same.ranks]}
            columns.append(self._products.down(*seen, a, scales, self.dtype, **copies))
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)

    def backward(
        self,
        dy: Tensor,
        x: RowOutput,
        s: Tensor | None,
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
        dy_rows, rows = dy.reshape(-1, dy.shape[-1]), flat_rows(x)
        room = self.room(dy_rows)
        ds, lora_grads = self._lora_backward(dy_rows, rows, s, room)
        dx, dx_rows = None, None
        if need_dx:
            width = self.linears[0].weight.shape[1]
            dx = out
            if dx is None:
                shape = (*dy.shape[:-1], width)
                dx = torch.empty(shape, dtype=self.dtype, device=dy.device)
            dx_rows = dx.view(-1, width)
            if room is not None and not self._drops:
                self.backward_augmented(dy_rows, dx_rows)
            else:
                self._dgrad(dy_rows, codes, ds, dx_rows)
        beside = [self._backward_beside(*each, dy_rows, rows, dx_rows) for each in self._beside()]
        fused, others = iter(lora_grads), iter(beside)
        grads = [next(fused if isinstance(a, Lora) else others) for a in self.adapters]
        return dx, grads

    @property
    def a(self) -> list[Tensor]:
        """A of every LoRA, in order."""
        return [lora.a.detach() for lora in self.loras]

    @property
    def b(self) -> list[Tensor]:
        """B of every LoRA, in order."""
        return [lora.b.detach() for lora in self.loras]

    @property
    def scales(self) -> list[float]:
        """The scale of every LoRA, in order."""
        return [lora.scale for lora in self.loras]

    @property
    def biases(self) -> list[Tensor | None]:
        """The bias of every linear."""
        return [None if p.bias is None else p.bias.detach() for p in self.linears]

    @property
    def fuses_all(self) -> bool:
        """Whether the wide product does all that the group adds: no adapter runs beside it."""
        return not (self._drops or self.outliers or len(self.loras) < len(self.adapters))

    def merges(self, tokens: int) -> bool:
        """Whether the LoRAs go into a copy of W, which takes fewer operations for many tokens.

        Only on the CPU and in fp32: W in 16 bits would round away what the LoRAs add to it.
        """
        wide = max(sum(self.outs), self.linears[0].weight.shape[1])
        return (
            self.impl == "native"
            and self.compute == "same"
            and not self._drops
            and bool(self.loras)
            and tokens >= wide
        )

    def dropped(self, x: Tensor, p: float) -> Tensor:
        """x [M, K] with the mask of dropout p, which all adapters of the group share."""
        assert self.dropout_seed is not None
        return self._products.dropped(x, p, self.dropout_seed, self._dropout_number)

    def weights(self, tokens: int) -> Ready:
        """The weights for products with so many tokens; made once a group."""
        if self._ready is None:
            stored = [p.weight for p in self.linears]
            if self.compute != "same":
                self._ready = weights.as_codes(
                    stored, self.compute, self.dtype, self.impl, dgrad=self.dgrad
                )
            else:
                self._ready = weights.as_floats(stored, self.dtype, tokens, self.impl, self.rank)
            if self.merges(tokens):
                self._ready = weights.merged(self._ready.weights, self._own_loras, self.dtype)
        return self._ready

    def weights_of_rows(self, tokens: int) -> list[RowsAt]:
        if self.impl != "triton" or self.compute != "same" or self.rank == 0:
            return []
        place = self.weights(tokens).augmented
        if place is None:
            return []
        if not self._is_filled:
            fill([self._fill(place)])
            self._is_filled = True
        return [RowsAt(slice(None), place)]

    def _fill(self, place: Placed) -> Fill:
        return Fill(place, self._own_loras, self.biases)

    def fill_in_place(self) -> Fill | None:
        """What goes into the augmented weight in which the weights live; None where there is none.

        Whoever asks for it does it.
        """
        place = in_place(self.linears) if self.compute == "same" else None
        if place is None or place.within.dtype != self.dtype:
            return None
        self._is_filled = True
        return self._fill(place)

    def _split_outliers(
        self, x: Tensor, s: Tensor | None, ready: Ready
    ) -> tuple[tuple[Tensor, Tensor], Tensor, list[Tensor], list[int]]:
        """x [M, K] as codes without its largest channels; these are one more LoRA of each linear.

        Returns the codes with their scales, and what `wide` takes for the LoRAs: s, all B, counts.
        """
        largest = x.abs().amax(0).topk(self.outliers).indices
        keep = torch.ones(x.shape[1], device=x.device).index_fill_(0, largest, 0)
        codes = row_quant.forward(x, self.compute, keep, impl=self.impl)
        columns, b, rank = [], [], 0
        for own, w, scale in zip(self._own_loras, *ready.operands, strict=True):
            width = sum(lora.a.shape[0] for lora in own)
            columns += [] if s is None else [s[:, rank : rank + width]]
            columns.append(x[:, largest])
            rank += width
            b += [lora.b.detach().to(self.dtype) for lora in own]
            b.append((w[:, largest].to(scale.dtype) * scale[:, None]).to(self.dtype))
        counts = [count + 1 for count in self.counts]
        return (codes.q, codes.scale), torch.cat(columns, dim=1), b, counts

    def _dgrad(
        self,
        dy: Tensor,
        codes: Sequence[tuple[int, Quantized]],
        ds: Tensor | None,
        dx: Tensor,
    ) -> None:
        """Writes dy W + dS A to dx [M, K]."""
        ready = self.weights(len(dx))
        parts: list[tuple[int, Tensor, Tensor | None]] = [(0, dy, None)]
        if self.compute != "same":
            if not codes:
                codes = [(0, row_quant.forward(dy, self.compute, self.fold(), impl=self.impl))]
            parts = [
                (col, q.reshape(-1, q.shape[-1]), scale.reshape(-1)) for col, (q, scale) in codes
            ]
            ready = ready._replace(weights=self._products.for_dgrad(ready.weights, len(dx)))
        fuses = ds is not None and not self._drops
        for i, (col, part, scale) in enumerate(parts):
            # the first product has all of dS A
            own_ds, a = (ds, self.a) if fuses and i == 0 else (None, [])
            self._products.wide_dgrad(part, scale, col, *ready.operands, own_ds, a, i > 0, dx)
        if ds is None or fuses:
            return
        for same in self._by_dropout():
            delta = ds[:, same.ranks] @ stack([lora.a for lora in same.loras]).to(self.dtype)
            dx += delta if same.dropout == 0 else self.dropped(delta, same.dropout)

    def _lora_backward(
        self, dy: Tensor, x: RowOutput, s: Tensor | None, room: Tensor | None
    ) -> tuple[Tensor | None, list[tuple[Tensor, ...]]]:
        """dS [M, Σ ranks], where dx needs it, and (dA, dB) of every LoRA.

        dS is written to `room`, where there is some.
        """
        if not self.loras:
            return None, []
        scales, b = self.scales, self.b
        if self.merges(len(dy)):
            a, b = (
                [lora.a.detach().to(self.dtype) for lora in self.loras],
                [t.to(self.dtype) for t in b],
            )
            starts = accumulate(self.outs, initial=0)
            cols = [col for col, n in zip(starts, self.counts, strict=False) for _ in range(n)]
            d_a, d_b = products_native.lora_grads(operand_of(x)[0], dy, a, b, scales, cols)
            return None, in_places(self.loras, d_a, d_b, NO_RUNS)
        assert s is not None
        out: dict[str, Any] = {} if room is None else {"out": room}
        runs = runs_of([self.loras], self.counts)
        ds, packed_b = self._products.lora_grads(
            dy, s, b, scales, self.counts, self.outs, b[0].dtype,
            db=runs.d_b, **out,
        )  # fmt: skip
        d_a = []
        for same in self._by_dropout():
            seen = self._seen_by_loras(same.dropout, x)
            grad = self._products.grad_a(
                ds[:, same.ranks], *seen, same.loras[0].a.dtype,
                da=None if runs.d_a is None else [runs.d_a[0][same.ranks]],
            )  # fmt: skip
            d_a += grad.split_with_sizes([lora.a.shape[0] for lora in same.loras])
        return ds, self.lora_grads_of(d_a, packed_b, runs)

    def lora_grads_of(
        self, d_a: Sequence[Tensor], packed_b: Tensor, runs: Runs
    ) -> list[tuple[Tensor, ...]]:
        """(dA, dB) of every LoRA, from their dA and from packed dB [N, widest].

        runs: the memory to which these were written.
        """
        d_b: list[Tensor] = []
        for own, rows in zip(self._own_loras, packed_b.split_with_sizes(self.outs), strict=True):
            widths = [lora.b.shape[1] for lora in own]
            d_b += rows[:, : sum(widths)].split_with_sizes(widths, dim=1)
        return in_places(self.loras, d_a, d_b, runs)

    def _by_dropout(self) -> list[_SameDropout]:
        found: list[_SameDropout] = []
        rank = 0
        for lora in self.loras:
            p, stop = lora.dropout if self._drops else 0.0, rank + lora.a.shape[0]
            if found and found[-1].dropout == p:
                last = found.pop()
                found.append(_SameDropout(p, slice(last.ranks.start, stop), [*last.loras, lora]))
            else:
                found.append(_SameDropout(p, slice(rank, stop), [lora]))
            rank = stop
        return found

    def _seen_by_loras(self, p: float, x: RowOutput) -> tuple[Tensor, Tensor | None]:
        """The x that LoRAs with dropout p see: codes and scales where there are any, or values."""
        if p == 0:
            return operand_of(x)
        assert x.y is not None
        return self.dropped(x.y, p), None

    # adapters of other kinds

    def _beside(self) -> list[tuple[Adapter, slice]]:
        """The adapters that the group does not fuse, each with its columns of y."""
        starts = accumulate(self.outs, initial=0)
        return [
            (adapter, slice(start, start + out))
            for p, start, out in zip(self.linears, starts, self.outs, strict=False)
            for adapter in p.adapters
            if not isinstance(adapter, Lora)
        ]

    def _is_dropped(self, adapter: Adapter) -> bool:
        return self.dropout_seed is not None and adapter.dropout > 0

    def _seen_by(self, adapter: Adapter, x: RowOutput) -> Tensor:
        """The values [M, K] of x that an adapter sees."""
        assert x.y is not None
        return self.dropped(x.y, adapter.dropout) if self._is_dropped(adapter) else x.y

    def _backward_beside(
        self, adapter: Adapter, cols: slice, dy: Tensor, x: RowOutput, dx: Tensor | None
    ) -> tuple[Tensor, ...]:
        """An adapter's gradients in the dtypes of its tensors; adds its part of dx in place."""
        seen, dy = self._seen_by(adapter, x), dy[:, cols]
        if dx is None or not self._is_dropped(adapter):
            grads = adapter.backward(dy, seen, dx)
        else:
            dropped_dx = torch.zeros_like(dx)
            grads = adapter.backward(dy, seen, dropped_dx)
            dx += self.dropped(dropped_dx, adapter.dropout)
        return tuple(grad.to(t.dtype) for grad, t in zip(grads, adapter.tensors, strict=True))


def operand_of(x: RowOutput) -> tuple[Tensor, Tensor | None]:
    """What products read of x: its codes and their scales where there are any, else its values."""
    if x.q is not None:
        return x.q, x.q_scale
    assert x.y is not None
    return x.y, None


def flat_rows(x: RowOutput) -> RowOutput:
    """The same with all leading dimensions as one."""
    y, q, scale = x
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
