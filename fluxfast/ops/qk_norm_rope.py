"""From packed q|k|v projections to attention's inputs: RMSNorm and rotary embedding of q and k,
text joined to image.

    q = rot(RMSNorm(q; eps)·w),  rot(x0, x1) = (x0·cos - x1·sin, x1·cos + x0·sin) on adjacent pairs

Everything between the load and the store is fp32. Tables hold one entry a pair ([rows,
head_dim/2]); diffusers' `FluxPosEmbed` holds each twice.

Backward, for one head of one token, with xhat = x·rstd, g = rot⁻¹(dy)·w:  dx = rstd·(g -
xhat·mean(g·xhat)). It needs no x: xhat = rot⁻¹(y)/w, and attention keeps y anyway. Dividing by w
loses what rounding y lost, and a zero loses all, so where two weights of a pair are more than 8
times apart, one is next to zero, or a table is no rotation (cos² + sin² ≠ 1), the packed inputs are
kept instead. So they are where a choice can't hang on a value: under torch.compile, and on a GPU,
which would have to be waited for. Whoever calls `forward` asks `outputs_suffice` once, ahead, for
weights that don't change.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fluxfast.ops import dispatch, registration
from fluxfast.ops._qk_norm_rope_checks import check_inputs, norm_weights
from fluxfast.ops.tensors import dense_rows, full_dtype

# beyond these, outputs don't give the normalised q and k back to fp32 precision;
# csrc/cpu/qk_norm_rope.cpp has them too
_MAX_WEIGHT_RATIO = 8.0
_MIN_WEIGHT = 1e-12
_MAX_TABLE_ERROR = 1e-6


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x0, x1 = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((x0 * cos - x1 * sin, x1 * cos + x0 * sin), dim=-1).flatten(-2)


def qk_norm_rope_ref(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    txt_qkv: Tensor | None = None,
    txt_q_weight: Tensor | None = None,
    txt_k_weight: Tensor | None = None,
    eps: float = 1e-6,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The maths in plain, differentiable torch; arguments as `qk_norm_rope`. fp32 inside (fp64 if
    qkv is), rounded once.
    """
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(2)
    q, k = _rms_norm(q.to(dtype), q_weight, eps), _rms_norm(k.to(dtype), k_weight, eps)
    if txt_qkv is not None:
        assert txt_q_weight is not None and txt_k_weight is not None
        txt_q, txt_k, txt_v = txt_qkv.unflatten(-1, (3, heads, -1)).unbind(2)
        q = torch.cat((_rms_norm(txt_q.to(dtype), txt_q_weight, eps), q), dim=1)
        k = torch.cat((_rms_norm(txt_k.to(dtype), txt_k_weight, eps), k), dim=1)
        v = torch.cat((txt_v, v), dim=1)
    rows = slice(q.shape[1]) if index is None else index
    cos, sin = cos[rows].to(dtype).unsqueeze(-2), sin[rows].to(dtype).unsqueeze(-2)
    return _rotate(q, cos, sin).to(qkv.dtype), _rotate(k, cos, sin).to(qkv.dtype), v.contiguous()


def qk_norm_rope_fwd(
    qkv: Tensor,
    txt_qkv: Tensor | None,
    weights: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor | None,
    heads: int,
    eps: float,
    impl: str,
) -> list[Tensor]:
    """q, k, v [B, S, heads, head_dim], and the reciprocal RMS of each head of q and k [B, S, 2,
    heads].

    weights [2 or 4, head_dim] holds the rows q, k, and where there is text txt_q, txt_k; it, cos
    and sin are contiguous. The launcher alone: no autograd. Raises ValueError if index names a row
    that the tables don't have (on a GPU, unchecked).
    """
    qkv = dense_rows(qkv)
    txt_qkv = None if txt_qkv is None else dense_rows(txt_qkv)
    if impl == "triton":
        from fluxfast_kernels import qk_norm_rope as kernels

        return list(
            kernels.qk_norm_rope_fwd(
                qkv, weights, cos, sin, heads=heads, txt_qkv=txt_qkv, eps=eps, index=index
            )
        )
    batch, s_img, width = qkv.shape
    s_txt = 0 if txt_qkv is None else txt_qkv.shape[1]
    shape = (batch, s_txt + s_img, heads, width // (3 * heads))
    q, k, v = (torch.empty(shape, dtype=qkv.dtype) for _ in range(3))
    rstd = torch.empty((batch, s_txt + s_img, 2, heads), dtype=torch.float32)
    index_args = _index_args(index)
    if not dispatch.native.rope_index_in_range(*index_args, batch, shape[1], cos.shape[0]):
        raise ValueError(
            f"qk_norm_rope: index names a row that the tables don't have; they have {cos.shape[0]}"
        )
    dispatch.native.qk_norm_rope_fwd(
        qkv.data_ptr(), *qkv.stride()[:2],
        *_packed_args(txt_qkv),
        weights.data_ptr(), cos.data_ptr(), sin.data_ptr(), *index_args,
        q.data_ptr(), k.data_ptr(), v.data_ptr(), rstd.data_ptr(),
        batch, s_txt, s_img, heads, shape[3], eps, torch.get_num_threads(),
    )  # fmt: skip
    return [q, k, v, rstd]


def qk_norm_rope_bwd(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    rstd: Tensor,
    weights: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    qkv: Tensor | None,
    txt_qkv: Tensor | None,
    s_txt: int,
    dqkv: Tensor | None,
    dtxt_qkv: Tensor | None,
    impl: str,
) -> list[Tensor]:
    """dqkv [B, S_img, 3·heads·head_dim] and dtxt_qkv [B, S_txt, 3·heads·head_dim]: each given, to
    be written, or returned.

    What forward kept is either its outputs q and k, or its inputs qkv and txt_qkv.
    """
    dq, dk, dv = dense_rows(dq), dense_rows(dk), dense_rows(dv)
    qkv = None if qkv is None else dense_rows(qkv)
    txt_qkv = None if txt_qkv is None else dense_rows(txt_qkv)
    batch, s_all, heads, head_dim = dq.shape
    given = (dqkv, dtxt_qkv)
    img, txt = (
        out
        if out is not None and out.stride(-1) == 1
        else dq.new_empty((batch, tokens, 3 * heads * head_dim))
        for out, tokens in ((dqkv, s_all - s_txt), (dtxt_qkv, s_txt))
    )
    if impl == "triton":
        from fluxfast_kernels import qk_norm_rope as kernels

        kernels.qk_norm_rope_bwd(
            dq, dk, dv, rstd, weights, cos, sin, s_txt=s_txt, index=index,
            q=q, k=k, qkv=qkv, txt_qkv=txt_qkv, dqkv=img, dtxt_qkv=txt,
        )  # fmt: skip
        return _written((img, txt), given)
    dispatch.native.qk_norm_rope_bwd(
        dq.data_ptr(), *dq.stride()[:3],
        dk.data_ptr(), *dk.stride()[:3],
        dv.data_ptr(), *dv.stride()[:3],
        0 if q is None else q.data_ptr(), 0 if k is None else k.data_ptr(),
        *_packed_args(qkv),
        *_packed_args(txt_qkv),
        rstd.data_ptr(), weights.data_ptr(), cos.data_ptr(), sin.data_ptr(), *_index_args(index),
        img.data_ptr(), *img.stride()[:2], txt.data_ptr(), *txt.stride()[:2],
        batch, s_txt, s_all - s_txt, heads, head_dim, torch.get_num_threads(),
    )  # fmt: skip
    return _written((img, txt), given)


def _written(grads: Sequence[Tensor], given: Sequence[Tensor | None]) -> list[Tensor]:
    """Sees that each gradient is in the tensor given for it, and returns those for which none was."""
    for grad, out in zip(grads, given, strict=True):
        if out is not None and out is not grad:
            out.copy_(grad)
    return [grad for grad, out in zip(grads, given, strict=True) if out is None]


def _packed_args(qkv: Tensor | None) -> tuple[int, ...]:
    """Pointer, and elements from one sample and from one row to the next."""
    return (0, 0, 0) if qkv is None else (qkv.data_ptr(), *qkv.stride()[:2])


def _index_args(index: Tensor | None) -> tuple[int, int, int]:
    """Pointer, bytes of an element, and elements from one sample's indices to the next's."""
    if index is None:
        return 0, 0, 0
    return index.data_ptr(), index.element_size(), index.stride(0) if index.ndim == 2 else 0


def _joined_qk(qkv: Tensor, txt_qkv: Tensor | None, heads: int) -> Tensor:
    """The text's and the image's q and k, one after the other: [B, S, 2, heads, head_dim]."""
    parts = [qkv] if txt_qkv is None else [txt_qkv, qkv]
    return torch.cat([part.unflatten(-1, (3, heads, -1))[:, :, :2] for part in parts], dim=1)


def _bwd_ref(grads: Sequence[Tensor], saved: Sequence[Tensor | None], s_txt: int) -> list[Tensor]:
    rstd, weights, cos, sin, index, q, k, qkv, txt_qkv = saved
    assert rstd is not None and weights is not None and cos is not None and sin is not None
    dq, dk, dv = grads
    s_all, heads = dq.shape[1:3]
    dtype = full_dtype(dq)
    rows = slice(s_all) if index is None else index
    # [S or B, S, 1, 1, head_dim / 2]
    cos, sin = (table[rows].to(dtype)[..., None, None, :] for table in (cos, sin))
    # each token's weights for q and k: [S, 2, 1, head_dim]
    w = weights[:2].to(dtype).expand(s_all - s_txt, -1, -1)
    if s_txt:
        w = torch.cat((weights[2:].to(dtype).expand(s_txt, -1, -1), w))
    w = w[:, :, None]
    rstd = rstd[..., None]
    d = _rotate(torch.stack((dq, dk), dim=2).to(dtype), cos, -sin)
    if qkv is None:
        assert q is not None and k is not None
        n = _rotate(torch.stack((q, k), dim=2).to(dtype), cos, -sin)
        xhat = n / w
    else:
        xhat = _joined_qk(qkv, txt_qkv, heads).to(dtype) * rstd
        n = xhat * w
    dqk = rstd * (d * w - xhat * (d * n).mean(-1, keepdim=True))
    packed = torch.cat((dqk.to(dv.dtype), dv[:, :, None]), dim=2).flatten(2)
    return [packed[:, s_txt:], packed[:, :s_txt]]


_fwd_op = registration.register(qk_norm_rope_fwd)
_bwd_op = registration.WritingOp(qk_norm_rope_bwd, writes=["dqkv", "dtxt_qkv"])


@_fwd_op.register_fake
def _(qkv: Tensor, txt_qkv: Tensor | None, weights: Tensor, *rest: Any) -> list[Tensor]:
    *_, heads, _, _ = rest
    batch, s_all, width = qkv.shape
    if txt_qkv is not None:
        s_all = s_all + txt_qkv.shape[1]
    q, k, v = (qkv.new_empty((batch, s_all, heads, width // (3 * heads))) for _ in range(3))
    return [q, k, v, qkv.new_empty((batch, s_all, 2, heads), dtype=torch.float32)]


@_bwd_op.register_fake
def _(dq: Tensor, *rest: Any) -> list[Tensor]:
    *_, s_txt, dqkv, dtxt_qkv, _ = rest
    batch, s_all, heads, head_dim = dq.shape
    outs = ((dqkv, s_all - s_txt), (dtxt_qkv, s_txt))
    return [
        dq.new_empty((batch, tokens, 3 * heads * head_dim)) for out, tokens in outs if out is None
    ]


def outputs_suffice(weights: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether backward can get the normalised q and k back from the outputs, to fp32 precision;
    waits for a GPU.

    weights [2 or 4, head_dim]; cos, sin [rows, head_dim / 2].
    """
    if dispatch.HAS_NATIVE and all(
        t.is_cpu and t.dtype == torch.float32 and t.is_contiguous() for t in (weights, cos, sin)
    ):
        return dispatch.native.qk_norm_rope_invertible(
            weights.data_ptr(), weights.numel(), cos.data_ptr(), sin.data_ptr(), cos.numel()
        )
    low, high = weights.abs().unflatten(-1, (-1, 2)).sort(dim=-1).values.unbind(-1)
    rotation = ((cos * cos + sin * sin - 1).abs() <= _MAX_TABLE_ERROR).all()
    return bool(((low >= _MIN_WEIGHT) & (high <= _MAX_WEIGHT_RATIO * low)).all() & rotation)


def forward(
    qkv: Tensor,
    txt_qkv: Tensor | None,
    weights: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor | None = None,
    *,
    heads: int,
    eps: float = 1e-6,
    keep_outputs: bool = False,
    impl: str,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor | None, ...]]:
    """Raw interface: (q, k, v), and (rstd, weights, cos, sin, index, q, k, qkv, txt_qkv) to keep
    for backward.

    Of the last four only q and k with `keep_outputs`, which only `outputs_suffice` allows, else
    only qkv and txt_qkv. weights [2 or 4, head_dim], fp32 (any float on Triton), holds the rows q,
    k, and where there is text txt_q, txt_k; all constants are contiguous.
    """
    if impl == "ref":
        text = (
            {}
            if txt_qkv is None
            else {"txt_qkv": txt_qkv, "txt_q_weight": weights[2], "txt_k_weight": weights[3]}
        )
        q, k, v = qk_norm_rope_ref(
            qkv, weights[0], weights[1], cos, sin, heads=heads, eps=eps, index=index, **text
        )
        qk = _joined_qk(qkv, txt_qkv, heads).to(full_dtype(qkv))
        rstd = torch.rsqrt(qk.square().mean(-1) + eps)
    else:
        launch = registration.launcher(qkv, qk_norm_rope_fwd, _fwd_op)
        q, k, v, rstd = launch(qkv, txt_qkv, weights, cos, sin, index, heads, eps, impl)
    kept = (q, k, None, None) if keep_outputs else (None, None, qkv, txt_qkv)
    return (q, k, v), (rstd, weights, cos, sin, index, *kept)


def backward(
    grads: Sequence[Tensor],
    saved: Sequence[Tensor | None],
    needs: Sequence[bool],
    *,
    s_txt: int,
    dqkv: Tensor | None = None,
    dtxt_qkv: Tensor | None = None,
    impl: str,
) -> tuple[Tensor | None, Tensor | None]:
    """Raw interface: (dqkv, dtxt_qkv) from (dq, dk, dv); s_txt: how many of the tokens are text.

    Written to dqkv [B, S_img, 3·heads·head_dim] and dtxt_qkv [B, S_txt, …] where given: column
    slices of wider buffers will do.
    """
    given = (dqkv, dtxt_qkv)
    if impl == "ref":
        made = _written(_bwd_ref(grads, saved, s_txt), given)
    else:
        made = registration.launcher(grads[0], qk_norm_rope_bwd, _bwd_op)(
            *grads, *saved, s_txt, *given, impl
        )
    new = iter(made)
    img, txt = (next(new) if out is None else out for out in given)
    return img if needs[0] else None, txt if needs[1] else None


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        txt_qkv: Tensor | None,
        weights: Tensor,
        cos: Tensor,
        sin: Tensor,
        index: Tensor | None,
        *rest: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads, eps, keep, impl = rest
        outs, saved = forward(
            qkv,
            txt_qkv,
            weights,
            cos,
            sin,
            index,
            heads=heads,
            eps=eps,
            keep_outputs=keep,
            impl=impl,
        )
        ctx.save_for_backward(*saved)
        ctx.s_txt, ctx.impl = 0 if txt_qkv is None else txt_qkv.shape[1], impl
        return outs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grads_in = backward(
            grads, ctx.saved_tensors, ctx.needs_input_grad[:2], s_txt=ctx.s_txt, impl=ctx.impl
        )
        return *grads_in, *(None,) * 8


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    txt_qkv: Tensor | None = None,
    txt_q_weight: Tensor | None = None,
    txt_k_weight: Tensor | None = None,
    eps: float = 1e-6,
    index: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k normalised and rotated, and v, each contiguous [B, S_txt + S_img, heads, head_dim], text
    first.

    qkv [B, S_img, 3·heads·head_dim] packed q|k|v; q_weight, k_weight [head_dim]; cos, sin [rows,
    head_dim / 2], where token i of the joined sequence has row i, or row index[i] (index [S] or [B,
    S], int32 or int64). txt_qkv [B, S_txt, 3·heads·head_dim] comes with norm weights of its own.
    Gradients go to qkv and txt_qkv; with a weight or a table that requires one, `auto` is `ref`.
    Raises ValueError on shapes that don't fit, or if `impl` can't do this call. Source: diffusers'
    `FluxAttnProcessor`, `apply_rotary_emb`.
    """
    weights = norm_weights(q_weight, k_weight, txt_qkv, txt_q_weight, txt_k_weight)
    check_inputs(qkv, txt_qkv, weights, cos, sin, index, heads)
    obstacle = None
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*weights, cos, sin)):
        obstacle = "a norm weight or a table requires a gradient, which only the reference computes"
    inputs = (qkv, cos, sin) if txt_qkv is None else (qkv, txt_qkv, cos, sin)
    backend = dispatch.resolve("qk_norm_rope", impl, inputs, obstacle=obstacle)
    if backend == "ref":
        return qk_norm_rope_ref(
            qkv, q_weight, k_weight, cos, sin, heads=heads,
            txt_qkv=txt_qkv, txt_q_weight=txt_q_weight, txt_k_weight=txt_k_weight, eps=eps, index=index,
        )  # fmt: skip
    stacked = torch.stack(weights).to(torch.float32)
    index = None if index is None else dense_rows(index)
    cos, sin = cos.contiguous(), sin.contiguous()
    runs_here = (
        backend == "native"
        and registration.launcher(qkv, qk_norm_rope_fwd, _fwd_op) is qk_norm_rope_fwd
    )
    keep_outputs = runs_here and outputs_suffice(stacked, cos, sin)
    return _QKNormRope.apply(
        qkv, txt_qkv, stacked, cos, sin, index, heads, eps, keep_outputs, backend
    )
