"""What a block asks of whoever moves its frozen weights.

A block's attribute `residency` is that mover, or None where its weights stay in place. A block's
forward and its backward each run inside `resident`. There the frozen tensors of its modules are on
the compute device. Outside they may be anywhere, so forward must not keep them for backward, which
reads the modules again.

    with resident(block, "forward"):
        out = ...
    ctx.x = keep_input(block, x)

    x = fetch_input(block, ctx.x)
    with resident(block, "backward"):
        dx = ...

`keep_input` may move a block's input to host memory until `fetch_input` brings it back, with the
same values. It may be fetched any number of times; the inputs of later blocks are fetched first. It
is freed when nobody holds the handle any more.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol

from torch import Tensor

Direction = Literal["forward", "backward"]


class Residency(Protocol):
    """The mover of one block's weights; `fluxfast.memory` makes them."""

    def use(self, direction: Direction) -> AbstractContextManager[Any]:
        """A context in which the frozen tensors are on the compute device; it may be nested."""

    def keep(self, x: Tensor) -> Any:
        """Put a tensor aside until backward; returns a handle."""

    def fetch(self, kept: Any) -> Tensor:
        """The tensor of a handle, on the device that it came from."""


def residency_of(block: Any) -> Residency | None:
    """A block's residency; None for a block whose weights stay in place."""
    return getattr(block, "residency", None)


def resident(block: Any, direction: Direction) -> AbstractContextManager[Any]:
    """The context in which a block's weights can be read.

    direction: that of the pass, which tells the residency whose weights to fetch next.
    """
    residency = residency_of(block)
    return nullcontext() if residency is None else residency.use(direction)


def keep_input(block: Any, x: Tensor) -> Any:
    """A handle of a block's input until its backward; x itself where nobody moves it."""
    residency = residency_of(block)
    return x if residency is None else residency.keep(x)


def fetch_input(block: Any, kept: Any) -> Tensor:
    """The tensor that `keep_input` put aside."""
    residency = residency_of(block)
    return kept if residency is None else residency.fetch(kept)
