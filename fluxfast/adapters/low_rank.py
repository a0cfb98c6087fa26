"""Low-rank factors of a weight, in the forms that a LoRA starts with, and the errors they leave.

All factors here are (A [r, K], B [N, r]) with scale · B A in the place of the matrix [N, K].
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# an exact decomposition costs the cube of the narrower side: up to here it takes about a second
EXACT_UP_TO = 768
# of the randomised one: the vectors that it looks for beside the wanted ones, and its steps. With
# these it removes 99 % of what the best factors remove from the error of a [1536, 3072] in int4
OVERSAMPLED, STEPS = 32, 10


class Factors(NamedTuple):
    """A [r, K] and B [N, r]."""

    a: Tensor
    b: Tensor

    def product(self, scale: float, like: Tensor) -> Tensor:
        """scale · B A in fp64, where `like` is."""
        a, b = (factor.to(like.device, torch.float64) for factor in self)
        return b @ a * scale

    def to(self, dtype: torch.dtype) -> Factors:
        """The factors in another dtype, each dense."""
        return Factors(*(factor.contiguous().to(dtype) for factor in self))

    def on_cpu(self) -> Factors:
        """Copies on the CPU."""
        return Factors(*(factor.detach().to("cpu", copy=True) for factor in self))


def principal(matrix: Tensor, rank: int, scale: float, steps: int | None = None) -> Factors:
    """The best approximation of that rank, shared out evenly: A and B have the same norms.

    steps: of a randomised decomposition (arXiv 0909.4061, algorithm 4.4); None: an exact one.
    """
    if steps is None:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(matrix, rank, niter=steps)
        vh = v.mT
    root = (s[:rank] / scale).sqrt()
    return Factors(root[:, None] * vh[:rank], u[:, :rank] * root)


def of_error(error: Tensor, rank: int, scale: float) -> Factors:
    """`principal` of the error of a quantised weight.

    Errors are much like noise, whose singular values fall slowly. So the randomised decomposition
    of a large one looks for more vectors than are wanted.
    """
    narrow = min(error.shape)
    if narrow <= max(EXACT_UP_TO, 4 * (rank + OVERSAMPLED)):
        return principal(error, rank, scale)
    a, b = principal(error, rank + OVERSAMPLED, scale, STEPS)
    return Factors(a[:rank], b[:, :rank])


def orthogonal(matrix: Tensor, rank: int) -> Factors:
    """The first columns of the QR decomposition: B is orthonormal (OLoRA, arXiv 2406.01775)."""
    q, r = torch.linalg.qr(matrix)
    return Factors(r[:rank], q[:, :rank])


class Errors:
    """How far a quantised base is from the original weights, without and with what adapts it.

    Every error is a Frobenius norm over that of the original weights.
    """

    def __init__(self) -> None:
        # the squares of the norms of weight, error before and error after, by module
        self._squares: dict[str, tuple[float, float, float]] = {}

    def add(self, module: str, weight: Tensor, before: Tensor, after: Tensor) -> None:
        """Counts a module: its original weight, and what was and is missing to it."""
        norms = (torch.linalg.norm(each).item() for each in (weight, before, after))
        weights, first, last = (norm * norm for norm in norms)
        self._squares[module] = weights, first, last

    def relative(self, module: str | None = None) -> tuple[float, float]:
        """The errors before and after, of one module or of all together."""
        counted = list(self._squares.values()) if module is None else [self._squares[module]]
        weights, before, after = (math.fsum(squares) for squares in zip(*counted, strict=True))
        # weights of zero are stored without an error
        return math.sqrt(before / (weights or 1)), math.sqrt(after / (weights or 1))

    def __str__(self) -> str:
        before, after = self.relative()
        worst = max(self._squares, key=lambda module: self.relative(module)[1])
        worst_before, worst_after = self.relative(worst)
        return (
            f"the quantised base is {before:.3%} away from the original weights, and with the "
            f"adapter {after:.3%} ({len(self._squares)} linears; the worst, {worst}: "
            f"{worst_before:.3%} and {worst_after:.3%})"
        )
