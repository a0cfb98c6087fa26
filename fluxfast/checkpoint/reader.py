"""Reading safetensors files tensor by tensor, without holding them: through a few buffers that are
used again and again.

Where a file lies in memory counts: pages of a map that were touched stay with the process, so a
checkpoint is read into buffers by a thread that runs a few tensors ahead; only what is used as it
is stored (a quantised base) is mapped. Where a file carries checksums (`checksums`), its header is
verified when it is opened, and each tensor while it is read; a map is not (`verify`).
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fluxfast.checkpoint import checksums
from fluxfast.checkpoint.file_kinds import why_not_safetensors
from fluxfast.checkpoint.naming import Shape, Source

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# tensors that are read before they are asked for
AHEAD = 2
# below this a load is over before a progress bar could be read
PROGRESS_BYTES = 2 << 30
# a fingerprint looks at all of a file up to this size, and of a larger one at some bytes every so
# many
WHOLE_BYTES, SAMPLE_BYTES, SAMPLE_EVERY = 64 << 20, 4096, 8 << 20
MAKE_ANEW = "make it anew with `fluxfast-train quantize`"


class CheckpointError(ValueError):
    """A checkpoint that can't be loaded: the message names the file, what was expected and what
    came.
    """


class BrokenFile(CheckpointError):
    """A file that is missing, truncated, or no safetensors file at all."""


class DamagedFile(BrokenFile):
    """A file whose bytes are not those that were written, as its checksums tell."""


class Place(NamedTuple):
    """Where a tensor lies: the file, the bytes from `begin` to `end` of it."""

    file: int
    begin: int
    end: int


@dataclass(frozen=True)
class Fingerprint:
    """What tells a file from another of the same name: its size, and a hash of its header and of
    its data, or samples of it.

    Content alone, neither dates nor inodes: a checkpoint that was copied, moved or fetched again is
    the same checkpoint, and one that was written over in place is another, whatever its date says.
    """

    name: str
    bytes: int
    sha256: str


class TensorFiles:
    """The tensors of one or several safetensors files, by key; nothing is read before it is asked
    for.

    Raises BrokenFile naming a file that is not whole, CheckpointError where two files hold the same
    tensor.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.files = list(paths)
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.paths: dict[str, Path] = {}
        self.metadata: dict[str, str] = {}
        self._places: dict[str, Place] = {}
        self._sums: dict[str, int] = {}
        for number, path in enumerate(self.files):
            self._open(number, path)

    def _open(self, number: int, path: Path) -> None:
        try:
            # the library checks the header against the file's size
            with safe_open(path, framework="pt"), path.open("rb") as stream:
                length = stream.read(8)
                size = int.from_bytes(length, "little")
                text = stream.read(size)
            header = json.loads(text)
        except (SafetensorError, OSError, ValueError) as error:
            raise BrokenFile(why_not_safetensors(path, error)) from error
        metadata = header.pop("__metadata__", None) or {}
        self.metadata |= metadata
        if checksums.KEY in metadata:
            try:
                self._sums |= zip(header, checksums.read(length + text, len(header)), strict=True)
            except ValueError as error:
                raise DamagedFile(f"{path}: {error}, it is damaged: {MAKE_ANEW}") from error
        for key, entry in header.items():
            if key in self.shapes:
                raise CheckpointError(
                    f"{path}: tensor {key} is in {self.paths[key].name} as well; expected it once"
                )
            if entry["dtype"] not in DTYPES:
                raise CheckpointError(
                    f"{path}: {key} holds {entry['dtype']}, expected one of "
                    f"{', '.join(DTYPES)}: take the model in bf16 or fp16"
                )
            begin, end = entry["data_offsets"]
            self.paths[key], self.shapes[key] = path, tuple(entry["shape"])
            self.dtypes[key] = DTYPES[entry["dtype"]]
            self._places[key] = Place(number, 8 + size + begin, 8 + size + end)

    def nbytes(self, sources: Iterable[Source]) -> int:
        """Bytes that these tensors have in the files."""
        return sum(end - begin for _, begin, end in map(self._place, sources))

    def _place(self, source: Source) -> Place:
        place = self._places[source.key]
        if source.rows is None:
            return place
        row = (place.end - place.begin) // max(self.shapes[source.key][0], 1)
        return Place(
            place.file, place.begin + source.rows[0] * row, place.begin + source.rows[1] * row
        )

    def stream(
        self, sources: Mapping[str, Source], check: Callable[[Source, Tensor], None] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors in the order of their bytes in the files, under the names that `sources`
        gives them.

        A tensor is good until the next one is asked for: then its memory is read into again.
        `check` sees each, and where it lies, in a thread of its own before it is given out. Raises
        DamagedFile naming a tensor that differs from its checksum.
        """
        plan = sorted(
            ((self._place(source), name) for name, source in sources.items()),
            key=lambda entry: entry[0],
        )
        ring = AHEAD + 1
        largest = max((place.end - place.begin for place, _ in plan), default=0)
        buffers = [torch.empty(largest, dtype=torch.uint8) for _ in range(min(ring, len(plan)))]
        with (
            _opened(self.files) as streams,
            _threads(ring, "check") as checkers,
            _threads(1, "read-ahead") as reader,
        ):

            def read(number: int) -> tuple[Tensor, Future[None]]:
                place, name = plan[number]
                data = _fill(streams[place.file], place, buffers[number % ring])
                return data, checkers.submit(self._examine, sources[name], data, check)

            pending = deque(reader.submit(read, number) for number in range(len(buffers)))
            for number, (_, name) in enumerate(plan):
                data, examined = pending.popleft().result()
                examined.result()
                yield name, self._shaped(data, sources[name])
                if number + ring < len(plan):
                    pending.append(reader.submit(read, number + ring))

    def _examine(
        self, source: Source, data: Tensor, check: Callable[[Source, Tensor], None] | None
    ) -> None:
        key = source.key
        # a part of a tensor has no checksum of its own
        if (
            key in self._sums
            and source.rows is None
            and zlib.crc32(data.numpy().data) != self._sums[key]
        ):
            raise DamagedFile(
                f"{self.paths[key]}: tensor {key} has changed since it was written, it is "
                f"damaged: {MAKE_ANEW}"
            )
        if check is not None:
            check(source, self._shaped(data, source))

    def verify(self) -> None:
        """Read every tensor and hold it against its checksum; nothing to find where there are none.
        Raises DamagedFile.
        """
        sources = {key: Source(key) for key in self.shapes}
        sizes = {key: self.nbytes([source]) for key, source in sources.items()}
        for _ in with_progress(self.stream(sources), sizes, "verifying"):
            pass

    def _shaped(self, data: Tensor, source: Source) -> Tensor:
        shape = self.shapes[source.key]
        if source.rows is not None:
            shape = (source.rows[1] - source.rows[0], *shape[1:])
        tensor = data.view(self.dtypes[source.key]).view(shape)
        return torch.cat(tensor.chunk(2)[::-1]) if source.swap else tensor

    def mapped(self) -> dict[str, Tensor]:
        """Every tensor as a view of its file's map: read when it is touched, and not kept where
        memory is short.

        Writing to one changes the process's own copy. Only for files whose tensors are aligned to
        their dtype.
        """
        maps = [
            torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
            for path in self.files
        ]
        return {
            key: self._shaped(maps[p.file][p.begin : p.end], Source(key))
            for key, p in self._places.items()
        }

    def fingerprints(self) -> list[Fingerprint]:
        """One of each file."""
        return [fingerprint(path) for path in self.files]


def fingerprint(path: Path) -> Fingerprint:
    """The fingerprint of one safetensors file. It reads a small file whole, of a large one 4 KB in
    every 8 MB.

    So every matrix of FLUX.1's blocks is looked at in bf16: a fine-tune or a merged LoRA is noticed
    even if it changes one block. An edit of single weights in a large file is not.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = stream.read(8)
        digest = hashlib.sha256(length + stream.read(int.from_bytes(length, "little")))
        begin = stream.tell()
        step, count = (1 << 20, 1 << 20) if size <= WHOLE_BYTES else (SAMPLE_EVERY, SAMPLE_BYTES)
        for place in range(begin, size, step):
            stream.seek(place)
            digest.update(stream.read(count))
    return Fingerprint(path.name, size, digest.hexdigest())


@contextmanager
def _opened(paths: list[Path]) -> Iterator[list[BinaryIO]]:
    streams: list[BinaryIO] = []
    try:
        for path in paths:
            # unbuffered: reads are large, and go straight to their place
            streams.append(path.open("rb", buffering=0))
        yield streams
    finally:
        for stream in streams:
            stream.close()


@contextmanager
def _threads(count: int, name: str) -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(count, thread_name_prefix=name)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _fill(stream: BinaryIO, place: Place, buffer: Tensor) -> Tensor:
    data = buffer[: place.end - place.begin]
    view = data.numpy().data
    stream.seek(place.begin)
    while view:
        count = stream.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise BrokenFile(f"{stream.name}: became shorter while it was read")
        view = view[count:]
    return data


def with_progress(
    tensors: Iterable[tuple[str, Tensor]], sizes: Mapping[str, int], description: str
) -> Iterator[tuple[str, Tensor]]:
    """The same (name, tensor) pairs, with a bar in bytes where there are many; `sizes` is what each
    name counts for.
    """
    total = sum(sizes.values())
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=total < PROGRESS_BYTES, transient=True) as progress:
        bar = progress.add_task(description, total=total)
        for name, tensor in tensors:
            yield name, tensor
            progress.advance(bar, sizes.get(name, 0))
