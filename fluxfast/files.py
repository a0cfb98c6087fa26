"""Files that are whole or absent: a crash leaves the old file or the new one, never a part.

They are written beside their place under a temporary name, synced to the disk, and renamed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".tmp"

# characters that some file system refuses in names, line breaks, and surrogates, which UTF-8 lacks
_NOT_IN_NAMES = re.compile(r'[\x00-\x1f\x7f-\x9f\u2028\u2029/\\:*?"<>|\ud800-\udfff]+')
# names that Windows reserves for devices
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_MAX_NAME_BYTES = 100


def safe_name(text: str) -> str:
    """A file's name for any text: the text itself if every file system accepts it.

    Otherwise it is cleaned, cut to 100 bytes, and ends in a hash of the text, so that different
    texts have different names.
    """
    name = _NOT_IN_NAMES.sub("_", text).strip(" ").strip(".")
    cut = name.encode()[:_MAX_NAME_BYTES].decode(errors="ignore")
    if cut == text and cut and not _RESERVED.fullmatch(cut):
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{cut.rstrip(' .')}-{digest}".lstrip("-")


def without_spaces(text: str) -> str:
    """A text as one word, for names that are typed in a shell: - stands for what parts words."""
    return re.sub(r"[^\w.+]+", "-", text).strip("-.") or "-"


def user_cache() -> Path:
    """The folder for what this user's runs compute once: $XDG_CACHE_HOME/fluxfast."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "fluxfast"


def short_path(path: Path) -> str:
    """A path for messages: absolute, with ~ for the home folder."""
    path = path.absolute()
    try:
        return str("~" / path.relative_to(Path.home()))
    except (ValueError, RuntimeError):
        return str(path)


def mark_used(path: Path) -> None:
    """Have the date of a file or folder of a cache say that it was used now, where that can be."""
    with suppress(OSError):
        os.utime(path)


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path` that only this process uses.

    `remove_leftovers` recognises it by its ending.
    """
    return path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as stream:
        stream.write(data)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes its name when the block ends without an exception.

    It then replaces what had that name.
    """
    with replacing(path, temporary_name(path)) as stream:
        yield stream
    sync_folder(path.parent)


@contextmanager
def replacing(path: Path, temporary: Path) -> Iterator[BinaryIO]:
    """`atomic_file` with a given temporary name, and without syncing the folder.

    One sync of the folder can then serve several files.
    """
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name when the block ends without an exception.

    It then replaces what had that name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
            else:
                sync_folder(file)
        sync_folder(temporary)
        remove_folder(path)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(path.parent)


def free_bytes(path: Path) -> int:
    """Bytes free on the disk that `path` would be written to."""
    # the folders nearest to `path` may not be there yet
    folder = next(folder for folder in path.absolute().parents if folder.is_dir())
    return shutil.disk_usage(folder).free


def remove_folder(path: Path) -> None:
    """Remove a folder so that a crash midway leaves nothing under its name."""
    if path.exists():
        doomed = path.with_name(f".{path.name}.removed.{os.getpid()}{TEMPORARY}")
        path.rename(doomed)
        shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed runs left under temporary names."""
    for entry in folder.glob(f".*{TEMPORARY}"):
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def sync_folder(folder: Path) -> None:
    # Windows can't open a folder, and does not need this
    """Make sure that a folder's entries are on the disk."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
