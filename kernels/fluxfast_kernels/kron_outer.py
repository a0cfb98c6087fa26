"""The gradient of LoKr's large factor: dw2 = scale · Σ dyᵀ (w1 x), over the rows (`kron`)."""

import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels.kron_parts import LEAST, factor, numbers_for, small_block, swap_last
from fluxfast_kernels.launch import cdiv, launch, next_pow2
from fluxfast_kernels.slabs import add_splits, split, workspace


@triton.jit(do_not_specialize=["M", "m_split"])
def kron_outer_kernel(
    p_dy,
    p_x,
    p_u,
    p_g,
    p_dy_cols,
    p_x_scale,
    p_slabs,
    p_semaphores,
    M,
    O1,
    O2,
    I1,
    I2,
    m_split,
    c_tiles,
    scale,
    stride_dy,
    stride_x,
    stride_u_o,
    stride_u_i,
    stride_g_c,
    stride_g_k,
    DOT_TYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """g [O2, I2] = scale · Σ dyᵀ (u x) over the rows, each dy [O1, O2] and each x [I1, I2]."""
    i_c0 = (tl.program_id(0) % c_tiles) * BLOCK_C
    i_k0 = (tl.program_id(0) // c_tiles) * BLOCK_K
    GROWN_I: tl.constexpr = BLOCK_I if BLOCK_I > LEAST else LEAST
    o_row = tl.arange(0, BLOCK_M * BLOCK_O)
    o_m = o_row // BLOCK_O
    o_c = i_c0 + tl.arange(0, BLOCK_C)
    o_k = i_k0 + tl.arange(0, BLOCK_K)
    o_m3 = tl.arange(0, BLOCK_M)[:, None, None]
    m_c = o_c < O2
    m_k = o_k < I2
    m_begin = tl.program_id(1) * m_split
    m_end = tl.minimum(m_begin + m_split, M)
    b_g = tl.zeros((BLOCK_C, BLOCK_K), dtype=tl.float32)
    for i_m in range(m_begin, m_end, BLOCK_M):
        i_m0 = m_begin.to(tl.int64) + (i_m - m_begin)
        for i_o in range(0, O1, BLOCK_O):
            b_ux = tl.zeros((BLOCK_M * BLOCK_K, BLOCK_O), dtype=tl.float32)
            o_o = i_o + tl.arange(0, BLOCK_O)
            for i_i in range(0, I1, BLOCK_I):
                o_i = i_i + tl.arange(0, BLOCK_I)
                m_x = (i_m + o_m3 < m_end) & (o_i < I1)[None, :, None] & m_k[None, None, :]
                o_x = o_m3 * stride_x + o_i[None, :, None] * I2 + o_k[None, None, :]
                b_x = tl.load(p_x + i_m0 * stride_x + o_x, mask=m_x, other=0.0)
                b_x = swap_last(b_x.to(DOT_TYPE), BLOCK_M, BLOCK_I, BLOCK_K)
                b_u = factor(
                    p_u + i_i * stride_u_i, I1 - i_i, O1, tl.arange(0, GROWN_I), o_o,
                    stride_u_i, stride_u_o, BLOCK_I,
                )  # fmt: skip
                b_ux = tl.dot(b_x, b_u.to(DOT_TYPE), b_ux, input_precision="ieee")
            b_ux = tl.permute(tl.reshape(b_ux, (BLOCK_M, BLOCK_K, BLOCK_O)), (0, 2, 1))
            b_ux = tl.reshape(b_ux, (BLOCK_M * BLOCK_O, BLOCK_K))
            o_j = i_o + o_row % BLOCK_O
            m_row = (i_m + o_m < m_end) & (o_j < O1)
            if p_x_scale is not None:
                b_ux *= tl.load(p_x_scale + i_m0 + o_m, mask=m_row, other=0.0)[:, None]
            m_dy = m_row[:, None] & m_c[None, :]
            o_col = o_j[:, None] * O2 + o_c[None, :]
            b_dy = tl.load(
                p_dy + i_m0 * stride_dy + o_m[:, None] * stride_dy + o_col, mask=m_dy, other=0.0
            )
            if p_dy_cols is not None:
                b_dy = b_dy.to(tl.float32) * tl.load(p_dy_cols + o_col, mask=m_dy, other=0.0)
            b_g = tl.dot(
                tl.trans(b_dy.to(DOT_TYPE)), b_ux.to(DOT_TYPE), b_g, input_precision="ieee"
            )

    b_g *= scale
    m_g = m_c[:, None] & m_k[None, :]
    if p_slabs is not None:
        n_splits = tl.num_programs(1)
        p_slabs += tl.program_id(0).to(tl.int64) * n_splits * (BLOCK_C * BLOCK_K)
        b_g, is_last = add_splits(
            b_g, p_slabs, p_semaphores + tl.program_id(0), tl.program_id(1), n_splits
        )
        m_g &= is_last
    o_g = o_c[:, None] * stride_g_c + o_k[None, :] * stride_g_k
    tl.store(p_g + o_g, b_g.to(p_g.dtype.element_ty), mask=m_g)


def kron_outer(
    dy: Tensor, x: Tensor, w1: Tensor, dw2: Tensor, product: tl.dtype, scale: float,
    x_scale: Tensor | None, dy_cols: Tensor | None,
) -> None:  # fmt: skip
    """Writes dw2 [O2, I2]; product: what it multiplies in. The others are as in `kron_backward`."""
    (m, _), (o1, i1), (o2, i2) = x.shape, w1.shape, dw2.shape
    if dw2.numel() == 0:
        return
    numbers = numbers_for(product, x)
    block_o, block_i = small_block(o1, LEAST.value), small_block(i1)
    block = (
        min(numbers["BLOCK_N"], max(next_pow2(o2), 16)),
        min(numbers["BLOCK_N"], max(next_pow2(i2), 16)),
    )
    block_m = max(numbers["ROWS"] // max(block_o, block_i, LEAST.value), 1)
    c_tiles, tiles = cdiv(o2, block[0]), cdiv(o2, block[0]) * cdiv(i2, block[1])
    splits, m_split = split(m, block_m, tiles, x.device)
    launch(
        kron_outer_kernel, (tiles, splits), dy, x, w1, dw2, dy_cols, x_scale,
        *workspace(tiles, tiles * splits, *block, x.device),
        m, o1, o2, i1, i2, m_split, c_tiles, float(scale),
        dy.stride(0), x.stride(0), *w1.stride(), *dw2.stride(),
        DOT_TYPE=product, BLOCK_M=block_m, BLOCK_O=block_o, BLOCK_C=block[0], BLOCK_K=block[1],
        BLOCK_I=block_i, num_warps=numbers["num_warps"], num_stages=numbers["num_stages"],
    )  # fmt: skip
