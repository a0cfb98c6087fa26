"""The tensors of a LoRA on a transformer: for a file, for a checkpoint, and put back from one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import Parameter

from fluxfast.adapters.kind import check_same_tensors
from fluxfast.adapters.lora_init import initial_factors, subtract_from_base

FACTORS = ("lora_A", "lora_B")


def lora_layers(transformer: nn.Module, adapter_name: str = "default") -> dict[str, Any]:
    """The PEFT layers that carry the adapter, by module name, in the model's order."""
    return {
        name: module
        for name, module in transformer.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A
    }


def factors_of(layer: Any, adapter_name: str = "default") -> dict[str, Parameter]:
    """A layer's A [rank, in] and B [out, rank], by the names that they have in files."""
    return {f"{key}.weight": getattr(layer, key)[adapter_name].weight for key in FACTORS}


def exported_state(
    transformer: nn.Module, adapter_name: str = "default"
) -> tuple[dict[str, Tensor], int]:
    """The adapter against the original base, on the CPU, and the growth of its rank and alpha.

    Keys are `<module>.lora_A.weight` [rank, in] and `<module>.lora_B.weight` [out, rank]. An
    adapter that was initialised from the base W stands for s·(B A - B₀A₀) against the original W:
    one LoRA with A over A₀ and B beside -B₀, of twice the rank. The growth is 2 there, else 1.
    """
    state: dict[str, Tensor] = {}
    growth = 1
    for name, layer in lora_layers(transformer, adapter_name).items():
        a, b = (factor.detach().cpu() for factor in factors_of(layer, adapter_name).values())
        initial = initial_factors(layer, adapter_name)
        if initial is not None:
            growth = 2
            a, b = torch.cat([a, initial[0].to(a)]), torch.cat([b, -initial[1].to(b)], dim=1)
        state[f"{name}.lora_A.weight"] = a.contiguous()
        state[f"{name}.lora_B.weight"] = b.contiguous()
    return state, growth


def adapter_state(transformer: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """What a resumed run needs to have the LoRA back with the same bits.

    These are the factors, alpha, and A₀ and B₀ (`.initial`) where they came from the base.
    """
    state: dict[str, Tensor] = {}
    for name, layer in lora_layers(transformer, adapter_name).items():
        alpha = float(layer.lora_alpha[adapter_name])
        state[f"{name}.alpha"] = torch.tensor(alpha, dtype=torch.float64)
        for key, factor in factors_of(layer, adapter_name).items():
            state[f"{name}.{key}"] = factor.detach()
        if (initial := initial_factors(layer, adapter_name)) is not None:
            state |= {f"{name}.{key}.initial": t for key, t in zip(FACTORS, initial, strict=True)}
    return state


@torch.no_grad()
def load_adapter_state(
    transformer: nn.Module, state: Mapping[str, Tensor], adapter_name: str = "default"
) -> None:
    """Puts `adapter_state`'s tensors back, into a model with its original base and the same LoRA.

    Add the adapter with `init="default"`: A₀ and B₀ come from the state, and are taken out of the
    base here. Parameters keep their identity. ValueError where the state is another adapter's.
    """
    layers = lora_layers(transformer, adapter_name)
    own = {
        f"{name}.{key}": factor
        for name, layer in layers.items()
        for key, factor in factors_of(layer, adapter_name).items()
    }
    check_same_tensors(own, {key: t for key, t in state.items() if key.endswith(".weight")})
    for name, layer in layers.items():
        alpha, saved_alpha = layer.lora_alpha[adapter_name], state[f"{name}.alpha"].item()
        if alpha != saved_alpha:
            raise ValueError(
                f"{name}: expected alpha {alpha}, found {saved_alpha} in the saved adapter"
            )
    for key, factor in own.items():
        factor.copy_(state[key])
    for name, layer in layers.items():
        if f"{name}.lora_A.initial" in state:
            assert initial_factors(layer, adapter_name) is None, (
                "add the adapter with init='default' to resume it"
            )
            initial = (state[f"{name}.{key}.initial"] for key in FACTORS)
            subtract_from_base(layer, adapter_name, *initial)
