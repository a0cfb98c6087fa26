"""What the datasets of a run hold, before anything is encoded: their scans, and what a run needs.

`prepare` begins with it, and `inspection`, which only shows what there is, is made of it.
"""

import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from rich.markup import escape
from rich.progress import Progress, TaskID

from fluxfast.config.datasets import DataConfig, ImageDataset
from fluxfast.data.backends import bring
from fluxfast.data.cache import TensorCache
from fluxfast.data.dataset_report import (
    DatasetReport,
    filling_repeats,
    nothing_usable,
    too_few,
)
from fluxfast.data.pairs import Pairing, pair
from fluxfast.data.scan import Scan, Skipped, scan
from fluxfast.progress import counting


@dataclass
class SurveyedDataset:
    """One dataset on its way through the stages.

    `skip` are folders that are no data even if they lie in the dataset's folder; `workers` is how
    many threads read its images. `crop_seed` and `rounding` are the run's, for its crops.
    """

    config: ImageDataset
    cache: TensorCache
    scan: Scan
    batch_size: int
    repeats: int
    workers: int
    skip: tuple[Path, ...] = ()
    crop_seed: int = 0
    rounding: int = 2
    pairings: list[Pairing] = field(default_factory=list)
    encoded: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def captions(self) -> Iterator[str]:
        """All captions of all images, and of the references that come with them."""
        partners = (p for pairing in self.pairings for p in pairing.partners.values())
        return chain.from_iterable(
            candidate.captions for candidate in chain(self.scan.candidates, partners)
        )

    @property
    def all_notes(self) -> Iterator[str]:
        """Lines for the user, once everything is looked at."""
        yield from self.own_notes
        for pairing in self.pairings:
            yield from pairing.notes()

    @property
    def own_notes(self) -> Iterator[str]:
        """Those of the lines that are not on its conditioning datasets."""
        yield from self.notes
        yield from (f"{self.config.id}: {note}" for note in self.scan.notes)
        if self.config.encodes_on_demand:
            kept = "and not kept" if self.config.vae_cache_disable else "and cached then"
            yield f"{self.config.id}: images are encoded when batches need them, {kept}"

    def leave_out(self, unreadable: Iterable[Skipped]) -> None:
        """Take images out that turned out to be unusable when they were decoded."""
        more = list(unreadable)
        dropped = {skipped.file for skipped in more}
        left = [candidate for candidate in self.scan.candidates if candidate.file not in dropped]
        self.scan = replace(self.scan, candidates=left, skipped=[*self.scan.skipped, *more])

    def leave_out_beside(self, pairing: Pairing, unreadable: Iterable[Skipped]) -> None:
        """Take the images out whose partners turned out to be unusable."""
        why = {each.file: each.reason for each in unreadable}
        partners = {image: partner.file for image, partner in pairing.partners.items()}
        self.leave_out(
            Skipped(image.file, f"its {pairing.config.conditioning_type}: {why[file]}", file)
            for image in self.scan.candidates
            if (file := partners.get(image.file)) in why
        )

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


@dataclass(frozen=True)
class Survey:
    """Every dataset's scan, the text cache, and the rules that the datasets must keep."""

    datasets: list[SurveyedDataset]
    text_cache: TensorCache
    gradient_accumulation_steps: int
    vae_batch_size: int
    disable_bucket_pruning: bool
    allow_dataset_oversubscription: bool

    def check(self) -> None:
        """Raise one ValueError that names every dataset which can't fill the steps of a run.

        Where the run raises `repeats`, this raises those of the datasets.
        """
        problems = []
        for work in self.datasets:
            problem = self._problem(work)
            if problem:
                problems.append(problem)
            problems += chain.from_iterable(pairing.problems() for pairing in work.pairings)
        if problems:
            raise ValueError("\n".join(problems))

    def _problem(self, work: SurveyedDataset) -> str | None:
        row = work.report()
        work.notes = []
        if not row.used:
            return nothing_usable(row)
        if work.config.is_held_out:
            return None
        rule = {
            "batch_size": work.batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "vae_batch_size": work.config.vae_batch_size or self.vae_batch_size,
        }
        if self.allow_dataset_oversubscription:
            work.repeats = filling_repeats(row, **rule)
        elif not self.disable_bucket_pruning and (problem := too_few(row, **rule)):
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


def survey(
    data: DataConfig,
    bars: Progress,
    *,
    train_batch_size: int = 1,
    gradient_accumulation_steps: int = 1,
    vae_batch_size: int = 4,
    skip_folders: Iterable[Path] = (),
    crop_seed: int = 0,
    aspect_bucket_rounding: int = 2,
    disable_bucket_pruning: bool = False,
    allow_dataset_oversubscription: bool = False,
    max_workers: int = 32,
) -> Survey:
    """Open the caches of `data`, fetch what lies elsewhere and scan its folders.

    Nothing is decoded or encoded.

    bars: where to show progress.
    skip_folders: folders that are no data even if they lie in a dataset's folder.
    crop_seed: decides random crops; see below.
    disable_bucket_pruning: use a dataset even if it is too small to fill a step.
    allow_dataset_oversubscription: raise `repeats` until each bucket fills a step.

    A run that draws its seed at the start must pass a constant as `crop_seed`: otherwise each start
    would crop, and so encode, all images anew. Raises ValueError naming each folder that can't be
    looked into. Whether there are enough images is looked at by `Survey.check`.
    """
    caches = _open_caches(data)
    text_cache = caches[data.text_embeds.cache_dir.resolve()]
    skip = (*(cache.folder for cache in caches.values()), *skip_folders)
    datasets, problems = [], []

    def scanned(dataset: ImageDataset) -> Scan | None:
        workers = dataset.max_workers or max_workers
        try:
            contents = bring(dataset, workers, bars)
            bar = bars.add_task(f"scanning {escape(dataset.id)}", total=None)
            return scan(
                dataset,
                caches[dataset.cache_dir_vae.resolve()],
                contents=contents,
                skip=skip,
                crop_seed=crop_seed,
                rounding=aspect_bucket_rounding,
                max_workers=workers,
                on_file=functools.partial(_show, bars, bar),
            )
        except ValueError as error:
            problems.append(str(error))
            return None

    for dataset in data.datasets:
        found = scanned(dataset)
        conditions = [(each, scanned(each.as_scanned)) for each in data.conditions(dataset.id)]
        if found is None:
            continue
        # the evaluation loss is computed image by image
        batch_size = 1 if dataset.is_held_out else dataset.train_batch_size or train_batch_size
        datasets.append(
            SurveyedDataset(
                dataset,
                caches[dataset.cache_dir_vae.resolve()],
                found,
                batch_size,
                0 if dataset.is_held_out else dataset.repeats,
                dataset.max_workers or max_workers,
                skip,
                crop_seed,
                aspect_bucket_rounding,
                [
                    pair(dataset.id, found, each, caches[each.cache_dir_vae.resolve()], own)
                    for each, own in conditions
                    if own is not None
                ],
            )
        )
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))
    return Survey(
        datasets,
        text_cache,
        gradient_accumulation_steps,
        vae_batch_size,
        disable_bucket_pruning,
        allow_dataset_oversubscription,
    )


@contextmanager
def started(progress: Progress | None) -> Iterator[Progress]:
    """The given bars, which the caller has started, or ones of its own for the block."""
    if progress is not None:
        yield progress
        return
    with counting() as own:
        yield own


def _open_caches(data: DataConfig) -> dict[Path, TensorCache]:
    """The texts' cache and each dataset's by its folder, however often that is named."""
    opened: dict[Path, TensorCache] = {}
    for folder in (data.text_embeds.cache_dir, *(each.cache_dir_vae for each in data.folders)):
        if folder.resolve() not in opened:
            opened[folder.resolve()] = TensorCache(folder)
    return opened


def _show(bars: Progress, bar: TaskID, done: int, total: int) -> None:
    bars.update(bar, completed=done, total=total)
