"""Writing an adapter's file: one safetensors file, whole or absent, always the same bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from safetensors.torch import save
from torch import Tensor

from fluxfast.files import write_atomic

# what diffusers' pipelines put before the names of the transformer's tensors
PREFIX = "transformer."


def write_adapter(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Path:
    """Writes tensors and metadata to a file, and returns its path.

    `path` is a folder, where the file gets the name that diffusers looks for, or a file's name that
    ends in `.safetensors`.
    """
    file = Path(path)
    if file.suffix != ".safetensors":
        file = file / LORA_WEIGHT_NAME_SAFE
    write_atomic(file, _sorted_header(save(dict(tensors), metadata={"format": "pt", **metadata})))
    return file


def _sorted_header(data: bytes) -> bytes:
    """The same safetensors file with its metadata in order; the library writes a random one."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def modelspec_metadata(
    *,
    architecture: str,
    title: str,
    resolution: tuple[int, int],
    global_step: int | None = None,
    trained_words: Sequence[str] = (),
) -> dict[str, str]:
    """Metadata by the Stability AI Model Metadata Standard 1.0.1.

    The standard is at github.com/Stability-AI/ModelSpec. `architecture` is the base model's name,
    such as flux-dev; `resolution` is width, height in pixels; `trained_words` are the instance
    prompts. There is no date in it, so that two equal runs write equal files.
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
