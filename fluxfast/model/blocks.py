"""diffusers' FLUX.1 blocks with our forward.

Each is diffusers' block by type, by module names and by state dict, and adds no state. So a block
that someone else built becomes ours by a change of its class (`convert_block`), and keeps its
parameters, adapters and hooks.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import (
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn

from fluxfast.model.attention_module import head_dim
from fluxfast.model.block_base import Temb
from fluxfast.model.double_block import DoubleMaths
from fluxfast.model.rope import Tables, full_tables
from fluxfast.model.single_block import SingleMaths


class DoubleStreamBlock(DoubleMaths, FluxTransformerBlock):
    """Text and image with weights of their own, joined in attention."""

    def host_forward(
        self, img: Tensor, txt: Tensor | None, temb: Temb, pe: Tables | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        tables = full_tables(pe, head_dim(self.attn))
        return FluxTransformerBlock.forward(self, img, txt, _vec(temb), tables, kwargs)


class SingleStreamBlock(SingleMaths, FluxSingleTransformerBlock):
    """One joint sequence; attention and MLP in parallel on the same normalised input."""

    def host_forward(
        self, img: Tensor, txt: Tensor | None, temb: Temb, pe: Tables | None, kwargs: dict[str, Any]
    ) -> Tensor | tuple[Tensor, Tensor]:
        tables, vec = full_tables(pe, head_dim(self.attn)), _vec(temb)
        if txt is not None:
            return FluxSingleTransformerBlock.forward(self, img, txt, vec, tables, kwargs)
        # diffusers' forward takes two tensors; where the joint sequence is cut does not matter
        txt, img = img[:, :1], img[:, 1:]
        both = FluxSingleTransformerBlock.forward(self, img, txt, vec, tables, kwargs)
        return torch.cat(both, dim=1)


def _vec(temb: Temb) -> Tensor:
    """The conditioning vector, for diffusers' forward; ValueError where it was not handed on."""
    if not isinstance(temb, Tensor):
        raise ValueError(
            "a norm or MLP module of a block has hooks or a forward of its own, so that "
            "diffusers' forward has to run, which "
            "computes modulation itself: turn modulation ahead off (set_modulation_ahead(False))"
        )
    return temb


def convert_block(block: nn.Module) -> None:
    """Make one of diffusers' FLUX.1 blocks ours, in place: same object and parameters, our forward.

    Raises TypeError for any other module.
    """
    if isinstance(block, FluxTransformerBlock):
        block.__class__ = DoubleStreamBlock
    elif isinstance(block, FluxSingleTransformerBlock):
        block.__class__ = SingleStreamBlock
    else:
        raise TypeError(
            "convert_block: expected diffusers' FluxTransformerBlock or "
            f"FluxSingleTransformerBlock, got {type(block)}"
        )
