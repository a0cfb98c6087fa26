"""What a run was asked to do, and with what: `run.json` in its folder, for reports and cards.

It is written when the data are prepared and before the first step. It holds no secret; the paths in
it are this machine's, so that it stays here.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fluxfast.config.conditioning import ConditioningDataset
from fluxfast.config.dataset_fields import ImageDataset
from fluxfast.config.public import shown_settings
from fluxfast.config.run import TrainConfig, default_config
from fluxfast.doctor.machine import facts
from fluxfast.files import safe_name, write_atomic
from fluxfast.train.build import Parts, RunData

RECORD_NAME = "run.json"
_VERSION = 1
_PACKAGES = ("diffusers", "transformers", "peft")


def run_record(
    config: TrainConfig,
    data: RunData,
    parts: Parts,
    *,
    seed: int,
    steps: int,
    device: torch.device,
) -> dict[str, Any]:
    """The record of a run, as JSON.

    seed and steps are those in use, however the config came to them. `prompts` are validation's, by
    the names of their files. `changed` names the options that the config gives and that are not at
    their defaults.
    """
    drawn = parts.validator.settings.prompts if parts.validator else {}
    values, defaults = config.model_dump(), default_config().model_dump()
    return {
        "version": _VERSION,
        "config": shown_settings(config),
        "changed": [
            name
            for name, value in values.items()
            if name in config.model_fields_set and value != defaults[name]
        ],
        "seed": seed,
        "steps": steps,
        "datasets": _datasets(data),
        "prompts": [
            {"nickname": name, "file": safe_name(name), "prompt": edit.prompt}
            for name, edit in drawn.items()
        ],
        "versions": _versions(device),
    }


def write_run_record(output_dir: Path, record: Mapping[str, Any], *, step: int) -> None:
    """Write `run.json`; `starts` in it has the time and the step of each start of the run."""
    starts = read_run_record(output_dir).get("starts", []) if step else []
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    content = {**record, "starts": [*starts, {"time": now, "step": step}]}
    write_atomic(output_dir / RECORD_NAME, json.dumps(content, indent=1).encode())


def read_run_record(output_dir: Path) -> dict[str, Any]:
    """The record in a run's folder; {} where there is none that can be read."""
    try:
        record = json.loads((output_dir / RECORD_NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _datasets(data: RunData) -> list[dict[str, Any]]:
    """A row for each folder of images: what it is and what became of it."""
    folders = {dataset.id: dataset for dataset in data.config.folders}
    rows = []
    for report in data.prepared.report.datasets:
        dataset = folders.get(report.id)
        row: dict[str, Any] = {
            "id": report.id,
            "images": report.used,
            "left_out": len(report.skipped),
            "repeats": report.repeats,
            "samples_per_epoch": report.samples_per_epoch,
            "sizes": dict(report.buckets.most_common()),
        }
        if dataset is not None:
            row |= {
                "kind": _kind(dataset),
                "resolution": dataset.resolution,
                "resolution_type": dataset.resolution_type,
                "cropped": dataset.crop,
                "captions": dataset.caption_strategy,
                "prompt": dataset.instance_prompt,
                "probability": dataset.probability,
            }
        rows.append(row)
    return rows


def _kind(dataset: ImageDataset) -> str:
    if isinstance(dataset, ConditioningDataset):
        return dataset.conditioning_type
    return "regularisation" if dataset.is_regularisation_data else dataset.dataset_type


def _versions(device: torch.device) -> dict[str, str]:
    told = facts(device)
    found = {
        name: told[name] for name in ("fluxfast", "device", "driver", "torch", "cuda", "triton")
    }
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | {"python": platform.python_version(), "system": platform.system()}
