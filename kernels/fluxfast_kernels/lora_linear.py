"""The low-rank products of linears with LoRA: y = x Wᵀ + b + s Bᵀ, where s = scale · x Aᵀ.

Everything narrow is packed over the group of linears that share x: A [Σ ranks, K] of all LoRAs,
their s and dS [M, Σ ranks], and B [N, max ranks], each linear's LoRAs side by side in its own rows.
`scale` is folded into s and dS and never seen again:

    forward    s  = scale · x Aᵀ            y  = x Wᵀ + s Bᵀ + b
    backward   dS = scale · dy B            dx = dy W + dS A
               dB = dyᵀ s                   dA = dSᵀ x

`matmul.matmul` has the wide products y and dx, and adds the narrow ones s Bᵀ and dS A in its
epilogue. The other four are narrow: s and dS are `lora_down`, dB and dA are `lora_outer`, and
`lora_grads` has dS and dB in one. Each reads a large matrix once to make a small one, so it is cut
along the sum until the device is busy (`slabs`), reproducibly.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels.aot import EVERY_TARGET, AotCase
from fluxfast_kernels.launch import LaunchTable, cdiv, launch
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
from fluxfast_kernels.matmul import matmul, order_of, product_type
from fluxfast_kernels.product_tile import Segments, make_segments, segment_tile
from fluxfast_kernels.row_quant import check_rows
from fluxfast_kernels.slabs import add_splits, split, workspace


@triton.jit(do_not_specialize=["M", "first_rows", "n_first"])
def lora_down_kernel(
    p_x,
    p_v,
    p_s,
    p_copy,
    p_x_scale,
    p_scale,
    p_seg,
    p_second_v,
    p_second_scale,
    p_slabs,
    p_semaphores,
    M,
    C,
    R,
    first_rows,
    n_first,
    r_tiles,
    c_split,
    max_splits,
    stride_x,
    stride_v,
    stride_s,
    stride_copy,
    DOT_TYPE: tl.constexpr,
    V_C_MAJOR: tl.constexpr,
    RANK_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """s = scale · x_scale · x vᵀ.

    With segments, each is over its own columns and to its own ranks. The sum over x's columns is
    cut into pieces of c_split columns where there are slabs.
    """
    i_m0, m_end, in_second = row_range(tl.program_id(0), n_first, first_rows, M, BLOCK_M)
    i_m0 = i_m0.to(tl.int64)
    i_seg = tl.program_id(1) // r_tiles
    i_r0 = (tl.program_id(1) % r_tiles) * BLOCK_R
    i_split = tl.program_id(2)
    c_begin, c_end, r_begin, n_rank = segment(p_seg, i_seg, C, R, RANK_UNIT)
    n_splits = tl.maximum(tl.cdiv(c_end - c_begin, c_split), 1)
    # a short segment is cut less often than the longest
    if i_split >= n_splits:
        return
    if p_second_v is not None:
        p_v = tl.where(in_second, p_second_v, p_v)
        if p_scale is not None:
            p_scale = tl.where(in_second, p_second_scale, p_scale)

    i_c0 = c_begin + i_split * c_split
    c_len = tl.minimum(c_end - i_c0, c_split)
    o_m = tl.arange(0, BLOCK_M)
    o_c = tl.arange(0, BLOCK_N)
    o_r = i_r0 + tl.arange(0, BLOCK_R)
    m_m = i_m0 + o_m < m_end
    m_r = o_r < n_rank

    p_x += i_m0 * stride_x + i_c0
    o_x = o_m[:, None] * stride_x + o_c[None, :]
    if V_C_MAJOR:
        p_v += i_c0
        o_v = o_r[None, :] * stride_v + o_c[:, None]
    else:
        stride_v = multiple(stride_v, RANK_UNIT)
        p_v += i_c0.to(tl.int64) * stride_v
        o_v = o_c[:, None] * stride_v + o_r[None, :]
    b_s = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for i_c in range(0, c_len, BLOCK_N):
        m_c = o_c < c_len - i_c
        b_x = tl.load(p_x + o_x, mask=m_m[:, None] & m_c[None, :], other=0.0)
        b_v = tl.load(p_v + o_v, mask=m_c[:, None] & m_r[None, :], other=0.0)
        b_s = tl.dot(b_x.to(DOT_TYPE), b_v.to(DOT_TYPE), b_s, input_precision="ieee")
        p_x += BLOCK_N
        p_v += BLOCK_N if V_C_MAJOR else BLOCK_N * stride_v

    m_s = m_m[:, None] & m_r[None, :]
    if p_slabs is not None:
        i_sum = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        p_slabs += i_sum.to(tl.int64) * max_splits * (BLOCK_M * BLOCK_R)
        b_s, is_last = add_splits(b_s, p_slabs, p_semaphores + i_sum, i_split, n_splits)
        m_s &= is_last
    if p_x_scale is not None:
        b_s *= tl.load(p_x_scale + i_m0 + o_m, mask=m_m, other=0.0)[:, None]
    if p_scale is not None:
        b_s *= tl.load(p_scale + r_begin + o_r, mask=m_r, other=0.0)[None, :]
    stride_s = multiple(stride_s, RANK_UNIT)
    p_s += i_m0 * stride_s + r_begin
    b_s = b_s.to(p_s.dtype.element_ty)
    tl.store(p_s + o_m[:, None] * stride_s + o_r[None, :], b_s, mask=m_s)
    if p_copy is not None:
        stride_copy = multiple(stride_copy, RANK_UNIT)
        p_copy += i_m0 * stride_copy + r_begin
        tl.store(p_copy + o_m[:, None] * stride_copy + o_r[None, :], b_s, mask=m_s)


@triton.jit(do_not_specialize=["M", "first_rows", "n_first"])
def lora_outer_kernel(
    p_x,
    p_u,
    p_g,
    p_x_scale,
    p_seg,
    p_second_g,
    p_slabs,
    p_semaphores,
    M,
    N,
    R,
    first_rows,
    n_first,
    n_seg,
    m_split,
    stride_x,
    stride_u,
    stride_g,
    DOT_TYPE: tl.constexpr,
    G_TRANSPOSED: tl.constexpr,
    RANK_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """g [N, R] (or its transpose) = xᵀ (x_scale · u), computed as (x_scale · u)ᵀ x.

    So x is read in the order in which tensor cores want it, and copied to shared memory ahead. With
    segments, u's columns are those of x's segment. The sum over the rows of a part is cut into
    ranges of m_split rows.
    """
    i_n = tl.program_id(0)
    i_range = tl.program_id(2)
    if p_seg is not None:
        n_begin, n_end, r_begin, n_rank = segment_tile(p_seg, n_seg, i_n, BLOCK_N)
        r_begin = multiple(r_begin, RANK_UNIT)
    else:
        n_begin, n_end, r_begin, n_rank = i_n * BLOCK_N, N, 0, R
    n_rank = multiple(n_rank, RANK_UNIT)
    i_m0, m_end, in_second = row_range(i_range, n_first, first_rows, M, m_split)
    m_len = tl.minimum(m_end - i_m0, m_split)
    i_n0 = n_begin.to(tl.int64)
    i_m0 = i_m0.to(tl.int64)
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_n = n_begin + o_n < n_end
    m_r = o_r < n_rank

    stride_u = multiple(stride_u, RANK_UNIT)
    p_x += i_m0 * stride_x + i_n0
    p_u += i_m0 * stride_u + r_begin
    o_x = o_m[:, None] * stride_x + o_n[None, :]
    o_u = o_r[:, None] + o_m[None, :] * stride_u
    if p_x_scale is not None:
        p_x_scale += i_m0
    b_g = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    for i_m in range(0, m_len, BLOCK_M):
        m_m = o_m < m_len - i_m
        b_x = tl.load(p_x + o_x, mask=m_m[:, None] & m_n[None, :], other=0.0).to(DOT_TYPE)
        b_u = tl.load(p_u + o_u, mask=m_r[:, None] & m_m[None, :], other=0.0)
        if p_x_scale is not None:
            b_u = b_u.to(tl.float32) * tl.load(p_x_scale + o_m, mask=m_m, other=0.0)[None, :]
            p_x_scale += BLOCK_M
        b_g = tl.dot(b_u.to(DOT_TYPE), b_x, b_g, input_precision="ieee")
        p_x += BLOCK_M * stride_x
        p_u += BLOCK_M * stride_u

    # ranks that this segment lacks are written too, as zeros
    m_g = (o_r < R)[:, None] & m_n[None, :]
    if p_slabs is not None:
        # the slabs of the first part's sum lie before those of the second's
        n_tiles, n_ranges = tl.num_programs(0) * tl.num_programs(1), tl.num_programs(2)
        n_splits = tl.where(in_second, n_ranges - n_first, n_first)
        i_split = tl.where(in_second, i_range - n_first, i_range)
        i_tile = tl.program_id(1) * tl.num_programs(0) + i_n
        i_slab = i_tile * n_ranges + tl.where(in_second, n_first, 0)
        p_slabs += i_slab.to(tl.int64) * (BLOCK_N * BLOCK_R)
        p_semaphores += tl.where(in_second, n_tiles, 0) + i_tile
        b_g, is_last = add_splits(b_g, p_slabs, p_semaphores, i_split, n_splits)
        m_g &= is_last
    if p_second_g is not None:
        p_g = tl.where(in_second, p_second_g, p_g)
    if G_TRANSPOSED:
        p_g += i_n0
        o_g = o_r[:, None] * stride_g + o_n[None, :]
    else:
        stride_g = multiple(stride_g, RANK_UNIT)
        p_g += i_n0 * stride_g
        o_g = o_r[:, None] + o_n[None, :] * stride_g
    tl.store(p_g + o_g, b_g.to(p_g.dtype.element_ty), mask=m_g)


# launch numbers: compiled ahead of time without a spill for every target, not yet tuned on a
# device. BLOCK_N is along the columns of the large matrix; "wide" where products are taken in fp32
DOWN: dict[str, LaunchTable] = {
    "half": {
        "default": tile(32, 64, 4, 2),
        **dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_120"), tile(32, 128, 4, 3)),
        "sm_90": tile(64, 128, 4, 3),
    },
    "wide": {"default": tile(32, 32, 4, 2)},
}
OUTER: dict[str, LaunchTable] = {
    "half": {
        "default": tile(32, 64, 4, 2),
        **dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_120"), tile(64, 64, 4, 3)),
        "sm_90": tile(64, 128, 4, 4),
        "gfx942": tile(32, 128, 8, 2),
    },
    "wide": {"default": tile(16, 32, 8, 2)},
}


class SecondDown(NamedTuple):
    """A second part of x's rows, from row `rows` on, with a v and a scale of its own."""

    rows: int
    v: Tensor
    scale: Tensor | None = None


class SecondOuter(NamedTuple):
    """A second part of x's rows, from row `rows` on, whose product with u is a `g` of its own."""

    rows: int
    g: Tensor


def lora_down(
    x: Tensor,
    v: Tensor,
    s: Tensor,
    *,
    scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    segments: Segments | None = None,
    second: SecondDown | None = None,
    copy: Tensor | None = None,
    numbers: Mapping[str, int] | None = None,
) -> Tensor:
    """s = scale · x_scale · x vᵀ [M, R], written to `s`, whose rows may lie any distance apart.

    It is written to `copy` as well, where that is given: a tensor like s but for its strides.

    Forward, x is the input [M, K], v is A [Σ ranks, K], and s is s. Backward, x is dy [M, N], v is
    B.T [max ranks, N], and s is dS; `segments` says which columns and ranks each linear has. x is a
    float, or int8 / e4m3 with x_scale [M] fp32; scale [Σ ranks] fp32. Sums are fp32. With `second`,
    the rows from `second.rows` on meet its v and scale; these are like the first part's in dtype,
    shape and strides, else ValueError is raised.
    """
    check_rows("lora_down", x=x, x_scale=x_scale, scale=scale, s=s, copy=copy)
    assert copy is None or (copy.shape == s.shape and copy.dtype == s.dtype)
    (m, _), (rank, c) = x.shape, v.shape
    second_row, second_v, second_scale = (None, None, None) if second is None else second
    rows = first_rows("lora_down", m, second_row)
    if second is not None:
        check_alike("lora_down", v, second_v)
        check_alike("lora_down", scale, second_scale)
    if s.numel() == 0:
        return s
    product = product_type(x, v, s.dtype)
    chosen = launch_row(DOWN, product, rank, x, numbers)
    block_m, block_r = chosen["BLOCK_M"], chosen["BLOCK_R"]
    v_c_major, stride_v = order_of("lora_down", v)
    stride_copy = 0 if copy is None else copy.stride(0)
    unit = rank_unit(rank, segments, s.stride(0), stride_copy, 0 if v_c_major else stride_v)
    seg, longest, n_seg = (
        (None, c, 1)
        if segments is None
        else (segments.table, max(segments.outs), len(segments.outs))
    )
    n_first, r_tiles = cdiv(rows, block_m), cdiv(rank, block_r)
    grid = (n_first + cdiv(m - rows, block_m), n_seg * r_tiles)
    sums = grid[0] * grid[1]
    splits, c_split = split(longest, chosen["BLOCK_N"], sums, x.device)
    launch(
        lora_down_kernel, (*grid, splits),
        x, v, s, copy, x_scale, scale, seg, second_v, second_scale,
        *workspace(sums, sums * splits, block_m, block_r, x.device),
        m, c, rank, rows, n_first, r_tiles, c_split, splits,
        x.stride(0), stride_v, s.stride(0), stride_copy,
        DOT_TYPE=product, V_C_MAJOR=v_c_major, RANK_UNIT=unit, **chosen,
    )  # fmt: skip
    return s


def lora_outer(
    x: Tensor,
    u: Tensor,
    g: Tensor,
    *,
    x_scale: Tensor | None = None,
    segments: Segments | None = None,
    transposed: bool = False,
    second: SecondOuter | None = None,
    numbers: Mapping[str, int] | None = None,
) -> Tensor:
    """g = xᵀ (x_scale · u) [N, R], or [R, N] if `transposed`, written to `g`.

    dB is that of x = dy [M, N] and u = s; `segments` says which columns and ranks each linear has,
    and the spare columns of one with fewer ranks than the widest are zero. dA is that of x [M, K]
    and u = dS, transposed. The rows of g may lie any distance apart. Sums are fp32. With `second`,
    the sum of the rows from `second.rows` on is written to `second.g` instead; it is like g in
    dtype, shape and strides, else ValueError is raised.
    """
    check_rows("lora_outer", x=x, u=u, g=g, x_scale=x_scale)
    (m, n), rank = x.shape, g.shape[0 if transposed else 1]
    second_row, second_g = (None, None) if second is None else second
    rows = first_rows("lora_outer", m, second_row)
    if second is not None:
        check_alike("lora_outer", g, second_g)
    if g.numel() == 0:
        return g
    product = product_type(x, u, u.dtype)
    chosen = launch_row(OUTER, product, rank, x, numbers)
    block_n, block_r = chosen["BLOCK_N"], chosen["BLOCK_R"]
    n_tiles = (
        cdiv(n, block_n) if segments is None else sum(cdiv(outs, block_n) for outs in segments.outs)
    )
    tiles = n_tiles * cdiv(rank, block_r)
    _, m_split = split(m, chosen["BLOCK_M"], tiles, x.device)
    n_first, n_ranges = row_ranges(m, rows, m_split, second is not None)
    sums = tiles if second is None else 2 * tiles
    unit = rank_unit(rank, segments, u.stride(0), 0 if transposed else g.stride(0))
    n_seg, seg = (0, None) if segments is None else (len(segments.outs), segments.table)
    launch(
        lora_outer_kernel, (n_tiles, cdiv(rank, block_r), n_ranges),
        x, u, g, x_scale, seg, second_g,
        *workspace(sums, tiles * n_ranges, block_n, block_r, x.device),
        m, n, rank, rows, n_first, n_seg, m_split, x.stride(0), u.stride(0), g.stride(0),
        DOT_TYPE=product, G_TRANSPOSED=transposed, RANK_UNIT=unit, **chosen,
    )  # fmt: skip
    return g


def aot_cases() -> Iterator[AotCase]:
    """What `fluxfast-bench aot` compiles of this op: launches at FLUX.1's sizes."""
    meta = partial(torch.empty, device="meta")
    # a single block's two linears: QKV and the MLP's first in one, and the last one over both
    m, d, n_out = 4608, 3072, 15360
    outs = (d, d, d, 4 * d)
    n = sum(outs)
    for name, dtype, ranks in (
        ("bf16", torch.bfloat16, (16, 64, 128)),
        ("fp16", torch.float16, (16,)),
        ("fp32", torch.float32, (16, 64)),
    ):
        one = partial(meta, dtype=dtype)
        x, x_out, w, w_out, dy = one(m, d), one(m, n_out), one(n, d), one(d, n_out), one(m, n)
        yield f"{name}-fwd", partial(matmul, x_out, w_out, bias=one(d)), EVERY_TARGET
        yield (
            f"{name}-dgrad",
            partial(matmul, x, w_out.T, out=x_out, accumulate=True),
            EVERY_TARGET,
        )
        for rank in ranks:
            segments, total = make_segments(outs, (rank,) * 4, "meta"), 4 * rank
            s, a, b, scale = one(m, total), one(total, d), one(n, rank), meta(total)
            fwd = partial(matmul, x, w, bias=one(n), u=s, v=b, segments=segments)
            yield f"{name}-fwd-r{rank}", fwd, EVERY_TARGET
            dgrad = partial(matmul, dy, w.T, u=s, v=a.T)
            yield f"{name}-dgrad-r{rank}", dgrad, EVERY_TARGET
            yield f"{name}-s-r{rank}", partial(lora_down, x, a, s, scale=scale), EVERY_TARGET
            # x with room behind each row, to which s is written too
            wide = one(m, d + total)
            roomy = partial(lora_down, wide[:, :d], a, s, scale=scale, copy=wide[:, d:])
            yield f"{name}-s-room-r{rank}", roomy, EVERY_TARGET
            yield (
                f"{name}-ds-r{rank}",
                partial(lora_down, dy, b.T, s, scale=scale, segments=segments),
                EVERY_TARGET,
            )
            yield (
                f"{name}-db-r{rank}",
                partial(lora_outer, dy, s, meta(n, rank), segments=segments),
                EVERY_TARGET,
            )
            yield (
                f"{name}-da-r{rank}",
                partial(lora_outer, x, s, meta(total, d), transposed=True),
                EVERY_TARGET,
            )
    # few tokens, so that sums are cut, and x as codes
    xq, x_scale, a, s = meta(512, d, dtype=torch.int8), meta(512), one(16, d), one(512, 16)
    yield (
        "int8-s-r16",
        partial(lora_down, xq, a, one(512, 16, dtype=torch.bfloat16), x_scale=x_scale),
        EVERY_TARGET,
    )
    yield (
        "int8-da-r16",
        partial(lora_outer, xq, s.bfloat16(), meta(16, d), x_scale=x_scale, transposed=True),
        EVERY_TARGET,
    )
