"""DoRA by columns: the columns of W + ΔW, not its rows, get the lengths that a magnitude says.

    y = x diag(g) (W + s B A)ᵀ + b,    g = magnitude / ν,    ν = ‖W + s B A‖ by columns

OneTrainer's DoRA is this one where it isn't told otherwise. g scales the input, of which every
linear of a group would have its own, so that this adapter runs beside the wide product:

    y += (x (g - 1)) Wᵀ + s ((x g) Aᵀ) Bᵀ

ν is had without ΔW being formed, from the thin product Bᵀ W, and no gradient flows through it.
Source: DoRA, arXiv 2402.09353, sections 4.1 and 4.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluxfast.ops.linear.weights import FrozenWeight

# a norm that is smaller is taken to be this
_TINY = 1e-30


class ColumnDora(NamedTuple):
    """a [r, K], b [N, r], magnitude [K]; weight: the frozen W [N, K], which somebody must set."""

    a: Tensor
    b: Tensor
    magnitude: Tensor
    scale: float
    weight: Tensor | FrozenWeight | None = None

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

    def _w(self, dtype: torch.dtype) -> Tensor:
        assert self.weight is not None
        w = self.weight.detach() if isinstance(self.weight, Tensor) else self.weight
        return w.to(dtype)

    @torch.no_grad()
    def _norms(self, w: Tensor) -> Tensor:
        """ν [K], at least in fp32."""
        wide = torch.promote_types(w.dtype, torch.float32)
        a, b = self.a.to(wide), self.b.to(wide) * self.scale
        cross = (a * (self.b.to(w.dtype).T @ w).to(wide)).sum(0) * self.scale
        own = (a * ((b.T @ b) @ a)).sum(0)
        base = torch.linalg.vector_norm(w, dim=0, dtype=wide).square_()
        return (base + 2 * cross + own).clamp_min_(_TINY).sqrt_()

    def add_to(self, y: Tensor, x: Tensor, /) -> None:
        w = self._w(x.dtype)
        g = self.magnitude.reshape(-1) / self._norms(w)
        scaled = x * g.to(x.dtype)
        y += (scaled - x) @ w.T
        y += (scaled @ self.a.to(x.dtype).T) @ self.b.to(x.dtype).T * self.scale

    def backward(self, dy: Tensor, x: Tensor, dx: Tensor | None, /) -> tuple[Tensor, ...]:
        w, a, b = self._w(x.dtype), self.a.to(x.dtype), self.b.to(x.dtype)
        norms = self._norms(w)
        g = (self.magnitude.reshape(-1) / norms).to(x.dtype)
        du = dy @ b * self.scale
        # of x diag(g), through W and through A
        through_w, through_a = dy @ w, du @ a
        if dx is not None:
            dx += through_w * (g - 1) + through_a * g
        dg = (x * (through_w + through_a)).to(norms.dtype).sum(0)
        scaled = x * g
        db = dy.T @ (scaled @ a.T) * self.scale
        return du.T @ scaled, db, (dg / norms).reshape(self.magnitude.shape)


def over_weight(adapters: Sequence[Any], weight: Tensor | FrozenWeight) -> tuple[Any, ...]:
    """The same adapters, where one that reads the frozen weight reads this one."""
    return tuple(a._replace(weight=weight) if isinstance(a, ColumnDora) else a for a in adapters)
