"""Attention, with forward and backward apart, so that a block's own backward can keep the output
and the log-sum-exp.

The back ends are PyTorch's kernels (cuDNN, Flash, memory-efficient, and the CPU's, "cpu"), ours in
fp32 on a CPU ("native"), and the maths in plain torch ("ref"). SageAttention's
(`attention_sage.FUNCTIONS`) have no backward. Shapes are FLUX.1's, [B, S, heads,
head_dim]. There is no dropout and no causal mask, and the scale is 1/sqrt(head_dim).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fluxfast.ops import attention_native, attention_sage, device, verdicts
from fluxfast.ops.tensors import own_dtypes
from fluxfast.text import wrong_choice

BACKENDS = ("auto", "cudnn", "flash", "efficient", "native", "cpu", "ref")
_HALF = (torch.float16, torch.bfloat16)

logger = logging.getLogger("fluxfast")


def resolve(backend: str, q: Tensor, mask: Tensor | None) -> str:
    """The back end for q [B, S, heads, head_dim] where `backend` is asked for.

    Raises ValueError if that can't do the call, or failed its check here (`verdicts`).
    """
    if backend in attention_sage.FUNCTIONS:
        if mask is not None:
            raise ValueError(f"attention: the back end {backend!r} takes no mask; use 'auto'")
        return backend
    if backend not in BACKENDS:
        raise ValueError(wrong_choice("attention", backend, BACKENDS))
    if backend == "native" and (obstacle := attention_native.obstacle(q, mask is not None)):
        raise ValueError(
            f"attention: the back end 'native' can't do this call: {obstacle}; use 'auto' or 'ref'"
        )
    what = checked_as(mask is not None)
    if backend == "auto":
        if q.is_meta and device.pretending():
            # cuDNN, which a real one may prefer, can't be asked without one
            return "flash"
        if q.is_cpu and device.pretending():
            # one of torch's own operations, as a GPU's back ends are
            return "cpu"
        if q.device.type == "cpu":
            obstacle = attention_native.obstacle(q, mask is not None)
            return _on_cpu(q.dtype, obstacle, verdicts.ways_failed(what))
        capability = device.generation(q.device)
        return _automatic(
            q.device.type,
            q.dtype,
            q.shape[-1],
            mask is not None,
            capability,
            verdicts.ways_failed(what),
        )
    if backend != "ref" and (backend in ("cpu", "native")) != (q.device.type == "cpu"):
        raise ValueError(
            f"attention: the back end {backend!r} does not run on {q.device.type}; use 'auto' "
            "or 'ref'"
        )
    if backend in ("cudnn", "flash") and q.dtype not in _HALF:
        raise ValueError(
            f"attention: the back end {backend!r} takes float16 and bfloat16, not {q.dtype}; "
            "use 'efficient'"
        )
    if backend == "flash" and mask is not None:
        raise ValueError(
            "attention: the back end 'flash' takes no mask; use 'cudnn' or 'efficient'"
        )
    if (verdict := verdicts.failed(what, backend)) is not None:
        raise ValueError(
            f"attention: the back end {backend!r} can't be had: {verdict}; use 'auto' or 'ref'"
        )
    return backend


def checked_as(masked: bool) -> str:
    """The name of attention in `verdicts`.

    There are two, since a back end may be right without a mask and wrong with one.
    """
    return "masked attention" if masked else "attention"


@functools.cache
def _on_cpu(dtype: torch.dtype, obstacle: str | None, failed: frozenset[str]) -> str:
    if dtype == torch.float64:
        choices = [("ref", "float64")]
    elif obstacle is not None:
        choices = [("cpu", f"not on 'native': {obstacle}")]
    elif attention_native.is_fastest():
        choices = [("native", "float32 tensors on the CPU"), ("cpu", "PyTorch's own for a CPU")]
    else:
        choices = [("cpu", "the native module has no code for this processor's vectors")]
    return _first(choices, failed)


@functools.cache
def _automatic(
    device_type: str,
    dtype: torch.dtype,
    head_dim: int,
    masked: bool,
    capability: int,
    failed: frozenset[str],
) -> str:
    any_call = ("efficient", "it takes every call")
    if device_type != "cuda":
        choices = [("ref", f"tensors on {device_type}")]
    elif dtype not in _HALF or head_dim % 8:
        choices = [("efficient", f"{dtype}, heads of {head_dim}")]
    else:
        fits = ("efficient", "there is a mask") if masked else ("flash", "16 bit, no mask")
        choices = [fits] if masked else [fits, any_call]
        if capability in (9, 10):
            choices.insert(
                0, ("cudnn", "its kernels for this generation are the fastest of PyTorch's own")
            )
    return _first(choices, failed)


def _first(choices: Sequence[tuple[str, str]], failed: frozenset[str]) -> str:
    """The first of (back end, why) that has not failed its check here, else the reference.

    One line of the log says which; the callers are cached, so it is said once.
    """
    passed = [name for name, _ in choices if name in failed]
    chosen, why = next(
        (choice for choice in choices if choice[0] not in failed), ("ref", "nothing else is left")
    )
    for name in passed:
        logger.warning("attention passes over '%s': it failed its check on this machine", name)
    logger.info("attention runs on '%s': %s", chosen, why)
    return chosen


def attention_ref(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The maths in plain, differentiable torch.

    q, k, v [B, S, heads, head_dim]; returns the same shape. mask as `forward` takes it.
    """
    return _ref(q, k, v, mask)[0]


def _ref(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        )
    lse = scores.logsumexp(-1)
    return torch.einsum("bhqk,bkhd->bqhd", (scores - lse[..., None]).exp(), v), lse


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, backend: str
    ) -> Tensor:
        out, saved = forward(q, k, v, mask, backend=backend)
        ctx.backend = backend
        ctx.save_for_backward(q, k, v, mask, out, *saved)
        return out

    @staticmethod
    @once_differentiable
    @own_dtypes
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, out, *saved = ctx.saved_tensors
        return (*backward(dout, q, k, v, out, saved, mask, backend=ctx.backend), None, None)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """softmax(q kᵀ / sqrt(head_dim) + mask) v, differentiable in q, k and v.

    q, k, v [B, S, heads, head_dim] to the same; mask as `forward` takes it; backend: one of
    BACKENDS. Raises ValueError on shapes that differ, or if the back end can't do this call.
    """
    if q.ndim != 4 or q.shape != k.shape or q.shape != v.shape:
        shapes = [list(x.shape) for x in (q, k, v)]
        raise ValueError(
            f"attention: expected q, k and v of one shape [B, S, heads, head_dim], got {shapes}"
        )
    return _Attention.apply(q, k, v, mask, resolve(backend, q, mask))


# elements: PyTorch's memory-efficient kernel loads a bias in vectors, and refuses one whose rows
# don't begin at such a multiple; cuDNN's is faster for it
BIAS_ALIGNMENT = 16


def _bias(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The mask as it is added to the scores [B, heads, S, S]: a boolean one as 0 and -inf.

    All strides but the last are multiples of BIAS_ALIGNMENT: rows of an awkward length have unused
    columns behind them.
    """
    if mask is None:
        return None
    columns = mask.shape[-1]
    padded = -(-columns // BIAS_ALIGNMENT) * BIAS_ALIGNMENT
    # the columns behind are never read
    bias = torch.zeros((*mask.shape[:-1], padded), dtype=q.dtype, device=mask.device)[..., :columns]
    if mask.dtype == torch.bool:
        bias.masked_fill_(~mask, -torch.inf)
    else:
        bias.copy_(mask)
    return bias.expand(q.shape[0], q.shape[2], q.shape[1], q.shape[1])


# PyTorch's kernels on a GPU, and the bytes that they read at once
_ON_GPU = ("cudnn", "flash", "efficient")
_VECTOR = 16


def _aligned(x: Tensor) -> Tensor:
    """x [B, S, heads, head_dim] for a kernel on a GPU: a copy unless its heads begin at vectors.

    In a contiguous tensor they may begin anywhere, as its head_dim says.
    """
    *strides, last = x.stride()
    starts = [x.storage_offset()]
    if not x.is_contiguous():
        starts += [stride for n, stride in zip(x.shape, strides, strict=False) if n > 1]
    if last == 1 and all(start * x.element_size() % _VECTOR == 0 for start in starts):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, backend: str
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """out [B, S, heads, head_dim], and what `backward` takes as `saved`: the log-sum-exp first.

    q, k and v may lie any distance apart, as packed projections have them. mask: None, or
    broadcastable to [B, heads, S, S]: bool (True attends) or added to the scores. backend from
    `resolve`.
    """
    if backend == "ref":
        out, lse = _ref(q, k, v, mask)
        return out, (lse,)
    if backend in attention_sage.FUNCTIONS:
        return attention_sage.forward(backend, q, k, v), (None,)
    if backend == "native":
        out, lse = attention_native.forward(q, k, v)
        return out, (lse,)
    if backend in _ON_GPU:
        q, k, v = (_aligned(x) for x in (q, k, v))
    aten, heads_first = torch.ops.aten, [x.transpose(1, 2) for x in (q, k, v)]
    if backend == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            *heads_first, attn_mask=_bias(mask, q)
        )
        saved: tuple[Tensor | None, ...] = (lse,)
    elif backend == "flash":
        out, lse, *_, seed, offset, _ = aten._scaled_dot_product_flash_attention(*heads_first)
        saved = (lse, seed, offset)
    elif backend == "cudnn":
        out, lse, *_, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
            *heads_first, _bias(mask, q), True
        )
        saved = (lse, seed, offset)
    else:
        out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
            *heads_first, _bias(mask, q), True
        )
        saved = (lse, seed, offset)
    return out.transpose(1, 2), saved


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    saved: Sequence[Tensor | None],
    mask: Tensor | None = None,
    *,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv [B, S, heads, head_dim]; `saved` and the rest as `forward` had and gave them.

    On a GPU a dout that is not contiguous is copied.
    """
    if backend == "ref":
        return _ref_backward(dout, q, k, v, out, saved[0], mask)
    if backend in attention_sage.FUNCTIONS:
        raise ValueError(f"attention: the back end {backend!r} has no backward; use 'auto'")
    if backend == "native":
        assert saved[0] is not None
        dq, dk, dv = attention_native.backward(dout, q, k, v, out, saved[0])
        return dq, dk, dv
    if backend in _ON_GPU:
        # "flash" and "efficient" would copy dout themselves, and "cudnn" would read wrong numbers:
        # PyTorch finds its compiled graphs by the strides of q, k and v, and a graph has those of
        # the first dout compiled in
        q, k, v, dout = (_aligned(x) for x in (q, k, v, dout.contiguous()))
    aten, tensors = torch.ops.aten, [x.transpose(1, 2) for x in (dout, q, k, v)]
    out, tokens = out.transpose(1, 2), q.shape[1]
    if backend == "cpu":
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *tensors, out, saved[0], 0.0, False, attn_mask=_bias(mask, q)
        )
    elif backend == "flash":
        lse, seed, offset = saved
        grads = aten._scaled_dot_product_flash_attention_backward(
            *tensors, out, lse, None, None, tokens, tokens, 0.0, False, seed, offset
        )
    elif backend == "cudnn":
        lse, seed, offset = saved
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            *tensors, out, lse, seed, offset, _bias(mask, q), None, None, tokens, tokens, 0.0, False
        )
    else:
        lse, seed, offset = saved
        grads = aten._scaled_dot_product_efficient_attention_backward(
            *tensors, _bias(mask, q), out, lse, seed, offset, 0.0, [True, True, True, False]
        )
    dq, dk, dv = (grad.transpose(1, 2) for grad in grads[:3])
    return dq, dk, dv


def _ref_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    assert lse is not None
    scale = q.shape[-1] ** -0.5
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        )
    p = (scores - lse[..., None]).exp()
    dp = torch.einsum("bqhd,bkhd->bhqk", dout, v)
    ds = p * (dp - (dout * out).sum(-1).transpose(1, 2)[..., None]) * scale
    dq, dk = torch.einsum("bhqk,bkhd->bqhd", ds, k), torch.einsum("bhqk,bqhd->bkhd", ds, q)
    return dq, dk, torch.einsum("bhqk,bqhd->bkhd", p, dout)
