"""dS and dB of linears with LoRA, which both read dy: dS = scale · dy B and dB = dyᵀ s.

In one pass a program reads a region of dy once: a range of rows by a few tiles of columns of one
linear. A tile of dB is summed over these rows in registers. dS is summed over the tile's columns
block by block, and goes to the region's slab, to which the region's next tile adds. The last
program of a linear's columns adds their dB, and the last one of a range of rows adds its dS
(`slabs`).

With tiles of n columns and ranges of m rows, slabs that are written and read have
4 · rank · (1/m + 1/n) times as many bytes as dy in 16 bits: one quarter with rank 16 and 512 by
512. That grows with the rank, and dS and dB are two passes where it is more than a third.
"""

import functools
from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels.aot import EVERY_TARGET, AotCase
from fluxfast_kernels.launch import LaunchTable, cdiv, launch, next_pow2
from fluxfast_kernels.lora_linear import SecondDown, SecondOuter, lora_down, lora_outer
from fluxfast_kernels.lora_parts import (
    check_alike,
    first_rows,
    launch_row,
    multiple,
    rank_unit,
    row_range,
    row_ranges,
    segment,
    tile,
)
from fluxfast_kernels.matmul import product_type
from fluxfast_kernels.product_tile import SEGMENT_UNIT, Segments, make_segments
from fluxfast_kernels.row_quant import check_rows
from fluxfast_kernels.slabs import (
    add_slabs,
    add_splits,
    arrives_last,
    full_programs,
    semaphores,
)


@triton.jit(do_not_specialize=["M", "first_rows", "n_first"])
def lora_grads_kernel(
    p_dy,
    p_s,
    p_b,
    p_ds,
    p_db,
    p_scale,
    p_seg,
    p_second_b,
    p_second_db,
    p_second_scale,
    p_ds_slabs,
    p_db_slabs,
    p_semaphores,
    M,
    N,
    R,
    first_rows,
    n_first,
    seg_groups,
    all_groups,
    all_tiles,
    group,
    m_split,
    stride_dy,
    stride_s,
    stride_b,
    stride_ds,
    stride_db,
    DOT_TYPE: tl.constexpr,
    RANK_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    i_range, n_ranges = tl.program_id(0), tl.num_programs(0)
    n_segs = tl.num_programs(1) // seg_groups
    i_seg, i_group = tl.program_id(1) // seg_groups, tl.program_id(1) % seg_groups
    n_begin, n_end, r_begin, n_rank = segment(p_seg, i_seg, N, R, RANK_UNIT)
    n_tiles = tl.cdiv(n_end - n_begin, BLOCK_N)
    n_groups = tl.cdiv(n_tiles, group)
    # a narrow segment has fewer groups of tiles than the widest
    if i_group >= n_groups:
        return
    # the tiles and groups of the segments before
    tiles_before, groups_before = 0, 0
    if p_seg is not None:
        for i in range(i_seg):
            width = (tl.load(p_seg + 4 * i + 1) - tl.load(p_seg + 4 * i)) * SEGMENT_UNIT
            tiles_before += tl.cdiv(width, BLOCK_N)
            groups_before += tl.cdiv(tl.cdiv(width, BLOCK_N), group)
    i_m0, m_end, in_second = row_range(i_range, n_first, first_rows, M, m_split)
    m_len = tl.minimum(m_end - i_m0, m_split)
    if p_second_b is not None:
        p_b = tl.where(in_second, p_second_b, p_b)
        p_db = tl.where(in_second, p_second_db, p_db)
        if p_scale is not None:
            p_scale = tl.where(in_second, p_second_scale, p_scale)

    stride_s, stride_ds = multiple(stride_s, RANK_UNIT), multiple(stride_ds, RANK_UNIT)
    stride_b, stride_db = multiple(stride_b, RANK_UNIT), multiple(stride_db, RANK_UNIT)
    i_m0 = i_m0.to(tl.int64)
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_r = tl.arange(0, BLOCK_R)
    m_r = o_r < n_rank
    b_scale = tl.full((1, BLOCK_R), 1.0, tl.float32)
    if p_scale is not None:
        b_scale = tl.load(p_scale + r_begin + o_r, mask=m_r, other=0.0)[None, :]
    p_dy += i_m0 * stride_dy
    p_s += i_m0 * stride_s + r_begin
    p_ds += i_m0 * stride_ds + r_begin
    if p_ds_slabs is not None:
        i_slab = i_range * all_groups + groups_before + i_group
        p_ds_slab = p_ds_slabs + i_slab.to(tl.int64) * m_split * BLOCK_R
    o_dy = o_m[:, None] * stride_dy + o_n[None, :]
    o_s = o_r[:, None] + o_m[None, :] * stride_s
    o_b = o_n[:, None] * stride_b + o_r[None, :]
    o_ds = o_m[:, None] * stride_ds + o_r[None, :]
    o_db = o_r[:, None] + o_n[None, :] * stride_db
    o_slab = o_m[:, None] * BLOCK_R + o_r[None, :]

    i_n0 = (n_begin + i_group * group * BLOCK_N).to(tl.int64)
    for i_n in range(i_group * group, tl.minimum((i_group + 1) * group, n_tiles)):
        m_n = i_n0 + o_n < n_end
        m_b = m_n[:, None] & m_r[None, :]
        b_b = tl.load(p_b + i_n0 * stride_b + o_b, mask=m_b, other=0.0).to(DOT_TYPE)
        p_dy_tile, p_s_tile = p_dy + i_n0, p_s
        # dBᵀ = sᵀ dy, so that both products read dy in the order in which it is in memory
        b_db = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
        for i_m in range(0, m_len, BLOCK_M):
            m_m = o_m < m_len - i_m
            b_dy = tl.load(p_dy_tile + o_dy, mask=m_m[:, None] & m_n[None, :], other=0.0)
            b_s = tl.load(p_s_tile + o_s, mask=m_r[:, None] & m_m[None, :], other=0.0)
            b_dy = b_dy.to(DOT_TYPE)
            b_db = tl.dot(b_s.to(DOT_TYPE), b_dy, b_db, input_precision="ieee")
            b_ds = tl.dot(b_dy, b_b, input_precision="ieee")
            if p_ds_slabs is None:
                b_ds = (b_ds * b_scale).to(p_ds.dtype.element_ty)
                tl.store(p_ds + i_m * stride_ds + o_ds, b_ds, mask=m_m[:, None] & m_r[None, :])
            else:
                # a group's tiles share a slab, which holds nothing before the first of them
                p_slab = p_ds_slab + i_m * BLOCK_R + o_slab
                is_later = (o_slab >= 0) & (i_n > i_group * group)
                b_ds += tl.load(p_slab, mask=is_later, other=0.0)
                tl.store(p_slab, b_ds)
            p_dy_tile += BLOCK_M * stride_dy
            p_s_tile += BLOCK_M * stride_s
        # the next tile reads what this one wrote to the slab
        tl.debug_barrier()

        # ranks that this segment lacks are written too, as zeros
        m_db = (o_r < R)[:, None] & m_n[None, :]
        if p_db_slabs is not None:
            # the slabs of the first part's sum lie before those of the second's
            i_tile, i_part = tiles_before + i_n, tl.where(in_second, n_first, 0)
            n_splits = tl.where(in_second, n_ranges - n_first, n_first)
            p_slabs = p_db_slabs + (i_tile * n_ranges + i_part).to(tl.int64) * (BLOCK_R * BLOCK_N)
            i_sum = n_segs * n_ranges + tl.where(in_second, all_tiles, 0) + i_tile
            b_db, is_last = add_splits(
                b_db, p_slabs, p_semaphores + i_sum, i_range - i_part, n_splits
            )
            m_db &= is_last
        tl.store(p_db + i_n0 * stride_db + o_db, b_db.to(p_db.dtype.element_ty), mask=m_db)
        i_n0 += BLOCK_N

    if p_ds_slabs is not None:
        p_semaphore = p_semaphores + i_seg * n_ranges + i_range
        m_len = tl.where(arrives_last(p_semaphore, n_groups), m_len, 0)
        i_slab = i_range * all_groups + groups_before
        p_ds_slab = p_ds_slabs + i_slab.to(tl.int64) * m_split * BLOCK_R
        # more rows than a block has, so that many loads are under way at one time
        SUM_M: tl.constexpr = 4096 // BLOCK_R
        o_m = tl.arange(0, SUM_M)
        o_slab = o_m[:, None] * BLOCK_R + o_r[None, :]
        o_ds = o_m[:, None] * stride_ds + o_r[None, :]
        for i_m in range(0, m_len, SUM_M):
            m_ds = (o_m < m_len - i_m)[:, None] & m_r[None, :]
            b_ds = add_slabs(
                p_ds_slab + i_m * BLOCK_R, o_slab, m_ds, n_groups, m_split * BLOCK_R, SUM_M, BLOCK_R
            )
            b_ds = (b_ds * b_scale).to(p_ds.dtype.element_ty)
            tl.store(p_ds + i_m * stride_ds + o_ds, b_ds, mask=m_ds)


# launch numbers of one pass, not yet tuned on a device. Slabs are the fewer the wider BLOCK_N is,
# and a block of dy is BLOCK_M by BLOCK_N. Where that is narrow, two passes move fewer bytes: so it
# is on sm_80 and sm_89, whose registers hold no wider block without spilling. "wide" where products
# are taken in fp32
ONE_PASS: dict[str, LaunchTable] = {
    "half": {
        "default": tile(32, 64, 4, 2),
        "sm_90": tile(64, 512, 8, 3),
        "gfx942": tile(32, 512, 8, 2),
    },
    "wide": {"default": tile(16, 32, 4, 2)},
}


class SecondGrads(NamedTuple):
    """A second part of dy's rows, from row `rows` on, with a B, a scale and a dB of its own."""

    rows: int
    b: Tensor
    db: Tensor
    scale: Tensor | None = None


def lora_grads(
    dy: Tensor,
    s: Tensor,
    b: Tensor,
    ds: Tensor,
    db: Tensor,
    *,
    scale: Tensor | None = None,
    segments: Segments | None = None,
    second: SecondGrads | None = None,
    passes: int | None = None,
    numbers: Mapping[str, int] | None = None,
) -> None:
    """Writes scale · dy b to `ds` [M, Σ ranks] and dyᵀ s to `db` [N, max ranks].

    dy [M, N] float, s [M, Σ ranks], b [N, max ranks], scale [Σ ranks] fp32. `segments` says which
    columns and ranks each linear has; spare columns of db, where a linear has fewer ranks than the
    widest, are zero. The rows of all but scale may lie any distance apart. Sums are fp32. With
    `second`, the rows from `second.rows` on meet its b and scale, and their dB is written to its
    db; these are like the first part's in dtype, shape and strides, else ValueError is raised.

    passes: 1 or 2 over dy, or None for what should be faster; for one pass, `numbers` overrides
    single launch numbers of ONE_PASS's.
    """
    check_rows("lora_grads", dy=dy, s=s, b=b, ds=ds, db=db, scale=scale)
    second_row, *others = (None,) * 4 if second is None else second
    rows = first_rows("lora_grads", dy.shape[0], second_row)
    if second is not None:
        for first, other in zip((b, db, scale), others, strict=True):
            check_alike("lora_grads", first, other)
    if db.numel() == 0:
        return
    (m, n), rank = dy.shape, b.shape[1]
    product = product_type(dy, s, dy.dtype)
    # a program takes all ranks, so that it reads dy once
    all_ranks = {"BLOCK_R": max(16, next_pow2(rank)), **(numbers or {})}
    chosen = launch_row(ONE_PASS, product, rank, dy, all_ranks)
    blocks = chosen["BLOCK_M"], chosen["BLOCK_N"], chosen["BLOCK_R"]
    seg, outs = (None, (n,)) if segments is None else (segments.table, segments.outs)
    regions = _regions(
        m, rows, second is not None, outs, blocks, dy.itemsize, full_programs(dy.device)
    )
    # adding slabs up takes longer than their bytes say, because few programs do it
    pays = 3 * regions.slab_bytes(*blocks[1:]) <= dy.numel() * dy.itemsize
    if passes == 2 or (passes is None and not pays):
        _two_passes(dy, s, b, ds, db, scale, segments, second)
        return
    ds_slabs, db_slabs = (
        torch.empty(size, dtype=torch.float32, device=dy.device) if size else None
        for size in regions.slab_sizes(*blocks[1:])
    )
    sums = len(outs) * regions.n_ranges + (0 if db_slabs is None else 2 * regions.tiles)
    strides = [t.stride(0) for t in (s, b, ds, db)]
    launch(
        lora_grads_kernel, (regions.n_ranges, len(outs) * regions.seg_groups),
        dy, s, b, ds, db, scale, seg, *others, ds_slabs, db_slabs, semaphores(sums, dy.device),
        m, n, rank, rows, regions.n_first, regions.seg_groups, regions.groups, regions.tiles,
        regions.group, regions.rows, dy.stride(0), *strides,
        DOT_TYPE=product, RANK_UNIT=rank_unit(rank, segments, *strides), **chosen,
    )  # fmt: skip


def _two_passes(
    dy: Tensor,
    s: Tensor,
    b: Tensor,
    ds: Tensor,
    db: Tensor,
    scale: Tensor | None,
    segments: Segments | None,
    second: SecondGrads | None,
) -> None:
    down = outer = None
    if second is not None:
        down = SecondDown(second.rows, second.b.T, second.scale)
        outer = SecondOuter(second.rows, second.db)
    lora_down(dy, b.T, ds, scale=scale, segments=segments, second=down)
    lora_outer(dy, s, db, segments=segments, second=outer)


class _Regions(NamedTuple):
    """How one pass divides dy.

    A program has `group` tiles of columns of one linear in a range of `rows` rows. Ranges do not
    cross from the first part to the second.
    """

    group: int
    rows: int
    # ranges of the first part, and of both
    n_first: int
    n_ranges: int
    # groups of the widest linear, and groups and tiles of all linears
    seg_groups: int
    groups: int
    tiles: int

    def slab_sizes(self, block_n: int, block_r: int) -> tuple[int, int]:
        """Numbers in the slabs of dS and in those of dB; 0 where no sum is cut."""
        one_tile_each = self.seg_groups == 1 and self.group == 1
        one_range_each = self.n_ranges == (1 if self.n_first == self.n_ranges else 2)
        return (
            0 if one_tile_each else self.n_ranges * self.groups * self.rows * block_r,
            0 if one_range_each else self.n_ranges * self.tiles * block_n * block_r,
        )

    def slab_bytes(self, block_n: int, block_r: int) -> int:
        """Bytes of slabs that are written and read: those of dS once for each of their tiles."""
        ds, db = self.slab_sizes(block_n, block_r)
        return 2 * 4 * (ds // self.groups * self.tiles + db)


# programs that use all of a device's bandwidth, where each reads as fast as it can: assumed, not
# measured
_BUSY_PROGRAMS = 64


@functools.lru_cache(maxsize=256)
def _regions(
    m: int,
    first_rows: int,
    two: bool,
    outs: tuple[int, ...],
    blocks: tuple[int, int, int],
    itemsize: int,
    programs: int,
) -> _Regions:
    """The regions with which the longest program reads the fewest bytes.

    These are its region's, or what it waits for while others use the bandwidth, and the slabs that
    it adds where it is the last. blocks: BLOCK_M, BLOCK_N, BLOCK_R; programs: how many run at one
    time.
    """
    block_m, block_n, block_r = blocks
    tiles = [cdiv(out, block_n) for out in outs]
    best: tuple[int, _Regions] | None = None
    for group in range(1, min(max(tiles), 16) + 1):
        groups = [cdiv(n, group) for n in tiles]
        for ranges in range(1, max(programs // sum(groups), 1) + 1):
            rows = max(cdiv(cdiv(m, ranges), block_m), 1) * block_m
            counts = row_ranges(m, first_rows, rows, two)
            found = _Regions(group, rows, *counts, max(groups), sum(groups), sum(tiles))
            own = rows * group * block_n * itemsize
            waits = m * sum(outs) * itemsize // _BUSY_PROGRAMS
            adds = 4 * block_r * (max(groups) * rows + group * counts[1] * block_n)
            cost = max(own, waits) + adds
            if best is None or cost < best[0]:
                best = cost, found
    assert best is not None
    return best[1]


def aot_cases() -> Iterator[AotCase]:
    """What `fluxfast-bench aot` compiles of this op: launches at FLUX.1's sizes."""
    meta = partial(torch.empty, device="meta")
    # a single block's QKV and first MLP linear, and a double block's output of both its streams
    m, d = 4608, 3072
    for name, outs, rank, second in (
        ("single", (d, d, d, 4 * d), 16, False),
        ("single", (d, d, d, 4 * d), 4, False),
        ("double", (d, d, d), 16, True),
        ("double", (d,), 32, True),
    ):
        n, total = sum(outs), rank * len(outs)
        segments = make_segments(outs, (rank,) * len(outs), "meta") if len(outs) > 1 else None
        for dtype_name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            one = partial(meta, dtype=dtype)
            b, db, scale = one(n, rank), meta(n, rank), meta(total)
            yield (
                f"{dtype_name}-{name}-r{rank}",
                partial(
                    lora_grads, one(m, n), one(m, total), b, one(m, total), db,
                    scale=scale, segments=segments,
                    second=SecondGrads(512, b, db, scale) if second else None,
                ),
                EVERY_TARGET,
            )  # fmt: skip
