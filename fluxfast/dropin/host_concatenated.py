"""The layout of diffusers' blocks before 0.36, which SimpleTuner uses.

Module names are diffusers' of today. The single block takes text and image as one tensor, and
attention is `Attention` with `FluxAttnProcessor2_0`. Those blocks replace NaN by 0 in what they
return; ours do not, so that a broken step shows.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from fluxfast.dropin.arguments import HostBlock, signature_of
from fluxfast.dropin.cpu import host_is_faster
from fluxfast.foreign.code_names import names_in
from fluxfast.model.block_base import NO_POSITIONS
from fluxfast.model.double_block import DoubleMaths
from fluxfast.model.known_modules import ATTENTION, RMS_NORM, must_be_called
from fluxfast.model.rope import Tables
from fluxfast.model.single_block import SingleMaths

# these compute the same attention, on different back ends
PROCESSORS = {"FluxAttnProcessor2_0", "FluxAttnProcessor3_0", "FluxSingleAttnProcessor3_0"}
SINGLE_ARGUMENTS = frozenset({"hidden_states", "temb", "image_rotary_emb"})
DOUBLE_ARGUMENTS = SINGLE_ARGUMENTS | {"encoder_hidden_states", "context_temb"}
# the text tokens that SimpleTuner's masked training attends to, and what must be named by the code
# of the block's forward and of the processor, for the mask to be what `joint_mask` makes of it
MASK = "attention_mask"
_EXPANDS, _ADDS = "expand_flux_attention_mask", frozenset({"unsqueeze", "bool", "to"})


class _Shared(HostBlock):
    """What both kinds of block share."""

    entry = "forward"
    host_class: Any
    attn: Any

    def maths(self) -> Any:
        """What computes the block: itself."""
        return self

    # `host_because` has ruled both out

    def foreign_call(self, x: Tensor, pe: Tables | None) -> str | None:
        return None

    def foreign_attention(self, kwargs: dict[str, Any]) -> str | None:
        return None

    def modules_because(self: Any) -> str | None:
        """Why its modules make the host's own forward run; None where they don't."""
        attn = self.attn
        if type(attn.processor).__name__ not in PROCESSORS:
            return f"its attention processor is {type(attn.processor).__name__}"
        if attn.fused_projections:
            return "its projections are fused"
        norms = self.rms_norms()
        if any(norm is None for norm in norms):
            return "its attention does not normalise q and k"
        return must_be_called(
            [*self.bypassed(), (attn, ATTENTION), *((norm, RMS_NORM) for norm in norms)]
        )

    def host_because(self: Any, given: dict[str, Any]) -> str | None:
        if not isinstance(given.get("image_rotary_emb"), (tuple, list)):
            return NO_POSITIONS
        for name in ("temb", "context_temb"):
            if name in given and given[name].ndim != 2:
                return f"its {name} is of each token"
        if (because := self.modules_because()) is not None:
            return because
        mask, processor = given.get(MASK), self.attn.processor
        if mask is not None and not (
            mask.ndim == 2 and _knows_mask(self.host_class, processor.__class__)
        ):
            return f"only the host knows its argument {MASK}"
        return host_is_faster(given["hidden_states"], self)


class Double(_Shared, DoubleMaths):
    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        given = self.ours(args, kwargs, DOUBLE_ARGUMENTS | {MASK})
        if given is None:
            return self.host_class.forward(self, *args, **kwargs)
        img, txt, vec, pe = (
            given[name]
            for name in ("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb")
        )
        mask = joint_mask(given.get(MASK), img, txt.shape[1] + img.shape[1])
        vecs = [vec, given.get("context_temb", vec)]
        return DoubleMaths.forward(self, img, txt, vecs, pe, mask)


class Single(_Shared, SingleMaths):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        given = self.ours(args, kwargs, SINGLE_ARGUMENTS | {MASK})
        if given is None:
            return self.host_class.forward(self, *args, **kwargs)
        x, vec, pe = (given[name] for name in ("hidden_states", "temb", "image_rotary_emb"))
        return SingleMaths.forward(
            self, x, None, vec, pe, joint_mask(given.get(MASK), x, x.shape[1])
        )


@functools.cache
def _knows_mask(host: Any, processor: Any) -> bool:
    """Whether a host's block and its processor make of a mask what `joint_mask` makes of it."""
    return _EXPANDS in names_in(host.forward) and names_in(processor.__call__) >= _ADDS


def joint_mask(mask: Tensor | None, x: Tensor, tokens: int) -> dict[str, Any]:
    """SimpleTuner's mask of the first tokens [B, S_txt] as joint_attention_kwargs.

    Its processor adds 1 to the scores of the tokens that are attended to, and 0 to those that are
    not: it gives PyTorch's attention the mask as numbers. So what it trains is that.
    """
    if mask is None:
        return {}
    whole = torch.ones(mask.shape[0], tokens, dtype=x.dtype, device=x.device)
    whole[:, : mask.shape[1]] = mask > 0
    return {MASK: whole[:, None, None]}


def mixin_for(block: nn.Module) -> type | None:
    """The mixin for a block that has the older layout's modules and takes its arguments."""
    kind = type(block)
    if not isinstance(getattr(block, "attn", None), Attention):
        return None
    parameters = signature_of(kind.forward).defaults.keys()
    if kind.__name__ == "FluxTransformerBlock" and parameters >= DOUBLE_ARGUMENTS - {
        "context_temb"
    }:
        names = ("norm1", "norm1_context", "norm2", "norm2_context", "ff", "ff_context")
        return Double if _has(block, *names) else None
    if (
        kind.__name__ == "FluxSingleTransformerBlock"
        and "encoder_hidden_states" not in parameters >= SINGLE_ARGUMENTS
    ):
        return Single if _has(block, "norm", "proj_mlp", "act_mlp", "proj_out") else None
    return None


def _has(block: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(block, name, None), nn.Module) for name in names)


def register(host: type, made: type) -> None:
    """Does nothing: no library looks these blocks up by their class."""
