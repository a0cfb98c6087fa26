"""Linears in 8-bit arithmetic, both directions: int8 (int32 sums, exact) or e4m3 (fp32 sums).

x is quantised per row, W per output row. Forward, the scales are applied to the finished sums:

    y = x_scale · w_scale · (x_q W_qᵀ) + s Bᵀ + b

Backward the sum runs over W's rows, so its scale cannot wait. It is folded into dy before dy is
quantised, and one packed W serves both directions:

    dx = dy_scale · (dy_q W_q) + dS A,      dy_q, dy_scale = row_quant(dy, col_scale=w_scale)

Both products are `matmul.matmul`. sm_90's 8-bit tensor cores want both operands with the
contraction contiguous, which W is not in dgrad. There dgrad reads a transposed copy: one that is
kept, one that a decoder wrote (`decoder`), or one that `transpose_codes` makes.
"""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels.aot import E4M3_TARGETS, EVERY_TARGET, AotCase
from fluxfast_kernels.launch import LaunchTable, cdiv, launch, launch_numbers
from fluxfast_kernels.matmul import matmul
from fluxfast_kernels.product_tile import make_segments


@triton.jit
def transpose_codes_kernel(p_w, p_t, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_n, m_k = o_n < N, o_k < K
    b_w = tl.load(p_w + o_n[:, None] * K + o_k[None, :], mask=m_n[:, None] & m_k[None, :], other=0)
    tl.store(p_t + o_k[:, None] * N + o_n[None, :], tl.trans(b_w), mask=m_k[:, None] & m_n[None, :])


TRANSPOSE: LaunchTable = {"default": {"BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4}}


def transpose_codes(w: Tensor, *, out: Tensor | None = None) -> Tensor:
    """A contiguous [K, N] copy of the codes w [N, K], of any 1-byte dtype.

    `transpose_codes(w)` is what `matmul` takes as w.T for dgrad.
    """
    assert w.is_contiguous() and w.itemsize == 1
    n, k = w.shape
    t = torch.empty((k, n), dtype=w.dtype, device=w.device) if out is None else out
    assert t.shape == (k, n) and t.is_contiguous()
    chosen = launch_numbers(TRANSPOSE, w.device)
    grid = (cdiv(n, chosen["BLOCK_N"]), cdiv(k, chosen["BLOCK_K"]))
    launch(transpose_codes_kernel, grid, w.view(torch.int8), t.view(torch.int8), n, k, **chosen)
    return t


def aot_cases() -> Iterator[AotCase]:
    """What `fluxfast-bench aot` compiles of this op: launches at FLUX.1's sizes."""
    meta = partial(torch.empty, device="meta")
    bf16 = partial(meta, dtype=torch.bfloat16)
    # a single block's two linears: QKV and the MLP's first in one, and the last one over both
    m, d, n_out = 4608, 3072, 15360
    outs = (d, d, d, 4 * d)
    n = sum(outs)
    for name, dtype, targets in (
        ("int8", torch.int8, EVERY_TARGET),
        # gfx1100 has no e4m3 product
        (
            "e4m3",
            torch.float8_e4m3fn,
            tuple(target for target in E4M3_TARGETS if target != "gfx1100"),
        ),
    ):
        codes, product = partial(meta, dtype=dtype), partial(matmul, out_dtype=torch.bfloat16)
        x, x_out, dy, scale = codes(m, d), codes(m, n_out), codes(m, n), meta(m)
        w, w_t, w_out, w_scale = codes(n, d), codes(d, n).T, codes(d, n_out), meta(n)
        fwd = partial(product, x_out, w_out, x_scale=scale, w_scale=meta(d), bias=bf16(d))
        yield f"{name}-fwd", fwd, targets
        yield f"{name}-dgrad", partial(product, x, w_out.T, x_scale=scale), targets
        on_values = partial(product, bf16(m, d), w, w_scale=w_scale, bias=bf16(n))
        yield f"bf16-{name}-fwd", on_values, targets
        for rank in (16, 64, 128):
            s, b, a = bf16(m, 4 * rank), bf16(n, rank), bf16(4 * rank, d)
            scales = {"x_scale": scale, "w_scale": w_scale}
            own = {
                "bias": bf16(n),
                "u": s,
                "v": b,
                "segments": make_segments(outs, (rank,) * 4, "meta"),
            }
            yield f"{name}-fwd-r{rank}", partial(product, x, w, **scales, **own), targets
            dgrad = partial(product, x_scale=scale, u=s, v=a.T)
            yield f"{name}-dgrad-r{rank}", partial(dgrad, dy, w.T), targets
            transposed = partial(dgrad, dy, w_t.T, out=bf16(m, d), accumulate=True)
            yield f"{name}-dgrad-transposed-r{rank}", transposed, targets
    yield "codes", partial(transpose_codes, meta(n, d, dtype=torch.int8)), EVERY_TARGET
