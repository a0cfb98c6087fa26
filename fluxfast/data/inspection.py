"""A look at the datasets of a run before anything is encoded: `fluxfast-train data`.

Every image is decoded once, small, to find damaged files and images that look the same. What that
gives is kept beside the scan's facts, so that the next look opens only files that have changed.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rich.markup import escape
from rich.progress import Progress

from fluxfast.data.buckets import batches_in_epoch
from fluxfast.data.cache import TensorCache
from fluxfast.data.caption_lengths import LongCaptions, TokenCounter, long_captions
from fluxfast.data.duplicates import EDGE, equal_files, image_print, near_images
from fluxfast.data.images import UnreadableImage, load_image
from fluxfast.data.pairs import Pairing
from fluxfast.data.remarks import CaptionFiles, Remarks, caption_files, remarks
from fluxfast.data.scan import UNREADABLE, Candidate, Skipped, map_files
from fluxfast.data.survey import Survey, SurveyedDataset

# raise it when the same image comes to give another print
_PRINT_VERSION = 1
# an eighth of a camera's image, and still several pixels for each of the print's
_PRINT_DECODE = 16 * EDGE
_FILES_PER_WRITE = 256


@dataclass(frozen=True)
class BucketRow:
    """A size of a dataset: its images, and the batches of an epoch.

    `filled` counts the samples that an epoch's last batch takes from a further pass.
    """

    aspect: str
    size: str
    images: int
    batches: int
    filled: int


@dataclass(frozen=True)
class PairRow:
    """A conditioning dataset beside the images that it belongs to.

    pairs: how many images have a partner that a run can use. missing, unfit, orphans,
    other_extension: as in `Pairing`.
    """

    id: str
    kind: str
    folder: str
    pairs: int
    missing: dict[str, str]
    unfit: dict[str, str]
    orphans: list[str]
    other_extension: int


@dataclass(frozen=True)
class Inspected:
    """What a dataset will become, and what is odd about it.

    equal, near: groups of files of one content, and of files whose images look the same.
    """

    dataset: SurveyedDataset
    buckets: list[BucketRow]
    equal: list[list[str]]
    near: list[list[str]]
    captions: LongCaptions
    caption_files: CaptionFiles
    remarks: Remarks
    pairs: list[PairRow]


def inspect(found: Survey, counter: TokenCounter, bars: Progress) -> tuple[list[Inspected], str]:
    """Look at every image of the surveyed datasets.

    Returns what was found of each dataset, and why a run could not start with them ("" if it
    could).
    """
    prints = [_look_at(dataset, bars) for dataset in found.datasets]
    problem = ""
    try:
        # this may raise the datasets' repeats, which the tables of buckets show
        found.check()
    except ValueError as error:
        problem = str(error)
    return [
        _inspect(dataset, known, counter)
        for dataset, known in zip(found.datasets, prints, strict=True)
    ], problem


def _inspect(
    dataset: SurveyedDataset, prints: dict[str, bytes], counter: TokenCounter
) -> Inspected:
    candidates = dataset.scan.candidates
    equal = equal_files([c.file for c in candidates], [c.sha256 for c in candidates])
    # of equal files, the first one stands for all
    repeated = {file for group in equal for file in group[1:]}
    distinct = [c.file for c in candidates if c.file not in repeated]
    files = caption_files(dataset.config, dataset.skip)
    return Inspected(
        dataset,
        bucket_rows(dataset),
        equal,
        near_images(distinct, [prints[file] for file in distinct]),
        long_captions(_captions(dataset), counter),
        files,
        remarks(dataset.config, dataset.scan, files),
        _pair_rows(dataset),
    )


def _captions(dataset: SurveyedDataset) -> Iterator[tuple[str, str]]:
    """Each caption that a batch may come with, and the file that it belongs to."""
    for image in dataset.scan.candidates:
        yield from ((image.file, caption) for caption in image.captions)
    for pairing in dataset.pairings:
        if not pairing.config.is_mask:
            for reference in _distinct_partners(pairing):
                yield from ((pairing.name(reference), caption) for caption in reference.captions)


def _pair_rows(dataset: SurveyedDataset) -> list[PairRow]:
    return [
        PairRow(
            id=pairing.config.id,
            kind=pairing.config.conditioning_type,
            folder=str(pairing.config.instance_data_dir),
            pairs=sum(map(pairing.fits, dataset.scan.candidates)),
            missing=dict(pairing.missing),
            unfit=dict(pairing.unfit),
            orphans=list(pairing.orphans),
            other_extension=pairing.other_extension,
        )
        for pairing in dataset.pairings
    ]


def _distinct_partners(pairing: Pairing) -> list[Candidate]:
    """Each file that belongs to an image, once."""
    return list({partner.file: partner for partner in pairing.partners.values()}.values())


def bucket_rows(dataset: SurveyedDataset) -> list[BucketRow]:
    """The dataset's sizes, from the narrowest to the widest."""
    counts = Counter((c.crop_plan.bucket, c.crop_plan.target) for c in dataset.scan.candidates)
    rows = []
    for (aspect, size), images in sorted(counts.items(), key=lambda item: item[0][1]):
        batches = batches_in_epoch(images, repeats=dataset.repeats, batch_size=dataset.batch_size)
        filled = batches * dataset.batch_size - images * (1 + dataset.repeats)
        rows.append(BucketRow(aspect, "{}x{}".format(*size), images, batches, filled))
    return rows


def _look_at(dataset: SurveyedDataset, bars: Progress) -> dict[str, bytes]:
    """The print of each image by its file.

    What can't be decoded is left out of the dataset, and so is an image whose partner can't be.
    """
    prints, damaged = _prints(
        dataset.config.id,
        dataset.scan.candidates,
        dataset.cache,
        dataset.workers,
        bars,
    )
    dataset.leave_out(damaged)
    for pairing in dataset.pairings:
        partners = _distinct_partners(pairing)
        _, damaged = _prints(pairing.config.id, partners, pairing.cache, dataset.workers, bars)
        dataset.leave_out_beside(pairing, damaged)
    return prints


def _prints(
    id: str,
    candidates: Sequence[Candidate],
    cache: TensorCache,
    workers: int,
    bars: Progress,
) -> tuple[dict[str, bytes], list[Skipped]]:
    """The print of each image by its file, and the images that can't be decoded.

    cache: keeps the prints. workers: threads at most.
    """
    bar = bars.add_task(f"looking at {escape(id)}", total=len(candidates))
    found: dict[str, bytes] = {}
    damaged, unsaved = [], []

    def name(candidate: Candidate) -> str:
        # no file's name holds a zero
        return f"{candidate.path.absolute()}\0print {_PRINT_VERSION}"

    def look(candidate: Candidate) -> tuple[bytes | UnreadableImage, os.stat_result | None]:
        """The print, and the file's stat where the cache did not know the print."""
        try:
            stat = candidate.path.stat()
            known = cache.file_facts(name(candidate), stat)
            if known is not None:
                return bytes.fromhex(known["print"]), None
            return image_print(load_image(candidate.path, at_least=_PRINT_DECODE)), stat
        except UnreadableImage as error:
            return error, None
        except OSError as error:
            return UnreadableImage(candidate.path, f"can't be read: {error.strerror}"), None

    # a decoded image may take a hundred megabytes, and more threads than cores gain nothing
    with ThreadPoolExecutor(min(workers, os.cpu_count() or 1)) as pool:
        looked_at = map_files(pool, look, candidates)
        for candidate, (known, stat) in zip(candidates, looked_at, strict=True):
            bars.advance(bar)
            if isinstance(known, UnreadableImage):
                damaged.append(Skipped(candidate.file, UNREADABLE, known.reason))
                continue
            found[candidate.file] = known
            if stat is not None:
                unsaved.append((name(candidate), stat, {"print": known.hex()}))
            if len(unsaved) == _FILES_PER_WRITE:
                cache.remember_files(unsaved)
                unsaved = []
    cache.remember_files(unsaved)
    return found, damaged
