"""A block's attention module: its projections, its processor, and the back end chosen for it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn

from fluxfast.hooks import own_module, own_parameter
from fluxfast.model.known_modules import ATTENTION, RMS_NORM, must_be_called
from fluxfast.model.linear import without_autocast
from fluxfast.model.rope import Tables, full_tables
from fluxfast.ops import attention_sage, verdicts
from fluxfast.ops.attention import attention, checked_as, resolve

# arguments that diffusers' attention takes without a warning, whether it uses them or not
QUIET_ATTENTION_KWARGS = {"attention_mask", "ip_hidden_states", "ip_adapter_masks"}
# diffusers' names of the back ends that `ops.attention` knows
_OURS = {
    AttentionBackendName.NATIVE: "auto",
    AttentionBackendName._NATIVE_CUDNN: "cudnn",
    AttentionBackendName._NATIVE_FLASH: "flash",
    AttentionBackendName._NATIVE_EFFICIENT: "efficient",
    AttentionBackendName._NATIVE_MATH: "ref",
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()} | dict.fromkeys(
    ("cpu", "native"), AttentionBackendName.NATIVE
)


def head_dim(attn: Any) -> int:
    """The number of channels of one head."""
    return attn.inner_dim // attn.heads


def norm_weight(norm: Any) -> Tensor:
    """An RMS norm's weight; in fp32 where it is an 8-bit float, which torch can't multiply by."""
    weight: Tensor = own_parameter(norm, "weight")
    return weight if weight.dtype.itemsize > 1 else weight.float()


def qkv(attn: Any) -> tuple[nn.Module, ...]:
    """The linears of q, k and v: of the image, or of a single block's joint stream."""
    names = ("to_qkv",) if attn.fused_projections else ("to_q", "to_k", "to_v")
    return tuple([own_module(attn, name) for name in names])


def txt_qkv(attn: Any) -> tuple[nn.Module, ...]:
    """The linears of the text's q, k and v."""
    added = ("add_q_proj", "add_k_proj", "add_v_proj")
    names = ("to_added_qkv",) if attn.fused_projections else added
    return tuple([own_module(attn, name) for name in names])


def foreign_attention(attn: Any, kwargs: dict[str, Any]) -> str | None:
    """Why attention is not FLUX.1's own, and its module has to compute it; None where it is."""
    if type(attn.processor) is not FluxAttnProcessor:
        return f"its attention processor is {type(attn.processor).__name__}"
    if kwargs and (
        unknown := sorted(
            {name for name, value in kwargs.items() if value is not None} - QUIET_ATTENTION_KWARGS
        )
    ):
        return f"joint_attention_kwargs {unknown}"
    held = attn._modules
    norms = [held.get(name) for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")]
    present = [(norm, RMS_NORM) for norm in norms if norm is not None]
    return must_be_called([(attn, ATTENTION), *present])


def backend_of(attn: Any, chosen: str) -> str | None:
    """The back end of `ops.attention` that a block uses: the chosen one, or for "auto" diffusers'.

    diffusers' is the processor's, or else the one that is active. None where `ops.attention` does
    not know it.
    """
    if chosen != "auto":
        return chosen
    processor = getattr(attn, "processor", None)
    if getattr(processor, "_parallel_config", None) is not None:
        return None
    name = getattr(processor, "_attention_backend", None)
    if name is None:
        name = _AttentionBackendRegistry.get_active_backend()[0]
    return _OURS.get(AttentionBackendName(name))


def dispatched(
    attn: Any, chosen: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> Tensor:
    """Attention by diffusers' own dispatch, on the back end of `backend_of`.

    q, k, v [B, S, heads, head_dim] to [B, S, D].
    """
    if chosen in attention_sage.FUNCTIONS:
        return attention(q, k, v, mask, backend=chosen).flatten(2, 3)
    processor = getattr(attn, "processor", None)
    if (
        chosen == "auto"
        and verdicts.ways_failed(checked_as(mask is not None))
        and backend_of(attn, chosen) == "auto"
    ):
        # PyTorch would choose among all its back ends, those that failed their check included
        chosen = resolve("auto", q, mask)
    backend = (
        getattr(processor, "_attention_backend", None) if chosen == "auto" else _THEIRS[chosen]
    )
    parallel = getattr(processor, "_parallel_config", None)
    return dispatch_attention_fn(
        q, k, v, attn_mask=mask, backend=backend, parallel_config=parallel
    ).flatten(2, 3)


def by_processor(
    attn: Any, pe: Tables, kwargs: dict[str, Any], autocast: torch.dtype | None, **inputs: Tensor
) -> tuple[Tensor, ...]:
    """Attention by the module's own processor, in autocast's dtype or that of its weights.

    inputs: hidden_states, and the text's encoder_hidden_states; the outputs are in their dtype.
    """
    x = next(iter(inputs.values()))
    dtype = autocast or attn.norm_q.weight.dtype
    cast = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    with (
        torch.autocast(x.device.type, autocast)
        if autocast is not None
        else without_autocast(x.device.type, None)
    ):
        outs = attn(**cast, image_rotary_emb=full_tables(pe, head_dim(attn)), **kwargs)
    return tuple(out.to(x.dtype) for out in (outs if isinstance(outs, tuple) else (outs,)))
