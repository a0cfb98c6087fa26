"""The modules of FLUX.1's blocks whose work fluxfast does without calling them.

That is right only for modules of the class that FLUX.1 has in their place, with its settings and
without hooks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle, RMSNorm
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import nn

from fluxfast.foreign.comfyui import comfy_because
from fluxfast.hooks import hooked, own_parameter

Classes = tuple[Any, ...]
# what FLUX.1 has in each kind of place
ADA_NORM: Classes = (AdaLayerNormZero, AdaLayerNormZeroSingle)
LAYER_NORM: Classes = (nn.LayerNorm,)
RMS_NORM: Classes = (RMSNorm, nn.RMSNorm)
ACTIVATION: Classes = (GELU, nn.GELU)
SILU: Classes = (nn.SiLU,)
MLP: Classes = (FeedForward,)
DROPOUT: Classes = (nn.Dropout,)
ATTENTION: Classes = (FluxAttention, Attention)
_CLASSES = (
    *(*ADA_NORM, *LAYER_NORM, *RMS_NORM, *ACTIVATION),
    *(*SILU, *MLP, *DROPOUT, *ATTENTION),
)
# of these, the class alone says what they compute
_WITHOUT_SETTINGS = (AdaLayerNormZeroSingle, nn.SiLU, FluxAttention)
# a tuple: torch.compile does not find all of them in a set
_FORWARDS = tuple(known.forward for known in _CLASSES)


def must_be_called(modules: Iterable[tuple[nn.Module, Classes]]) -> str | None:
    """Why one of the modules has to be called: it has hooks, or is not FLUX.1's; else None.

    modules: each with the classes of which FLUX.1 has one in its place.
    """
    for module, classes in modules:
        because = hooked(module)
        if because is not None:
            return f"its {type(module).__name__} is called as a module: {because}"
        kind = type(module)
        if kind in _WITHOUT_SETTINGS and kind in classes:
            continue
        known = kind.forward in _FORWARDS or comfy_because(module, nn.LayerNorm) is None
        if not known or not isinstance(module, classes) or not _is_flux(module):
            return f"its {kind.__name__} is not the module that FLUX.1 has there"
    return None


def _is_flux(module: Any) -> bool:
    """Whether a module of a known class has the settings of FLUX.1's."""
    if isinstance(module, nn.LayerNorm):
        return own_parameter(module, "weight") is None and own_parameter(module, "bias") is None
    if isinstance(module, (RMSNorm, nn.RMSNorm)):
        # torch's has no bias, and takes a microsecond to say so
        held = module._parameters
        has_bias = held.get("bias") is not None or module.__dict__.get("bias") is not None
        return held.get("weight") is not None and not has_bias and module.eps is not None
    if isinstance(module, (GELU, nn.GELU)):
        return module.approximate == "tanh"
    if isinstance(module, AdaLayerNormZero):
        return module.emb is None
    if isinstance(module, FeedForward):
        return len(module._modules["net"]._modules) == 3
    return not (isinstance(module, nn.Dropout) and module.training and module.p > 0)
