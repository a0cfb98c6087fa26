"""The single block as one autograd.Function: attention and MLP in parallel on one normalised input
(see `fused`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fluxfast.model.residency import resident
from fluxfast.model.tape import (
    Kept,
    Reads,
    Run,
    attend,
    codes_of,
    flat,
    last_product,
    normed,
    reads_again,
    remember,
    rotated,
    save,
    saved,
    values_of,
)
from fluxfast.ops import (
    attention,
    gated_residual,
    gelu,
    modulated_layer_norm,
    qk_norm_rope,
    row_quant,
)
from fluxfast.ops.linear.group import LinearGroup
from fluxfast.ops.row_quant import RowOutput
from fluxfast.ops.tensors import own_dtypes


class _SingleActs:
    """A single block up to its last product's input; `kept` holds what need not be computed."""

    def __init__(
        self,
        block: Any,
        run: Run,
        first: LinearGroup,
        last: LinearGroup,
        x: Tensor,
        mod: Tensor,
        kept: Kept,
    ) -> None:
        attn, eps = block.attn, block.norm.norm.eps
        shift, scale, _ = mod.chunk(3, dim=-1)
        self.x_in, self.norm = normed(
            kept,
            "x_in",
            lambda: modulated_layer_norm.forward(
                x, scale, shift, eps, out=first.form, impl=run.impl_of("modulated_layer_norm")
            ),
        )
        y, self.s_first = kept.get("y") or first.forward(self.x_in)
        assert y is not None
        self.y = y
        self.qkv, self.h = self.y.split_with_sizes(
            [3 * attn.inner_dim, block.mlp_hidden_dim], dim=-1
        )
        (self.q, self.k, self.v), self.qk = rotated(
            run, self.qkv, None, kept, heads=attn.heads, eps=attn.norm_q.eps
        )
        self.attn, self.attn_saved = attend(run, self.q, self.k, self.v, kept)
        if last_in := kept.get("last_in"):
            self.last_in = RowOutput(*last_in)
        else:
            self.last_in, _ = gelu.forward(
                self.h, prefix=self.attn.flatten(2), out=last.form, impl=run.impl_of("gelu")
            )

    def keep_all(self) -> Kept:
        """What `Run.keeps_all` keeps beside what policy `none` does anyway."""
        qkv = (self.q, self.k, self.v, self.qk[0])
        return {"x_in": self.x_in, "x_in.saved": self.norm, "qkv": qkv, "last_in": self.last_in}


class SingleBlock(torch.autograd.Function):
    """x [B, S, D], mod [B, 3·D] (shift, scale, gate), and the factors, to the block's output [B, S,
    D].
    """

    @staticmethod
    def forward(
        ctx: Any, block: Any, run: Run, reads: Reads, x: Tensor, mod: Tensor, *factors: Tensor
    ) -> Tensor:
        first, last = run.groups(reads, x.dtype)
        acts = _SingleActs(block, run, first, last, x, mod, {})
        out, s_last = last.forward(acts.last_in)
        kept: Kept = {}
        if run.policy != "full":
            kept = {"attn": (acts.attn, *acts.attn_saved), "s_last": (s_last,)}
        if run.policy == "none":
            kept["y"] = (acts.y, acts.s_first)
        if run.keeps_all:
            kept |= acts.keep_all()
        remember(ctx, block, run, reads)
        save(ctx, (x,), (mod,), factors, kept)
        gate = mod.chunk(3, dim=-1)[2]
        return gated_residual.forward(
            x, gate, out, keep_y=False, impl=run.impl_of("gated_residual")
        )[0]

    @staticmethod
    @once_differentiable
    @own_dtypes
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        block, run = ctx.block, ctx.run
        (x, mod), factors, kept = saved(ctx)
        *_, need_x, need_mod = ctx.needs_input_grad[:5]
        with resident(block, "backward"):
            first, last = run.groups(reads_again(ctx, factors), x.dtype)
            acts = _SingleActs(block, run, first, last, x, mod, kept)
            return (
                None,
                None,
                None,
                *_single_backward(run, first, last, acts, kept, mod, dout, need_x, need_mod),
            )


def _single_backward(
    run: Run,
    first: LinearGroup,
    last: LinearGroup,
    acts: _SingleActs,
    kept: Kept,
    mod: Tensor,
    dout: Tensor,
    need_x: bool,
    need_mod: bool,
) -> Iterator[Tensor | None]:
    """dx, dmod, then the factors' gradients."""
    gate = mod.chunk(3, dim=-1)[2]
    branch, s_last = last_product(last, acts.last_in, kept.get("s_last"), need_mod)
    dbranch, dgate = gated_residual.backward_rows(
        dout, (gate, branch), out=run.grad_form, col_scale=last.fold(), needs_gate=need_mod,
        impl=run.impl_of("gated_residual"),
    )  # fmt: skip
    dlast, last_grads = last.backward(
        values_of(dbranch), acts.last_in, s_last, codes=codes_of(dbranch)
    )
    assert dlast is not None
    del dbranch, branch, acts.last_in

    inner, fold = acts.q.shape[2] * acts.q.shape[3], first.fold()
    dattn, dmlp = dlast.split_with_sizes([inner, dlast.shape[-1] - inner], dim=-1)
    # a recomputed y is nobody else's, and each of its numbers is read before its gradient takes its
    # place
    dy = torch.empty_like(acts.y) if "y" in kept else acts.y
    dqkv, dh = dy.split_with_sizes([3 * inner, acts.h.shape[-1]], dim=-1)
    dh_rows = gelu.backward_rows(
        dmlp, (acts.h,), out=run.grad_form, col_scale=None if fold is None else fold[3 * inner :], into=dh,
        impl=run.impl_of("gelu"),
    )  # fmt: skip
    dq, dk, dv = attention.backward(
        dattn.unflatten(-1, acts.q.shape[2:]), acts.q, acts.k, acts.v, acts.attn, acts.attn_saved, run.mask,
        backend=run.attention,
    )  # fmt: skip
    del dlast, dattn, dmlp, acts.attn, acts.q, acts.k, acts.v
    qk_norm_rope.backward(
        (dq, dk, dv), acts.qk, (True, False), s_txt=0, dqkv=dqkv, impl=run.impl_of("qk_norm_rope")
    )
    del dq, dk, dv

    codes = codes_of(dh_rows, 3 * inner)
    if fold is not None:
        quantised = row_quant.forward(
            dqkv, run.compute, fold[: 3 * inner], impl=run.impl_of("row_quant")
        )
        codes.insert(0, (0, quantised))
    dx_in, first_grads = first.backward(
        dy, acts.x_in, acts.s_first, codes=codes, need_dx=need_x or need_mod
    )
    dx = dscale = dshift = None
    if dx_in is not None:
        dx, dscale, dshift = modulated_layer_norm.backward(
            dx_in,
            acts.norm,
            (need_x, need_mod, need_mod),
            add_to=dout,
            impl=run.impl_of("modulated_layer_norm"),
        )
    dmod = (
        torch.cat([part for part in (dshift, dscale, dgate) if part is not None], dim=-1)
        if need_mod
        else None
    )
    return iter([dx, dmod, *flat((first_grads, last_grads))])
