"""Reading safetensors files one tensor at a time, through a few buffers that are used in turn.

A map would be simpler, but its pages count as the process's memory once they are touched: reading a
24 GB checkpoint through one would take 24 GB. So a thread reads into buffers, a few tensors ahead,
and only a file whose tensors are used as they are stored (a quantised base) is mapped.

A file with checksums (`checksums`) has its header verified when it is opened and each tensor while
it is read. A map is not verified by itself: see `verify`.
"""

from __future__ import annotations

import json
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fluxfast.checkpoint import checksums
from fluxfast.checkpoint.keys import Shape, TensorSource
from fluxfast.checkpoint.not_safetensors import why_not_safetensors
from fluxfast.progress import weighing

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
# how many tensors are read before they are asked for
AHEAD = 2
# a smaller load ends before anybody could read its progress bar
PROGRESS_BYTES = 2 << 30
MAKE_ANEW = "make it anew with `fluxfast-train quantize`"


class CheckpointError(ValueError):
    """A checkpoint that can't be loaded; the message names the file and what is wrong with it."""


class BrokenFile(CheckpointError):
    """A file that is missing, truncated, or no safetensors file at all."""


class DamagedFile(BrokenFile):
    """A file that differs from its own checksums."""


class ByteRange(NamedTuple):
    """Where a tensor lies: the number of the file, and the bytes from `begin` to `end` of it."""

    file: int
    begin: int
    end: int


class TensorFiles:
    """The tensors of one or several safetensors files, by key. Opening reads the headers only.

    Raises BrokenFile naming a file that is not whole, CheckpointError where two files hold the same
    tensor.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.files = list(paths)
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.paths: dict[str, Path] = {}
        self.metadata: dict[str, str] = {}
        self._ranges: dict[str, ByteRange] = {}
        self._sums: dict[str, int] = {}
        for number, path in enumerate(self.files):
            self._open(number, path)

    def _open(self, number: int, path: Path) -> None:
        try:
            # `safe_open` checks the header against the file's size
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
            self._ranges[key] = ByteRange(number, 8 + size + begin, 8 + size + end)

    def nbytes(self, sources: Iterable[TensorSource]) -> int:
        """How many bytes these tensors take in the files."""
        return sum(end - begin for _, begin, end in map(self._range, sources))

    def _range(self, source: TensorSource) -> ByteRange:
        whole = self._ranges[source.key]
        if source.rows is None:
            return whole
        row = (whole.end - whole.begin) // max(self.shapes[source.key][0], 1)
        first, last = source.rows
        return ByteRange(whole.file, whole.begin + first * row, whole.begin + last * row)

    def stream(
        self,
        sources: Mapping[str, TensorSource],
        check: Callable[[TensorSource, Tensor], None] | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Read the tensors in the order of their bytes, under the names that `sources` gives them.

        A tensor is valid until the next one is asked for, when its buffer is filled again. `check`
        is called for each in a thread, before the tensor is given out. Raises DamagedFile naming a
        tensor that differs from its checksum.
        """
        # reading in the order of the bytes keeps a hard disk from seeking
        order = sorted(
            ((self._range(source), name) for name, source in sources.items()),
            key=lambda entry: entry[0],
        )
        ring = AHEAD + 1
        largest = max((place.end - place.begin for place, _ in order), default=0)
        buffers = [torch.empty(largest, dtype=torch.uint8) for _ in range(min(ring, len(order)))]
        with (
            _opened(self.files) as streams,
            _threads(ring, "check") as checkers,
            _threads(1, "read-ahead") as reader,
        ):

            def read(number: int) -> tuple[Tensor, Future[None]]:
                place, name = order[number]
                data = _fill(streams[place.file], place, buffers[number % ring])
                return data, checkers.submit(self._examine, sources[name], data, check)

            pending = deque(reader.submit(read, number) for number in range(len(buffers)))
            for number, (_, name) in enumerate(order):
                data, examined = pending.popleft().result()
                examined.result()
                yield name, self._shaped(data, sources[name])
                # only now may this tensor's buffer be filled again
                if number + ring < len(order):
                    pending.append(reader.submit(read, number + ring))

    def _examine(
        self,
        source: TensorSource,
        data: Tensor,
        check: Callable[[TensorSource, Tensor], None] | None,
    ) -> None:
        key = source.key
        # the checksum is the whole tensor's, so some of its rows can't be checked
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
        """Read every tensor and compare it with its checksum, where the file has checksums.

        Raises DamagedFile naming a tensor that differs.
        """
        sources = {key: TensorSource(key) for key in self.shapes}
        sizes = {key: self.nbytes([source]) for key, source in sources.items()}
        for _ in with_progress(self.stream(sources), sizes, "verifying"):
            pass

    def _shaped(self, data: Tensor, source: TensorSource) -> Tensor:
        shape = self.shapes[source.key]
        if source.rows is not None:
            shape = (source.rows[1] - source.rows[0], *shape[1:])
        tensor = data.view(self.dtypes[source.key]).view(shape)
        return torch.cat(tensor.chunk(2)[::-1]) if source.swap else tensor

    def mapped(self) -> dict[str, Tensor]:
        """Every tensor as a view of its mapped file.

        The system reads a page when it is touched, and may drop it again where memory is short.
        Writing to a tensor changes this process's copy, not the file. The files' tensors must be
        aligned to their dtypes, as `writer` places them.
        """
        maps = [
            torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
            for path in self.files
        ]
        return {
            key: self._shaped(maps[place.file][place.begin : place.end], TensorSource(key))
            for key, place in self._ranges.items()
        }


@contextmanager
def _opened(paths: list[Path]) -> Iterator[list[BinaryIO]]:
    streams: list[BinaryIO] = []
    try:
        for path in paths:
            # unbuffered, so that a read goes into the tensor's memory without a copy between
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


def _fill(stream: BinaryIO, place: ByteRange, buffer: Tensor) -> Tensor:
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
    """The same (name, tensor) pairs, with a progress bar if they are many bytes.

    `sizes` gives the bytes of each name, for the bar.
    """
    total = sum(sizes.values())
    if total < PROGRESS_BYTES:
        yield from tensors
        return
    with weighing() as progress:
        bar = progress.add_task(description, total=total)
        for name, tensor in tensors:
            yield name, tensor
            progress.advance(bar, sizes.get(name, 0))
