"""LoKr's products: y += scale · (w1 ⊗ w2) x and its gradients, which never form w1 ⊗ w2.

A row of x [I1 · I2] is read as a matrix x [I1, I2], and a row of y [O1 · O2] as y [O1, O2]. Then

    y   += w1 (x w2ᵀ)             t  = dy w2 [O1, I2]      dx += w1ᵀ t
    dw1  = Σ t xᵀ                 dw2 = Σ dyᵀ (w1 x)

all times scale, with the sums over the rows. The two products of y and those of dx are the same
ones, by transposed factors, and so one kernel: it keeps the product between them on the chip. The
one that makes dx has t at hand and makes dw1 of it. Source: LyCORIS, arXiv 2309.14859.
"""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels.aot import EVERY_TARGET, AotCase
from fluxfast_kernels.kron_outer import kron_outer
from fluxfast_kernels.kron_parts import LEAST, MOST, factor, numbers_for, small_block, swap_last
from fluxfast_kernels.launch import cdiv, launch, next_pow2
from fluxfast_kernels.matmul import order_of, product_type
from fluxfast_kernels.row_quant import check_rows
from fluxfast_kernels.slabs import add_splits, split, workspace


@triton.jit(do_not_specialize=["M", "m_split"])
def kron_kernel(
    p_a,
    p_u,
    p_v,
    p_y,
    p_a_scale,
    p_a_cols,
    p_y_cols,
    p_x,
    p_x_scale,
    p_du,
    p_slabs,
    p_semaphores,
    M,
    P,
    Q,
    R,
    S,
    m_split,
    q_tiles,
    scale,
    stride_a,
    stride_u_s,
    stride_u_p,
    stride_v,
    stride_y,
    stride_x,
    stride_du_p,
    stride_du_s,
    DOT_TYPE: tl.constexpr,
    V_R_MAJOR: tl.constexpr,
    P_LOOP: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """y [M, S, Q] += u t, and du = Σ t xᵀ, with t = scale · a vᵀ [M, P, Q] of a [M, P, R].

    Either result may be absent. Without ACCUMULATE, y is written and not read. P_LOOP: a program
    takes all of P for its part of y, else one block of it, which it needs to be for du.
    """
    i_range = tl.program_id(0) // q_tiles
    i_q0 = (tl.program_id(0) % q_tiles) * BLOCK_Q
    i_s0 = tl.program_id(1) * BLOCK_S
    GROWN_P: tl.constexpr = BLOCK_P if BLOCK_P > LEAST else LEAST
    o_row = tl.arange(0, BLOCK_M * BLOCK_P)
    o_q = i_q0 + tl.arange(0, BLOCK_Q)
    o_r = tl.arange(0, BLOCK_R)
    o_s = i_s0 + tl.arange(0, BLOCK_S)
    m_q = o_q < Q
    p_begin = 0 if P_LOOP else tl.program_id(2) * BLOCK_P
    p_end = P if P_LOOP else p_begin + 1
    m_begin = i_range * m_split
    m_end = tl.minimum(m_begin + m_split, M)
    b_du = tl.zeros((GROWN_P, BLOCK_S), dtype=tl.float32)
    for i_m in range(m_begin, m_end, BLOCK_M):
        # 64-bit offsets to the rows, 32-bit ones within them
        i_m0 = m_begin.to(tl.int64) + (i_m - m_begin)
        o_m = o_row // BLOCK_P
        b_y = tl.zeros((BLOCK_M * BLOCK_Q, BLOCK_S), dtype=tl.float32)
        for i_p in range(p_begin, p_end, BLOCK_P):
            o_p = i_p + o_row % BLOCK_P
            m_row = (i_m + o_m < m_end) & (o_p < P)
            b_t = tl.zeros((BLOCK_M * BLOCK_P, BLOCK_Q), dtype=tl.float32)
            for i_r in range(0, R, BLOCK_R):
                m_r = i_r + o_r < R
                m_a = m_row[:, None] & m_r[None, :]
                o_col = o_p[:, None] * R + (i_r + o_r)[None, :]
                b_a = tl.load(
                    p_a + i_m0 * stride_a + o_m[:, None] * stride_a + o_col, mask=m_a, other=0.0
                )
                if p_a_cols is not None:
                    b_a = b_a.to(tl.float32) * tl.load(p_a_cols + o_col, mask=m_a, other=0.0)
                if V_R_MAJOR:
                    o_v = o_q[None, :] * stride_v + (i_r + o_r)[:, None]
                else:
                    o_v = (i_r + o_r)[:, None] * stride_v + o_q[None, :]
                b_v = tl.load(p_v + o_v, mask=m_r[:, None] & m_q[None, :], other=0.0)
                b_t = tl.dot(b_a.to(DOT_TYPE), b_v.to(DOT_TYPE), b_t, input_precision="ieee")
            b_t *= scale
            if p_a_scale is not None:
                b_t *= tl.load(p_a_scale + i_m0 + o_m, mask=m_row, other=0.0)[:, None]
            b_t = swap_last(b_t.to(DOT_TYPE), BLOCK_M, BLOCK_P, BLOCK_Q)
            if p_y is not None:
                o_grown = tl.arange(0, GROWN_P)
                b_u = factor(
                    p_u + i_p * stride_u_p,
                    P - i_p,
                    S,
                    o_grown,
                    o_s,
                    stride_u_p,
                    stride_u_s,
                    BLOCK_P,
                )
                b_y = tl.dot(b_t, b_u.to(DOT_TYPE), b_y, input_precision="ieee")
            if p_du is not None:
                # du is of this one block of P
                o_m3 = tl.arange(0, BLOCK_M)[:, None, None]
                m_x = (i_m + o_m3 < m_end) & m_q[None, None, :] & (o_s < S)[None, :, None]
                o_x = o_m3 * stride_x + o_s[None, :, None] * Q + o_q[None, None, :]
                b_x = tl.load(p_x + i_m0 * stride_x + o_x, mask=m_x, other=0.0)
                if p_x_scale is not None:
                    b_x = b_x.to(tl.float32) * tl.load(
                        p_x_scale + i_m0 + o_m3, mask=i_m + o_m3 < m_end, other=0.0
                    )
                b_x = swap_last(b_x.to(DOT_TYPE), BLOCK_M, BLOCK_S, BLOCK_Q)
                b_du = tl.dot(tl.trans(b_t), b_x, b_du, input_precision="ieee")
        if p_y is not None:
            b_y3 = tl.permute(tl.reshape(b_y, (BLOCK_M, BLOCK_Q, BLOCK_S)), (0, 2, 1))
            o_m3 = tl.arange(0, BLOCK_M)[:, None, None]
            o_col3 = o_s[None, :, None] * Q + o_q[None, None, :]
            m_y = (i_m + o_m3 < m_end) & (o_s < S)[None, :, None] & m_q[None, None, :]
            if p_y_cols is not None:
                b_y3 *= tl.load(
                    p_y_cols + o_col3, mask=(o_s < S)[None, :, None] & m_q[None, None, :], other=0.0
                )
            p_out = p_y + i_m0 * stride_y + (o_m3 * stride_y + o_col3)
            if ACCUMULATE:
                b_y3 += tl.load(p_out, mask=m_y, other=0.0).to(tl.float32)
            tl.store(p_out, b_y3.to(p_y.dtype.element_ty), mask=m_y)

    if p_du is not None:
        STEP: tl.constexpr = GROWN_P // BLOCK_P
        o_g = tl.arange(0, GROWN_P)
        o_p0 = p_begin + o_g // STEP
        m_du = ((o_g % STEP == 0) & (o_p0 < P))[:, None] & (o_s < S)[None, :]
        if p_slabs is not None:
            i_sum = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
            n_splits = tl.num_programs(0)
            p_slabs += i_sum.to(tl.int64) * n_splits * (GROWN_P * BLOCK_S)
            b_du, is_last = add_splits(
                b_du, p_slabs, p_semaphores + i_sum, tl.program_id(0), n_splits
            )
            m_du &= is_last
        o_du = o_p0[:, None] * stride_du_p + o_s[None, :] * stride_du_s
        tl.store(p_du + o_du, b_du.to(p_du.dtype.element_ty), mask=m_du)


def kron_add(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    y: Tensor,
    *,
    scale: float = 1.0,
    x_scale: Tensor | None = None,
    x_cols: Tensor | None = None,
    y_cols: Tensor | None = None,
) -> Tensor:
    """y += y_cols · scale · x_scale · (w1 ⊗ w2) (x_cols · x), in place, from fp32 sums.

    x [M, I1 · I2] and y [M, O1 · O2] have contiguous rows, which may lie any distance apart. w1
    [O1, I1] may have any strides, w2 [O2, I2] has either dimension contiguous. x is a float, or
    codes with x_scale [M] fp32; x_cols [I1 · I2] and y_cols [O1 · O2] fp32.
    """
    _launch(x, w1, w2, y, None, None, None, scale, x_scale, x_cols, y_cols, True)
    return y


def kron_backward(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    dw1: Tensor,
    dw2: Tensor,
    dx: Tensor | None,
    *,
    scale: float = 1.0,
    x_scale: Tensor | None = None,
    dy_cols: Tensor | None = None,
    accumulate: bool = True,
) -> None:
    """Writes dw1 [O1, I1] and dw2 [O2, I2], and adds x's gradient to dx [M, I1 · I2], if given.

    Without `accumulate`, that gradient is written to dx, which may hold anything. They are those of
    y += dy_cols · scale · x_scale · (w1 ⊗ w2) x, whose arguments are as in `kron_add`; dx is that
    of the values, x_scale · x.
    """
    _launch(dy, w1.T, w2.T, dx, x, x_scale, dw1, scale, None, dy_cols, None, accumulate)
    check_rows("kron_backward", x=x, dy=dy, x_scale=x_scale, dy_cols=dy_cols)
    kron_outer(dy, x, w1, dw2, product_type(dy, w2, dy.dtype), scale, x_scale, dy_cols)


def _launch(
    a: Tensor, u: Tensor, v: Tensor, y: Tensor | None, x: Tensor | None, x_scale: Tensor | None,
    du: Tensor | None, scale: float, a_scale: Tensor | None, a_cols: Tensor | None,
    y_cols: Tensor | None, accumulate: bool,
) -> None:  # fmt: skip
    """y [M, S · Q] += (u [S, P] ⊗ v [Q, R]) a, and du [P, S], as `kron_kernel` has them."""
    check_rows(
        "kron", a=a, y=y, x=x, x_scale=x_scale, a_scale=a_scale, a_cols=a_cols, y_cols=y_cols
    )
    (s, p), (q, r), m = u.shape, v.shape, len(a)
    assert (
        a.shape[1] == p * r
        and (y is None or y.shape == (m, s * q))
        and (a_cols is None or a_cols.shape == (p * r,))
        and (y_cols is None or y_cols.shape == (s * q,))
        and (a_scale is None or a_scale.shape == (m,))
        and (x is None or x.shape == (m, s * q))
    )
    if du is not None and (m == 0 or du.numel() == 0):
        du.zero_()
    if m == 0 or s * p * q == 0:
        if y is not None and not accumulate:
            y.zero_()
        return
    product = product_type(a, v, a.dtype if a.itemsize > 1 or y is None else y.dtype)
    numbers = numbers_for(product, a, x)
    block_p, block_s = small_block(p), small_block(s, LEAST.value)
    block_q = min(numbers["BLOCK_N"], max(next_pow2(q), 16))
    block_m = max(numbers["ROWS"] // max(block_p, block_s, LEAST.value), 1)
    q_tiles, s_tiles, p_tiles = cdiv(q, block_q), cdiv(s, block_s), cdiv(p, block_p)
    v_r_major, stride_v = order_of("kron", v)
    constants = {
        "DOT_TYPE": product, "V_R_MAJOR": v_r_major, "BLOCK_M": block_m, "BLOCK_P": block_p,
        "BLOCK_Q": block_q, "BLOCK_S": block_s,
        "BLOCK_R": min(numbers["BLOCK_K"], max(16, next_pow2(r))),
        "num_warps": numbers["num_warps"], "num_stages": numbers["num_stages"],
    }  # fmt: skip

    def run(y: Tensor | None, du: Tensor | None, p_tiles: int) -> None:
        ranges, m_split = cdiv(m, block_m), block_m
        if du is not None:
            ranges, m_split = split(m, block_m, q_tiles * s_tiles * p_tiles, a.device)
        sums = s_tiles * p_tiles if du is not None else 1
        splits = ranges * q_tiles if du is not None else 1
        launch(
            kron_kernel, (ranges * q_tiles, s_tiles, p_tiles),
            a, u, v, y, a_scale, a_cols, y_cols, x if du is not None else None,
            x_scale if du is not None else None, du,
            *workspace(sums, sums * splits, max(block_p, LEAST.value), block_s, a.device),
            m, p, q, r, s, m_split, q_tiles, float(scale),
            a.stride(0), *u.stride(), stride_v, 0 if y is None else y.stride(0),
            0 if x is None else x.stride(0), *((0, 0) if du is None else du.stride()),
            P_LOOP=p_tiles == 1 or du is None, ACCUMULATE=accumulate, **constants,
        )  # fmt: skip

    if du is None or p_tiles == 1:
        run(y, du, 1)
        return
    if y is not None:
        run(y, None, 1)
    run(None, du, p_tiles)


def aot_cases() -> Iterator[AotCase]:
    """What `fluxfast-bench aot` compiles of this op: launches at FLUX.1's sizes."""
    meta = partial(torch.empty, device="meta")
    m = 4608
    # (O1, I1, O2, I2) of a projection at factor 16, 8 and 4, at the factor that LyCORIS chooses,
    # and unbalanced; of the MLP's two
    sizes = {
        "f16": (16, 16, 192, 192),
        "f8": (8, 8, 384, 384),
        "f4": (4, 4, 768, 768),
        "auto": (48, 48, 64, 64),
        "unbalanced": (192, 16, 16, 192),
        "up-f16": (16, 16, 768, 192),
        "down-f16": (16, 16, 192, 768),
    }
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for name, (o1, i1, o2, i2) in sizes.items():
            if dtype != torch.bfloat16 and name not in ("f16", "unbalanced"):
                continue
            x, y = meta(m, i1 * i2, dtype=dtype), meta(m, o1 * o2, dtype=dtype)
            w1, w2, label = meta(o1, i1), meta(o2, i2), str(dtype).removeprefix("torch.")
            yield f"{label}-{name}-fwd", partial(kron_add, x, w1, w2, y), EVERY_TARGET
            # where the sum is in blocks, dx and dw1 are a launch each, and dx is like y above
            dx = None if o1 > MOST else x
            backward = partial(kron_backward, y, x, w1, w2, w1, w2, dx)
            yield f"{label}-{name}-bwd", backward, EVERY_TARGET
            if dx is not None:
                first = partial(backward, accumulate=False)
                yield f"{label}-{name}-bwd-first", first, EVERY_TARGET
    codes, x_scale = meta(m, 3072, dtype=torch.int8), meta(m)
    y, cols, w1, w2 = meta(m, 3072, dtype=torch.bfloat16), meta(3072), meta(16, 16), meta(192, 192)
    forward = partial(kron_add, codes, w1, w2, y, x_scale=x_scale, y_cols=cols)
    yield "int8-fwd", forward, EVERY_TARGET
    backward = partial(kron_backward, y, codes, w1, w2, w1, w2, y, x_scale=x_scale, dy_cols=cols)
    yield "int8-bwd", backward, EVERY_TARGET
    yield "int8-bwd-first", partial(backward, accumulate=False), EVERY_TARGET
