"""The single block: one joint sequence, attention and MLP in parallel on one normalised input.

This is `SingleStreamBlock` of black-forest-labs/flux (src/flux/modules/layers.py). `_composed` is
the maths, one op a line. `SingleBlockFunction` is the same maths as one autograd.Function, chained
from the ops' raw interfaces (`fluxfast.ops`); KEPT_SINGLE says what its forward keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fluxfast import ops
from fluxfast.model import attention_module
from fluxfast.model.block_base import BlockBase, OwnerDtypes, finite
from fluxfast.model.block_call import BlockCall, BlockLinears, codes_of, last_product_backward
from fluxfast.model.joint_attention import JointAttention, joint_attention
from fluxfast.model.residency import resident
from fluxfast.model.rope import Tables, rope_arguments
from fluxfast.model.tape import Tape, adapter_grads, linears_again, save, saved
from fluxfast.ops.gated_residual import gated_residual
from fluxfast.ops.gelu import gelu
from fluxfast.ops.linear.group import LinearGroup
from fluxfast.ops.modulated_layer_norm import modulated_layer_norm
from fluxfast.ops.qk_norm_rope import qk_norm_rope
from fluxfast.ops.row_quant import RowOutput
from fluxfast.ops.tensors import own_dtypes

# As SIZES_DOUBLE and KEPT_DOUBLE: sizes in E, one [B, S, D] tensor of the joint stream. y is packed
# q, k and v (3 E) and the MLP's input (4 E).
SIZES_SINGLE = {"x_in": 1, "y": 7, "rotated": 3, "attn": 1, "last_in": 5, "s_last": 0}
KEPT_SINGLE: dict[str, tuple[str, ...]] = {
    "full": (),
    "selective": ("attn", "s_last"),
    "none": ("y", "attn", "s_last"),
    "all": tuple(SIZES_SINGLE),
}


class SingleMaths(BlockBase):
    """A single block, over diffusers' names of its modules."""

    qk_norms = ("norm_q", "norm_k")
    norm: Any
    mlp_hidden_dim: int
    proj_mlp: Any
    proj_out: Any
    act_mlp: Any

    @property
    def function(self) -> type[torch.autograd.Function]:
        return SingleBlockFunction

    def linear_groups(self) -> list[tuple[nn.Module, ...]]:
        return [(*attention_module.qkv(self.attn), self.proj_mlp), (self.proj_out,)]

    def modulation_linears(self) -> tuple[nn.Module, ...]:
        return (self.norm.linear,)

    def bypassed(self) -> tuple[nn.Module, ...]:
        return self.norm, self.norm.norm, self.norm.silu, self.act_mlp

    def _streams(self, img: Tensor, txt: Tensor | None) -> tuple[Tensor, ...]:
        return (img if txt is None else joined(txt, img),)

    def _outputs(
        self, out: Tensor, streams: tuple[Tensor, ...], txt: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Text and image apart, where they came apart; else the joint stream."""
        out = finite(out.to(streams[0].dtype))
        return out if txt is None else (out[:, : txt.shape[1]], out[:, txt.shape[1] :])

    def _composed(
        self, x: Tensor, mod: Tensor, pe: Tables, kwargs: dict[str, Any], owner: OwnerDtypes
    ) -> Tensor:
        attn, (first, last), apply = self.attn, self.linear_groups(), self._projection(owner)
        shift, scale, gate = mod.chunk(3, dim=-1)
        x_in = modulated_layer_norm(x, scale, shift, eps=self.norm.norm.eps)
        if self.foreign_attention(kwargs) is None:
            # diffusers' block applies the MLP's first linear before q, k and v
            both = apply(x_in, *first, last=len(first) - 1)
            qkv, mlp = both.split([3 * attn.inner_dim, self.mlp_hidden_dim], dim=-1)
            q, k, v = qk_norm_rope(
                qkv,
                attention_module.norm_weight(attn.norm_q),
                attention_module.norm_weight(attn.norm_k),
                **rope_arguments(pe, attention_module.head_dim(attn)),
                heads=attn.heads,
                eps=attn.norm_q.eps,
            )
            mask = kwargs.get("attention_mask")
            attn_out = attention_module.dispatched(attn, self.attention, q, k, v, mask)
        else:
            mlp = apply(x_in, self.proj_mlp)
            (attn_out,) = attention_module.by_processor(
                attn, pe, kwargs, owner.autocast, hidden_states=x_in
            )
        out = apply(torch.cat([attn_out, gelu(mlp)], dim=-1), *last)
        return gated_residual(x, gate, out)


@dataclass
class _Activations:
    """What a single block computes before its last product; backward deletes it part by part."""

    # the normalised input, and what the norm's backward reads
    x_in: RowOutput
    norm: tuple[Any, ...]
    # the first group's output, q, k, v and the MLP's input, and its adapters' narrow product
    y: Tensor
    s_first: Tensor | None
    joint: JointAttention
    last_in: RowOutput


def _to_last_product(
    block: Any,
    call: BlockCall,
    first: LinearGroup,
    last: LinearGroup,
    x: Tensor,
    mod: Tensor,
    tape: Tape,
) -> _Activations:
    """All that a single block computes before its last product, or finds on the tape.

    Forward runs it to compute everything, backward to compute again what forward did not keep.
    """
    (shift, scale, _), eps = mod.chunk(3, dim=-1), block.norm.norm.eps
    norm_impl, gelu_impl = call.impl_of("modulated_layer_norm"), call.impl_of("gelu")
    x_in, norm = tape.kept("x_in") or tape.keep(
        "x_in",
        *ops.modulated_layer_norm.forward(x, scale, shift, eps, out=first.form, impl=norm_impl),
    )
    y, s_first = tape.kept("y") or tape.keep("y", *first.forward(x_in))
    qkv, h = y.split_with_sizes([3 * block.attn.inner_dim, block.mlp_hidden_dim], dim=-1)
    joint = joint_attention(call, tape, block.attn, qkv)
    last_in, _ = tape.kept("last_in") or tape.keep(
        "last_in",
        *ops.gelu.forward(h, prefix=joint.out.flatten(2), out=last.form, impl=gelu_impl),
    )
    return _Activations(x_in, norm, y, s_first, joint, last_in)


class SingleBlockFunction(torch.autograd.Function):
    """A fused single block: x [B, S, D], mod [B, 3·D] (shift, scale, gate), to [B, S, D]."""

    @staticmethod
    def forward(
        ctx: Any,
        block: Any,
        call: BlockCall,
        linears: BlockLinears,
        x: Tensor,
        mod: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        """trained: the adapters' tensors."""
        first, last = call.groups(linears, x.dtype)
        tape = Tape(KEPT_SINGLE[call.keeps])
        acts = _to_last_product(block, call, first, last, x, mod, tape)
        branch, s_last = last.forward(acts.last_in)
        tape.keep("s_last", s_last)
        save(ctx, block, call, linears, (x,), mods=(mod,), trained=trained, kept=tape.values)
        gate = mod.chunk(3, dim=-1)[2]
        return ops.gated_residual.forward(
            x, gate, branch, keep_y=False, impl=call.impl_of("gated_residual")
        )[0]

    @staticmethod
    @once_differentiable
    @own_dtypes
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (mod,), trained, kept = saved(ctx)
        tape, needs = Tape(values=kept), ctx.needs_input_grad[3:5]
        with resident(ctx.block, "backward"):
            first, last = ctx.call.groups(linears_again(ctx, trained), x.dtype)
            acts = _to_last_product(ctx.block, ctx.call, first, last, x, mod, tape)
            dx, dmod, *grads = _backward(ctx.call, first, last, acts, tape, mod, dout, *needs)
        return None, None, None, dx, dmod, *adapter_grads(grads)


def _backward(
    call: BlockCall,
    first: LinearGroup,
    last: LinearGroup,
    acts: _Activations,
    tape: Tape,
    mod: Tensor,
    dout: Tensor,
    need_x: bool,
    need_mod: bool,
) -> tuple[Any, ...]:
    """The gradients of x, of mod, and of each group's adapters."""
    gate = mod.chunk(3, dim=-1)[2]
    dlast, last_grads, dgate = last_product_backward(
        call, last, acts.last_in, tape.kept("s_last"), gate, dout, need_mod
    )
    del acts.last_in

    joint, y, fold = acts.joint, acts.y, first.fold()
    inner = joint.q.shape[2] * joint.q.shape[3]
    widths = [3 * inner, y.shape[-1] - 3 * inner]
    qkv, h = y.split_with_sizes(widths, dim=-1)
    dattn, dmlp = dlast.split_with_sizes([inner, widths[1]], dim=-1)
    # a y that was computed again may be overwritten by its gradient
    dy = torch.empty_like(y) if tape.kept("y") else y
    dqkv, dh = dy.split_with_sizes(widths, dim=-1)
    dh_rows = ops.gelu.backward_rows(
        dmlp, (h,), out=call.grad_form, col_scale=None if fold is None else fold[3 * inner :],
        into=dh, impl=call.impl_of("gelu"),
    )  # fmt: skip
    dq, dk, dv = ops.attention.backward(
        dattn.unflatten(-1, joint.q.shape[2:]), joint.q, joint.k, joint.v, joint.out, joint.saved,
        call.mask, backend=call.attention,
    )  # fmt: skip
    del dlast, dattn, dmlp, joint.out, joint.q, joint.k, joint.v
    ops.qk_norm_rope.backward(
        (dq, dk, dv), call.rope_saved(joint.rstd, qkv, None), (True, False), s_txt=0, dqkv=dqkv,
        impl=call.impl_of("qk_norm_rope"),
    )  # fmt: skip
    del dq, dk, dv

    codes = codes_of(dh_rows, 3 * inner)
    if fold is not None:
        dqkv_codes = ops.row_quant.forward(
            dqkv, call.compute, fold[: 3 * inner], impl=call.impl_of("row_quant")
        )
        codes.insert(0, (0, dqkv_codes))
    dx_in, first_grads = first.backward(
        dy, acts.x_in, acts.s_first, codes=codes, need_dx=need_x or need_mod
    )
    dx = dscale = dshift = None
    if dx_in is not None:
        dx, dscale, dshift = ops.modulated_layer_norm.backward(
            dx_in,
            acts.norm,
            (need_x, need_mod, need_mod),
            add_to=dout,
            impl=call.impl_of("modulated_layer_norm"),
        )
    parts = [part for part in (dshift, dscale, dgate) if part is not None]
    return dx, torch.cat(parts, dim=-1) if need_mod else None, first_grads, last_grads


def joined(txt: Tensor, img: Tensor) -> Tensor:
    """Text and image as one tensor [B, S_txt + S_img, D].

    Where a single block before this one has split its output into just these two, it is that
    output, so that nothing is copied.
    """
    joint = txt._base if not torch.compiler.is_compiling() else None
    if joint is not None and joint is img._base and _are_halves(txt, img, joint):
        return joint
    return torch.cat([txt, img], dim=1)


def _are_halves(txt: Tensor, img: Tensor, joint: Tensor) -> bool:
    """Whether txt and img lie in `joint` one after the other, and their gradients are its own."""
    halves, start, rows = (txt, img), joint.storage_offset(), 0
    for half in halves:
        if (
            half.ndim != 3
            or joint.ndim != 3
            or half.stride() != joint.stride()
            or half.dtype != joint.dtype
        ):
            return False
        if half.shape[::2] != joint.shape[
            ::2
        ] or half.storage_offset() != start + rows * joint.stride(1):
            return False
        # a hook on a half would not be called
        if half._backward_hooks or half.retains_grad or half.requires_grad != joint.requires_grad:
            return False
        if joint.requires_grad and not (
            half.grad_fn and half.grad_fn.next_functions[0][0] is joint.grad_fn
        ):
            return False
        rows += half.shape[1]
    return rows == joint.shape[1]
