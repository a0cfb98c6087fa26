"""Linears that read the same x, as one product: what `lora_linear` and the blocks' own backward are
made of.

    forward    s  = scale · x Aᵀ           y  = x Wᵀ + s Bᵀ + b
    backward   dS = scale · dy B           dx = dy W + dS A        dA = dSᵀ x        dB = dyᵀ s

`compute` says in what the wide products run: "same" (x's dtype), or "int8" / "e4m3": x comes as
codes and a scale a row, W as codes and a scale a row of its own, and dy is quantised after W's
scales went into it, so that one W serves both directions. The low-rank products read the same
codes.

A few channels of x that are far larger than the others would leave those no codes to speak of
(FLUX.1's normalised inputs have such channels). With `outliers` = n, the n largest channels of x
stay out of the codes and meet their columns of W in x's dtype, in the epilogue, like one more
adapter. They are chosen anew in each product, on the device: nothing is calibrated, nothing has to
be remembered for backward, and who recomputes a forward pass finds the same ones.

A group holds weights ready for one direction of one block and is then dropped: decoded weights live
as long as it does, once a direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fluxfast.ops import row_quant
from fluxfast.ops.linear import products_native, products_torch, products_triton
from fluxfast.ops.linear.adapters import Adapter, Lora
from fluxfast.ops.linear.products_torch import adjoining, stack
from fluxfast.ops.row_quant import FORMATS, Quantized, RowOutput

COMPUTE = ("same", *FORMATS)


class FrozenWeight(Protocol):
    """A base weight [N, K] that is no tensor but can be made one, each time that it is used; on one
    device.
    """

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def device(self) -> torch.device: ...

    def to(self, dtype: torch.dtype, /) -> Tensor:
        """The weight as a tensor of its own."""

    def stores(self, fmt: str, /) -> bool:
        """Whether `codes(fmt)` are its own bytes, so that nothing has to be computed."""

    def codes(self, fmt: str, /) -> Quantized:
        """Codes [N, K] and row scales [N], fp32, for an 8-bit product."""

    def codes_into(self, q: Tensor, scale: Tensor, /) -> None:
        """`codes`, written to contiguous tensors that are given."""

    def decode_into(self, out: Tensor, /) -> None:
        """The weight, written to a contiguous tensor of a floating dtype."""


class LinearParams(NamedTuple):
    """One linear of a group: weight [out, in], bias [out] or None, and its adapters."""

    weight: Tensor | FrozenWeight
    bias: Tensor | None
    adapters: tuple[Adapter, ...] = ()


class _Weights(NamedTuple):
    """Each linear's weight [out, in] as products read it, and its row scales [out] where those are
    codes, else nothing.
    """

    weights: list[Tensor]
    scales: list[Tensor]


class LinearGroup:
    """Linears with their adapters, ready for products with x [..., in] of `dtype`.

    compute: one of COMPUTE. outliers: how many channels of x 8-bit products leave out. impl: as
    `dispatch.resolve` gave it. dropout_seed: what the masks of the adapters' dropout are drawn
    from; None where dropout is off. Whoever recomputes a forward pass gives the same one.
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
        self._loras = [loras_of(p) for p in linears]
        self._counts = [len(loras) for loras in self._loras]
        self.loras = [lora for loras in self._loras for lora in loras]
        self._products = products_triton if impl == "triton" else products_torch
        self._ready: _Weights | None = None

    @property
    def form(self) -> str:
        """What forward and backward want of x: the `out=` of the op that makes it."""
        if self.compute == "same" or self.outliers:
            return "same"
        return f"both-{self.compute}" if self._drops or self._beside else self.compute

    @property
    def _beside(self) -> bool:
        """Whether there are adapters that the group doesn't fuse."""
        return len(self.loras) < len(self.adapters)

    @property
    def _drops(self) -> bool:
        return self.dropout_seed is not None and any(
            adapter.dropout > 0 for adapter in self.adapters
        )

    def fold(self) -> Tensor | None:
        """What goes into dy [..., N] before it is quantised for dgrad: W's row scales [N] fp32;
        None where dy is not.
        """
        return None if self.compute == "same" else stack(self._weights(0).scales)

    def _weights(self, tokens: int) -> _Weights:
        """The weights for products with so many tokens; made once a group."""
        if self._ready is None:
            self._ready = self._codes() if self.compute != "same" else self._floats(tokens)
            if self._merges(tokens):
                self._ready = _Weights(self._merged(self._ready.weights), [])
        return self._ready

    def _merges(self, tokens: int) -> bool:
        """Whether the adapters go into a copy of W, for the length of this group: fewer numbers
        than a pass over x and y.

        On the CPU alone, in fp32: W in 16 bit would round away what adapters add to it.
        """
        wide = max(sum(self.outs), self.linears[0].weight.shape[1])
        return (
            self.impl == "native"
            and self.compute == "same"
            and not self._drops
            and bool(self.loras)
            and tokens >= wide
        )

    def _merged(self, weights: list[Tensor]) -> list[Tensor]:
        """W + scale · B A of each linear, side by side."""
        scratch = torch.empty(sum(self.outs), weights[0].shape[1], dtype=self.dtype)
        rows = list(scratch.split_with_sizes(self.outs))
        for loras, weight, out in zip(self._loras, weights, rows, strict=True):
            base = weight.to(self.dtype)
            for lora in loras:
                base = torch.addmm(
                    base,
                    lora.b.detach().to(self.dtype),
                    lora.a.detach().to(self.dtype),
                    alpha=lora.scale,
                    out=out,
                )
            if not loras:
                out.copy_(base)
        return rows

    def _floats(self, tokens: int) -> _Weights:
        tensors, frozen = self._kinds()
        if not frozen:
            return _Weights(tensors, [])
        if self.impl == "triton" and not tensors:
            for fmt in FORMATS:
                if all(w.stores(fmt) for w in frozen) and products_triton.keeps_codes(
                    fmt, tokens, frozen[0].device
                ):
                    codes = [w.codes(fmt) for w in frozen]
                    return _Weights([c.q for c in codes], [c.scale for c in codes])
        scratch = torch.empty(
            sum(self.outs), frozen[0].shape[1], dtype=self.dtype, device=frozen[0].device
        )
        rows = list(scratch.split_with_sizes(self.outs))
        for p, out in zip(self.linears, rows, strict=True):
            if isinstance(p.weight, Tensor):
                out.copy_(p.weight.detach())
            else:
                p.weight.decode_into(out)
        return _Weights(rows, [])

    def _codes(self) -> _Weights:
        tensors, frozen = self._kinds()
        if not tensors and all(w.stores(self.compute) for w in frozen):
            codes = [w.codes(self.compute) for w in frozen]
            weights, scales = [c.q for c in codes], [c.scale for c in codes]
        elif not frozen and (joined := adjoining(tensors)) is not None:
            q, scale = row_quant.forward(joined, self.compute, impl=self.impl)
            weights, scales = (
                list(q.split_with_sizes(self.outs)),
                list(scale.split_with_sizes(self.outs)),
            )
        else:
            weights, scales = self._coded()
        if self.impl == "triton":
            return _Weights(weights, scales)
        joined = adjoining(weights)
        whole = [
            products_torch.readable(q, self.impl, self.dtype)
            for q in (weights if joined is None else [joined])
        ]
        return _Weights(
            whole if joined is None else list(whole[0].split_with_sizes(self.outs)), scales
        )

    def _coded(self) -> tuple[list[Tensor], list[Tensor]]:
        """Codes and scales made for the occasion, side by side in one scratch."""
        n, k = sum(self.outs), self.linears[0].weight.shape[1]
        device = self.linears[0].weight.device
        q = torch.empty(n, k, dtype=FORMATS[self.compute][0], device=device)
        scale = torch.empty(n, dtype=torch.float32, device=device)
        weights, scales = (
            list(q.split_with_sizes(self.outs)),
            list(scale.split_with_sizes(self.outs)),
        )
        for p, q_i, scale_i in zip(self.linears, weights, scales, strict=True):
            if isinstance(p.weight, Tensor):
                codes = row_quant.forward(p.weight.detach(), self.compute, impl=self.impl)
                q_i.copy_(codes.q)
                scale_i.copy_(codes.scale)
            else:
                p.weight.codes_into(q_i, scale_i)
        return weights, scales

    def _kinds(self) -> tuple[list[Tensor], list[FrozenWeight]]:
        weights = [p.weight for p in self.linears]
        tensors = [w.detach() for w in weights if isinstance(w, Tensor)]
        return tensors, [w for w in weights if not isinstance(w, Tensor)]

    def forward(self, x: RowOutput, out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """y [..., N], written to `out` where given, and s [M, Σ ranks] to keep for backward; None
        where it wants none.
        """
        lead, rows = _present(x).shape[:-1], _rows(x)
        y = (
            torch.empty(*lead, sum(self.outs), dtype=self.dtype, device=_present(x).device)
            if out is None
            else out
        )
        s = self._down(rows)
        weights, w_scales = self._weights(len(_present(rows)))
        biases = [None if p.bias is None else p.bias.detach() for p in self.linears]
        b = [lora.b.detach() for lora in self.loras]
        up, counts, operand = s, self._counts, self._operand(rows)
        if self.outliers:
            operand, up, b, counts = self._apart(operand[0], s, weights, w_scales)
        self._products.wide(
            *operand, weights, w_scales, biases, up, b, counts, y.view(-1, y.shape[-1])
        )
        for adapter, cols in self._others():
            adapter.add_to(y.view(-1, y.shape[-1])[:, cols], self._seen_by(adapter, rows))
        return y, s

    def _apart(
        self, x: Tensor, s: Tensor | None, weights: list[Tensor], w_scales: list[Tensor]
    ) -> tuple[tuple[Tensor, Tensor], Tensor, list[Tensor], list[int]]:
        """x [M, K] as codes without its outliers; these as an adapter of each linear: s, b and
        counts with them.
        """
        largest = x.abs().amax(0).topk(self.outliers).indices
        codes = row_quant.forward(
            x,
            self.compute,
            torch.ones(x.shape[1], device=x.device).index_fill_(0, largest, 0),
            impl=self.impl,
        )
        apart, columns, b, rank = x[:, largest], [], [], 0
        for loras, w, scale in zip(self._loras, weights, w_scales, strict=True):
            width = sum(lora.a.shape[0] for lora in loras)
            columns += [] if s is None else [s[:, rank : rank + width]]
            columns.append(apart)
            rank += width
            b += [lora.b.detach().to(self.dtype) for lora in loras]
            b.append((w[:, largest].to(scale.dtype) * scale[:, None]).to(self.dtype))
        return (
            (codes.q, codes.scale),
            torch.cat(columns, dim=1),
            b,
            [count + 1 for count in self._counts],
        )

    def down(self, x: RowOutput) -> Tensor | None:
        """s alone, for who has forward's y already."""
        return self._down(_rows(x))

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
        """dx [..., K], written to `out` where given (None if not needed), and for every adapter, in
        order, the gradients of its tensors.

        dy: values [..., N]; x in `form`, as forward had it. codes: where dy's producers quantised
        it with `fold()`, its codes, in parts that cover the columns in order, each with its first
        column and scales a row of its own.
        """
        d_rows = dy.reshape(-1, dy.shape[-1])
        rows = _rows(x)
        ds, grads = self._adapter_grads(d_rows, rows, s)
        if not need_dx:
            return None, self._all_grads(grads, d_rows, rows, None)
        parts: list[tuple[int, Tensor, Tensor | None]] = [(0, d_rows, None)]
        if self.compute != "same":
            if not codes:
                codes = [(0, row_quant.forward(d_rows, self.compute, self.fold(), impl=self.impl))]
            parts = [
                (col, part.q.reshape(-1, part.q.shape[-1]), part.scale.reshape(-1))
                for col, part in codes
            ]
        width = self.linears[0].weight.shape[1]
        dx = (
            torch.empty(*dy.shape[:-1], width, dtype=self.dtype, device=dy.device)
            if out is None
            else out
        )
        self._dgrad(parts, ds, dx.view(-1, width))
        return dx, self._all_grads(grads, d_rows, rows, dx.view(-1, width))

    def _dgrad(
        self, parts: Sequence[tuple[int, Tensor, Tensor | None]], ds: Tensor | None, dx: Tensor
    ) -> None:
        weights, w_scales = self._weights(len(dx))
        if self.compute != "same":
            weights = self._products.for_dgrad(weights, len(dx))
        whole = ds is not None and not self._drops
        for i, (col, part, scale) in enumerate(parts):
            a = [lora.a.detach() for lora in self.loras] if whole and i == 0 else []
            self._products.wide_dgrad(
                part, scale, col, weights, w_scales, ds if a else None, a, i > 0, dx
            )
        if ds is None or whole:
            return
        for p, ranks, run in self._runs():
            delta = ds[:, ranks] @ stack([lora.a for lora in run]).to(self.dtype)
            dx += delta if p == 0 else self.dropped(delta, p)

    def _operand(self, x: RowOutput) -> tuple[Tensor, Tensor | None]:
        """What products read of x: its codes and their scales where there are any."""
        if x.q is not None:
            return x.q, x.q_scale
        assert x.y is not None
        return x.y, None

    def _runs(self) -> list[tuple[float, slice, list[Lora]]]:
        """Neighbouring LoRAs whose dropout is the same: that, their columns of s, and they
        themselves.
        """
        runs: list[tuple[float, slice, list[Lora]]] = []
        rank = 0
        for lora in self.loras:
            p, stop = lora.dropout if self._drops else 0.0, rank + lora.a.shape[0]
            if runs and runs[-1][0] == p:
                runs[-1] = (p, slice(runs[-1][1].start, stop), [*runs[-1][2], lora])
            else:
                runs.append((p, slice(rank, stop), [lora]))
            rank = stop
        return runs

    def dropped(self, x: Tensor, p: float) -> Tensor:
        """x [M, K] with the mask of dropout p, which is the same for all adapters of the group."""
        assert self.dropout_seed is not None
        return self._products.dropped(x, p, self.dropout_seed)

    def _adapter_x(self, x: RowOutput, p: float) -> tuple[Tensor, Tensor | None]:
        """The x that adapters with dropout p see."""
        if p == 0:
            return self._operand(x)
        assert x.y is not None
        return self.dropped(x.y, p), None

    def _others(self) -> list[tuple[Adapter, slice]]:
        """The adapters that the group doesn't fuse, each with its columns of y."""
        starts = accumulate(self.outs, initial=0)
        return [
            (adapter, slice(start, start + out))
            for p, start, out in zip(self.linears, starts, self.outs, strict=False)
            for adapter in p.adapters
            if not isinstance(adapter, Lora)
        ]

    def _seen_by(self, adapter: Adapter, x: RowOutput) -> Tensor:
        """The values [M, K] that an adapter sees: x's, or with its dropout."""
        assert x.y is not None
        return self.dropped(x.y, adapter.dropout) if self._is_dropped(adapter) else x.y

    def _is_dropped(self, adapter: Adapter) -> bool:
        return self.dropout_seed is not None and adapter.dropout > 0

    def _all_grads(
        self, fused: list[tuple[Tensor, ...]], dy: Tensor, x: RowOutput, dx: Tensor | None
    ) -> list[tuple[Tensor, ...]]:
        """The gradients of all adapters in order, with those of the LoRAs given; adds to dx what
        reaches x through the others.
        """
        if not self._beside:
            return fused
        others = iter(self._others())
        loras = iter(fused)
        grads: list[tuple[Tensor, ...]] = []
        for adapter in self.adapters:
            if isinstance(adapter, Lora):
                grads.append(next(loras))
                continue
            _, cols = next(others)
            part = torch.zeros_like(dx) if dx is not None and self._is_dropped(adapter) else dx
            made = adapter.backward(dy[:, cols], self._seen_by(adapter, x), part)
            if dx is not None and part is not None and part is not dx:
                dx += self.dropped(part, adapter.dropout)
            grads.append(tuple(g.to(t.dtype) for g, t in zip(made, adapter.tensors, strict=True)))
        return grads

    def _down(self, x: RowOutput) -> Tensor | None:
        """s = scale · x Aᵀ [M, Σ ranks], each adapter on its own dropped x; None where nothing
        reads it.
        """
        if self._merges(len(_present(x))):
            return None
        columns = [
            self._products.down(
                *self._adapter_x(x, p),
                [a.a.detach() for a in run],
                [a.scale for a in run],
                self.dtype,
            )
            for p, _, run in self._runs()
        ]
        return (
            None if not columns else columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)
        )

    def _adapter_grads(
        self, dy: Tensor, x: RowOutput, s: Tensor | None
    ) -> tuple[Tensor | None, list[tuple[Tensor, ...]]]:
        """dS [M, Σ ranks], where dx needs it, and (dA, dB) of every LoRA."""
        if not self.loras:
            return None, []
        if self._merges(len(dy)):
            return None, self._grads_in_one_pass(dy, self._operand(x)[0])
        assert s is not None
        ranks = [sum(lora.a.shape[0] for lora in loras) for loras in self._loras]
        b, scales = (
            [lora.b.detach() for lora in self.loras],
            [lora.scale for lora in self.loras],
        )
        ds = self._products.down_grad(dy, b, scales, self._counts, self.outs)
        packed = self._products.grad_b(dy, s, self.outs, ranks, b[0].dtype)
        d_b: list[Tensor] = []
        for loras, rows in zip(self._loras, packed.split_with_sizes(self.outs), strict=True):
            widths = [lora.b.shape[1] for lora in loras]
            d_b += (
                [rows]
                if widths == [rows.shape[1]]
                else rows[:, : sum(widths)].split_with_sizes(widths, dim=1)
            )
        d_a: list[Tensor] = []
        for dropout, columns, run in self._runs():
            grad = self._products.grad_a(
                ds[:, columns], *self._adapter_x(x, dropout), run[0].a.dtype
            )
            d_a += grad.split_with_sizes([lora.a.shape[0] for lora in run])
        return ds, self._pairs(d_a, d_b)

    def _grads_in_one_pass(self, dy: Tensor, x: Tensor) -> list[tuple[Tensor, ...]]:
        a = [lora.a.detach().to(self.dtype) for lora in self.loras]
        b = [lora.b.detach().to(self.dtype) for lora in self.loras]
        starts = [
            col
            for col, count in zip(accumulate(self.outs, initial=0), self._counts, strict=False)
            for _ in range(count)
        ]
        scales = [lora.scale for lora in self.loras]
        return self._pairs(*products_native.adapter_grads(x, dy, a, b, scales, starts))

    def _pairs(self, d_a: Sequence[Tensor], d_b: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        pairs = zip(self.loras, d_a, d_b, strict=True)
        return [
            (g_a.to(lora.a.dtype), g_b.to(lora.b.dtype).contiguous()) for lora, g_a, g_b in pairs
        ]


def loras_of(linear: LinearParams) -> list[Lora]:
    """The adapters of a linear that a group fuses."""
    return [adapter for adapter in linear.adapters if isinstance(adapter, Lora)]


def _present(x: RowOutput) -> Tensor:
    present = x.q if x.y is None else x.y
    assert present is not None
    return present


def _rows(x: RowOutput) -> RowOutput:
    """The same with all leading dimensions as one."""
    y, q, scale = x
    return RowOutput(
        None if y is None else y.reshape(-1, y.shape[-1]),
        None if q is None else q.reshape(-1, q.shape[-1]),
        None if scale is None else scale.reshape(-1),
    )
