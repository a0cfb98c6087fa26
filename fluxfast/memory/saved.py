"""What autograd saves of a weight that moves: a reference instead of the tensor.

The reference says where the weight lies within its block's bytes. In backward it is looked up in
the slot that the block is in by then.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Reference(NamedTuple):
    """A tensor that lies in a slot: its block, and where it is within the block's bytes."""

    block: int
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class _PassedOn(NamedTuple):
    """What the hooks that were set before ours made of a tensor."""

    packed: Any
    unpack: Callable[[Any], Tensor]


class SavedReferences:
    """Saves references to tensors in slots, and any other tensor as if we were not there."""

    def __init__(self, slots: Collection[Tensor], find: Callable[[int], Tensor]) -> None:
        """`find` gives a block's bytes in the slot where backward needs them."""
        self._storages = {slot.untyped_storage()._cdata for slot in slots}
        self._find = find

    def saving(self, block: int, base: int) -> AbstractContextManager[Any]:
        """A context for the forward of a block whose bytes begin at `base` of its slot."""
        if not torch.is_grad_enabled():
            return nullcontext()
        # autograd calls the innermost hooks only, so we pass other tensors on to the hooks set
        # before ours, such as a checkpoint's
        outer = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return saved_tensors_hooks(partial(self._pack, block, base, outer), self._unpack)

    def _pack(self, block: int, base: int, outer: Any, tensor: Tensor) -> Any:
        if tensor.untyped_storage()._cdata in self._storages:
            offset = int(tensor.storage_offset()) * tensor.dtype.itemsize - base
            return _Reference(block, offset, tensor.shape, tensor.stride(), tensor.dtype)
        return tensor if outer is None else _PassedOn(outer[0](tensor), outer[1])

    def _unpack(self, saved: Any) -> Tensor:
        if isinstance(saved, _PassedOn):
            return saved.unpack(saved.packed)
        if not isinstance(saved, _Reference):
            return saved
        found = self._find(saved.block)
        start = (int(found.storage_offset()) + saved.offset) // saved.dtype.itemsize
        empty = torch.empty(0, dtype=saved.dtype, device=found.device)
        return empty.set_(found.untyped_storage(), start, saved.shape, saved.stride)
