"""The double block as one autograd.Function: image and text with weights of their own, joined in
attention (see `fused`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fluxfast.model.residency import resident
from fluxfast.model.tape import (
    Kept,
    Reads,
    Run,
    as_input,
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
from fluxfast.ops import attention, gated_residual, gelu, modulated_layer_norm, qk_norm_rope
from fluxfast.ops.linear.group import LinearGroup
from fluxfast.ops.row_quant import RowOutput
from fluxfast.ops.tensors import own_dtypes

Grads = list[tuple[Tensor, ...]]


class _Stream:
    """One of the two streams: its modulation, its four groups of linears, and its activations as
    they come to be.

    `kept` holds, under names that start with `name`, what forward kept of it.
    """

    def __init__(
        self,
        name: str,
        run: Run,
        eps: Sequence[float],
        groups: Sequence[LinearGroup],
        x: Tensor,
        mod: Tensor,
        kept: Kept,
    ) -> None:
        self.name, self.run, self.eps, self.x, self.kept = name, run, eps, x, kept
        self.norm2: tuple[Any, ...]
        self.qkv_linears, self.out, self.ff1, self.ff2 = groups
        self.shift, self.scale, self.gate, self.shift2, self.scale2, self.gate2 = mod.chunk(
            6, dim=-1
        )

    def project_qkv(self) -> None:
        form, impl = self.qkv_linears.form, self.run.impl_of("modulated_layer_norm")
        self.x_in, self.norm = normed(
            self.kept,
            f"{self.name}.x_in",
            lambda: modulated_layer_norm.forward(
                self.x, self.scale, self.shift, self.eps[0], out=form, impl=impl
            ),
        )
        self.qkv, self.s_qkv = self._kept("qkv") or self.qkv_linears.forward(self.x_in)

    def after_attention(self, attn: Tensor) -> None:
        """attn [B, S, D]: attention's output for this stream."""
        run = self.run
        norm_impl = run.impl_of("modulated_layer_norm")
        self.attn_in = as_input(attn, self.out)
        if (first := self._kept("x1")) is not None:
            self.x1, self.s_out = first
            form, x1 = self.ff1.form, self.x1
            self.mlp_in, self.norm2 = normed(
                self.kept,
                f"{self.name}.mlp_in",
                lambda: modulated_layer_norm.forward(
                    x1, self.scale2, self.shift2, self.eps[1], out=form, impl=norm_impl
                ),
            )
        else:
            branch, self.s_out = self.out.forward(self.attn_in)
            self.x1, self.mlp_in, saved = modulated_layer_norm.forward_residual(
                self.x,
                self.gate,
                branch,
                self.scale2,
                self.shift2,
                self.eps[1],
                out=self.ff1.form,
                impl=norm_impl,
            )
            self.norm2 = saved[:4]
        self.h, self.s_ff1 = self._kept("h") or self.ff1.forward(self.mlp_in)
        if ff2_in := self.kept.get(f"{self.name}.ff2_in"):
            self.ff2_in = RowOutput(*ff2_in)
        else:
            self.ff2_in, _ = gelu.forward(self.h, out=self.ff2.form, impl=run.impl_of("gelu"))

    def finish(self) -> Tensor:
        branch, self.s_ff2 = self.ff2.forward(self.ff2_in)
        impl = self.run.impl_of("gated_residual")
        return gated_residual.forward(self.x1, self.gate2, branch, keep_y=False, impl=impl)[0]

    def _kept(self, what: str) -> tuple[Tensor, Tensor | None] | None:
        """A group's output and the narrow product that came with it, where they were kept."""
        return self.kept.get(f"{self.name}.{what}")  # type: ignore[return-value]

    def keep(self) -> Kept:
        """What policy `none` keeps of this stream; `s_ff2`, alone, what `selective` does."""
        kept: Kept = {
            "qkv": (self.qkv, self.s_qkv),
            "x1": (self.x1, self.s_out),
            "h": (self.h, self.s_ff1),
        }
        return {f"{self.name}.{name}": tensors for name, tensors in kept.items()}

    def keep_all(self) -> Kept:
        """What `Run.keeps_all` keeps beside that."""
        norms = {
            "x_in": self.x_in,
            "x_in.saved": self.norm,
            "mlp_in": self.mlp_in,
            "mlp_in.saved": self.norm2,
        }
        kept: Kept = {"ff2_in": self.ff2_in, **norms}
        return {f"{self.name}.{name}": tensors for name, tensors in kept.items()}

    def mlp_backward(self, dout: Tensor, need_mod: bool) -> None:
        """From the gradient of the stream's output to that of attention's output (`dattn`) and of
        the stream before it.
        """
        run = self.run
        branch, s_ff2 = last_product(
            self.ff2, self.ff2_in, self.kept.get(f"{self.name}.s_ff2"), need_mod
        )
        dbranch, self.dgate2 = gated_residual.backward_rows(
            dout, (self.gate2, branch), out=run.grad_form, col_scale=self.ff2.fold(), needs_gate=need_mod,
            impl=run.impl_of("gated_residual"),
        )  # fmt: skip
        dff2, self.ff2_grads = self.ff2.backward(
            values_of(dbranch), self.ff2_in, s_ff2, codes=codes_of(dbranch)
        )
        assert dff2 is not None
        del self.ff2_in, dbranch, branch
        # what was recomputed is nobody else's, and each of its numbers is read before its gradient
        # takes its place
        into = None if self._kept("h") else self.h
        dh = gelu.backward_rows(
            dff2,
            (self.h,),
            out=run.grad_form,
            col_scale=self.ff1.fold(),
            into=into,
            impl=run.impl_of("gelu"),
        )
        del dff2, self.h
        dmlp_in, self.ff1_grads = self.ff1.backward(
            values_of(dh), self.mlp_in, self.s_ff1, codes=codes_of(dh)
        )
        assert dmlp_in is not None
        del dh, self.mlp_in
        # for the gradient of its gate the branch is wanted again
        branch = self.out.forward(self.attn_in)[0] if need_mod else None
        self.dx1, dbranch, (self.dscale2, self.dshift2, self.dgate) = modulated_layer_norm.backward_residual(
            dmlp_in, (*self.norm2, self.gate, branch), add_to=dout,
            out=run.grad_form, col_scale=self.out.fold(), modulation=need_mod,
            impl=run.impl_of("modulated_layer_norm"),
        )  # fmt: skip
        del dmlp_in, self.norm2, self.x1, branch
        dattn, self.out_grads = self.out.backward(
            values_of(dbranch), self.attn_in, self.s_out, codes=codes_of(dbranch)
        )
        assert dattn is not None
        self.dattn = dattn
        del self.attn_in

    def input_backward(
        self, dqkv: Tensor, need_x: bool, need_mod: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """dx and dmod."""
        need = need_x or need_mod
        dx_in, self.qkv_grads = self.qkv_linears.backward(dqkv, self.x_in, self.s_qkv, need_dx=need)
        if dx_in is None:
            return None, None
        dx, dscale, dshift = modulated_layer_norm.backward(
            dx_in,
            self.norm,
            (need_x, need_mod, need_mod),
            add_to=self.dx1,
            impl=self.run.impl_of("modulated_layer_norm"),
        )
        if not need_mod:
            return dx, None
        parts = (dshift, dscale, self.dgate, self.dshift2, self.dscale2, self.dgate2)
        return dx, torch.cat([part for part in parts if part is not None], dim=-1)

    @property
    def grads(self) -> tuple[Grads, ...]:
        return self.qkv_grads, self.out_grads, self.ff1_grads, self.ff2_grads


class _DoubleActs:
    """A double block up to its last products' inputs; `kept` holds what need not be computed."""

    def __init__(
        self, block: Any, run: Run, reads: Reads, inputs: Sequence[Tensor], kept: Kept
    ) -> None:
        img, txt, img_mod, txt_mod = inputs
        attn, groups = block.attn, run.groups(reads, img.dtype)
        img_eps = (block.norm1.norm.eps, block.norm2.eps)
        txt_eps = (block.norm1_context.norm.eps, block.norm2_context.eps)
        self.img = _Stream("img", run, img_eps, groups[:4], img, img_mod, kept)
        self.txt = _Stream("txt", run, txt_eps, groups[4:], txt, txt_mod, kept)
        self.img.project_qkv()
        self.txt.project_qkv()
        (self.q, self.k, self.v), self.qk = rotated(
            run, self.img.qkv, self.txt.qkv, kept, heads=attn.heads, eps=attn.norm_q.eps
        )
        self.attn, self.attn_saved = attend(run, self.q, self.k, self.v, kept)
        joint = self.attn.flatten(2)
        self.txt.after_attention(joint[:, : txt.shape[1]])
        self.img.after_attention(joint[:, txt.shape[1] :])


class DoubleBlock(torch.autograd.Function):
    """img [B, S_img, D], txt [B, S_txt, D], their modulations [B, 6·D] each, and the factors, to
    (txt, img).
    """

    @staticmethod
    def forward(
        ctx: Any,
        block: Any,
        run: Run,
        reads: Reads,
        img: Tensor,
        txt: Tensor,
        img_mod: Tensor,
        txt_mod: Tensor,
        *factors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        inputs = (img, txt, img_mod, txt_mod)
        acts = _DoubleActs(block, run, reads, inputs, {})
        img_out, txt_out = acts.img.finish(), acts.txt.finish()
        kept: Kept = {}
        if run.policy != "full":
            narrow = {"img.s_ff2": (acts.img.s_ff2,), "txt.s_ff2": (acts.txt.s_ff2,)}
            kept = {"attn": (acts.attn, *acts.attn_saved), **narrow}
        if run.policy == "none":
            kept |= acts.img.keep() | acts.txt.keep()
        if run.keeps_all:
            kept |= {
                "qkv": (acts.q, acts.k, acts.v, acts.qk[0]),
                **acts.img.keep_all(),
                **acts.txt.keep_all(),
            }
        remember(ctx, block, run, reads)
        save(ctx, (img, txt), (img_mod, txt_mod), factors, kept)
        return txt_out, img_out

    @staticmethod
    @once_differentiable
    @own_dtypes
    def backward(ctx: Any, dtxt: Tensor, dimg: Tensor) -> tuple[Tensor | None, ...]:
        block, run = ctx.block, ctx.run
        inputs, factors, kept = saved(ctx)
        needs = ctx.needs_input_grad[3:7]
        with resident(block, "backward"):
            acts = _DoubleActs(block, run, reads_again(ctx, factors), inputs, kept)
            return (None, None, None, *_double_backward(run, acts, dimg, dtxt, needs))


def _double_backward(
    run: Run, acts: _DoubleActs, dimg: Tensor, dtxt: Tensor, needs: Sequence[bool]
) -> Iterator[Tensor | None]:
    """dimg, dtxt, their modulations' gradients, then the factors'."""
    img, txt = acts.img, acts.txt
    need_img, need_txt, need_img_mod, need_txt_mod = needs
    img.mlp_backward(dimg, need_img_mod)
    txt.mlp_backward(dtxt, need_txt_mod)
    dattn = torch.cat([txt.dattn, img.dattn], dim=1).unflatten(-1, acts.q.shape[2:])
    del txt.dattn, img.dattn
    dq, dk, dv = attention.backward(
        dattn, acts.q, acts.k, acts.v, acts.attn, acts.attn_saved, run.mask, backend=run.attention
    )
    del dattn, acts.attn, acts.q, acts.k, acts.v
    own = "img.qkv" not in img.kept
    dqkv, dtxt_qkv = qk_norm_rope.backward(
        (dq, dk, dv), acts.qk, (True, True), s_txt=dtxt.shape[1],
        dqkv=img.qkv if own else None, dtxt_qkv=txt.qkv if own else None,
        impl=run.impl_of("qk_norm_rope"),
    )  # fmt: skip
    assert dqkv is not None and dtxt_qkv is not None
    del dq, dk, dv
    dimg_in, dimg_mod = img.input_backward(dqkv, need_img, need_img_mod)
    dtxt_in, dtxt_mod = txt.input_backward(dtxt_qkv, need_txt, need_txt_mod)
    return iter([dimg_in, dtxt_in, dimg_mod, dtxt_mod, *flat((*img.grads, *txt.grads))])
