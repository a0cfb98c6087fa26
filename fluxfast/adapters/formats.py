"""LoRA files: what fluxfast writes, and what it can go on training from.

Written, as `pytorch_lora_weights.safetensors` with keys `transformer.<module>.lora_A.weight` and
`.lora_B.weight`:

    diffusers   metadata `lora_adapter_metadata` carries rank and alpha, where diffusers' `load_lora_weights` reads them
    comfyui     an fp32 scalar `transformer.<module>.alpha` beside each pair, which ComfyUI and diffusers read; diffusers
                refuses a file that has both

What can be read is told in `lora_keys.py` (names) and `lora_settings.py` (alpha).
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig
from safetensors.torch import save
from torch import nn
from torch.nn import Parameter

from fluxfast.adapters.lora import exported_state, inject, lora_layers
from fluxfast.adapters.lora_file import LoraFile, read_lora
from fluxfast.adapters.lora_keys import listed
from fluxfast.files import write_atomic

LoraFormat = Literal["diffusers", "comfyui"]

_PREFIX = "transformer."


def save_lora(
    transformer: nn.Module,
    path: str | os.PathLike[str],
    *,
    format: LoraFormat = "diffusers",
    metadata: Mapping[str, str] | None = None,
    adapter_name: str = "default",
) -> Path:
    """Writes the adapter for the *original* base weights (see `exported_state`); returns the file's
    path.

    `path` is a folder, or a file's name ending in `.safetensors`. `metadata` is added to the file's
    own. The file is whole or absent, and the same adapter always gives the same bytes.
    """
    state, growth = exported_state(transformer, adapter_name)
    layers = lora_layers(transformer, adapter_name)
    packed = {_PREFIX + key: tensor for key, tensor in state.items()}
    header = {"format": "pt", **(metadata or {})}
    if format == "comfyui":
        for name, layer in layers.items():
            packed[f"{_PREFIX}{name}.alpha"] = torch.tensor(
                float(layer.lora_alpha[adapter_name] * growth)
            )
    elif format == "diffusers":
        adapter = _adapter_metadata(transformer.peft_config[adapter_name], list(layers), growth)  # type: ignore[index]
        prefixed = {_PREFIX + key: value for key, value in adapter.items()}
        header[LORA_ADAPTER_METADATA_KEY] = json.dumps(prefixed, indent=2, sort_keys=True)
    else:
        raise ValueError(f"unknown lora_format {format!r}: choose diffusers or comfyui")
    file = Path(path)
    if file.suffix != ".safetensors":
        file = file / LORA_WEIGHT_NAME_SAFE
    write_atomic(file, _sorted_header(save(packed, metadata=header)))
    return file


def modelspec_metadata(
    *,
    architecture: str,
    title: str,
    resolution: tuple[int, int],
    global_step: int | None = None,
    trained_words: Sequence[str] = (),
) -> dict[str, str]:
    """Metadata by the Stability AI Model Metadata Standard 1.0.1
    (github.com/Stability-AI/ModelSpec), for `save_lora`.

    `architecture` is the base model's name, such as flux-dev; `resolution` is width, height in
    pixels; `trained_words` are the instance prompts. No date: two equal runs write equal files.
    """
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.resolution": "{}x{}".format(*resolution),
        "modelspec.trigger_phrase": ", ".join(trained_words),
        "global_step": "" if global_step is None else str(global_step),
    }
    return {key: value for key, value in metadata.items() if value}


def load_lora(
    transformer: nn.Module,
    lora: LoraFile | str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> list[Parameter]:
    """Goes on training a LoRA (`init_lora`): like `add_lora`, with modules, ranks, alphas and
    values from the file.

    `lora` is what `read_lora` gave, or a path for it. Raises `read_lora`'s errors, and those of
    `check_fits`.
    """
    if not isinstance(lora, LoraFile):
        lora = read_lora(lora)
    check_fits(transformer, lora)
    rank, alpha = lora.rank, lora.alpha
    # PEFT reads a string as a regular expression for the whole name: `proj_out` then means that
    # module alone
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="|".join(_exactly(name) for name in lora.targets),
        rank_pattern={f"^{_exactly(name)}": r for name, r in lora.ranks.items() if r != rank},
        alpha_pattern={f"^{_exactly(name)}": a for name, a in lora.alphas.items() if a != alpha},
    )
    parameters = inject(transformer, config, adapter_name, dtype)
    with torch.no_grad():
        for name, layer in lora_layers(transformer, adapter_name).items():
            layer.lora_A[adapter_name].weight.copy_(lora.state[f"{name}.lora_A.weight"])
            layer.lora_B[adapter_name].weight.copy_(lora.state[f"{name}.lora_B.weight"])
    return parameters


def _exactly(name: str) -> str:
    return name.replace(".", r"\.")


def _adapter_metadata(config: Any, modules: list[str], growth: int) -> dict[str, Any]:
    """The LoraConfig that a reader rebuilds: the fields that every PEFT knows, since an unknown one
    fails its load.
    """
    exact = isinstance(config.target_modules, str)
    return {
        "r": config.r * growth,
        "lora_alpha": config.lora_alpha * growth,
        # not the run's: diffusers leaves the dropout it makes in training mode, and would drop at
        # inference
        "lora_dropout": 0.0,
        "target_modules": modules if exact else sorted(config.target_modules),
        "rank_pattern": {name: rank * growth for name, rank in config.rank_pattern.items()},
        "alpha_pattern": {name: alpha * growth for name, alpha in config.alpha_pattern.items()},
        "bias": "none",
        # not the run's initialiser: some of them would change the reader's base weights
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def _sorted_header(data: bytes) -> bytes:
    """The same safetensors file with its metadata in order; safetensors writes it in a random one."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def check_fits(transformer: nn.Module, lora: LoraFile) -> None:
    """ValueError where the transformer (on any device, also meta) lacks a module of the LoRA, or it
    has another shape.
    """
    modules: dict[str, Any] = dict(transformer.named_modules())
    unexpected = [name for name in lora.targets if not hasattr(modules.get(name), "in_features")]
    if unexpected:
        raise ValueError(
            f"{lora.path}: the transformer has no such linear layers: {listed(unexpected)}"
        )
    for name, rank in lora.ranks.items():
        module = modules[name]
        for key, expected in (
            ("lora_A", [rank, module.in_features]),
            ("lora_B", [module.out_features, rank]),
        ):
            found = list(lora.state[f"{name}.{key}.weight"].shape)
            if found != expected:
                raise ValueError(
                    f"{lora.path}: {name}.{key}: expected {expected} for this transformer, "
                    f"found {found}"
                )
