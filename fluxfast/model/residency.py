"""Where a block's frozen weights are while it computes: what a block asks of whoever moves them.

A block may have an attribute `residency`; without one, or with None, its weights are where they
always were. A block's forward and its backward each run inside `resident`; there the frozen tensors
of its modules lie on the compute device, outside they may lie anywhere, so nothing that forward saw
of them may be kept for backward: read the modules again.

    with resident(block, "forward"):
        out = ...
    ctx.x = keep_input(block, x)

    x = fetch_input(block, ctx.x)
    with resident(block, "backward"):
        dx = ...

`keep_input` may move a block's input to host memory until `fetch_input` asks for it: same values,
any number of times, the last block's first. What is kept is freed when nobody holds the handle any
more.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol

from torch import Tensor, nn

Direction = Literal["forward", "backward"]


class Residency(Protocol):
    """One block's side of the agreement; `fluxfast.memory` makes them."""

    def use(self, direction: Direction) -> AbstractContextManager[Any]:
        """The frozen tensors are on the compute device inside this context. May be entered again
        inside itself.
        """

    def keep(self, x: Tensor) -> Any:
        """Put a tensor aside until backward; returns a handle."""

    def fetch(self, kept: Any) -> Tensor:
        """The tensor of a handle, on the device that it came from."""


def residency_of(block: nn.Module) -> Residency | None:
    return getattr(block, "residency", None)


def resident(block: nn.Module, direction: Direction) -> AbstractContextManager[Any]:
    """The context in which a block's weights can be read; `direction` is that of the pass, which is
    fetched ahead.
    """
    residency = residency_of(block)
    return nullcontext() if residency is None else residency.use(direction)


def keep_input(block: nn.Module, x: Tensor) -> Any:
    """Put a block's input aside until its backward: x itself, unless the block's residency has a
    place for it.
    """
    residency = residency_of(block)
    return x if residency is None else residency.keep(x)


def fetch_input(block: nn.Module, kept: Any) -> Tensor:
    """The tensor that `keep_input` put aside."""
    residency = residency_of(block)
    return kept if residency is None else residency.fetch(kept)
