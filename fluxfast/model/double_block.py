"""The double block: image and text with weights of their own, joined in attention.

This is `DoubleStreamBlock` of black-forest-labs/flux (src/flux/modules/layers.py). `_composed` is
the maths, one op a line. `DoubleBlockFunction` is the same maths as one autograd.Function, chained
from the ops' raw interfaces (`fluxfast.ops`); KEPT_DOUBLE says what its forward keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fluxfast import ops
from fluxfast.model import attention_module
from fluxfast.model.block_base import BlockBase, OwnerDtypes, finite
from fluxfast.model.block_call import (
    BlockCall,
    BlockLinears,
    codes_of,
    last_product_backward,
    values_of,
)
from fluxfast.model.joint_attention import JointAttention, joint_attention
from fluxfast.model.known_modules import must_be_called
from fluxfast.model.residency import resident
from fluxfast.model.rope import Tables, rope_arguments
from fluxfast.model.tape import Grads, Tape, adapter_grads, linears_again, save, saved
from fluxfast.ops.gated_residual import gated_residual
from fluxfast.ops.gelu import gelu
from fluxfast.ops.linear.group import LinearGroup
from fluxfast.ops.modulated_layer_norm import modulated_layer_norm
from fluxfast.ops.qk_norm_rope import qk_norm_rope
from fluxfast.ops.row_quant import RowOutput
from fluxfast.ops.tensors import own_dtypes

# What a fused double block makes, in the order in which it makes it, with its size in E: one
# [B, S, D] tensor of image and text together. A few numbers a token, as an adapter's narrow product
# has, count as 0.
SIZES_DOUBLE = {
    "x_in": 1,
    "qkv": 3,
    "rotated": 3,
    "attn": 1,
    "x1": 1,
    "mlp_in": 1,
    "h": 4,
    "ff2_in": 4,
    "s_ff2": 0,
}
# What forward keeps of it for backward, beside the block's input, by recompute policy. "all" is
# policy "none" on a CPU, where LayerNorm, RoPE and GELU take their time even beside products. No
# policy keeps or recomputes the output of the last products, which backward does not need.
KEPT_DOUBLE: dict[str, tuple[str, ...]] = {
    "full": (),
    "selective": ("attn", "s_ff2"),
    "none": ("qkv", "attn", "x1", "h", "s_ff2"),
    "all": tuple(SIZES_DOUBLE),
}


class DoubleMaths(BlockBase):
    """A double block, over diffusers' names of its modules."""

    qk_norms = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    norm1: Any
    norm1_context: Any
    norm2: Any
    norm2_context: Any
    ff: Any
    ff_context: Any

    @property
    def function(self) -> type[torch.autograd.Function]:
        return DoubleBlockFunction

    def linear_groups(self) -> list[tuple[nn.Module, ...]]:
        attn, ff, ff_context = self.attn, self.ff.net, self.ff_context.net
        img = [attention_module.qkv(attn), (attn.to_out[0],), (ff[0].proj,), (ff[2],)]
        txt = [
            attention_module.txt_qkv(attn),
            (attn.to_add_out,),
            (ff_context[0].proj,),
            (ff_context[2],),
        ]
        return img + txt

    def modulation_linears(self) -> tuple[nn.Module, ...]:
        return self.norm1.linear, self.norm1_context.linear

    def bypassed(self) -> tuple[nn.Module, ...]:
        modulated = (
            m for norm in (self.norm1, self.norm1_context) for m in (norm, norm.norm, norm.silu)
        )
        mlps = (m for ff in (self.ff, self.ff_context) for m in (ff, ff.net[0], ff.net[1]))
        return *modulated, self.norm2, self.norm2_context, *mlps

    def composed_because(self, kwargs: dict[str, Any]) -> str | None:
        return super().composed_because(kwargs) or must_be_called([self.attn.to_out[1]])

    def _streams(self, img: Tensor, txt: Tensor | None) -> tuple[Tensor, ...]:
        assert txt is not None
        return img, txt

    def _outputs(
        self, outs: tuple[Tensor, Tensor], streams: tuple[Tensor, ...], _: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        (txt_out, img_out), (img, txt) = outs, streams
        return finite(txt_out.to(txt.dtype)), img_out.to(img.dtype)

    def _composed(
        self,
        img: Tensor,
        txt: Tensor,
        img_mod: Tensor,
        txt_mod: Tensor,
        pe: Tables,
        kwargs: dict[str, Any],
        owner: OwnerDtypes,
    ) -> tuple[Tensor, Tensor]:
        attn, apply = self.attn, self._projection(owner)
        img_shift, img_scale, img_gate, img_shift2, img_scale2, img_gate2 = img_mod.chunk(6, dim=-1)
        txt_shift, txt_scale, txt_gate, txt_shift2, txt_scale2, txt_gate2 = txt_mod.chunk(6, dim=-1)

        img_in = modulated_layer_norm(img, img_scale, img_shift, eps=self.norm1.norm.eps)
        txt_in = modulated_layer_norm(txt, txt_scale, txt_shift, eps=self.norm1_context.norm.eps)

        extra: list[Tensor] = []
        if self.foreign_attention(kwargs) is None:
            q, k, v = qk_norm_rope(
                apply(img_in, *attention_module.qkv(attn)),
                attention_module.norm_weight(attn.norm_q),
                attention_module.norm_weight(attn.norm_k),
                **rope_arguments(pe, attention_module.head_dim(attn)),
                heads=attn.heads,
                txt_qkv=apply(txt_in, *attention_module.txt_qkv(attn)),
                txt_q_weight=attention_module.norm_weight(attn.norm_added_q),
                txt_k_weight=attention_module.norm_weight(attn.norm_added_k),
                eps=attn.norm_q.eps,
            )
            mask = kwargs.get("attention_mask")
            joint = attention_module.dispatched(attn, self.attention, q, k, v, mask)
            img_attn = attn.to_out[1](apply(joint[:, txt.shape[1] :], attn.to_out[0]))
            txt_attn = apply(joint[:, : txt.shape[1]], attn.to_add_out)
        else:
            # `extra` is what an IP-adapter's processor adds to the image's stream
            inputs = {"hidden_states": img_in, "encoder_hidden_states": txt_in}
            img_attn, txt_attn, *extra = attention_module.by_processor(
                attn, pe, kwargs, owner.autocast, **inputs
            )

        img = gated_residual(img, img_gate, img_attn)
        img_mlp = modulated_layer_norm(img, img_scale2, img_shift2, eps=self.norm2.eps)
        img_mlp = gelu(apply(img_mlp, self.ff.net[0].proj))
        img = gated_residual(img, img_gate2, apply(img_mlp, self.ff.net[2]))

        txt = gated_residual(txt, txt_gate, txt_attn)
        txt_mlp = modulated_layer_norm(txt, txt_scale2, txt_shift2, eps=self.norm2_context.eps)
        txt_mlp = gelu(apply(txt_mlp, self.ff_context.net[0].proj))
        txt = gated_residual(txt, txt_gate2, apply(txt_mlp, self.ff_context.net[2]))

        for ip_attn in extra:
            img = img + ip_attn
        return txt, img


class _Stream:
    """One of the two streams of a fused call, in one direction.

    It has the stream's modulation, its four groups of linears, its tape, and its activations, which
    `_to_last_products` sets and backward deletes one by one, so that their memory is free early.
    """

    # the normalised input, and what the norm's backward reads
    x_in: RowOutput
    norm1: tuple[Any, ...]
    # the outputs of the groups, each with its adapters' narrow product
    qkv: Tensor
    s_qkv: Tensor | None
    s_out: Tensor | None
    h: Tensor
    s_ff1: Tensor | None
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
    dmod: tuple[Tensor | None, ...]
    grads: tuple[Grads, ...]

    def __init__(
        self,
        x: Tensor,
        mod: Tensor,
        eps: Sequence[float],
        groups: Sequence[LinearGroup],
        tape: Tape,
    ) -> None:
        """x [B, S, D]; mod [B, 6·D]; eps: the first and the second norm's."""
        self.x, self.tape = x, tape
        self.eps1, self.eps2 = eps
        self.to_qkv, self.to_out, self.ff1, self.ff2 = groups
        chunks = mod.chunk(6, dim=-1)
        self.shift1, self.scale1, self.gate1, self.shift2, self.scale2, self.gate2 = chunks


def _streams(
    block: Any,
    call: BlockCall,
    linears: BlockLinears,
    inputs: Sequence[Tensor],
    tapes: Sequence[Tape],
) -> tuple[_Stream, _Stream]:
    """The image's and the text's stream, from (img, txt, img_mod, txt_mod) and their tapes."""
    img, txt, img_mod, txt_mod = inputs
    groups = call.groups(linears, img.dtype)
    img_eps = (block.norm1.norm.eps, block.norm2.eps)
    txt_eps = (block.norm1_context.norm.eps, block.norm2_context.eps)
    return (
        _Stream(img, img_mod, img_eps, groups[:4], tapes[0]),
        _Stream(txt, txt_mod, txt_eps, groups[4:], tapes[1]),
    )


def _to_last_products(
    call: BlockCall, attn: Any, img: _Stream, txt: _Stream, tape: Tape
) -> JointAttention:
    """All that a double block computes before its last products, or finds on the tapes.

    Forward runs it to compute everything, backward to compute again what forward did not keep.
    """
    norm_impl, gelu_impl = call.impl_of("modulated_layer_norm"), call.impl_of("gelu")
    for s in (img, txt):
        s.x_in, s.norm1 = s.tape.kept("x_in") or s.tape.keep(
            "x_in",
            *ops.modulated_layer_norm.forward(
                s.x, s.scale1, s.shift1, s.eps1, out=s.to_qkv.form, impl=norm_impl
            ),
        )
        s.qkv, s.s_qkv = s.tape.kept("qkv") or s.tape.keep("qkv", *s.to_qkv.forward(s.x_in))

    joint = joint_attention(call, tape, attn, img.qkv, txt.qkv)
    rows, text = joint.out.flatten(2), txt.x.shape[1]

    for s, attn_rows in ((txt, rows[:, :text]), (img, rows[:, text:])):
        s.attn_in = s.to_out.as_input(attn_rows)
        x1 = s.tape.kept("x1")
        if x1 is None:
            branch, s.s_out = s.to_out.forward(s.attn_in)
            s.x1, s.mlp_in, norm2 = ops.modulated_layer_norm.forward_residual(
                s.x, s.gate1, branch, s.scale2, s.shift2, s.eps2, out=s.ff1.form, impl=norm_impl
            )
            del branch
            s.norm2 = norm2[:4]
            s.tape.keep("x1", s.x1, s.s_out)
            s.tape.keep("mlp_in", s.mlp_in, s.norm2)
        else:
            s.x1, s.s_out = x1
            s.mlp_in, s.norm2 = s.tape.kept("mlp_in") or ops.modulated_layer_norm.forward(
                s.x1, s.scale2, s.shift2, s.eps2, out=s.ff1.form, impl=norm_impl
            )
        s.h, s.s_ff1 = s.tape.kept("h") or s.tape.keep("h", *s.ff1.forward(s.mlp_in))
        s.ff2_in, _ = s.tape.kept("ff2_in") or s.tape.keep(
            "ff2_in", *ops.gelu.forward(s.h, out=s.ff2.form, impl=gelu_impl)
        )
    return joint


class DoubleBlockFunction(torch.autograd.Function):
    """A fused double block: img [B, S_img, D], txt [B, S_txt, D], modulation [B, 6·D] of each."""

    @staticmethod
    def forward(
        ctx: Any, block: Any, call: BlockCall, linears: BlockLinears, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(txt, img); tensors: img, txt, img_mod, txt_mod, and the adapters' tensors."""
        inputs, trained = tensors[:4], tensors[4:]
        tapes = [Tape(KEPT_DOUBLE[call.keeps]) for _ in range(3)]
        streams = _streams(block, call, linears, inputs, tapes)
        _to_last_products(call, block.attn, *streams, tapes[2])
        outs = []
        for s in streams:
            branch, s_ff2 = s.ff2.forward(s.ff2_in)
            s.tape.keep("s_ff2", s_ff2)
            out, _ = ops.gated_residual.forward(
                s.x1, s.gate2, branch, keep_y=False, impl=call.impl_of("gated_residual")
            )
            outs.append(out)
            del branch
        kept = [tape.values for tape in tapes]
        save(ctx, block, call, linears, inputs[:2], mods=inputs[2:], trained=trained, kept=kept)
        img_out, txt_out = outs
        return txt_out, img_out

    @staticmethod
    @once_differentiable
    @own_dtypes
    def backward(ctx: Any, dtxt: Tensor, dimg: Tensor) -> tuple[Tensor | None, ...]:
        call: BlockCall = ctx.call
        inputs, mods, trained, kept = saved(ctx)
        tapes = [Tape(values=values) for values in kept]
        need_img, need_txt, need_img_mod, need_txt_mod = ctx.needs_input_grad[3:7]
        with resident(ctx.block, "backward"):
            linears = linears_again(ctx, trained)
            img, txt = _streams(ctx.block, call, linears, (*inputs, *mods), tapes)
            joint = _to_last_products(call, ctx.block.attn, img, txt, tapes[2])
            _mlp_backward(call, img, dimg, need_img_mod)
            _mlp_backward(call, txt, dtxt, need_txt_mod)

            dattn = torch.cat([txt.dattn, img.dattn], dim=1).unflatten(-1, joint.q.shape[2:])
            del txt.dattn, img.dattn
            dq, dk, dv = ops.attention.backward(
                dattn, joint.q, joint.k, joint.v, joint.out, joint.saved,
                call.mask, backend=call.attention,
            )  # fmt: skip
            del dattn, joint.out, joint.q, joint.k, joint.v
            # projections that were computed again may be overwritten by their gradient
            overwrite = img.tape.kept("qkv") is None
            dqkv, dtxt_qkv = ops.qk_norm_rope.backward(
                (dq, dk, dv), call.rope_saved(joint.rstd, img.qkv, txt.qkv), (True, True),
                s_txt=dtxt.shape[1], dqkv=img.qkv if overwrite else None,
                dtxt_qkv=txt.qkv if overwrite else None, impl=call.impl_of("qk_norm_rope"),
            )  # fmt: skip
            assert dqkv is not None and dtxt_qkv is not None
            del dq, dk, dv
            dimg_in, dimg_mod = _input_backward(call, img, dqkv, need_img, need_img_mod)
            dtxt_in, dtxt_mod = _input_backward(call, txt, dtxt_qkv, need_txt, need_txt_mod)
        grads = adapter_grads((*img.grads, *txt.grads))
        return None, None, None, dimg_in, dtxt_in, dimg_mod, dtxt_mod, *grads


def _mlp_backward(call: BlockCall, s: _Stream, dout: Tensor, need_mod: bool) -> None:
    """From the gradient of the stream's output to that of attention's output, `s.dattn`."""
    dff2, ff2_grads, dgate2 = last_product_backward(
        call, s.ff2, s.ff2_in, s.tape.kept("s_ff2"), s.gate2, dout, need_mod
    )
    del s.ff2_in
    dh = ops.gelu.backward_rows(
        dff2, (s.h,), out=call.grad_form, col_scale=s.ff1.fold(),
        # h was computed again, so that its gradient may overwrite it
        into=None if s.tape.kept("h") else s.h,
        impl=call.impl_of("gelu"),
    )  # fmt: skip
    del dff2, s.h
    dmlp_in, ff1_grads = s.ff1.backward(values_of(dh), s.mlp_in, s.s_ff1, codes=codes_of(dh))
    assert dmlp_in is not None
    del dh, s.mlp_in

    # the gradient of gate1 needs the product after attention
    branch = s.to_out.forward(s.attn_in)[0] if need_mod else None
    s.dx1, dbranch, (dscale2, dshift2, dgate1) = ops.modulated_layer_norm.backward_residual(
        dmlp_in, (*s.norm2, s.gate1, branch), add_to=dout,
        out=call.grad_form, col_scale=s.to_out.fold(), modulation=need_mod,
        impl=call.impl_of("modulated_layer_norm"),
    )  # fmt: skip
    del dmlp_in, s.norm2, s.x1, branch
    dattn, out_grads = s.to_out.backward(
        values_of(dbranch), s.attn_in, s.s_out, codes=codes_of(dbranch)
    )
    assert dattn is not None
    del s.attn_in
    s.dattn, s.dmod = dattn, (dgate1, dshift2, dscale2, dgate2)
    s.grads = (out_grads, ff1_grads, ff2_grads)


def _input_backward(
    call: BlockCall, s: _Stream, dqkv: Tensor, need_x: bool, need_mod: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the stream's x and of its modulation [B, 6·D], None where not needed."""
    dx_in, qkv_grads = s.to_qkv.backward(dqkv, s.x_in, s.s_qkv, need_dx=need_x or need_mod)
    s.grads = (qkv_grads, *s.grads)
    if dx_in is None:
        return None, None
    dx, dscale1, dshift1 = ops.modulated_layer_norm.backward(
        dx_in,
        s.norm1,
        (need_x, need_mod, need_mod),
        add_to=s.dx1,
        impl=call.impl_of("modulated_layer_norm"),
    )
    if not need_mod:
        return dx, None
    parts = (dshift1, dscale1, *s.dmod)
    return dx, torch.cat([part for part in parts if part is not None], dim=-1)
