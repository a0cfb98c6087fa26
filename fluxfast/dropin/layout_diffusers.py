"""diffusers' FLUX.1 blocks, 0.36 and later: those of `fluxfast.model.blocks`, as they are."""

from __future__ import annotations

from typing import Any

from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn

from fluxfast.dropin.cpu import host_is_faster
from fluxfast.model.block_maths import BlockMaths
from fluxfast.model.blocks import DoubleStreamBlock, SingleStreamBlock
from fluxfast.model.linear import untouched
from fluxfast.model.processors import Tables


class _Shared:
    def maths(self) -> Any:
        """What computes the block."""
        return self

    def host_runs_because(self: Any) -> str | None:
        """Why the host's own forward runs; None where ours does."""
        return None if all(map(untouched, self.bypassed())) else "hooks on its modules"


class Double(_Shared, DoubleStreamBlock):
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Any,
        image_rotary_emb: Tables,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        args = (hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        # diffusers' block takes no positions of tokens that a route has left
        if len(image_rotary_emb) == 2 and host_is_faster(hidden_states, self.ff.net[2]):
            return FluxTransformerBlock.forward(self, *args)
        return super().forward(*args)


class Single(_Shared, SingleStreamBlock):
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        temb: Any,
        image_rotary_emb: Tables,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        args = (hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        if len(image_rotary_emb) == 2 and host_is_faster(hidden_states, self.proj_out):
            return FluxSingleTransformerBlock.forward(self, *args)
        return super().forward(*args)


def mixin_for(block: nn.Module) -> type[BlockMaths] | None:
    """The mixin for one of diffusers' own blocks; not for a subclass whose forward is another."""
    if isinstance(block, FluxTransformerBlock) and type(block).forward is FluxTransformerBlock.forward:
        return Double
    if isinstance(block, FluxSingleTransformerBlock) and type(block).forward is FluxSingleTransformerBlock.forward:
        return Single
    return None


def register(host: type, made: type) -> None:
    """diffusers' caching hooks look blocks up by their very class."""
    TransformerBlockRegistry.register(made, TransformerBlockRegistry.get(host))
