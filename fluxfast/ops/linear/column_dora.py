"""DoRA by columns: the columns of W + ΔW, not its rows, get the lengths that a magnitude says.

    y = x diag(g) (W + s B A)ᵀ + b,    g = magnitude / ν,    ν = ‖W + s B A‖ by columns

OneTrainer's DoRA is this one where it isn't told otherwise. g scales the input, of which every
linear of a group would have its own. So the wide product reads `ColumnScaled`, which is W diag(g),
and the adapter beside it adds s ((x g) Aᵀ) Bᵀ.

ν is had without ΔW being formed, from the thin product Bᵀ W, and no gradient flows through it.
Source: DoRA, arXiv 2402.09353, sections 4.1 and 4.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fluxfast.ops.linear.params import LinearParams
from fluxfast.ops.linear.weights import FrozenWeight

# a norm that is smaller is taken to be this
_TINY = 1e-30


class ColumnDora(NamedTuple):
    """a [r, K], b [N, r], magnitude [K] or [1, K]; weight: the frozen W [N, K].

    known: ν in each dtype that it was computed in, which both directions need more than once.
    `on_columns` sets both, and gives the linear that belongs to them. others: W and B of further
    rows, those of other linears, which count for ν as if they were below.
    """

    a: Tensor
    b: Tensor
    magnitude: Tensor
    scale: float
    weight: Tensor | FrozenWeight | None = None
    known: dict[torch.dtype, Tensor] | None = None
    others: tuple[tuple[Tensor | FrozenWeight, Tensor], ...] = ()

    @property
    def dropout(self) -> float:
        """It sees all of x."""
        return 0.0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """a, b, magnitude."""
        return self.a, self.b, self.magnitude

    def with_tensors(self, tensors: Sequence[Tensor], /) -> ColumnDora:
        a, b, magnitude = tensors
        return self._replace(a=a, b=b, magnitude=magnitude)

    def frozen(self, dtype: torch.dtype) -> Tensor:
        """W in a dtype."""
        assert self.weight is not None
        return _as_floats(self.weight, dtype)

    @torch.no_grad()
    def norms(self, w: Tensor) -> Tensor:
        """ν [K] of a W in some dtype, at least in fp32."""
        if self.known is not None and w.dtype in self.known:
            return self.known[w.dtype]
        squares = self._squares(w, self.b)
        for weight, b in self.others:
            squares += self._squares(_as_floats(weight, w.dtype), b)
        norms = squares.clamp_min_(_TINY).sqrt_()
        if self.known is not None:
            self.known[w.dtype] = norms
        return norms

    def _squares(self, w: Tensor, b: Tensor) -> Tensor:
        """‖w + s b A‖² by columns [K] of some rows, at least in fp32."""
        wide = torch.promote_types(w.dtype, torch.float32)
        a, scaled = self.a.to(wide), b.to(wide) * self.scale
        cross = (a * (b.to(w.dtype).T @ w).to(wide)).sum(0) * self.scale
        own = (a * ((scaled.T @ scaled) @ a)).sum(0)
        base = torch.linalg.vector_norm(w, dim=0, dtype=wide).square_()
        return base + 2 * cross + own

    def add_to(self, y: Tensor, x: Tensor, /) -> None:
        w = self.frozen(x.dtype)
        g = (self.magnitude.reshape(-1) / self.norms(w)).to(x.dtype)
        y += ((x * g) @ self.a.to(x.dtype).T) @ self.b.to(x.dtype).T * self.scale
        if g.requires_grad:
            # nothing, but what autograd needs to find the magnitude's part of the wide product
            y += (x.detach() * (g - g.detach())) @ w.T

    def backward(self, dy: Tensor, x: Tensor, dx: Tensor | None, /) -> tuple[Tensor, ...]:
        w, a, b = self.frozen(x.dtype), self.a.to(x.dtype), self.b.to(x.dtype)
        norms = self.norms(w)
        g = (self.magnitude.reshape(-1) / norms).to(x.dtype)
        du = dy @ b * self.scale
        # of x diag(g), through A and then through W as well
        through = du @ a
        if dx is not None:
            dx += through * g
        dg = (x * through.addmm_(dy, w)).to(norms.dtype).sum(0)
        scaled = x * g
        db = dy.T @ (scaled @ a.T) * self.scale
        return du.T @ scaled, db, (dg / norms).reshape(self.magnitude.shape)


class ColumnScaled(FrozenWeight):
    """W diag(g) of an adapter on W."""

    def __init__(self, adapter: ColumnDora) -> None:
        assert adapter.weight is not None
        super().__init__(adapter.weight.shape, adapter.weight.device)
        self._adapter, self.base = adapter, adapter.weight

    @torch.no_grad()
    def to(self, dtype: torch.dtype, /) -> Tensor:
        w = self._adapter.frozen(dtype)
        return w * (self._adapter.magnitude.reshape(-1) / self._adapter.norms(w)).to(dtype)


def _as_floats(weight: Tensor | FrozenWeight, dtype: torch.dtype) -> Tensor:
    return (weight.detach() if isinstance(weight, Tensor) else weight).to(dtype)


def on_columns(linear: LinearParams) -> LinearParams:
    """The same linear over its frozen weight, if its adapter is one that rescales columns."""
    for adapter in linear.adapters:
        if isinstance(adapter, ColumnDora):
            weight = linear.weight
            frozen = weight.base if isinstance(weight, ColumnScaled) else weight
            known = adapter.known if adapter.weight is frozen else {}
            own = adapter._replace(weight=frozen, known=known)
            return linear._replace(weight=ColumnScaled(own), adapters=(own,))
    return linear
