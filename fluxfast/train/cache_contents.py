"""What a cache holds, by kind, with sizes and dates: for `fluxfast-train cache` and starts."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal
from safetensors import SafetensorError, safe_open

from fluxfast.checkpoint import QUANTIZED
from fluxfast.config.precision_words import in_words
from fluxfast.data.cache_index import NAME, Index
from fluxfast.files import short_path

# by kind, what it is
KINDS = {
    "bases": "quantised transformers",
    "latents": "encoded images",
    "texts": "encoded captions",
    "images": "copies of images from elsewhere, and images made of others",
    "compiled": "what torch.compile has compiled",
    "doctor": "outcomes of checks of this machine",
}
# what runs write; the doctor's outcomes are a few KB
_FOLDERS = ("transformer", "vae", "text", "images", "generated", "compiled")
_HUB = re.compile(r"models--([^/\\]+?)--([^/\\]+)")
_UNKNOWN = "of an earlier version"


@dataclass(frozen=True)
class Kept:
    """A file or folder of a cache.

    Attributes:
        kind: one of KINDS.
        owner: whose it is, in words; several may be the same owner's.
        size: in bytes.
        used: when it was needed last, or written, in seconds since 1970.
    """

    path: Path
    kind: str
    owner: str
    size: int
    used: float


def contents(cache_dir: Path) -> Iterator[Kept]:
    """All that a cache holds, but for the indices of its folders."""
    for path in sorted((cache_dir / "transformer").glob("*.safetensors")):
        yield _kept(path, "bases", _base_of(path))
    for path in sorted((cache_dir / "transformer").glob(".*.tmp")):
        yield _kept(path, "bases", "unfinished files")
    for kind, top in (("latents", "vae"), ("latents", "generated"), ("texts", "text")):
        for folder in (cache_dir / top, *_folders(cache_dir / top)):
            yield from _tensors(folder, kind)
    for folder in _folders(cache_dir / "images"):
        yield _kept(folder, "images", folder.name)
    for folder in _folders(cache_dir / "generated"):
        if (folder / "images").is_dir():
            yield _kept(folder / "images", "images", folder.name)
    for kind in ("compiled", "doctor"):
        if (folder := cache_dir / kind).is_dir():
            yield _kept(folder, kind, KINDS[kind])


def remove(kept: Iterable[Kept]) -> int:
    """Remove these from the cache, and from its indices; returns the bytes that are free now."""
    freed = 0
    names: dict[Path, list[str]] = {}
    for each in kept:
        try:
            shutil.rmtree(each.path) if each.path.is_dir() else each.path.unlink()
        except FileNotFoundError:
            continue
        freed += each.size
        names.setdefault(each.path.parent, []).append(each.path.name)
    for folder, removed in names.items():
        if (folder / NAME).is_file():
            index = Index(folder / NAME)
            index.forget_entries(removed)
            index.close()
    return freed


def tell_size(cache_dir: Path, say: Callable[[str], None]) -> None:
    """Say how large a cache is, unless nothing of a run's is in it."""
    size = sum(size_of(cache_dir / folder) for folder in _FOLDERS)
    if size:
        say(
            f"cache: {decimal(size)} in {short_path(cache_dir)} "
            "(`fluxfast-train cache` lists and clears it)"
        )


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    try:
        if not path.is_dir():
            return path.stat().st_size
        return sum(size_of(inner) for inner in path.iterdir() if not inner.is_symlink())
    except FileNotFoundError:
        # removed meanwhile
        return 0


def _folders(path: Path) -> list[Path]:
    return sorted(each for each in path.iterdir() if each.is_dir()) if path.is_dir() else []


def _kept(path: Path, kind: str, owner: str) -> Kept:
    return Kept(path, kind, owner, size_of(path), path.stat().st_mtime)


def _tensors(folder: Path, kind: str) -> Iterator[Kept]:
    """The entries of a folder of cached tensors."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return
    uses = {}
    if (folder / NAME).is_file():
        index = Index(folder / NAME)
        uses = index.uses()
        index.close()
    for path in files:
        try:
            found = path.stat()
        except FileNotFoundError:
            continue
        owner, used = uses.get(path.name, (_UNKNOWN, found.st_mtime))
        yield Kept(path, kind, owner, found.st_size, used)


def _base_of(path: Path) -> str:
    """What a quantised base is, in words: its model and its format."""
    try:
        with safe_open(path, "np") as file:
            told = json.loads((file.metadata() or {}).get(QUANTIZED, "{}"))
        source, format = told["source"], told["format"]
    except (SafetensorError, OSError, ValueError, KeyError):
        return f"{path.name}, which can't be read"
    hub = _HUB.search(source)
    model = f"{hub[1]}/{hub[2]}" if hub else source
    return f"{model}, {in_words(format)}"
