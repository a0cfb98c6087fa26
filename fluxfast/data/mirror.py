"""Bringing images to a folder of this machine, once: what is there and unchanged stays.

Every start after the first reads files of the local disk alone, and whatever reads images needs to
know of no other place than a folder.
"""

import errno
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from rich.markup import escape
from rich.progress import Progress

from fluxfast.data.contents import Skipped
from fluxfast.files import free_bytes, replacing, temporary_name, write_atomic
from fluxfast.text import printable

# a larger file is no image to train on, and a server may send without end
MOST_BYTES = 512 << 20
# the disk's last bytes belong to checkpoints
LEAST_FREE_BYTES = 2 << 30
_CHUNK = 1 << 20
_FILES_PER_RECORD = 256
# hidden, so that no scan takes it for data
_RECORD = ".fluxfast-files.json"


class FetchError(Exception):
    """A file could not be brought here; its text is the reason."""


@dataclass(frozen=True)
class Wanted:
    """A file to bring to `name` below the folder.

    stamp: what changes with the file's content, such as an entity tag.
    fetch: writes the content, or raises FetchError.
    """

    name: str
    stamp: str
    fetch: Callable[[BinaryIO], None]


class Mirror:
    """A folder of copies, and the record of what each of them is a copy of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            known = json.loads((folder / _RECORD).read_bytes())
        except (OSError, ValueError):
            known = {}
        self._known: dict[str, Any] = known if isinstance(known, dict) else {}

    def holds(self, name: str, stamp: str) -> bool:
        """Whether the copy is there and whole."""
        try:
            return self._known.get(name) == [stamp, (self.folder / name).stat().st_size]
        except OSError:
            return False

    def save(self) -> None:
        """Write the record."""
        write_atomic(self.folder / _RECORD, json.dumps(self._known).encode())

    def bring(
        self,
        wanted: Sequence[Wanted],
        *,
        id: str,
        workers: int,
        bars: Progress,
        doing: str = "fetching",
    ) -> list[Skipped]:
        """Bring what is missing or has changed; returns what could not be brought, and why.

        id: the dataset's, for the progress bar, which says what is done to its images. Raises
        ValueError if the disk is nearly full or can't be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = [each for each in wanted if not self.holds(each.name, each.stamp)]
        if not missing:
            return []
        bar = bars.add_task(f"{doing} images of {escape(id)}", total=len(missing))
        skipped = []
        try:
            with ThreadPoolExecutor(workers) as pool:
                for done, (each, reason) in enumerate(
                    zip(missing, pool.map(self._bring_one, missing), strict=True), 1
                ):
                    bars.update(bar, completed=done)
                    if reason:
                        skipped.append(Skipped(each.name, "could not be fetched", reason))
                    if done % _FILES_PER_RECORD == 0:
                        self.save()
        finally:
            # what came before an interruption is not fetched again
            self.save()
        return skipped

    def _bring_one(self, each: Wanted) -> str | None:
        path = self.folder / each.name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if free_bytes(path) < LEAST_FREE_BYTES:
                raise ValueError(
                    f"{self.folder}: less than {LEAST_FREE_BYTES >> 30} GiB are free on its disk; "
                    "make room, or name another folder"
                )
            with replacing(path, temporary_name(path)) as stream:
                each.fetch(stream)
                size = stream.tell()
        except FetchError as error:
            return str(error)
        except OSError as error:
            # a name too long is this file's own fault
            if error.errno != errno.ENAMETOOLONG:
                raise ValueError(f"{path}: can't be written: {error.strerror}") from error
            return "its name is too long for this machine's disk"
        self._known[each.name] = [each.stamp, size]
        return None


def copy_stream(
    source: Any, target: BinaryIO, *, proceed: Callable[[], None] = lambda: None
) -> int:
    """Copy all that `source` gives and return its length; `proceed` is called between parts.

    Raises FetchError beyond `MOST_BYTES`.
    """
    size = 0
    while chunk := source.read(_CHUNK):
        size += len(chunk)
        if size > MOST_BYTES:
            raise FetchError(f"is larger than {MOST_BYTES >> 20} MiB")
        target.write(chunk)
        proceed()
    return size


def unsafe(name: str) -> str | None:
    """Why a remote name can't be a path below the folder; None if it can."""
    if "\0" in name or "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
        return "its name is no path below the folder"
    return None


def colliding(names: Iterable[str]) -> set[str]:
    """The names that are also the folder of another one, which no disk can hold beside it."""
    known = set(names)
    folders = {parent.as_posix() for name in known for parent in PurePosixPath(name).parents}
    return known & folders


def some(names: Sequence[str], most: int = 3) -> str:
    """A few of the names, and how many there are beside them."""
    told = ", ".join(printable(name) for name in names[:most])
    return f"{told} and {len(names) - most} more" if len(names) > most else told
