"""Whether a run computes modulation ahead, on the CPU: before the base is loaded, and once its adapters are there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.console import Console

from fluxfast.adapters.presets import preset_targets
from fluxfast.data.settings import ConfigError
from fluxfast.model.modulation import why_not
from fluxfast.model.transformer import FluxTransformer
from fluxfast.train.config import TrainConfig


def keeps_on_host(config: TrainConfig, linears: Sequence[str], device: torch.device, console: Console) -> bool:
    """Whether these linears, modulation's by their full names, are to stay in host memory.

    Raises ConfigError where they are told to, and the LoRA's targets name one.
    """
    if config.modulation_ahead is False or (config.modulation_ahead == "auto" and device.type == "cpu"):
        # on a CPU there is neither memory nor time to be won
        return False
    if config.init_lora:
        # its file says what it targets: `settle` looks
        return True
    targets = config.peft_lora_target_modules or preset_targets(config.flux_lora_target)
    for name in linears:
        if any(name == target or name.endswith(f".{target}") for target in targets):
            _refuse(config, f"the LoRA trains it ({name})", console)
            return False
    return True


def settle(config: TrainConfig, transformer: FluxTransformer, console: Console) -> None:
    """Turn modulation ahead off where an adapter that has come from a file sits on it; say where its weights are."""
    if transformer.modulation is None:
        return
    if (reason := why_not(transformer)) is not None:
        _refuse(config, reason, console)
        transformer.set_modulation_ahead(False)
        return
    size = transformer.modulation.nbytes / 2**30
    console.print(f"modulation is computed a step ahead on the CPU: its {size:.2f} GiB stay in host memory", highlight=False)


def _refuse(config: TrainConfig, reason: str, console: Console) -> None:
    if config.modulation_ahead != "auto":
        raise ConfigError([f'"modulation_ahead" is true, but modulation is not constant: {reason}; set it to "auto"'])
    console.print(f"modulation is computed on the device, step by step: {reason}", highlight=False, markup=False)
