"""The run that `fluxfast-train plan` plans: its config, and what is here of its data and model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fluxfast.config.dataset_fields import ImageDataset
from fluxfast.config.datasets import DataConfig, load_data_config
from fluxfast.config.run import TrainConfig

if TYPE_CHECKING:
    # torch loads once the config is known to be right
    from fluxfast.checkpoint.transformer import Checkpoint
    from fluxfast.memory.sizes import Workload
    from fluxfast.train.choose import BatchShape
    from fluxfast.train.outlook import SeenDataset


@dataclass(frozen=True)
class Run:
    """A run that is planned: its config, and what is here of its data and its model.

    Attributes:
        data: the dataloader's config; None where its file is not there.
        datasets: those that are trained on, or a stand-in for them.
        seen: what is known of the images that are here.
        base: the transformer's checkpoint; None where it is not on this machine.
        assistant: bytes of the assistant LoRA.
    """

    config: TrainConfig
    data: DataConfig | None
    datasets: Sequence[ImageDataset]
    seen: Sequence[SeenDataset]
    base: Checkpoint | None
    assistant: int

    @cached_property
    def sizes(self) -> dict[str, list[tuple[int, int]]]:
        """The sizes of the images that are here, by their datasets' ids."""
        return {each.dataset.id: list(each.sizes) for each in self.seen}

    @cached_property
    def largest(self) -> BatchShape:
        from fluxfast.train.choose import largest_batch

        return largest_batch(self.config, self.datasets, self.data, self.sizes)

    @cached_property
    def batches(self) -> dict[BatchShape, int]:
        """The batches of an epoch that are known, each with its number."""
        from fluxfast.train.outlook import batches_of

        return {} if self.data is None else batches_of(self.config, self.data, self.seen)

    def workload(self, batch: BatchShape, compute: str = "same") -> Workload:
        from fluxfast.train.choose import encoded_pixels, workload_of

        pixels = encoded_pixels(self.config, self.datasets, self.sizes)
        work = workload_of(
            self.config, batch, self.base, encoded_pixels=pixels, assistant=self.assistant
        )
        return replace(work, compute=compute)


def run_of(config: TrainConfig) -> tuple[Run, list[str]]:
    """(the run, what has to be said of what is not here)."""
    from fluxfast.train.adapter import config_of, read_init_lora
    from fluxfast.train.outlook import look

    data, datasets, notes = _datasets(config)
    if config.init_lora and Path(config.init_lora).exists():
        # its file says rank and modules
        config = config_of(config, read_init_lora(config, None))
    seen, unseen = look(config, data) if data else ([], [])
    notes += unseen
    assistant = _assistant(config, notes)
    return Run(config, data, datasets, seen, _local_base(config), assistant), notes


def _local_base(config: TrainConfig) -> Checkpoint | None:
    """The transformer's checkpoint, opened, if it is on this machine; nothing is downloaded."""
    from fluxfast.train.base_model import open_base

    where = Path(config.transformer_source.path).expanduser()
    return open_base(config) if where.exists() else None


def _datasets(config: TrainConfig) -> tuple[DataConfig | None, list[ImageDataset], list[str]]:
    """The dataloader's config, the datasets whose sizes count, and what has to be said of them."""
    if config.data_backend_config.exists():
        data = load_data_config(config.data_backend_config, defaults=config.dataset_defaults)
        return data, list(data.images), []
    stand_in = ImageDataset.model_validate(
        {
            "id": "?",
            "resolution": config.resolution,
            "resolution_type": config.resolution_type,
            "caption_strategy": "filename",
            "instance_data_dir": ".",
            "cache_dir_vae": ".",
        }
    )
    return (
        None,
        [stand_in],
        [f"{config.data_backend_config} is not there: reckoned with the config's own resolution"],
    )


def _assistant(config: TrainConfig, notes: list[str]) -> int:
    """Bytes of the assistant LoRA. One that would have to be fetched is noted, and not counted."""
    from fluxfast.train.assistant import assistant_bytes

    if config.assistant_lora is None or Path(config.assistant_lora).exists():
        return assistant_bytes(config)
    notes.append(f"the assistant LoRA {config.assistant_lora} is not here, and not counted")
    return 0


def length_in_steps(run: Run) -> dict[str, int | None]:
    """Images, steps and the steps of an epoch; None where nobody knows them yet."""
    from fluxfast.train.outlook import length_of

    length = length_of(run.config, run.data, run.seen)
    trained = [each for each in run.seen if not each.dataset.is_held_out]
    return {
        "images": sum(each.images for each in trained) if trained else None,
        "steps": length.steps,
        "steps_per_epoch": length.steps_per_epoch,
    }


def encoded_at_a_time(run: Run) -> Iterator[tuple[int, int, int]]:
    """(width, height, how many) of the images that the autoencoder encodes at a time."""
    from fluxfast.train.choose import largest_batch

    seen = {each.dataset.id: each for each in run.seen}
    for dataset in run.datasets:
        most = dataset.vae_batch_size or run.config.vae_batch_size
        if dataset.id in seen:
            for size, count in seen[dataset.id].sizes.items():
                yield *size, min(most, max(count, 1))
        else:
            yield *largest_batch(run.config, [dataset]).size, most
