"""How the blocks apply the Linear modules they hold: plain, quantised, wrapped by PEFT, or anything else.

A plain `nn.Linear`, a `QuantLinear`, and PEFT's plain LoRA over one are read in place and computed by
`fluxfast.ops.lora_linear`; adapters with dropout that read the same x share one mask (PEFT draws one each).
Whatever else there is (DoRA, LoKr, a bias in B, another forward, a hook, a base that trains) is computed by the module itself:
slower, never skipped.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from fluxfast.ops.lora_linear import Adapter, LinearParams, lora_linear
from fluxfast.ops.row_quant import Quantized
from fluxfast.quant import QuantWeight
from fluxfast.quant.linear import QuantLinear


def _untouched(module: nn.Module) -> bool:
    """Whether calling the module would run its class's own forward and nothing else: no hook, no replaced forward."""
    return not ("forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks)


class StoredWeight(NamedTuple):
    """A quantised weight as `lora_linear` takes it: decoded when it is used, each time."""

    packed: QuantWeight

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape

    def to(self, dtype: torch.dtype, /) -> Tensor:
        return self.packed.dequantize(dtype)

    def codes(self, fmt: str, /) -> Quantized:
        return Quantized(*self.packed.codes(fmt))


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


def read_linear(module: nn.Module) -> LinearParams | None:
    """The tensors of a module with a frozen base, if they say all that its forward does; else None."""
    params = _base(module) if type(module) is not PeftLinear else _read_peft(module)
    if params is None or any(getattr(t, "requires_grad", False) for t in params[:2]):
        return None
    return params


def _read_peft(module: PeftLinear) -> LinearParams | None:
    base = _base(module.base_layer)
    if not _untouched(module) or base is None:
        return None
    if module.merged and module.disable_adapters:
        # only PEFT can take a merged adapter out of the base again
        return None
    if module.merged or module.disable_adapters:
        return base
    adapters: list[Adapter] = []
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        dropout, a, b = module.lora_dropout[name], module.lora_A[name], module.lora_B[name]
        if name in module.lora_variant or not (_plain(a) and _plain(b)) or b.bias is not None:
            return None
        p = dropout.p if isinstance(dropout, nn.Dropout) and module.training else 0.0
        adapters.append(Adapter(a.weight, b.weight, module.scaling[name], p))
    return base._replace(adapters=tuple(adapters))


def _call(module: nn.Module, x: Tensor) -> Tensor:
    """The module's own forward, in the dtype that it computes in, back in x's."""
    weight = getattr(getattr(module, "base_layer", module), "weight", None)
    if isinstance(weight, Tensor) and weight.dtype.is_floating_point and weight.dtype.itemsize > 1:
        return module(x.to(weight.dtype)).to(x.dtype)
    return module(x).to(x.dtype)


def draw_seed() -> int:
    """A seed for dropout masks, from torch's default generator, which whoever replays a step has set as it was."""
    return int(torch.randint(2**62, ()).item())


def _apply(x: Tensor, params: list[LinearParams], compute: str) -> Tensor:
    drops = any(adapter.dropout > 0 for p in params for adapter in p.adapters)
    return lora_linear(x, params, compute=compute, dropout_seed=draw_seed() if drops else None)


def project(x: Tensor, *modules: nn.Module, compute: str = "same") -> Tensor:
    """Apply several Linear modules to the same x [..., in]; returns their outputs side by side [..., Σ out], in x's dtype.

    compute: as `lora_linear` takes it, for the modules that it computes.
    """
    reads = [read_linear(module) for module in modules]
    known = [read for read in reads if read is not None]
    if len(known) == len(reads):
        return _apply(x, known, compute)
    outs = [_call(m, x) if p is None else _apply(x, [p], compute) for m, p in zip(modules, reads, strict=True)]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)
