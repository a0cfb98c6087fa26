"""diffusers' FLUX.1 blocks, 0.36 and later: those of `fluxfast.model.blocks`, as they are."""

from __future__ import annotations

from typing import Any

from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.transformers.transformer_flux import (
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn

from fluxfast.dropin.cpu import host_is_faster
from fluxfast.model.attention_module import Tables
from fluxfast.model.block_maths import BlockMaths
from fluxfast.model.blocks import DoubleStreamBlock, SingleStreamBlock
from fluxfast.model.known_modules import must_be_called


class _Shared:
    entry = "forward"

    def maths(self) -> Any:
        """What computes the block."""
        return self

    def modules_because(self: Any) -> str | None:
        """Why its modules make the host's own forward run; None where they don't."""
        return must_be_called(self.bypassed())

    def host_because(self: Any, x: Tensor, pe: Tables | None) -> str | None:
        because: str | None = super().host_because(x, pe)  # type: ignore[misc]
        # diffusers' block takes no positions of tokens that a route has left
        if because is None and pe is not None and len(pe) == 2:
            return host_is_faster(x, self.linear_groups()[-1][0])
        return because


class Double(_Shared, DoubleStreamBlock):
    pass


class Single(_Shared, SingleStreamBlock):
    pass


def mixin_for(block: nn.Module) -> type[BlockMaths] | None:
    """The mixin for one of diffusers' own blocks; not for a subclass whose forward is another."""
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
    """diffusers' caching hooks look blocks up by their very class."""
    TransformerBlockRegistry.register(made, TransformerBlockRegistry.get(host))
