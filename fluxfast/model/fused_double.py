"""A double block as one autograd.Function, chained from the ops' raw interfaces.

KEPT_DOUBLE says what its forward keeps for its backward. Where Triton's kernels run, both streams
go through every op together, as rows of one tensor (`streams`); elsewhere one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fluxfast import ops
from fluxfast.model.block_call import (
    BlockCall,
    BlockLinears,
    Codes,
    codes_of,
    last_product_backward,
    new_output_like,
    values_of,
)
from fluxfast.model.block_run import run_backward, run_forward
from fluxfast.model.joint_attention import JointAttention, joint_attention
from fluxfast.model.streams import as_rows, as_sequence, streams_of
from fluxfast.model.tape import Grads, Tape
from fluxfast.ops.linear.decomposed import Narrow
from fluxfast.ops.linear.pair import AnyGroup, LinearPair
from fluxfast.ops.parts import Parts
from fluxfast.ops.row_quant import RowOutput
from fluxfast.ops.tensors import own_dtypes

# What a fused double block makes, in the order in which it makes it, with its size in E: one
# [B, S, D] tensor of image and text together. A few numbers a token, as an adapter's narrow product
# has, count as 0.
SIZES_DOUBLE = {
    "x_in": 1,
    "qkv": 3,
    "s_qkv": 0,
    "rotated": 3,
    "attn": 1,
    "s_out": 0,
    "x1": 1,
    "mlp_in": 1,
    "h": 4,
    "s_h": 0,
    "ff2_in": 4,
    "s_ff2": 0,
}
# What forward keeps of it for backward, beside the block's input, by recompute policy. "all" is
# policy "none" on a CPU, where LayerNorm, RoPE and GELU take their time even beside products. No
# policy keeps or recomputes the output of the last products, which backward does not need.
NARROW_DOUBLE = ("s_qkv", "s_out", "s_h", "s_ff2")
KEPT_DOUBLE: dict[str, tuple[str, ...]] = {
    "full": NARROW_DOUBLE,
    "selective": ("attn", *NARROW_DOUBLE),
    "none": ("qkv", "attn", "x1", "h", *NARROW_DOUBLE),
    "all": tuple(SIZES_DOUBLE),
}


class _Stream:
    """A stream of a fused call in one direction; or both streams, as flat rows (`streams`).

    It has the stream's modulation, its four groups of linears, its tape, and its activations, which
    `_to_last_products` sets and backward deletes one by one, so that their memory is free early.
    With both streams, each of shift1 … gate2 is a pair, the text's first.
    """

    # the normalised input, and what the norm's backward reads
    x_in: RowOutput
    norm1: tuple[Any, ...]
    # the outputs of the groups, each with its adapters' narrow product
    qkv: Tensor
    s_qkv: Narrow
    s_out: Narrow
    h: Tensor
    s_h: Narrow
    # the inputs of the other groups; x1 is the stream after attention
    attn_in: RowOutput
    x1: Tensor
    mlp_in: RowOutput
    norm2: tuple[Any, ...]
    ff2_in: RowOutput
    # in backward, the gradients of attention's output, of x1, of the modulation's chunks from gate1
    # on (None where it needs none), and of the adapters of each group
    dattn: Tensor
    dx1: Tensor
    dmod: tuple[Any, ...]
    grads: tuple[Any, ...]

    def __init__(
        self,
        x: Tensor,
        chunks: Sequence[Any],
        eps: Sequence[float],
        groups: Sequence[AnyGroup],
        tape: Tape,
        parts: Parts | None = None,
    ) -> None:
        """x [B, S, D], or [R, D] with parts; chunks: shift1 … gate2; eps: of both norms."""
        self.x, self.tape, self.parts = x, tape, parts
        self.eps1, self.eps2 = eps
        self.to_qkv, self.to_out, self.ff1, self.ff2 = groups
        self.shift1, self.scale1, self.gate1, self.shift2, self.scale2, self.gate2 = chunks


def _streams(
    block: Any,
    call: BlockCall,
    linears: BlockLinears,
    inputs: Sequence[Tensor],
    tapes: Sequence[Tape],
    *,
    backward: bool,
) -> list[_Stream]:
    """What goes through the ops: both streams in one, or the text's and then the image's.

    inputs: (img, txt, img_mod, txt_mod), or (flat rows, img_mod, txt_mod).
    """
    *rows, img_mod, txt_mod = inputs
    groups = call.filled_groups(linears, rows[0].dtype, backward=backward)
    img_chunks, txt_chunks = img_mod.chunk(6, dim=-1), txt_mod.chunk(6, dim=-1)
    img_eps = (block.norm1.norm.eps, block.norm2.eps)
    if call.parts is not None:
        pair = [LinearPair(*both, call.parts) for both in zip(groups[4:], groups[:4], strict=True)]
        chunks = list(zip(txt_chunks, img_chunks, strict=True))
        return [_Stream(rows[0], chunks, img_eps, pair, tapes[0], call.parts)]
    txt_eps = (block.norm1_context.norm.eps, block.norm2_context.eps)
    img, txt = rows
    return [
        _Stream(txt, txt_chunks, txt_eps, groups[4:], tapes[0]),
        _Stream(img, img_chunks, img_eps, groups[:4], tapes[1]),
    ]


def _attend(
    call: BlockCall, attn: Any, streams: Sequence[_Stream], tape: Tape
) -> tuple[JointAttention, Sequence[Tensor]]:
    """Attention over all tokens, and its output's rows as each of the streams has them."""
    if call.parts is not None:
        (both,) = streams
        txt_qkv, qkv = streams_of(both.qkv, call.parts)
        joint = joint_attention(call, tape, attn, qkv, txt_qkv)
        return joint, [as_rows(joint.out.flatten(2), call.parts)]
    txt, img = streams
    joint = joint_attention(call, tape, attn, img.qkv, txt.qkv)
    rows, text = joint.out.flatten(2), txt.x.shape[1]
    return joint, [rows[:, :text], rows[:, text:]]


def _to_last_products(
    call: BlockCall, attn: Any, streams: Sequence[_Stream], tape: Tape
) -> JointAttention:
    """All that a double block computes before its last products, or finds on the tapes.

    Forward runs it to compute everything, backward to compute again what forward did not keep.
    """
    norm_impl, gelu_impl = call.impl_of("modulated_layer_norm"), call.impl_of("gelu")
    for s in streams:
        s.x_in, s.norm1 = s.tape.kept("x_in") or s.tape.keep(
            "x_in",
            *ops.modulated_layer_norm.forward(
                s.x, s.scale1, s.shift1, s.eps1, out=s.to_qkv.form,
                into=s.to_qkv.new_input(*s.x.shape[:-1]), parts=s.parts, impl=norm_impl,
            ),
        )  # fmt: skip
        s.qkv, s.s_qkv = s.tape.product("qkv", s.to_qkv, s.x_in)

    joint, rows = _attend(call, attn, streams, tape)

    for s, attn_rows in zip(streams, rows, strict=True):
        # PyTorch writes attention's output, without room for s: both directions of `to_out` are
        # fused products, which take text and image in one launch
        s.attn_in = s.to_out.as_input(attn_rows)
        x1, (s.s_out,) = s.tape.kept("x1"), s.tape.kept("s_out") or (None,)
        if x1 is None:
            branch, s.s_out = s.to_out.forward(s.attn_in, kept=s.s_out)
            s.tape.keep("s_out", s.s_out)
            s.x1, s.mlp_in, norm2 = ops.modulated_layer_norm.forward_residual(
                s.x, s.gate1, branch, s.scale2, s.shift2, s.eps2, out=s.ff1.form,
                into=s.ff1.new_input(*s.x.shape[:-1]), parts=s.parts, impl=norm_impl,
            )  # fmt: skip
            del branch
            s.norm2 = norm2[:4]
            s.tape.keep("x1", s.x1)
            s.tape.keep("mlp_in", s.mlp_in, s.norm2)
        else:
            (s.x1,) = x1
            s.to_out.recall(s.s_out)
            s.mlp_in, s.norm2 = s.tape.kept("mlp_in") or ops.modulated_layer_norm.forward(
                s.x1, s.scale2, s.shift2, s.eps2, out=s.ff1.form, parts=s.parts, impl=norm_impl
            )
        s.h, s.s_h = s.tape.product("h", s.ff1, s.mlp_in)
        s.ff2_in, _ = s.tape.kept("ff2_in") or s.tape.keep(
            "ff2_in",
            *ops.gelu.forward(
                s.h, out=s.ff2.form, into=s.ff2.new_input(*s.h.shape[:-1]), impl=gelu_impl
            ),
        )
    return joint


class DoubleBlockFunction(torch.autograd.Function):
    """A fused double block: img [B, S_img, D], txt [B, S_txt, D], modulation [B, 6·D] of each.

    With `call.parts`, flat rows [R, D] stand in the place of img and txt.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor | tuple[Tensor, Tensor]:
        """(txt, img), or flat rows; inputs: the streams, img_mod, txt_mod."""
        return run_forward(ctx, _forward, *args)

    @staticmethod
    def once(*args: Any) -> Any:
        """Forward alone, of (block, call, linears, inputs), for a call that has no backward."""
        return _forward(*args)[0]

    @staticmethod
    @once_differentiable
    @own_dtypes
    def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        return run_backward(ctx, _backward, douts)


def _forward(
    block: Any, call: BlockCall, linears: BlockLinears, inputs: Sequence[Tensor]
) -> tuple[Tensor | tuple[Tensor, ...], Any]:
    """(txt, img), or the rows of both, for inputs (…, img_mod, txt_mod); and what is kept."""
    tapes = [Tape(KEPT_DOUBLE[call.keeps]) for _ in range(len(inputs) - 1)]
    streams = _streams(block, call, linears, inputs, tapes, backward=False)
    _to_last_products(call, block.attn, streams, tapes[-1])
    outs = []
    for s in streams:
        branch, s_ff2 = s.ff2.forward(s.ff2_in)
        s.tape.keep("s_ff2", s_ff2)
        out, _ = ops.gated_residual.forward(
            s.x1, s.gate2, branch,
            keep_y=False, parts=s.parts, impl=call.impl_of("gated_residual"),
        )  # fmt: skip
        outs.append(out)
        del branch
    return outs[0] if call.parts is not None else tuple(outs), [tape.values for tape in tapes]


def _backward(
    block: Any,
    call: BlockCall,
    linears: BlockLinears,
    inputs: Sequence[Tensor],
    kept: Any,
    douts: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Sequence[Tensor | None], Sequence[Grads]]:
    """The gradients of inputs, where they are needed, and of each group's adapters."""
    tapes = [Tape(values=values) for values in kept]
    streams = _streams(block, call, linears, inputs, tapes, backward=True)
    joint = _to_last_products(call, block.attn, streams, tapes[-1])
    *need_x, need_img_mod, need_txt_mod = needs
    # inputs have the image before the text, streams the text before the image
    need_mod = (
        [need_txt_mod, need_img_mod] if call.parts is None else [need_img_mod or need_txt_mod]
    )
    for s, dout, need in zip(streams, douts, need_mod, strict=True):
        _mlp_backward(call, s, dout, need)
    made = [
        _input_backward(call, s, *dqkv, *need)
        for s, dqkv, *need in zip(
            streams, _attention_backward(call, streams, joint), need_x[::-1], need_mod, strict=True
        )
    ]
    dxs = [dx for dx, _ in reversed(made)]
    if call.parts is None:
        (_, dtxt_mod), (_, dimg_mod) = made
        txt_grads, img_grads = (s.grads for s in streams)
    else:
        ((_, (dtxt_mod, dimg_mod)),) = made
        txt_grads, img_grads = zip(*streams[0].grads, strict=True)
    return (*dxs, dimg_mod, dtxt_mod), (*img_grads, *txt_grads)


def _mlp_backward(call: BlockCall, s: _Stream, dout: Tensor, need_mod: bool) -> None:
    """From the gradient of the stream's output to that of attention's output, `s.dattn`."""
    dff2, ff2_grads, dgate2 = last_product_backward(
        call, s.ff2, s.ff2_in, s.tape.kept("s_ff2"), s.gate2, dout, need_mod
    )
    del s.ff2_in
    dh = ops.gelu.backward_rows(
        dff2, (s.h,), out=call.grad_form, col_scale=s.ff1.fold(),
        # an h that was computed again may be overwritten by its gradient
        into=s.ff1.new_output(*s.h.shape[:-1]) if s.tape.kept("h") else s.h,
        parts=s.parts, impl=call.impl_of("gelu"),
    )  # fmt: skip
    del dff2, s.h
    dmlp_in, ff1_grads = s.ff1.backward(values_of(dh), s.mlp_in, s.s_h, codes=codes_of(dh))
    assert dmlp_in is not None
    del dh, s.mlp_in

    # the gradient of gate1 needs the product after attention
    branch = s.to_out.forward(s.attn_in)[0] if need_mod else None
    s.dx1, dbranch, (dscale2, dshift2, dgate1) = ops.modulated_layer_norm.backward_residual(
        dmlp_in, (*s.norm2, s.gate1, branch), add_to=dout,
        out=call.grad_form, col_scale=s.to_out.fold(), modulation=need_mod,
        parts=s.parts, impl=call.impl_of("modulated_layer_norm"),
    )  # fmt: skip
    del dmlp_in, s.norm2, s.x1, branch
    dattn, out_grads = s.to_out.backward(
        values_of(dbranch), s.attn_in, s.s_out, codes=codes_of(dbranch)
    )
    assert dattn is not None
    del s.attn_in
    s.dattn, s.dmod = dattn, (dgate1, dshift2, dscale2, dgate2)
    s.grads = (out_grads, ff1_grads, ff2_grads)


def _attention_backward(
    call: BlockCall, streams: Sequence[_Stream], joint: JointAttention
) -> list[tuple[Tensor, Codes]]:
    """The gradient of each stream's qkv, from those of attention's output, and its codes.

    Streams that are apart have no codes of it: these lie as one product over both reads them.
    """
    if call.parts is not None:
        dattn = as_sequence(streams[0].dattn, call.parts)
        txt_qkv, qkv = streams_of(streams[0].qkv, call.parts)
    else:
        dattn = torch.cat([s.dattn for s in streams], dim=1)
        txt_qkv, qkv = (s.qkv for s in streams)
    for s in streams:
        del s.dattn
    dq, dk, dv = ops.attention.backward(
        dattn.unflatten(-1, joint.q.shape[2:]), joint.q, joint.k, joint.v, joint.out, joint.saved,
        call.mask, backend=call.attention,
    )  # fmt: skip
    del dattn, joint.out, joint.q, joint.k, joint.v
    # projections that were computed again may be overwritten by their gradient
    dqkvs = [new_output_like(s.to_qkv, s.qkv) if s.tape.kept("qkv") else s.qkv for s in streams]
    dtxt_qkv, dqkv = dqkvs if call.parts is None else streams_of(dqkvs[0], call.parts)
    together = call.parts is not None
    made = ops.qk_norm_rope.backward_rows(
        (dq, dk, dv), call.rope_saved(joint.rstd, qkv, txt_qkv), s_txt=txt_qkv.shape[1],
        out=call.grad_form if together else "same",
        col_scale=streams[0].to_qkv.fold() if together else None,
        dqkv=dqkv, dtxt_qkv=dtxt_qkv, impl=call.impl_of("qk_norm_rope"),
    )  # fmt: skip
    codes = [] if made.codes is None else [(0, made.codes)]
    return [(rows, codes) for rows in dqkvs]


def _input_backward(
    call: BlockCall, s: _Stream, dqkv: Tensor, codes: Codes, need_x: bool, need_mod: bool
) -> tuple[Tensor | None, Any]:
    """The gradients of the stream's x and of its modulation [B, 6·D], None where not needed.

    With both streams, those of the modulation are a pair, the text's first.
    """
    dx_in, qkv_grads = s.to_qkv.backward(
        dqkv, s.x_in, s.s_qkv, codes=codes, need_dx=need_x or need_mod
    )
    s.grads = (qkv_grads, *s.grads)
    none = (None, None) if s.parts is not None else None
    if dx_in is None:
        return None, none
    dx, dscale1, dshift1 = ops.modulated_layer_norm.backward(
        dx_in, s.norm1, (need_x, need_mod, need_mod),
        add_to=s.dx1, parts=s.parts, impl=call.impl_of("modulated_layer_norm"),
    )  # fmt: skip
    if not need_mod:
        return dx, none
    parts = (dshift1, dscale1, *s.dmod)
    if s.parts is None:
        return dx, torch.cat(parts, dim=-1)
    return dx, tuple(torch.cat(of_part, dim=-1) for of_part in zip(*parts, strict=True))
