"""LoKr: an adapter whose change of the weight is a Kronecker product, which nobody ever forms.

    y += scale · (w1 ⊗ w2) x        w1 [O1, I1], w2 [O2, I2], y [M, O1 · O2], x [M, I1 · I2]

With x as [M, I1, I2], that is two small products: over I2 with w2, and over I1 with w1 (`kron`).
Either factor may itself be the product of two narrow ones. Source: LyCORIS (arXiv 2309.14859), and
`lycoris-lora`'s LokrModule, whose names of the tensors these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fluxfast.ops.linear import kron


class Lokr(NamedTuple):
    """y += scale · scalar · (w1 ⊗ w2) x.

    w1: (w1 [O1, I1],), or its factors (w1_a [O1, r], w1_b [r, I1]); w2 likewise [O2, I2]. scalar:
    a trained number, or None for 1. magnitude: of weight decomposition, [O1 · O2, 1] as
    `dora_scale` has it, or None for none: then y is (multiplier · (magnitude / ‖W'‖ - 1) + 1) W' x
    with W' = W + scale · scalar · (w1 ⊗ w2), norms by rows. out_dropout: the probability with which
    an element of what the adapter adds is dropped, and the others grow; rank_dropout: of a whole
    column of it, without growth of the others; module_dropout: of the whole adapter.
    """

    w1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]
    scale: float
    scalar: Tensor | None = None
    magnitude: Tensor | None = None
    multiplier: float = 1.0
    out_dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0

    @property
    def dropout(self) -> float:
        """It sees all of x."""
        return 0.0

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
        w1, w2 = self.whole()
        kron.add(x, None, w1, w2, self.scale, None, y, "ref")

    def backward(self, dy: Tensor, x: Tensor, dx: Tensor | None, /) -> tuple[Tensor, ...]:
        w1, w2 = self.whole()
        grads = kron.backward(dy, x, None, w1, w2, self.scale, None, dx, True, "ref")
        return self.of_tensors(grads)

    def whole(self) -> tuple[Tensor, Tensor]:
        """w1 [O1, I1] with the scalar in it, and w2 [O2, I2]."""
        w1, w2 = (ws[0] if len(ws) == 1 else ws[0] @ ws[1] for ws in (self.w1, self.w2))
        return (w1 if self.scalar is None else w1 * self.scalar), w2

    def of_tensors(self, grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The gradients of `tensors` in their dtypes.

        They are made of those of `whole`, behind which comes that of magnitude, if there is one.
        """
        dw1, dw2, *of_magnitude = grads
        of_scalar = []
        if self.scalar is not None:
            w1 = self.w1[0] if len(self.w1) == 1 else self.w1[0] @ self.w1[1]
            of_scalar = [(dw1 * w1).sum().reshape(self.scalar.shape)]
            dw1 = dw1 * self.scalar
        found = *_of_factors(self.w1, dw1), *_of_factors(self.w2, dw2), *of_scalar, *of_magnitude
        return tuple(grad.to(t.dtype) for grad, t in zip(found, self.tensors, strict=False))

    def decomposed_ref(self, weight: Tensor) -> Tensor:
        """The weight [N, K] that a weight-decomposed linear multiplies by, formed whole."""
        assert self.magnitude is not None
        w1, w2 = self.whole()
        whole = weight + self.scale * torch.kron(w1.to(weight.dtype), w2.to(weight.dtype))
        norms = torch.linalg.vector_norm(whole, dim=1, keepdim=True)
        return whole * (self.multiplier * (self.magnitude.to(weight.dtype) / norms - 1) + 1)


def _of_factors(factors: tuple[Tensor, ...], dw: Tensor) -> tuple[Tensor, ...]:
    """The gradients of one factor, or of the two narrow ones that it is the product of."""
    if len(factors) == 1:
        return (dw,)
    a, b = factors
    return dw @ b.T, a.T @ dw
