"""Linears that read the same x, as one product: what `lora_linear` and the blocks' own backward are made of.

    forward    s  = scale · x Aᵀ           y  = x Wᵀ + s Bᵀ + b
    backward   dS = scale · dy B           dx = dy W + dS A        dA = dSᵀ x        dB = dyᵀ s

`compute` says in what the wide products run: "same" (x's dtype), or "int8" / "e4m3": x comes as codes and a scale a row, W as
codes and a scale a row of its own, and dy is quantised after W's scales went into it, so that one W serves both directions.
The low-rank products read the same codes. A group holds weights ready for one direction of one block and is then dropped:
decoded weights live as long as it does, once a direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fluxfast.ops import row_quant
from fluxfast.ops.row_quant import FORMATS, Quantized, RowOutput

COMPUTE = ("same", *FORMATS)


class Adapter(NamedTuple):
    """One LoRA: A [r, in], B [out, r], the scale on their product (alpha / r), and the dropout on its x."""

    a: Tensor
    b: Tensor
    scale: float
    dropout: float = 0.0


class FrozenWeight(Protocol):
    """A base weight that is no tensor but can be made one, each time that it is used."""

    @property
    def shape(self) -> Sequence[int]: ...

    def to(self, dtype: torch.dtype, /) -> Tensor: ...

    def codes(self, fmt: str, /) -> Quantized: ...


class LinearParams(NamedTuple):
    """One linear of a group: weight [out, in], bias [out] or None, and its adapters."""

    weight: Tensor | FrozenWeight
    bias: Tensor | None
    adapters: tuple[Adapter, ...] = ()


class _Piece(NamedTuple):
    """Linears whose weight is one tensor: columns [col, col + N) of y, and that weight, or its codes and their scales [N]."""

    col: int
    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None


def adjoining(tensors: Sequence[Tensor]) -> Tensor | None:
    """The tensors as one along the first dimension, if that is how they lie in memory; else None. Nothing is copied."""
    first, end = tensors[0], tensors[0].storage_offset()
    for t in tensors:
        if not t.is_contiguous() or t.dtype != first.dtype or t.shape[1:] != first.shape[1:] or t.storage_offset() != end:
            return None
        if t.untyped_storage()._cdata != first.untyped_storage()._cdata:
            return None
        end += t.numel()
    rows = sum(t.shape[0] for t in tensors)
    return first if len(tensors) == 1 else first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def _bias(linears: Sequence[LinearParams], like: Tensor) -> Tensor | None:
    """The linears' biases as one vector, zeros for those that have none; None if none has."""
    if all(p.bias is None for p in linears):
        return None
    biases = [like.new_zeros(p.weight.shape[0]) if p.bias is None else p.bias.detach() for p in linears]
    joined = adjoining(biases)
    return torch.cat(biases) if joined is None else joined


class LinearGroup:
    """Linears with their adapters, ready for products with x [..., in] of `dtype`.

    compute: one of COMPUTE. impl: as `_impl.resolve` gave it. dropout_seed: what the masks of the adapters' dropout are drawn
    from; None where dropout is off. Whoever recomputes a forward pass gives the same one.
    """

    def __init__(
        self,
        linears: Sequence[LinearParams],
        dtype: torch.dtype,
        *,
        compute: str = "same",
        impl: str,
        dropout_seed: int | None = None,
    ) -> None:
        self.linears, self.dtype, self.compute, self.impl = linears, dtype, compute, impl
        self.dropout_seed = dropout_seed
        self.outs = [p.weight.shape[0] for p in linears]
        self.adapters = [adapter for p in linears for adapter in p.adapters]
        self._pieces: list[_Piece] | None = None

    @property
    def form(self) -> str:
        """What forward and backward want of x: the `out=` of the op that makes it."""
        if self.compute == "same":
            return "same"
        return f"both-{self.compute}" if self._drops else self.compute

    @property
    def _drops(self) -> bool:
        return self.dropout_seed is not None and any(adapter.dropout > 0 for adapter in self.adapters)

    def fold(self) -> Tensor | None:
        """What goes into dy [..., N] before it is quantised for dgrad: W's row scales [N] fp32; None where dy is not."""
        scales = [piece.scale for piece in self._weights()]
        if scales[0] is None:
            return None
        return scales[0] if len(scales) == 1 else torch.cat([scale for scale in scales if scale is not None])

    def _weights(self) -> list[_Piece]:
        if self._pieces is None:
            self._pieces = self._prepare()
        return self._pieces

    def _prepare(self) -> list[_Piece]:
        weights, scales = [], []
        for p in self.linears:
            if self.compute == "same":
                weights.append(p.weight.detach() if isinstance(p.weight, Tensor) else p.weight.to(self.dtype))
                continue
            if isinstance(p.weight, Tensor):
                codes = row_quant.forward(p.weight.detach(), self.compute, impl=self.impl)
            else:
                codes = p.weight.codes(self.compute)
            weights.append(codes.q)
            scales.append(codes.scale)
        joined = adjoining(weights)
        if joined is not None:
            scale = None if not scales else adjoining(scales)
            if scales and scale is None:
                scale = torch.cat(scales)
            return [_Piece(0, joined, scale, _bias(self.linears, joined))]
        pieces, col = [], 0
        for i, p in enumerate(self.linears):
            bias = None if p.bias is None else p.bias.detach()
            pieces.append(_Piece(col, weights[i], scales[i] if scales else None, bias))
            col += self.outs[i]
        return pieces

    def forward(self, x: RowOutput, out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """y [..., N], written to `out` where given, and s [M, Σ ranks] to keep for backward; None without adapters."""
        lead, rows = _lead(x), _rows(x)
        y = torch.empty(*lead, sum(self.outs), dtype=self.dtype, device=_device(x)) if out is None else out
        s = self._down(rows)
        _forward_torch(self, rows, s, y.view(-1, y.shape[-1]))
        return y, s

    def backward(
        self,
        dy: Tensor,
        x: RowOutput,
        s: Tensor | None,
        *,
        codes: Sequence[tuple[int, Quantized]] = (),
        need_dx: bool = True,
        out: Tensor | None = None,
    ) -> tuple[Tensor | None, list[tuple[Tensor, Tensor]]]:
        """dx [..., K], written to `out` where given (None if not needed), and (dA, dB) of every adapter, in order.

        dy: values [..., N]; x in `form`, as forward had it. codes: where dy's producers quantised it with `fold()`, its codes,
        in parts that cover the columns in order, each with its first column and scales a row of its own.
        """
        d_rows = dy.reshape(-1, dy.shape[-1])
        ds, grads = self._adapter_grads(d_rows, _rows(x), s)
        if not need_dx:
            return None, grads
        if self.compute != "same" and not codes:
            codes = [(0, row_quant.forward(d_rows, self.compute, self.fold(), impl=self.impl))]
        width = self.linears[0].weight.shape[1]
        dx = torch.empty(*dy.shape[:-1], width, dtype=self.dtype, device=dy.device) if out is None else out
        parts = [(col, Quantized(part.q.reshape(len(d_rows), -1), part.scale.reshape(-1))) for col, part in codes]
        _dgrad_torch(self, d_rows, parts, ds, dx.view(-1, width))
        return dx, grads

    def down(self, x: RowOutput) -> Tensor | None:
        """s alone, for who has forward's y already."""
        return self._down(_rows(x))

    def _down(self, x: RowOutput) -> Tensor | None:
        """s = scale · x Aᵀ [M, Σ ranks], each adapter on its own dropped x."""
        if not self.adapters:
            return None
        return torch.cat([self._adapter_x(x, p) @ _stack([a.a for a in run], self.dtype).T for p, run in self._runs()], dim=1)

    def _runs(self) -> list[tuple[float, list[Adapter]]]:
        """Neighbouring adapters whose dropout is the same."""
        runs: list[tuple[float, list[Adapter]]] = []
        for adapter in self.adapters:
            p = adapter.dropout if self._drops else 0.0
            if not runs or runs[-1][0] != p:
                runs.append((p, []))
            runs[-1][1].append(adapter)
        return runs

    def _ranks(self, first: int, count: int) -> slice:
        """The columns of s that belong to `count` adapters from the first one on."""
        start = sum(adapter.a.shape[0] for adapter in self.adapters[:first])
        return slice(start, start + sum(adapter.a.shape[0] for adapter in self.adapters[first : first + count]))

    def _mask(self, shape: Sequence[int], p: float, device: torch.device) -> Tensor:
        """What dropout multiplies x by: 0 with probability p, else 1 / (1 - p); the same for all adapters of the group."""
        assert self.dropout_seed is not None
        generator = torch.Generator(device).manual_seed(self.dropout_seed)
        keep = torch.empty(tuple(shape), dtype=self.dtype, device=device).bernoulli_(1 - p, generator=generator)
        return keep.div_(1 - p) if p < 1 else keep

    def _adapter_x(self, x: RowOutput, p: float) -> Tensor:
        """The x that adapters with dropout p see, as values."""
        values = x.y if x.y is not None else _values(x, self.dtype)
        return values if p == 0 else values * self._mask(values.shape, p, values.device)

    def _adapter_grads(self, dy: Tensor, x: RowOutput, s: Tensor | None) -> tuple[Tensor | None, list[tuple[Tensor, Tensor]]]:
        """dS [M, Σ ranks], and (dA, dB) of every adapter."""
        if s is None:
            return None, []
        ds, d_b = torch.empty_like(s), []
        col = rank = 0
        for p, width in zip(self.linears, self.outs, strict=True):
            dy_i = dy[:, col : col + width]
            col += width
            for adapter in p.adapters:
                ranks = slice(rank, rank + adapter.a.shape[0])
                torch.mm(dy_i, adapter.b.detach().to(self.dtype), out=ds[:, ranks]).mul_(adapter.scale)
                d_b.append((dy_i.T @ s[:, ranks]).mul_(adapter.scale).to(adapter.b.dtype))
                rank = ranks.stop
        d_a: list[Tensor] = []
        for dropout, run in self._runs():
            first = len(d_a)
            grad = ds[:, self._ranks(first, len(run))].T @ self._adapter_x(x, dropout)
            d_a += [g.to(a.a.dtype) for g, a in zip(grad.split([a.a.shape[0] for a in run]), run, strict=True)]
        return ds, list(zip(d_a, d_b, strict=True))


def _forward_torch(group: LinearGroup, x: RowOutput, s: Tensor | None, y: Tensor) -> None:
    """y [M, N] by torch's own products."""
    for col, weight, scale, bias in group._weights():
        y_i = y[:, col : col + weight.shape[0]]
        if scale is not None:
            assert x.q is not None and x.q_scale is not None
            y_i.copy_(_scaled_product(Quantized(x.q, x.q_scale), weight.T) * scale)
            if bias is not None:
                y_i += bias
            continue
        assert x.y is not None
        if bias is None:
            torch.mm(x.y, weight.to(group.dtype).T, out=y_i)
        else:
            torch.addmm(bias.to(group.dtype), x.y, weight.to(group.dtype).T, out=y_i)
    col = rank = 0
    for p, width in zip(group.linears, group.outs, strict=True):
        for adapter in p.adapters:
            assert s is not None
            ranks = slice(rank, rank + adapter.b.shape[1])
            y[:, col : col + width].addmm_(s[:, ranks], adapter.b.detach().to(group.dtype).T, alpha=adapter.scale)
            rank = ranks.stop
        col += width


def _dgrad_torch(
    group: LinearGroup, dy: Tensor, codes: Sequence[tuple[int, Quantized]], ds: Tensor | None, dx: Tensor
) -> None:
    """dx [M, K] by torch's own products."""
    written = False
    for col, weight, scale, _ in group._weights():
        stop = col + weight.shape[0]
        if scale is None:
            left, right = dy[:, col:stop], weight.to(group.dtype)
            dx.addmm_(left, right) if written else torch.mm(left, right, out=dx)
            written = True
            continue
        for start, part in codes:
            # the columns that this piece of W and this part of dy share
            lo, hi = max(col, start), min(stop, start + part.q.shape[1])
            if lo < hi:
                shared = Quantized(part.q[:, lo - start : hi - start], part.scale)
                product = _scaled_product(shared, weight[lo - col : hi - col])
                dx.add_(product) if written else dx.copy_(product)
                written = True
    first = 0
    for p, run in group._runs() if ds is not None else []:
        assert ds is not None
        ranks = group._ranks(first, len(run))
        first += len(run)
        a = _stack([adapter.a for adapter in run], group.dtype)
        if p == 0:
            dx.addmm_(ds[:, ranks], a)
        else:
            dx.addcmul_(ds[:, ranks] @ a, group._mask(dx.shape, p, dx.device))


def _scaled_product(x: Quantized, w: Tensor) -> Tensor:
    """x_scale · (codes of x) w in fp32, for codes w [K, N]."""
    product = torch._int_mm(x.q, w) if x.q.dtype == torch.int8 else x.q.float() @ w.float()
    return product * x.scale[:, None]


def _stack(factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    factors = [factor.detach() for factor in factors]
    joined = adjoining(factors)
    return (torch.cat(factors) if joined is None else joined).to(dtype)


def _values(x: RowOutput, dtype: torch.dtype) -> Tensor:
    assert x.q is not None and x.q_scale is not None
    return (x.q.float() * x.q_scale[..., None]).to(dtype)


def _lead(x: RowOutput) -> Sequence[int]:
    present = x.q if x.y is None else x.y
    assert present is not None
    return present.shape[:-1]


def _device(x: RowOutput) -> torch.device:
    present = x.q if x.y is None else x.y
    assert present is not None
    return present.device


def _rows(x: RowOutput) -> RowOutput:
    """The same with all leading dimensions as one."""
    y, q, scale = x
    return RowOutput(
        None if y is None else y.reshape(-1, y.shape[-1]),
        None if q is None else q.reshape(-1, q.shape[-1]),
        None if scale is None else scale.reshape(-1),
    )
