"""What an adapter adds to a frozen linear's product y = x Wᵀ + b, and what it gives back.

A `LinearGroup` runs every kind of adapter, on every engine and in every compute mode. It fuses the
kinds that it knows: all LoRAs of a group are one low-rank product in the epilogue of the wide one,
and a LoKr (`lokr.Lokr`) is one kernel for both of its small products. Every other kind implements
`Adapter` in plain torch and runs beside the wide product. A new kind is a class with the members of
`Adapter`.

A LoRA or a LoKr with a magnitude is weight-decomposed (DoRA): it also rescales the rows of the
whole product, base and adapter together (`decomposed`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Adapter(Protocol):
    """An adapter of one linear, with what trains in it.

    Its tensors may have another floating dtype than x and y, which share theirs: the adapter casts
    them, and the group casts gradients back.
    """

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What trains, in a fixed order."""

    @property
    def dropout(self) -> float:
        """The probability with which an element of x is dropped before the adapter sees it."""

    def with_tensors(self, tensors: Sequence[Tensor], /) -> Adapter:
        """The same adapter over other tensors, such as those that an autograd.Function saved."""

    def add_to(self, y: Tensor, x: Tensor, /) -> None:
        """Adds its output to y [M, N] in place; x [M, K] is dropped already.

        In operations that autograd can differentiate: `lora_linear_ref` relies on it.
        """

    def backward(self, dy: Tensor, x: Tensor, dx: Tensor | None, /) -> tuple[Tensor, ...]:
        """The gradients of `tensors`; its part of x's gradient is added to dx [M, K] in place.

        dy [M, N]; x [M, K] as `add_to` saw it; dx is None where nobody wants x's gradient.
        """


class Lora(NamedTuple):
    """y += scale · (x Aᵀ) Bᵀ with a [r, K], b [N, r] and scale = alpha / r.

    With magnitude [N], weight-decomposed: y = (magnitude / ‖W'‖) · x W'ᵀ with W' = W + scale · B A
    and its norms by rows, through which no gradient flows. grads: where a `LinearGroup` writes dA
    and dB, in the shapes and dtypes of a and b; None: in new memory. Sources: LoRA, arXiv
    2106.09685, section 4.1; DoRA, arXiv 2402.09353, sections 4.1 and 4.3.
    """

    a: Tensor
    b: Tensor
    scale: float
    dropout: float = 0.0
    grads: tuple[Tensor, Tensor] | None = None
    magnitude: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)

    def with_tensors(self, tensors: Sequence[Tensor], /) -> Lora:
        a, b, *magnitude = tensors
        # in a third of the time that `_replace` takes
        return Lora(a, b, self.scale, self.dropout, self.grads, *magnitude)

    def add_to(self, y: Tensor, x: Tensor, /) -> None:
        y += (x @ self.a.to(x.dtype).T) @ self.b.to(x.dtype).T * self.scale

    def backward(self, dy: Tensor, x: Tensor, dx: Tensor | None, /) -> tuple[Tensor, ...]:
        a, b = self.a.to(x.dtype), self.b.to(x.dtype)
        ds = dy @ b * self.scale
        if dx is not None:
            dx.addmm_(ds, a)
        return ds.T @ x, dy.T @ (x @ a.T) * self.scale

    def decomposed_ref(self, weight: Tensor) -> Tensor:
        """The weight [N, K] that a weight-decomposed linear multiplies by, formed whole."""
        assert self.magnitude is not None
        whole = weight + self.scale * self.b.to(weight.dtype) @ self.a.to(weight.dtype)
        norms = torch.linalg.vector_norm(whole, dim=1).detach()
        return whole * (self.magnitude.to(weight.dtype) / norms)[:, None]


def tensors_of(adapters: Sequence[Adapter]) -> list[Tensor]:
    """The tensors of several adapters, one after the other: what an autograd.Function is given."""
    return [t for adapter in adapters for t in adapter.tensors]


def is_random(adapter: Adapter) -> bool:
    """Whether an adapter draws masks: dropout of x, or one of the dropouts that LoKr has."""
    if type(adapter) is Lora:
        return adapter.dropout > 0
    others = (getattr(adapter, f"{what}_dropout", 0.0) for what in ("out", "rank", "module"))
    return adapter.dropout > 0 or any(p > 0 for p in others)


def writing_to(adapters: Sequence[Adapter], places: Iterator[Tensor]) -> tuple[Adapter, ...]:
    """The same LoRAs, whose gradients are to be written to the next of `places`."""
    made = []
    for adapter in adapters:
        assert isinstance(adapter, Lora)
        made.append(adapter._replace(grads=(next(places), next(places))))
    return tuple(made)


def over_tensors(adapters: Sequence[Adapter], tensors: Iterator[Tensor]) -> tuple[Adapter, ...]:
    """The same adapters over the next tensors of an iterator, which has them as `tensors_of`."""
    return tuple(
        [adapter.with_tensors([next(tensors) for _ in adapter.tensors]) for adapter in adapters]
    )
