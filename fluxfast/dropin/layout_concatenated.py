"""The older layout of diffusers' blocks, as SimpleTuner carries it: diffusers' module names; text and image one tensor in the
single block; `Attention` with `FluxAttnProcessor2_0`.

Its blocks replace NaN by 0 in what they return; ours let it through, so that a broken step is seen.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from fluxfast.dropin.cpu import host_is_faster
from fluxfast.model.block_maths import DoubleMaths, SingleMaths
from fluxfast.model.linear import untouched

# the same attention on different back ends
PROCESSORS = {"FluxAttnProcessor2_0", "FluxAttnProcessor3_0", "FluxSingleAttnProcessor3_0"}
DOUBLE_ARGUMENTS = {"hidden_states", "encoder_hidden_states", "temb", "context_temb", "image_rotary_emb"}
SINGLE_ARGUMENTS = {"hidden_states", "temb", "image_rotary_emb"}


@functools.cache
def _signature(forward: Any) -> inspect.Signature:
    return inspect.signature(forward)


class _Shared:
    host_class: type
    attn: Any

    def maths(self) -> Any:
        """What computes the block."""
        return self

    def foreign_attention(self, kwargs: dict[str, Any]) -> str | None:
        # where it is, the host's own forward runs
        return None

    def host_runs_because(self: Any) -> str | None:
        """Why the host's own forward runs; None where ours does."""
        attn = self.attn
        if type(attn.processor).__name__ not in PROCESSORS or attn.fused_projections:
            return f"its attention processor is {type(attn.processor).__name__}"
        norms = (getattr(attn, name) for name in self.qk_norms)
        if not all(map(untouched, (*self.bypassed(), attn, *norms))):
            return "hooks on its modules"
        return None

    def arguments(self, args: Any, kwargs: Any, known: set[str]) -> dict[str, Any] | None:
        """A call's arguments by name, less those that are None; None if there is one that only the host knows."""
        host: Any = self.host_class
        bound = _signature(host.forward).bind(self, *args, **kwargs).arguments
        given = {name: value for name, value in list(bound.items())[1:] if value is not None}
        per_token = any(given[name].ndim != 2 for name in ("temb", "context_temb") if name in given)
        return given if given.keys() <= known and "image_rotary_emb" in given and not per_token else None


class Double(_Shared, DoubleMaths):
    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        given = self.arguments(args, kwargs, DOUBLE_ARGUMENTS)
        if given is None or self.host_runs_because() is not None or host_is_faster(given["hidden_states"], self.ff.net[2]):
            host: Any = self.host_class
            return host.forward(self, *args, **kwargs)
        img, txt, vec, pe = (given[name] for name in ("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb"))
        return self.run(img, txt, vec, pe, {}, txt_vec=given.get("context_temb"))


class Single(_Shared, SingleMaths):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        given = self.arguments(args, kwargs, SINGLE_ARGUMENTS)
        if given is None or self.host_runs_because() is not None or host_is_faster(given["hidden_states"], self.proj_out):
            host: Any = self.host_class
            return host.forward(self, *args, **kwargs)
        return self.run(given["hidden_states"], given["temb"], given["image_rotary_emb"], {})


def mixin_for(block: nn.Module) -> type | None:
    """The mixin for a block that has the older layout's modules and takes its arguments."""
    kind = type(block)
    if not isinstance(getattr(block, "attn", None), Attention):
        return None
    parameters = set(_signature(kind.forward).parameters)
    if kind.__name__ == "FluxTransformerBlock" and parameters >= DOUBLE_ARGUMENTS - {"context_temb"}:
        return Double if _has(block, "norm1", "norm1_context", "norm2", "norm2_context", "ff", "ff_context") else None
    if kind.__name__ == "FluxSingleTransformerBlock" and "encoder_hidden_states" not in parameters >= SINGLE_ARGUMENTS:
        return Single if _has(block, "norm", "proj_mlp", "act_mlp", "proj_out") else None
    return None


def _has(block: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(block, name, None), nn.Module) for name in names)


def register(host: type, made: type) -> None:
    """Nobody looks these blocks up by class."""
