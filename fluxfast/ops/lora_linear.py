"""Linear layers with low-rank adapters over a frozen base: y = x Wᵀ + b + Σ s·(x Aᵀ) Bᵀ.

Linears that read the same x (q, k, v; in a single block also the MLP's first) are one call and one packed output, so that x
is read once, the adapters' down-projections are one product, and the next op reads one tensor. The base is frozen: backward
gives dx, dA and dB and never a gradient of W. W is kept in its storage type and cast when it is used, in both directions:
keeping the cast copy for backward would hold a second model in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Adapter(NamedTuple):
    """One LoRA: A [r, in], B [out, r], and the scale on their product (alpha / r)."""

    a: Tensor
    b: Tensor
    scale: float


class FrozenWeight(Protocol):
    """What a base weight must be able to do; a tensor can, and so can a quantised one, which is decoded when it is used."""

    @property
    def shape(self) -> Sequence[int]: ...

    def to(self, dtype: torch.dtype, /) -> Tensor: ...


class LinearParams(NamedTuple):
    """One linear of a group: weight [out, in], bias [out] or None, and its adapters."""

    weight: FrozenWeight
    bias: Tensor | None
    adapters: tuple[Adapter, ...] = ()


def lora_linear_ref(x: Tensor, linears: Sequence[LinearParams]) -> Tensor:
    """The maths in plain, differentiable torch; also the path on which the base itself may get a gradient."""
    outs = []
    for weight, bias, adapters in linears:
        y = torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        for a, b, scale in adapters:
            y = y + (x @ a.to(x.dtype).T) @ b.to(x.dtype).T * scale
        outs.append(y)
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)


def forward(x: Tensor, linears: Sequence[LinearParams]) -> tuple[Tensor, Tensor | None]:
    """x [M, in] to the packed output [M, Σ out], and the adapters' down-projections x Aᵀ [M, Σ r] (None without any)."""
    dtype = x.dtype
    y = x.new_empty(x.shape[0], sum(p.weight.shape[0] for p in linears))
    all_a = [adapter.a for p in linears for adapter in p.adapters]
    s = x @ torch.cat([a.to(dtype) for a in all_a]).T if all_a else None
    col = rank = 0
    for weight, bias, adapters in linears:
        y_i = y[:, col : col + weight.shape[0]]
        col += weight.shape[0]
        if bias is None:
            torch.mm(x, weight.to(dtype).T, out=y_i)
        else:
            torch.addmm(bias.to(dtype), x, weight.to(dtype).T, out=y_i)
        for a, b, scale in adapters:
            assert s is not None
            y_i.addmm_(s[:, rank : rank + a.shape[0]], b.to(dtype).T, alpha=scale)
            rank += a.shape[0]
    return y, s


def backward(
    dy: Tensor, x: Tensor, s: Tensor | None, linears: Sequence[LinearParams], need_dx: bool
) -> tuple[Tensor | None, list[tuple[Tensor, Tensor]]]:
    """dx [M, in] (or None) and (dA, dB) of every adapter, in order."""
    dtype = dy.dtype
    dx = dy.new_empty(x.shape) if need_dx else None
    all_a, d_s, d_b = [], None if s is None else torch.empty_like(s), []
    col = rank = 0
    for i, (weight, _, adapters) in enumerate(linears):
        dy_i = dy[:, col : col + weight.shape[0]]
        col += weight.shape[0]
        if dx is not None:
            if i == 0:
                torch.mm(dy_i, weight.to(dtype), out=dx)
            else:
                dx.addmm_(dy_i, weight.to(dtype))
        for a, b, scale in adapters:
            assert s is not None and d_s is not None
            r = a.shape[0]
            d_b.append((dy_i.T @ s[:, rank : rank + r]).mul_(scale).to(b.dtype))
            torch.mm(dy_i, b.to(dtype), out=d_s[:, rank : rank + r]).mul_(scale)
            all_a.append(a)
            rank += r
    if d_s is None:
        return dx, []
    if dx is not None:
        dx.addmm_(d_s, torch.cat([a.to(dtype) for a in all_a]))
    d_a = (d_s.T @ x).split([a.shape[0] for a in all_a])
    return dx, [(g.to(a.dtype), gb) for g, a, gb in zip(d_a, all_a, d_b, strict=True)]


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, bases: Sequence[LinearParams], *factors: Tensor) -> Tensor:
        # the bases come with their adapters' scales; the adapters' tensors, which take gradients, one by one: a, b, a, b, …
        y, s = forward(x.reshape(-1, x.shape[-1]), _with_factors(bases, factors))
        ctx.bases, ctx.has_s = bases, s is not None
        # frozen weights stay where they are: nobody has to keep, copy or move them for backward
        ctx.save_for_backward(x, *([s] if s is not None else []), *factors)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx, *grads: Tensor):
        dy = grads[0]
        x, *rest = ctx.saved_tensors
        s = rest.pop(0) if ctx.has_s else None
        linears = _with_factors(ctx.bases, rest)
        x2 = x.reshape(-1, x.shape[-1])
        dx, adapter_grads = backward(dy.reshape(-1, dy.shape[-1]), x2, s, linears, ctx.needs_input_grad[0])
        return (None if dx is None else dx.view(x.shape), None, *(grad for pair in adapter_grads for grad in pair))


def _with_factors(bases: Sequence[LinearParams], factors: Sequence[Tensor]) -> list[LinearParams]:
    it = iter(factors)
    return [base._replace(adapters=tuple(Adapter(next(it), next(it), old.scale) for old in base.adapters)) for base in bases]


def lora_linear(x: Tensor, linears: Sequence[LinearParams]) -> Tensor:
    """Apply one or several linears with their adapters to the same x.

    x [..., in]; returns [..., Σ out], the linears' outputs side by side, in x's dtype. Weights and adapters may be stored in
    other floating types. Gradients: x and every A and B; a base weight or bias that requires a gradient is refused, since
    the point of this op is never to compute one (use `lora_linear_ref`). Source: LoRA, arXiv 2106.09685, section 4.1.
    """
    if torch.is_grad_enabled() and any(getattr(t, "requires_grad", False) for p in linears for t in (p.weight, p.bias)):
        raise ValueError(
            "lora_linear: a base weight or bias requires a gradient, and this op never computes one; freeze it "
            "(requires_grad_(False)) or use lora_linear_ref"
        )
    factors = [t for p in linears for adapter in p.adapters for t in (adapter.a, adapter.b)]
    # only the tensors passed one by one belong to the graph
    detached = [p._replace(adapters=tuple(a._replace(a=a.a.detach(), b=a.b.detach()) for a in p.adapters)) for p in linears]
    return _LoraLinear.apply(x, detached, *factors)
