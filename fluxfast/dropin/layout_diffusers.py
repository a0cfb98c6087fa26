"""diffusers' FLUX.1 blocks, 0.36 and later: those of `fluxfast.model.blocks`, as they are."""

from __future__ import annotations

from typing import Any

from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import nn

from fluxfast.model.block_maths import BlockMaths
from fluxfast.model.blocks import DoubleStreamBlock, SingleStreamBlock
from fluxfast.model.linear import untouched


class _Shared:
    def maths(self) -> Any:
        """What computes the block."""
        return self

    def host_runs_because(self: Any) -> str | None:
        """Why the host's own forward runs; None where ours does."""
        return None if all(map(untouched, self.bypassed())) else "hooks on its modules"


class Double(_Shared, DoubleStreamBlock):
    pass


class Single(_Shared, SingleStreamBlock):
    pass


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
