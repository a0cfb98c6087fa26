"""The tensors of a LoRA on a transformer: for a file, for a checkpoint, and put back from one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import Parameter

from fluxfast.adapters.dora import MAGNITUDE, magnitude_of
from fluxfast.adapters.kind import Originals, check_same_tensors
from fluxfast.adapters.lora_init import Start, restore_base, start_of
from fluxfast.adapters.low_rank import Factors

FACTORS = ("lora_A", "lora_B")
# how the names of what trains end, behind the module's
_TRAINED = (*(f".{key}.weight" for key in FACTORS), f".{MAGNITUDE}")


def lora_layers(transformer: nn.Module, adapter_name: str = "default") -> dict[str, Any]:
    """The PEFT layers that carry the adapter, by module name, in the model's order."""
    return {
        name: module
        for name, module in transformer.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A
    }


def trained_of(layer: Any, adapter_name: str = "default") -> dict[str, Parameter]:
    """A layer's A [rank, in], B [out, rank] and, of DoRA, magnitude [out], by the files' names."""
    trained = {f"{key}.weight": getattr(layer, key)[adapter_name].weight for key in FACTORS}
    if (magnitude := magnitude_of(layer, adapter_name)) is not None:
        trained[MAGNITUDE] = magnitude
    return trained


def trained_in(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What trains, of all that `adapter_state` gives."""
    return {key: tensor for key, tensor in state.items() if key.endswith(_TRAINED)}


def exported_state(
    transformer: nn.Module, adapter_name: str = "default"
) -> tuple[dict[str, Tensor], int]:
    """The adapter against the original base, on the CPU, and the growth of its rank and alpha.

    Keys are `<module>.lora_A.weight` [rank, in], `<module>.lora_B.weight` [out, rank] and, of DoRA,
    `<module>.lora_magnitude_vector` [out]. An adapter that was initialised from the base stands for
    s·(B A - B₀A₀) against the original W: one LoRA with A over A₀ and B beside -B₀, of twice the
    rank. The growth is 2 there, else 1.
    """
    state: dict[str, Tensor] = {}
    growth = 1
    for name, layer in lora_layers(transformer, adapter_name).items():
        a, b, *magnitude = (t.detach().cpu() for t in trained_of(layer, adapter_name).values())
        if (start := start_of(layer, adapter_name)) is not None:
            growth = 2
            initial = start.initial.to(a.dtype)
            a, b = torch.cat([a, initial.a]), torch.cat([b, -initial.b], dim=1)
        state[f"{name}.lora_A.weight"] = a.contiguous()
        state[f"{name}.lora_B.weight"] = b.contiguous()
        state |= {f"{name}.{MAGNITUDE}": each for each in magnitude}
    return state, growth


def adapter_state(transformer: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """What a resumed run needs to have the LoRA back with the same bits.

    These are what trains, alpha, and what the adapter was given, if it began with more than random
    numbers (`lora_init.Start`): A₀ and B₀ are `.initial` where they were taken out of the base,
    `.correction` where not, and `.taken` is what was taken in the place of these.
    """
    state: dict[str, Tensor] = {}
    for name, layer in lora_layers(transformer, adapter_name).items():
        alpha = float(layer.lora_alpha[adapter_name])
        state[f"{name}.alpha"] = torch.tensor(alpha, dtype=torch.float64)
        for key, tensor in trained_of(layer, adapter_name).items():
            state[f"{name}.{key}"] = tensor.detach()
        if (start := start_of(layer, adapter_name)) is not None:
            state |= {f"{name}.{key}": tensor for key, tensor in _of_start(start).items()}
    return state


def _of_start(start: Start) -> dict[str, Tensor]:
    kept = {"initial" if start.taken is start.initial else "correction": start.initial}
    if start.taken is not None and start.taken is not start.initial:
        kept["taken"] = start.taken
    return {
        f"{key}.{what}": tensor
        for what, factors in kept.items()
        for key, tensor in zip(FACTORS, factors, strict=True)
    }


def _start_in(state: Mapping[str, Tensor], module: str) -> Start | None:
    """What `adapter_state` has saved of a module's start."""

    def saved(what: str) -> Factors | None:
        names = [f"{module}.{key}.{what}" for key in FACTORS]
        return Factors(*(state[name] for name in names)) if names[0] in state else None

    if (initial := saved("initial")) is not None:
        return Start(initial, initial)
    correction = saved("correction")
    return None if correction is None else Start(correction, saved("taken"))


@torch.no_grad()
def load_adapter_state(
    transformer: nn.Module,
    state: Mapping[str, Tensor],
    adapter_name: str = "default",
    originals: Originals | None = None,
) -> None:
    """Puts `adapter_state`'s tensors back, into a model with its original base and the same LoRA.

    Add the adapter with `init="default"`: A₀ and B₀ come from the state, and what was taken out of
    the base is taken out here, for which a quantised base needs its `originals`. Parameters keep
    their identity. ValueError where the state is another adapter's.
    """
    layers = lora_layers(transformer, adapter_name)
    own = {
        f"{name}.{key}": tensor
        for name, layer in layers.items()
        for key, tensor in trained_of(layer, adapter_name).items()
    }
    check_same_tensors(own, trained_in(state))
    for name, layer in layers.items():
        alpha, saved_alpha = layer.lora_alpha[adapter_name], state[f"{name}.alpha"].item()
        if alpha != saved_alpha:
            raise ValueError(
                f"{name}: expected alpha {alpha}, found {saved_alpha} in the saved adapter"
            )
    for key, tensor in own.items():
        tensor.copy_(state[key])
    starts = {name: start for name in layers if (start := _start_in(state, name)) is not None}
    restore_base(layers, adapter_name, starts, originals)
