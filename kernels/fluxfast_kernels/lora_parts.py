"""What the kernels of the adapters' products share: segments, and the two parts of rows.

The rows of text and image of a double block lie in one tensor, all of text before all of image, and
one launch takes both. What differs comes as a second operand. Ranges of rows do not cross from one
part to the other, so a program reads the operand of its part.
"""

import math
from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels.launch import LaunchTable, cdiv, launch_numbers
from fluxfast_kernels.matmul import rank_block
from fluxfast_kernels.product_tile import SEGMENT_UNIT, Segments


@triton.jit
def row_range(i_range, n_first, first_rows, M, length):
    """First row of a range, the end of its part, and whether that is the second part.

    The first part is rows [0, first_rows), in n_first ranges of `length` rows; the second part, in
    the ranges after these, is the rows up to M.
    """
    in_second = i_range >= n_first
    second_begin = first_rows + (i_range - n_first) * length
    begin = tl.where(in_second, second_begin, i_range * length)
    return begin, tl.where(in_second, M, first_rows), in_second


@triton.jit
def segment(p_seg, i_seg, C, R, RANK_UNIT: tl.constexpr):
    """First column of a segment, its end, its first rank, and its ranks; without a table all."""
    begin, end, r_begin, n_rank = 0, C, 0, R
    if p_seg is not None:
        begin = tl.load(p_seg + 4 * i_seg) * SEGMENT_UNIT
        end = tl.load(p_seg + 4 * i_seg + 1) * SEGMENT_UNIT
        r_begin = multiple(tl.load(p_seg + 4 * i_seg + 2), RANK_UNIT)
        n_rank = tl.load(p_seg + 4 * i_seg + 3)
    return begin, end, r_begin, multiple(n_rank, RANK_UNIT)


@triton.jit
def multiple(number, UNIT: tl.constexpr):
    """A multiple of UNIT, said so that the compiler knows it is one."""
    return number // UNIT * UNIT


def tile(m: int, n: int, num_warps: int, num_stages: int) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": num_warps, "num_stages": num_stages}


def launch_row(
    table: dict[str, LaunchTable],
    product: tl.dtype,
    rank: int,
    x: Tensor,
    numbers: Mapping[str, int] | None,
) -> dict[str, int]:
    wide = product == tl.float32
    row = launch_numbers(table["wide" if wide else "half"], x.device)
    return {**row, "BLOCK_R": rank_block(rank, 32 if wide else 64), **(numbers or {})}


def rank_unit(rank: int, segments: Segments | None, *strides: int) -> int:
    """The largest power of two, up to 16, that divides all ranks and the given strides.

    A kernel that knows it reads and writes so many ranks at once.
    """
    ranks = (rank,) if segments is None else segments.ranks
    return math.gcd(16, *ranks, *strides)


def first_rows(op: str, m: int, second_row: int | None) -> int:
    """How many of m rows are the first part's. Raises ValueError if there are not that many."""
    if second_row is None:
        return m
    if not 0 <= second_row <= m:
        raise ValueError(f"{op}: the second part cannot begin at row {second_row} of {m}")
    return second_row


def row_ranges(m: int, rows: int, length: int, two: bool) -> tuple[int, int]:
    """How many ranges of `length` rows the first part of m rows has, and how many there are.

    A part without rows has one range, too, whose program writes zeros.
    """
    n_first = max(cdiv(rows, length), 1)
    return n_first, n_first + (max(cdiv(m - rows, length), 1) if two else 0)


def check_alike(op: str, first: Tensor | None, second: Tensor | None) -> None:
    """Raises ValueError unless both are absent or agree in dtype, shape and strides.

    One kernel reads or writes either by the same rule.
    """
    traits = [None if t is None else (t.dtype, tuple(t.shape), t.stride()) for t in (first, second)]
    if traits[0] != traits[1]:
        raise ValueError(
            f"{op}: both parts need operands of one dtype, shape and strides, got {traits[0]} and "
            f"{traits[1]}"
        )
