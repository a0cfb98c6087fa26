"""Adapters of kinds that fluxfast doesn't know, for tests of the seam that new kinds come in by."""

from typing import NamedTuple

from torch import Tensor


class Shift(NamedTuple):
    """y += v: it ignores x and takes no part in its gradient."""

    v: Tensor
    dropout: float = 0.0

    @property
    def tensors(self):
        return (self.v,)

    def with_tensors(self, tensors):
        (v,) = tensors
        return self._replace(v=v)

    def add_to(self, y, x):
        y += self.v.to(y.dtype)

    def backward(self, dy, x, dx):
        return (dy.sum(0),)


class Diagonal(NamedTuple):
    """y += (x ⊙ d) Pᵀ with d [K] and p [N, K], both trained."""

    d: Tensor
    p: Tensor
    dropout: float = 0.0

    @property
    def tensors(self):
        return self.d, self.p

    def with_tensors(self, tensors):
        d, p = tensors
        return self._replace(d=d, p=p)

    def add_to(self, y, x):
        y += (x * self.d.to(x.dtype)) @ self.p.to(x.dtype).T

    def backward(self, dy, x, dx):
        d, dz = self.d.to(x.dtype), dy @ self.p.to(x.dtype)
        if dx is not None:
            dx += dz * d
        return (dz * x).sum(0), dy.T @ (x * d)
