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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fluxfast.ops import dispatch, qk_norm_rope_native, row_quant
from fluxfast.ops.parts import PerPart, tensors_of
from fluxfast.ops.qk_norm_rope_native import outputs_suffice as outputs_suffice
from fluxfast.ops.registration import Op, is_traced
from fluxfast.ops.row_quant import Quantized
from fluxfast.ops.tensors import dense_rows, full_dtype


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


class PackedGrad(NamedTuple):
    """The gradients of the packed projections, and where an 8-bit product reads them, their codes.

    Those of text and image are one tensor, which one product can read: codes [B·S, 3·D] and scales
    [B·S] hold the text's rows of all samples, and then the image's.
    """

    dqkv: Tensor
    dtxt_qkv: Tensor
    codes: Quantized | None


def forward(
    qkv: Tensor, txt_qkv: Tensor | None, weights: Tensor, cos: Tensor, sin: Tensor,
    index: Tensor | None = None, *, heads: int, eps: float = 1e-6, keep_outputs: bool = False,
    view_v: bool = False, impl: str,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor | None, ...]]:  # fmt: skip
    """Raw interface: (q, k, v), each [B, S, heads, head_dim], and what to keep for backward.

    weights [2 or 4, head_dim], fp32 (any float on Triton), holds the rows q, k, and where there is
    text txt_q, txt_k. All constants are contiguous. Kept are (rstd, weights, cos, sin, index, q, k,
    qkv, txt_qkv), where rstd [B, S, 2, heads] is the reciprocal RMS of each head of q and k. Of the
    last four, only q and k are kept with `keep_outputs`, which `outputs_suffice` must allow, else
    only qkv and txt_qkv. With `view_v`, Triton's v is a view of the packed projections where these
    are one tensor, or lie as one in memory, text first; else it is a copy. Raises ValueError if
    index names a row that the tables don't have (on a GPU, unchecked).
    """
    packed = _as_one(txt_qkv, qkv) if view_v and impl == "triton" else None
    q, k, rstd, v = _project(
        qkv, txt_qkv, weights, cos, sin, index,
        heads=heads, eps=eps, copy_v=packed is None, impl=impl,
    )  # fmt: skip
    if packed is not None:
        v = packed.unflatten(-1, (3, heads, -1))[:, :, 2]
    assert v is not None
    kept = (q, k, None, None) if keep_outputs else (None, None, qkv, txt_qkv)
    return (q, k, v), (rstd, weights, cos, sin, index, *kept)


def _as_one(txt_qkv: Tensor | None, qkv: Tensor) -> Tensor | None:
    """Text and image as one tensor [B, S, 3·D], if they lie so in memory; else None."""
    if txt_qkv is None:
        return qkv
    # torch.compile has no memory to look at
    if torch.compiler.is_compiling():
        return None
    (batch, s_txt, width), (stride_b, stride_s, _) = txt_qkv.shape, txt_qkv.stride()
    if (
        txt_qkv.dtype != qkv.dtype
        or txt_qkv.stride()[1:] != qkv.stride()[1:]
        or (batch > 1 and stride_b != qkv.stride(0))
        or txt_qkv.storage_offset() + s_txt * stride_s != qkv.storage_offset()
        or txt_qkv.untyped_storage()._cdata != qkv.untyped_storage()._cdata
    ):
        return None
    return txt_qkv.as_strided((batch, s_txt + qkv.shape[1], width), txt_qkv.stride())


def _project(
    qkv: Tensor, txt_qkv: Tensor | None, weights: Tensor, cos: Tensor, sin: Tensor,
    index: Tensor | None, *, heads: int, eps: float, copy_v: bool, impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """q, k, rstd, and with `copy_v` v, which the native module and the reference always make."""
    if impl == "ref":
        text: dict[str, Tensor] = {}
        if txt_qkv is not None:
            text = {"txt_qkv": txt_qkv, "txt_q_weight": weights[2], "txt_k_weight": weights[3]}
        q, k, v = qk_norm_rope_ref(
            qkv, weights[0], weights[1], cos, sin, heads=heads, eps=eps, index=index, **text
        )
        qk = _joined_qk(qkv, txt_qkv, heads).to(full_dtype(qkv))
        return q, k, torch.rsqrt(qk.square().mean(-1) + eps), v
    if is_traced(qkv):
        made = _forward_op(
            qkv, txt_qkv, weights, cos, sin, index, heads=heads, eps=eps, copy_v=copy_v, impl=impl
        )
        return made[0], made[1], made[2], made[3] if copy_v else None
    if impl == "triton":
        from fluxfast_kernels import qk_norm_rope as kernels

        out = kernels.qk_norm_rope_fwd(
            dense_rows(qkv), weights, cos, sin, heads=heads, eps=eps, index=index, copy_v=copy_v,
            txt_qkv=None if txt_qkv is None else dense_rows(txt_qkv),
        )  # fmt: skip
        return out.q, out.k, out.rstd, out.v
    return qk_norm_rope_native.forward(qkv, txt_qkv, weights, cos, sin, index, heads, eps)


def backward(
    grads: Sequence[Tensor], saved: Sequence[Tensor | None], needs: Sequence[bool], *, s_txt: int,
    impl: str,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Raw interface: (dqkv, dtxt_qkv) from (dq, dk, dv); s_txt: how many of the tokens are text."""
    made = backward_rows(grads, saved, s_txt=s_txt, impl=impl)
    return made.dqkv if needs[0] else None, made.dtxt_qkv if needs[1] else None


def backward_rows(
    grads: Sequence[Tensor], saved: Sequence[Tensor | None], *, s_txt: int, out: str = "same",
    col_scale: PerPart | None = None, dqkv: Tensor | None = None, dtxt_qkv: Tensor | None = None,
    impl: str,
) -> PackedGrad:  # fmt: skip
    """Raw interface: the gradients of qkv and txt_qkv in the form that dgrad reads.

    out: "same", or "both-int8" or "both-e4m3" for codes beside the values. The codes are those of
    the gradient times col_scale [3·D], where there is text a pair (text's, image's). Values are
    written to dqkv [B, S_img, 3·D] and dtxt_qkv [B, S_txt, 3·D] where given: column slices of wider
    buffers will do, and the projections themselves.
    """
    col_scales = [] if col_scale is None else list(tensors_of(col_scale))
    assert len(col_scales) in (0, 2 if s_txt else 1)
    options: dict[str, Any] = {"s_txt": s_txt, "out": out, "col_scales": col_scales}
    options |= {"dqkv": dqkv, "dtxt_qkv": dtxt_qkv, "impl": impl}
    if impl == "ref" or not is_traced(grads[0]):
        return _gradients(grads, saved, **options)
    new = iter(_backward_op(grads, saved, **options))
    dqkv, dtxt_qkv = (next(new) if given is None else given for given in (dqkv, dtxt_qkv))
    return PackedGrad(dqkv, dtxt_qkv, None if out == "same" else Quantized(*new))


def _gradients(
    grads: Sequence[Tensor], saved: Sequence[Tensor | None], *, s_txt: int, out: str,
    col_scales: Sequence[Tensor], dqkv: Tensor | None, dtxt_qkv: Tensor | None, impl: str,
) -> PackedGrad:  # fmt: skip
    """`backward_rows`, its col_scale as a list of none, one or two."""
    given, codes = [dqkv, dtxt_qkv], None
    if impl == "ref":
        exact = _backward_ref(grads, saved, s_txt)
        made = [part.to(grads[2].dtype) for part in exact]
    else:
        # rows that are not contiguous are copied to where they are wanted
        made = [
            out if out is not None and out.stride(-1) == 1 else grads[0].new_empty(shape)
            for out, shape in zip(given, _grad_shapes(grads[0], s_txt), strict=True)
        ]
        *constants, qkv, txt_qkv = saved
        saved = (*constants, *(None if t is None else dense_rows(t) for t in (qkv, txt_qkv)))
        grads = [dense_rows(grad) for grad in grads]
        if impl == "triton":
            codes = _backward_triton(grads, saved, made, s_txt, out, col_scales)
        else:
            qk_norm_rope_native.backward(grads, saved, made, s_txt)
            exact = made
    if out != "same" and impl != "triton":
        codes = _codes_of(exact, out.removeprefix("both-"), col_scales, impl)
    for i, target in enumerate(given):
        if target is not None and target is not made[i]:
            target.copy_(made[i])
            made[i] = target
    return PackedGrad(made[0], made[1], codes)


def _codes_of(
    parts: Sequence[Tensor], fmt: str, col_scales: Sequence[Tensor], impl: str
) -> Quantized:
    """The codes of dqkv and dtxt_qkv in one tensor, the text's first."""
    img, txt = parts
    ordered = [txt, img] if txt.shape[1] else [img]
    found = [
        row_quant.forward(part.flatten(0, 1), fmt, scale, impl=impl)
        for part, scale in zip(ordered, col_scales or (None, None)[: len(ordered)], strict=True)
    ]
    return Quantized(*(torch.cat(tensors) for tensors in zip(*found, strict=True)))


def _backward_triton(
    grads: Sequence[Tensor], saved: Sequence[Tensor | None], made: Sequence[Tensor], s_txt: int,
    out: str, col_scales: Sequence[Tensor],
) -> Quantized | None:  # fmt: skip
    """Writes the gradients to `made`, and returns the codes that `out` asks for."""
    from fluxfast_kernels import qk_norm_rope as kernels

    rstd, weights, cos, sin, index, q, k, qkv, txt_qkv = saved
    assert rstd is not None and weights is not None and cos is not None and sin is not None
    dq, dk, dv = grads
    txt_scale, scale = (None, None, *col_scales)[-2:]
    found = kernels.qk_norm_rope_bwd(
        dq, dk, dv, rstd, weights, cos, sin, s_txt=s_txt, index=index, q=q, k=k, qkv=qkv,
        txt_qkv=txt_qkv, out=out, col_scale=scale, txt_col_scale=txt_scale, dqkv=made[0],
        dtxt_qkv=made[1] if s_txt else None,
    )  # fmt: skip
    if found.q is None or found.q_scale is None:
        return None
    return Quantized(found.q, found.q_scale)


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
    """The gradients of qkv and txt_qkv before they are rounded to their dtype."""
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
    packed = torch.cat((dqk, dv.to(dtype)[:, :, None]), dim=2).flatten(2)
    return [packed[:, s_txt:], packed[:, :s_txt]]


def _fake_forward(
    qkv: Tensor, txt_qkv: Tensor | None, heads: int, copy_v: bool, **_: Any
) -> list[Tensor]:
    batch, s_all, width = qkv.shape
    if txt_qkv is not None:
        s_all = s_all + txt_qkv.shape[1]
    shape = (batch, s_all, heads, width // (3 * heads))
    q, k = (qkv.new_empty(shape) for _ in range(2))
    rstd = qkv.new_empty((batch, s_all, 2, heads), dtype=torch.float32)
    return [q, k, rstd, qkv.new_empty(shape)] if copy_v else [q, k, rstd]


def _fake_backward(
    grads: Sequence[Tensor], s_txt: int, out: str, dqkv: Tensor | None, dtxt_qkv: Tensor | None,
    **_: Any,
) -> list[Tensor]:  # fmt: skip
    dq = grads[0]
    shapes = zip(_grad_shapes(dq, s_txt), (dqkv, dtxt_qkv), strict=True)
    values = [dq.new_empty(shape) for shape, given in shapes if given is None]
    if out == "same":
        return values
    batch, s_all, heads, head_dim = dq.shape
    rows = dq.new_empty((batch * s_all, 3 * heads * head_dim))
    return values + row_quant.empty_parts(rows, out.removeprefix("both-"))


_forward_op = Op("qk_norm_rope_fwd", _project, _fake_forward)
_backward_op = Op("qk_norm_rope_bwd", _gradients, _fake_backward, writes=["dqkv", "dtxt_qkv"])


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, txt_qkv: Tensor | None, weights: Tensor, cos: Tensor, sin: Tensor,
        index: Tensor | None, *rest: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
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
    q_weight: Tensor, k_weight: Tensor, txt_qkv: Tensor | None, txt_q_weight: Tensor | None,
    txt_k_weight: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """The weights of q and k, and where there is text those of txt_q and txt_k."""
    if txt_qkv is None:
        return [q_weight, k_weight]
    if txt_q_weight is None or txt_k_weight is None:
        raise ValueError("qk_norm_rope: txt_qkv needs txt_q_weight and txt_k_weight")
    return [q_weight, k_weight, txt_q_weight, txt_k_weight]


def _check(
    qkv: Tensor, txt_qkv: Tensor | None, weights: list[Tensor], cos: Tensor, sin: Tensor,
    index: Tensor | None, heads: int,
) -> None:  # fmt: skip
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
