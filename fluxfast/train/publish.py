"""What a run leaves for others: its record, and its uploads to the Hub.

None of it stops a run: a failure is told once, and the run goes on.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fluxfast.config.conditioning import ConditioningDataset
from fluxfast.config.dataset_fields import ImageDataset
from fluxfast.config.public import shown_settings
from fluxfast.config.run import TrainConfig, default_config
from fluxfast.data.dataset_report import DatasetReport
from fluxfast.doctor.machine import facts
from fluxfast.train.build import Parts
from fluxfast.train.build_data import RunData
from fluxfast.train.events import Numbers
from fluxfast.train.hub import HubUploads
from fluxfast.train.hub_folder import gather
from fluxfast.train.image_files import file_words
from fluxfast.train.run_record import (
    RECORD_NAME,
    DatasetRow,
    Prompt,
    RunRecord,
    write_run_record,
)

_MACHINE = ("fluxfast", "device", "driver", "torch", "cuda", "triton")
_PACKAGES = ("diffusers", "transformers", "peft")


class Publisher:
    """Writes and uploads at the moments of a run that its methods are named after.

    repository: the Hub's, as `hub.check_access` gives it; "" where nothing is uploaded.
    """

    def __init__(
        self,
        config: TrainConfig,
        repository: str,
        record: RunRecord,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._record = config, record
        self._guard = Numbers(say).guard
        self._uploads: HubUploads | None = None
        if repository:
            self._uploads = HubUploads(
                repository,
                private=config.model_card_private,
                background=config.push_to_hub_background,
                say=say,
            )

    def start(self, step: int) -> None:
        """The run begins after so many steps, 0 for a new one."""
        with self._guard(RECORD_NAME):
            write_run_record(self._config.output_dir, self._record, step=step)

    def checkpoint(self, folder: Path, step: int) -> None:
        """A checkpoint has been saved, which is not the run's last."""
        if self._config.push_checkpoints_to_hub:
            self._upload(folder, step, f"checkpoint of step {step}")

    def end(self, step: int) -> None:
        """The adapter has been saved in the output folder."""
        self._upload(self._config.output_dir, step, f"adapter after {step} steps")

    def close(self) -> None:
        """Wait for uploads that are under way."""
        if self._uploads is not None:
            self._uploads.close()

    def _upload(self, source: Path, step: int, message: str) -> None:
        if self._uploads is None:
            return
        with self._guard("push_to_hub"):
            repository = self._uploads.repository
            folder = gather(self._config, self._record, source, repository=repository, step=step)
            self._uploads.upload(folder, message)


def run_record(
    config: TrainConfig,
    data: RunData,
    parts: Parts,
    *,
    seed: int,
    steps: int,
    device: torch.device,
) -> RunRecord:
    """The record of a run that is about to start."""
    drawn = parts.validator.settings.prompts if parts.validator else {}
    values, defaults = config.model_dump(), default_config().model_dump()
    changed = [name for name in config.model_fields_set if values[name] != defaults[name]]
    words = file_words(drawn)
    folders = {dataset.id: dataset for dataset in data.config.folders}
    return RunRecord(
        config=shown_settings(config),
        changed=tuple(sorted(changed)),
        seed=seed,
        steps=steps,
        datasets=tuple(
            _row(report, folders[report.id]) for report in data.prepared.report.datasets
        ),
        prompts=tuple(
            Prompt(nickname=name, file=words[name], prompt=edit.prompt)
            for name, edit in drawn.items()
        ),
        versions=_versions(device),
        choices=dict(parts.choices.reasons),
    )


def _row(report: DatasetReport, dataset: ImageDataset) -> DatasetRow:
    return DatasetRow(
        id=report.id,
        kind=_kind(dataset),
        images=report.used,
        left_out=len(report.skipped),
        repeats=report.repeats,
        samples_per_epoch=report.samples_per_epoch,
        resolution=f"{dataset.resolution:g} ({dataset.resolution_type})",
        cropped=dataset.crop,
        captions=dataset.caption_strategy or "",
        prompt=dataset.instance_prompt or "",
        sizes=dict(report.buckets.most_common()),
    )


def _kind(dataset: ImageDataset) -> str:
    if isinstance(dataset, ConditioningDataset):
        return dataset.conditioning_type
    return "regularisation" if dataset.is_regularisation_data else dataset.dataset_type


def _versions(device: torch.device) -> dict[str, str]:
    told = facts(device)
    found = {name: told[name] for name in _MACHINE if told[name] not in ("none", "None")}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | {"python": platform.python_version(), "system": platform.system()}
