"""Where a model's name leads: to a file, to a folder as diffusers writes it, or to the hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from fluxfast.checkpoint.reader import CheckpointError

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model"
# endings that only files have: if such a file is missing, the hub is not asked for a repository
WEIGHT_ENDINGS = (".safetensors", ".safetensor", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin")
SHOWN = 5


def local_path(name: str | os.PathLike) -> Path | None:
    """The file or folder on this machine called `name`; None if it can only be a hub repository.

    What is on this machine comes first, whatever its ending. Raises CheckpointError where there is
    nothing with that name and a repository can't be called so either.
    """
    try:
        path = Path(name).expanduser()
        if path.is_file() or path.is_dir():
            return path
        exists = path.exists()
    except (OSError, RuntimeError) as error:
        # a name that is too long, a folder that may not be entered, a ~user who does not exist
        raise CheckpointError(f"{name}: can't be looked at ({error})") from error
    if exists:
        raise CheckpointError(f"{name}: neither a file nor a folder")
    if path.is_symlink():
        raise CheckpointError(f"{name}: a link to {path.readlink()}, which is not there")
    if path.suffix.lower() in WEIGHT_ENDINGS:
        raise CheckpointError(f"{name}: no such file")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)):
        raise CheckpointError(
            f"{name}: no such folder or file, and not a repository of the hub (owner/name) either"
        )
    return None


def download(repository: str | os.PathLike, patterns: Sequence[str], hub: dict[str, Any]) -> Path:
    """Download the files of a hub repository that match the patterns, and return its folder.

    `hub` goes to huggingface_hub's `snapshot_download`.
    """
    try:
        return Path(snapshot_download(str(repository), allow_patterns=list(patterns), **hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointError(
            f"{repository}: no such folder here, and the hub gave none by that name: {error}"
        ) from error


def model_folder(root: Path, subfolders: Sequence[str | None]) -> Path:
    """The first of the subfolders (None: `root` itself) that has a config.json.

    Raises CheckpointError saying what is there instead.
    """
    folders = [root / subfolder if subfolder else root for subfolder in subfolders]
    found = next((folder for folder in folders if (folder / CONFIG_NAME).is_file()), None)
    if found is not None:
        return found
    hint = ""
    if None in subfolders[:1] and (root / "model_index.json").is_file():
        hint = "; this is a pipeline's folder: its transformer is in subfolder='transformer'"
    elif files := _weights_in(folders[0]):
        hint = f"; to load one of the files in that folder, name the file itself: {files}"
    raise CheckpointError(f"{folders[0] / CONFIG_NAME}: no such file{hint}")


def weight_files(folder: Path, variant: str | None, name: str = WEIGHTS_NAME) -> list[Path]:
    """The safetensors files of a model's folder: one, or the shards that its index lists.

    `name` is what they are called without ending: diffusers' default, or transformers' "model".
    Raises CheckpointError naming the file that is missing.
    """
    stem = f"{name}.{variant}" if variant else name
    index = folder / (
        f"{name}.safetensors.index.{variant}.json" if variant else f"{name}.safetensors.index.json"
    )
    if not index.is_file():
        single = folder / f"{stem}.safetensors"
        if single.is_file() or single.is_symlink():
            return [single]
        there = _weights_in(folder)
        hint = (
            f"; it holds {there}. Only safetensors files are loaded, a pickle (.bin) never"
            if there
            else ""
        )
        raise CheckpointError(f"{folder}: neither {index.name} nor {single.name} is there{hint}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected a table weight_map from tensor names to files")
    shards = sorted({str(name) for name in weight_map.values()})
    for shard in shards:
        if not (folder / shard).is_file():
            keys = sorted(k for k, v in weight_map.items() if v == shard)
            raise CheckpointError(
                f"{folder / shard}: no such file; {index.name} places {shown(keys)} in it"
            )
    return [folder / shard for shard in shards]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError naming a file that holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def shown(names: Sequence[str]) -> str:
    """The first few of the names, and how many more there are, for a message."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _weights_in(folder: Path) -> str:
    if not folder.is_dir():
        return ""
    return shown(
        sorted(path.name for path in folder.iterdir() if path.suffix.lower() in WEIGHT_ENDINGS)
    )
