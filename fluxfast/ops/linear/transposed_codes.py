"""Which codes of weights have a copy in the other order in memory, for dgrad.

Codes [N, K] are contiguous along K, which is what forward's product runs over. Dgrad's runs over N,
and the 8-bit tensor cores of some GPUs want that to be contiguous (`fluxfast_kernels.launch.
TRANSPOSE_FROM`). A copy [K, N] is there where it was written as weights were decoded, or where a
model was given it because the GPU has room (`fluxfast.quant.transposed`).

A copy belongs to the tensor of codes that it was made from: it is gone with that tensor, and counts
no more once that has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fluxfast.ops.tensors import version_of

# codes: (their version, address and device when the copy was made; the copy)
_copies = WeakIdKeyDictionary()


def remember(codes: Tensor, copy: Tensor) -> None:
    """Note that `copy` [K, N], with rows any distance apart, is `codes` [N, K] transposed.

    Codes of which nobody could say that they have changed get none.
    """
    assert copy.shape == codes.shape[::-1] and copy.dtype == codes.dtype
    if (state := _state(codes)) is not None:
        _copies[codes] = (state, copy)


def forget(codes: Tensor) -> None:
    """Give up the copy of `codes`, if there is one."""
    _copies.pop(codes, None)


def copy_of(codes: Tensor) -> Tensor | None:
    """The transposed copy [K, N] of `codes`, if there is one and they are what they were."""
    state, copy = _copies.get(codes, (None, None))
    return copy if state is not None and state == _state(codes) else None


def _state(codes: Tensor) -> tuple[int, int, torch.device] | None:
    if (version := version_of(codes)) is None:
        return None
    # a tensor's version stays as it is where its data is put in place of others
    return version, codes.data_ptr(), codes.device


def each_copy_of(weights: Sequence[Tensor]) -> tuple[list[Tensor], bool] | None:
    """The transposed copy of each of these codes, and whether all are neighbours in memory.

    None where one of them has none.
    """
    # torch.compile has no memory to look at
    if torch.compiler.is_compiling() or not _copies:
        return None
    copies = []
    for codes in weights:
        if (copy := copy_of(codes)) is None:
            return None
        copies.append(copy)
    return copies, all(_is_next(copy, following) for copy, following in pairwise(copies))


def copies_of(weights: Sequence[Tensor]) -> list[Tensor] | None:
    """The transposed copies of all these codes, at least one; None where one of them has none.

    Copies that are neighbours in memory come as one [K, ΣN].
    """
    copies, adjoin = each_copy_of(weights) or ([], False)
    if not copies:
        return None
    if not adjoin:
        return copies
    first, columns = copies[0], sum(copy.shape[1] for copy in copies)
    return [first.as_strided((first.shape[0], columns), first.stride())]


def _is_next(copy: Tensor, following: Tensor) -> bool:
    """Whether the columns of `following` come right after those of `copy`, in the same rows."""
    return (
        copy.untyped_storage()._cdata == following.untyped_storage()._cdata
        and copy.stride() == following.stride()
        and copy.storage_offset() + copy.shape[1] == following.storage_offset()
        and copy.shape[0] == following.shape[0]
    )
