"""Where the tensors of an optimiser's update are: tables for kernels that update all in one launch.

A program finds its tensor in a table of addresses, one row a tensor, through a list of blocks
(tensor, block within it). So any number of tensors of any sizes are one launch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels.launch import cdiv

TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class UpdateTable(NamedTuple):
    """Where parameters and their state are.

    Attributes:
        rows: a row for each parameter: the addresses of its tensors (0 for one that is absent), its
            number of elements, and half the elements of the parameters before it, each rounded up.
            [T, columns] int64.
        blocks: tensor and block within it [C, 2] int32.
        tensors: parameters first, then each tensor of their state; they live as long as their
            addresses do.
        aligned: whether every address is a multiple of 16 bytes.
    """

    rows: Tensor
    blocks: Tensor
    tensors: tuple[tuple[Tensor | None, ...], ...]
    aligned: bool

    @property
    def params(self) -> list[Tensor]:
        return [p for p in self.tensors[0] if p is not None]


class GradientTable(NamedTuple):
    """Where the gradients of a table's parameters are; who made it keeps them alive.

    Attributes:
        addresses: an address for each parameter of the table [T] int64.
        dtype: of all gradients.
        aligned: whether every address is a multiple of 16 bytes.
    """

    addresses: Tensor
    dtype: torch.dtype
    aligned: bool


@triton.jit
def pointer(p_address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer that a place of a table holds."""
    p = tl.load(p_address).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p


def update_table(tensors: Sequence[Sequence[Tensor | None]], block: int) -> UpdateTable:
    """The table of tensors that an update reads and writes.

    tensors: the parameters, of which there is at least one, then as many of each tensor of their
    state, None where there is none; all contiguous and on one device. block: elements of a
    parameter that one program updates. The table holds as long as none of them gets other memory.
    """
    rows, pairs = [], 0
    params = [p for p in tensors[0] if p is not None]
    for p, group in zip(params, zip(*tensors, strict=True), strict=True):
        rows.append([*(0 if t is None else t.data_ptr() for t in group), p.numel(), pairs])
        pairs += cdiv(p.numel(), 2)
    device = params[0].device
    counts = torch.tensor([cdiv(p.numel(), block) for p in params])
    which = torch.repeat_interleave(torch.arange(len(counts)), counts)
    within = torch.arange(len(which)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return UpdateTable(
        torch.tensor(rows, dtype=torch.int64).to(device),
        torch.stack((which, within), dim=1).to(torch.int32).to(device),
        tuple(tuple(each) for each in tensors),
        aligned=all(address % 16 == 0 for row in rows for address in row[:-2]),
    )


def gradient_table(table: UpdateTable, grads: Sequence[Tensor]) -> GradientTable:
    """The gradients of the table's parameters, in the same order.

    It holds as long as none of them is at another address. Raises ValueError if a gradient has
    another size or is not contiguous, or if the gradients' dtypes differ.
    """
    dtype = grads[0].dtype
    for grad, p in zip(grads, table.params, strict=True):
        if (
            grad.numel() != p.numel()
            or grad.dtype != dtype
            or dtype not in TRITON_DTYPES
            or not grad.is_contiguous()
        ):
            raise ValueError(
                "update: gradients must be contiguous, in their parameter's shape "
                f"{list(p.shape)} and of one dtype ({dtype}; "
                f"bfloat16 or float32), got {grad.dtype} {list(grad.shape)} with strides "
                f"{list(grad.stride())}"
            )
    addresses = [grad.data_ptr() for grad in grads]
    return GradientTable(
        torch.tensor(addresses, dtype=torch.int64).to(table.rows.device, non_blocking=True),
        dtype,
        aligned=all(address % 16 == 0 for address in addresses),
    )
