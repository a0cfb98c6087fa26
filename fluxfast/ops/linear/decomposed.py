"""Weight decomposition (DoRA): each row of W + ΔW gets the length that a trained magnitude says.

    y = g · (x (W + ΔW)ᵀ) + b,    g = multiplier · (magnitude / ν - 1) + 1,    ν = ‖W + ΔW‖ by rows

g is one number a row of W, so that a product takes it as the row scale of W, beside those of codes,
and W itself is not touched. ν is had without ΔW being formed:

    ν² = ‖W‖² + 2 ⟨W, ΔW⟩ + ‖ΔW‖²

where a LoRA's ⟨W, s B A⟩ takes the thin product W Aᵀ and its ‖s B A‖² takes A Aᵀ, and a LoKr's are
sums over its small factor. It is computed once in forward, and kept for backward. Sources: DoRA,
arXiv 2402.09353; PEFT, through whose norms no gradient flows (section 4.3); LyCORIS, through whose
norms it does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from fluxfast.ops.linear.adapters import Adapter, Lora
from fluxfast.ops.linear.beside import Masks
from fluxfast.ops.linear.lokr import Lokr
from fluxfast.ops.linear.params import LinearParams
from fluxfast.ops.linear.weights import FrozenWeight, Ready
from fluxfast.ops.registration import is_traced
from fluxfast.ops.tensors import dense_rows

Decomposing = Lora | Lokr
# a norm that is smaller is taken to be this
_TINY = 1e-30


class WithNorms(NamedTuple):
    """What a group with weight decomposition keeps for backward: s, and ν [N] of such linears."""

    s: Tensor | None
    norms: list[Tensor]


# what forward leaves for backward of a group's adapters: s [M, Σ ranks], where there is one
Narrow: TypeAlias = WithNorms | Tensor | None


class Decompositions:
    """The weight decompositions of a group's linears; iterated, the places of these linears."""

    def __init__(self, linears: Sequence[LinearParams], dtype: torch.dtype, impl: str) -> None:
        found = {i: decomposing(p.adapters) for i, p in enumerate(linears) if p.adapters}
        self._adapters = {i: adapter for i, adapter in found.items() if adapter is not None}
        self._linears, self._dtype, self._impl = linears, dtype, impl
        # those of dropout, of each of these linears
        self.masks = dict.fromkeys(self._adapters, Masks())
        self._norms: list[Tensor] | None = None
        self._row_scales: list[Tensor | None] | None = None
        # of each linear whose LoRA kernels read: g B
        self._scaled_b: dict[int, Tensor] = {}

    @property
    def exist(self) -> bool:
        """Whether there are any; torch.compile of PyTorch 2.11 asks for no truth of a list."""
        return len(self._adapters) > 0

    def __iter__(self) -> Iterator[int]:
        return iter(self._adapters)

    @property
    def norms(self) -> list[Tensor]:
        """ν [N] of each of these linears, computed where nobody has set them."""
        if self._norms is None:
            self._solve(None)
        assert self._norms is not None
        return self._norms

    @norms.setter
    def norms(self, norms: list[Tensor]) -> None:
        self._norms = norms

    @property
    def row_scales(self) -> list[Tensor | None]:
        """g [N] of each linear; None for one that has none."""
        if self._row_scales is None:
            self._solve(self._norms)
        assert self._row_scales is not None
        return self._row_scales

    def scaled_b(self, i: int, lora: Lora) -> Tensor:
        """B [N, r] of a LoRA of linear i, with g in it if it has one."""
        g = self.row_scales[i]
        if g is None:
            return lora.b
        if i in self._scaled_b:
            return self._scaled_b[i]
        return lora.b.detach().to(g.dtype) * g[:, None]

    def _solve(self, norms: list[Tensor] | None) -> None:
        """Computes every ν, unless they are given, and every g."""
        found: list[Tensor] = []
        scales: list[Tensor | None] = [None] * len(self._linears)
        for place, (i, adapter) in enumerate(self._adapters.items()):
            own, weight = None if norms is None else norms[place], self._linears[i].weight
            if isinstance(adapter, Lora) and self._impl == "triton" and not is_traced(adapter.b):
                own, g, self._scaled_b[i] = solve_by_kernel(weight, adapter, own, self._dtype)
            else:
                if own is None:
                    own = row_norms(weight, adapter, self.masks[i].rows, self._dtype)
                g = row_scale(adapter, own, self.masks[i].kept)
            found.append(own)
            scales[i] = g
        self._norms, self._row_scales = found, scales

    def scaled(self, ready: Ready) -> Ready:
        """The same weights with g beside what row scales they have."""
        if not self._adapters:
            return ready
        scales = []
        for i, (weight, g) in enumerate(zip(ready.weights, self.row_scales, strict=True)):
            own = ready.scales[i] if ready.scales else None
            if own is None:
                own = self.norms[0].new_ones(len(weight))
            scales.append(own if g is None else own * g)
        # side by side, as products of all linears read them
        outs = [len(weight) for weight in ready.weights]
        return ready._replace(scales=list(torch.cat(scales).split_with_sizes(outs)))

    def grads(
        self, i: int, dy: Tensor, before: Tensor, grads: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """The gradients of an adapter's own tensors, and that of its magnitude behind them.

        dy [M, N] of linear i; before: its product before g. grads: without what flows through ν.
        """
        adapter, masks = self._adapters[i], self.masks[i]
        norms = self.norms[list(self._adapters).index(i)]
        dg = column_dots(dy, before, norms.dtype, self._impl)
        if masks.kept is not None:
            dg = dg * masks.kept
        magnitude = adapter.magnitude
        assert magnitude is not None
        d_magnitude = dg / norms
        if isinstance(adapter, Lora):
            return *grads, d_magnitude.reshape(magnitude.shape).to(magnitude.dtype)
        d_magnitude = d_magnitude * adapter.multiplier
        d_nu = -d_magnitude * magnitude.detach().reshape(-1).to(norms.dtype) / norms
        d_magnitude = d_magnitude.reshape(magnitude.shape).to(magnitude.dtype)
        weight = self._linears[i].weight
        through = through_norms(weight, adapter, d_nu, norms, masks.rows, self._dtype)
        return *(own + more for own, more in zip(grads, through, strict=True)), d_magnitude


def decomposing(adapters: Sequence[Adapter]) -> Decomposing | None:
    """The adapter of a linear that decomposes its weight, if there is one.

    Raises ValueError where it has others beside it: they would share one norm.
    """
    found = [a for a in adapters if isinstance(a, (Lora, Lokr)) and a.magnitude is not None]
    if not found:
        return None
    if len(adapters) > 1:
        raise ValueError("a linear with weight decomposition has one adapter, and no others")
    return found[0]


@torch.no_grad()
def row_norms(
    weight: Tensor | FrozenWeight, adapter: Decomposing, rows: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """ν [N], in fp32 or in fp64 if `dtype` is that.

    rows [N]: what a LoKr's dropout leaves of each row of ΔW, or None for all. dtype: in which a
    weight that is not a tensor is read.
    """
    w = weight.detach() if isinstance(weight, Tensor) else weight.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    base = torch.linalg.vector_norm(w, dim=1, dtype=wide).square_()
    if isinstance(adapter, Lora):
        a, b = adapter.a.to(wide), adapter.b.to(wide) * adapter.scale
        cross = ((w @ adapter.a.to(w.dtype).T).to(wide) * b).sum(1)
        own = ((b @ (a @ a.T)) * b).sum(1)
    else:
        w1, w2 = (t.to(wide) for t in adapter.whole())
        w1 = w1 * adapter.scale
        cross = (_by_small_factor(w, w1, w2) * w1[:, None]).sum(2).flatten()
        own = torch.outer(w1.square().sum(1), w2.square().sum(1)).flatten()
    if rows is not None:
        cross, own = cross * rows, own * rows
    return (base + 2 * cross + own).clamp_min_(_TINY).sqrt_()


def _by_small_factor(w: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Σ over I2 of W [O1, O2, I1, I2] · w2 [O2, I2], as [O1, O2, I1]."""
    (o1, i1), (o2, i2) = w1.shape, w2.shape
    narrow = torch.einsum("jcik,ck->jci", w.view(o1, o2, i1, i2), w2.to(w.dtype))
    return narrow.to(w1.dtype)


def row_scale(adapter: Decomposing, norms: Tensor, kept: Tensor | None) -> Tensor:
    """g [N] in the norms' dtype. kept: 0 where dropout leaves the linear as it was, else 1."""
    assert adapter.magnitude is not None
    g = adapter.magnitude.detach().reshape(-1).to(norms.dtype) / norms
    multiplier = adapter.multiplier if isinstance(adapter, Lokr) else 1.0
    if multiplier != 1.0:
        g = multiplier * (g - 1) + 1
    return g if kept is None else 1 + kept * (g - 1)


@torch.no_grad()
def solve_by_kernel(
    weight: Tensor | FrozenWeight, lora: Lora, norms: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """ν [N], which may be given; g [N]; and g B [N, r] in `dtype`; by Triton's kernel."""
    from fluxfast_kernels.row_scales import row_scales

    assert lora.magnitude is not None
    a, b = dense_rows(lora.a.detach()), dense_rows(lora.b.detach())
    w = w_scale = None
    if norms is None:
        norms = torch.empty(len(b), dtype=torch.float32, device=b.device)
        if isinstance(weight, Tensor):
            w = dense_rows(weight.detach())
        elif weight.stores("int8"):
            w, w_scale = weight.codes("int8")
        else:
            w = weight.to(dtype)
    magnitude = lora.magnitude.detach()
    g, gb = row_scales(w, a, b, magnitude, norms, scale=lora.scale, w_scale=w_scale, dtype=dtype)
    return norms, g, gb


def column_dots(x: Tensor, y: Tensor, dtype: torch.dtype, impl: str) -> Tensor:
    """Σ over the rows of x y [M, N], as [N] in `dtype`."""
    if impl != "triton" or is_traced(x):
        return (x.to(dtype) * y).sum(0)
    from fluxfast_kernels.row_scales import column_dots

    return column_dots(dense_rows(x), dense_rows(y))


@torch.no_grad()
def through_norms(
    weight: Tensor | FrozenWeight,
    adapter: Lokr,
    d_nu: Tensor,
    norms: Tensor,
    rows: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """What flows to `adapter.whole()` through ν, whose gradient is d_nu [N].

    ∂ν/∂ΔW is (W + ΔW) / ν, row by row. Other arguments as in `row_norms`.
    """
    w = weight.detach() if isinstance(weight, Tensor) else weight.to(dtype)
    w1, w2 = (t.to(norms.dtype) for t in adapter.whole())
    (o1, i1), (o2, i2) = w1.shape, w2.shape
    c = d_nu / norms * adapter.scale
    if rows is not None:
        c = c * rows
    c = c.reshape(o1, o2)
    narrow = _by_small_factor(w, w1, w2)
    dw1 = (narrow * c[..., None]).sum(1)
    dw2 = torch.einsum(
        "jcik,jci->ck", w.view(o1, o2, i1, i2), (c[..., None] * w1[:, None]).to(w.dtype)
    ).to(norms.dtype)
    # and those of ΔW itself
    dw1 = dw1 + adapter.scale * w1 * (c @ w2.square().sum(1))[:, None]
    dw2 = dw2 + adapter.scale * w2 * (c.T @ w1.square().sum(1))[:, None]
    return dw1, dw2
