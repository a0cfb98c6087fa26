"""Everything between a dataloader config and the first step: scan folders, fill caches, report.

The encoders are loaded one after the other, each only if the cache lacks something, and freed
before the next one. Where a dataset encodes on demand, the VAE is loaded again while the run
trains, for the first image that a batch needs and the cache lacks.
"""

import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from fluxfast.config.datasets import DataConfig, ImageDataset
from fluxfast.data.cache import TensorCache
from fluxfast.data.dataset_report import (
    DataReport,
    DatasetReport,
    filling_repeats,
    nothing_usable,
    too_few,
)
from fluxfast.data.encode import EncoderSettings, ImageEncoding, encode_prompts
from fluxfast.data.prepared import NewCrops, OnDemand, Prepared, PreparedDataset, Sample
from fluxfast.data.scan import Candidate, Scan, cropped_anew, scan, sizes_of_crops


@dataclass
class _Work:
    """One dataset on its way through the stages."""

    config: ImageDataset
    cache: TensorCache
    scan: Scan
    batch_size: int
    repeats: int
    encoded: int = 0
    notes: list[str] = field(default_factory=list)

    def key(self, candidate: Candidate) -> str:
        return f"{self.config.id}/{candidate.file}"

    @property
    def captions(self) -> Iterator[str]:
        """All captions of all images."""
        return chain.from_iterable(candidate.captions for candidate in self.scan.candidates)

    def sample(self, candidate: Candidate, images: ImageEncoding) -> Sample:
        return Sample(
            file=candidate.file,
            captions=candidate.captions,
            target=candidate.crop_plan.target,
            key=self.key(candidate),
            fingerprint=images.fingerprint(candidate),
            image=candidate if self.config.encodes_on_demand else None,
        )

    @property
    def all_notes(self) -> Iterator[str]:
        """Lines for the user, once everything is prepared."""
        yield from self.notes
        yield from (f"{self.config.id}: {note}" for note in self.scan.notes)
        if self.config.encodes_on_demand:
            kept = "and not kept" if self.config.vae_cache_disable else "and cached then"
            yield f"{self.config.id}: images are encoded when batches need them, {kept}"

    def report(self) -> DatasetReport:
        buckets = Counter(
            "{}x{}".format(*candidate.crop_plan.target) for candidate in self.scan.candidates
        )
        return DatasetReport(
            self.config.id,
            root=Path(self.config.instance_data_dir),
            found=self.scan.found,
            skipped=self.scan.skipped,
            buckets=buckets,
            repeats=self.repeats,
            encoded=self.encoded,
            unread=self.scan.unread,
        )


def prepare(
    data: DataConfig,
    encoders: EncoderSettings,
    *,
    train_batch_size: int = 1,
    gradient_accumulation_steps: int = 1,
    extra_prompts: Iterable[str] = (),
    skip_folders: Iterable[Path] = (),
    crop_seed: int = 0,
    aspect_bucket_rounding: int = 2,
    disable_bucket_pruning: bool = False,
    allow_dataset_oversubscription: bool = False,
    max_workers: int = 32,
    progress: Progress | None = None,
) -> Prepared:
    """Prepare the datasets of `data`.

    extra_prompts: texts to encode beside the captions and "", such as validation's.
    skip_folders: folders that are no data even if they lie in a dataset's folder.
    crop_seed: decides random crops; see below.
    disable_bucket_pruning: use a dataset even if it is too small to fill a step.
    allow_dataset_oversubscription: raise `repeats` until each bucket fills a step.
    progress: where to show progress bars, started by the caller (default: on its own).

    A run that draws its seed at the start must pass a constant as `crop_seed`: otherwise each start
    would crop, and so encode, all images anew. Raises ValueError naming each dataset that has
    nothing usable or too little, with the reason and what to change, or naming an encoder that
    can't be loaded.
    """
    text_cache, image_caches = _open_caches(data)
    skip = [text_cache.folder, *(cache.folder for cache in image_caches), *skip_folders]
    limits = _Limits(
        gradient_accumulation_steps,
        encoders.vae_batch_size,
        disable_bucket_pruning,
        allow_dataset_oversubscription,
    )
    with _bars(progress) as bars:
        works = []
        for dataset, cache in zip(data.images, image_caches, strict=True):
            bar = bars.add_task(f"scanning {escape(dataset.id)}", total=None)
            found = scan(
                dataset,
                cache,
                skip=skip,
                crop_seed=crop_seed,
                rounding=aspect_bucket_rounding,
                max_workers=dataset.max_workers or max_workers,
                on_file=functools.partial(_show, bars, bar),
            )
            batch_size = dataset.train_batch_size or train_batch_size
            works.append(_Work(dataset, cache, found, batch_size, dataset.repeats))
        # before the long part, and again after it: decoding may find damaged images
        limits.check(works)
        captions = chain.from_iterable(work.captions for work in works)
        texts = list(dict.fromkeys([*captions, "", *extra_prompts]))
        prompts, texts_encoded = encode_prompts(
            texts,
            text_cache,
            encoders,
            batch_size=data.text_embeds.text_encoder_batch_size,
            progress=bars,
        )
        with ImageEncoding(encoders, text_cache) as images:
            for work in works:
                _encode_images(work, images, max_workers, bars)
            limits.check(works)
            datasets = tuple(
                _prepared(work, images, crop_seed, aspect_bucket_rounding) for work in works
            )
    notes = [note for work in works for note in work.all_notes]
    return Prepared(
        datasets,
        prompts,
        DataReport([work.report() for work in works], len(texts), texts_encoded, notes),
    )


@dataclass(frozen=True)
class _Limits:
    """The rules that a dataset must keep to fill the steps of a run."""

    gradient_accumulation_steps: int
    vae_batch_size: int
    disabled: bool
    raise_repeats: bool

    def check(self, works: list[_Work]) -> None:
        """Raise one ValueError that names every dataset which can't be used."""
        problems = []
        for work in works:
            problem = self._problem(work)
            if problem:
                problems.append(problem)
        if problems:
            raise ValueError("\n".join(problems))

    def _problem(self, work: _Work) -> str | None:
        row = work.report()
        work.notes = []
        if not row.used:
            return nothing_usable(row)
        rule = {
            "batch_size": work.batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "vae_batch_size": work.config.vae_batch_size or self.vae_batch_size,
        }
        if self.raise_repeats:
            work.repeats = filling_repeats(row, **rule)
        elif not self.disabled and (problem := too_few(row, **rule)):
            return problem
        if work.repeats != work.config.repeats:
            work.notes.append(
                f"{row.id}: repeats raised from {work.config.repeats} to {work.repeats}, to "
                "fill every step"
            )
        small = [
            size
            for size, count in row.buckets.items()
            if count * (1 + work.repeats) < work.batch_size
        ]
        if small:
            work.notes.append(
                f"{row.id}: batches of {', '.join(small)} are filled up with repeats, as these "
                f"sizes have fewer samples than train_batch_size {work.batch_size}"
            )
        return None


def _open_caches(data: DataConfig) -> tuple[TensorCache, list[TensorCache]]:
    """The texts' cache and each dataset's, one object a folder however often it is named."""
    opened: dict[Path, TensorCache] = {}
    folders = [
        Path(data.text_embeds.cache_dir),
        *(Path(dataset.cache_dir_vae) for dataset in data.images),
    ]
    for folder in folders:
        if folder.resolve() not in opened:
            opened[folder.resolve()] = TensorCache(folder)
    caches = [opened[folder.resolve()] for folder in folders]
    return caches[0], caches[1:]


def _encode_images(work: _Work, images: ImageEncoding, max_workers: int, bars: Progress) -> None:
    if work.config.encodes_on_demand:
        return
    wanted = [(work.key(candidate), candidate) for candidate in work.scan.candidates]
    work.encoded, unreadable = images.encode(
        wanted,
        work.cache,
        batch_size=work.config.vae_batch_size,
        max_workers=work.config.max_workers or max_workers,
        progress=bars,
        name=work.config.id,
    )
    dropped = {skipped.file for skipped in unreadable}
    left = [candidate for candidate in work.scan.candidates if candidate.file not in dropped]
    work.scan = replace(work.scan, candidates=left, skipped=[*work.scan.skipped, *unreadable])


def _prepared(work: _Work, images: ImageEncoding, crop_seed: int, rounding: int) -> PreparedDataset:
    config = work.config
    samples = tuple(work.sample(candidate, images) for candidate in work.scan.candidates)
    new_crops = on_demand = None
    if config.encodes_on_demand:
        on_demand = OnDemand(images.encode_one, keeps=not config.vae_cache_disable)
    if config.vae_cache_clear_each_epoch:
        # a batch of the last epoch may be read while the sampler is in the next one
        @functools.lru_cache(maxsize=2)
        def samples_of(epoch: int) -> tuple[Sample, ...]:
            return tuple(
                work.sample(
                    cropped_anew(config, each, epoch, crop_seed=crop_seed, rounding=rounding),
                    images,
                )
                for each in work.scan.candidates
            )

        new_crops = NewCrops(samples_of, sizes_of_crops(config, rounding))
    return PreparedDataset(
        id=config.id,
        samples=samples,
        on_demand=on_demand,
        new_crops=new_crops,
        cache=work.cache,
        repeats=work.repeats,
        probability=config.probability,
        train_batch_size=work.batch_size,
        start_epoch=config.start_epoch,
        start_step=config.start_step,
        end_epoch=config.end_epoch,
        end_step=config.end_step,
        timestep_sampling_offset=config.timestep_sampling_offset,
        is_regularisation_data=config.is_regularisation_data,
    )


def _show(bars: Progress, bar: TaskID, done: int, total: int) -> None:
    bars.update(bar, completed=done, total=total)


@contextmanager
def _bars(progress: Progress | None) -> Iterator[Progress]:
    if progress is not None:
        yield progress
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as own:
        yield own
