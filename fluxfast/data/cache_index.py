"""The index of a folder of cached tensors, in SQLite: known files, their last use, facts of files.

Nothing in it is indispensable, since what it lacks is found out again. So whatever is wrong with it
(a missing table, a page that makes no sense, a flipped bit) ends in a warning and a new index. It
keeps SQLite's rollback journal, because WAL mode does not work on network file systems.
"""

import json
import logging
import os
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

from fluxfast.files import short_path
from fluxfast.text import to_bytes

logger = logging.getLogger(__name__)

T = TypeVar("T")

# sqlite3 raises UnicodeDecodeError where it would put a damaged name into its own error
_Errors = (sqlite3.Error, UnicodeDecodeError)

# of the index's file, in the folder of the tensors
NAME = "index.sqlite"
_VERSION = 2
# names of files are stored as bytes, since they may be no valid text
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    file TEXT PRIMARY KEY, stamp TEXT NOT NULL, checked REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS files (
    name BLOB PRIMARY KEY, stamp TEXT NOT NULL, facts TEXT NOT NULL, crc32 INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS uses (
    file TEXT PRIMARY KEY, used REAL NOT NULL, owner TEXT NOT NULL
) WITHOUT ROWID;
"""
# SQLite's messages about the disk and other processes, as opposed to the file's content
_OF_THE_SYSTEM = ("locked", "unable to open", "is full", "disk i/o")


def owner_of_images(id: str, folder: Path) -> str:
    """Whose the entries of a dataset's images are, as the index has it and people read it."""
    return f"{id} ({short_path(folder)})"


def owner_of_captions(pipeline: str) -> str:
    """Whose the entries of captions are. pipeline: the folder or repository of the encoders."""
    folder = Path(pipeline).expanduser()
    return f"captions for {short_path(folder) if folder.is_dir() else pipeline}"


def has_entries(folder: Path, owner: str) -> bool:
    """Whether `owner` has used a folder of cached tensors before."""
    if not (folder / NAME).is_file():
        return False
    index = Index(folder / NAME)
    try:
        return any(use.owner == owner for use in index.uses().values())
    finally:
        index.close()


def stamp(stat: os.stat_result) -> str:
    """A text that changes whenever a file does, made without reading the file.

    Tools that copy files may restore size and time of modification, but neither the inode nor the
    time of the change itself. Where a file system invents these two, a file is read once more than
    needed.
    """
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ino} {stat.st_ctime_ns}"


class Known(NamedTuple):
    """A cached file when its checksum was last verified: its stamp then, and that time.

    `checked` is in seconds since 1970.
    """

    stamp: str
    checked: float


class Use(NamedTuple):
    """Who last needed a cached file, in words, and when, in seconds since 1970."""

    owner: str
    used: float


class Index:
    """The index in one file, for any number of threads and processes at a time."""

    def __init__(self, path: Path) -> None:
        """Open or create it. Raises ValueError if that fails."""
        self._path = path
        self._lock = threading.Lock()
        try:
            self._db = _connect(path)
        except _Errors as error:
            _check_damage(path, error)
            self._db = _made_anew(path, error)

    def close(self) -> None:
        self._db.close()

    def entries(self) -> dict[str, Known]:
        """Every cached file, by its name."""
        rows = self._do(
            lambda db: db.execute("SELECT file, stamp, checked FROM entries").fetchall()
        )
        return {
            file: Known(stamp, checked)
            for file, stamp, checked in rows
            if isinstance(checked, float)
        }

    def put_entries(self, entries: Iterable[tuple[str, str]]) -> None:
        """Note the (name, stamp) of files whose checksum is known to be right."""
        now = time.time()
        rows = [(file, stamp, now) for file, stamp in entries]
        if rows:
            self._do(
                lambda db: db.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", rows)
            )

    def forget_entries(self, files: Iterable[str]) -> None:
        """Files of these names are there no more."""
        rows = [(file,) for file in files]

        def forget(db: sqlite3.Connection) -> None:
            db.executemany("DELETE FROM entries WHERE file = ?", rows)
            db.executemany("DELETE FROM uses WHERE file = ?", rows)

        self._do(forget)

    def uses(self) -> dict[str, Use]:
        """What is known of each file's last use, by its name; files need not be there any more."""
        rows = self._do(lambda db: db.execute("SELECT file, owner, used FROM uses").fetchall())
        return {
            file: Use(owner, used)
            for file, owner, used in rows
            if isinstance(owner, str) and isinstance(used, float)
        }

    def put_uses(self, files: Iterable[str], owner: str) -> None:
        """Note that `owner` needs these files now."""
        now = time.time()
        rows = [(file, now, owner) for file in files]
        if rows:
            self._do(
                lambda db: db.executemany("INSERT OR REPLACE INTO uses VALUES (?, ?, ?)", rows)
            )

    def facts(self, name: str, stamp: str) -> dict | None:
        """What `put_facts` was told of the file `name`; None if its stamp was another one."""
        key = to_bytes(name)
        row = self._do(
            lambda db: db.execute(
                "SELECT stamp, facts, crc32 FROM files WHERE name = ?", (key,)
            ).fetchone()
        )
        if row is None or row[0] != stamp or row[2] != _row_checksum(key, stamp, row[1]):
            return None
        return json.loads(row[1])

    def put_facts(self, files: Iterable[tuple[str, str, dict]]) -> None:
        """Keep JSON-able facts of files, given as (name, stamp, facts)."""
        rows = []
        for name, stamp, facts in files:
            key, text = to_bytes(name), json.dumps(facts)
            rows.append((key, stamp, text, _row_checksum(key, stamp, text)))
        if rows:
            self._do(
                lambda db: db.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", rows)
            )

    def _do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` in a transaction, and once more in a new index if this one is damaged."""
        with self._lock:
            try:
                with self._db:
                    return work(self._db)
            except _Errors as error:
                _check_damage(self._path, error)
                self._db.close()
                self._db = _made_anew(self._path, error)
                with self._db:
                    return work(self._db)


def _check_damage(path: Path, error: Exception) -> None:
    """Raise ValueError if an error comes from the system and not from what the file holds."""
    assert not isinstance(error, sqlite3.ProgrammingError), error
    if isinstance(error, sqlite3.OperationalError) and any(
        text in str(error).lower() for text in _OF_THE_SYSTEM
    ):
        raise ValueError(
            f"cache index {path}: can't be used: {error}. Make room or give the folder back its "
            "permissions; the same command goes on from there"
        ) from error


def _made_anew(path: Path, error: Exception) -> sqlite3.Connection:
    logger.warning(
        "cache index %s is damaged, or of another version (%s): making a new one", path, error
    )
    try:
        path.unlink()
        path.with_name(path.name + "-journal").unlink(missing_ok=True)
        return _connect(path)
    except (OSError, *_Errors) as again:
        raise ValueError(f"cache index {path}: can't be made anew: {again}") from again


def _row_checksum(*values: object) -> int:
    return zlib.crc32(repr(values).encode())


def _connect(path: Path) -> sqlite3.Connection:
    # the index's own lock guards each use, so no thread check is needed; the timeout is for other
    # processes, which may hold the file for a while
    db = sqlite3.connect(path, timeout=60, check_same_thread=False)
    # a damaged text must be no match rather than an error
    db.text_factory = lambda text: text.decode(errors="replace")
    try:
        (check,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if check != "ok":
            raise sqlite3.DatabaseError(check)
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version not in (0, _VERSION):
            raise sqlite3.DatabaseError(f"version {version}, not {_VERSION}")
        # the newest table came without another version, since an older fluxfast leaves it alone
        known = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'uses'").fetchone()
        if version == 0 or known is None:
            db.executescript(f"{_SCHEMA} PRAGMA user_version = {_VERSION};")
    except BaseException:
        db.close()
        raise
    return db
