"""diffusers' FLUX.1 blocks, 0.36 and later: the classes of `fluxfast.model.blocks` fit them."""

from __future__ import annotations

from typing import Any

from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.transformers.transformer_flux import (
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn

from fluxfast.dropin.cpu import host_is_faster
from fluxfast.model.block_base import BlockBase
from fluxfast.model.blocks import DoubleStreamBlock, SingleStreamBlock
from fluxfast.model.known_modules import must_be_called
from fluxfast.model.rope import Tables


class _Shared:
    """What both kinds of block share."""

    entry = "forward"

    def maths(self) -> Any:
        """What computes the block: itself."""
        return self

    def modules_because(self: Any) -> str | None:
        """Why its modules make the host's own forward run; None where they don't."""
        return must_be_called(self.bypassed())

    def foreign_call(self: Any, x: Tensor, pe: Tables | None) -> str | None:
        because: str | None = super().foreign_call(x, pe)  # type: ignore[misc]
        # a call with a third tensor of positions is ours: diffusers' block takes no routes
        if because is None and pe is not None and len(pe) == 2:
            return host_is_faster(x, self)
        return because


class Double(_Shared, DoubleStreamBlock):
    pass


class Single(_Shared, SingleStreamBlock):
    pass


def mixin_for(block: nn.Module) -> type[BlockBase] | None:
    """The mixin for one of diffusers' own blocks; None for a subclass with another forward."""
    if (
        isinstance(block, FluxTransformerBlock)
        and type(block).forward is FluxTransformerBlock.forward
    ):
        return Double
    if (
        isinstance(block, FluxSingleTransformerBlock)
        and type(block).forward is FluxSingleTransformerBlock.forward
    ):
        return Single
    return None


def register(host: type, made: type) -> None:
    """Make the new class known to diffusers' caching hooks, which look blocks up by class."""
    TransformerBlockRegistry.register(made, TransformerBlockRegistry.get(host))
