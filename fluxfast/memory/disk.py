"""Blocks in files: written once when a run starts, and read from there to the device.

A thread reads into a few pinned buffers, which are then copied to the device. A file is a
safetensors file of one tensor, `block` (uint8, the block's bytes); its header is padded to a page,
and its metadata says which tensors are where inside it. The files belong to one run: the next run
in the same folder replaces them.
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
from fluxfast.memory.block_bytes import BlockBytes
from fluxfast.memory.engine import Engine, Event

PAGE = 4096
# with two buffers, one is read into while the other is copied to the device
STAGING_BYTES = 32 << 20
STAGING_BUFFERS = 2


def check_room(folder: Path, nbytes: int) -> None:
    """Make the folder, and check that its disk has room for `nbytes`.

    What earlier runs left there counts as room. Raises ValueError if there is too little.
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
    """A block's bytes on disk.

    `buffer` [nbytes] is the file itself, mapped: the system may drop its pages where memory is
    short.
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
    def write(cls, path: Path, bytes: BlockBytes, tensors: Sequence[Tensor]) -> BlockFile:
        """Write a block's tensors, in the order of `bytes`, and open the file."""
        header = _header(bytes)
        with atomic_file(path) as stream:
            stream.write(header)
            for frozen, tensor in zip(bytes.tensors, tensors, strict=True):
                stream.seek(len(header) + frozen.offset)
                stream.write(_as_bytes(tensor).numpy().data)
            stream.truncate(len(header) + bytes.nbytes)
        return cls(path, bytes.nbytes)

    def read_into(self, target: Tensor, offset: int) -> None:
        """Fill bytes [n] on the CPU with the block's, from `offset` on.

        Raises OSError naming the file if it ends too early.
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


def _header(bytes: BlockBytes) -> bytes:
    places = {
        frozen.path: {
            "dtype": str(frozen.dtype).removeprefix("torch."),
            "shape": list(frozen.shape),
            "offset": frozen.offset,
        }
        for frozen in bytes.tensors
    }
    text = json.dumps(
        {
            "__metadata__": {"format": "fluxfast.block", "tensors": json.dumps(places)},
            "block": {"dtype": "U8", "shape": [bytes.nbytes], "data_offsets": [0, bytes.nbytes]},
        }
    ).encode()
    # safetensors allows spaces after the header, so the data can start on a page, which maps need
    text = text.ljust(-(-(8 + len(text)) // PAGE) * PAGE - 8)
    return len(text).to_bytes(8, "little") + text


class Reader:
    """Reads blocks from their files to the device, in order.

    Where the engine allows it a thread does so, ahead of the computation.
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
        """Start reading a whole block into bytes [nbytes] on the device, after an event.

        The future gives the event of the last copy to the device.
        """
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
            # this buffer may still be on its way to the device
            if self._copied[self._turn] is not None:
                self._engine.synchronize(self._copied[self._turn])
            file.read_into(staging, start)
            event = self._copied[self._turn] = self._engine.copy(staging, part, after)
            self._turn = (self._turn + 1) % STAGING_BUFFERS
        return event

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
