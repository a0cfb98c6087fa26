"""What a run's datasets will come to, from the headers of the images that are here already.

Nothing is decoded, fetched or written, so `fluxfast-train plan` can look where nothing is prepared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from math import ceil
from typing import NamedTuple

from fluxfast.config.datasets import DataConfig, ImageDataset
from fluxfast.config.run import TrainConfig
from fluxfast.data.buckets import batches_in_epoch
from fluxfast.data.dataset_report import DatasetReport, filling_repeats
from fluxfast.data.scan import Scan, scan, sizes_of_crops
from fluxfast.train.choose import BatchShape, Size, batch_of
from fluxfast.train.data_options import survey_options


class SeenDataset(NamedTuple):
    """What the headers of a dataset's images say.

    sizes: how many images are trained at each size, (width, height) in pixels. A size that only
    a later epoch's crops may have counts 0. batches: of each size, in an epoch. captions: the
    different texts.
    """

    dataset: ImageDataset
    sizes: Mapping[Size, int]
    batches: Mapping[Size, int]
    captions: frozenset[str]

    @property
    def images(self) -> int:
        return sum(self.sizes.values())


class RunLength(NamedTuple):
    """Optimiser steps of a run, and those of an epoch; None where nobody knows them yet."""

    steps: int | None
    steps_per_epoch: int | None


def look(config: TrainConfig, data: DataConfig) -> tuple[list[SeenDataset], list[str]]:
    """(what is seen of each dataset whose images are here, a line on each that is not).

    Datasets that are held out are looked at too, since their images are encoded.
    """
    seen, notes, absent = [], [], []
    options = survey_options(config)
    caches = [data.text_embeds.cache_dir, *(each.cache_dir_vae for each in data.folders)]
    for dataset in data.datasets:
        if dataset.origin is not None or not dataset.instance_data_dir.is_dir():
            absent.append(dataset.id)
            continue
        found = scan(
            dataset,
            None,
            skip=[*caches, *options["skip_folders"]],
            crop_seed=options["crop_seed"],
            rounding=options["aspect_bucket_rounding"],
            max_workers=dataset.max_workers or config.max_workers,
        )
        if found.candidates:
            seen.append(_seen(config, dataset, found))
        else:
            why = Counter(skipped.reason for skipped in found.skipped)
            told = ", ".join(f"{count} {reason}" for reason, count in why.most_common())
            where = dataset.instance_data_dir
            notes.append(f"{dataset.id}: no usable image in {where}{told and f' ({told})'}")
    if absent:
        notes.append(
            f"The images of {', '.join(absent)} are not here yet: their sizes are reckoned from "
            "the settings."
        )
    return seen, notes


def _seen(config: TrainConfig, dataset: ImageDataset, found: Scan) -> SeenDataset:
    options = survey_options(config)
    sizes = Counter(candidate.crop_plan.target for candidate in found.candidates)
    rule = {
        "batch_size": dataset.train_batch_size or config.train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "vae_batch_size": dataset.vae_batch_size or config.vae_batch_size,
    }
    repeats = dataset.repeats
    if options["allow_dataset_oversubscription"] and not dataset.is_held_out:
        named = Counter({"{}x{}".format(*size): count for size, count in sizes.items()})
        root = dataset.instance_data_dir
        row = DatasetReport(dataset.id, root, found.found, found.skipped, named, repeats)
        repeats = filling_repeats(row, **rule)
    batches = {
        size: batches_in_epoch(count, repeats=repeats, batch_size=rule["batch_size"])
        for size, count in sizes.items()
    }
    drawn = sizes_of_crops(dataset, options["aspect_bucket_rounding"])
    captions = frozenset(text for each in found.candidates for text in each.captions)
    return SeenDataset(dataset, dict.fromkeys(drawn, 0) | sizes, batches, captions)


def batches_of(
    config: TrainConfig, data: DataConfig, seen: Iterable[SeenDataset]
) -> dict[BatchShape, int]:
    """The batches of an epoch, each shape with its number."""
    found: Counter[BatchShape] = Counter()
    for each in seen:
        if not each.dataset.is_held_out and each.dataset.probability:
            for size, count in each.batches.items():
                found[batch_of(config, each.dataset, size, data)] += count
    return dict(found)


def length_of(
    config: TrainConfig, data: DataConfig | None, seen: Iterable[SeenDataset]
) -> RunLength:
    """How long the run is, by "max_train_steps", or by its epochs where its images are here.

    Datasets that start or end on the way are counted as if they took part from beginning to end.
    """
    own = {each.dataset.id: each for each in seen}
    per_epoch = epochs = None
    if data is not None and all(image.id in own for image in data.images):
        batches = sum(batches_of(config, data, own.values()).values())
        per_epoch = ceil(batches / config.gradient_accumulation_steps)
        epochs = ceil(batches * config.num_train_epochs / config.gradient_accumulation_steps)
    return RunLength(config.max_train_steps or epochs, per_epoch)
