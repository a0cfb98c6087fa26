"""What the kernels of wide products share: where a tile lies, and what a linear adds to it.

The linears of a packed group divide its columns into segments, and their adapters its ranks.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# a segment's columns are counted in this unit, so that a compiler knows how its loads and stores
# are aligned
SEGMENT_UNIT = tl.constexpr(16)
# the ranks that a thread loads at once, where all segments' are multiples of it: 16 bytes of bf16
RANK_UNIT = 8


class Segments(NamedTuple):
    """How the linears of a packed group divide its output columns and its adapters' ranks.

    table [n, 4] int32 on the group's device: first column and last column + 1 in units of
    SEGMENT_UNIT, first rank, number of ranks; the sizes on the host as `outs` and `ranks`, so that
    no launch waits for the device. All ranks are multiples of `rank_unit`.
    """

    table: Tensor
    outs: tuple[int, ...]
    ranks: tuple[int, ...]
    rank_unit: int


def make_segments(
    outs: Sequence[int], ranks: Sequence[int], device: torch.device | str
) -> Segments:
    """Segments of linears with `outs` output features and `ranks` adapter ranks, in order.

    A rank is that of all adapters of a linear together, 0 for none. Raises ValueError unless every
    number of features is a multiple of SEGMENT_UNIT.
    """
    rows, col, rank, unit = [], 0, 0, SEGMENT_UNIT.value
    for n, r in zip(outs, ranks, strict=True):
        if n % unit:
            raise ValueError(
                f"linears in one group need multiples of {unit} output features, got {n}; call "
                "them one by one"
            )
        rows.append((col // unit, (col + n) // unit, rank, r))
        col, rank = col + n, rank + r
    table = torch.tensor(rows, dtype=torch.int32).to(device)
    return Segments(table, tuple(outs), tuple(ranks), math.gcd(RANK_UNIT, *ranks))


@triton.jit
def as_type(b, TYPE: tl.constexpr):
    """b in the type of a product.

    gfx942's e4m3 has another bias: the same bits mean half as much, but minus zero means NaN.
    """
    if TYPE.is_fp8e4b8() and b.dtype.is_fp8e4nv():
        b_code = b.to(tl.uint8, bitcast=True)
        b = tl.where(b_code == 0x80, 0, b_code).to(tl.uint8).to(TYPE, bitcast=True)
    else:
        b = b.to(TYPE)
    return b


@triton.jit
def segment_tile(p_seg, n_seg, i_tile, BLOCK_N: tl.constexpr, RANK_UNIT: tl.constexpr = 1):
    """First column of a tile, end of its segment, the segment's first rank, and its ranks.

    Ranks are multiples of RANK_UNIT: the compiler has to know it to load several at a time.

    The tiles cut every segment from its own start, and are numbered through all segments.
    """
    i_first, n_begin, n_end, r_begin, n_rank = 0, 0, 0, 0, 0
    for i_seg in range(n_seg):
        n_lo = tl.load(p_seg + 4 * i_seg) * SEGMENT_UNIT
        n_hi = tl.load(p_seg + 4 * i_seg + 1) * SEGMENT_UNIT
        n_tiles = tl.cdiv(n_hi - n_lo, BLOCK_N)
        here = (i_tile >= i_first) & (i_tile < i_first + n_tiles)
        n_begin = tl.where(here, n_lo + (i_tile - i_first) * BLOCK_N, n_begin)
        n_end = tl.where(here, n_hi, n_end)
        r_begin = tl.where(here, tl.load(p_seg + 4 * i_seg + 2), r_begin)
        n_rank = tl.where(here, tl.load(p_seg + 4 * i_seg + 3), n_rank)
        i_first += n_tiles
    if RANK_UNIT > 1:
        r_begin, n_rank = r_begin // RANK_UNIT * RANK_UNIT, n_rank // RANK_UNIT * RANK_UNIT
    return n_begin, n_end, r_begin, n_rank


@triton.jit
def tile_rows(i_m, M, M_FIRST, BLOCK_M: tl.constexpr):
    """First row of the i_m-th tile of rows, end of its part, and whether that is the second part.

    The first part is the rows before M_FIRST; the tiles cut each part from its own start.
    """
    first_tiles = tl.cdiv(M_FIRST, BLOCK_M)
    second = i_m >= first_tiles
    m_begin = tl.where(second, M_FIRST + (i_m - first_tiles) * BLOCK_M, i_m * BLOCK_M)
    return m_begin, tl.where(second, M, M_FIRST), second


@triton.jit
def of_part(second, p, p_2):
    """The first part's pointer, or the second's where there is a second part."""
    if p_2 is not None:
        p = tl.where(second, p_2, p)
    return p


@triton.jit
def tile_at(i_tile, M, M_FIRST, n_tiles, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr):
    """The tile's place among the tiles of rows and among those of columns.

    Programs that run at one time share GROUP_M row tiles of x and a few tiles of w, which then
    stay in L2.
    """
    m_tiles = tl.cdiv(M_FIRST, BLOCK_M) + tl.cdiv(M - M_FIRST, BLOCK_M)
    in_group = GROUP_M * n_tiles
    i_first = (i_tile // in_group) * GROUP_M
    rows = tl.minimum(m_tiles - i_first, GROUP_M)
    return i_first + (i_tile % in_group) % rows, (i_tile % in_group) // rows


@triton.jit
def finish_tile(
    b_y,
    p_y,
    p_x_scale,
    p_w_scale,
    p_bias,
    p_u,
    p_v,
    p_w_scale_2,
    p_bias_2,
    p_v_2,
    second,
    m_begin,
    m_end,
    n_begin,
    n_end,
    r_begin,
    n_rank,
    stride_y,
    stride_u,
    stride_v,
    LORA_TYPE: tl.constexpr,
    V_K_MAJOR: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Stores the fp32 sums b_y with scales, adapters, bias, and where wanted y's former value.

    second: whether the tile's rows are those of the second part.
    """
    # 64-bit offsets to the tile, 32-bit ones within it
    i_m0 = m_begin.to(tl.int64)
    i_n0 = n_begin.to(tl.int64)
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    m_m = m_begin + o_m < m_end
    m_n = n_begin + o_n < n_end
    if p_x_scale is not None:
        b_y *= tl.load(p_x_scale + i_m0 + o_m, mask=m_m, other=0.0)[:, None]
    if p_w_scale is not None:
        p_w_scale = of_part(second, p_w_scale, p_w_scale_2)
        b_y *= tl.load(p_w_scale + i_n0 + o_n, mask=m_n, other=0.0)[None, :]
    if p_u is not None:
        p_u += i_m0 * stride_u + r_begin
        p_v = of_part(second, p_v, p_v_2)
        p_v += i_n0 * stride_v if V_K_MAJOR else i_n0
        for i_r in tl.range(0, n_rank, BLOCK_R, num_stages=1):
            o_r = i_r + tl.arange(0, BLOCK_R)
            m_r = o_r < n_rank
            if V_K_MAJOR:
                o_v = o_n[None, :] * stride_v + o_r[:, None]
            else:
                o_v = o_r[:, None] * stride_v + o_n[None, :]
            b_u = tl.load(
                p_u + o_m[:, None] * stride_u + o_r[None, :],
                mask=m_m[:, None] & m_r[None, :],
                other=0.0,
            )
            b_v = tl.load(p_v + o_v, mask=m_r[:, None] & m_n[None, :], other=0.0)
            b_y = tl.dot(b_u.to(LORA_TYPE), b_v.to(LORA_TYPE), b_y, input_precision="ieee")
    if p_bias is not None:
        p_bias = of_part(second, p_bias, p_bias_2)
        b_y += tl.load(p_bias + i_n0 + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]

    p_y += i_m0 * stride_y + i_n0
    o_y = o_m[:, None] * stride_y + o_n[None, :]
    m_y = m_m[:, None] & m_n[None, :]
    if ACCUMULATE:
        b_y += tl.load(p_y + o_y, mask=m_y, other=0.0).to(tl.float32)
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=m_y)
