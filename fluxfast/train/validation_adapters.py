"""Putting further LoRAs on the model for as long as validation draws with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fluxfast.adapters.lora import load_lora, lora_layers
from fluxfast.config.validation_adapters import ValidationAdapterRun
from fluxfast.train.assistant import active_adapters, set_active_adapters

_PREFIX = "validation_"


@contextmanager
def with_adapters(transformer: Any, run: ValidationAdapterRun) -> Iterator[None]:
    """A context in which a run's LoRAs act beside the model's own adapters.

    Afterwards the model has the modules, the adapters and the trained parameters that it had.
    Raises the errors of `read_lora`, and ValueError where a LoRA doesn't fit.
    """
    trained = [p for p in transformer.parameters() if p.requires_grad]
    dtype = trained[0].dtype if trained else transformer.dtype
    before = active_adapters(transformer)
    wrapped = {name for name, module in transformer.named_modules() if _has_base(module)}
    names = [f"{_PREFIX}{i}" for i in range(len(run.adapters))]
    added: list[str] = []
    try:
        for name, adapter in zip(names, run.adapters, strict=True):
            added.append(name)
            load_lora(transformer, adapter.place, adapter_name=name, dtype=dtype)
            for layer in lora_layers(transformer, name).values():
                layer.scaling[name] *= adapter.strength
                # PEFT puts an adapter where its base is, which may be streamed
                layer.lora_A[name].to(transformer.device)
                layer.lora_B[name].to(transformer.device)
        set_active_adapters(transformer, [*before, *names])
        yield
    finally:
        _remove(transformer, added, wrapped)
        set_active_adapters(transformer, before)
        transformer.requires_grad_(False)
        for p in trained:
            p.requires_grad_(True)


def _has_base(module: nn.Module) -> bool:
    return module._modules.get("base_layer") is not None


def _remove(transformer: Any, names: list[str], wrapped: set[str]) -> None:
    """Take adapters off, and the modules around linears that had none before."""
    for name in names:
        if name in getattr(transformer, "peft_config", {}):
            transformer.delete_adapters(name)
    for path, module in list(transformer.named_modules()):
        if _has_base(module) and path not in wrapped:
            owner, _, attribute = path.rpartition(".")
            setattr(transformer.get_submodule(owner), attribute, module.base_layer)
