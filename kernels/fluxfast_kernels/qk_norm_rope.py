"""From packed q|k|v projections to attention's inputs and back: RMSNorm and rotary embedding.

    y = rot(x·rstd·w),  rstd = 1/sqrt(mean(x²) + eps)
    rot(x0, x1) = (x0·cos - x1·sin, x1·cos + x0·sin) on adjacent pairs

q and k are normalised and rotated, v is copied where it is asked for, and text is joined to image.
One program takes HEADS heads of one token: their q, k and v. Text rows come first. Whether a token
is text decides which tensor and which weights a program reads, so both parts go in one launch.
Everything between load and store is fp32.

Backward, with n = rot⁻¹(y) = x·rstd·w and d = rot⁻¹(dy):

    dx = rstd·(d·w - x·rstd·mean(d·n))

Given y, which attention keeps anyway, x·rstd is n/w, and forward's input is not needed. That works
if the smallest weight is not far below the largest (`fluxfast.ops.qk_norm_rope` says how far); else
forward's input is given instead.

Where an 8-bit product reads the gradient, backward also writes its codes. They have one scale for
a token's q, k and v together, so one program then takes all heads.

Shapes: qkv, dqkv [B, S_img, 3·H·hd] and txt_qkv, dtxt_qkv [B, S_txt, 3·H·hd], rows any distance
apart; q, k, v [B, S, H, hd], S = S_txt + S_img; rstd [B, S, 2, H] fp32; weights [2 or 4, hd]: q, k,
and with text txt_q, txt_k; cos, sin [rows, hd/2]. Token i takes row i of the tables, or the row
that `index` ([S] or [B, S], int32 or int64) names. The index is not checked, because that would
stop the GPU.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels.aot import EVERY_TARGET, AotCase
from fluxfast_kernels.launch import (
    HEAD_LAUNCH,
    arch_key,
    cdiv,
    launch,
    launch_numbers,
    next_pow2,
    row_numbers,
)
from fluxfast_kernels.row_quant import (
    FORMATS,
    check_rows,
    encode,
    magnitude_bits,
    row_scale,
    row_strides,
    targets_of,
)

# what backward may be asked for: the gradient's values, or values and codes
GRADIENT_OUTPUTS = ("same", "both-int8", "both-e4m3")


class QKNormRopeOut(NamedTuple):
    """q, k, v [B, S, H, hd], contiguous; the reciprocal RMS of q's and k's heads [B, S, 2, H]."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    rstd: Tensor


class QKNormRopeGrad(NamedTuple):
    """The gradients of the packed projections, and where they are asked for their codes.

    Those of text and image are one tensor, which one product can read: q [B·S, 3·H·hd] and its
    scales q_scale [B·S] fp32 hold the text's rows of all samples, and then the image's.
    """

    dqkv: Tensor
    dtxt_qkv: Tensor | None
    q: Tensor | None
    q_scale: Tensor | None


@triton.jit
def _rotate(b_x, b_cos, b_sin, HEADS: tl.constexpr, HALF: tl.constexpr):
    """Rotates adjacent pairs of b_x [HEADS, 2·HALF] by angles of these cosines, sines [HALF]."""
    b_0, b_1 = tl.split(tl.reshape(b_x, (HEADS, HALF, 2)))
    b_y = tl.join(
        b_0 * b_cos[None, :] - b_1 * b_sin[None, :], b_1 * b_cos[None, :] + b_0 * b_sin[None, :]
    )
    return tl.reshape(b_y, (HEADS, 2 * HALF))


@triton.jit
def _tables(p_cos, p_sin, p_index, i_b, i_s, stride_index_b, HD: tl.constexpr, HALF: tl.constexpr):
    """The token's row of the tables."""
    i_row = i_s
    if p_index is not None:
        i_row = tl.load(p_index + i_b * stride_index_b + i_s).to(tl.int64)
    o_half = tl.arange(0, HALF)
    m_half = o_half < HD // 2
    p_row = i_row * (HD // 2) + o_half
    b_cos = tl.load(p_cos + p_row, mask=m_half, other=0.0).to(tl.float32)
    b_sin = tl.load(p_sin + p_row, mask=m_half, other=0.0).to(tl.float32)
    return b_cos, b_sin


@triton.jit
def _program(H, HD, HEADS: tl.constexpr, HALF: tl.constexpr):
    """A program's token and sample; offsets and masks of its heads, a head's numbers, and both."""
    i_s = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    o_h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    o_d = tl.arange(0, 2 * HALF)
    m_h = o_h < H
    m_d = o_d < HD
    o_hd = o_h[:, None] * HD + o_d[None, :]
    m_hd = m_h[:, None] & m_d[None, :]
    return i_s, i_b, o_h, m_h, o_d, m_d, o_hd, m_hd


@triton.jit(do_not_specialize=["stride_index_b", "S", "S_txt"])
def qk_norm_rope_fwd_kernel(
    p_qkv, p_txt_qkv, p_weights, p_cos, p_sin, p_index, p_q, p_k, p_v, p_rstd,
    stride_qkv_b, stride_qkv_s, stride_txt_b, stride_txt_s, stride_index_b, S, S_txt, eps,
    H: tl.constexpr, HD: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    i_s, i_b, o_h, m_h, o_d, m_d, o_hd, m_hd = _program(H, HD, HEADS, HALF)

    # a text token's pointer into the image is before its start, and is replaced before it is read
    p_in = p_qkv + i_b * stride_qkv_b + (i_s - S_txt) * stride_qkv_s
    p_w = p_weights
    if p_txt_qkv is not None:  # noqa: SIM102 (the outer branch is taken at compile time)
        if i_s < S_txt:
            p_in = p_txt_qkv + i_b * stride_txt_b + i_s * stride_txt_s
            p_w = p_weights + 2 * HD
    b_cos, b_sin = _tables(p_cos, p_sin, p_index, i_b, i_s, stride_index_b, HD, HALF)
    i_row = i_b * S + i_s

    # unrolled: q and k differ in their pointers, which have to be known when it is compiled
    for i_qk in tl.static_range(2):
        b_x = tl.load(p_in + i_qk * H * HD + o_hd, mask=m_hd, other=0.0).to(tl.float32)
        b_w = tl.load(p_w + i_qk * HD + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / HD + eps)
        b_y = _rotate(b_x * b_rstd[:, None] * b_w[None, :], b_cos, b_sin, HEADS, HALF)
        p_out = p_q if i_qk == 0 else p_k
        tl.store(p_out + i_row * H * HD + o_hd, b_y.to(p_out.dtype.element_ty), mask=m_hd)
        tl.store(p_rstd + (i_row * 2 + i_qk) * H + o_h, b_rstd, mask=m_h)
    if p_v is not None:
        b_v = tl.load(p_in + 2 * H * HD + o_hd, mask=m_hd, other=0.0)
        tl.store(p_v + i_row * H * HD + o_hd, b_v, mask=m_hd)


@triton.jit
def _head_gradients(
    p_dy, p_y, p_x, p_w, p_rstd, b_cos, b_sin, i_row, o_h, m_h, o_d, m_d, o_hd, m_hd,
    PART: tl.constexpr, H: tl.constexpr, HD: tl.constexpr, HEADS: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """dx of a token's heads of q (PART 0) or k (PART 1), from x, or from y where that is given."""
    # masked weights are 1, not 0, since y is divided by them
    b_w = tl.load(p_w + PART * HD + o_d, mask=m_d, other=1.0).to(tl.float32)
    b_rstd = tl.load(p_rstd + (i_row * 2 + PART) * H + o_h, mask=m_h, other=0.0)
    # the inverse of a rotation is the rotation by the negative angle
    b_d = _rotate(tl.load(p_dy, mask=m_hd, other=0.0).to(tl.float32), b_cos, -b_sin, HEADS, HALF)
    if p_y is not None:
        b_y = tl.load(p_y + i_row * H * HD + o_hd, mask=m_hd, other=0.0).to(tl.float32)
        b_n = _rotate(b_y, b_cos, -b_sin, HEADS, HALF)
        b_xhat = b_n / b_w[None, :]
    else:
        b_x = tl.load(p_x + PART * H * HD + o_hd, mask=m_hd, other=0.0).to(tl.float32)
        b_xhat = b_x * b_rstd[:, None]
        b_n = b_xhat * b_w[None, :]
    b_mean = tl.sum(b_d * b_n, axis=1) / HD
    return (b_d * b_w[None, :] - b_xhat * b_mean[:, None]) * b_rstd[:, None]


@triton.jit(do_not_specialize=["stride_index_b", "S", "S_txt"])
def qk_norm_rope_bwd_kernel(
    p_dq, p_dk, p_dv, p_q, p_k, p_qkv, p_txt_qkv, p_rstd, p_weights, p_cos, p_sin, p_index,
    p_col_scale, p_txt_col_scale, p_dqkv, p_dtxt_qkv, p_codes, p_codes_scale,
    stride_dq_b, stride_dq_s, stride_dq_h, stride_dk_b, stride_dk_s, stride_dk_h,
    stride_dv_b, stride_dv_s, stride_dv_h, stride_qkv_b, stride_qkv_s, stride_txt_b, stride_txt_s,
    stride_index_b, stride_dqkv_b, stride_dqkv_s, stride_dtxt_b, stride_dtxt_s, S, S_txt,
    H: tl.constexpr, HD: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    i_s, i_b, o_h, m_h, o_d, m_d, o_hd, m_hd = _program(H, HD, HEADS, HALF)

    p_in = p_qkv
    p_out = p_dqkv + i_b * stride_dqkv_b + (i_s - S_txt) * stride_dqkv_s
    p_w = p_weights
    if p_qkv is not None:
        p_in = p_qkv + i_b * stride_qkv_b + (i_s - S_txt) * stride_qkv_s
    if p_dtxt_qkv is not None:  # noqa: SIM102 (the outer branch is taken at compile time)
        if i_s < S_txt:
            p_out = p_dtxt_qkv + i_b * stride_dtxt_b + i_s * stride_dtxt_s
            p_w = p_weights + 2 * HD
            if p_txt_qkv is not None:
                p_in = p_txt_qkv + i_b * stride_txt_b + i_s * stride_txt_s
    b_cos, b_sin = _tables(p_cos, p_sin, p_index, i_b, i_s, stride_index_b, HD, HALF)
    i_row = i_b * S + i_s

    o_dq = i_b * stride_dq_b + i_s * stride_dq_s + o_h[:, None] * stride_dq_h + o_d[None, :]
    b_dq = _head_gradients(
        p_dq + o_dq, p_q, p_in, p_w, p_rstd, b_cos, b_sin, i_row, o_h, m_h, o_d, m_d, o_hd, m_hd,
        0, H, HD, HEADS, HALF,
    )  # fmt: skip
    tl.store(p_out + o_hd, b_dq.to(p_dqkv.dtype.element_ty), mask=m_hd)
    o_dk = i_b * stride_dk_b + i_s * stride_dk_s + o_h[:, None] * stride_dk_h + o_d[None, :]
    b_dk = _head_gradients(
        p_dk + o_dk, p_k, p_in, p_w, p_rstd, b_cos, b_sin, i_row, o_h, m_h, o_d, m_d, o_hd, m_hd,
        1, H, HD, HEADS, HALF,
    )  # fmt: skip
    tl.store(p_out + H * HD + o_hd, b_dk.to(p_dqkv.dtype.element_ty), mask=m_hd)
    o_dv = i_b * stride_dv_b + i_s * stride_dv_s + o_h[:, None] * stride_dv_h + o_d[None, :]
    b_dv = tl.load(p_dv + o_dv, mask=m_hd, other=0.0)
    tl.store(p_out + 2 * H * HD + o_hd, b_dv, mask=m_hd)

    if p_codes is not None:
        b_dv = b_dv.to(tl.float32)
        if p_col_scale is not None:
            p_col = p_col_scale
            if p_txt_col_scale is not None:  # noqa: SIM102 (as above)
                if i_s < S_txt:
                    p_col = p_txt_col_scale
            b_dq *= tl.load(p_col + o_hd, mask=m_hd, other=0.0)
            b_dk *= tl.load(p_col + H * HD + o_hd, mask=m_hd, other=0.0)
            b_dv *= tl.load(p_col + 2 * H * HD + o_hd, mask=m_hd, other=0.0)
        b_top = tl.maximum(magnitude_bits(b_dq), magnitude_bits(b_dk))
        b_top = tl.max(tl.maximum(b_top, magnitude_bits(b_dv)), axis=None)
        b_scale = row_scale(b_top, p_codes.dtype.element_ty)
        # the text's rows come first, those of all samples
        i_row = i_b * S_txt + i_s
        if i_s >= S_txt:
            i_row = tl.num_programs(2) * S_txt + i_b * (S - S_txt) + i_s - S_txt
        p_codes_row = p_codes + i_row * (3 * H * HD) + o_hd
        tl.store(p_codes_row, encode(b_dq, b_scale, p_codes.dtype.element_ty), mask=m_hd)
        p_codes_row += H * HD
        tl.store(p_codes_row, encode(b_dk, b_scale, p_codes.dtype.element_ty), mask=m_hd)
        p_codes_row += H * HD
        tl.store(p_codes_row, encode(b_dv, b_scale, p_codes.dtype.element_ty), mask=m_hd)
        tl.store(p_codes_scale + i_row, b_scale)


def qk_norm_rope_fwd(
    qkv: Tensor,
    weights: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    txt_qkv: Tensor | None = None,
    eps: float = 1e-6,
    index: Tensor | None = None,
    copy_v: bool = True,
) -> QKNormRopeOut:
    """q and k of the joined sequence, from its packed projections, and with `copy_v` also v.

    Shapes are in this module's docstring. Raises ValueError if a last dimension is not contiguous.
    """
    check_rows("qk_norm_rope", qkv=qkv, txt_qkv=txt_qkv, index=index)
    assert weights.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
    batch, s_img, width = qkv.shape
    s_txt = 0 if txt_qkv is None else txt_qkv.shape[1]
    tokens, head_dim = s_txt + s_img, width // (3 * heads)
    shape = (batch, tokens, heads, head_dim)
    q, k = (torch.empty(shape, dtype=qkv.dtype, device=qkv.device) for _ in range(2))
    v = torch.empty(shape, dtype=qkv.dtype, device=qkv.device) if copy_v else None
    rstd = torch.empty((batch, tokens, 2, heads), dtype=torch.float32, device=qkv.device)
    numbers = _numbers("qk_norm_rope_fwd", heads, head_dim, qkv.device)
    if not copy_v:
        # whoever counts a launch's bytes takes those of its tensors
        qkv = qkv[..., : width - width // 3]
        txt_qkv = None if txt_qkv is None else txt_qkv[..., : width - width // 3]
    launch(
        qk_norm_rope_fwd_kernel, (tokens, cdiv(heads, numbers["HEADS"]), batch),
        qkv, txt_qkv, weights, cos, sin, index, q, k, v, rstd,
        *row_strides(qkv), *row_strides(txt_qkv), _index_stride(index), tokens, s_txt, float(eps),
        **numbers,
    )  # fmt: skip
    return QKNormRopeOut(q, k, v, rstd)


def qk_norm_rope_bwd(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    rstd: Tensor,
    weights: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    s_txt: int = 0,
    index: Tensor | None = None,
    q: Tensor | None = None,
    k: Tensor | None = None,
    qkv: Tensor | None = None,
    txt_qkv: Tensor | None = None,
    out: str = "same",
    col_scale: Tensor | None = None,
    txt_col_scale: Tensor | None = None,
    dqkv: Tensor | None = None,
    dtxt_qkv: Tensor | None = None,
) -> QKNormRopeGrad:
    """dqkv, and dtxt_qkv where s_txt is not 0, written to those given; and their codes.

    dq, dk, dv [B, S, H, hd] have contiguous heads, at any distance from each other. Forward left
    either its outputs q and k (contiguous) or its inputs qkv and txt_qkv: give one pair. out: one
    of GRADIENT_OUTPUTS. The codes are those of dqkv·col_scale and dtxt_qkv·txt_col_scale, fp32
    [3·H·hd], before they are rounded to their dtype. Raises ValueError on another `out` or a last
    dimension that is not contiguous.
    """
    if out not in GRADIENT_OUTPUTS:
        raise ValueError(f"qk_norm_rope: out must be one of {GRADIENT_OUTPUTS}, not {out!r}")
    check_rows(
        "qk_norm_rope", dq=dq, dk=dk, dv=dv, qkv=qkv, txt_qkv=txt_qkv, index=index,
        col_scale=col_scale, txt_col_scale=txt_col_scale, dqkv=dqkv, dtxt_qkv=dtxt_qkv,
    )  # fmt: skip
    assert (q is None) == (k is None) != (qkv is None) and rstd.is_contiguous()
    assert q is None or k is None or (q.is_contiguous() and k.is_contiguous())
    assert weights.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
    assert (txt_col_scale is None) == (col_scale is None or s_txt == 0)
    batch, tokens, heads, head_dim = dq.shape
    width = 3 * heads * head_dim
    if dqkv is None:
        dqkv = torch.empty((batch, tokens - s_txt, width), dtype=dq.dtype, device=dq.device)
    if dtxt_qkv is None and s_txt:
        dtxt_qkv = torch.empty((batch, s_txt, width), dtype=dq.dtype, device=dq.device)
    codes, scale, numbers = None, None, _numbers("qk_norm_rope_bwd", heads, head_dim, dq.device)
    if out != "same":
        fmt, rows = FORMATS[out.removeprefix("both-")], batch * tokens
        codes = torch.empty((rows, width), dtype=fmt, device=dq.device)
        scale = torch.empty((rows,), dtype=torch.float32, device=dq.device)
        whole = row_numbers("qk_norm_rope_bwd_quantized", width, arch_key(dq.device))
        numbers |= {"HEADS": next_pow2(heads), "num_warps": whole["num_warps"]}
    launch(
        qk_norm_rope_bwd_kernel, (tokens, cdiv(heads, numbers["HEADS"]), batch),
        dq, dk, dv, q, k, qkv, txt_qkv, rstd, weights, cos, sin, index, col_scale, txt_col_scale,
        dqkv, dtxt_qkv, codes, scale, *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
        *row_strides(qkv), *row_strides(txt_qkv), _index_stride(index), *row_strides(dqkv),
        *row_strides(dtxt_qkv), tokens, s_txt, **numbers,
    )  # fmt: skip
    return QKNormRopeGrad(dqkv, dtxt_qkv, codes, scale)


def _index_stride(index: Tensor | None) -> int:
    return index.stride(0) if index is not None and index.ndim == 2 else 0


def _numbers(op: str, heads: int, head_dim: int, device: torch.device) -> dict[str, int]:
    numbers = dict(launch_numbers(HEAD_LAUNCH[op], device))
    numbers["HEADS"] = min(numbers["HEADS"], next_pow2(heads))
    return {"H": heads, "HD": head_dim, "HALF": next_pow2(head_dim // 2), **numbers}


def aot_cases() -> Iterator[AotCase]:
    """What `fluxfast-bench aot` compiles of this op: launches at FLUX.1's sizes."""
    cos = torch.empty(4608, 64, device="meta")
    index = torch.empty(1, 2560, dtype=torch.int32, device="meta")
    col_scale = torch.empty(9216, device="meta")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        # a double block's two parts; a single block's one, inside the packed q|k|v|mlp, whole and
        # routed
        img, txt = (torch.empty(1, s, 9216, dtype=dtype, device="meta") for s in (4096, 512))
        packed = torch.empty(1, 4608, 21504, dtype=dtype, device="meta")[..., :9216]
        # as the model stores them
        weights = torch.empty(4, 128, dtype=dtype, device="meta")
        for case, qkv, txt_qkv, rows in (
            ("double", img, txt, None),
            ("single", packed, None, None),
            ("routed", packed[:, :2560], None, index),
        ):
            forward = partial(
                qk_norm_rope_fwd, qkv, weights, cos, cos, heads=24, txt_qkv=txt_qkv, index=rows
            )
            yield f"{name}-{case}", forward, EVERY_TARGET
            yield f"{name}-{case}-without-v", partial(forward, copy_v=False), EVERY_TARGET
            s_txt = 0 if txt_qkv is None else 512
            y = torch.empty(1, s_txt + qkv.shape[1], 24, 128, dtype=dtype, device="meta")
            rstd = torch.empty(1, s_txt + qkv.shape[1], 2, 24, device="meta")
            for out in GRADIENT_OUTPUTS if dtype == torch.bfloat16 else ("same",):
                scale = None if out == "same" else col_scale
                backward = partial(
                    qk_norm_rope_bwd, y, y, y, rstd, weights, cos, cos, s_txt=s_txt, index=rows,
                    out=out, col_scale=scale, txt_col_scale=scale if s_txt else None,
                )  # fmt: skip
                for kept, given in (
                    ("outputs", {"q": y, "k": y}),
                    ("inputs", {"qkv": qkv, "txt_qkv": txt_qkv}),
                ):
                    where = targets_of(out)
                    yield f"{name}-{case}-{out}-{kept}", partial(backward, **given), where
