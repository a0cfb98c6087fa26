"""The double block: image and text with weights of their own, joined in attention.

This is `DoubleStreamBlock` of black-forest-labs/flux (src/flux/modules/layers.py). `_composed` is
the maths, one op a line. `fused_double` is the same maths as one autograd.Function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fluxfast.hooks import own_module
from fluxfast.model import attention_module
from fluxfast.model.block_base import BlockBase, OwnerDtypes, finite
from fluxfast.model.block_call import BlockCall, BlockLinears
from fluxfast.model.fused_double import DoubleBlockFunction
from fluxfast.model.known_modules import (
    ACTIVATION,
    ADA_NORM,
    DROPOUT,
    LAYER_NORM,
    MLP,
    SILU,
    Classes,
    must_be_called,
)
from fluxfast.model.rope import Tables, rope_arguments
from fluxfast.model.streams import flat_rows, parts_of, streams_of
from fluxfast.ops.gated_residual import gated_residual
from fluxfast.ops.gelu import gelu
from fluxfast.ops.linear.pair import pairs
from fluxfast.ops.modulated_layer_norm import modulated_layer_norm
from fluxfast.ops.parts import Parts
from fluxfast.ops.qk_norm_rope import qk_norm_rope


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
        attn = own_module(self, "attn")
        # torch's list of modules takes three microseconds to be indexed
        to_out, _ = own_module(attn, "to_out")
        (up, down), (txt_up, txt_down) = map(self._mlp_linears, ("ff", "ff_context"))
        return [
            *(attention_module.qkv(attn), (to_out,), (up,), (down,)),
            *(attention_module.txt_qkv(attn), (own_module(attn, "to_add_out"),)),
            *((txt_up,), (txt_down,)),
        ]

    def _mlp_linears(self, name: str) -> tuple[nn.Module, nn.Module]:
        up, _, down = own_module(own_module(self, name), "net")
        return own_module(up, "proj"), down

    def groups_with_room(self) -> list[tuple[nn.Module, ...]]:
        after_attention = (self.attn.to_out[0],), (self.attn.to_add_out,)
        return [group for group in self.linear_groups() if group not in after_attention]

    def modulation_linears(self) -> tuple[nn.Module, ...]:
        norms = own_module(self, "norm1"), own_module(self, "norm1_context")
        return own_module(norms[0], "linear"), own_module(norms[1], "linear")

    def bypassed(self) -> Sequence[tuple[nn.Module, Classes]]:
        modules: list[tuple[nn.Module, Classes]] = []
        for name in ("norm1", "norm1_context"):
            norm = own_module(self, name)
            parts = own_module(norm, "norm"), own_module(norm, "silu")
            modules += ((norm, ADA_NORM), (parts[0], LAYER_NORM), (parts[1], SILU))
        for name in ("norm2", "norm2_context"):
            modules.append((own_module(self, name), LAYER_NORM))
        for name in ("ff", "ff_context"):
            ff = own_module(self, name)
            net = list(own_module(ff, "net"))[:2]
            modules += ((ff, MLP), *zip(net, (ACTIVATION, DROPOUT), strict=False))
        return modules

    def composed_because(self, kwargs: dict[str, Any]) -> str | None:
        _, dropout = own_module(own_module(self, "attn"), "to_out")
        return super().composed_because(kwargs) or must_be_called([(dropout, DROPOUT)])

    def _streams(self, img: Tensor, txt: Tensor | None) -> tuple[Tensor, ...]:
        assert txt is not None
        return img, txt

    def _fused_call(
        self,
        streams: Sequence[Tensor],
        pe: Tables,
        kwargs: dict[str, Any],
        checkpointed: bool = False,
    ) -> tuple[BlockCall, BlockLinears] | None:
        fused = super()._fused_call(streams, pe, kwargs, checkpointed)
        if fused is None:
            return None
        call, linears = fused
        parts = self._parts(call, linears, *streams)
        return (call if parts is None else call.but(parts=parts)), linears

    def _parts(
        self, call: BlockCall, linears: BlockLinears, img: Tensor, txt: Tensor
    ) -> Parts | None:
        """How both streams lie in one tensor; None where each goes through the ops by itself."""
        if call.impl != "triton" or call.failed:
            return None
        if self.norm1.norm.eps != self.norm1_context.norm.eps:
            return None
        if self.norm2.eps != self.norm2_context.eps:
            return None
        groups = call.groups(linears, img.dtype, backward=False)
        together = all(pairs(*both) for both in zip(groups[4:], groups[:4], strict=True))
        return parts_of(txt, img) if together else None

    def _function_inputs(self, call: BlockCall, streams: Sequence[Tensor]) -> Sequence[Tensor]:
        img, txt = streams
        return streams if call.parts is None else (flat_rows(txt, img),)

    def _outputs(
        self, outs: Tensor | tuple[Tensor, Tensor], streams: tuple[Tensor, ...], _: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        img, txt = streams
        txt_out, img_out = outs if isinstance(outs, tuple) else streams_of(outs, parts_of(txt, img))
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
