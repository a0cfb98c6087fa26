"""Routing tokens around blocks (TREAD): gather those that go through, and scatter them back.

    gather   out = x[idx]
             backward: dx = scatter of dout into zeros
    scatter  out = base, out[idx] = y
             backward: dbase = dout with zeros at idx, dy = gather of dout

All three scatters are one kernel, in which an absent operand means zeros. It writes each output row
once, and looks up where that row comes from in `inverse` [B, S]: the row's place in idx, or -1.

Shapes: x, base, out [B, S, D]; y [B, K, D]; idx [B, K], int32 or int64, distinct within a sample
and below S (not checked: that would stop the GPU). Rows may lie any distance apart.
"""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels.aot import EVERY_TARGET, AotCase
from fluxfast_kernels.launch import arch_key, launch, row_numbers
from fluxfast_kernels.row_quant import check_rows, row_strides


@triton.jit(do_not_specialize=["K", "stride_idx_b"])
def token_gather_kernel(
    p_x, p_idx, p_out, stride_x_b, stride_x_s, stride_idx_b, K, D: tl.constexpr, BLOCK: tl.constexpr
):
    i_k = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    i_s = tl.load(p_idx + i_b * stride_idx_b + i_k).to(tl.int64)
    b_x = tl.load(p_x + i_b * stride_x_b + i_s * stride_x_s + o_d, mask=m_d, other=0.0)
    tl.store(p_out + (i_b * K + i_k) * D + o_d, b_x, mask=m_d)


@triton.jit(do_not_specialize=["S"])
def token_scatter_kernel(
    p_base,
    p_y,
    p_inverse,
    p_out,
    stride_base_b,
    stride_base_s,
    stride_y_b,
    stride_y_k,
    S,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_s = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(1).to(tl.int64)
    i_row = i_b * S + i_s
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    # the branch is the same for the whole program, so no thread waits for another
    i_k = tl.load(p_inverse + i_row).to(tl.int64)
    p_row = p_out + i_row * D + o_d
    if i_k >= 0:
        if p_y is not None:
            b_out = tl.load(p_y + i_b * stride_y_b + i_k * stride_y_k + o_d, mask=m_d, other=0.0)
        else:
            b_out = tl.zeros((BLOCK,), dtype=p_out.dtype.element_ty)
        tl.store(p_row, b_out, mask=m_d)
    else:
        if p_base is not None:
            b_out = tl.load(
                p_base + i_b * stride_base_b + i_s * stride_base_s + o_d, mask=m_d, other=0.0
            )
        else:
            b_out = tl.zeros((BLOCK,), dtype=p_out.dtype.element_ty)
        tl.store(p_row, b_out, mask=m_d)


def inverse_index(idx: Tensor, tokens: int) -> Tensor:
    """Each token's place in its sample's idx [B, K], or -1: [B, tokens] int32.

    All scatters of one route can share it.
    """
    batch, kept = idx.shape
    inverse = torch.full((batch, tokens), -1, dtype=torch.int32, device=idx.device)
    places = torch.arange(kept, dtype=torch.int32, device=idx.device).expand(batch, kept)
    return inverse.scatter_(1, idx.long(), places)


def token_gather(x: Tensor, idx: Tensor) -> Tensor:
    """The rows idx [B, K] of x [B, S, D]: [B, K, D].

    This is also the gradient that `token_scatter`'s y gets from dout.
    """
    check_rows("token_gather", x=x, idx=idx)
    batch, _, width = x.shape
    assert idx.shape[0] == batch
    kept = idx.shape[1]
    out = torch.empty((batch, kept, width), dtype=x.dtype, device=x.device)
    launch(
        token_gather_kernel, (kept, batch),
        x, idx, out, *row_strides(x), idx.stride(0), kept,
        D=width, **row_numbers("token_route", width, arch_key(x.device)),
    )  # fmt: skip
    return out


def token_scatter(base: Tensor | None, y: Tensor | None, inverse: Tensor) -> Tensor:
    """base [B, S, D] with the rows of y [B, K, D] where `inverse_index` [B, S] has them.

    Without base the other rows are zero, which gives the gradient of `token_gather`'s x. Without y
    the routed rows are zero, which gives that of base.
    """
    check_rows("token_scatter", base=base, y=y)
    given = y if base is None else base
    assert given is not None and inverse.is_contiguous()
    batch, tokens = inverse.shape
    width = given.shape[2]
    out = torch.empty((batch, tokens, width), dtype=given.dtype, device=given.device)
    launch(
        token_scatter_kernel, (tokens, batch),
        base, y, inverse, out, *row_strides(base), *row_strides(y), tokens,
        D=width, **row_numbers("token_route", width, arch_key(given.device)),
    )  # fmt: skip
    return out


def aot_cases() -> Iterator[AotCase]:
    """What `fluxfast-bench aot` compiles of this op: launches at FLUX.1's sizes."""
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.empty(1, 4608, 3072, dtype=dtype, device="meta")
        y = torch.empty(1, 2560, 3072, dtype=dtype, device="meta")
        idx = torch.empty(1, 2560, dtype=torch.int64, device="meta")
        inverse = torch.empty(1, 4608, dtype=torch.int32, device="meta")
        name = str(dtype).removeprefix("torch.")
        yield name, partial(token_gather, x, idx), EVERY_TARGET
        yield name, partial(token_scatter, x, y, inverse), EVERY_TARGET
        yield f"{name}-into_zeros", partial(token_scatter, None, y, inverse), EVERY_TARGET
        yield f"{name}-zeros_into", partial(token_scatter, x, None, inverse), EVERY_TARGET
