"""Writing a safetensors file one tensor at a time.

Shapes and dtypes are known beforehand, so the header is written first, and each tensor's bytes at
their place as they come.
"""

from __future__ import annotations

import glob
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from fluxfast.checkpoint import checksums
from fluxfast.checkpoint.reader import DTYPES
from fluxfast.files import TEMPORARY, atomic_file, free_bytes

# the data begins on a page: a map of the file starts on one too, so that a tensor is aligned in
# memory as it is in the file
ALIGNMENT = 4096
# how many tensors may wait to be written
BEHIND = 2
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Spec(NamedTuple):
    """Shape and dtype of a tensor that is still to come."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def header(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of the file, and where in it each tensor begins.

    Tensors lie in the order of `specs`, but those of wider dtypes first: in that order each one is
    aligned without gaps, which safetensors forbids.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    begins: dict[str, int] = {}
    end = 0
    for name in sorted(specs, key=lambda name: -specs[name].dtype.itemsize):
        spec = specs[name]
        begins[name], begin, end = end, end, end + spec.nbytes
        entries[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, {
        name: 8 + len(text) + begin for name, begin in begins.items()
    }


def write_tensors(
    path: Path,
    specs: Mapping[str, Spec],
    metadata: Mapping[str, str],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    checked: bool = False,
) -> int:
    """Write the tensors, in whatever order they come, and return the file's size in bytes.

    `specs` describes all of them. checked: store checksums, which `TensorFiles` verifies.

    The file gets its name when it is whole and on the disk; files that killed writers of the same
    name left are removed. A thread writes while the next tensors are made, so a tensor must not
    change once it is handed over. Raises ValueError where the disk has no room.
    """
    if checked:
        metadata = {**metadata, checksums.KEY: checksums.blank(len(specs))}
    first, begins = header(specs, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path)
    with atomic_file(path) as stream:
        _claim(stream)
        size = len(first) + sum(spec.nbytes for spec in specs.values())
        require_room(path, size)
        stream.write(first)
        sums: dict[str, Future[int]] = {}
        with ThreadPoolExecutor(1, thread_name_prefix="writer") as pool:
            pending: list[Future[int]] = []
            for name, tensor in tensors:
                assert Spec(tuple(tensor.shape), tensor.dtype) == specs[name], name
                assert name not in sums, name
                sums[name] = pool.submit(
                    _write, stream, begins[name], tensor.to("cpu").contiguous(), checked
                )
                pending.append(sums[name])
                while len(pending) > BEHIND:
                    pending.pop(0).result()
            for future in pending:
                future.result()
        assert sums.keys() == specs.keys(), specs.keys() - sums.keys()
        if checked:
            # the header was written with zeros for the checksums: now they are known
            stream.seek(0)
            stream.write(checksums.seal(first, [sums[name].result() for name in begins]))
    return size


def require_room(path: Path, size: int) -> None:
    """Raise ValueError unless the disk that holds `path` has room for `size` bytes."""
    if (free := free_bytes(path)) < size:
        raise ValueError(
            f"{path}: needs {size / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB left: "
            "make room, or write elsewhere"
        )


def _write(stream: BinaryIO, begin: int, tensor: Tensor, checked: bool) -> int:
    """Write a tensor's bytes, and return their checksum (0 if none is asked for)."""
    data = tensor.view(-1).view(torch.uint8).numpy().data
    stream.seek(begin)
    stream.write(data)
    return zlib.crc32(data) if checked else 0


def remove_abandoned(path: Path) -> None:
    """Remove the unfinished files of killed writers of `path`.

    A writer that is still at work holds a lock on its file, which is left alone.
    """
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*{TEMPORARY}"):
        with leftover.open("rb") as stream:
            abandoned = _claim(stream)
        if abandoned:
            leftover.unlink(missing_ok=True)


def _claim(stream: BinaryIO) -> bool:
    """Lock a file for as long as it is open.

    Returns False if another process has locked it, or if its disk knows no locks.
    """
    # Windows has no such locks: there the user removes what a killed writer left
    if os.name != "posix":
        return False
    import fcntl

    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
