"""A group's weights with its adapters beside them, so that one GEMM multiplies by both.

    forward    y  = [x | s]·[W | B]ᵀ + b        backward   dx = [dy | dS]·[W ; A]

The augmented weight is one matrix with R = the adapters' ranks, rounded up. Each linear has its B
in its own rows and its own ranks' columns, and zeros in the columns of the others:

                   K columns     R columns
        N rows  [  W           | B          ]
        R rows  [  A           | never read ]    bias [N + R], zeros at its end

A frozen weight that is a plain tensor lives in it (`make_room`): the module's own tensor is that
part of the matrix, so that nothing is stored twice. For a weight that has to be decoded, the matrix
is the scratch that it is decoded into. The adapters train elsewhere, as contiguous tensors of their
own, because optimisers and files want them so; `fill` copies those of a whole block, and biases, in
one launch.

x and dy need room for s and dS behind each row, which `AugmentedProducts` makes and knows again. A
y that dy will overwrite has that room too. The GEMM that writes y writes its room as well, with
numbers that nobody reads: PyTorch adds the bias within the GEMM only where the output is
contiguous, and in a pass of its own elsewhere (`aten/src/ATen/native/cuda/Blas.cpp`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fluxfast.ops.device import shapes_suffice
from fluxfast.ops.linear.adapters import Lora
from fluxfast.ops.registration import PLAIN
from fluxfast.ops.tensors import dense_rows

if TYPE_CHECKING:
    from fluxfast_kernels.copy_matrices import Job

# elements; R is a multiple of it, so that rows of 16 bits begin at multiples of 16 bytes where K
# and N allow it, as cuBLAS wants them
ALIGNMENT = 8


def room_for(rank: int) -> int:
    """The columns that are left free for so many ranks of a group's adapters together."""
    return -(-rank // ALIGNMENT) * ALIGNMENT


class AugmentedWeight:
    """An augmented weight over one storage, in which the matrix comes first and then the bias.

    outs: the rows of W that each linear has; cols: K; room: R. It holds no reference to the
    storage, whose memory must go when the model's tensors go.
    """

    def __init__(self, outs: Sequence[int], cols: int, room: int) -> None:
        self.outs, self.cols, self.room = tuple(outs), cols, room
        self.rows, self.stride = sum(outs), cols + room
        # whose adapters it holds, for a block that fills it in forward and reads it in backward
        self.holds: object = None

    def empty(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised memory for it, as one vector."""
        rows = self.rows + self.room
        return torch.empty(rows * self.stride + rows, dtype=dtype, device=device)


class Placed(NamedTuple):
    """An augmented weight, and any tensor in its storage."""

    layout: AugmentedWeight
    within: Tensor

    @property
    def weight(self) -> Tensor:
        """W [N, K] of all linears."""
        layout = self.layout
        return self.within.as_strided((layout.rows, layout.cols), (layout.stride, 1), 0)

    @property
    def weights(self) -> list[Tensor]:
        """Each linear's W [out, K]."""
        return list(self.weight.split_with_sizes(self.layout.outs))

    def forward(self, xs: Tensor, rank: int, y: Tensor) -> None:
        """Writes [x | s]·[W | B]ᵀ + b to y [M, N], or to [M, N + R], whose last R nobody reads.

        xs [M, K + R]; only `rank` of its last columns are read.
        """
        layout, cols = self.layout, y.shape[1]
        rows, k = layout.rows + layout.room, layout.cols + rank
        bias = self.within.as_strided((cols,), (1,), rows * layout.stride)
        w = self.within.as_strided((k, cols), (1, layout.stride), 0)
        torch.addmm(bias, xs[:, :k], w, out=y)

    def backward(self, dys: Tensor, rank: int, dx: Tensor, accumulate: bool) -> None:
        """Writes [dy | dS]·[W ; A] to dx [M, K], or adds it.

        Of dys [M, N + R] it reads N + rank columns.
        """
        layout, n = self.layout, self.layout.rows + rank
        w = self.within.as_strided((n, layout.cols), (layout.stride, 1), 0)
        if accumulate:
            dx.addmm_(dys[:, :n], w)
        else:
            torch.mm(dys[:, :n], w, out=dx)


class RowsAt(NamedTuple):
    """Rows of x, and the augmented weight that they meet."""

    rows: slice
    weight: Placed


# the storages that `make_room` made. A weak reference keeps a storage's address from being given to
# another one, though not its memory
_made: dict[int, tuple[StorageWeakRef, AugmentedWeight]] = {}


def make_room(weights: Sequence[Tensor], rank: int) -> list[Tensor]:
    """Copies [out, K] of the weights of one dtype in an augmented weight with room for `rank`."""
    first = weights[0]
    layout = AugmentedWeight([w.shape[0] for w in weights], first.shape[1], room_for(rank))
    whole = layout.empty(first.dtype, first.device)
    places = Placed(layout, whole).weights
    for place, w in zip(places, weights, strict=True):
        place.copy_(w.detach())
    for key in [key for key, (ref, _) in _made.items() if ref.expired()]:
        del _made[key]
    reference = StorageWeakRef(whole.untyped_storage())
    _made[reference.cdata] = (reference, layout)
    return places


def placed(weights: Sequence[Tensor], rank: int) -> Placed | None:
    """The augmented weight in which these weights live, all of them and in this order.

    None where they don't, or where it has no room for so many ranks.
    """
    first = weights[0]
    if type(first) not in PLAIN or not _made:
        return None
    storage = first.untyped_storage()._cdata
    _, layout = _made.get(storage, (None, None))
    if layout is None or layout.room < rank or len(weights) != len(layout.outs):
        return None
    start = 0
    for w, rows in zip(weights, layout.outs, strict=True):
        if (
            w.shape != (rows, layout.cols)
            or w.dtype != first.dtype
            or w.storage_offset() != start
            or w.stride() != (layout.stride, 1)
            or w.untyped_storage()._cdata != storage
        ):
            return None
        start += rows * layout.stride
    return Placed(layout, first.detach())


def scratch(
    outs: Sequence[int], cols: int, rank: int, dtype: torch.dtype, device: torch.device
) -> Placed:
    """An augmented weight without values."""
    layout = AugmentedWeight(outs, cols, room_for(rank))
    return Placed(layout, layout.empty(dtype, device))


class Fill(NamedTuple):
    """An augmented weight, and each linear's LoRAs and bias."""

    into: Placed
    loras: Sequence[Sequence[Lora]]
    biases: Sequence[Tensor | None]


def fill(fills: Sequence[Fill]) -> None:
    """Copies adapters and biases into augmented weights of one dtype and device, in one launch."""
    for each in fills:
        each.into.layout.holds = None
    if not fills or (fills[0].into.within.is_meta and shapes_suffice()):
        return
    from fluxfast_kernels.copy_matrices import copy_matrices

    copy_matrices([job for each in fills for job in _jobs(each)])


def _jobs(each: Fill) -> list[Job]:
    """What `fill` copies into one augmented weight."""
    from fluxfast_kernels.copy_matrices import Job

    layout, dtype = each.into.layout, each.into.within.dtype
    whole = each.into.within.as_strided((1,), (1,), 0)
    total = sum(lora.a.shape[0] for own in each.loras for lora in own)

    def job(source: Tensor | None, offset: int, rows: int, cols: int) -> Job:
        if source is not None:
            is_wide = source.dtype == torch.float32 != dtype
            source = dense_rows(source.detach() if is_wide else source.detach().to(dtype))
        return Job(source, whole, offset, rows, cols, layout.stride)

    jobs, row, rank = [], 0, 0
    bias = (layout.rows + layout.room) * layout.stride
    for n, own, b in zip(layout.outs, each.loras, each.biases, strict=True):
        corner, first = row * layout.stride + layout.cols, rank
        for lora in own:
            width = lora.a.shape[0]
            jobs.append(job(lora.a, (layout.rows + rank) * layout.stride, width, layout.cols))
            jobs.append(job(lora.b, corner + rank, n, width))
            rank += width
        jobs.append(job(None, corner, n, first))
        jobs.append(job(None, corner + rank, n, total - rank))
        jobs.append(job(None if b is None else b[None], bias + row, 1, n))
        row += n
    return [*jobs, job(None, bias + row, 1, layout.room)]


class AugmentedProducts:
    """The products of some linears with augmented weights, and the memory that they ask for.

    A tensor may be written past its last column only where it is known that nothing else lies
    there. Strides don't tell that: a slice of a wider tensor has the same. So the tensors with room
    behind each row are made here, and known again.
    """

    def __init__(self, shape: tuple[int, int], rank: int) -> None:
        """shape: of all linears' W together, [N, K]. rank: of all their LoRAs together."""
        self.rank, (self._outs, self._cols) = rank, shape
        self._made: dict[int, StorageWeakRef] = {}

    def weights_of_rows(self, tokens: int) -> Sequence[RowsAt]:
        """Which of so many rows of x meet which augmented weight; none where no row does.

        Two weights are alike in shape and in their room.
        """
        raise NotImplementedError

    def new_input(self, *rows: int) -> Tensor | None:
        """Where a producer of x [*rows, K] should write it: uninitialised, with room for s.

        None where x may lie anywhere.
        """
        return self._empty(rows, self._cols)

    def new_output(self, *rows: int) -> Tensor | None:
        """Where to put a y [*rows, N] that its gradient will overwrite, or that gradient itself.

        It is uninitialised, with room for dS. None where they may lie anywhere.
        """
        return self._empty(rows, self._outs)

    def _empty(self, rows: Sequence[int], cols: int) -> Tensor | None:
        places = self.weights_of_rows(math.prod(rows))
        if not places:
            return None
        first = places[0].weight
        shape = (*rows, cols + first.layout.room)
        whole = torch.empty(shape, dtype=first.within.dtype, device=first.within.device)
        reference = StorageWeakRef(whole.untyped_storage())
        self._made[reference.cdata] = reference
        return whole[..., :cols]

    def room(self, t: Tensor | None) -> Tensor | None:
        """The room [M, rank] behind an x or dy [M, …] that was made here; None behind any other."""
        if t is None or (whole := self._whole(t)) is None:
            return None
        return whole[:, t.shape[1] : t.shape[1] + self.rank]

    def _whole(self, t: Tensor) -> Tensor | None:
        """Rows [M, C] and their room [M, C + R], if they were made here."""
        if not self._made:
            return None
        storage, (rows, cols) = t.untyped_storage(), t.shape
        if storage._cdata not in self._made:
            return None
        wide = cols + self.weights_of_rows(rows)[0].weight.layout.room
        if (
            t.storage_offset() != 0
            or storage.nbytes() != rows * wide * t.itemsize
            or (rows > 1 and t.stride(0) != wide)
        ):
            return None
        return t.as_strided((rows, wide), (wide, 1), 0)

    def forward_augmented(self, x: Tensor, y: Tensor) -> None:
        """Writes [x | s]·[W | B]ᵀ + b to y [M, N]; s is in the room behind x [M, K]."""
        xs, whole = self._whole(x), self._whole(y)
        assert xs is not None
        y = y if whole is None else whole
        for rows, weight in self.weights_of_rows(len(x)):
            weight.forward(xs[rows], self.rank, y[rows])

    def backward_augmented(self, dy: Tensor, dx: Tensor, accumulate: bool) -> None:
        """Writes [dy | dS]·[W ; A] to dx [M, K], or adds it; dS is in the room behind dy [M, N]."""
        dys = self._whole(dy)
        assert dys is not None
        for rows, weight in self.weights_of_rows(len(dy)):
            weight.backward(dys[rows], self.rank, dx[rows], accumulate)
