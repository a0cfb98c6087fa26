"""diffusers' FLUX.1 blocks with our forward.

Each is diffusers' block by type, by module names and by state dict. They add no state, so that a
block someone else built becomes ours by taking our class (`adopt`) and keeps its parameters,
adapters and hooks. The maths is `block_maths`.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import (
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn

from fluxfast.model import attention_module
from fluxfast.model.attention_module import Tables
from fluxfast.model.block_maths import BlockMaths, DoubleMaths, SingleMaths
from fluxfast.model.known_modules import must_be_called
from fluxfast.model.modulation import Vectors

NO_POSITIONS = "it is called without image_rotary_emb"


class DoubleStreamBlock(DoubleMaths, FluxTransformerBlock):
    """Text and image with weights of their own, joined in attention."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor | Vectors,
        image_rotary_emb: Tables | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        kwargs = joint_attention_kwargs or {}
        because = self.host_because(hidden_states, image_rotary_emb)
        if because is not None or image_rotary_emb is None:
            self.ran("host", because)
            pe = attention_module.full_tables(
                image_rotary_emb, attention_module.head_dim(self.attn)
            )
            return FluxTransformerBlock.forward(
                self, hidden_states, encoder_hidden_states, _vec(temb), pe, kwargs
            )
        return self.run(hidden_states, encoder_hidden_states, temb, image_rotary_emb, kwargs)

    def host_because(self, x: Tensor, pe: Tables | None) -> str | None:
        """Why diffusers' own forward runs, for a call with the stream x and the tables pe; None
        where ours does.
        """
        return _host_because(self, pe)


class SingleStreamBlock(SingleMaths, FluxSingleTransformerBlock):
    """One joint sequence; attention and MLP in parallel on the same normalised input."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        temb: Tensor | Vectors,
        image_rotary_emb: Tables | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """With text given apart, as diffusers does, both come back apart; with None,
        `hidden_states` is the joint sequence.
        """
        kwargs = joint_attention_kwargs or {}
        because = self.host_because(hidden_states, image_rotary_emb)
        if because is not None or image_rotary_emb is None:
            self.ran("host", because)
            return self._theirs(
                hidden_states, encoder_hidden_states, _vec(temb), image_rotary_emb, kwargs
            )
        if encoder_hidden_states is None:
            return self.run(hidden_states, temb, image_rotary_emb, kwargs)
        joint = self.run(
            joined(encoder_hidden_states, hidden_states), temb, image_rotary_emb, kwargs
        )
        txt_len = encoder_hidden_states.shape[1]
        return joint[:, :txt_len], joint[:, txt_len:]

    def host_because(self, x: Tensor, pe: Tables | None) -> str | None:
        """Why diffusers' own forward runs, for a call with the stream x and the tables pe; None
        where ours does.
        """
        return _host_because(self, pe)

    def _theirs(
        self, x: Tensor, txt: Tensor | None, temb: Tensor, pe: Tables | None, kwargs: dict[str, Any]
    ) -> Any:
        """diffusers' own forward, which wants text and image apart."""
        pe = attention_module.full_tables(pe, attention_module.head_dim(self.attn))
        if txt is not None:
            return FluxSingleTransformerBlock.forward(self, x, txt, temb, pe, kwargs)
        return torch.cat(
            FluxSingleTransformerBlock.forward(self, x[:, 1:], x[:, :1], temb, pe, kwargs), dim=1
        )


def _host_because(block: BlockMaths, pe: Tables | None) -> str | None:
    return NO_POSITIONS if pe is None else must_be_called(block.bypassed())


def _vec(temb: Tensor | Vectors) -> Tensor:
    if isinstance(temb, tuple):
        raise ValueError(
            "a norm or MLP module of a block has hooks or a forward of its own, so that "
            "diffusers' forward has to run, which "
            "computes modulation itself: turn modulation ahead off (set_modulation_ahead(False))"
        )
    return temb


def joined(txt: Tensor, img: Tensor) -> Tensor:
    """[B, S_txt + S_img, D]: the tensor that a single block before this one has cut in two, if it
    is that; else a new one.
    """
    joint = txt._base if not torch.compiler.is_compiling() else None
    if joint is not None and joint is img._base and _are_halves(txt, img, joint):
        return joint
    return torch.cat([txt, img], dim=1)


def _are_halves(txt: Tensor, img: Tensor, joint: Tensor) -> bool:
    """Whether txt and img lie in `joint` one after the other, and whoever has a gradient for it has
    theirs.
    """
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


def adopt(block: nn.Module) -> None:
    """Make one of diffusers' FLUX.1 blocks ours, in place: same object, same parameters, our
    forward.
    """
    if isinstance(block, FluxTransformerBlock):
        block.__class__ = DoubleStreamBlock
    elif isinstance(block, FluxSingleTransformerBlock):
        block.__class__ = SingleStreamBlock
    else:
        raise TypeError(
            "adopt: expected diffusers' FluxTransformerBlock or FluxSingleTransformerBlock, "
            f"got {type(block)}"
        )
