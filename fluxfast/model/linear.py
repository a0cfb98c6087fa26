"""How the blocks apply the Linear modules they hold: plain, quantised, adapted, or anything else.

A plain `nn.Linear`, a `QuantLinear`, another program's quantised linear (`fluxfast.foreign`) and
the adapters on it that a kind in `fluxfast.adapters` can read, or a reader in `fluxfast.foreign`,
are computed by `fluxfast.ops.linear.lora_linear`, from the tensors where they lie. Adapters with
dropout that read the same x share one mask, where PEFT draws one each. Everything else (an unknown
adapter, another forward, a hook, a base that trains) is computed by calling the module: slower, but
never skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fluxfast.adapters.kind import Wrapped
from fluxfast.adapters.kinds import KINDS
from fluxfast.foreign.adapters import (
    foreign_adapters,
    foreign_wrapper,
    innermost_forward,
    owner_of_forward,
)
from fluxfast.foreign.comfyui import comfy_linear, is_comfy
from fluxfast.foreign.linears import host_linear, is_scaled_fp8, scaled_fp8, summed
from fluxfast.foreign.weights import as_it_is, foreign_weight
from fluxfast.hooks import REPLACED, hooked, own_parameter
from fluxfast.ops.device import pretending
from fluxfast.ops.linear.adapters import Adapter, is_random
from fluxfast.ops.linear.column_dora import on_columns
from fluxfast.ops.linear.lora_linear import lora_linear, lora_linear_ref
from fluxfast.ops.linear.params import LinearParams
from fluxfast.ops.linear.products_torch import linear
from fluxfast.quant.linear import QuantLinear

# where gradients are wanted; without them a base that nobody has frozen is read like any other
TRAINED = "its base is trained"


def read_linear(module: nn.Module, *, share_dropout: bool = True) -> LinearParams | None:
    """The tensors of a module with a frozen base, if they say all that its forward does; else None.

    share_dropout: False leaves an adapter with an active dropout to its module, whose masks are
    drawn as PEFT draws them.
    """
    params = read_or_because(module, share_dropout=share_dropout)
    return None if isinstance(params, str) else params


def obstacle(module: nn.Module, *, share_dropout: bool = True) -> str | None:
    """Why `read_linear` gives None for a module; None where it doesn't."""
    params = read_or_because(module, share_dropout=share_dropout)
    return params if isinstance(params, str) else None


def read_or_because(module: nn.Module, *, share_dropout: bool = True) -> LinearParams | str:
    """What `read_linear` gives, or in place of None what `obstacle` says."""
    if (because := hooked(module)) is not None:
        return _read_replaced(module, because)
    alone = _is_torchs(module) or is_comfy(module)
    wrapped = None if alone else _taken_apart(module, share_dropout)
    if wrapped is None:
        return _frozen(module)
    base = read_or_because(wrapped.base, share_dropout=share_dropout)
    if isinstance(base, str):
        return base
    if isinstance(wrapped.adapters, str):
        return wrapped.adapters
    return _with_adapters(base, wrapped.adapters)


def _is_torchs(module: nn.Module) -> bool:
    """Whether a module's class computes what torch's linear does, and so is around no other."""
    return type(module).forward is nn.Linear.forward


def _taken_apart(module: nn.Module, share_dropout: bool) -> Wrapped | None:
    """A module that is around a linear, as the reader for it says; None where there is none."""
    wrapped = foreign_wrapper(module)
    for kind in KINDS.values():
        if wrapped is not None:
            break
        wrapped = kind.read(module, share_dropout=share_dropout)
    return wrapped


def _frozen(module: nn.Module) -> LinearParams | str:
    """A linear whose weight and bias do not train, or why it can't be read.

    It has the adapters that its own class adds, and none that are put around it.
    """
    params = _read_base(module)
    if isinstance(params, str):
        return params
    return TRAINED if _trains(params.weight) or _trains(params.bias) else params


def _trains(tensor: Any) -> bool:
    """Whether a call may have to give a tensor a gradient; whoever only draws freezes nothing."""
    return torch.is_grad_enabled() and getattr(tensor, "requires_grad", False)


def _read_replaced(module: nn.Module, because: str) -> LinearParams | str:
    """A linear with a hook or another forward, which may be that of a trainer's own adapters.

    because: what `hooked` says of it.
    """
    replaced = "forward" in module.__dict__
    adapters = foreign_adapters(module, _read_base) if replaced else None
    if adapters is None:
        owner = owner_of_forward(module)
        by = f" by {type(owner).__name__}'s" if owner is not module else ""
        return because + by if because == REPLACED else because
    if isinstance(adapters, str):
        return adapters
    params = _frozen(module)
    if isinstance(params, str):
        return params
    if params.adapters and any(map(_is_decomposed, adapters)):
        # a trainer's DoRA rescales all of its base
        params = summed(params)
    return _with_adapters(params, adapters)


def _with_adapters(base: LinearParams, adapters: tuple[Adapter, ...]) -> LinearParams | str:
    """A linear with adapters around those that it has, such as its base's part of low rank."""
    if not adapters:
        return base
    if base.adapters:
        adapters = (*base.adapters, *adapters)
        if any(map(_is_decomposed, adapters)):
            return "one of several adapters is DoRA, which rescales what the others add"
    return on_columns(LinearParams(base.weight, base.bias, adapters))


def _is_decomposed(adapter: Any) -> bool:
    return getattr(adapter, "magnitude", None) is not None


def base_of(module: nn.Module) -> nn.Module:
    """The linear itself, inside the modules that PEFT puts around it."""
    while (base := module._modules.get("base_layer")) is not None:
        module = base
    return module


def read_base(module: nn.Module) -> LinearParams:
    """The frozen weight and bias of a linear that `read_linear` can read, without its adapters."""
    base = base_of(module)
    params = _read_base(base)
    assert not isinstance(params, str), "a block's linears changed between forward and backward"
    # what ComfyUI's own class adds at each call is an adapter
    return LinearParams(params.weight, params.bias) if is_comfy(base) else params


def _read_base(module: nn.Module) -> LinearParams | str:
    """A linear without what is put around it, or why its forward can't be read."""
    if _is_torchs(module) and type(module._parameters.get("weight")) is nn.Parameter:
        return _read_plain(module)
    if is_comfy(module):
        return comfy_linear(module)
    if isinstance(module, QuantLinear) and type(module).forward is QuantLinear.forward:
        return LinearParams(module.packed(), own_parameter(module, "bias"))
    weight = foreign_weight(module)
    if isinstance(weight, str):
        return weight
    if weight is not None:
        if torch.compiler.is_compiling():
            return "torch.compile traces its library's own product"
        if _trains(module.weight):
            return TRAINED
        bias: Any = module.bias
        return LinearParams(weight, bias)
    if _is_torchs(module):
        return _read_plain(module)
    found = host_linear(module)
    return f"{type(module).__name__} is not known" if found is None else found


def _read_plain(linear: nn.Module) -> LinearParams | str:
    weight, bias = own_parameter(linear, "weight"), own_parameter(linear, "bias")
    # most linears have no such buffer, and need not be looked at further
    buffers = linear._buffers
    if buffers and "scale_weight" in buffers and is_scaled_fp8(linear, innermost_forward(linear)):
        if _trains(weight):
            return TRAINED
        return LinearParams(scaled_fp8(linear), bias)
    return LinearParams(weight, bias) if _trains(weight) else as_it_is(weight, bias)


def _call(module: nn.Module, x: Tensor, autocast: torch.dtype | None, given: torch.dtype) -> Tensor:
    """The output of the module's own forward, in x's dtype.

    Under `autocast` where the model's caller had it. Otherwise x comes in the dtype of the module's
    weight, or, where something may change or cast the weight for the length of a call, in `given`,
    the dtype in which the owner of the block would call the module.
    """
    if autocast is not None:
        with torch.autocast(x.device.type, autocast):
            return module(x).to(x.dtype)
    return module(x.to(_called_in(module) or given)).to(x.dtype)


def _called_in(module: Any) -> torch.dtype | None:
    """The dtype of a linear's weight, if the linear has one and computes in it."""
    base = getattr(module, "base_layer", module)
    if hooked(module) is not None or hooked(base) is not None or is_comfy(base):
        return None
    if isinstance(base, QuantLinear):
        return base.compute_dtype
    dtype = getattr(getattr(base, "weight", None), "dtype", None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize == 1:
        return None
    return dtype


def draw_seed(device: torch.device) -> Tensor:
    """A seed for dropout masks, from torch's default generator of that device.

    It stays on the device, so that nobody waits for it, and a step that is replayed as a CUDA graph
    draws anew. Whoever computes a step again has set the generator as it was.
    """
    return torch.randint(2**62, (), device=device)


def _apply(x: Tensor, params: list[LinearParams], compute: str, outliers: int) -> Tensor:
    plain = compute == "same" and all(
        isinstance(p.weight, Tensor) and len(p.adapters) == 0 for p in params
    )
    if plain and torch.compiler.is_compiling():
        # torch's own operations, which a compiler can join with those around them
        return lora_linear_ref(x, params)
    if plain and len(params) == 1 and x.is_cpu and not pretending():
        weight, bias, _ = params[0]
        # autograd would keep a weight that is cast
        if isinstance(weight, Tensor) and weight.dtype == x.dtype:
            return linear(x, weight, bias)
    drops = any(is_random(adapter) for p in params for adapter in p.adapters)
    return lora_linear(
        x, params, compute=compute, outliers=outliers,
        dropout_seed=draw_seed(x.device) if drops else None,
    )  # fmt: skip


def without_autocast(device: str, autocast: torch.dtype | None) -> AbstractContextManager[Any]:
    """A context in which our own arithmetic keeps the dtypes that it is given.

    `autocast` is the dtype of the autocast that the caller is under, None for no autocast.
    """
    return nullcontext() if autocast is None else torch.autocast(device, enabled=False)


def project(
    x: Tensor,
    *modules: nn.Module,
    compute: str = "same",
    outliers: int = 0,
    share_dropout: bool = True,
    autocast: torch.dtype | None = None,
    given: torch.dtype | None = None,
    by_module: Callable[[str], None] | None = None,
    last: int = 0,
) -> Tensor:
    """Applies several Linear modules to the same x [..., in].

    Returns their outputs side by side [..., Σ out], in x's dtype.

    Args:
        compute, outliers: as `lora_linear` takes them, for the modules that it computes.
        share_dropout: as in `read_linear`.
        autocast: the dtype that the caller of the model chose, under which modules that can't be
            read are called.
        given: the dtype in which the owner of the modules would call them; None means x's own.
        by_module: is told why, for each module that is called.
        last: how many of the first modules are called after the others, where the order of their
            random numbers matters.
    """
    reads = [read_or_because(module, share_dropout=share_dropout) for module in modules]
    known = [read for read in reads if not isinstance(read, str)]
    if len(known) == len(reads):
        return _apply(x, known, compute, outliers)
    outs: dict[int, Tensor] = {}
    for i in (*range(last, len(modules)), *range(last)):
        read = reads[i]
        if isinstance(read, str):
            if by_module is not None:
                by_module(read)
            outs[i] = _call(modules[i], x, autocast, given or x.dtype)
        else:
            outs[i] = _apply(x, [read], compute, outliers)
    return outs[0] if len(outs) == 1 else torch.cat([outs[i] for i in range(len(outs))], dim=-1)
