"""A block's frozen tensors as one run of bytes, which is copied as one.

Linears that share an input lie side by side, part by part (the weights of q, k and v, then their
biases), so that one product can still read them as one matrix. Each such run starts at a multiple
of `ALIGNMENT`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fluxfast.checkpoint.side_by_side import GROUPS

# bytes; what kernels' widest loads and the DMA engine need for full speed
ALIGNMENT = 256
# (group, position in it) of each linear that sees the same input as others
_GROUPED = {
    name: (group, rank) for group, members in enumerate(GROUPS) for rank, name in enumerate(members)
}


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class FrozenTensor(NamedTuple):
    """A frozen tensor of a block: where its module holds it, and where its bytes are.

    `store` is the module's own dict of parameters or buffers, `name` the tensor's key in it, `path`
    its full name in the block, `offset` the place of its first byte in the block's bytes.
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


class BlockBytes:
    """The frozen tensors of one block (parameters without gradient, and buffers), as bytes."""

    def __init__(self, block: nn.Module, leave: Collection[str] = ()) -> None:
        """`leave`: names of modules inside the block whose tensors stay where they are."""
        self.tensors: list[FrozenTensor] = []
        end = 0
        for run in _runs(block, leave):
            end = aligned(end)
            for store, name, path, _ in run:
                tensor = store[name]
                self.tensors.append(
                    FrozenTensor(store, name, path, end, tensor.shape, tensor.dtype)
                )
                end += tensor.nbytes
        self.nbytes = aligned(end)

    def views(self, buffer: Tensor, base: int = 0) -> list[Tensor]:
        """The tensors, in order, in a buffer of bytes in which the block begins at `base`."""
        return [frozen.view(buffer, base) for frozen in self.tensors]

    def point_at(self, views: list[Tensor]) -> None:
        """Give the modules' tensors these values; they stay the same objects."""
        for frozen, view in zip(self.tensors, views, strict=True):
            # replacing the object would leave others, such as autograd, with the old values
            frozen.store[frozen.name].data = view


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
    """Tensors that lie without a gap between them, in the order of the first of each run."""
    runs: dict[Any, list[_Found]] = {}
    for found in _frozen(block, leave):
        group, _ = _GROUPED.get(found.linear, (found.path, 0))
        runs.setdefault((group, found.name, found.kind), []).append(found)
    for run in runs.values():
        yield sorted(run, key=lambda found: _GROUPED.get(found.linear, (0, 0))[1])
