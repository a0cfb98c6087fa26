"""Attention's back ends beside the maths in fp32, forward and backward.

Lengths are awkward ones and those of 512 and 1024 px. The reference is computed a few heads at a
time: the scores of 24 heads and 4608 tokens would take 2 GB, several times over.
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
from fluxfast.doctor.scope import Scope
from fluxfast.doctor.timing import seconds_of
from fluxfast.ops import attention, attention_native

HEADS_AT_A_TIME = 4
SHIFT = 6.0
# of a forward's operations: backward computes the scores again, and four more products
BACKWARD = 2.5
WAY_OUT = "`auto` takes another back end in its place. Another PyTorch, cuDNN or driver may cure it"


def _inputs(scope: Scope, tokens: int, masked: bool) -> tuple[list[Tensor], Tensor | None]:
    """q, k, v, the output's gradient, and a mask of keys as captions of other lengths have it."""
    s, randn = scope.sizes, Random(scope.torch_device, scope.torch_dtype, seed=tokens)
    batch = s.batch if tokens < 1000 else 1
    q, k, v = (randn(batch, tokens, s.heads, s.head_dim) for _ in range(3))
    # this lowers every score by about SHIFT, which softmax cancels. But if a kernel reads beyond
    # the last key, the zeros there score higher than the keys, and take over the result
    shift = (SHIFT / s.head_dim**0.5) ** 0.5
    q, k = q + shift, k - shift
    # a single block's gradient is some columns of a wider tensor, so its strides differ from out's
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
    """Compare a back end with the maths at each length of the scope."""
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
    """Operations a second of a forward and a backward together."""
    tokens, dim = scope.sizes.timed, scope.sizes.dim
    tensors, mask = _inputs(scope, tokens, masked)
    with torch.no_grad():
        seconds = seconds_of(lambda: _run(backend, tensors, mask), scope.torch_device)
    return Rate((1 + BACKWARD) * 4 * tokens**2 * dim * len(tensors[0]) / seconds, "op/s")


def back_ends(scope: Scope, masked: bool) -> list[str]:
    """The back ends that could take such a call on this device."""
    if scope.torch_device.type == "cpu":
        return ["cpu"] if masked else ["native", "cpu"]
    half = scope.torch_dtype in (torch.float16, torch.bfloat16)
    return [*(["cudnn"] if half else []), *(["flash"] if half and not masked else []), "efficient"]


def attention_checks(scope: Scope) -> Iterator[Check]:
    """A check of each back end, masked and not.

    The short form has the one that `auto` takes, and on a CPU also what `auto` would take instead.
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
                # a back end that `auto` does not take may be missing
                optional=backend != own,
                way_out=WAY_OUT,
            )
