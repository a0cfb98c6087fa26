"""A part of what an adapter adds, where no smaller adapter of its kind would add just that.

    y += (what the adapter adds)[:, first : first + N]        y [M, N]

A LoKr's rows are such: those of a linear may begin and end within a row of its first factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fluxfast.ops.linear.adapters import Adapter


class RowPart(NamedTuple):
    """adapter: one without dropout, for `height` rows, of which N from `first` on are wanted."""

    adapter: Adapter
    first: int
    height: int

    @property
    def dropout(self) -> float:
        """It sees all of x."""
        return 0.0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of the adapter."""
        return self.adapter.tensors

    def with_tensors(self, tensors: Sequence[Tensor], /) -> RowPart:
        return self._replace(adapter=self.adapter.with_tensors(tensors))

    def add_to(self, y: Tensor, x: Tensor, /) -> None:
        whole = y.new_zeros(len(y), self.height)
        self.adapter.add_to(whole, x)
        y += whole[:, self.first : self.first + y.shape[1]]

    def backward(self, dy: Tensor, x: Tensor, dx: Tensor | None, /) -> tuple[Tensor, ...]:
        after = self.height - self.first - dy.shape[1]
        whole = torch.nn.functional.pad(dy, (self.first, after))
        return self.adapter.backward(whole, x, dx)
