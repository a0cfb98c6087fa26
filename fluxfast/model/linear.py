"""How the blocks apply the Linear modules they hold: plain, quantised, wrapped by PEFT, or anything
else.

A plain `nn.Linear`, a `QuantLinear`, another library's quantised linear (`bases`), and PEFT's plain
LoRA over one are read in place and computed by `fluxfast.ops.linear.lora_linear`; adapters with
dropout that read the same x share one mask (PEFT draws one each). Whatever else there is (DoRA,
LoKr, a bias in B, another forward, a hook, a base that trains) is computed by the module itself:
slower, never skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fluxfast.model.foreign_weights import Decoded, foreign_weight
from fluxfast.ops.linear.adapters import Adapter, Lora
from fluxfast.ops.linear.group import LinearParams
from fluxfast.ops.linear.lora_linear import lora_linear
from fluxfast.ops.row_quant import Quantized
from fluxfast.quant import QuantWeight
from fluxfast.quant.linear import QuantLinear

# PEFT's wrappers whose forward is LoRA's formula and nothing more, by name, so that no library is
# imported for its own
_PEFT_WRAPPERS = {
    ("peft.tuners.lora.layer", "Linear"),
    ("peft.tuners.lora.bnb", "Linear4bit"),
    ("peft.tuners.lora.bnb", "Linear8bitLt"),
    ("peft.tuners.lora.torchao", "TorchaoLoraLinear"),
}


def touched(module: nn.Module) -> str | None:
    """What else than its class's own forward calling the module would run: a hook, a replaced
    forward; None for nothing.

    Such a hook may change the weights for the length of a call (diffusers' layerwise casting and
    group offloading, accelerate's offloading), so that only the module itself can say what it
    computes.
    """
    if "forward" in module.__dict__ and not _is_own_forward(module, module.__dict__["forward"]):
        registry, hook = module.__dict__.get("_diffusers_hook"), module.__dict__.get("_hf_hook")
        if hook is not None:
            return f"it has hooks: accelerate's {type(hook).__name__}"
        if registry is not None and registry.hooks:
            return f"it has hooks: diffusers' {', '.join(registry.hooks)}"
        return "its forward was replaced"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "it has hooks"
    return None


def _is_own_forward(module: nn.Module, forward: Any) -> bool:
    """Whether an instance's `forward` is its class's own after all: what libraries leave behind
    that take their hooks off.
    """
    own = getattr(forward, "__self__", None) is module
    return own and getattr(forward, "__func__", None) is type(module).forward


def untouched(module: nn.Module) -> bool:
    """Whether calling the module would run its class's own forward and nothing else: no hook, no
    replaced forward.
    """
    return touched(module) is None


class StoredWeight(NamedTuple):
    """A quantised weight as `lora_linear` takes it: decoded when it is used, each time."""

    packed: QuantWeight

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape

    @property
    def device(self) -> torch.device:
        return self.packed.parts["packed"].device

    def to(self, dtype: torch.dtype, /) -> Tensor:
        return self.packed.dequantize(dtype)

    def decode_into(self, out: Tensor, /) -> None:
        self.packed.decode_into(out)

    def stores(self, fmt: str, /) -> bool:
        return self.packed.format.stored_codes == fmt

    def codes(self, fmt: str, /) -> Quantized:
        return Quantized(*self.packed.codes(fmt))

    def codes_into(self, q: Tensor, scale: Tensor, /) -> None:
        self.packed.codes_into(q, scale)


def _base(module: nn.Module) -> LinearParams | str:
    """A linear without adapters, or why its forward can't be read."""
    if (because := touched(module)) is not None:
        return because
    if isinstance(module, QuantLinear) and type(module).forward is QuantLinear.forward:
        return LinearParams(StoredWeight(module.packed()), module.bias)
    weight = foreign_weight(module)
    if isinstance(weight, str):
        return weight
    if weight is not None:
        if torch.compiler.is_compiling():
            return "torch.compile traces its library's own product"
        if getattr(module.weight, "requires_grad", False):
            return "its base is trained"
        return LinearParams(
            StoredWeight(weight) if isinstance(weight, QuantWeight) else weight, _bias_of(module)
        )
    if type(module).forward is nn.Linear.forward:
        assert isinstance(module, nn.Linear)
        return _plain_base(module)
    return f"{type(module).__name__} is not known"


def _plain_base(linear: nn.Linear) -> LinearParams:
    weight, bias = linear.weight, linear.bias
    if weight.dtype.itemsize > 1 or weight.requires_grad or torch.compiler.is_compiling():
        return LinearParams(weight, bias)
    # kept in 8 bits that no product reads (float8 without a scale): every number of theirs is one
    # of fp32's
    wide = bias if bias is None or bias.dtype.itemsize > 1 else bias.detach().float()
    return LinearParams(Decoded(weight.shape, weight.device, weight.detach), wide)


def _bias_of(module: Any) -> Tensor | None:
    return module.bias


def _plain(module: nn.Module) -> bool:
    return type(module).forward is nn.Linear.forward and untouched(module)


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
    kind = type(module)
    wrapped = (kind.__module__, kind.__name__) in _PEFT_WRAPPERS
    params = _read_peft(module, share_dropout) if wrapped else _base(module)
    if not isinstance(params, str) and any(getattr(t, "requires_grad", False) for t in params[:2]):
        return "its base is trained"
    return params


def _read_peft(module: Any, share_dropout: bool) -> LinearParams | str:
    if (because := touched(module)) is not None:
        return because
    base = _base(module.base_layer)
    if isinstance(base, str):
        return base
    if module.merged and module.disable_adapters:
        return "only PEFT can take its merged adapter out of the base again"
    if module.merged or module.disable_adapters:
        return base
    adapters: list[Adapter] = []
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        dropout, a, b, scale = (
            module.lora_dropout[name],
            module.lora_A[name],
            module.lora_B[name],
            module.scaling[name],
        )
        if name in module.lora_variant:
            return (
                f"adapter {name!r} is no plain LoRA but {type(module.lora_variant[name]).__name__}"
            )
        if not (_plain(a) and _plain(b)) or b.bias is not None:
            return f"adapter {name!r} has a bias, hooks or layers of its own"
        if isinstance(scale, Tensor):
            return f"adapter {name!r} keeps its scale in a tensor, for hot-swapping"
        p = dropout.p if isinstance(dropout, nn.Dropout) and module.training else 0.0
        if p > 0 and not share_dropout:
            return f"adapter {name!r} has a dropout"
        adapters.append(Lora(a.weight, b.weight, scale, p))
    return base._replace(adapters=tuple(adapters))


def _call(module: nn.Module, x: Tensor, autocast: torch.dtype | None, given: torch.dtype) -> Tensor:
    """The module's own forward, of x in the dtype that it computes in, back in x's; `autocast` as
    its caller had it.

    That is its weight's dtype where nothing changes the weight for the length of a call. Where
    something may, it is `given`, the dtype in which the owner of the block would call it.
    """
    if autocast is not None:
        with torch.autocast(x.device.type, autocast):
            return module(x).to(x.dtype)
    return module(x.to(_called_in(module) or given)).to(x.dtype)


def _called_in(module: Any) -> torch.dtype | None:
    """The dtype of a linear's weight, if it has one in which its forward computes."""
    base = getattr(module, "base_layer", module)
    if not (untouched(module) and untouched(base)):
        return None
    if isinstance(base, QuantLinear):
        return base.compute_dtype
    dtype = getattr(getattr(base, "weight", None), "dtype", None)
    return (
        dtype
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1
        else None
    )


def draw_seed() -> int:
    """A seed for dropout masks, from torch's default generator, which whoever replays a step has
    set as it was.
    """
    return int(torch.randint(2**62, ()).item())


def _apply(x: Tensor, params: list[LinearParams], compute: str, outliers: int) -> Tensor:
    drops = any(adapter.dropout > 0 for p in params for adapter in p.adapters)
    return lora_linear(
        x, params, compute=compute, outliers=outliers, dropout_seed=draw_seed() if drops else None
    )


def without_autocast(device: str, autocast: torch.dtype | None) -> AbstractContextManager[Any]:
    """A context in which our own arithmetic runs in the dtypes that it is given, whatever
    `autocast` its caller is under.
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
    """Apply several Linear modules to the same x [..., in]; returns their outputs side by side
    [..., Σ out], in x's dtype.

    compute, outliers: as `lora_linear` takes them, for the modules that it computes. share_dropout:
    as in `read_linear`. autocast: the dtype that the caller of the model chose, under which modules
    that can't be read are called. given: the dtype in which their owner would call these; x's own
    if it is None. last: how many of the first modules are called after the others, where the order
    of their random numbers matters.
    """
    reads = [read_or_because(module, share_dropout=share_dropout) for module in modules]
    known = [read for read in reads if not isinstance(read, str)]
    if len(known) == len(reads):
        return _apply(x, known, compute, outliers)
    outs: list[Tensor | None] = [None] * len(modules)
    for i in (*range(last, len(modules)), *range(last)):
        read = reads[i]
        if isinstance(read, str):
            if by_module is not None:
                by_module(read)
            outs[i] = _call(modules[i], x, autocast, given or x.dtype)
        else:
            outs[i] = _apply(x, [read], compute, outliers)
    made = [out for out in outs if out is not None]
    return made[0] if len(made) == 1 else torch.cat(made, dim=-1)
