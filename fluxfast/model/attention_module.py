"""A block's attention module: its tables, its projections, its processor and the back end that
someone chose for it.
"""

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

from fluxfast.model.known_modules import must_be_called
from fluxfast.model.linear import without_autocast
from fluxfast.ops import verdicts
from fluxfast.ops.attention import checked_as, resolve

Tables = tuple[Tensor, ...]
# names that diffusers' processors take without a word whether they use them or not
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


def rope(pe: Tables, head_dim: int) -> dict[str, Any]:
    """The tables as `qk_norm_rope` takes them: cos, sin [rows, head_dim/2], and the row of each
    token or None.
    """
    cos, sin, *index = pe
    if cos.ndim == 3:
        # tables of each sample: as one, with the rows of every sample
        rows = torch.arange(cos.shape[0] * cos.shape[1], device=cos.device).view(cos.shape[:2])
        cos, sin, index = cos.flatten(0, 1), sin.flatten(0, 1), [rows]
    if cos.shape[-1] == head_dim:
        cos, sin = cos[:, ::2].contiguous(), sin[:, ::2].contiguous()
    return {"cos": cos, "sin": sin, "index": index[0] if index else None}


def full_tables(pe: Tables | None, head_dim: int) -> tuple[Tensor, Tensor] | None:
    """The tables as diffusers' processors take them; None for a call without positions."""
    if pe is None:
        return None
    cos, sin, *index = pe
    if index:
        raise ValueError(
            "TREAD routes need FLUX.1's own attention: the processor or hooks that were set on "
            "a block take no token positions"
        )
    if cos.shape[-1] == head_dim:
        return cos, sin
    return cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)


def head_dim(attn: Any) -> int:
    return attn.inner_dim // attn.heads


def norm_weight(norm: Any) -> Tensor:
    """An RMS norm's weight, in a dtype that products take: nothing multiplies by 8-bit floats
    without a cast.
    """
    weight: Tensor = norm.weight
    return weight if weight.dtype.itemsize > 1 else weight.float()


def qkv(attn: Any) -> tuple[nn.Module, ...]:
    return (attn.to_qkv,) if attn.fused_projections else (attn.to_q, attn.to_k, attn.to_v)


def txt_qkv(attn: Any) -> tuple[nn.Module, ...]:
    return (
        (attn.to_added_qkv,)
        if attn.fused_projections
        else (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    )


def foreign_attention(attn: Any, kwargs: dict[str, Any]) -> str | None:
    """Why attention is not FLUX.1's own, and its module has to compute it; None where it is."""
    if type(attn.processor) is not FluxAttnProcessor:
        return f"its attention processor is {type(attn.processor).__name__}"
    if unknown := sorted(
        {name for name, value in kwargs.items() if value is not None} - QUIET_ATTENTION_KWARGS
    ):
        return f"joint_attention_kwargs {unknown}"
    norms = (
        getattr(attn, name, None) for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    )
    return must_be_called([attn, *(norm for norm in norms if norm is not None)])


def backend_of(attn: Any, chosen: str) -> str | None:
    """The back end of `ops.attention` that a block uses: the `chosen` one, or for "auto" the
    processor's or diffusers' own.

    None for one that `ops.attention` does not know.
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
    """q, k, v [B, S, heads, head_dim] to [B, S, D] by diffusers' own dispatch, on the chosen back
    end or the processor's.
    """
    processor = getattr(attn, "processor", None)
    if (
        chosen == "auto"
        and verdicts.ways_failed(checked_as(mask is not None))
        and backend_of(attn, chosen) == "auto"
    ):
        # PyTorch would choose among all of them
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
    """Attention by the processor that someone set, in the dtype its weights are stored in, back in
    ours.
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
