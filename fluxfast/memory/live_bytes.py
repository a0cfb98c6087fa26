"""How many bytes are alive while ops run on meta tensors: what a GPU's allocator would count.

Every storage that an op makes is watched until it is freed, whoever holds it: Python, autograd's
graph, a view. Sizes are rounded as CUDA's caching allocator rounds them. The peak is that of
`torch.cuda.max_memory_allocated`: neither the allocator's own fragmentation nor the CUDA context is
in it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# kMinBlockSize in c10/cuda/CUDACachingAllocator
UNIT = 512


def rounded(nbytes: int) -> int:
    """What the allocator hands out for a request of `nbytes`."""
    return -(-nbytes // UNIT) * UNIT


def workspace(name: str, args: tuple[Any, ...]) -> int:
    """Bytes that a GPU's kernel of an op takes and frees within the call."""
    if name in (
        "_scaled_dot_product_flash_attention_backward",
        "_scaled_dot_product_cudnn_attention_backward",
    ):
        # mha_bwd in flash_api.cpp sums dq up in fp32, beside the softmax's row sums
        query = args[1]
        batch, heads, tokens, head_dim = query.shape
        tokens = -(-tokens // 128) * 128
        return rounded(batch * heads * tokens * head_dim * 4) + rounded(batch * heads * tokens * 4)
    return 0


class LiveBytes(TorchDispatchMode):
    """Watches storages of meta tensors; `live` and `peak` in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._held: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._ignored: set[int] = set()

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leaves these tensors out, and all views of them: they must outlive the count."""
        self._ignored |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that were made before."""
        for tensor in tensors:
            self._watch(tensor)
        self._mark()

    def restart(self) -> int:
        """Begins a new peak, with what is alive now; returns that."""
        self.peak = self.live
        return self.live

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._watch(leaf)
        name = func._schema.name.split("::")[-1]
        self._mark(workspace(name, args))
        return out

    def _watch(self, tensor: Tensor) -> None:
        if not tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held or key in self._ignored:
            return
        size = rounded(storage.nbytes())

        def freed(_: Any) -> None:
            del self._held[key]
            self.live -= size

        self._held[key] = (weakref.ref(storage, freed), size)
        self.live += size

    def _mark(self, extra: int = 0) -> None:
        self.peak = max(self.peak, self.live + extra)
