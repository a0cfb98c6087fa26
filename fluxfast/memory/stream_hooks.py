"""What streaming puts around a block: a forward and a backward that it notices, and a guard.

A block of fluxfast says itself when its forward and backward begin and end (`model.residency`). Of
any other block only the forward can be wrapped; its backward has to be guessed from gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


class BackwardWatch:
    """Says when a block's backward begins and ends, from the gradients that arrive.

    At most one block is in backward: the last one that a gradient has reached. `enter` and `leave`
    are called with its index.
    """

    def __init__(self, enter: Callable[[int], None], leave: Callable[[int], None]) -> None:
        self._enter, self._leave = enter, leave
        # the block whose backward has begun and, as far as is known, not ended
        self._open: int | None = None
        # autograd's number of the backward pass that has our callback
        self._pass = -1

    def reached(self, index: int, _: Any = None) -> None:
        """A gradient arrives at a block: its backward begins, and that of the open block ends."""
        if self._open == index:
            return
        self.close()
        self._enter(index)
        self._open = index
        if (number := torch._C._current_graph_task_id()) not in (-1, self._pass):
            self._pass = number
            # once for each pass: its end closes the last block
            torch.autograd.Variable._execution_engine.queue_callback(self.close)

    def close(self) -> None:
        """End the backward that is open, if there is one."""
        if self._open is not None:
            index, self._open = self._open, None
            self._leave(index)

    def forget(self) -> None:
        """Nothing is open any more, and nothing has to be left."""
        self._open = None


def watched_forward(
    original: Callable[..., Any],
    computing: Callable[[], AbstractContextManager[None]],
    backward_reached: Callable[[Tensor], None],
) -> Callable[..., Any]:
    """A block's forward that runs within `computing` and calls `backward_reached` in backward."""

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with computing():
            out = original(*args, **kwargs)
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(backward_reached)
        return out

    return forward


def guarded_apply(
    original: Callable[..., Any],
    index: int,
    dtypes: Collection[torch.dtype],
    host_storages: Collection[int],
) -> Callable[..., Any]:
    """A block's `Module._apply` that leaves tensors in `host_storages` where they are.

    `.to()` and its like are made of `_apply`. Raises ValueError where they would cast the streamed
    tensors, whose dtypes are `dtypes`.
    """

    @functools.wraps(original)
    def apply(fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for dtype in dtypes:
            # `.to(dtype)` never casts integers, and 8-bit floats are codes
            may_be_cast = dtype.is_floating_point and dtype.itemsize > 1
            if may_be_cast and fn(torch.empty(0, dtype=dtype)).dtype != dtype:
                raise ValueError(
                    f"block {index} is streamed in {dtype} and can't be cast: cast the model, "
                    "then stream it"
                )

        def unless_streamed(tensor: Tensor) -> Tensor:
            return tensor if tensor.untyped_storage()._cdata in host_storages else fn(tensor)

        return original(unless_streamed, recurse)

    return apply
