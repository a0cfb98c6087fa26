"""How a LoRA's factors start: `lora_init_type`, and what it does to the base.

The initialisers `olora` and `pissa` take A₀ and B₀ out of W itself and leave W - s·B₀A₀ in the
base, with s = alpha / rank. The model computes the same at first, but its base is no longer the
file's. Therefore A₀ and B₀ are kept beside the factors, on the CPU: `lora_state.exported_state`
needs them to give the LoRA against the original base.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

INIT_TYPES = ("default", "gaussian", "olora", "pissa")


def check_init(transformer: nn.Module, modules: list[str], init: str, rank: int) -> bool:
    """Whether an initialiser takes its values from the base's weights; ValueError where it can't.

    The weights may be on the meta device.
    """
    if init == "loftq":
        raise ValueError(
            "lora_init_type 'loftq' corrects the error of a quantised base, and needs one that "
            f"fluxfast can't give it yet: choose one of {', '.join(INIT_TYPES)}"
        )
    if init not in INIT_TYPES and not re.fullmatch(r"pissa_niter_[1-9]\d*", init):
        raise ValueError(f"unknown lora_init_type {init!r}: choose one of {', '.join(INIT_TYPES)}")
    if init in ("default", "gaussian"):
        return False
    for name in modules:
        module: Any = transformer.get_submodule(name)
        weight = getattr(module, "weight", None)
        if isinstance(module, LoraLayer):
            raise ValueError(
                f"lora_init_type {init!r} changes the base, but {name} already carries another "
                "adapter"
            )
        if not isinstance(weight, Tensor) or weight.dtype not in (
            torch.float32,
            torch.bfloat16,
            torch.float16,
        ):
            raise ValueError(
                f"lora_init_type {init!r} needs a base in floating point, but {name} is a "
                f"{type(module).__name__}: set base_model_precision to no_change, or "
                "lora_init_type to default"
            )
        if rank > min(module.in_features, module.out_features):
            raise ValueError(
                f"lora_init_type {init!r} can't take rank {rank} from {name}, "
                f"a {module.in_features} to {module.out_features} linear"
            )
    return True


def init_from_base(layer: Any, adapter_name: str, init: str, dtype: torch.dtype) -> None:
    """Initialises one of PEFT's layers by `olora` or `pissa`, with factors in `dtype`."""
    weight = layer.get_base_layer().weight
    original = weight.detach().clone()
    if init == "olora":
        layer.olora_init(adapter_name)
    else:
        layer.pissa_init(adapter_name, init)
    # PEFT took the factors out of the base before they were rounded to `dtype`: take the rounded
    # ones out of the original instead
    weight.data = original
    factors = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    for factor in factors:
        factor.weight.data = factor.weight.data.contiguous().to(dtype)
    subtract_from_base(layer, adapter_name, *(factor.weight.detach() for factor in factors))


@torch.no_grad()
def subtract_from_base(layer: Any, adapter_name: str, initial_a: Tensor, initial_b: Tensor) -> None:
    """Takes s·B₀A₀ out of the base's weight, and keeps the two factors in the layer."""
    weight = layer.get_base_layer().weight
    a, b = (factor.to(weight.device, torch.float64) for factor in (initial_a, initial_b))
    # fp64: a TF32 matmul would leave the base off by more than the training that follows
    weight.data = weight.double().sub_(b @ a, alpha=layer.scaling[adapter_name]).to(weight.dtype)
    layer.lora_A[adapter_name].initial = initial_a.to("cpu", copy=True)
    layer.lora_B[adapter_name].initial = initial_b.to("cpu", copy=True)


def initial_factors(layer: Any, adapter_name: str) -> tuple[Tensor, Tensor] | None:
    """A₀ and B₀ where the adapter was initialised from the base, else None."""
    a, b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    return (a.initial, b.initial) if hasattr(a, "initial") else None
