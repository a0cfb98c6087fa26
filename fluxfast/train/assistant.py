"""The assistant LoRA: a frozen adapter that a few-step model needs while it is trained.

FLUX.1-schnell is distilled to a few steps, and training it undoes that. A LoRA that was trained to
undo it beforehand (ostris' for schnell) is there in training, so that the run's own adapter need
not learn it, and is taken off for drawing. It is never trained and never saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from rich.console import Console
from torch import nn

from fluxfast.adapters.kinds import without_adapters
from fluxfast.adapters.lora import load_lora, lora_layers
from fluxfast.adapters.lora_read import read_lora
from fluxfast.config.run import TrainConfig
from fluxfast.train.events import say

# PEFT's name of it; the trained adapter's is "default"
NAME = "assistant"


def add_assistant(config: TrainConfig, transformer: Any, console: Console) -> None:
    """Put the config's assistant on a transformer without adapters, if it has one.

    Raises the errors of `read_lora`, and ValueError where it doesn't fit.
    """
    if config.assistant_lora is None:
        return
    load_lora(transformer, config.assistant_lora, adapter_name=NAME, dtype=config.adapter_dtype)
    scale(transformer, config.assistant_lora_strength)
    say(
        console,
        f"assistant LoRA: {config.assistant_lora}, strength {config.assistant_lora_strength:g} in "
        f"training and {config.assistant_lora_inference_strength:g} at validation; frozen and not "
        "saved",
    )


def assistant_bytes(config: TrainConfig) -> int:
    """Bytes of the config's assistant on a model; 0 without one. Reads its file, and may fetch it.

    Raises the errors of `read_lora`.
    """
    if config.assistant_lora is None:
        return 0
    tensors = read_lora(config.assistant_lora).state.values()
    return sum(tensor.numel() for tensor in tensors) * config.adapter_dtype.itemsize


def activate(transformer: Any) -> None:
    """Have the assistant act beside the adapter that has been added after it, and stay as it is."""
    layers = lora_layers(transformer, NAME)
    if not layers:
        return
    for layer in layers.values():
        for parts in (layer.lora_A, layer.lora_B):
            parts[NAME].requires_grad_(False)
    set_active_adapters(transformer, [NAME, "default"])


def scale(transformer: Any, factor: float) -> None:
    """Multiply what the assistant adds."""
    for layer in lora_layers(transformer, NAME).values():
        layer.scaling[NAME] *= factor


def base_alone(transformer: nn.Module) -> AbstractContextManager[None]:
    """A context in which a transformer computes what it does without the adapter that is trained.

    That is the base, with the assistant if there is one.
    """
    if not lora_layers(transformer, NAME):
        return without_adapters(transformer)
    return _assistant_alone(transformer)


@contextmanager
def _assistant_alone(transformer: nn.Module) -> Iterator[None]:
    set_active_adapters(transformer, [NAME])
    try:
        yield
    finally:
        set_active_adapters(transformer, [NAME, "default"])


def drawing(transformer: Any, config: TrainConfig) -> AbstractContextManager[None]:
    """A context with the assistant's strength at validation."""
    if not lora_layers(transformer, NAME):
        return nullcontext()
    return _drawing(transformer, config)


@contextmanager
def _drawing(transformer: Any, config: TrainConfig) -> Iterator[None]:
    strength = config.assistant_lora_inference_strength
    kept = {name: layer.scaling[NAME] for name, layer in lora_layers(transformer, NAME).items()}
    if strength:
        scale(transformer, strength / config.assistant_lora_strength)
    else:
        set_active_adapters(transformer, ["default"])
    try:
        yield
    finally:
        for name, layer in lora_layers(transformer, NAME).items():
            layer.scaling[NAME] = kept[name]
        set_active_adapters(transformer, [NAME, "default"])


def set_active_adapters(transformer: nn.Module, names: Sequence[str]) -> None:
    """Have these of PEFT's adapters act, whatever trains."""
    for layer in _peft_layers(transformer):
        # `set_adapter` would make each of them trainable
        layer._active_adapter = [name for name in names if name in layer.lora_A]


def _peft_layers(transformer: nn.Module) -> list[Any]:
    return [module for module in transformer.modules() if hasattr(module, "_active_adapter")]


def active_adapters(transformer: nn.Module) -> list[str]:
    """The names of PEFT's adapters that act on any linear, in order."""
    found = [name for layer in _peft_layers(transformer) for name in layer.active_adapters]
    return list(dict.fromkeys(found))
