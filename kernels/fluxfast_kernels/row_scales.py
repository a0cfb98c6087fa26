"""Weight decomposition of linears with LoRA (DoRA): norms of rows, and what follows from them.

    ν[n] = ‖W[n] + scale · (B A)[n]‖        g[n] = magnitude[n] / ν[n]

`row_scales` reads W once, where it lies, and forms W + scale · B A tile by tile in registers. It
also gives g B, which takes the place of B in products whose rows have the scale g. `column_dots` is
what magnitude's gradient is made of. Source: DoRA, arXiv 2402.09353.
"""

from collections.abc import Iterator, Mapping
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels.aot import EVERY_TARGET, AotCase
from fluxfast_kernels.launch import LaunchTable, cdiv, launch, launch_numbers
from fluxfast_kernels.matmul import dot_type, rank_block
from fluxfast_kernels.row_quant import check_rows
from fluxfast_kernels.slabs import add_splits, split, workspace

# a norm that is smaller is taken to be this
TINY = tl.constexpr(1e-15)


@triton.jit
def row_scales_kernel(
    p_w,
    p_w_scale,
    p_a,
    p_b,
    p_magnitude,
    p_norms,
    p_g,
    p_gb,
    N,
    K,
    R,
    scale,
    stride_w,
    stride_a,
    stride_b,
    DOT_TYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Without p_w, the norms are there already."""
    i_n0 = (tl.program_id(0) * BLOCK_N).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_n = i_n0 + o_n < N
    if p_w is not None:
        p_w += i_n0 * stride_w + o_n[:, None] * stride_w + o_k[None, :]
        b_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for i_k in range(0, K, BLOCK_K):
            m_k = o_k < K - i_k
            b_w = tl.load(p_w, mask=m_n[:, None] & m_k[None, :], other=0.0).to(tl.float32)
            if p_w_scale is not None:
                b_w *= tl.load(p_w_scale + i_n0 + o_n, mask=m_n, other=0.0)[:, None]
            b_change = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
            for i_r in range(0, R, BLOCK_R):
                o_r = i_r + tl.arange(0, BLOCK_R)
                m_r = o_r < R
                b_b = tl.load(
                    p_b + i_n0 * stride_b + o_n[:, None] * stride_b + o_r[None, :],
                    mask=m_n[:, None] & m_r[None, :],
                    other=0.0,
                )
                b_a = tl.load(
                    p_a + o_r[:, None] * stride_a + (i_k + o_k)[None, :],
                    mask=m_r[:, None] & m_k[None, :],
                    other=0.0,
                )
                b_change = tl.dot(
                    b_b.to(DOT_TYPE), b_a.to(DOT_TYPE), b_change, input_precision="ieee"
                )
            b_w += scale * b_change
            b_sum += tl.sum(b_w * b_w, axis=1)
            p_w += BLOCK_K
        b_norms = tl.maximum(tl.sqrt(b_sum), TINY)
        tl.store(p_norms + i_n0 + o_n, b_norms, mask=m_n)
    else:
        b_norms = tl.load(p_norms + i_n0 + o_n, mask=m_n, other=1.0)
    b_g = tl.load(p_magnitude + i_n0 + o_n, mask=m_n, other=0.0).to(tl.float32) / b_norms
    tl.store(p_g + i_n0 + o_n, b_g, mask=m_n)
    for i_r in range(0, R, BLOCK_R):
        o_r = i_r + tl.arange(0, BLOCK_R)
        m_b = m_n[:, None] & (o_r < R)[None, :]
        b_b = tl.load(
            p_b + i_n0 * stride_b + o_n[:, None] * stride_b + o_r[None, :], mask=m_b, other=0.0
        )
        b_b = b_b.to(tl.float32) * b_g[:, None]
        p_out = p_gb + i_n0 * R + o_n[:, None] * R + o_r[None, :]
        tl.store(p_out, b_b.to(p_gb.dtype.element_ty), mask=m_b)


@triton.jit(do_not_specialize=["M", "m_split"])
def column_dots_kernel(
    p_x,
    p_y,
    p_dots,
    p_slabs,
    p_semaphores,
    M,
    N,
    m_split,
    stride_x,
    stride_y,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dots [N] = Σ x y over the rows."""
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    m_begin = tl.program_id(1) * m_split
    m_len = tl.minimum(M - m_begin, m_split)
    i_m0 = m_begin.to(tl.int64)
    p_x += i_m0 * stride_x + o_m[:, None] * stride_x + o_n[None, :]
    p_y += i_m0 * stride_y + o_m[:, None] * stride_y + o_n[None, :]
    b_dots = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for i_m in range(0, m_len, BLOCK_M):
        mask = (o_m < m_len - i_m)[:, None] & m_n[None, :]
        b_x = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
        b_dots += b_x * tl.load(p_y, mask=mask, other=0.0).to(tl.float32)
        p_x += BLOCK_M * stride_x
        p_y += BLOCK_M * stride_y
    b_sum = tl.sum(b_dots, axis=0)[None, :]
    if p_slabs is not None:
        n_splits = tl.num_programs(1)
        p_slabs += tl.program_id(0).to(tl.int64) * n_splits * BLOCK_N
        b_sum, is_last = add_splits(
            b_sum, p_slabs, p_semaphores + tl.program_id(0), tl.program_id(1), n_splits
        )
        m_n &= is_last
    tl.store(p_dots + o_n[None, :], b_sum, mask=m_n[None, :])


# launch numbers: compiled ahead of time without a spill for every target, not yet tuned on a device
SCALES: LaunchTable = {
    "default": {"BLOCK_N": 16, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2},
}
DOTS: LaunchTable = {
    "default": {"BLOCK_M": 16, "BLOCK_N": 128, "num_warps": 4, "num_stages": 2},
}


def row_scales(
    w: Tensor | None,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    norms: Tensor,
    *,
    scale: float,
    w_scale: Tensor | None = None,
    dtype: torch.dtype,
    numbers: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """g [N] fp32, and g B [N, R] in `dtype`.

    w [N, K] is a float, or codes with w_scale [N] fp32; norms [N] fp32 is written. Where w is None,
    norms is read instead. a [R, K], b [N, R] and magnitude [N] are floats. Rows are contiguous and
    may lie any distance apart. The products of B A are taken in `dtype`, sums in fp32.
    """
    (n, r), k = b.shape, a.shape[1]
    check_rows("row_scales", w=w, a=a, b=b, magnitude=magnitude, norms=norms, w_scale=w_scale)
    assert a.shape == (r, k) and magnitude.shape == norms.shape == (n,)
    assert w is None or (w.shape == (n, k) and (w_scale is None) == (w.itemsize > 1))
    g = torch.empty(n, dtype=torch.float32, device=b.device)
    gb = torch.empty(n, r, dtype=dtype, device=b.device)
    chosen = {**launch_numbers(SCALES, b.device), **(numbers or {})}
    if n:
        launch(
            row_scales_kernel, (cdiv(n, chosen["BLOCK_N"]),),
            w, w_scale, a, b, magnitude, norms, g, gb, n, k, r, float(scale),
            0 if w is None else w.stride(0), a.stride(0), b.stride(0),
            DOT_TYPE=dot_type(dtype), BLOCK_R=rank_block(r, 64), **chosen,
        )  # fmt: skip
    return g, gb


def column_dots(x: Tensor, y: Tensor, *, numbers: Mapping[str, int] | None = None) -> Tensor:
    """Σ over the rows of x y [M, N], as [N] fp32; rows may lie any distance apart."""
    check_rows("column_dots", x=x, y=y)
    assert x.shape == y.shape
    m, n = x.shape
    dots = torch.empty(n, dtype=torch.float32, device=x.device)
    chosen = {**launch_numbers(DOTS, x.device), **(numbers or {})}
    tiles = cdiv(n, chosen["BLOCK_N"])
    if n:
        splits, m_split = split(m, chosen["BLOCK_M"], tiles, x.device)
        launch(
            column_dots_kernel, (tiles, splits), x, y, dots,
            *workspace(tiles, tiles * splits, 1, chosen["BLOCK_N"], x.device),
            m, n, m_split, x.stride(0), y.stride(0), **chosen,
        )  # fmt: skip
    return dots


def aot_cases() -> Iterator[AotCase]:
    """What `fluxfast-bench aot` compiles of this op: launches at FLUX.1's sizes."""
    meta = partial(torch.empty, device="meta")
    n, k, r = 12288, 3072, 16
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        a, b, m = meta(r, k), meta(n, r), meta(n)
        by = partial(row_scales, scale=0.5, dtype=dtype)
        yield f"{name}-norms", partial(by, meta(n, k, dtype=dtype), a, b, m, m), EVERY_TARGET
        yield f"{name}-scales", partial(by, None, a, b, m, m), EVERY_TARGET
        x = meta(4608, n, dtype=dtype)
        yield f"{name}-dots", partial(column_dots, x, x), EVERY_TARGET
    codes, a, b, m = meta(n, k, dtype=torch.int8), meta(64, k), meta(n, 64), meta(n)
    norms = partial(row_scales, codes, a, b, m, m, scale=0.5, w_scale=m, dtype=torch.bfloat16)
    yield "int8-norms-r64", norms, EVERY_TARGET
