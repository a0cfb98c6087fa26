"""Where a LoRA comes from: a file, a folder, or a repository of the Hugging Face Hub, which is
downloaded once.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)

from fluxfast.adapters.lora_settings import ADAPTER_CONFIG, PEFT_WEIGHTS

_SUFFIX = ".safetensors"
# owner/name, or owner/name/<a file in it>
_REPOSITORY = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/(.+\.safetensors))?")
_KNOWN_NAMES = (LORA_WEIGHT_NAME_SAFE, PEFT_WEIGHTS)
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def find_lora(lora: str | os.PathLike[str]) -> tuple[Path, list[str]]:
    """The safetensors file that `lora` names, and lines to tell the user about where it was found.

    `lora` is a file (of any ending: its content tells), a folder that holds one LoRA, or, where
    neither exists, a Hub repository: `owner/name`, or `owner/name/<file>` if it holds several.
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
        repository = _REPOSITORY.fullmatch(os.fspath(lora))
        # two parts are a path where the second is a file's name
        if repository is None or (repository[2] is None and path.suffix == _SUFFIX):
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
    with file.open("rb") as stream:
        head = stream.read(9)
    # the header's length, then the header, which is JSON
    return head[8:] == b"{" and 8 + int.from_bytes(head[:8], "little") <= file.stat().st_size


def _check_content(file: Path) -> None:
    if _begins_like_safetensors(file):
        return
    with file.open("rb") as stream:
        head = stream.read(4)
    # a zip archive, as torch.save writes it, or a bare pickle from protocol 2 on
    pickled = head == b"PK\x03\x04" or (
        head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    )
    if pickled or file.suffix in _PICKLE_SUFFIXES:
        raise ValueError(
            f"{file}: a pickle, not a safetensors file; pickled formats are never loaded, since "
            "they can run code: convert it "
            "first"
        )
    raise ValueError(
        f"{file}: not a whole safetensors file (it has {file.stat().st_size:,} bytes, and does "
        "not begin with a header that "
        "fits into them): an interrupted download, or another kind of file"
    )


def _choose(names: Iterable[str], where: str, how: str) -> str:
    """The one LoRA among a folder's files: the name that diffusers or PEFT gives it, else the only
    one there is.
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
        f"{', '.join(candidates)}. "
        f"To choose one, {how}"
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
    """The file in the Hub's cache on this machine, downloaded if it isn't there; beside it,
    `adapter_config.json`.

    The cache is used without asking the Hub where it is certain which file is meant, else where the
    Hub can't be asked.
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
            "name: "
            f"{error.__cause__ or error}\nCheck the name; for a private or gated repository log "
            "in with `hf auth login`."
        ) from error


def _cached(repository: str, wanted: str | None) -> Path | None:
    """The file, where it was downloaded before and it is known whether settings lie beside it; else
    None.
    """
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
    # None: nobody has asked the Hub for it yet, so alpha may lie there
    known = try_to_load_from_cache(repository, _settings_beside(name)) is not None
    return folder / name if known else None


def _download(repository: str, wanted: str | None) -> Path:
    listing = snapshot_download(repository, allow_patterns=[f"*{_SUFFIX}"], dry_run=True)
    name = _choose_in_repository([file.filename for file in listing], repository, wanted)
    try:
        hf_hub_download(repository, _settings_beside(name))
    except LocalEntryNotFoundError:
        # a kind of EntryNotFoundError, but it says that the connection was lost
        raise
    except EntryNotFoundError:
        # only PEFT writes settings; the cache remembers that there are none
        pass
    return Path(hf_hub_download(repository, name))


def _settings_beside(name: str) -> str:
    return str(PurePosixPath(name).parent / ADAPTER_CONFIG)


def _commit(file: Path) -> str:
    """The first digits of the commit, from where the Hub's cache keeps its files:
    .../snapshots/<commit>/<file>.
    """
    return file.as_posix().rpartition("/snapshots/")[2][:8]
