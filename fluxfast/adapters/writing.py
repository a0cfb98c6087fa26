"""Writing an adapter's file: one safetensors file, whole or absent, always the same bytes.

It takes its name only after it was read back and is what was to be written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fluxfast import __version__
from fluxfast.files import atomic_file

_KEPT = "nothing was saved under that name: look after the disk, and save again"
# what diffusers' pipelines put before the names of the transformer's tensors
PREFIX = "transformer."


def write_adapter(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Path:
    """Writes tensors and metadata to a file, and returns its path.

    `path` is a folder, where the file gets the name that diffusers looks for, or a file's name that
    ends in `.safetensors`. OSError where it comes back from the disk changed; what was there
    before is then still there.
    """
    file = file_of(path)
    header = {**metadata, "format": "pt", "fluxfast_version": __version__}
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as stream:
        stream.write(_sorted_header(save(dict(tensors), metadata=header)))
        stream.flush()
        _check_written(file, Path(stream.name), tensors, header)
    return file


def file_of(path: str | os.PathLike[str]) -> Path:
    """The file that `write_adapter` writes for a path."""
    file = Path(path)
    return file if file.suffix == ".safetensors" else file / LORA_WEIGHT_NAME_SAFE


def _check_written(
    file: Path, written: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """OSError unless the file `written` holds these tensors, bit by bit, and this metadata."""
    try:
        with safe_open(written, framework="pt") as reader:
            differs = (reader.metadata() or {}) != metadata or {*reader.keys()} != tensors.keys()
            wrong = [name for name in tensors if not differs and _differ(reader, name, tensors)]
    except SafetensorError as error:
        raise OSError(f"{file}: can't be read back as it was written ({error}); {_KEPT}") from error
    if differs or wrong:
        raise OSError(f"{file}: {', '.join(wrong[:3]) or 'its header'} came back changed; {_KEPT}")


def _differ(reader: Any, name: str, tensors: Mapping[str, Tensor]) -> bool:
    found, expected = reader.get_tensor(name), tensors[name]
    return (found.dtype, found.shape) != (expected.dtype, expected.shape) or not torch.equal(
        found.reshape(-1).view(torch.uint8), expected.detach().cpu().reshape(-1).view(torch.uint8)
    )


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

    The standard is at github.com/Stability-AI/ModelSpec. `architecture` is the base model's name
    and what of it the file has, such as flux-dev/lora; `resolution` is width, height in pixels;
    `trained_words` are the instance prompts. There is no date in it, so that two equal runs write
    equal files.
    """
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.resolution": "{}x{}".format(*resolution),
        "modelspec.trigger_phrase": ", ".join(trained_words),
        "global_step": "" if global_step is None else str(global_step),
    }
    return {key: value for key, value in metadata.items() if value}
