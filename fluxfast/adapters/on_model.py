"""`fluxfast.load_lora` and `fluxfast.save_lora`: adapters' files, for programs of one's own.

A run of the trainer knows its adapter's kind from its config; here the file, or the model, tells.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torch.nn import Parameter

from fluxfast.adapters import lora, lora_write
from fluxfast.adapters.adapter_read import read_adapter
from fluxfast.adapters.kind import AdapterSettings, trainable_parameters
from fluxfast.adapters.kinds import KINDS
from fluxfast.adapters.lora_read import as_lora
from fluxfast.text import wrong_choice

logger = logging.getLogger("fluxfast")
LYCORIS = KINDS["lycoris"]


def load_lora(
    transformer: nn.Module,
    file: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    dtype: torch.dtype = torch.float32,
) -> list[Parameter]:
    """Put a LoRA's file, of any program, on a FLUX.1 transformer: to draw with, or to train on.

    transformer: a `FluxTransformer`, or diffusers' model, accelerated or not. It is frozen.
    file: a .safetensors file, a folder with one, or a repository of the Hub. It may be diffusers',
    PEFT's, ComfyUI's, kohya's scripts', ai-toolkit's, OneTrainer's, XLabs' or LyCORIS's: LoRA,
    DoRA, LoKr and the other algorithms of LyCORIS. `fluxfast-train inspect FILE` says what it is.
    adapter_name: where several LoRAs are on the model, PEFT's name of this one; LyCORIS has one
    only. `transformer.set_adapters([name], [0.8])` changes how strongly LoRA and DoRA act.
    dtype: of the adapter's values.

    Returns its parameters in order, ready for an optimiser: they require gradients. What is left
    out of the file, such as the text encoders' part, is told in a warning. Raises ValueError,
    naming the file, where it is damaged or no adapter of FLUX.1, where its modules or shapes are
    not this model's, and where the model has an adapter of that name.
    """
    read = read_adapter(file)
    if adapter_name in adapters_on(transformer):
        raise ValueError(
            f"load_lora: the model has an adapter {adapter_name!r} already; choose another "
            "adapter_name"
        )
    for note in read.notes:
        logger.warning("%s", note)
    if all(read.algorithm(module) == "lora" for module in read.targets):
        return lora.load_lora(transformer, as_lora(read), adapter_name=adapter_name, dtype=dtype)
    if LYCORIS.modules(transformer):
        raise ValueError(f"load_lora: {read.path}: the model has an adapter of LyCORIS already")
    before = set(trainable_parameters(transformer))
    settings = AdapterSettings(targets=tuple(read.targets), rank=1, alpha=1.0, dtype=dtype)
    LYCORIS.add_from(transformer, LYCORIS.read_file(read.path), settings)
    added = trainable_parameters(transformer)
    return [parameter for name, parameter in added.items() if name not in before]


def save_lora(
    transformer: nn.Module,
    path: str | os.PathLike[str],
    *,
    format: str = "diffusers",
    adapter_name: str = "default",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write the adapter that is on a transformer; returns the file's path.

    transformer: with an adapter of `add_lora`, `load_lora`, or PEFT's `add_adapter`. path: a
    folder, where the file gets the name that diffusers looks for, or a name that ends in
    .safetensors. format: which programs are to read it: "diffusers", "comfyui", "kohya" (LoRA
    alone) or "lycoris". metadata: further entries of the file's header.

    The file is whole or absent, and the same adapter always gives the same bytes. Raises ValueError
    where the model has no such adapter, or the format has no place for it.
    """
    found = adapters_on(transformer)
    if adapter_name in found:
        return lora_write.save_lora(
            transformer, path, format=format, metadata=metadata, adapter_name=adapter_name
        )
    if LYCORIS.modules(transformer):
        LYCORIS.check_style(format)
        return LYCORIS.save(transformer, path, style=format, metadata=metadata)
    if not found:
        raise ValueError("save_lora: the model has no adapter; add_lora and load_lora make one")
    raise ValueError(wrong_choice("save_lora: adapter_name", adapter_name, found))


def adapters_on(transformer: nn.Module) -> list[str]:
    """The names of the LoRAs that a transformer carries in PEFT's modules."""
    return list(getattr(transformer, "peft_config", {}))
