"""Writing LoRA files, in the styles of `lora_format`.

Both styles have the keys `transformer.<module>.lora_A.weight` and `.lora_B.weight`. They differ in
where rank and alpha are:

    diffusers   in the metadata `lora_adapter_metadata`, which diffusers' `load_lora_weights` reads
    comfyui     in an fp32 scalar `transformer.<module>.alpha` beside each pair, which ComfyUI and
                diffusers read

diffusers refuses a file that has both.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from torch import Tensor, nn

from fluxfast.adapters.lora_state import exported_state, lora_layers
from fluxfast.adapters.writing import PREFIX, write_adapter

# (tensors, metadata) that a style writes beside the factors of a transformer's adapter; the last
# argument is the growth of rank and alpha (`exported_state`)
Style = Callable[[Any, str, int], tuple[dict[str, Tensor], dict[str, str]]]


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
    LORA_STYLES. `metadata` is added to the file's own. The file is whole or absent, and the same
    adapter always gives the same bytes.
    """
    if format not in LORA_STYLES:
        raise ValueError(f"unknown lora_format {format!r}: choose {' or '.join(LORA_STYLES)}")
    state, growth = exported_state(transformer, adapter_name)
    tensors, header = LORA_STYLES[format](transformer, adapter_name, growth)
    tensors |= {PREFIX + key: tensor for key, tensor in state.items()}
    return write_adapter(path, tensors, {**(metadata or {}), **header})


def _diffusers_style(
    transformer: Any, adapter_name: str, growth: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    modules = list(lora_layers(transformer, adapter_name))
    config = _readers_config(transformer.peft_config[adapter_name], modules, growth)
    prefixed = {PREFIX + key: value for key, value in config.items()}
    return {}, {LORA_ADAPTER_METADATA_KEY: json.dumps(prefixed, indent=2, sort_keys=True)}


def _comfyui_style(
    transformer: Any, adapter_name: str, growth: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    alphas = {
        f"{PREFIX}{name}.alpha": torch.tensor(float(layer.lora_alpha[adapter_name] * growth))
        for name, layer in lora_layers(transformer, adapter_name).items()
    }
    return alphas, {}


LORA_STYLES: dict[str, Style] = {"diffusers": _diffusers_style, "comfyui": _comfyui_style}


def _readers_config(config: Any, modules: list[str], growth: int) -> dict[str, Any]:
    """The LoraConfig that a reader is to build.

    It has only the fields that every version of PEFT knows, since an unknown one fails the load.
    """
    exact = isinstance(config.target_modules, str)
    return {
        "r": config.r * growth,
        "lora_alpha": config.lora_alpha * growth,
        # not the run's: diffusers leaves the dropout that it makes in training mode, and would drop
        # inputs at inference
        "lora_dropout": 0.0,
        "target_modules": modules if exact else sorted(config.target_modules),
        "rank_pattern": {name: rank * growth for name, rank in config.rank_pattern.items()},
        "alpha_pattern": {name: alpha * growth for name, alpha in config.alpha_pattern.items()},
        "bias": "none",
        # not the run's initialiser: some of them would change the reader's base weights
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": config.use_dora,
    }
