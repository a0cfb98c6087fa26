"""LoHa: an adapter whose change of the weight is the product of two LoRAs, element by element.

    y += scale · ((b1 a1) * (b2 a2)) x        b [N, r], a [r, K], y [M, N], x [M, K]

Source: FedPara (arXiv 2108.06098), as LyCORIS has it (arXiv 2309.14859). The change is formed whole
[N, K] for the length of a product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

Pair = tuple[Tensor, Tensor]


class Loha(NamedTuple):
    """w1, w2: (b [N, r], a [r, K]) each."""

    w1: Pair
    w2: Pair
    scale: float

    @property
    def dropout(self) -> float:
        """It sees all of x."""
        return 0.0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """b1, a1, b2, a2."""
        return *self.w1, *self.w2

    def with_tensors(self, tensors: Sequence[Tensor], /) -> Loha:
        b1, a1, b2, a2 = tensors
        return Loha((b1, a1), (b2, a2), self.scale)

    def _whole(self, like: Tensor) -> Pair:
        """The two products [N, K], in the dtype of an activation."""
        (b1, a1), (b2, a2) = self.w1, self.w2
        return (b1 @ a1).to(like.dtype), (b2 @ a2).to(like.dtype)

    def add_to(self, y: Tensor, x: Tensor, /) -> None:
        first, second = self._whole(x)
        y += x @ (first * second).T * self.scale

    def backward(self, dy: Tensor, x: Tensor, dx: Tensor | None, /) -> tuple[Tensor, ...]:
        first, second = self._whole(x)
        if dx is not None:
            dx.addmm_(dy, first * second, alpha=self.scale)
        change = dy.T @ x * self.scale
        (b1, a1), (b2, a2) = self.w1, self.w2
        of_first, of_second = (change * second).to(b1.dtype), (change * first).to(b2.dtype)
        return of_first @ a1.T, b1.T @ of_first, of_second @ a2.T, b2.T @ of_second
