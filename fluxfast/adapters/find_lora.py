"""Finding the file of a LoRA, or of another adapter, and opening it.

It is given as a file, a folder, or a repository of the Hugging Face Hub, which is downloaded once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from safetensors import SafetensorError, safe_open

from fluxfast.adapters.lora_alpha import ADAPTER_CONFIG, PEFT_WEIGHTS
from fluxfast.checkpoint.not_safetensors import begins_like_safetensors, is_pickle, read_head
from fluxfast.config.public import HUB_LORA, is_hub_lora

_SUFFIX = ".safetensors"
_KNOWN_NAMES = (LORA_WEIGHT_NAME_SAFE, PEFT_WEIGHTS)
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def find_lora(lora: str | os.PathLike[str]) -> tuple[Path, list[str]]:
    """The safetensors file that `lora` names, and lines for the user on where it was found.

    `lora` is a file, whatever its name ends in, a folder that holds one LoRA, or, where neither
    exists, a Hub repository: `owner/name`, or `owner/name/<file>` if it holds several.
    ValueError where there is none, several, or another kind of file.
    """
    path = Path(lora).expanduser()
    notes: list[str] = []
    if path.is_dir():
        files = [
            entry.name for entry in path.iterdir() if entry.is_file() and _may_be_weights(entry)
        ]
        path = path / _choose(files, str(path), "give the file's path")
    elif not path.is_file():
        repository = HUB_LORA.fullmatch(os.fspath(lora))
        if repository is None or not is_hub_lora(os.fspath(lora)):
            raise ValueError(f"{lora}: no such LoRA file or folder")
        path = _from_hub(repository[1], repository[2])
        notes = [
            f"{lora}: {path.name} of the Hugging Face Hub's repository, commit {_commit(path)}"
        ]
    _check_content(path)
    return path, notes


def _may_be_weights(file: Path) -> bool:
    return not file.name.startswith(".") and (
        file.suffix == _SUFFIX or _begins_like_safetensors(file)
    )


def _begins_like_safetensors(file: Path) -> bool:
    """Whether a file begins with a header of safetensors that ends before the file does."""
    head = read_head(file)
    length = int.from_bytes(head[:8], "little")
    return begins_like_safetensors(head) and 8 + length <= file.stat().st_size


def _check_content(file: Path) -> None:
    if _begins_like_safetensors(file):
        return
    if is_pickle(read_head(file)) or file.suffix in _PICKLE_SUFFIXES:
        raise ValueError(
            f"{file}: a pickle, not a safetensors file; pickled formats are never loaded, since "
            "they can run code: convert it first"
        )
    raise ValueError(
        f"{file}: not a whole safetensors file (it has {file.stat().st_size:,} bytes, and does "
        "not begin with a header that fits into them): an interrupted download, or another kind "
        "of file"
    )


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A reader of safetensors for a file; ValueError where the library can't read it."""
    try:
        with safe_open(file, framework="pt") as reader:
            yield reader
    except SafetensorError as error:
        raise ValueError(
            f"{file}: not a whole safetensors file, or not one that can be opened ({error})"
        ) from error


def header_of(file: Path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """The shapes of a file's tensors by their keys, and its metadata."""
    with opened(file) as reader:
        names = list(reader.keys())
        return {name: reader.get_slice(name).get_shape() for name in names}, dict(
            reader.metadata() or {}
        )


def _choose(names: Iterable[str], where: str, how: str) -> str:
    """The one LoRA among a folder's files.

    It has the name that diffusers or PEFT gives it, or else it is the only file there is.
    """
    files = sorted(names)
    candidates = [name for name in _KNOWN_NAMES if name in files] or files
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise ValueError(
            f"{where}: expected one LoRA, {LORA_WEIGHT_NAME_SAFE}, in it; found 0 safetensors files"
        )
    raise ValueError(
        f"{where}: expected one LoRA in it; found {len(candidates)} files that may be it: "
        f"{', '.join(candidates)}. To choose one, {how}"
    )


def _choose_in_repository(names: Iterable[str], repository: str, wanted: str | None) -> str:
    weights = [name for name in names if name.endswith(_SUFFIX)]
    if wanted is not None:
        if wanted not in weights:
            raise ValueError(
                f"{repository}: holds no {wanted}; its safetensors files: "
                f"{', '.join(sorted(weights)) or 'none'}"
            )
        return wanted
    at_root = [name for name in weights if "/" not in name]
    return _choose(at_root or weights, repository, f"give {repository}/<file>")


def _from_hub(repository: str, wanted: str | None) -> Path:
    """The file in the Hub's cache on this machine, downloaded with its settings if it isn't there.

    The cache is used without asking the Hub where it is certain which file is meant, and where the
    Hub can't be asked. The settings are PEFT's `adapter_config.json`.
    """
    if (cached := _cached(repository, wanted)) and (wanted or cached.name in _KNOWN_NAMES):
        return cached
    try:
        return _download(repository, wanted)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        if cached:
            return cached
        name = f"{repository}/{wanted}" if wanted else repository
        # a dry run's error doesn't say what went wrong; its cause does
        raise ValueError(
            f"{name}: not a file or folder here, and the Hugging Face Hub gave no LoRA by that "
            f"name: {error.__cause__ or error}\n"
            "Check the name; for a private or gated repository log in with `hf auth login`."
        ) from error


def _cached(repository: str, wanted: str | None) -> Path | None:
    """The file in the cache, if it is known whether settings lie beside it; else None."""
    try:
        folder = Path(
            snapshot_download(
                repository, allow_patterns=[f"*{ADAPTER_CONFIG}"], local_files_only=True
            )
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    names = [entry.relative_to(folder).as_posix() for entry in folder.rglob(f"*{_SUFFIX}")]
    if not names or (wanted is not None and wanted not in names):
        return None
    name = _choose_in_repository(names, repository, wanted)
    # None means that nobody has asked the Hub for the settings yet, so they may say alpha
    known = try_to_load_from_cache(repository, _settings_beside(name)) is not None
    return folder / name if known else None


def _download(repository: str, wanted: str | None) -> Path:
    listing = snapshot_download(repository, allow_patterns=[f"*{_SUFFIX}"], dry_run=True)
    name = _choose_in_repository([file.filename for file in listing], repository, wanted)
    try:
        hf_hub_download(repository, _settings_beside(name))
    except LocalEntryNotFoundError:
        # this is an EntryNotFoundError too, but it says that the connection was lost
        raise
    except EntryNotFoundError:
        # only PEFT writes settings; the cache now remembers that there are none
        pass
    return Path(hf_hub_download(repository, name))


def _settings_beside(name: str) -> str:
    return str(PurePosixPath(name).parent / ADAPTER_CONFIG)


def _commit(file: Path) -> str:
    """The first digits of the commit of a file in the cache, .../snapshots/<commit>/<file>."""
    return file.as_posix().rpartition("/snapshots/")[2][:8]
