"""Blocks in files: written once when a run starts, read into a few pinned buffers by a thread, from
there to the device.

A file is a safetensors file of one tensor, `block` (uint8, the block's bytes), whose header is
padded to a page; its metadata says which tensors are where inside it. It is a run's own scratch:
the next run in the same folder replaces it.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from fluxfast.files import atomic_file
from fluxfast.memory.block_bytes import BlockLayout
from fluxfast.memory.engine import Engine, Event

PAGE = 4096
# two of these are enough to read one while the other is copied
STAGING_BYTES = 32 << 20
STAGING_BUFFERS = 2


def check_room(folder: Path, nbytes: int) -> None:
    """Make the folder. ValueError where its disk has no room for so much beside what earlier runs
    left there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free + sum(
        file.stat().st_size for file in folder.glob("block_*.safetensors")
    )
    if free < nbytes:
        raise ValueError(
            f"{folder}: the blocks take {nbytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: "
            "name another disk"
        )


class BlockFile:
    """A block's bytes on disk. `buffer` [nbytes] is the file itself, mapped: it costs no memory
    that others need.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path = path
        self._file: BinaryIO = path.open("r+b")
        size = os.fstat(self._file.fileno()).st_size
        self._start = size - nbytes
        self.buffer = torch.frombuffer(
            mmap.mmap(self._file.fileno(), size), dtype=torch.uint8, offset=self._start
        )

    @classmethod
    def write(cls, path: Path, layout: BlockLayout, tensors: Sequence[Tensor]) -> BlockFile:
        """Write a block's tensors, in the order of its layout, and open the file."""
        header = _header(layout)
        with atomic_file(path) as stream:
            stream.write(header)
            for place, tensor in zip(layout.places, tensors, strict=True):
                stream.seek(len(header) + place.offset)
                stream.write(_as_bytes(tensor).numpy().data)
            stream.truncate(len(header) + layout.nbytes)
        return cls(path, layout.nbytes)

    def read_into(self, target: Tensor, offset: int) -> None:
        """Fill bytes [n] on the CPU from `offset` on. OSError, naming the file, where it ends too
        early.
        """
        view, done = target.numpy().data, 0
        while done < len(view):
            count = os.preadv(self._file.fileno(), [view[done:]], self._start + offset + done)
            if count == 0:
                raise OSError(
                    f"{self.path}: {len(view) - done} bytes are missing; it was changed after "
                    "this run wrote it"
                )
            done += count

    def close(self, remove: bool = True) -> None:
        self._file.close()
        if remove:
            self.path.unlink(missing_ok=True)


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def _header(layout: BlockLayout) -> bytes:
    places = {
        place.path: {
            "dtype": str(place.dtype).removeprefix("torch."),
            "shape": list(place.shape),
            "offset": place.offset,
        }
        for place in layout.places
    }
    text = json.dumps(
        {
            "__metadata__": {"format": "fluxfast.block", "tensors": json.dumps(places)},
            "block": {"dtype": "U8", "shape": [layout.nbytes], "data_offsets": [0, layout.nbytes]},
        }
    ).encode()
    # safetensors allows spaces after the header: the data then starts on a page, as direct reads
    # and maps want it
    text = text.ljust(-(-(8 + len(text)) // PAGE) * PAGE - 8)
    return len(text).to_bytes(8, "little") + text


class Reader:
    """Reads blocks from their files to the device, in order, ahead of the computation where the
    engine allows it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._staging = [engine.memory.allocate(STAGING_BYTES) for _ in range(STAGING_BUFFERS)]
        self._copied: list[Event] = [None] * STAGING_BUFFERS
        self._turn = 0
        self._thread = (
            ThreadPoolExecutor(1, thread_name_prefix="fluxfast-blocks")
            if engine.any_thread
            else None
        )

    def start(self, file: BlockFile, target: Tensor, after: Event | None) -> Future[Event]:
        """Start reading a whole block into bytes [nbytes] on the device, after an event."""
        if self._thread is not None:
            return self._thread.submit(self._read, file, target, after)
        done: Future[Event] = Future()
        done.set_result(self._read(file, target, after))
        return done

    def _read(self, file: BlockFile, target: Tensor, after: Event | None) -> Event:
        event, chunk = None, self._staging[0].numel()
        for start in range(0, target.numel(), chunk):
            part = target[start : start + chunk]
            staging = self._staging[self._turn][: part.numel()]
            if self._copied[self._turn] is not None:
                self._engine.synchronize(self._copied[self._turn])
            file.read_into(staging, start)
            event = self._copied[self._turn] = self._engine.copy(staging, part, after)
            self._turn = (self._turn + 1) % STAGING_BUFFERS
        return event

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
