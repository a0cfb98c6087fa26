"""Preparing a run's data, as its config asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from fluxfast.config.datasets import DataConfig, load_data_config
from fluxfast.config.run import TrainConfig
from fluxfast.data.batches import Batch, BatchLoader
from fluxfast.data.encode import EncoderSettings
from fluxfast.data.prepare import prepare
from fluxfast.data.prepared import Prepared, PreparedDataset
from fluxfast.data.sampler import Sampler
from fluxfast.progress import counting
from fluxfast.train.base_model import quantizing_device
from fluxfast.train.build_validator import VAE_DTYPES, validation_prompts
from fluxfast.train.choose import BatchShape, tokens_of
from fluxfast.train.data_options import survey_options
from fluxfast.train.events import say
from fluxfast.train.run_events import RunEvents


@dataclass
class RunData:
    """The prepared datasets, the position in them, and the options of `load_batch`."""

    config: DataConfig
    prepared: Prepared
    sampler: Sampler
    batch_options: Mapping[str, Any]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) of every image in the first epoch."""
        return [sample.target for dataset in self.prepared.datasets for sample in dataset.samples]

    @property
    def batch_shapes(self) -> list[BatchShape]:
        """The batches of every epoch, each once."""
        combined = bool(self.batch_options["combine_references"])
        datasets = self.prepared.datasets
        return [shape for dataset in datasets for shape in _batch_shapes(dataset, combined)]

    @property
    def encoded_pixels(self) -> int:
        """Pixels of the largest image that is encoded while the run trains; 0: none is."""
        on_demand = [each for each in self.prepared.datasets if each.on_demand is not None]
        return max((w * h for dataset in on_demand for w, h in dataset.sizes), default=0)

    @property
    def resolution(self) -> tuple[int, int]:
        """(width, height) of most images, for the LoRA's metadata."""
        sizes = self.sizes
        return max(sorted(set(sizes)), key=sizes.count)

    @property
    def instance_prompts(self) -> list[str]:
        return sorted(
            {dataset.instance_prompt for dataset in self.config.images if dataset.instance_prompt}
        )

    def loader(self, batch: int, then: Callable[[Batch, int], Any]) -> BatchLoader:
        """What `then` makes of the run's batches, from number `batch` on.

        Batches are counted from 0, over all micro-steps.
        """
        return BatchLoader(
            self.prepared,
            self.sampler,
            step=batch,
            **self.batch_options,
            then=then,
        )


def _batch_shapes(dataset: PreparedDataset, combined: bool) -> Iterator[BatchShape]:
    """A batch for each size of a dataset, with the most tokens of references that it may have."""
    total = sum if combined else max
    most: dict[tuple[int, int], int] = {}
    for sample in dataset.samples:
        tokens = total([tokens_of(reference.target) for reference in sample.references] or [0])
        most[sample.target] = max(tokens, most.get(sample.target, 0))
    for size in sorted(dataset.sizes):
        # a size that only a later epoch has is taken for the largest
        references = most.get(size, max(most.values(), default=0))
        yield BatchShape(size, dataset.train_batch_size, dataset.id, references)


def load_data(
    config: TrainConfig, seed: int, device: torch.device, console: Console, events: RunEvents
) -> RunData:
    """Read the dataloader's config, fill the caches, print the closing table."""
    data = load_data_config(config.data_backend_config, defaults=config.dataset_defaults)
    for note in data.notes:
        say(console, note)
    prompts = validation_prompts(config)
    with counting(console) as progress:
        prepared = prepare(
            data,
            _encoder_settings(config, device),
            extra_prompts=[
                *prompts.values(),
                *([config.validation_negative_prompt] if prompts else []),
            ],
            progress=progress,
            encoding=events.stage("init_vae_cache"),
            remark=console.print,
            **survey_options(config),
        )
    console.print(prepared.report)
    sampler = Sampler(
        prepared.datasets,
        seed=seed,
        sampling=config.data_backend_sampling,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
    )
    return RunData(
        data,
        prepared,
        sampler,
        {
            "caption_dropout_probability": config.caption_dropout_probability,
            "combine_references": config.combines_references,
            "masked_loss_probability": config.masked_loss_probability,
        },
    )


def _encoder_settings(config: TrainConfig, device: torch.device) -> EncoderSettings:
    quantised = {config.text_encoder_1_precision, config.text_encoder_2_precision} != {"no_change"}
    return EncoderSettings(
        pipeline=config.base_source,
        vae=config.vae_source,
        t5=config.t5_source,
        variant=config.variant,
        device=device,
        text_dtype=config.weight_dtype,
        clip_precision=config.text_encoder_1_precision,
        t5_precision=config.text_encoder_2_precision,
        quantize_on=quantizing_device(config.quantize_via, device) if quantised else "cpu",
        vae_dtype=VAE_DTYPES[config.vae_dtype],
        max_length=config.tokenizer_max_length,
        t5_padding=config.t5_padding,
        vae_batch_size=config.vae_batch_size,
        vae_tiling=config.vae_enable_tiling,
        vae_slicing=config.vae_enable_slicing,
    )
