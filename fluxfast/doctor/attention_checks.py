"""Attention's back ends, forward and backward, at awkward lengths and at those of 512 and 1024 px,
beside the maths in fp32.

The reference is computed a few heads at a time: the scores of 24 heads and 4608 tokens would take 2
GB, several times over.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from fluxfast.doctor.checks import (
    Check,
    Finding,
    Named,
    Random,
    Rate,
    compare,
    of_products,
    reference_dtype,
    widened,
)
from fluxfast.doctor.op_checks import seconds_of
from fluxfast.doctor.scope import Scope
from fluxfast.ops import attention, attention_native

HEADS_AT_A_TIME = 4
SHIFT = 6.0
# backward computes the scores again and four more products
BACKWARD = 2.5
WAY_OUT = "`auto` takes another back end in its place. Another PyTorch, cuDNN or driver may cure it"


def _inputs(scope: Scope, tokens: int, masked: bool) -> tuple[list[Tensor], Tensor | None]:
    """q, k, v, the output's gradient, and a mask of keys, as a text of another length has it."""
    s, randn = scope.sizes, Random(scope.torch_device, scope.torch_dtype, seed=tokens)
    batch = s.batch if tokens < 1000 else 1
    q, k, v = (randn(batch, tokens, s.heads, s.head_dim) for _ in range(3))
    # every score is about SHIFT lower than without: no softmax sees that, but a key of zeros, which
    # is not there, would win
    shift = (SHIFT / s.head_dim**0.5) ** 0.5
    q, k = q + shift, k - shift
    # as a single block has it: columns of a wider tensor, at other strides than the output's
    dout = randn(batch, tokens, s.dim + 64)[..., : s.dim].unflatten(-1, (s.heads, s.head_dim))
    if not masked:
        return [q, k, v, dout], None
    mask = torch.ones(batch, 1, 1, tokens, dtype=torch.bool, device=q.device)
    mask[0, ..., : tokens // 3] = False
    return [q, k, v, dout], mask


def _run(backend: str, tensors: list[Tensor], mask: Tensor | None) -> Named:
    q, k, v, dout = tensors
    out, saved = attention.forward(q, k, v, mask, backend=backend)
    dq, dk, dv = attention.backward(dout, q, k, v, out, saved, mask, backend=backend)
    return {"out": out, "dq": dq, "dk": dk, "dv": dv}


def _reference(tensors: list[Tensor], mask: Tensor | None) -> Named:
    parts = []
    for few in zip(*(t.split(HEADS_AT_A_TIME, dim=2) for t in tensors), strict=True):
        parts.append(_run("ref", [widened(t, reference_dtype(t.dtype)) for t in few], mask))
    return {name: torch.cat([part[name] for part in parts], dim=2) for name in parts[0]}


def check(scope: Scope, backend: str, masked: bool) -> Finding:
    parts = []
    with torch.no_grad():
        for tokens in scope.sizes.attention:
            tensors, mask = _inputs(scope, tokens, masked)
            found = compare(
                _run(backend, tensors, mask),
                _reference(tensors, mask),
                of_products(scope.torch_dtype),
            )
            parts += [part._replace(name=f"{part.name}, {tokens} tokens") for part in found]
    return Finding(tuple(parts))


def rate(scope: Scope, backend: str, masked: bool) -> Rate:
    """Operations a second, forward and backward."""
    tokens, dim = scope.sizes.timed, scope.sizes.dim
    tensors, mask = _inputs(scope, tokens, masked)
    with torch.no_grad():
        seconds = seconds_of(lambda: _run(backend, tensors, mask), scope.torch_device)
    return Rate((1 + BACKWARD) * 4 * tokens**2 * dim * len(tensors[0]) / seconds, "op/s")


def back_ends(scope: Scope, masked: bool) -> list[str]:
    """Those that could take such a call on this device."""
    if scope.torch_device.type == "cpu":
        return ["cpu"] if masked else ["native", "cpu"]
    half = scope.torch_dtype in (torch.float16, torch.bfloat16)
    return [*(["cudnn"] if half else []), *(["flash"] if half and not masked else []), "efficient"]


def attention_checks(scope: Scope) -> Iterator[Check]:
    """Of every back end; in the short form, of the one that `auto` takes and of what it takes in
    its place.
    """
    like = torch.empty(
        1, 1, 1, scope.sizes.head_dim, dtype=scope.torch_dtype, device=scope.torch_device
    )
    for masked in (False, True) if scope.masks else (False,):
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=like.device) if masked else None
        own = attention.resolve("auto", like, mask)
        for backend in back_ends(scope, masked):
            obstacle = attention_native.obstacle(like, masked) if backend == "native" else None
            yield Check(
                name=f"attention{', masked' if masked else ''} ({backend})",
                run=functools.partial(check, scope, backend, masked),
                what=attention.checked_as(masked),
                way=backend,
                time=functools.partial(rate, scope, backend, masked) if scope.sizes.timed else None,
                short=backend == own or scope.torch_device.type == "cpu",
                obstacle=obstacle,
                # one that nobody takes by himself may be missing
                optional=backend != own,
                way_out=WAY_OUT,
            )
