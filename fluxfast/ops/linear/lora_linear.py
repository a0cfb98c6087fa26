"""Linear layers with adapters over a frozen base, LoRA first: y = x Wᵀ + b + Σ s·(x Aᵀ) Bᵀ.

Linears that read the same x (q, k, v; in a single block also the MLP's first) are one call and one
packed output, so that x is read once, the LoRAs' down-projections are one product, and the next op
reads one tensor. The base is frozen: backward gives the gradients of x and of the adapters, never
one of W. W is kept in its storage type and decoded when it is used, in both directions, because a
decoded copy kept for backward would be a second model in memory. The arithmetic is
`group.LinearGroup`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from fluxfast.ops import dispatch
from fluxfast.ops.device import multiplies
from fluxfast.ops.linear.adapters import Lora, over_tensors, tensors_of
from fluxfast.ops.linear.decomposed import decomposing
from fluxfast.ops.linear.group import COMPUTE, LinearGroup
from fluxfast.ops.linear.params import LinearParams
from fluxfast.ops.tensors import own_dtypes
from fluxfast.text import wrong_choice


def lora_linear_ref(x: Tensor, linears: Sequence[LinearParams]) -> Tensor:
    """The maths in plain, differentiable torch, without dropout.

    It is also the only path on which the base may get a gradient.
    """
    rows, outs = x.reshape(-1, x.shape[-1]), []
    for weight, bias, adapters in linears:
        bias, weight = None if bias is None else bias.to(x.dtype), weight.to(x.dtype)
        if (whole := decomposing(adapters)) is not None:
            weight, adapters = whole.decomposed_ref(weight), ()
        y = torch.nn.functional.linear(rows, weight, bias)
        for adapter in adapters:
            adapter.add_to(y, rows)
        outs.append(y)
    y = outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)
    return y.view(*x.shape[:-1], y.shape[-1])


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bases: Sequence[LinearParams],
        compute: str,
        outliers: int,
        impl: str,
        seed: Tensor | None,
        *trained: Tensor,
    ) -> Tensor:
        # the adapters' tensors, which take gradients, come one by one beside the adapters
        ctx.bases = bases
        ctx.options = {
            "compute": compute,
            "outliers": outliers,
            "impl": impl,
            "dropout_seed": seed,
        }
        group = LinearGroup(_over_tensors(bases, trained), x.dtype, **ctx.options)
        y, kept = group.forward(group.as_input(x))
        leaves, ctx.form = tree_flatten(kept)
        ctx.leaves = len(leaves)
        # the frozen weights are not saved: backward decodes them where they lie
        ctx.save_for_backward(x, *leaves, *trained)
        return y

    @staticmethod
    @once_differentiable
    @own_dtypes
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, *rest = ctx.saved_tensors
        kept, rest = tree_unflatten(rest[: ctx.leaves], ctx.form), rest[ctx.leaves :]
        need_dx = ctx.needs_input_grad[0]
        group = LinearGroup(_over_tensors(ctx.bases, rest), x.dtype, dgrad=need_dx, **ctx.options)
        dx, grads = group.backward(dy, group.as_input(x), kept, need_dx=need_dx)
        return dx, *(None,) * 5, *(grad for of_adapter in grads for grad in of_adapter)


def _over_tensors(bases: Sequence[LinearParams], trained: Sequence[Tensor]) -> list[LinearParams]:
    it = iter(trained)
    return [base._replace(adapters=over_tensors(base.adapters, it)) for base in bases]


def lora_linear(
    x: Tensor,
    linears: Sequence[LinearParams],
    impl: str = "auto",
    *,
    compute: str = "same",
    outliers: int = 0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """Apply one or several linears with their adapters to the same x.

    x [..., in]; returns [..., Σ out], the linears' outputs side by side, in x's dtype. Weights and
    adapters may be stored in other floating types. compute "int8" or "e4m3" runs the wide products
    on codes of x, of W and, in backward, of dy, with a scale a row. The `outliers` largest channels
    of x stay out of its codes and are multiplied in its dtype. dropout_seed: what the masks of
    adapters that have a dropout are drawn from, one int64 on x's device; None for no dropout.
    Gradients go to x and to the adapters' tensors. A base weight or bias that requires one is
    refused, since this op never computes it (use `lora_linear_ref`). Raises ValueError on shapes
    that don't fit, or if `impl` can't do this call. Source: LoRA, arXiv 2106.09685, section 4.1.
    """
    _check(x, linears, compute)
    if torch.is_grad_enabled() and any(
        getattr(t, "requires_grad", False) for p in linears for t in (p.weight, p.bias)
    ):
        raise ValueError(
            "lora_linear: a base weight or bias requires a gradient, and this op never computes "
            "one; freeze it (requires_grad_(False)) or use lora_linear_ref"
        )
    trained = [t for p in linears if p.adapters for t in tensors_of(p.adapters)]
    stored = [t for p in linears for t in (p.weight, p.bias) if isinstance(t, Tensor)]
    backend = dispatch.resolve(
        "lora_linear", impl, (x,), cast=(*stored, *trained), obstacle=_codes_obstacle(x, compute)
    )
    # only the tensors passed one by one belong to the graph
    detached = _over_tensors(linears, [t.detach() for t in trained]) if trained else linears
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (x, *trained)):
        # torch.compile would call the Function's forward, and with two tensors in `trained` without
        # its context
        group = LinearGroup(
            detached,
            x.dtype,
            compute=compute,
            outliers=outliers,
            impl=backend,
            dropout_seed=dropout_seed,
        )
        return group.forward(group.as_input(x))[0]
    return _LoraLinear.apply(x, detached, compute, outliers, backend, dropout_seed, *trained)


def _codes_obstacle(x: Tensor, compute: str) -> str | None:
    """Why only the reference has products of `compute` where x is, or None."""
    if compute != "e4m3" or not dispatch.HAS_TRITON or multiplies(compute, x.device):
        return None
    return "this GPU has no products of e4m3"


def _check(x: Tensor, linears: Sequence[LinearParams], compute: str) -> None:
    if compute not in COMPUTE:
        raise ValueError(wrong_choice("lora_linear: compute", compute, COMPUTE))
    if not linears or x.ndim == 0:
        raise ValueError(
            f"lora_linear: expected x [..., in] and at least one linear, got x {list(x.shape)} "
            f"and {len(linears)}"
        )
    for i, p in enumerate(linears):
        n, k = p.weight.shape
        if k != x.shape[-1] or (p.bias is not None and p.bias.shape != (n,)):
            bias = None if p.bias is None else list(p.bias.shape)
            raise ValueError(
                f"lora_linear: expected weight [out, {x.shape[-1]}] and bias [out], "
                f"got linear {i}: weight {[n, k]}, bias {bias}"
            )
        for lora in p.adapters:
            if not isinstance(lora, Lora):
                continue
            a, b = lora.a.shape, lora.b.shape
            if len(a) != 2 or a[1] != k or b != (n, a[0]):
                raise ValueError(
                    f"lora_linear: expected A [r, {k}] and B [{n}, r], "
                    f"got linear {i}: A {list(a)}, B {list(b)}"
                )
