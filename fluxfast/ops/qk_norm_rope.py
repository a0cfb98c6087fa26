"""From packed q|k|v projections to attention's inputs: RMSNorm and rotary embedding of q and k, text joined to image.

    q = rot(RMSNorm(q; eps)·w),  rot(x0, x1) = (x0·cos - x1·sin, x1·cos + x0·sin) on adjacent pairs

Everything between the load and the store is fp32. Tables hold one entry a pair ([rows, head_dim/2]); diffusers'
`FluxPosEmbed` holds each twice.

Backward, for one head of one token, with xhat = x·rstd, g = rot⁻¹(dy)·w:  dx = rstd·(g - xhat·mean(g·xhat)).
It needs no x: xhat = rot⁻¹(y)/w, and attention keeps y anyway. Dividing by w loses what rounding y lost, and a zero loses all,
so where two weights of a pair are more than 8 times apart, one is next to zero, or a table is no rotation (cos² + sin² ≠ 1),
the packed inputs are kept instead; so they are under torch.compile, where a choice can't hang on a value.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fluxfast.ops import _impl


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
    """The maths in plain, differentiable torch; arguments as `qk_norm_rope`. fp32 inside (fp64 if qkv is), rounded once."""
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v [B, S, heads, head_dim], and the reciprocal RMS of each head of q and k [B, S, 2, heads].

    weights [2 or 4, head_dim] holds the rows q, k, and where there is text txt_q, txt_k; it, cos and sin are contiguous.
    The launcher alone: fp32 on the CPU, no autograd. Raises ValueError if index names a row that the tables don't have.
    """
    qkv = _impl.dense_rows(qkv)
    batch, s_img, width = qkv.shape
    s_txt = 0 if txt_qkv is None else txt_qkv.shape[1]
    shape = (batch, s_txt + s_img, heads, width // (3 * heads))
    q, k, v = (torch.empty(shape, dtype=qkv.dtype) for _ in range(3))
    rstd = torch.empty((batch, s_txt + s_img, 2, heads), dtype=torch.float32)
    txt_qkv = None if txt_qkv is None else _impl.dense_rows(txt_qkv)
    index_args = _index_args(index)
    if not _impl.native.rope_index_in_range(*index_args, batch, shape[1], cos.shape[0]):
        raise ValueError(f"qk_norm_rope: index names a row that the tables don't have; they have {cos.shape[0]}")
    _impl.native.qk_norm_rope_fwd(
        qkv.data_ptr(), *qkv.stride()[:2],
        *_packed_args(txt_qkv),
        weights.data_ptr(), cos.data_ptr(), sin.data_ptr(), *index_args,
        q.data_ptr(), k.data_ptr(), v.data_ptr(), rstd.data_ptr(),
        batch, s_txt, s_img, heads, shape[3], eps, torch.get_num_threads(),
    )  # fmt: skip
    return q, k, v, rstd


def qk_norm_rope_bwd(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    rstd: Tensor,
    weights: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor | None,
    s_txt: int,
    q: Tensor | None,
    k: Tensor | None,
    qkv: Tensor | None,
    txt_qkv: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """dqkv [B, S_img, 3·heads·head_dim] and dtxt_qkv [B, S_txt, 3·heads·head_dim].

    What forward kept is either its outputs q and k, or its inputs qkv and txt_qkv.
    """
    dq, dk, dv = _impl.dense_rows(dq), _impl.dense_rows(dk), _impl.dense_rows(dv)
    batch, s_all, heads, head_dim = dq.shape
    dqkv = torch.empty((batch, s_all - s_txt, 3 * heads * head_dim), dtype=dq.dtype)
    dtxt_qkv = torch.empty((batch, s_txt, 3 * heads * head_dim), dtype=dq.dtype)
    qkv = None if qkv is None else _impl.dense_rows(qkv)
    txt_qkv = None if txt_qkv is None else _impl.dense_rows(txt_qkv)
    _impl.native.qk_norm_rope_bwd(
        dq.data_ptr(), *dq.stride()[:3],
        dk.data_ptr(), *dk.stride()[:3],
        dv.data_ptr(), *dv.stride()[:3],
        0 if q is None else q.data_ptr(), 0 if k is None else k.data_ptr(),
        *_packed_args(qkv),
        *_packed_args(txt_qkv),
        rstd.data_ptr(), weights.data_ptr(), cos.data_ptr(), sin.data_ptr(), *_index_args(index),
        dqkv.data_ptr(), dtxt_qkv.data_ptr(),
        batch, s_txt, s_all - s_txt, heads, head_dim, torch.get_num_threads(),
    )  # fmt: skip
    return dqkv, dtxt_qkv


def _is_invertible(weights: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether backward can get the normalised q and k back from the outputs, to fp32 precision."""
    return _impl.native.qk_norm_rope_invertible(
        weights.data_ptr(), weights.numel(), cos.data_ptr(), sin.data_ptr(), cos.numel()
    )


def _packed_args(qkv: Tensor | None) -> tuple[int, ...]:
    """Pointer, and elements from one sample and from one row to the next."""
    return (0, 0, 0) if qkv is None else (qkv.data_ptr(), *qkv.stride()[:2])


def _index_args(index: Tensor | None) -> tuple[int, int, int]:
    """Pointer, bytes of an element, and elements from one sample's indices to the next's."""
    if index is None:
        return 0, 0, 0
    return index.data_ptr(), index.element_size(), index.stride(0) if index.ndim == 2 else 0


_fwd_op = torch.library.custom_op("fluxfast::qk_norm_rope_fwd", qk_norm_rope_fwd, mutates_args=())
_bwd_op = torch.library.custom_op("fluxfast::qk_norm_rope_bwd", qk_norm_rope_bwd, mutates_args=())


@_fwd_op.register_fake
def _(
    qkv: Tensor,
    txt_qkv: Tensor | None,
    weights: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor | None,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, s_all, width = qkv.shape
    if txt_qkv is not None:
        s_all = s_all + txt_qkv.shape[1]
    q, k, v = (qkv.new_empty((batch, s_all, heads, width // (3 * heads))) for _ in range(3))
    return q, k, v, qkv.new_empty((batch, s_all, 2, heads))


@_bwd_op.register_fake
def _(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    rstd: Tensor,
    weights: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor | None,
    s_txt: int,
    q: Tensor | None,
    k: Tensor | None,
    qkv: Tensor | None,
    txt_qkv: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, s_all, heads, head_dim = dq.shape
    width = 3 * heads * head_dim
    return dq.new_empty((batch, s_all - s_txt, width)), dq.new_empty((batch, s_txt, width))


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
        heads: int,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        launch = _impl.launcher(qkv, qk_norm_rope_fwd, _fwd_op)
        q, k, v, rstd = launch(qkv, txt_qkv, weights, cos, sin, index, heads, eps)
        ctx.s_txt = 0 if txt_qkv is None else txt_qkv.shape[1]
        outputs_do = launch is qk_norm_rope_fwd and _is_invertible(weights, cos, sin)
        kept = (q, k, None, None) if outputs_do else (None, None, qkv, txt_qkv)
        ctx.save_for_backward(rstd, weights, cos, sin, index, *kept)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        rstd, weights, cos, sin, index, *kept = ctx.saved_tensors
        launch = _impl.launcher(dq, qk_norm_rope_bwd, _bwd_op)
        dqkv, dtxt_qkv = launch(dq, dk, dv, rstd, weights, cos, sin, index, ctx.s_txt, *kept)
        return dqkv, dtxt_qkv if ctx.needs_input_grad[1] else None, None, None, None, None, None, None


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
    """q, k normalised and rotated, and v, each contiguous [B, S_txt + S_img, heads, head_dim], text first.

    qkv [B, S_img, 3·heads·head_dim] packed q|k|v; q_weight, k_weight [head_dim]; cos, sin [rows, head_dim / 2], where
    token i of the joined sequence has row i, or row index[i] (index [S] or [B, S], int32 or int64).
    txt_qkv [B, S_txt, 3·heads·head_dim] comes with norm weights of its own.
    Gradients go to qkv and txt_qkv; with a weight or a table that requires one, `auto` is `ref`.
    Raises ValueError on shapes that don't fit, or if `impl` can't do this call.
    Source: diffusers' `FluxAttnProcessor`, `apply_rotary_emb`.
    """
    _check(qkv, q_weight, k_weight, cos, sin, heads, txt_qkv, txt_q_weight, txt_k_weight, index)
    constants = [t for t in (q_weight, k_weight, txt_q_weight, txt_k_weight, cos, sin) if t is not None]
    obstacle = None
    if torch.is_grad_enabled() and any(t.requires_grad for t in constants):
        obstacle = "a norm weight or a table requires a gradient, which only the reference computes"
    inputs = (qkv, cos, sin) if txt_qkv is None else (qkv, txt_qkv, cos, sin)
    if _impl.resolve("qk_norm_rope", impl, inputs, obstacle=obstacle) == "ref":
        return qk_norm_rope_ref(
            qkv, q_weight, k_weight, cos, sin, heads=heads,
            txt_qkv=txt_qkv, txt_q_weight=txt_q_weight, txt_k_weight=txt_k_weight, eps=eps, index=index,
        )  # fmt: skip
    weights = torch.stack(constants[:-2]).to(torch.float32)
    if index is not None:
        index = _impl.dense_rows(index)
    return _QKNormRope.apply(qkv, txt_qkv, weights, cos.contiguous(), sin.contiguous(), index, heads, eps)


def _check(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    txt_qkv: Tensor | None,
    txt_q_weight: Tensor | None,
    txt_k_weight: Tensor | None,
    index: Tensor | None,
) -> None:
    if qkv.ndim != 3 or qkv.shape[2] % (6 * heads):
        raise ValueError(
            f"qk_norm_rope: expected qkv [B, S, 3·heads·head_dim], heads {heads} and head_dim even, got {list(qkv.shape)}"
        )
    batch, s_all, width = qkv.shape
    head_dim = width // (3 * heads)
    weights = [q_weight, k_weight]
    if txt_qkv is not None:
        if txt_qkv.ndim != 3 or txt_qkv.shape[0] != batch or txt_qkv.shape[2] != width:
            raise ValueError(
                f"qk_norm_rope: expected txt_qkv [{batch}, S_txt, {width}], as qkv has it, got {list(txt_qkv.shape)}"
            )
        if txt_q_weight is None or txt_k_weight is None:
            raise ValueError("qk_norm_rope: txt_qkv needs txt_q_weight and txt_k_weight")
        s_all = s_all + txt_qkv.shape[1]
        weights += [txt_q_weight, txt_k_weight]
    if any(w.shape != (head_dim,) for w in weights):
        raise ValueError(f"qk_norm_rope: expected norm weights [{head_dim}], got {[list(w.shape) for w in weights]}")
    if cos.ndim != 2 or cos.shape[1] != head_dim // 2 or sin.shape != cos.shape:
        raise ValueError(
            f"qk_norm_rope: expected cos and sin [rows, {head_dim // 2}], got {list(cos.shape)} and {list(sin.shape)}"
        )
    if index is None:
        if cos.shape[0] < s_all:
            raise ValueError(f"qk_norm_rope: {s_all} tokens need as many table rows, got {cos.shape[0]}")
    elif index.shape not in ((s_all,), (batch, s_all)) or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"qk_norm_rope: expected index [{s_all}] or [{batch}, {s_all}], int32 or int64, "
            f"got {list(index.shape)} {index.dtype}"
        )
