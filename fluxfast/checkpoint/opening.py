"""Opening a transformer's checkpoint: one safetensors file, a folder, or a repository of the hub.

`open_checkpoint` takes whatever a config names. `load_single_file` and `load_folder` are what
`FluxTransformer.from_single_file` and `.from_pretrained` call. Nothing here reads a weight; what is
another kind of file, or another model, is refused by saying what it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fluxfast.checkpoint import keys, locate, quantized
from fluxfast.checkpoint.locate import CONFIG_NAME, WEIGHTS_NAME, shown, weight_files
from fluxfast.checkpoint.not_flux import (
    TAKE_TRANSFORMER,
    why_not_channels,
    why_not_config,
    why_not_flux,
)
from fluxfast.checkpoint.reader import CheckpointError, TensorFiles
from fluxfast.checkpoint.transformer import Checkpoint, Model

HUB_ARGUMENTS = {"revision", "cache_dir", "token", "local_files_only", "force_download"}
# a part of a sharded checkpoint, as diffusers and transformers name it
_PART = re.compile(r"-\d{5}-of-(\d{5})$")


def open_checkpoint(
    name: str | os.PathLike,
    *,
    subfolder: str | None = None,
    variant: str | None = None,
    in_channels: int | None = None,
    **hub: Any,
) -> Checkpoint:
    """Open what `name` leads to: a file with any ending, a folder, or a repository of the hub.

    A folder's transformer is looked for in `subfolder` and then in the folder itself; without
    `subfolder`, in the folder itself and then in its `transformer`, where a pipeline has it.
    in_channels: how many channels the run will feed it; a transformer with another number is
    refused before its weights are downloaded. `hub` goes to huggingface_hub's `snapshot_download`.
    Raises CheckpointError saying what the name leads to.
    """
    path = locate.local_path(name)
    if path is not None and path.is_file():
        checkpoint = open_single_file(path)
        _check_channels(checkpoint.where, checkpoint.config, in_channels)
        return checkpoint
    subfolders = (subfolder, None) if subfolder else (None, "transformer")
    return _open_folder(name, path, subfolders, variant, in_channels, hub)


def open_single_file(
    path: str | os.PathLike,
    *,
    axes_dims_rope: tuple[int, ...] | None = None,
    config: Mapping[str, Any] | str | os.PathLike | None = None,
) -> Checkpoint:
    """Open one safetensors file; the arguments are `FluxTransformer.from_single_file`'s."""
    path = Path(path).expanduser()
    if path.is_dir():
        raise CheckpointError(f"{path}: a folder, expected one file: load it with from_pretrained")
    files = TensorFiles([path])
    if quantized.is_quantized(files):
        return Checkpoint(str(path), quantized.read_info(files).config, files, "diffusers")
    style = _naming_style(path, files)
    if config is None:
        try:
            config = keys.infer_config(style, files.shapes, axes_dims_rope)
        except KeyError as error:
            raise CheckpointError(
                f"{path}: incomplete ({style} layout): tensor {error.args[0]} is missing. Is it "
                "one part of a sharded checkpoint? Then name the folder that holds all parts"
            ) from error
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
    elif not isinstance(config, Mapping):
        config = locate.read_json(
            Path(config) / CONFIG_NAME if Path(config).is_dir() else Path(config)
        )
    return Checkpoint(str(path), config, files, style)


def _naming_style(path: Path, files: TensorFiles) -> str:
    """The style of a file's tensor names; raises CheckpointError if it holds no transformer."""
    if (part := _PART.search(path.stem)) is not None and int(part[1]) > 1:
        raise CheckpointError(
            f"{path}: one of {int(part[1])} parts of a sharded checkpoint: name the folder that "
            f"holds all of them, {path.absolute().parent}"
        )
    if (why := why_not_flux(files.shapes)) is not None:
        raise CheckpointError(f"{path}: {why}")
    if (style := keys.detect(files.shapes)) is None:
        raise CheckpointError(
            f"{path}: not a FLUX.1 transformer: expected keys double_blocks.* (BFL), "
            f"{keys.COMFY_PREFIX}double_blocks.* (Comfy) or transformer_blocks.* (diffusers), "
            f"found {shown(sorted(files.shapes)) or 'no tensor at all'}; {TAKE_TRANSFORMER}; if "
            "it is a part of a sharded checkpoint, name the folder that holds all parts"
        )
    return style


def load_single_file(
    cls: type[Model],
    path: str | os.PathLike,
    *,
    torch_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    axes_dims_rope: tuple[int, ...] | None = None,
    config: Mapping[str, Any] | str | os.PathLike | None = None,
) -> Model:
    """See `FluxTransformer.from_single_file`."""
    checkpoint = open_single_file(path, axes_dims_rope=axes_dims_rope, config=config)
    return checkpoint.load(cls, torch_dtype or dtype or torch.float32)


def open_folder(
    path: str | os.PathLike, *, subfolder: str | None = None, variant: str | None = None, **hub: Any
) -> Checkpoint:
    """Open a folder as diffusers writes it, or a repository of the hub.

    A name that leads to a file opens that file. `hub` goes to huggingface_hub's
    `snapshot_download`.
    """
    if unknown := sorted(hub.keys() - HUB_ARGUMENTS):
        raise TypeError(
            f"from_pretrained: unknown arguments {', '.join(unknown)}; see "
            "FluxTransformer.from_pretrained"
        )
    root = locate.local_path(path)
    if root is not None and root.is_file():
        return open_single_file(root)
    return _open_folder(path, root, (subfolder,), variant, None, hub)


def _open_folder(
    name: str | os.PathLike,
    root: Path | None,
    subfolders: tuple[str | None, ...],
    variant: str | None,
    in_channels: int | None,
    hub: dict[str, Any],
) -> Checkpoint:
    """Open the transformer in the first of `subfolders` of `root` that has one (None: `root`).

    `root` None means that `name` is a repository of the hub.
    """
    inners = [f"{subfolder}/" if subfolder else "" for subfolder in subfolders]
    here = root
    if root is None:
        # the configs are a few KB, and say whether the weights are worth their download
        here = locate.download(
            name, ["model_index.json", *(f"{inner}{CONFIG_NAME}" for inner in inners)], hub
        )
    assert here is not None
    folder = locate.model_folder(here, subfolders)
    config = locate.read_json(folder / CONFIG_NAME)
    if (why := why_not_config(config)) is not None:
        raise CheckpointError(f"{folder / CONFIG_NAME}: {why}")
    _check_channels(str(folder / CONFIG_NAME), config, in_channels)
    if root is None:
        inner = "" if folder == here else f"{folder.relative_to(here).as_posix()}/"
        suffix = f".{variant}" if variant else ""
        locate.download(
            name, [f"{inner}*{suffix}*.json", f"{inner}{WEIGHTS_NAME}*{suffix}*.safetensors"], hub
        )
    files = TensorFiles(weight_files(folder, variant))
    if quantized.is_quantized(files):
        config = dict(quantized.read_info(files).config)
    elif (why := why_not_flux(files.shapes)) is not None:
        raise CheckpointError(f"{folder}: {why}")
    return Checkpoint(str(folder), config, files, "diffusers")


def _check_channels(where: str, config: Mapping[str, Any], expected: int | None) -> None:
    # a config without in_channels means FLUX.1's 64, the default of diffusers' class
    found = config.get("in_channels", 64)
    if expected is not None and (why := why_not_channels(found, expected)) is not None:
        raise CheckpointError(f"{where}: {why}")


def load_folder(
    cls: type[Model],
    path: str | os.PathLike,
    *,
    subfolder: str | None = None,
    torch_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    low_cpu_mem_usage: bool | None = None,
    **hub: Any,
) -> Model:
    """See `FluxTransformer.from_pretrained`; `hub` goes to `snapshot_download`.

    `low_cpu_mem_usage` changes nothing: loading never holds more than the model.
    """
    if use_safetensors is False:
        raise ValueError(
            "use_safetensors=False: only safetensors files are loaded (a pickle can run code)"
        )
    checkpoint = open_folder(path, subfolder=subfolder, variant=variant, **hub)
    return checkpoint.load(cls, torch_dtype or dtype or torch.float32)
