"""What a run needs to go on as if it had never stopped, in `<output_dir>/checkpoint-<step>`.

A checkpoint folder holds the LoRA that other programs load (`pytorch_lora_weights.safetensors`), the trained tensors and the
optimiser's as they are (`adapter.safetensors`, `optimizer.safetensors`), and everything else in `training_state.json`. Random
numbers need no state: each step's come from the seed and the step's number. The folder is complete or absent (`files`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fluxfast.files import atomic_folder, remove_folder

STATE_NAME = "training_state.json"
ADAPTER_NAME = "adapter.safetensors"
OPTIMIZER_NAME = "optimizer.safetensors"
VERSION = 1


class ResumeError(ValueError):
    """A checkpoint that this run can't go on from: the message names it and says what to do."""


def checkpoints(output_dir: Path) -> list[Path]:
    """The run's checkpoint folders, oldest first."""
    found = {}
    for path in output_dir.glob("checkpoint-*"):
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir():
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def find_checkpoint(output_dir: Path, wanted: str | None) -> Path | None:
    """The folder that `resume_from_checkpoint` names: `latest` (None where there is none yet), a name or a path."""
    if not wanted:
        return None
    if wanted == "latest":
        return next(reversed(checkpoints(output_dir)), None)
    for path in (output_dir / wanted, Path(wanted)):
        if path.is_dir():
            return path
    have = ", ".join(path.name for path in checkpoints(output_dir)) or "none"
    raise ResumeError(f'resume_from_checkpoint "{wanted}": no such folder in {output_dir} (it has {have})')


def save_checkpoint(
    output_dir: Path,
    step: int,
    *,
    adapter: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    save_lora: Any,
    keep: int,
) -> Path:
    """Write checkpoint-<step>, then remove the oldest beyond `keep`; `save_lora(folder)` writes the LoRA into it."""
    path = output_dir / f"checkpoint-{step}"
    tensors, numbers = split_tensors(optimizer.state_dict())
    with atomic_folder(path) as folder:
        save_lora(folder)
        save_file({name: t.detach().cpu().contiguous() for name, t in adapter.items()}, folder / ADAPTER_NAME)
        save_file(tensors, folder / OPTIMIZER_NAME)
        content = {"version": VERSION, "global_step": step, **state, "optimizer": numbers}
        (folder / STATE_NAME).write_text(json.dumps(content, indent=1, sort_keys=True), encoding="utf-8")
    # the new one stays, also where a run went back to an older step than those that are there
    others = [other for other in checkpoints(output_dir) if other != path]
    for old in others[: max(0, len(others) - keep + 1)]:
        remove_folder(old)
    return path


def load_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """(training state, adapter tensors, the optimiser's state dict) of a checkpoint folder; ResumeError where it is damaged."""
    try:
        state = json.loads((path / STATE_NAME).read_text(encoding="utf-8"))
        adapter = load_file(path / ADAPTER_NAME)
        tensors = load_file(path / OPTIMIZER_NAME)
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise ResumeError(
            f"{path}: damaged or not a checkpoint of fluxfast ({error}); name another with resume_from_checkpoint, "
            "or remove the folder to go on from the one before"
        ) from error
    if state.get("version") != VERSION:
        raise ResumeError(f"{path / STATE_NAME}: version {state.get('version')!r}, expected {VERSION}")
    return state, adapter, join_tensors(tensors, state.pop("optimizer"))


def split_tensors(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state dict as tensors by name, and the same structure in JSON with their names in their places."""
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value.detach().cpu().contiguous()
            return {"tensor": name}
        if isinstance(value, Mapping):
            # keys keep their type: torch numbers parameters with integers
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
