"""Tensors computed once and kept on disk: one safetensors file an entry, and an index in SQLite.

An entry is found by (key, fingerprint): the key says what it belongs to (an image, a caption), the fingerprint everything that
its value depends on. A changed fingerprint is another entry, so settings can be switched back and forth, and runs with
different settings can share a folder.

A file says for itself what it holds (key, fingerprint and checksum are in its header) and appears under its name only when
it is complete and on disk. The index is never needed to read an entry. It only tells a start which files are there and
untouched, without opening thousands of them; lost or damaged, it is made anew. So a kill at any moment costs at most the
entries being written. The index keeps SQLite's rollback journal, as its WAL mode doesn't work on network file systems.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import socket
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from uuid import uuid4

import safetensors.torch
import torch
from safetensors import SafetensorError

from fluxfast.files import replacing, sync_folder

logger = logging.getLogger(__name__)

Tensors = Mapping[str, torch.Tensor]

_INDEX_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    key TEXT NOT NULL, fingerprint TEXT NOT NULL, file TEXT NOT NULL,
    size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, created REAL NOT NULL,
    PRIMARY KEY (key, fingerprint)
);
CREATE TABLE IF NOT EXISTS files (
    name TEXT PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, facts TEXT NOT NULL
);
"""
# a write takes seconds at the very most, so older than this its temporary file was left by a process that died elsewhere
_ORPHAN_AGE_S = 3600.0
_TEMPORARY = re.compile(r"\.[0-9a-f]{40}\.(?P<host>.*)@(?P<pid>\d+)\.[0-9a-f]{32}\.tmp")


def fingerprint(*parts: object) -> str:
    """A hash of JSON-able values: equal parts, equal fingerprint, on any machine."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class TensorCache:
    """A folder of cached tensors; any number of threads and processes may use it at the same time."""

    def __init__(self, folder: str | Path) -> None:
        """Open or create the cache in `folder`.

        Raises:
            ValueError: `folder` can't be created or is not a folder.
        """
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cache folder {self.folder}: can't be created: {error.strerror}") from error
        self._lock = threading.Lock()
        self._remove_orphans()
        self._db = _open_index(self.folder / "index.sqlite")

    def close(self) -> None:
        """Close the index; entries can be read nonetheless."""
        self._db.close()

    def get(self, key: str, fingerprint: str) -> dict[str, torch.Tensor] | None:
        """The entry's tensors, on the CPU; None if it is absent.

        A damaged entry is removed with a warning that names it, and counts as absent.
        """
        blob = self._blob(key, fingerprint)
        try:
            return _decode(blob.read_bytes(), key, fingerprint)
        except FileNotFoundError:
            return None
        except _DamagedBlob as error:
            logger.warning("cache file %s (%s) is damaged (%s): removed, to be computed again", blob, key, error)
            blob.unlink(missing_ok=True)
            return None

    def put(self, key: str, fingerprint: str, tensors: Tensors) -> None:
        """Store an entry: it is on disk when this returns, and an earlier one is replaced whole."""
        self.put_many([(key, fingerprint, tensors)])

    def put_many(self, entries: Iterable[tuple[str, str, Tensors]]) -> None:
        """`put` for several (key, fingerprint, tensors), in one transaction."""
        rows = []
        for key, fingerprint, tensors in entries:
            blob = self._blob(key, fingerprint)
            _write_whole(blob, _encode(key, fingerprint, tensors))
            rows.append(_row(key, fingerprint, blob))
        sync_folder(self.folder)
        self._index(rows)

    def missing(self, wanted: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """Those of the (key, fingerprint) pairs that must be computed, in the given order.

        A file that the index doesn't know as it is (new, copied, touched or cut since) is read and checked.
        """
        missing, found = [], []
        for key, fingerprint in dict.fromkeys(wanted):
            blob = self._blob(key, fingerprint)
            with self._lock:
                known = self._db.execute(
                    "SELECT size, mtime_ns FROM entries WHERE key = ? AND fingerprint = ?", (key, fingerprint)
                ).fetchone()
            try:
                stat = blob.stat()
            except FileNotFoundError:
                if known:
                    logger.warning("cache file %s (%s) is gone: to be computed again", blob, key)
                missing.append((key, fingerprint))
                continue
            if known == (stat.st_size, stat.st_mtime_ns):
                continue
            if self.get(key, fingerprint) is None:
                missing.append((key, fingerprint))
            else:
                found.append(_row(key, fingerprint, blob))
        if found:
            self._index(found)
        return missing

    def file_facts(self, name: str, stat: os.stat_result) -> dict | None:
        """What `remember_files` was told of the file `name`, if its size and modification time are still the same."""
        with self._lock:
            row = self._db.execute("SELECT size, mtime_ns, facts FROM files WHERE name = ?", (name,)).fetchone()
        return json.loads(row[2]) if row and row[:2] == (stat.st_size, stat.st_mtime_ns) else None

    def remember_files(self, files: Iterable[tuple[str, os.stat_result, dict]]) -> None:
        """Keep JSON-able facts (a hash, a size in pixels) of files that are dear to read; `name` is any unique name."""
        rows = [(name, stat.st_size, stat.st_mtime_ns, json.dumps(facts)) for name, stat, facts in files]
        with self._lock, self._db:
            self._db.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", rows)

    def _blob(self, key: str, fingerprint: str) -> Path:
        return self.folder / (hashlib.sha256(f"{key}\0{fingerprint}".encode()).hexdigest()[:40] + ".safetensors")

    def _index(self, rows: list[tuple]) -> None:
        with self._lock, self._db:
            self._db.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?)", rows)

    def _remove_orphans(self) -> None:
        for temporary in self.folder.glob(".*.tmp"):
            named = _TEMPORARY.fullmatch(temporary.name)
            if not named:
                continue
            # another process may remove it first
            with contextlib.suppress(FileNotFoundError):
                old = time.time() - temporary.stat().st_mtime > _ORPHAN_AGE_S
                if old or (named["host"] == socket.gethostname() and not _is_alive(int(named["pid"]))):
                    temporary.unlink()


class _DamagedBlob(Exception):
    pass


def _row(key: str, fingerprint: str, blob: Path) -> tuple:
    stat = blob.stat()
    return key, fingerprint, blob.name, stat.st_size, stat.st_mtime_ns, time.time()


def _encode(key: str, fingerprint: str, tensors: Tensors) -> bytes:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"key": key, "fingerprint": fingerprint, "crc32": str(_checksum(plain))}
    return safetensors.torch.save(plain, metadata)


def _decode(data: bytes, key: str, fingerprint: str) -> dict[str, torch.Tensor]:
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        raise _DamagedBlob(str(error)) from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = header.get("__metadata__", {})
    if (metadata.get("key"), metadata.get("fingerprint")) != (key, fingerprint):
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
    temporary = path.with_name(f".{path.stem}.{socket.gethostname()}@{os.getpid()}.{uuid4().hex}.tmp")
    with replacing(path, temporary) as stream:
        stream.write(data)


def _is_alive(pid: int) -> bool:
    # signal 0 asks on POSIX, but kills on Windows; there the age decides
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _open_index(path: Path) -> sqlite3.Connection:
    try:
        return _connect(path)
    except sqlite3.OperationalError as error:
        raise ValueError(f"cache index {path}: can't be opened: {error}") from error
    except sqlite3.DatabaseError as error:
        logger.warning("cache index %s is damaged (%s): making a new one from the cached files", path, error)
        path.unlink()
        path.with_name(path.name + "-journal").unlink(missing_ok=True)
        return _connect(path)


def _connect(path: Path) -> sqlite3.Connection:
    # check_same_thread: each use is under the cache's lock; timeout: another process may hold the file for a while
    db = sqlite3.connect(path, timeout=60, check_same_thread=False)
    try:
        (check,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if check != "ok":
            raise sqlite3.DatabaseError(check)
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version not in (0, _INDEX_VERSION):
            raise sqlite3.DatabaseError(f"version {version}, not {_INDEX_VERSION}")
        if version == 0:
            db.executescript(f"{_SCHEMA} PRAGMA user_version = {_INDEX_VERSION};")
    except BaseException:
        db.close()
        raise
    return db
