"""Checkpoints: what a run needs to go on as if it had never stopped.

The folder `<output_dir>/checkpoint-<step>` holds the LoRA that other programs load
(`pytorch_lora_weights.safetensors`), the trained tensors (`adapter.safetensors`), the optimiser's
(`optimizer.safetensors`) and everything else in `training_state.json`. Random numbers need no
state: each step's come from the seed and the step's number. The folder is complete or absent
(`files`). `checksums.json` has a checksum of each file that a run reads again, so that a file which
the disk has damaged since is refused.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fluxfast.files import atomic_folder, remove_folder

STATE_NAME = "training_state.json"
ADAPTER_NAME = "adapter.safetensors"
OPTIMIZER_NAME = "optimizer.safetensors"
# the moving average of the trained tensors; only of runs that keep one
AVERAGE_NAME = "average.safetensors"
CHECKSUMS_NAME = "checksums.json"
# 2 added checksums and the settings that the steps so far were trained with
VERSION = 2
_READ_VERSIONS = (1, 2)
# what reading a damaged checkpoint may raise: besides the files' own errors, JSON that was changed
# may lack a key, have another shape, or name a tensor that isn't there
_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
    SafetensorError,
)


class ResumeError(ValueError):
    """A checkpoint that this run can't go on from: the message names it and says what to do."""


class SaveError(RuntimeError):
    """A checkpoint could not be written: the message says why, and which is the last good one."""


class SavedRun(NamedTuple):
    """A checkpoint as it was read.

    `state` is training_state.json's, `adapter` the trained tensors, `optimizer` the optimiser's
    state dict, `average` the trained tensors' moving average, None where the run kept none.
    """

    path: Path
    state: dict[str, Any]
    adapter: dict[str, Tensor]
    optimizer: dict[str, Any]
    average: dict[str, Tensor] | None = None

    @property
    def step(self) -> int:
        """Optimiser steps before it was written."""
        return int(self.state["global_step"])


def checkpoints(output_dir: Path) -> list[Path]:
    """The run's checkpoint folders, oldest first."""
    found = {}
    for path in output_dir.glob("checkpoint-*"):
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir():
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def find_checkpoint(output_dir: Path, wanted: str | None) -> Path | None:
    """The folder that `resume_from_checkpoint` names; None for a run from the start.

    wanted: "latest" (None where there is none yet), a folder's name, a path, or "".
    """
    if not wanted:
        return None
    if wanted == "latest":
        return next(reversed(checkpoints(output_dir)), None)
    for path in (output_dir / wanted, Path(wanted)):
        if path.is_dir():
            return path
    have = ", ".join(path.name for path in checkpoints(output_dir)) or "none"
    raise ResumeError(
        f'resume_from_checkpoint "{wanted}": no such folder in {output_dir} (it has {have})'
    )


def save_checkpoint(
    output_dir: Path,
    step: int,
    *,
    adapter: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    save_lora: Any,
    keep: int,
    best: Iterable[int] = (),
    average: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write checkpoint-<step>, then remove the oldest beyond `keep`.

    `save_lora(folder)` writes the LoRA into it. Checkpoints of the steps `best` stay in any case.
    average: the moving average of the adapter's tensors, if the run keeps one. Raises SaveError.
    """
    path = output_dir / f"checkpoint-{step}"
    tensors, numbers = split_tensors(optimizer.state_dict())
    content = {"version": VERSION, "global_step": step, **state, "optimizer": numbers}
    files = {
        ADAPTER_NAME: save({name: t.detach().cpu().contiguous() for name, t in adapter.items()}),
        OPTIMIZER_NAME: save(tensors),
        STATE_NAME: json.dumps(content, indent=1, sort_keys=True).encode(),
    }
    if average is not None:
        files[AVERAGE_NAME] = save({name: t.cpu().contiguous() for name, t in average.items()})
    files[CHECKSUMS_NAME] = json.dumps(
        {name: _checksum(data) for name, data in files.items()}, indent=1
    ).encode()
    try:
        with atomic_folder(path) as folder:
            save_lora(folder)
            for name, data in files.items():
                (folder / name).write_bytes(data)
    except OSError as error:
        good = last_good(output_dir)
        raise SaveError(
            f"{path}: can't be written ({error.strerror or error}). Make room or give the folder "
            "back its permissions, then go on with the same command; the last good checkpoint: "
            f"{good or 'none yet'}"
        ) from error
    # the new one stays, even where a run went back to before the steps of those that are there
    others = [other for other in checkpoints(output_dir) if other != path]
    kept = {f"checkpoint-{step}" for step in best}
    for old in others[: max(0, len(others) - keep + 1)]:
        if old.name not in kept:
            remove_folder(old)
    return path


def load_checkpoint(path: Path) -> SavedRun:
    """Read a checkpoint folder.

    Raises ResumeError where it is damaged, which names the last good checkpoint beside it.
    """
    try:
        return _read(path)
    except _UNREADABLE as error:
        why = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ResumeError(
            f"{path}: damaged or not a checkpoint of fluxfast ({why}). {_instead_of(path)}"
        ) from error


def _read(path: Path) -> SavedRun:
    names = [STATE_NAME, ADAPTER_NAME, OPTIMIZER_NAME]
    manifest = path / CHECKSUMS_NAME
    written = json.loads(manifest.read_bytes()) if manifest.exists() else None
    names += [AVERAGE_NAME] if AVERAGE_NAME in (written or ()) else []
    files = {name: (path / name).read_bytes() for name in names}
    if written is not None:
        for name, data in files.items():
            if written[name] != (now := _checksum(data)):
                raise ValueError(
                    f"{name} has changed since it was written: checksum {now}, expected "
                    f"{written[name]}"
                )
    state = json.loads(files[STATE_NAME])
    if (version := state["version"]) not in _READ_VERSIONS:
        raise ValueError(
            f"{STATE_NAME} is of version {version!r}, this fluxfast reads {_READ_VERSIONS}"
        )
    if version > 1 and written is None:
        raise ValueError(f"{CHECKSUMS_NAME} is missing")
    if missing := sorted({"global_step", "seed", "sampler", "fixed", "optimizer"} - state.keys()):
        raise ValueError(f"{STATE_NAME} lacks {', '.join(missing)}")
    optimizer = join_tensors(load(files[OPTIMIZER_NAME]), state.pop("optimizer"))
    average = load(files[AVERAGE_NAME]) if AVERAGE_NAME in files else None
    return SavedRun(path, state, load(files[ADAPTER_NAME]), optimizer, average)


def _checksum(data: bytes) -> str:
    """The CRC-32 of a file's bytes, and their number.

    It finds what a disk or a copy does to a file by chance, at a gigabyte a second.
    """
    return f"{zlib.crc32(data):08x}-{len(data)}"


def last_good(output_dir: Path, *, besides: Path | None = None) -> Path | None:
    """The newest checkpoint that can be read, other than `besides`; None if there is none."""
    for path in reversed(checkpoints(output_dir)):
        if besides is not None and path.resolve() == besides.resolve():
            continue
        try:
            _read(path)
        except _UNREADABLE:
            continue
        return path
    return None


def _instead_of(path: Path) -> str:
    """What to do about a damaged checkpoint."""
    good = last_good(path.parent, besides=path)
    if good is None:
        return (
            "There is no good one beside it: start anew in another output_dir, or with "
            '"resume_from_checkpoint": ""'
        )
    return (
        f"The last good one is {good.name}: remove or move {path.name} away, "
        f'or set "resume_from_checkpoint": "{good.name}"'
    )


def split_tensors(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state dict as (tensors by name, the structure that holds them, as JSON)."""
    tensors: dict[str, Tensor] = {}
    # bitsandbytes gives all parameters the same table of codes
    names: dict[Tensor, str] = {}

    def walk(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            if value not in names:
                names[value] = name
                tensors[name] = value.detach().cpu().contiguous()
            return {"tensor": names[value]}
        if isinstance(value, Mapping):
            # a list of pairs, since JSON's keys are strings and torch numbers parameters
            return {"items": [[key, walk(item, f"{name}.{key}")] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return {"list": [walk(item, f"{name}.{i}") for i, item in enumerate(value)]}
        return value

    return tensors, walk(state, "optimizer")


def join_tensors(tensors: Mapping[str, Tensor], structure: Any) -> Any:
    """The inverse of `split_tensors`."""
    if not isinstance(structure, dict):
        return structure
    if "tensor" in structure:
        return tensors[structure["tensor"]]
    if "list" in structure:
        return [join_tensors(tensors, item) for item in structure["list"]]
    return {key: join_tensors(tensors, item) for key, item in structure["items"]}
