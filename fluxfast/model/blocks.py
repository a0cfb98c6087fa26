"""FLUX.1's two kinds of block, on fluxfast's ops.

Each is diffusers' block by type, by module names and by state dict, with another forward: BFL's maths (black-forest-labs/flux,
src/flux/modules/layers.py), one line an op. They add no state, so that a block someone else built becomes ours by taking
our class (`adopt`) and keeps its parameters, adapters and hooks.

Where all of a block's linears can be read (`linear.read_linear`) and attention is FLUX.1's own, the block runs as one
autograd.Function (`fused_double`, `fused_single`). Else, and under torch.compile, `_composed` is the same maths with a node
for each op.

Shapes: img [B, S_img, D], txt [B, S_txt, D], vec [B, D], pe = (cos, sin), each [S_txt + S_img, head_dim/2] fp32 with the
text rows first; diffusers' own tables [S, head_dim], which hold every value twice, are taken as well. A third entry of pe is
the row of each token [B, S_txt + S_img], where a route has left tokens out.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fluxfast.model.fused import Reads, Run, factors_of, norm_weights, read_groups, seed_for
from fluxfast.model.fused_double import DoubleBlock
from fluxfast.model.fused_single import SingleBlock
from fluxfast.model.linear import project
from fluxfast.model.residency import resident
from fluxfast.ops import _impl, attention
from fluxfast.ops.gated_residual import gated_residual
from fluxfast.ops.gelu import gelu
from fluxfast.ops.modulated_layer_norm import modulated_layer_norm
from fluxfast.ops.qk_norm_rope import qk_norm_rope

Tables = tuple[Tensor, ...]
# names that diffusers' processors take without a word whether they use them or not
QUIET_ATTENTION_KWARGS = {"attention_mask", "ip_hidden_states", "ip_adapter_masks"}


def _rope(pe: Tables, head_dim: int) -> dict[str, Any]:
    """The tables as `qk_norm_rope` takes them."""
    cos, sin, *index = pe
    if cos.shape[-1] == head_dim:
        cos, sin = cos[:, ::2].contiguous(), sin[:, ::2].contiguous()
    return {"cos": cos, "sin": sin, "index": index[0] if index else None}


def _full_tables(pe: Tables, head_dim: int) -> tuple[Tensor, Tensor]:
    """The tables as diffusers' processors take them."""
    cos, sin, *index = pe
    if index:
        raise ValueError("TREAD routes need FLUX.1's own attention; the processor that is set takes no token positions")
    if cos.shape[-1] == head_dim:
        return cos, sin
    return cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)


def _finite(x: Tensor) -> Tensor:
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def _qkv(attn: FluxAttention) -> tuple[nn.Module, ...]:
    return (attn.to_qkv,) if attn.fused_projections else (attn.to_q, attn.to_k, attn.to_v)


def _txt_qkv(attn: FluxAttention) -> tuple[nn.Module, ...]:
    return (attn.to_added_qkv,) if attn.fused_projections else (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)


def _attention(attn: FluxAttention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q, k, v [B, S, heads, head_dim] to [B, S, D], on whatever back end `set_attention_backend` chose."""
    processor = attn.processor
    out = dispatch_attention_fn(
        q, k, v, attn_mask=mask, backend=processor._attention_backend, parallel_config=processor._parallel_config
    )
    return out.flatten(2, 3)


# diffusers' names of the back ends that `ops.attention` knows
_FUSED_BACKENDS = {
    None: "auto",
    AttentionBackendName.NATIVE: "auto",
    AttentionBackendName._NATIVE_CUDNN: "cudnn",
    AttentionBackendName._NATIVE_FLASH: "flash",
    AttentionBackendName._NATIVE_EFFICIENT: "efficient",
    AttentionBackendName._NATIVE_MATH: "ref",
}


def _is_standard(attn: FluxAttention, kwargs: dict[str, Any]) -> bool:
    """Whether attention is FLUX.1's own; a processor that someone set (IP-adapter, say) computes its own."""
    return type(attn.processor) is FluxAttnProcessor and kwargs.keys() <= QUIET_ATTENTION_KWARGS


def _processor_attention(attn: FluxAttention, pe: Tables, kwargs: dict[str, Any], **inputs: Tensor) -> tuple[Tensor, ...]:
    """Attention by the processor that someone set, in the dtype its weights are stored in, back in ours."""
    dtype = next(iter(inputs.values())).dtype
    cast = {name: x.to(attn.norm_q.weight.dtype) for name, x in inputs.items()}
    outs = attn(**cast, image_rotary_emb=_full_tables(pe, attn.head_dim), **kwargs)
    return tuple(out.to(dtype) for out in (outs if isinstance(outs, tuple) else (outs,)))


class _Block:
    """What both kinds share. The attributes below are choices, not state: `set_compute` and its like set them on a model."""

    # what the wide products run in, which implementation of the ops runs, and what is recomputed in backward
    compute: str = "same"
    impl: str = "auto"
    policy: str = "none"
    residency: Any = None
    # diffusers', and its RMS norms in the order of `qk_norm_rope`
    attn: Any
    qk_norms: tuple[str, ...]

    def linear_groups(self) -> list[tuple[nn.Module, ...]]:
        """The block's linears, those that share their input together, in the order of the fused Function's."""
        raise NotImplementedError

    def _composed(self, *args: Any) -> Any:
        raise NotImplementedError

    def _fused_run(self, reads: Reads | None, x: Tensor, pe: Tables, kwargs: dict[str, Any]) -> Run | None:
        """How the fused Function runs this call, or None where the composed path has to."""
        attn = self.attn
        processor = attn.processor
        if reads is None or torch.compiler.is_compiling() or not _is_standard(attn, kwargs):
            return None
        if processor._parallel_config is not None or processor._attention_backend not in _FUSED_BACKENDS:
            return None
        if any(getattr(attn, name).weight.requires_grad for name in self.qk_norms):
            return None
        rope, mask = _rope(pe, attn.head_dim), kwargs.get("attention_mask")
        impl = _impl.resolve("a block", self.impl, (x, rope["cos"], rope["sin"]))
        heads = x.new_empty((0, 0, attn.heads, attn.head_dim))
        chosen = attention.resolve(_FUSED_BACKENDS[processor._attention_backend], heads, mask)
        norms = norm_weights(*(getattr(attn, name) for name in self.qk_norms))
        return Run(
            **rope,
            mask=mask,
            norms=norms,
            impl=impl,
            attention=chosen,
            compute=self.compute,
            policy=self.policy,
            seed=seed_for(reads),
        )

    def _composed_by_policy(self, *args: Any) -> Any:
        """The composed path, checkpointed as a whole where the policy is to recompute."""
        if self.policy == "none" or not torch.is_grad_enabled():
            return self._composed(*args)
        return checkpoint(self._composed, *args, use_reentrant=False)


class DoubleStreamBlock(_Block, FluxTransformerBlock):
    """Text and image with weights of their own, joined in attention."""

    qk_norms = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")

    def linear_groups(self) -> list[tuple[nn.Module, ...]]:
        attn = self.attn
        img = [_qkv(attn), (attn.to_out[0],), (self.ff.net[0].proj,), (self.ff.net[2],)]
        txt = [_txt_qkv(attn), (attn.to_add_out,), (self.ff_context.net[0].proj,), (self.ff_context.net[2],)]
        return img + txt

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Tables,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        img, txt, kwargs = hidden_states, encoder_hidden_states, joint_attention_kwargs or {}
        with resident(self, "forward"):
            vec = torch.nn.functional.silu(temb)
            img_mod, txt_mod = project(vec, self.norm1.linear), project(vec, self.norm1_context.linear)
            reads = read_groups(self.linear_groups())
            run = self._fused_run(reads, img, image_rotary_emb, kwargs)
            if run is None or (self.training and self.attn.to_out[1].p > 0):
                txt, img = self._composed_by_policy(img, txt, img_mod, txt_mod, image_rotary_emb, kwargs)
            else:
                assert reads is not None
                txt, img = DoubleBlock.apply(self, run, reads, img, txt, img_mod, txt_mod, *factors_of(reads))
        return _finite(txt), img

    def _composed(
        self, img: Tensor, txt: Tensor, img_mod: Tensor, txt_mod: Tensor, pe: Tables, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        attn, compute = self.attn, self.compute
        img_shift, img_scale, img_gate, img_shift2, img_scale2, img_gate2 = img_mod.chunk(6, dim=-1)
        txt_shift, txt_scale, txt_gate, txt_shift2, txt_scale2, txt_gate2 = txt_mod.chunk(6, dim=-1)

        img_in = modulated_layer_norm(img, img_scale, img_shift, eps=self.norm1.norm.eps)
        txt_in = modulated_layer_norm(txt, txt_scale, txt_shift, eps=self.norm1_context.norm.eps)

        extra: list[Tensor] = []
        if _is_standard(attn, kwargs):
            q, k, v = qk_norm_rope(
                project(img_in, *_qkv(attn), compute=compute),
                attn.norm_q.weight,
                attn.norm_k.weight,
                **_rope(pe, attn.head_dim),
                heads=attn.heads,
                txt_qkv=project(txt_in, *_txt_qkv(attn), compute=compute),
                txt_q_weight=attn.norm_added_q.weight,
                txt_k_weight=attn.norm_added_k.weight,
                eps=attn.norm_q.eps,
            )
            joint = _attention(attn, q, k, v, kwargs.get("attention_mask"))
            txt_attn = project(joint[:, : txt.shape[1]], attn.to_add_out, compute=compute)
            img_attn = attn.to_out[1](project(joint[:, txt.shape[1] :], attn.to_out[0], compute=compute))
        else:
            img_attn, txt_attn, *extra = _processor_attention(
                attn, pe, kwargs, hidden_states=img_in, encoder_hidden_states=txt_in
            )

        img = gated_residual(img, img_gate, img_attn)
        img_mlp = modulated_layer_norm(img, img_scale2, img_shift2, eps=self.norm2.eps)
        img_mlp = gelu(project(img_mlp, self.ff.net[0].proj, compute=compute))
        img = gated_residual(img, img_gate2, project(img_mlp, self.ff.net[2], compute=compute))

        txt = gated_residual(txt, txt_gate, txt_attn)
        txt_mlp = modulated_layer_norm(txt, txt_scale2, txt_shift2, eps=self.norm2_context.eps)
        txt_mlp = gelu(project(txt_mlp, self.ff_context.net[0].proj, compute=compute))
        txt = gated_residual(txt, txt_gate2, project(txt_mlp, self.ff_context.net[2], compute=compute))

        for ip_attn in extra:
            img = img + ip_attn
        return txt, img


class SingleStreamBlock(_Block, FluxSingleTransformerBlock):
    """One joint sequence; attention and MLP in parallel on the same normalised input."""

    qk_norms = ("norm_q", "norm_k")

    def linear_groups(self) -> list[tuple[nn.Module, ...]]:
        return [(*_qkv(self.attn), self.proj_mlp), (self.proj_out,)]

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        temb: Tensor,
        image_rotary_emb: Tables,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """With text given apart, as diffusers does, both come back apart; with None, `hidden_states` is the joint sequence."""
        if encoder_hidden_states is not None:
            txt_len = encoder_hidden_states.shape[1]
            joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
            joint = self._joint(joint, temb, image_rotary_emb, joint_attention_kwargs or {})
            return joint[:, :txt_len], joint[:, txt_len:]
        return self._joint(hidden_states, temb, image_rotary_emb, joint_attention_kwargs or {})

    def _joint(self, x: Tensor, temb: Tensor, pe: Tables, kwargs: dict[str, Any]) -> Tensor:
        with resident(self, "forward"):
            mod = project(torch.nn.functional.silu(temb), self.norm.linear)
            reads = read_groups(self.linear_groups())
            run = self._fused_run(reads, x, pe, kwargs)
            if run is None:
                x = self._composed_by_policy(x, mod, pe, kwargs)
            else:
                assert reads is not None
                x = SingleBlock.apply(self, run, reads, x, mod, *factors_of(reads))
        return _finite(x)

    def _composed(self, x: Tensor, mod: Tensor, pe: Tables, kwargs: dict[str, Any]) -> Tensor:
        attn, compute = self.attn, self.compute
        shift, scale, gate = mod.chunk(3, dim=-1)
        x_in = modulated_layer_norm(x, scale, shift, eps=self.norm.norm.eps)
        if _is_standard(attn, kwargs):
            both = project(x_in, *_qkv(attn), self.proj_mlp, compute=compute)
            qkv, mlp = both.split([3 * attn.inner_dim, self.mlp_hidden_dim], dim=-1)
            q, k, v = qk_norm_rope(
                qkv,
                attn.norm_q.weight,
                attn.norm_k.weight,
                **_rope(pe, attn.head_dim),
                heads=attn.heads,
                eps=attn.norm_q.eps,
            )
            attn_out = _attention(attn, q, k, v, kwargs.get("attention_mask"))
        else:
            mlp = project(x_in, self.proj_mlp, compute=compute)
            (attn_out,) = _processor_attention(attn, pe, kwargs, hidden_states=x_in)
        out = project(torch.cat([attn_out, gelu(mlp)], dim=-1), self.proj_out, compute=compute)
        return gated_residual(x, gate, out)


def adopt(block: nn.Module) -> None:
    """Make one of diffusers' FLUX.1 blocks ours, in place: same object, same parameters, our forward."""
    if isinstance(block, FluxTransformerBlock):
        block.__class__ = DoubleStreamBlock
    elif isinstance(block, FluxSingleTransformerBlock):
        block.__class__ = SingleStreamBlock
    else:
        raise TypeError(f"adopt: expected diffusers' FluxTransformerBlock or FluxSingleTransformerBlock, got {type(block)}")
