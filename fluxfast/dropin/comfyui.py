"""What ComfyUI's calls of BFL's blocks have beside the tensors: its options, and its attention.

Every call is given `transformer_options`. Most of it is bookkeeping of the sampler; some changes
what a block computes, and an entry that is not known here might. Patches between the blocks, and
those in the place of a whole block, are the model's business: it calls the block, or it does not.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


OPTIONS = "transformer_options"
# entries that no block reads
_BOOKKEEPING = _names(
    "activations_shape block block_index block_type callbacks cond_or_uncond img_slice "
    "original_shape patches_replace reference_image_num_tokens sample_sigmas sigmas "
    "total_blocks transformer_index uuids wrappers"
)
# patches that are called before, between or after blocks
_BETWEEN = frozenset({"double_block", "post_input", "single_block"})


def options_because(options: Any) -> str | None:
    """Why a block's own forward runs for a call with these options; None where ours may."""
    if options is None:
        return None
    if not isinstance(options, Mapping):
        return f"its {OPTIONS} is a {type(options).__name__}"
    patches = options.get("patches") or {}
    if inside := sorted(name for name, value in patches.items() if value and name not in _BETWEEN):
        return f"its {OPTIONS} has patches within the block: {', '.join(inside)}"
    known = {*_BOOKKEEPING, "patches"}
    others = [name for name, value in options.items() if name not in known and value is not None]
    if others:
        return f"only the host knows of its {OPTIONS}: {', '.join(sorted(map(str, others)))}"
    return None


def attention_because(block: Any) -> str | None:
    """Why a block's attention is not what FLUX.1 defines; None where it is."""
    for part in (block, getattr(block, "img_attn", None)):
        chosen = getattr(part, "comfy_attention", None)
        if getattr(chosen, "function", None) is not None:
            return "its checkpoint chooses its attention"
    module = sys.modules.get("comfy.ldm.modules.attention")
    name = getattr(getattr(module, "optimized_attention", None), "__name__", "")
    # all others compute it exactly
    return f"its attention is {name}" if "sage" in name or "int8" in name else None


def norm_because(norm: Any) -> str | None:
    """Why an RMS norm, or another of a block's modules, isn't read but left to its block."""
    if getattr(norm, "eps", 0.0) is None:
        return "the eps of an RMS norm is that of its input's dtype"
    if getattr(norm, "weight_function", None) or getattr(norm, "bias_function", None):
        return f"its {type(norm).__name__} has a function that changes its weight"
    return None


def weights_because(linears: Any, device: torch.device) -> str | None:
    """Why a block's linears have to be called as modules: ComfyUI brings weights for a call."""
    for linear in linears:
        weight = getattr(getattr(linear, "base_layer", linear), "weight", None)
        if weight is not None and weight.device != device:
            return f"a weight of it is on {weight.device.type}, and its input is not"
    return None
