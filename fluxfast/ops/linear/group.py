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
from typing import NamedTuple

import torch
from torch import Tensor

from fluxfast.ops import row_quant
from fluxfast.ops.linear import products_native, products_torch, products_triton, weights
from fluxfast.ops.linear.adapters import Adapter, Lora
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


class LinearGroup:
    """Linears with their adapters, ready for products with x [..., in] of `dtype`.

    compute: one of COMPUTE. outliers: how many channels of x 8-bit products leave out. impl: as
    `dispatch.resolve` gave it. dropout_seed: the seed of the masks of the adapters' dropout, or
    None where dropout is off; a forward pass that is computed again needs the same one.
    """

    def __init__(
        self,
        linears: Sequence[LinearParams],
        dtype: torch.dtype,
        *,
        compute: str = "same",
        outliers: int = 0,
        impl: str,
        dropout_seed: int | None = None,
    ) -> None:
        self.linears, self.dtype, self.compute, self.impl = linears, dtype, compute, impl
        self.outliers = 0 if compute == "same" else min(outliers, linears[0].weight.shape[1])
        self.dropout_seed = dropout_seed
        self.outs = [p.weight.shape[0] for p in linears]
        self.adapters = [adapter for p in linears for adapter in p.adapters]
        # the LoRAs of each linear, and all of them
        self._own_loras = [loras_of(p) for p in linears]
        self.loras = [lora for own in self._own_loras for lora in own]
        self._counts = [len(own) for own in self._own_loras]
        self._drops = any(self._is_dropped(adapter) for adapter in self.adapters)
        self._products = products_triton if impl == "triton" else products_torch
        self._ready: Ready | None = None

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
        return None if self.compute == "same" else stack(self._weights(0).scales)

    def forward(self, x: RowOutput, out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """y [..., N], written to `out` where that is given, and s [M, Σ ranks].

        s is kept for backward; it is None where backward does not need it.
        """
        rows = _flat(x)
        present = _present(x)
        y = out
        if y is None:
            shape = (*present.shape[:-1], sum(self.outs))
            y = torch.empty(shape, dtype=self.dtype, device=present.device)
        y_rows = y.view(-1, y.shape[-1])
        s = self.down(x)
        ready = self._weights(len(y_rows))
        biases = [None if p.bias is None else p.bias.detach() for p in self.linears]
        narrow, b, counts = s, [lora.b.detach() for lora in self.loras], self._counts
        operand = _operand(rows)
        if self.outliers:
            operand, narrow, b, counts = self._split_outliers(operand[0], s, ready)
        self._products.wide(*operand, *ready, biases, narrow, b, counts, y_rows)
        for adapter, cols in self._beside():
            adapter.add_to(y_rows[:, cols], self._seen_by(adapter, rows))
        return y, s

    def down(self, x: RowOutput) -> Tensor | None:
        """s = scale · x Aᵀ [M, Σ ranks], each LoRA on its own dropped x.

        It is what `forward` returns beside y, for callers that have y already.
        """
        rows = _flat(x)
        if not self.loras or self.merges(len(_present(rows))):
            return None
        columns = []
        for same in self._by_dropout():
            a, scales = (
                [lora.a.detach() for lora in same.loras],
                [lora.scale for lora in same.loras],
            )
            seen = self._seen_by_loras(same.dropout, rows)
            columns.append(self._products.down(*seen, a, scales, self.dtype))
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
        dy_rows, rows = dy.reshape(-1, dy.shape[-1]), _flat(x)
        ds, lora_grads = self._lora_backward(dy_rows, rows, s)
        dx, dx_rows = None, None
        if need_dx:
            width = self.linears[0].weight.shape[1]
            dx = out
            if dx is None:
                shape = (*dy.shape[:-1], width)
                dx = torch.empty(shape, dtype=self.dtype, device=dy.device)
            dx_rows = dx.view(-1, width)
            self._dgrad(dy_rows, codes, ds, dx_rows)
        beside = [self._backward_beside(*each, dy_rows, rows, dx_rows) for each in self._beside()]
        fused, others = iter(lora_grads), iter(beside)
        grads = [next(fused if isinstance(a, Lora) else others) for a in self.adapters]
        return dx, grads

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
        return self._products.dropped(x, p, self.dropout_seed)

    def _weights(self, tokens: int) -> Ready:
        """The weights for products with so many tokens; made once a group."""
        if self._ready is None:
            stored = [p.weight for p in self.linears]
            if self.compute != "same":
                self._ready = weights.as_codes(stored, self.compute, self.dtype, self.impl)
            else:
                self._ready = weights.as_floats(stored, self.dtype, tokens, self.impl)
            if self.merges(tokens):
                self._ready = weights.merged(self._ready.weights, self._own_loras, self.dtype)
        return self._ready

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
        for own, w, scale in zip(self._own_loras, *ready, strict=True):
            width = sum(lora.a.shape[0] for lora in own)
            columns += [] if s is None else [s[:, rank : rank + width]]
            columns.append(x[:, largest])
            rank += width
            b += [lora.b.detach().to(self.dtype) for lora in own]
            b.append((w[:, largest].to(scale.dtype) * scale[:, None]).to(self.dtype))
        counts = [count + 1 for count in self._counts]
        return (codes.q, codes.scale), torch.cat(columns, dim=1), b, counts

    def _dgrad(
        self,
        dy: Tensor,
        codes: Sequence[tuple[int, Quantized]],
        ds: Tensor | None,
        dx: Tensor,
    ) -> None:
        """Writes dy W + dS A to dx [M, K]."""
        ready = self._weights(len(dx))
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
            own_ds, a = (
                (ds, [lora.a.detach() for lora in self.loras]) if fuses and i == 0 else (None, [])
            )
            self._products.wide_dgrad(part, scale, col, *ready, own_ds, a, i > 0, dx)
        if ds is None or fuses:
            return
        for same in self._by_dropout():
            delta = ds[:, same.ranks] @ stack([lora.a for lora in same.loras]).to(self.dtype)
            dx += delta if same.dropout == 0 else self.dropped(delta, same.dropout)

    def _lora_backward(
        self, dy: Tensor, x: RowOutput, s: Tensor | None
    ) -> tuple[Tensor | None, list[tuple[Tensor, ...]]]:
        """dS [M, Σ ranks], where dx needs it, and (dA, dB) of every LoRA."""
        if not self.loras:
            return None, []
        scales, b = [lora.scale for lora in self.loras], [lora.b.detach() for lora in self.loras]
        if self.merges(len(dy)):
            a, b = (
                [lora.a.detach().to(self.dtype) for lora in self.loras],
                [t.to(self.dtype) for t in b],
            )
            starts = accumulate(self.outs, initial=0)
            cols = [col for col, n in zip(starts, self._counts, strict=False) for _ in range(n)]
            d_a, d_b = products_native.lora_grads(_operand(x)[0], dy, a, b, scales, cols)
            return None, self._pairs(d_a, d_b)
        assert s is not None
        ds = self._products.down_grad(dy, b, scales, self._counts, self.outs)
        ranks = [sum(lora.a.shape[0] for lora in own) for own in self._own_loras]
        packed = self._products.grad_b(dy, s, self.outs, ranks, b[0].dtype)
        d_a, d_b = [], []
        for own, rows in zip(self._own_loras, packed.split_with_sizes(self.outs), strict=True):
            widths = [lora.b.shape[1] for lora in own]
            d_b += rows[:, : sum(widths)].split_with_sizes(widths, dim=1)
        for same in self._by_dropout():
            seen = self._seen_by_loras(same.dropout, x)
            grad = self._products.grad_a(ds[:, same.ranks], *seen, same.loras[0].a.dtype)
            d_a += grad.split_with_sizes([lora.a.shape[0] for lora in same.loras])
        return ds, self._pairs(d_a, d_b)

    def _pairs(self, d_a: Sequence[Tensor], d_b: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """(dA, dB) of every LoRA in the dtypes of its tensors."""
        return [
            (grad_a.to(lora.a.dtype), grad_b.to(lora.b.dtype).contiguous())
            for lora, grad_a, grad_b in zip(self.loras, d_a, d_b, strict=True)
        ]

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
            return _operand(x)
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


def _present(x: RowOutput) -> Tensor:
    present = x.q if x.y is None else x.y
    assert present is not None
    return present


def _operand(x: RowOutput) -> tuple[Tensor, Tensor | None]:
    """What products read of x: its codes and their scales where there are any, else its values."""
    if x.q is not None:
        return x.q, x.q_scale
    assert x.y is not None
    return x.y, None


def _flat(x: RowOutput) -> RowOutput:
    """The same with all leading dimensions as one."""
    y, q, scale = x
    return RowOutput(
        None if y is None else y.reshape(-1, y.shape[-1]),
        None if q is None else q.reshape(-1, q.shape[-1]),
        None if scale is None else scale.reshape(-1),
    )
