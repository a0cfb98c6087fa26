"""FLUX.1's two kinds of block, on fluxfast's ops.

Each is diffusers' block by type, by module names and by state dict, with another forward: BFL's maths (black-forest-labs/flux,
src/flux/modules/layers.py), one line an op. They add no state, so that a block someone else built becomes ours by taking
our class (`adopt`) and keeps its parameters, adapters and hooks.

Shapes: img [B, S_img, D], txt [B, S_txt, D], vec [B, D], pe = (cos, sin), each [S_txt + S_img, head_dim/2] fp32 with the
text rows first; diffusers' own tables [S, head_dim], which hold every value twice, are taken as well. A third entry of pe is
the row of each token [B, S_txt + S_img], where a route has left tokens out.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn

from fluxfast.model.linear import project
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


def _qkv(attn: FluxAttention, x: Tensor, *more: nn.Module) -> Tensor:
    first = (attn.to_qkv,) if attn.fused_projections else (attn.to_q, attn.to_k, attn.to_v)
    return project(x, *first, *more)


def _txt_qkv(attn: FluxAttention, x: Tensor) -> Tensor:
    if attn.fused_projections:
        return project(x, attn.to_added_qkv)
    return project(x, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)


def _attention(attn: FluxAttention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q, k, v [B, S, heads, head_dim] to [B, S, D], on whatever back end `set_attention_backend` chose."""
    processor = attn.processor
    out = dispatch_attention_fn(
        q, k, v, attn_mask=mask, backend=processor._attention_backend, parallel_config=processor._parallel_config
    )
    return out.flatten(2, 3)


def _is_standard(attn: FluxAttention, kwargs: dict[str, Any]) -> bool:
    """Whether attention is FLUX.1's own; a processor that someone set (IP-adapter, say) computes its own."""
    return type(attn.processor) is FluxAttnProcessor and kwargs.keys() <= QUIET_ATTENTION_KWARGS


def _processor_attention(attn: FluxAttention, pe: Tables, kwargs: dict[str, Any], **inputs: Tensor) -> tuple[Tensor, ...]:
    """Attention by the processor that someone set, in the dtype its weights are stored in, back in ours."""
    dtype = next(iter(inputs.values())).dtype
    cast = {name: x.to(attn.norm_q.weight.dtype) for name, x in inputs.items()}
    outs = attn(**cast, image_rotary_emb=_full_tables(pe, attn.head_dim), **kwargs)
    return tuple(out.to(dtype) for out in (outs if isinstance(outs, tuple) else (outs,)))


class DoubleStreamBlock(FluxTransformerBlock):
    """Text and image with weights of their own, joined in attention."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Tables,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        img, txt, vec, attn = hidden_states, encoder_hidden_states, torch.nn.functional.silu(temb), self.attn
        kwargs = joint_attention_kwargs or {}

        img_mod = project(vec, self.norm1.linear).chunk(6, dim=-1)
        txt_mod = project(vec, self.norm1_context.linear).chunk(6, dim=-1)
        img_shift, img_scale, img_gate, img_shift2, img_scale2, img_gate2 = img_mod
        txt_shift, txt_scale, txt_gate, txt_shift2, txt_scale2, txt_gate2 = txt_mod

        img_in = modulated_layer_norm(img, img_scale, img_shift, eps=self.norm1.norm.eps)
        txt_in = modulated_layer_norm(txt, txt_scale, txt_shift, eps=self.norm1_context.norm.eps)

        extra: list[Tensor] = []
        if _is_standard(attn, kwargs):
            q, k, v = qk_norm_rope(
                _qkv(attn, img_in),
                attn.norm_q.weight,
                attn.norm_k.weight,
                **_rope(image_rotary_emb, attn.head_dim),
                heads=attn.heads,
                txt_qkv=_txt_qkv(attn, txt_in),
                txt_q_weight=attn.norm_added_q.weight,
                txt_k_weight=attn.norm_added_k.weight,
                eps=attn.norm_q.eps,
            )
            joint = _attention(attn, q, k, v, kwargs.get("attention_mask"))
            txt_attn = project(joint[:, : txt.shape[1]], attn.to_add_out)
            img_attn = attn.to_out[1](project(joint[:, txt.shape[1] :], attn.to_out[0]))
        else:
            img_attn, txt_attn, *extra = _processor_attention(
                attn, image_rotary_emb, kwargs, hidden_states=img_in, encoder_hidden_states=txt_in
            )

        img = gated_residual(img, img_gate, img_attn)
        img_mlp = modulated_layer_norm(img, img_scale2, img_shift2, eps=self.norm2.eps)
        img_mlp = project(gelu(project(img_mlp, self.ff.net[0].proj)), self.ff.net[2])
        img = gated_residual(img, img_gate2, img_mlp)

        txt = gated_residual(txt, txt_gate, txt_attn)
        txt_mlp = modulated_layer_norm(txt, txt_scale2, txt_shift2, eps=self.norm2_context.eps)
        txt_mlp = project(gelu(project(txt_mlp, self.ff_context.net[0].proj)), self.ff_context.net[2])
        txt = gated_residual(txt, txt_gate2, txt_mlp)

        for ip_attn in extra:
            img = img + ip_attn
        return _finite(txt), img


class SingleStreamBlock(FluxSingleTransformerBlock):
    """One joint sequence; attention and MLP in parallel on the same normalised input."""

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
        attn = self.attn
        shift, scale, gate = project(torch.nn.functional.silu(temb), self.norm.linear).chunk(3, dim=-1)
        x_in = modulated_layer_norm(x, scale, shift, eps=self.norm.norm.eps)
        if _is_standard(attn, kwargs):
            qkv, mlp = _qkv(attn, x_in, self.proj_mlp).split([3 * attn.inner_dim, self.mlp_hidden_dim], dim=-1)
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
            mlp = project(x_in, self.proj_mlp)
            (attn_out,) = _processor_attention(attn, pe, kwargs, hidden_states=x_in)
        out = project(torch.cat([attn_out, gelu(mlp)], dim=-1), self.proj_out)
        return _finite(gated_residual(x, gate, out))


def adopt(block: nn.Module) -> None:
    """Make one of diffusers' FLUX.1 blocks ours, in place: same object, same parameters, our forward."""
    if isinstance(block, FluxTransformerBlock):
        block.__class__ = DoubleStreamBlock
    elif isinstance(block, FluxSingleTransformerBlock):
        block.__class__ = SingleStreamBlock
    else:
        raise TypeError(f"adopt: expected diffusers' FluxTransformerBlock or FluxSingleTransformerBlock, got {type(block)}")
