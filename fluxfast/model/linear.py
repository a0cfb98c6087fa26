"""How the blocks apply the Linear modules they hold: plain, quantised, wrapped by PEFT, or anything else.

A plain `nn.Linear`, a `QuantLinear`, and PEFT's plain LoRA over one are read in place and computed by
`fluxfast.ops.lora_linear`; adapters whose dropout is active see their own dropped copy of x, so they are added to that result.
Whatever else there is (DoRA, LoKr, another forward, a hook) is computed by the module itself: slower, never skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from fluxfast.ops.lora_linear import Adapter, LinearParams, lora_linear, lora_linear_ref
from fluxfast.quant import QuantWeight
from fluxfast.quant.linear import QuantLinear


class LinearRead(NamedTuple):
    """What a module computes: a linear with adapters, plus terms (functions of x) that are added to it."""

    params: LinearParams
    terms: tuple[Callable[[Tensor], Tensor], ...] = ()


def _untouched(module: nn.Module) -> bool:
    """Whether calling the module would run its class's own forward and nothing else: no hook, no replaced forward."""
    return not ("forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks)


class StoredWeight(NamedTuple):
    """A quantised weight as `lora_linear` takes it: decoded to the dtype that is asked for, each time."""

    packed: QuantWeight

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape

    def to(self, dtype: torch.dtype, /) -> Tensor:
        return self.packed.dequantize(dtype)


def _base(module: nn.Module) -> LinearParams | None:
    """A linear without adapters, or None where its forward is not known."""
    if isinstance(module, QuantLinear) and type(module).forward is QuantLinear.forward and _untouched(module):
        return LinearParams(StoredWeight(module.packed()), module.bias)
    if _plain(module):
        assert isinstance(module, nn.Linear)
        return LinearParams(module.weight, module.bias)
    return None


def _plain(module: nn.Module) -> bool:
    return type(module).forward is nn.Linear.forward and _untouched(module)


def read_linear(module: nn.Module) -> LinearRead | None:
    """The tensors of a module, if they say all that its forward does; else None."""
    if (base := _base(module)) is not None:
        return LinearRead(base)
    return _read_peft(module) if type(module) is PeftLinear else None


def _read_peft(module: PeftLinear) -> LinearRead | None:
    base = _base(module.base_layer)
    if not _untouched(module) or base is None:
        return None
    if module.merged and module.disable_adapters:
        # only PEFT can take a merged adapter out of the base again
        return None
    if module.merged or module.disable_adapters:
        return LinearRead(base)
    adapters: list[Adapter] = []
    terms: list[Callable[[Tensor], Tensor]] = []
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        dropout, a, b = module.lora_dropout[name], module.lora_A[name], module.lora_B[name]
        if name in module.lora_variant or not (_plain(a) and _plain(b)):
            return None
        adapter = Adapter(a.weight, b.weight, module.scaling[name])
        if b.bias is not None or (isinstance(dropout, nn.Dropout) and dropout.p > 0 and module.training):
            terms.append(_dropped_term(dropout, adapter, b.bias))
        else:
            adapters.append(adapter)
    return LinearRead(base._replace(adapters=tuple(adapters)), tuple(terms))


def _dropped_term(dropout: nn.Module, adapter: Adapter, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    def term(x: Tensor) -> Tensor:
        y = (dropout(x) @ adapter.a.to(x.dtype).T) @ adapter.b.to(x.dtype).T
        return (y if bias is None else y + bias.to(x.dtype)) * adapter.scale

    return term


def _call(module: nn.Module, x: Tensor) -> Tensor:
    """The module's own forward, in the dtype that it computes in, back in x's."""
    weight = getattr(getattr(module, "base_layer", module), "weight", None)
    if isinstance(weight, Tensor) and weight.dtype.is_floating_point and weight.dtype.itemsize > 1:
        return module(x.to(weight.dtype)).to(x.dtype)
    return module(x).to(x.dtype)


def _apply(x: Tensor, reads: list[LinearRead]) -> Tensor:
    params = [read.params for read in reads]
    trains_base = torch.is_grad_enabled() and any(
        getattr(t, "requires_grad", False) for p in params for t in (p.weight, p.bias)
    )
    y = lora_linear_ref(x, params) if trains_base else lora_linear(x, params)
    if not any(read.terms for read in reads):
        return y
    added = []
    for read in reads:
        delta = x.new_zeros(*x.shape[:-1], read.params.weight.shape[0])
        for term in read.terms:
            delta = delta + term(x)
        added.append(delta)
    return y + torch.cat(added, dim=-1)


def project(x: Tensor, *modules: nn.Module) -> Tensor:
    """Apply several Linear modules to the same x [..., in]; returns their outputs side by side [..., Σ out], in x's dtype."""
    reads = [read_linear(module) for module in modules]
    known = [read for read in reads if read is not None]
    if len(known) == len(reads):
        return _apply(x, known)
    outs = [_call(m, x) if read is None else _apply(x, [read]) for m, read in zip(modules, reads, strict=True)]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)
