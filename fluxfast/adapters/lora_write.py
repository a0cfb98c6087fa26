"""Writing a transformer's LoRA."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from fluxfast.adapters.lora_read import LoraFile
from fluxfast.adapters.lora_state import exported_state, lora_layers
from fluxfast.adapters.styles import write_styled


def save_lora(
    transformer: nn.Module,
    path: str | os.PathLike[str],
    *,
    format: str = "diffusers",
    metadata: Mapping[str, str] | None = None,
    adapter_name: str = "default",
) -> Path:
    """Writes the adapter for the *original* base weights (`exported_state`); returns the path.

    `path` is a folder, or a file's name that ends in `.safetensors`. `format` is one of
    `styles.STYLES`. `metadata` is added to the file's own. The file is whole or absent, and the
    same adapter always gives the same bytes.
    """
    state, growth = exported_state(transformer, adapter_name)
    alphas = {
        name: float(layer.lora_alpha[adapter_name] * growth)
        for name, layer in lora_layers(transformer, adapter_name).items()
    }
    ranks = {name: len(state[f"{name}.lora_A.weight"]) for name in alphas}
    file = LoraFile.of(Path(path), state, ranks=ranks, alphas=alphas)
    return write_styled(path, file, format, metadata)
