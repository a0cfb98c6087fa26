"""Images that a CSV file names: downloaded from the web, or copied from their place, once."""

import csv
import functools
import hashlib
import http.client
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from rich.progress import Progress

from fluxfast.config.backends import CsvFile
from fluxfast.config.datasets import ImageDataset
from fluxfast.data.contents import Contents, Skipped
from fluxfast.data.image_kinds import readable
from fluxfast.data.mirror import MOST_BYTES, FetchError, Mirror, Wanted, copy_stream, some
from fluxfast.data.tables import check_columns, row_captions
from fluxfast.files import safe_name

_TRIES = 3
# seconds: without any answer, for one file altogether, and before the next try
_SILENCE, _ALTOGETHER, _PAUSE = 20.0, 300.0, 0.5
_WORKERS = 16


def csv_contents(dataset: ImageDataset, workers: int, bars: Progress) -> Contents:
    """Bring the images of the dataset's CSV file to its folder.

    Rows of one address are one image with several captions. Raises ValueError if the file can't be
    read, has no address or lacks a column.
    """
    origin = dataset.origin
    assert isinstance(origin, CsvFile)
    captions: dict[str, list[str]] = {}
    wanted: dict[str, Wanted] = {}
    skipped: list[Skipped] = []
    without_address = []
    where = f'dataset "{dataset.id}": {origin.csv_file}'
    for line, row in _rows(origin, where):
        address = (row.get(origin.csv_url_column) or "").strip()
        if not address:
            without_address.append(str(line))
            continue
        name = _name(address)
        try:
            wanted.setdefault(name, _wanted(name, address, origin.csv_file.parent))
        except FetchError as error:
            skipped.append(Skipped(address, "could not be fetched", str(error)))
            continue
        own = captions.setdefault(name, [])
        own += [text for text in row_captions(row, origin.csv_caption_column) if text not in own]
    if not (wanted or skipped):
        raise ValueError(f"{where}: has no row with an address")
    mirror = Mirror(Path(dataset.instance_data_dir))
    failed = mirror.bring(
        list(wanted.values()), id=dataset.id, workers=min(workers, _WORKERS), bars=bars
    )
    here = frozenset(wanted) - {each.file for each in failed}
    notes = []
    if without_address:
        notes.append(
            f"{len(without_address)} rows of {origin.csv_file} have no address "
            f"(lines {some(without_address)})"
        )
    return Contents(
        here,
        captions if dataset.caption_strategy == "csv" else None,
        skipped=(*skipped, *failed),
        notes=tuple(notes),
    )


def _rows(origin: CsvFile, where: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Each row, with the number of the line that it ends on."""
    try:
        with origin.csv_file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            check_columns(
                {
                    "csv_url_column": origin.csv_url_column,
                    "csv_caption_column": origin.csv_caption_column,
                },
                reader.fieldnames or (),
                where,
            )
            for row in reader:
                yield reader.line_num, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{where}: can't be read as a CSV file: {error}") from error


def _name(address: str) -> str:
    """A file's name for an address; different addresses have different names."""
    path = PurePosixPath(unquote(urlsplit(address).path) if "://" in address else address)
    # decoders go by content, and a name without a known ending would not be taken for an image's
    suffix = path.suffix.lower() if path.suffix.lower() in readable() else ".jpg"
    digest = hashlib.sha256(address.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{safe_name(path.stem)[:60]}-{digest}{suffix}"


def _wanted(name: str, address: str, folder: Path) -> Wanted:
    if "://" in address:
        if urlsplit(address).scheme.lower() not in ("http", "https"):
            raise FetchError("only http(s) addresses and paths are fetched")
        return Wanted(name, address, functools.partial(_download, address))
    path = folder / address
    try:
        stat = path.stat()
    except (OSError, ValueError) as error:
        raise FetchError("no such file") from error
    return Wanted(name, f"{stat.st_size} {stat.st_mtime_ns}", functools.partial(_copy, path))


def _copy(path: Path, target: BinaryIO) -> None:
    try:
        with path.open("rb") as source:
            shutil.copyfileobj(source, target)
    except OSError as error:
        raise FetchError(f"can't be read: {error.strerror}") from error


def _download(address: str, target: BinaryIO) -> None:
    """Write what an address gives; a failure that may pass is tried again."""
    for left in reversed(range(_TRIES)):
        target.seek(0)
        target.truncate()
        try:
            return _download_once(address, target)
        except urllib.error.HTTPError as error:
            if (error.code < 500 and error.code not in (408, 429)) or not left:
                raise FetchError(f"the server answers {error.code} {error.reason}") from error
        except urllib.error.URLError as error:
            if not left:
                raise FetchError(f"the server can't be reached: {error.reason}") from error
        except (TimeoutError, http.client.HTTPException, ConnectionError, EOFError) as error:
            if not left:
                raise FetchError(f"the connection broke off: {error}") from error
        except ValueError as error:
            raise FetchError(f"not an address: {error}") from error
        time.sleep(_PAUSE * (_TRIES - left))
    raise AssertionError


def _download_once(address: str, target: BinaryIO) -> None:
    # a server may answer a nameless program with an error
    request = urllib.request.Request(address, headers={"User-Agent": "fluxfast"})
    with urllib.request.urlopen(request, timeout=_SILENCE) as source:
        length = source.headers.get("Content-Length")
        if length is not None and length.isdigit() and int(length) > MOST_BYTES:
            raise FetchError(f"is larger than {MOST_BYTES >> 20} MiB")
        got = copy_stream(source, target, proceed=_deadline())
    if length is not None and length.isdigit() and got != int(length):
        raise EOFError(f"{got} of {length} bytes came")


def _deadline() -> Callable[[], None]:
    start = time.monotonic()

    def check() -> None:
        if time.monotonic() - start > _ALTOGETHER:
            raise TimeoutError(f"not whole after {_ALTOGETHER:g} s")

    return check
