"""The single block: one joint sequence, attention and MLP in parallel on one normalised input.

This is `SingleStreamBlock` of black-forest-labs/flux (src/flux/modules/layers.py). `_composed` is
the maths, one op a line. `SingleBlockFunction` is the same maths as one autograd.Function, chained
from the ops' raw interfaces (`fluxfast.ops`); KEPT_SINGLE says what its forward keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fluxfast import ops
from fluxfast.hooks import own_module
from fluxfast.model import attention_module
from fluxfast.model.block_base import BlockBase, OwnerDtypes, finite
from fluxfast.model.block_call import (
    BlockCall,
    BlockLinears,
    codes_of,
    last_product_backward,
    new_output_like,
)
from fluxfast.model.block_run import run_backward, run_forward
from fluxfast.model.joint_attention import JointAttention, joint_attention
from fluxfast.model.known_modules import ACTIVATION, ADA_NORM, LAYER_NORM, SILU, Classes
from fluxfast.model.rope import Tables, rope_arguments
from fluxfast.model.streams import joined
from fluxfast.model.tape import Grads, Tape
from fluxfast.ops.gated_residual import gated_residual
from fluxfast.ops.gelu import gelu
from fluxfast.ops.linear.decomposed import Narrow
from fluxfast.ops.linear.group import LinearGroup
from fluxfast.ops.modulated_layer_norm import modulated_layer_norm
from fluxfast.ops.qk_norm_rope import qk_norm_rope
from fluxfast.ops.row_quant import RowOutput
from fluxfast.ops.tensors import own_dtypes

# As SIZES_DOUBLE and KEPT_DOUBLE: sizes in E, one [B, S, D] tensor of the joint stream. y is packed
# q, k and v (3 E) and the MLP's input (4 E).
SIZES_SINGLE = {"x_in": 1, "y": 7, "s_y": 0, "rotated": 3, "attn": 1, "last_in": 5, "s_last": 0}
KEPT_SINGLE: dict[str, tuple[str, ...]] = {
    "full": ("s_y", "s_last"),
    "selective": ("attn", "s_y", "s_last"),
    "none": ("y", "attn", "s_y", "s_last"),
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
        qkv = attention_module.qkv(own_module(self, "attn"))
        return [(*qkv, own_module(self, "proj_mlp")), (own_module(self, "proj_out"),)]

    def modulation_linears(self) -> tuple[nn.Module, ...]:
        return (own_module(own_module(self, "norm"), "linear"),)

    def bypassed(self) -> Sequence[tuple[nn.Module, Classes]]:
        norm = own_module(self, "norm")
        parts = own_module(norm, "norm"), own_module(norm, "silu")
        modulated = [(norm, ADA_NORM), (parts[0], LAYER_NORM), (parts[1], SILU)]
        return [*modulated, (own_module(self, "act_mlp"), ACTIVATION)]

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
    s_y: Narrow
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
    tokens = x.shape[:2]
    x_in, norm = tape.kept("x_in") or tape.keep(
        "x_in",
        *ops.modulated_layer_norm.forward(
            x, scale, shift, eps,
            out=first.form, into=first.new_input(*tokens), impl=norm_impl,
        ),
    )  # fmt: skip
    y, s_y = tape.product("y", first, x_in)
    qkv, h = y.split_with_sizes([3 * block.attn.inner_dim, block.mlp_hidden_dim], dim=-1)
    joint = joint_attention(call, tape, block.attn, qkv)
    last_in, _ = tape.kept("last_in") or tape.keep(
        "last_in",
        *ops.gelu.forward(
            h, prefix=joint.out.flatten(2),
            out=last.form, into=last.new_input(*tokens), impl=gelu_impl,
        ),
    )  # fmt: skip
    return _Activations(x_in, norm, y, s_y, joint, last_in)


class SingleBlockFunction(torch.autograd.Function):
    """A fused single block: x [B, S, D], mod [B, 3·D] (shift, scale, gate), to [B, S, D]."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        """inputs: x, mod."""
        return run_forward(ctx, _forward, *args)

    @staticmethod
    def once(*args: Any) -> Any:
        """Forward alone, of (block, call, linears, inputs), for a call that has no backward."""
        return _forward(*args)[0]

    @staticmethod
    @once_differentiable
    @own_dtypes
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return run_backward(ctx, _backward, (dout,))


def _forward(
    block: Any, call: BlockCall, linears: BlockLinears, inputs: Sequence[Tensor]
) -> tuple[Tensor, Any]:
    """The output for inputs (x, mod), and what is kept."""
    x, mod = inputs
    first, last = call.filled_groups(linears, x.dtype, backward=False)
    tape = Tape(KEPT_SINGLE[call.keeps])
    acts = _to_last_product(block, call, first, last, x, mod, tape)
    branch, s_last = last.forward(acts.last_in)
    tape.keep("s_last", s_last)
    gate, impl = mod.chunk(3, dim=-1)[2], call.impl_of("gated_residual")
    return ops.gated_residual.forward(x, gate, branch, keep_y=False, impl=impl)[0], tape.values


def _backward(
    block: Any,
    call: BlockCall,
    linears: BlockLinears,
    inputs: Sequence[Tensor],
    kept: Any,
    douts: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Sequence[Tensor | None], Sequence[Grads]]:
    """The gradients of inputs (x, mod), where they are needed, and of each group's adapters."""
    (x, mod), (dout,), (need_x, need_mod) = inputs, douts, needs
    tape = Tape(values=kept)
    first, last = call.filled_groups(linears, x.dtype, backward=True)
    acts = _to_last_product(block, call, first, last, x, mod, tape)
    gate = mod.chunk(3, dim=-1)[2]
    dlast, last_grads, dgate = last_product_backward(
        call, last, acts.last_in, tape.kept("s_last"), gate, dout, need_mod
    )
    del acts.last_in

    joint, y, fold = acts.joint, acts.y, first.fold()
    inner = joint.q.shape[2] * joint.q.shape[3]
    widths = [3 * inner, y.shape[-1] - 3 * inner]
    qkv, h = y.split_with_sizes(widths, dim=-1)
    # attention's backward, which takes the most memory, reads this part of dlast alone
    dattn = dlast.new_empty((*dlast.shape[:-1], inner))
    # a y that was computed again may be overwritten by its gradient
    dy = new_output_like(first, y) if tape.kept("y") else y
    dqkv, dh = dy.split_with_sizes(widths, dim=-1)
    dh_rows = ops.gelu.backward_rows(
        dlast, (h,), out=call.grad_form, col_scale=None if fold is None else fold[3 * inner :],
        dprefix=dattn, into=dh, impl=call.impl_of("gelu"),
    )  # fmt: skip
    del dlast
    dq, dk, dv = ops.attention.backward(
        dattn.unflatten(-1, joint.q.shape[2:]), joint.q, joint.k, joint.v, joint.out, joint.saved,
        call.mask, backend=call.attention,
    )  # fmt: skip
    del dattn, joint.out, joint.q, joint.k, joint.v
    made = ops.qk_norm_rope.backward_rows(
        (dq, dk, dv), call.rope_saved(joint.rstd, qkv, None), s_txt=0, out=call.grad_form,
        col_scale=None if fold is None else fold[: 3 * inner], dqkv=dqkv,
        impl=call.impl_of("qk_norm_rope"),
    )  # fmt: skip
    del dq, dk, dv

    codes = codes_of(dh_rows, 3 * inner)
    if made.codes is not None:
        codes.insert(0, (0, made.codes))
    dx_in, first_grads = first.backward(
        dy, acts.x_in, acts.s_y, codes=codes, need_dx=need_x or need_mod
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
    dmod = torch.cat(parts, dim=-1) if need_mod else None
    return (dx, dmod), (first_grads, last_grads)
