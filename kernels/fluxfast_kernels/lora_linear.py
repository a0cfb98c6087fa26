"""The low-rank products of linears with LoRA: y = x Wᵀ + b + s Bᵀ, where s = scale · x Aᵀ.

Everything narrow is packed over the group of linears that share x: A [Σ ranks, K] of all LoRAs,
their s and dS [M, Σ ranks], and B [N, max ranks], each linear's LoRAs side by side in its own rows.
`scale` is folded into s and dS and never seen again:

    forward    s  = scale · x Aᵀ            y  = x Wᵀ + s Bᵀ + b
    backward   dS = scale · dy B            dx = dy W + dS A
               dB = dyᵀ s                   dA = dSᵀ x

`matmul.matmul` has the wide products y and dx, and adds the narrow ones s Bᵀ and dS A in its
epilogue. The other four are here: s and dS are `lora_down`, dB and dA are `lora_outer`. Each reads
a large matrix once to make a small one, so it is cut along the sum until the device is busy
(`slabs`), reproducibly.
"""

from collections.abc import Iterator, Mapping
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels.aot import EVERY_TARGET, AotCase
from fluxfast_kernels.launch import LaunchTable, cdiv, launch, launch_numbers
from fluxfast_kernels.matmul import (
    SEGMENT_UNIT,
    Segments,
    make_segments,
    matmul,
    order_of,
    product_type,
    rank_block,
    segment_tile,
)
from fluxfast_kernels.row_quant import check_rows
from fluxfast_kernels.slabs import slabs_for, split, sum_slabs


@triton.jit(do_not_specialize=["M"])
def lora_down_kernel(
    p_x,
    p_v,
    p_s,
    p_x_scale,
    p_scale,
    p_seg,
    M,
    C,
    R,
    r_tiles,
    c_split,
    stride_x,
    stride_v,
    stride_s,
    stride_s_split,
    DOT_TYPE: tl.constexpr,
    V_C_MAJOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """s = scale · x_scale · x vᵀ over c_split columns of x.

    With segments, each is over its own columns and to its own ranks.
    """
    i_m0 = tl.program_id(0).to(tl.int64) * BLOCK_M
    i_seg = tl.program_id(1) // r_tiles
    i_r0 = (tl.program_id(1) % r_tiles) * BLOCK_R
    i_split = tl.program_id(2)
    c_begin, c_end, r_begin, n_rank = 0, C, 0, R
    if p_seg is not None:
        c_begin = tl.load(p_seg + 4 * i_seg) * SEGMENT_UNIT
        c_end = tl.load(p_seg + 4 * i_seg + 1) * SEGMENT_UNIT
        r_begin = tl.load(p_seg + 4 * i_seg + 2)
        n_rank = tl.load(p_seg + 4 * i_seg + 3)
    i_c0 = c_begin + i_split * c_split
    c_len = tl.minimum(c_end - i_c0, c_split)
    o_m = tl.arange(0, BLOCK_M)
    o_c = tl.arange(0, BLOCK_N)
    o_r = i_r0 + tl.arange(0, BLOCK_R)
    m_m = i_m0 + o_m < M
    m_r = o_r < n_rank

    p_x += i_m0 * stride_x + i_c0
    o_x = o_m[:, None] * stride_x + o_c[None, :]
    if V_C_MAJOR:
        p_v += i_c0
        o_v = o_r[None, :] * stride_v + o_c[:, None]
    else:
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

    if p_x_scale is not None:
        b_s *= tl.load(p_x_scale + i_m0 + o_m, mask=m_m, other=0.0)[:, None]
    if p_scale is not None:
        b_s *= tl.load(p_scale + r_begin + o_r, mask=m_r, other=0.0)[None, :]
    p_s += i_m0 * stride_s + r_begin + i_split.to(tl.int64) * stride_s_split
    tl.store(
        p_s + o_m[:, None] * stride_s + o_r[None, :],
        b_s.to(p_s.dtype.element_ty),
        mask=m_m[:, None] & m_r[None, :],
    )


@triton.jit(do_not_specialize=["M"])
def lora_outer_kernel(
    p_x,
    p_u,
    p_g,
    p_x_scale,
    p_seg,
    M,
    N,
    R,
    n_seg,
    m_split,
    stride_x,
    stride_u,
    stride_g,
    stride_g_split,
    DOT_TYPE: tl.constexpr,
    G_TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """g [N, R] (or its transpose) = xᵀ (x_scale · u) over m_split rows.

    With segments, u's columns are those of x's segment.
    """
    i_n = tl.program_id(0)
    i_split = tl.program_id(2).to(tl.int64)
    if p_seg is not None:
        n_begin, n_end, r_begin, n_rank = segment_tile(p_seg, n_seg, i_n, BLOCK_N)
    else:
        n_begin, n_end, r_begin, n_rank = i_n * BLOCK_N, N, 0, R
    i_n0 = n_begin.to(tl.int64)
    i_m0 = i_split * m_split
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_n = n_begin + o_n < n_end
    m_r = o_r < n_rank

    p_x += i_m0 * stride_x + i_n0
    p_u += i_m0 * stride_u + r_begin
    o_x = o_m[:, None] * stride_x + o_n[None, :]
    o_u = o_m[:, None] * stride_u + o_r[None, :]
    if p_x_scale is not None:
        p_x_scale += i_m0
    m_len = tl.minimum(M - i_m0, m_split).to(tl.int32)
    b_g = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for i_m in range(0, m_len, BLOCK_M):
        m_m = o_m < m_len - i_m
        b_x = tl.load(p_x + o_x, mask=m_m[:, None] & m_n[None, :], other=0.0).to(DOT_TYPE)
        b_u = tl.load(p_u + o_u, mask=m_m[:, None] & m_r[None, :], other=0.0)
        if p_x_scale is not None:
            b_u = b_u.to(tl.float32) * tl.load(p_x_scale + o_m, mask=m_m, other=0.0)[:, None]
            p_x_scale += BLOCK_M
        b_g = tl.dot(tl.trans(b_x), b_u.to(DOT_TYPE), b_g, input_precision="ieee")
        p_x += BLOCK_M * stride_x
        p_u += BLOCK_M * stride_u

    # ranks that this segment lacks are written too, as zeros
    m_g = m_n[:, None] & (o_r < R)[None, :]
    p_g += i_split * stride_g_split
    if G_TRANSPOSED:
        p_g += i_n0
        o_g = o_r[None, :] * stride_g + o_n[:, None]
    else:
        p_g += i_n0 * stride_g
        o_g = o_n[:, None] * stride_g + o_r[None, :]
    tl.store(p_g + o_g, b_g.to(p_g.dtype.element_ty), mask=m_g)


def _tile(m: int, n: int, num_warps: int, num_stages: int) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": num_warps, "num_stages": num_stages}


# launch numbers: compiled ahead of time without a spill for every target, not yet tuned on a
# device. BLOCK_N is along the columns of the large matrix; "wide" where products are taken in fp32
DOWN: dict[str, LaunchTable] = {
    "half": {
        "default": _tile(32, 64, 4, 2),
        **dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_120"), _tile(32, 128, 4, 3)),
        "sm_90": _tile(16, 128, 4, 4),
    },
    "wide": {"default": _tile(32, 32, 4, 2)},
}
OUTER: dict[str, LaunchTable] = {
    "half": {
        "default": _tile(32, 64, 4, 2),
        **dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_90", "sm_120"), _tile(64, 32, 4, 3)),
        "gfx942": _tile(32, 128, 8, 2),
    },
    "wide": {"default": _tile(16, 32, 8, 2)},
}


def _numbers(
    table: dict[str, LaunchTable],
    product: tl.dtype,
    rank: int,
    x: Tensor,
    numbers: Mapping[str, int] | None,
) -> dict[str, int]:
    wide = product == tl.float32
    row = launch_numbers(table["wide" if wide else "half"], x.device)
    return {**row, "BLOCK_R": rank_block(rank, 32 if wide else 64), **(numbers or {})}


def lora_down(
    x: Tensor,
    v: Tensor,
    s: Tensor,
    *,
    scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    segments: Segments | None = None,
    numbers: Mapping[str, int] | None = None,
) -> Tensor:
    """s = scale · x_scale · x vᵀ [M, R], written to `s`, whose rows may lie any distance apart.

    Forward, x is the input [M, K], v is A [Σ ranks, K], and s is s. Backward, x is dy [M, N], v is
    B.T [max ranks, N], and s is dS; `segments` says which columns and ranks each linear has. x is a
    float, or int8 / e4m3 with x_scale [M] fp32; scale [Σ ranks] fp32. Sums are fp32.
    """
    check_rows("lora_down", x=x, x_scale=x_scale, scale=scale)
    (m, _), (rank, c) = x.shape, v.shape
    if s.numel() == 0:
        return s
    product = product_type(x, v, s.dtype)
    chosen = _numbers(DOWN, product, rank, x, numbers)
    block_m, block_c, r_tiles = chosen["BLOCK_M"], chosen["BLOCK_N"], cdiv(rank, chosen["BLOCK_R"])
    v_c_major, stride_v = order_of("lora_down", v)
    seg, longest, n_seg = (
        (None, c, 1)
        if segments is None
        else (segments.table, max(segments.outs), len(segments.outs))
    )
    grid = (cdiv(m, block_m), n_seg * r_tiles)
    splits, c_split = split(longest, block_c, grid[0] * grid[1], x.device)
    target, stride_s, stride_split = slabs_for(splits, s)
    launch(
        lora_down_kernel, (*grid, splits),
        x, v, target, x_scale, scale, seg, m, c, rank, r_tiles, c_split,
        x.stride(0), stride_v, stride_s, stride_split,
        DOT_TYPE=product, V_C_MAJOR=v_c_major, **chosen,
    )  # fmt: skip
    if splits > 1:
        sum_slabs(target, s)
    return s


def lora_outer(
    x: Tensor,
    u: Tensor,
    g: Tensor,
    *,
    x_scale: Tensor | None = None,
    segments: Segments | None = None,
    transposed: bool = False,
    numbers: Mapping[str, int] | None = None,
) -> Tensor:
    """g = xᵀ (x_scale · u) [N, R], or [R, N] if `transposed`, written to `g`.

    dB is that of x = dy [M, N] and u = s; `segments` says which columns and ranks each linear has,
    and the spare columns of one with fewer ranks than the widest are zero. dA is that of x [M, K]
    and u = dS, transposed. The rows of g may lie any distance apart. Sums are fp32.
    """
    check_rows("lora_outer", x=x, u=u, x_scale=x_scale)
    (m, n), rank = x.shape, g.shape[0 if transposed else 1]
    if m == 0:
        return g.zero_()
    product = product_type(x, u, u.dtype)
    chosen = _numbers(OUTER, product, rank, x, numbers)
    block_m, block_n = chosen["BLOCK_M"], chosen["BLOCK_N"]
    n_tiles = (
        cdiv(n, block_n) if segments is None else sum(cdiv(outs, block_n) for outs in segments.outs)
    )
    grid = (n_tiles, cdiv(rank, chosen["BLOCK_R"]))
    n_seg, seg = (0, None) if segments is None else (len(segments.outs), segments.table)
    splits, m_split = split(m, block_m, grid[0] * grid[1], x.device)
    target, stride_g, stride_split = slabs_for(splits, g)
    launch(
        lora_outer_kernel, (*grid, splits),
        x, u, target, x_scale, seg, m, n, rank, n_seg, m_split,
        x.stride(0), u.stride(0), stride_g, stride_split,
        DOT_TYPE=product, G_TRANSPOSED=transposed, **chosen,
    )  # fmt: skip
    if splits > 1:
        sum_slabs(target, g)
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
            yield (
                f"{name}-dgrad-r{rank}",
                partial(matmul, dy, w.T, u=s, v=a.T),
                EVERY_TARGET,
            )
            yield f"{name}-s-r{rank}", partial(lora_down, x, a, s, scale=scale), EVERY_TARGET
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
