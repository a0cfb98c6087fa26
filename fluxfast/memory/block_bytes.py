"""A block's frozen tensors as one run of bytes: what is copied when the block is, and how its
modules read from it.

Linears that share an input lie side by side, part by part (the weights of q, k and v, then their
biases), so that what reads them as one matrix still can; each such run starts at a multiple of
`ALIGNMENT`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fluxfast.checkpoint.side_by_side import GROUPS

# what a kernel's widest loads, and the DMA engine, like best
ALIGNMENT = 256
# the group of a linear that sees the same input as others, and its place in it
_GROUPED = {
    name: (group, rank) for group, members in enumerate(GROUPS) for rank, name in enumerate(members)
}


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Place(NamedTuple):
    """A tensor of a block: the module's own dict that holds it, under which name, and where its
    bytes are.
    """

    store: dict[str, Tensor]
    name: str
    path: str
    offset: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def tensor(self) -> Tensor:
        return self.store[self.name]

    def view(self, buffer: Tensor, base: int = 0) -> Tensor:
        """The tensor in a buffer of bytes in which the block begins at `base`."""
        start = base + self.offset
        return (
            buffer[start : start + self.shape.numel() * self.dtype.itemsize]
            .view(self.dtype)
            .view(self.shape)
        )


class BlockLayout:
    """The frozen tensors (parameters that need no gradient, and buffers) of one block, and their
    places.
    """

    def __init__(self, block: nn.Module, leave: Collection[str] = ()) -> None:
        """`leave`: names of modules inside the block whose tensors stay where they are."""
        self.places: list[Place] = []
        end = 0
        for run in _runs(block, leave):
            end = aligned(end)
            for store, name, path, _ in run:
                tensor = store[name]
                self.places.append(Place(store, name, path, end, tensor.shape, tensor.dtype))
                end += tensor.nbytes
        self.nbytes = aligned(end)

    def views(self, buffer: Tensor, base: int = 0) -> list[Tensor]:
        """One tensor a place, in order, in a buffer of bytes."""
        return [place.view(buffer, base) for place in self.places]

    def point_at(self, views: list[Tensor]) -> None:
        """The modules' tensors, the same objects, have these values from now on."""
        for place, view in zip(self.places, views, strict=True):
            # not by replacing the object: whoever holds it, autograd included, is to see the move
            place.store[place.name].data = view


class _Found(NamedTuple):
    """A frozen tensor; `linear` is its module's name without PEFT's wrapper."""

    store: dict
    name: str
    path: str
    linear: str

    @property
    def kind(self) -> tuple[torch.dtype, torch.Size]:
        tensor = self.store[self.name]
        return tensor.dtype, tensor.shape[1:]


def _frozen(block: nn.Module, leave: Collection[str]) -> Iterator[_Found]:
    for path, module in block.named_modules():
        if any(path == name or path.startswith(f"{name}.") for name in leave):
            continue
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None and not tensor.requires_grad:
                    yield _Found(
                        store,
                        name,
                        f"{path}.{name}" if path else name,
                        path.removesuffix(".base_layer"),
                    )


def _runs(block: nn.Module, leave: Collection[str]) -> Iterator[list[_Found]]:
    """Tensors that lie without a gap between them, in the order of the first of each."""
    runs: dict[Any, list[_Found]] = {}
    for found in _frozen(block, leave):
        group, _ = _GROUPED.get(found.linear, (found.path, 0))
        runs.setdefault((group, found.name, found.kind), []).append(found)
    for run in runs.values():
        yield sorted(run, key=lambda found: _GROUPED.get(found.linear, (0, 0))[1])
