"""Linears on a quantised base in 8-bit arithmetic, both directions: int8 (int32 sums, exact) or
e4m3 (fp32 sums).

x is quantised per row, W per output row. Forward, the scales are applied to the finished sums:

    y = x_scale · w_scale · (x_q W_qᵀ) + s Bᵀ + b

Backward the sum runs over W's rows, so its scale cannot wait: it is folded into dy before dy is
quantised, and one packed W serves both directions:

    dx = dy_scale · (dy_q W_q) + dS A,      dy_q, dy_scale = row_quant(dy, col_scale=w_scale)

The low-rank products, the adapters' own dtype, and groups of linears are those of `lora_linear`. x
may also stay in a float type, without x_scale: then W's codes are converted in registers and the
product is a float one.

sm_90's 8-bit tensor cores want both operands with the contraction contiguous, which W is not in
dgrad; there, and wherever memory allows, `transpose_codes` makes a copy that is.
"""

from collections.abc import Iterator, Mapping
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels._launch import (
    AOT_TARGETS,
    E4M3_TARGETS,
    AotCase,
    AotVariant,
    LaunchTable,
    cdiv,
    launch,
    launch_numbers,
    record_variants,
)
from fluxfast_kernels._matmul import Segments, make_segments, matmul

__all__ = [
    "Segments",
    "aot_variants",
    "make_segments",
    "quant_matmul",
    "quant_matmul_dgrad",
    "transpose_codes",
]


@triton.jit
def transpose_codes_kernel(p_w, p_t, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_n, m_k = o_n < N, o_k < K
    b_w = tl.load(p_w + o_n[:, None] * K + o_k[None, :], mask=m_n[:, None] & m_k[None, :], other=0)
    tl.store(p_t + o_k[:, None] * N + o_n[None, :], tl.trans(b_w), mask=m_k[:, None] & m_n[None, :])


TRANSPOSE: LaunchTable = {"default": {"BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4}}


def transpose_codes(w: Tensor, *, out: Tensor | None = None) -> Tensor:
    """A contiguous [K, N] copy of the codes w [N, K], of any 1-byte dtype; its `.T` is what
    `quant_matmul_dgrad` takes.
    """
    assert w.is_contiguous() and w.itemsize == 1
    n, k = w.shape
    t = torch.empty((k, n), dtype=w.dtype, device=w.device) if out is None else out
    assert t.shape == (k, n) and t.is_contiguous()
    chosen = launch_numbers(TRANSPOSE, w.device)
    grid = (cdiv(n, chosen["BLOCK_N"]), cdiv(k, chosen["BLOCK_K"]))
    launch(transpose_codes_kernel, grid, w.view(torch.int8), t.view(torch.int8), n, k, **chosen)
    return t


def quant_matmul(
    xq: Tensor,
    x_scale: Tensor | None,
    wq: Tensor,
    w_scale: Tensor,
    *,
    bias: Tensor | None = None,
    lora_s: Tensor | None = None,
    lora_b: Tensor | None = None,
    segments: Segments | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    numbers: Mapping[str, int] | None = None,
) -> Tensor:
    """y = x_scale · w_scale · (xq wqᵀ) + s Bᵀ + bias: [M, N] in out_dtype, or written to `out` (a
    column slice will do).

    xq [M, K] and wq [N, K] int8 or e4m3fn, x_scale [M] and w_scale [N] fp32; or xq of a float dtype
    and x_scale None. wq may be packed over a group of linears; then with adapters `segments` says
    how. bias [N], lora_s [M, Σ ranks] with the adapters' scale folded in, lora_b [N, max ranks].
    e4m3 needs sm_89, sm_90 or gfx942. N and K multiples of 16 are the fast case.
    """
    assert (x_scale is None) == (xq.itemsize > 1), (
        "8-bit rows come with their scales, float rows without"
    )
    return matmul(
        xq, wq, x_scale=x_scale, w_scale=w_scale, bias=bias, u=lora_s, v=lora_b, segments=segments,
        out=out, out_dtype=out_dtype, numbers=numbers,
    )  # fmt: skip


def quant_matmul_dgrad(
    dyq: Tensor,
    dy_scale: Tensor | None,
    wq: Tensor,
    *,
    lora_ds: Tensor | None = None,
    lora_a: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulate: bool = False,
    numbers: Mapping[str, int] | None = None,
) -> Tensor:
    """dx = dy_scale · (dyq wq) + dS A: [M, K] in out_dtype, written to `out`, or added to what it
    holds.

    dyq [M, N] and dy_scale [M] of dy · w_scale (or dy · w_scale itself, in a float dtype, and
    None); wq [N, K], the forward's, or `.T` of `transpose_codes` of it; lora_ds [M, Σ ranks],
    lora_a [Σ ranks, K].
    """
    assert (dy_scale is None) == (dyq.itemsize > 1), (
        "8-bit rows come with their scales, float rows without"
    )
    return matmul(
        dyq, wq.T, x_scale=dy_scale, u=lora_ds, v=None if lora_a is None else lora_a.T,
        out=out, out_dtype=out_dtype, accumulate=accumulate, numbers=numbers,
    )  # fmt: skip


def _aot_cases() -> Iterator[AotCase]:
    meta = partial(torch.empty, device="meta")
    bf16 = partial(meta, dtype=torch.bfloat16)
    # a single block's two linears: QKV and the MLP's first in one, and the last one over both
    m, d, n_out = 4608, 3072, 15360
    outs = (d, d, d, 4 * d)
    n = sum(outs)
    for name, dtype, targets in (
        ("int8", torch.int8, tuple(AOT_TARGETS)),
        # gfx1100 has no e4m3 product
        (
            "e4m3",
            torch.float8_e4m3fn,
            tuple(target for target in E4M3_TARGETS if target != "gfx1100"),
        ),
    ):
        codes = partial(meta, dtype=dtype)
        x, x_out, dy, scale = codes(m, d), codes(m, n_out), codes(m, n), meta(m)
        w, w_t, w_out, w_scale = codes(n, d), codes(d, n).T, codes(d, n_out), meta(n)
        yield (
            f"{name}-fwd",
            partial(quant_matmul, x_out, scale, w_out, meta(d), bias=bf16(d)),
            targets,
        )
        yield f"{name}-dgrad", partial(quant_matmul_dgrad, x, scale, w_out), targets
        yield (
            f"bf16-{name}-fwd",
            partial(quant_matmul, bf16(m, d), None, w, w_scale, bias=bf16(n)),
            targets,
        )
        for rank in (16, 64, 128):
            s, b, a = bf16(m, 4 * rank), bf16(n, rank), bf16(4 * rank, d)
            segments = make_segments(outs, (rank,) * 4, "meta")
            fwd = partial(
                quant_matmul,
                x,
                scale,
                w,
                w_scale,
                bias=bf16(n),
                lora_s=s,
                lora_b=b,
                segments=segments,
            )
            yield f"{name}-fwd-r{rank}", fwd, targets
            yield (
                f"{name}-dgrad-r{rank}",
                partial(quant_matmul_dgrad, dy, scale, w, lora_ds=s, lora_a=a),
                targets,
            )
            dgrad = partial(
                quant_matmul_dgrad,
                dy,
                scale,
                w_t,
                lora_ds=s,
                lora_a=a,
                out=bf16(m, d),
                accumulate=True,
            )
            yield f"{name}-dgrad-transposed-r{rank}", dgrad, targets
    yield "codes", partial(transpose_codes, meta(n, d, dtype=torch.int8)), tuple(AOT_TARGETS)


def aot_variants() -> list[AotVariant]:
    """The variants that `fluxfast-bench aot` compiles."""
    return record_variants(_aot_cases())
