"""What ComfyUI's calls of BFL's blocks have beside the tensors: its options, and its attention.

Every call is given `transformer_options`. Most of it is bookkeeping of the sampler, or a node's own
for what it does around the model; some changes what a block computes. Patches between the blocks,
and those in the place of a whole block, are the model's business: it calls the block, or it does
not.

Nodes also exchange functions: a block's forward, the attention that it calls, and the one of
several that this calls in turn. All are looked up where the block's own code would find them, and
known by what that code names.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

import torch

from fluxfast.foreign.code_names import codes_in, unknown_in, words
from fluxfast.model.linear import base_of

OPTIONS = "transformer_options"
# entries that no block reads
_BOOKKEEPING = words(
    "activations_shape block block_index block_type callbacks cond_or_uncond img_slice "
    "original_shape patches_replace reference_image_num_tokens sample_sigmas sigmas "
    "total_blocks transformer_index uuids wrappers"
)
# patches that are called before, between or after blocks
_BETWEEN = frozenset({"double_block", "post_input", "single_block"})
# all that the code of both kinds of block may name, and that of the attention that they call
_OF_BLOCK = words(
    "apply_mod attention cat copy dtype flipped_img_txt float16 gate get hidden_size img_attn "
    "img_mlp img_mod img_norm1 img_norm2 linear1 linear2 mlp_act mlp_hidden_dim "
    "mlp_hidden_dim_first modulation nan_to_num norm num_heads permute pre_norm proj qkv scale "
    "shape shift split torch txt_attn txt_mlp txt_mod txt_norm1 txt_norm2 view yak_mlp"
)
_OF_ATTENTION = words("apply_rope dtype optimized_attention reshape shape to type_as")
# those of its attentions that compute it exactly
_EXACT = words(
    "attention_basic attention_flash attention_pytorch attention_split attention_sub_quad "
    "attention_xformers"
)


def options_because(block: Any, options: Any) -> str | None:
    """Why a block's own forward runs for a call with these options; None where ours may.

    `block_because` has known the code of its forward.
    """
    if options is None:
        return None
    if not isinstance(options, Mapping):
        return f"its {OPTIONS} is a {type(options).__name__}"
    patches = options.get("patches") or {}
    if inside := sorted(name for name, value in patches.items() if value and name not in _BETWEEN):
        return f"its {OPTIONS} has patches within the block: {', '.join(inside)}"
    known = {*_BOOKKEEPING, "patches"}
    others = [name for name, value in options.items() if name not in known and value is not None]
    if others and (read := sorted(set(others) & _texts_of(block))):
        return f"only the host knows of its {OPTIONS}: {', '.join(read)}"
    return None


def attention_because(block: Any) -> str | None:
    """Why a block's attention is not what FLUX.1 defines; None where it is."""
    for part in (block, getattr(block, "img_attn", None)):
        chosen = getattr(part, "comfy_attention", None)
        if getattr(chosen, "function", None) is not None:
            return "its checkpoint chooses its attention"
    found = list(_attentions(block))
    # a function that a node has put around another is not where that is
    if len({id(each.__globals__) for each in found}) > 1:
        return "its attention has another function around it"
    name = found[-1].__code__.co_name if found else "not known"
    return None if name in _EXACT else f"its attention is {name}"


def block_because(block: Any) -> str | None:
    """Why a block's forward is not FLUX.1's, its modules aside; None where it is."""
    if torch.compiler.is_compiling():
        return "torch.compile traces ComfyUI's own blocks"
    if getattr(block, "flipped_img_txt", False):
        return "its image comes before its text"
    forward = block.host_class.forward
    unknown = _unknown(forward, _OF_BLOCK)
    attention = getattr(forward, "__globals__", {}).get("attention")
    if unknown is None:
        unknown = _unknown(attention, _OF_ATTENTION)
    return unknown and f"its forward has names that fluxfast doesn't know: {unknown}"


def _attentions(block: Any) -> Iterator[FunctionType]:
    """The attention that a block's own forward ends in, and the functions around it, outermost
    first; none where it is no function of Python.
    """
    attention = block.host_class.forward.__globals__.get("attention")
    each = getattr(attention, "__globals__", {}).get("optimized_attention")
    while isinstance(each, FunctionType):
        yield each
        each = getattr(each, "__wrapped__", None)


def _texts_of(block: Any) -> frozenset[str]:
    """All texts in the code that a block's own forward would run: what it could ask options for."""
    forward = block.host_class.forward
    attention = forward.__globals__.get("attention")
    return _texts(tuple(each.__code__ for each in (forward, attention, *_attentions(block))))


@functools.lru_cache(maxsize=64)
def _texts(functions: tuple[CodeType, ...]) -> frozenset[str]:
    constants = [c for each in functions for code in codes_in(each) for c in code.co_consts]
    return frozenset(c for c in constants if isinstance(c, str))


@functools.lru_cache(maxsize=64)
def _unknown(function: Any, known: frozenset[str]) -> str | None:
    return unknown_in([function], known)


def norm_because(norm: Any) -> str | None:
    """Why an RMS norm, or another of a block's modules, isn't read but left to its block."""
    if getattr(norm, "weight_function", None) or getattr(norm, "bias_function", None):
        return f"its {type(norm).__name__} has a function that changes its weight"
    return None


def default_eps(x: torch.Tensor) -> float:
    """What torch's RMS norm adds to the mean square of an x, where nobody says how much."""
    return _default_eps(x.device, x.dtype)


@functools.cache
def _default_eps(device: torch.device, dtype: torch.dtype) -> float:
    """It is the smallest step of x's dtype, or of fp32, by torch's version and device: so ask."""
    x = torch.full((1,), 2.0**-10, dtype=dtype, device=device)
    normed = float(torch.nn.functional.rms_norm(x, (1,)))
    each = [torch.finfo(kind).eps for kind in (dtype, torch.float32)]
    return min(each, key=lambda eps: abs(normed - (1 + eps * 2.0**20) ** -0.5))


def weights_because(maths: Any, device: torch.device) -> str | None:
    """Why a block's modules have to be called: ComfyUI brings weights for the length of a call."""
    linears = [linear for group in maths.linear_groups() for linear in group]
    linears += maths.modulation_linears()
    weights = [base_of(linear)._parameters.get("weight") for linear in linears]
    for weight in (*weights, *(norm.weight for norm in maths.rms_norms())):
        if weight is not None and weight.device != device:
            return f"a weight of it is on {weight.device.type}, and its input is not"
    return None
