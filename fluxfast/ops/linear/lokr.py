"""LoKr: an adapter whose change of the weight is a Kronecker product, which nobody ever forms.

    y += scale · (w1 ⊗ w2) x        w1 [o1, i1], w2 [o2, i2], y [M, o1 · o2], x [M, i1 · i2]

With x as [M, i1, i2], that is two small products: over i2 with w2, and over i1 with w1. Either
factor may itself be the product of two narrow ones. Source: LyCORIS (arXiv 2309.14859), and
`lycoris-lora`'s LokrModule, whose names of the tensors these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Lokr(NamedTuple):
    """y += scale · scalar · (w1 ⊗ w2) x.

    w1: (w1 [o1, i1],), or its factors (w1_a [o1, r], w1_b [r, i1]); w2 likewise [o2, i2]. scalar:
    a trained number, or None for 1. magnitude: of weight decomposition, [o1 · o2, 1] as
    `dora_scale` has it, or None for none: then y is (multiplier · (magnitude / ‖W'‖ - 1) + 1) W' x
    with W' = W + scale · scalar · (w1 ⊗ w2), norms by rows. dropout: of the elements of what the
    adapter adds; rank_dropout: of its columns, without growth of the others; module_dropout: of all
    that it adds.
    """

    w1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]
    scale: float
    scalar: Tensor | None = None
    magnitude: Tensor | None = None
    multiplier: float = 1.0
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of w1, of w2, and then scalar and magnitude where they are there."""
        others = [t for t in (self.scalar, self.magnitude) if t is not None]
        return *self.w1, *self.w2, *others

    def with_tensors(self, tensors: Sequence[Tensor], /) -> Lokr:
        left = iter(tensors)
        return self._replace(
            w1=tuple(next(left) for _ in self.w1),
            w2=tuple(next(left) for _ in self.w2),
            scalar=None if self.scalar is None else next(left),
            magnitude=None if self.magnitude is None else next(left),
        )

    def add_to(self, y: Tensor, x: Tensor, /) -> None:
        y += self._product(x, *self._whole(x.dtype))

    def backward(self, dy: Tensor, x: Tensor, dx: Tensor | None, /) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            own = [t.detach().requires_grad_() for t in self.tensors]
            seen = x.detach().requires_grad_(dx is not None)
            y = self.with_tensors(own)._product(seen, *self.with_tensors(own)._whole(x.dtype))
            grads = torch.autograd.grad(y, [*own, *([seen] if dx is not None else [])], dy)
        if dx is not None:
            dx += grads[-1]
        return grads[: len(own)]

    def _whole(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """w1, with the scale in it, and w2."""
        w1, w2 = (ws[0] if len(ws) == 1 else ws[0] @ ws[1] for ws in (self.w1, self.w2))
        w1 = w1 * self.scale
        if self.scalar is not None:
            w1 = w1 * self.scalar
        return w1.to(dtype), w2.to(dtype)

    def _product(self, x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        narrow = x.unflatten(-1, (w1.shape[1], w2.shape[1])) @ w2.T
        return (w1 @ narrow).flatten(-2)
