"""Tensors that are computed once and kept on disk: one safetensors file an entry, and an index.

An entry is found by (key, fingerprint). The key says what it belongs to (an image, a caption), the
fingerprint stands for everything that its value depends on. A changed fingerprint makes another
entry, so settings can be switched back and forth, and runs with different settings can share a
folder.

A file says itself what it holds: its header has the key, the fingerprint and a checksum. It appears
under its name only when it is complete and on disk. The index (`cache_index`) is never needed to
read an entry: it only tells a start which files are there and unchanged, without opening thousands
of them, and is made anew if it is lost or damaged. So a kill at any moment costs at most the
entries that were being written.

Every read compares the checksum. A start compares as many as it can in a few seconds, so that
damage in a small cache is found, and computed anew, before the first step. In a large cache each
start goes on where the last one stopped.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import socket
import time
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from uuid import uuid4

import safetensors.torch
import torch
from safetensors import SafetensorError

from fluxfast.data.cache_index import NAME, Index, stamp
from fluxfast.files import free_bytes, replacing, sync_folder
from fluxfast.text import printable, to_bytes

logger = logging.getLogger(__name__)

Tensors = Mapping[str, torch.Tensor]

# a local disk reads several GB in that time
VERIFY_SECONDS = 3.0
NEVER = -1.0
# errors of a disk that fails, as opposed to those of a file that may not be read
_FAILING = (errno.EIO, errno.EBADMSG, getattr(errno, "EUCLEAN", errno.EIO))
# a write takes seconds at most, so an older temporary file was left by a process that died, perhaps
# on another machine
_ORPHAN_AGE_S = 3600.0
_TEMPORARY = re.compile(r"\.[0-9a-f]{40}\.(?P<host>.*)@(?P<pid>\d+)\.[0-9a-f]{32}\.tmp")


def fingerprint(*parts: object) -> str:
    """A hash of JSON-able values: equal values give equal hashes on any machine."""
    return hashlib.sha256(
        to_bytes(json.dumps(parts, sort_keys=True, ensure_ascii=False))
    ).hexdigest()


class CacheNotWritten(ValueError):
    """An entry that the disk doesn't take, because it is full for one."""


class TensorCache:
    """A folder of cached tensors, for any number of threads and processes at a time."""

    def __init__(self, folder: str | Path) -> None:
        """Open or create the cache in `folder`.

        Raises ValueError if `folder` can't be created or is not a folder.
        """
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"cache folder {self.folder}: can't be created: {error.strerror}"
            ) from error
        self._remove_orphans()
        self._index = Index(self.folder / NAME)
        self._writable = True

    def close(self) -> None:
        """Close the index. Entries can still be read."""
        self._index.close()

    def get(self, key: str, fingerprint: str) -> dict[str, torch.Tensor] | None:
        """The entry's tensors, on the CPU; None if it is absent.

        A damaged entry is removed with a warning that names it, and counts as absent. Raises
        ValueError if the file may not be read.
        """
        blob = self._blob(key, fingerprint)
        try:
            return _decode(_read(blob), key, fingerprint)
        except FileNotFoundError:
            return None
        except _DamagedBlob as error:
            logger.warning(
                "cache file %s (%s) is damaged (%s): removed, to be computed again",
                blob,
                _shortened(key),
                error,
            )
            with contextlib.suppress(OSError):
                blob.unlink()
            return None

    def put(self, key: str, fingerprint: str, tensors: Tensors) -> None:
        """Store an entry, in place of an earlier one. It is on disk when this returns.

        Raises CacheNotWritten if it can't be written; the entries before it stay.
        """
        self.put_many([(key, fingerprint, tensors)])

    def put_many(self, entries: Iterable[tuple[str, str, Tensors]]) -> None:
        """`put` for several (key, fingerprint, tensors), in one transaction."""
        rows = []
        for key, fingerprint, tensors in entries:
            blob = self._blob(key, fingerprint)
            try:
                _write_whole(blob, _encode(key, fingerprint, tensors))
            except OSError as error:
                raise CacheNotWritten(
                    f"cache folder {self.folder}: {_shortened(key)} can't be written: "
                    f"{error.strerror or error} ({free_bytes(blob) / 1e9:.2f} GB left). "
                    "Make room or give the folder back its permissions, or name a folder on "
                    "another disk; what was encoded before is kept, and the same command goes on "
                    "from there"
                ) from error
            rows.append((blob.name, stamp(blob.stat())))
        sync_folder(self.folder)
        self._index.put_entries(rows)

    def put_if_possible(self, key: str, fingerprint: str, tensors: Tensors) -> None:
        """`put`, for an entry that can be done without: where it fails, one warning says so."""
        try:
            self.put(key, fingerprint, tensors)
            self._writable = True
        except ValueError as error:
            if self._writable:
                logger.warning("%s. Until then it is computed whenever it is needed", error)
            self._writable = False

    def drop(self, entries: Iterable[tuple[str, str]]) -> None:
        """Delete the entries of these (key, fingerprint) pairs, where they are there."""
        blobs = [self._blob(*entry) for entry in entries]
        for blob in blobs:
            blob.unlink(missing_ok=True)
        self._index.forget_entries(blob.name for blob in blobs)

    def note_use(self, entries: Iterable[tuple[str, str]], owner: str) -> None:
        """Note that a run needs these (key, fingerprint) pairs, whether they are there or not.

        owner: whose they are, for people, such as a dataset's name.
        """
        self._index.put_uses((self._blob(*entry).name for entry in entries), owner)

    def adopt(self, wanted: Mapping[tuple[str, str], tuple[str, str]]) -> list[tuple[str, str]]:
        """Give entries their present (key, fingerprint) that an earlier version named otherwise.

        wanted: absent pairs, each with the pair that an earlier version stored it under. Returns
        those that are still absent.
        """
        absent = []
        for new, old in wanted.items():
            tensors = self.get(*old) if self._blob(*old).exists() else None
            if tensors is None:
                absent.append(new)
            else:
                self.put(*new, tensors)
                self.drop([old])
        return absent

    def missing(
        self, wanted: Iterable[tuple[str, str]], *, verify_seconds: float = VERIFY_SECONDS
    ) -> list[tuple[str, str]]:
        """Those of the (key, fingerprint) pairs that must be computed, in the given order.

        A file that is not as the index knows it (new, copied, touched or cut since) is read and
        checked. The others are checked too, for `verify_seconds`, beginning with the one whose last
        check is longest ago: a failing disk changes a file without any sign.
        """
        entries, known = list(dict.fromkeys(wanted)), self._index.entries()
        absent = set()
        # (when it was checked last, its position for a stable order, its stamp)
        to_check: list[tuple[float, int, str]] = []
        for position, entry in enumerate(entries):
            blob = self._blob(*entry)
            row = known.get(blob.name)
            try:
                now = stamp(blob.stat())
            except FileNotFoundError:
                if row:
                    logger.warning(
                        "cache file %s (%s) is gone: to be computed again",
                        blob,
                        _shortened(entry[0]),
                    )
                absent.add(entry)
                continue
            to_check.append((row.checked if row and row.stamp == now else NEVER, position, now))
        checked = []
        deadline = time.monotonic() + verify_seconds
        for when, position, now in sorted(to_check):
            if when != NEVER and time.monotonic() >= deadline:
                break
            entry = entries[position]
            if self.get(*entry) is None:
                absent.add(entry)
            else:
                checked.append((self._blob(*entry).name, now))
        self._index.put_entries(checked)
        return [entry for entry in entries if entry in absent]

    def file_facts(self, name: str, stat: os.stat_result) -> dict | None:
        """What `remember_files` was told of this file; None if the file has been written since."""
        return self._index.facts(name, stamp(stat))

    def remember_files(self, files: Iterable[tuple[str, os.stat_result, dict]]) -> None:
        """Keep JSON-able facts of files that take long to read, such as a hash or a size in pixels.

        Each file comes as (any unique name, its stat result, facts).
        """
        self._index.put_facts((name, stamp(stat), facts) for name, stat, facts in files)

    def _blob(self, key: str, fingerprint: str) -> Path:
        return self.folder / (
            hashlib.sha256(to_bytes(f"{key}\0{fingerprint}")).hexdigest()[:40] + ".safetensors"
        )

    def _remove_orphans(self) -> None:
        for temporary in self.folder.glob(".*.tmp"):
            named = _TEMPORARY.fullmatch(temporary.name)
            if not named:
                continue
            # another process may remove it first
            with contextlib.suppress(FileNotFoundError):
                old = time.time() - temporary.stat().st_mtime > _ORPHAN_AGE_S
                if old or (
                    named["host"] == socket.gethostname() and not _is_alive(int(named["pid"]))
                ):
                    temporary.unlink()


class _DamagedBlob(Exception):
    pass


def _shortened(key: str) -> str:
    """A key for messages: captions may be long, have several lines, or be empty."""
    text = printable(key)
    return f'"{text}"' if len(text) <= 80 else f'"{text[:80]}…"'


def _read(blob: Path) -> bytes:
    try:
        return blob.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in _FAILING:
            raise _DamagedBlob(f"the disk can't read it: {error.strerror}") from error
        raise ValueError(f"cache file {blob}: can't be read: {error.strerror}") from error


def _label(key: str) -> str:
    """A key as a header can hold it, in UTF-8.

    Keys that look alike here have different file names.
    """
    return key.encode("utf-8", "backslashreplace").decode()


def _encode(key: str, fingerprint: str, tensors: Tensors) -> bytes:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"key": _label(key), "fingerprint": fingerprint, "crc32": str(_checksum(plain))}
    return safetensors.torch.save(plain, metadata)


def _decode(data: bytes, key: str, fingerprint: str) -> dict[str, torch.Tensor]:
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")].decode())
    # a header may name a dtype that torch lacks, or be JSON to safetensors and not to Python
    except (
        SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
    ) as error:
        raise _DamagedBlob(str(error)) from error
    metadata = header.get("__metadata__", {})
    if (metadata.get("key"), metadata.get("fingerprint")) != (_label(key), fingerprint):
        raise _DamagedBlob("it holds something else")
    if metadata.get("crc32") != str(_checksum(tensors)):
        raise _DamagedBlob("its checksum differs")
    return tensors


def _checksum(tensors: Tensors) -> int:
    checksum = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        checksum = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, checksum)
    return checksum


def _write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears under its name only once it is complete and on disk."""
    temporary = path.with_name(
        f".{path.stem}.{socket.gethostname()}@{os.getpid()}.{uuid4().hex}.tmp"
    )
    with replacing(path, temporary) as stream:
        stream.write(data)


def _is_alive(pid: int) -> bool:
    # on POSIX signal 0 only asks; on Windows it would kill, so there the file's age decides
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
