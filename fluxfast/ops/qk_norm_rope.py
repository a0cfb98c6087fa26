"""From packed q|k|v projections to attention's inputs: RMSNorm and rotary embedding of q and k,
text joined to image.

    q = rot(RMSNorm(q; eps)·w),  rot(x0, x1) = (x0·cos - x1·sin, x1·cos + x0·sin) on adjacent pairs

Everything between the load and the store is fp32. Tables hold one entry a pair ([rows,
head_dim/2]); diffusers' `FluxPosEmbed` holds each twice.

Backward, for one head of one token, with xhat = x·rstd and g = rot⁻¹(dy)·w, is
dx = rstd·(g - xhat·mean(g·xhat)). It can do without x, since xhat = rot⁻¹(y)/w and attention keeps
y anyway. But dividing by w loses what rounding y lost, and a zero loses all. So the packed inputs
are kept instead where two weights of a pair are more than 8 times apart, where one is next to zero,
or where a table is no rotation (cos² + sin² ≠ 1). They are also kept where the choice can't depend
on a value: under torch.compile, and on a GPU, which would have to be waited for. A caller whose
weights don't change asks `outputs_suffice` once, ahead.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fluxfast.ops import dispatch
from fluxfast.ops.registration import Op, is_traced
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
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, *, heads: int,
    txt_qkv: Tensor | None = None, txt_q_weight: Tensor | None = None,
    txt_k_weight: Tensor | None = None, eps: float = 1e-6, index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The maths in plain, differentiable torch; arguments as `qk_norm_rope`.

    Computes in fp32 (fp64 if qkv is) and rounds once, to qkv's dtype.
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


def forward(
    qkv: Tensor, txt_qkv: Tensor | None, weights: Tensor, cos: Tensor, sin: Tensor,
    index: Tensor | None = None, *, heads: int, eps: float = 1e-6, keep_outputs: bool = False,
    impl: str,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor | None, ...]]:  # fmt: skip
    """Raw interface: (q, k, v), each [B, S, heads, head_dim], and what to keep for backward.

    weights [2 or 4, head_dim], fp32 (any float on Triton), holds the rows q, k, and where there is
    text txt_q, txt_k. All constants are contiguous. Kept are (rstd, weights, cos, sin, index, q, k,
    qkv, txt_qkv), where rstd [B, S, 2, heads] is the reciprocal RMS of each head of q and k. Of the
    last four, only q and k are kept with `keep_outputs`, which `outputs_suffice` must allow, else
    only qkv and txt_qkv. Raises ValueError if index names a row that the tables don't have (on a
    GPU, unchecked).
    """
    if impl == "ref":
        text: dict[str, Tensor] = {}
        if txt_qkv is not None:
            text = {"txt_qkv": txt_qkv, "txt_q_weight": weights[2], "txt_k_weight": weights[3]}
        q, k, v = qk_norm_rope_ref(
            qkv, weights[0], weights[1], cos, sin, heads=heads, eps=eps, index=index, **text
        )
        qk = _joined_qk(qkv, txt_qkv, heads).to(full_dtype(qkv))
        rstd = torch.rsqrt(qk.square().mean(-1) + eps)
    elif is_traced(qkv):
        q, k, v, rstd = _forward_op(
            qkv, txt_qkv, weights, cos, sin, index,
            heads=heads, eps=eps, keep_outputs=keep_outputs, impl=impl,
        )  # fmt: skip
    elif impl == "triton":
        from fluxfast_kernels import qk_norm_rope as kernels

        text_rows = None if txt_qkv is None else dense_rows(txt_qkv)
        q, k, v, rstd = kernels.qk_norm_rope_fwd(
            dense_rows(qkv), weights, cos, sin, heads=heads, txt_qkv=text_rows, eps=eps, index=index
        )
    else:
        q, k, v, rstd = _forward_native(qkv, txt_qkv, weights, cos, sin, index, heads, eps)
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
        made = _backward_ref(grads, saved, s_txt)
    elif is_traced(grads[0]):
        options: dict[str, Any] = {"s_txt": s_txt, "dqkv": dqkv, "dtxt_qkv": dtxt_qkv}
        new = iter(_backward_op(grads, saved, (True, True), **options, impl=impl))
        made = [next(new) if out is None else out for out in given]
    else:
        # rows that are not contiguous are copied to where they are wanted
        made = [
            out if out is not None and out.stride(-1) == 1 else grads[0].new_empty(shape)
            for out, shape in zip(given, _grad_shapes(grads[0], s_txt), strict=True)
        ]
        dq, dk, dv = (dense_rows(grad) for grad in grads)
        *constants, qkv, txt_qkv = saved
        qkv, txt_qkv = (None if t is None else dense_rows(t) for t in (qkv, txt_qkv))
        if impl == "triton":
            from fluxfast_kernels import qk_norm_rope as kernels

            rstd, weights, cos, sin, index, q, k = constants
            assert rstd is not None and weights is not None and cos is not None and sin is not None
            kernels.qk_norm_rope_bwd(
                dq, dk, dv, rstd, weights, cos, sin, s_txt=s_txt, index=index,
                q=q, k=k, qkv=qkv, txt_qkv=txt_qkv, dqkv=made[0], dtxt_qkv=made[1],
            )  # fmt: skip
        else:
            _backward_native((dq, dk, dv), (*constants, qkv, txt_qkv), made, s_txt)
    for i, out in enumerate(given):
        if out is not None and out is not made[i]:
            out.copy_(made[i])
            made[i] = out
    return made[0] if needs[0] else None, made[1] if needs[1] else None


def _grad_shapes(dq: Tensor, s_txt: int) -> list[tuple[int, ...]]:
    """The shapes of dqkv and dtxt_qkv."""
    batch, s_all, heads, head_dim = dq.shape
    return [(batch, s, 3 * heads * head_dim) for s in (s_all - s_txt, s_txt)]


def _joined_qk(qkv: Tensor, txt_qkv: Tensor | None, heads: int) -> Tensor:
    """q and k of the text and the image, [B, S, 2, heads, head_dim], text first."""
    parts = [qkv] if txt_qkv is None else [txt_qkv, qkv]
    return torch.cat([part.unflatten(-1, (3, heads, -1))[:, :, :2] for part in parts], dim=1)


def _backward_ref(
    grads: Sequence[Tensor], saved: Sequence[Tensor | None], s_txt: int
) -> list[Tensor]:
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


def outputs_suffice(weights: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether backward can get the normalised q and k back from the outputs, to fp32 precision.

    weights [2 or 4, head_dim]; cos, sin [rows, head_dim / 2]. Waits for a GPU that they are on.
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


def _forward_native(
    qkv: Tensor, txt_qkv: Tensor | None, weights: Tensor, cos: Tensor, sin: Tensor,
    index: Tensor | None, heads: int, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    qkv, txt_qkv = dense_rows(qkv), None if txt_qkv is None else dense_rows(txt_qkv)
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
        *_packed_args(qkv), *_packed_args(txt_qkv),
        weights.data_ptr(), cos.data_ptr(), sin.data_ptr(), *index_args,
        q.data_ptr(), k.data_ptr(), v.data_ptr(), rstd.data_ptr(),
        batch, s_txt, s_img, heads, shape[3], eps, torch.get_num_threads(),
    )  # fmt: skip
    return q, k, v, rstd


def _backward_native(
    grads: Sequence[Tensor], saved: Sequence[Tensor | None], made: Sequence[Tensor], s_txt: int
) -> None:
    rstd, weights, cos, sin, index, q, k, qkv, txt_qkv = saved
    assert rstd is not None and weights is not None and cos is not None and sin is not None
    batch, s_all, heads, head_dim = grads[0].shape
    dispatch.native.qk_norm_rope_bwd(
        *(part for grad in grads for part in (grad.data_ptr(), *grad.stride()[:3])),
        0 if q is None else q.data_ptr(), 0 if k is None else k.data_ptr(),
        *_packed_args(qkv), *_packed_args(txt_qkv),
        rstd.data_ptr(), weights.data_ptr(), cos.data_ptr(), sin.data_ptr(), *_index_args(index),
        *_packed_args(made[0]), *_packed_args(made[1]),
        batch, s_txt, s_all - s_txt, heads, head_dim, torch.get_num_threads(),
    )  # fmt: skip


def _packed_args(qkv: Tensor | None) -> tuple[int, ...]:
    """Pointer, and elements from one sample and from one row to the next."""
    return (0, 0, 0) if qkv is None else (qkv.data_ptr(), *qkv.stride()[:2])


def _index_args(index: Tensor | None) -> tuple[int, int, int]:
    """Pointer, bytes of an element, and elements from one sample's indices to the next's."""
    if index is None:
        return 0, 0, 0
    return index.data_ptr(), index.element_size(), index.stride(0) if index.ndim == 2 else 0


def _fake_forward(qkv: Tensor, txt_qkv: Tensor | None, heads: int, **_: Any) -> list[Tensor]:
    batch, s_all, width = qkv.shape
    if txt_qkv is not None:
        s_all = s_all + txt_qkv.shape[1]
    q, k, v = (qkv.new_empty((batch, s_all, heads, width // (3 * heads))) for _ in range(3))
    return [q, k, v, qkv.new_empty((batch, s_all, 2, heads), dtype=torch.float32)]


def _fake_backward(
    grads: Sequence[Tensor], s_txt: int, dqkv: Tensor | None, dtxt_qkv: Tensor | None, **_: Any
) -> list[Tensor]:
    shapes = zip(_grad_shapes(grads[0], s_txt), (dqkv, dtxt_qkv), strict=True)
    return [grads[0].new_empty(shape) for shape, out in shapes if out is None]


_forward_op = Op("qk_norm_rope_fwd", forward, _fake_forward)
_backward_op = Op("qk_norm_rope_bwd", backward, _fake_backward, writes=["dqkv", "dtxt_qkv"])


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
        options = {"heads": heads, "eps": eps, "keep_outputs": keep, "impl": impl}
        outs, saved = forward(qkv, txt_qkv, weights, cos, sin, index, **options)
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
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, *, heads: int,
    txt_qkv: Tensor | None = None, txt_q_weight: Tensor | None = None,
    txt_k_weight: Tensor | None = None, eps: float = 1e-6, index: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q and k, normalised and rotated, and v, each [B, S_txt + S_img, heads, head_dim], text first.

    qkv [B, S_img, 3·heads·head_dim] packed q|k|v; q_weight, k_weight [head_dim]; cos, sin [rows,
    head_dim / 2], where token i of the joined sequence has row i, or row index[i] (index [S] or [B,
    S], int32 or int64). txt_qkv [B, S_txt, 3·heads·head_dim] comes with norm weights of its own.
    Gradients go to qkv and txt_qkv; with a weight or a table that requires one, `auto` is `ref`.
    Raises ValueError on shapes that don't fit, or if `impl` can't do this call. Source: diffusers'
    `FluxAttnProcessor`, `apply_rotary_emb`.
    """
    weights = _norm_weights(q_weight, k_weight, txt_qkv, txt_q_weight, txt_k_weight)
    _check(qkv, txt_qkv, weights, cos, sin, index, heads)
    obstacle = None
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*weights, cos, sin)):
        obstacle = "a norm weight or a table requires a gradient, which only the reference computes"
    inputs = (qkv, cos, sin) if txt_qkv is None else (qkv, txt_qkv, cos, sin)
    backend = dispatch.resolve("qk_norm_rope", impl, inputs, obstacle=obstacle)
    if backend == "ref":
        return qk_norm_rope_ref(
            qkv, q_weight, k_weight, cos, sin, heads=heads, txt_qkv=txt_qkv,
            txt_q_weight=txt_q_weight, txt_k_weight=txt_k_weight, eps=eps, index=index,
        )  # fmt: skip
    stacked = torch.stack(weights).to(torch.float32)
    index = None if index is None else dense_rows(index)
    cos, sin = cos.contiguous(), sin.contiguous()
    can_wait = backend == "native" and not is_traced(qkv)
    keep_outputs = can_wait and outputs_suffice(stacked, cos, sin)
    return _QKNormRope.apply(
        qkv, txt_qkv, stacked, cos, sin, index, heads, eps, keep_outputs, backend
    )


def _norm_weights(
    q_weight: Tensor,
    k_weight: Tensor,
    txt_qkv: Tensor | None,
    txt_q_weight: Tensor | None,
    txt_k_weight: Tensor | None,
) -> list[Tensor]:
    """The weights of q and k, and where there is text those of txt_q and txt_k."""
    if txt_qkv is None:
        return [q_weight, k_weight]
    if txt_q_weight is None or txt_k_weight is None:
        raise ValueError("qk_norm_rope: txt_qkv needs txt_q_weight and txt_k_weight")
    return [q_weight, k_weight, txt_q_weight, txt_k_weight]


def _check(
    qkv: Tensor,
    txt_qkv: Tensor | None,
    weights: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    index: Tensor | None,
    heads: int,
) -> None:
    """Raises ValueError unless the arguments of a call fit together."""
    if qkv.ndim != 3 or qkv.shape[2] % (6 * heads):
        raise ValueError(
            f"qk_norm_rope: expected qkv [B, S, 3·heads·head_dim], heads {heads} and head_dim "
            f"even, got {list(qkv.shape)}"
        )
    batch, s_all, width = qkv.shape
    head_dim = width // (3 * heads)
    if txt_qkv is not None:
        if txt_qkv.ndim != 3 or txt_qkv.shape[0] != batch or txt_qkv.shape[2] != width:
            raise ValueError(
                f"qk_norm_rope: expected txt_qkv [{batch}, S_txt, {width}], as qkv has it, got "
                f"{list(txt_qkv.shape)}"
            )
        s_all = s_all + txt_qkv.shape[1]
    if any(w.shape != (head_dim,) for w in weights):
        raise ValueError(
            f"qk_norm_rope: expected norm weights [{head_dim}], got "
            f"{[list(w.shape) for w in weights]}"
        )
    if cos.ndim != 2 or cos.shape[1] != head_dim // 2 or sin.shape != cos.shape:
        raise ValueError(
            f"qk_norm_rope: expected cos and sin [rows, {head_dim // 2}], got {list(cos.shape)} "
            f"and {list(sin.shape)}"
        )
    if index is None:
        if cos.shape[0] < s_all:
            raise ValueError(
                f"qk_norm_rope: {s_all} tokens need as many table rows, got {cos.shape[0]}"
            )
    elif index.shape not in ((s_all,), (batch, s_all)) or index.dtype not in (
        torch.int32,
        torch.int64,
    ):
        raise ValueError(
            f"qk_norm_rope: expected index [{s_all}] or [{batch}, {s_all}], int32 or int64, "
            f"got {list(index.shape)} {index.dtype}"
        )
