"""A look at the datasets of a run before anything is encoded: `fluxfast-train data`.

Every image is decoded once, small, to find damaged files and images that look the same. What that
gives is kept beside the scan's facts, so that the next look opens only files that have changed.
"""

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from rich.progress import Progress

from fluxfast.data.buckets import batches_in_epoch
from fluxfast.data.caption_lengths import LongCaptions, TokenCounter, long_captions
from fluxfast.data.duplicates import EDGE, equal_files, image_print, near_images
from fluxfast.data.image_kinds import looks_like_an_image
from fluxfast.data.images import UnreadableImage, files_below, load_image
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
class Partners:
    """Files that belong to an image, and images that they belong to.

    alone: caption files without an image, as paths below the folder. ignored: how many images have
    a caption file that `caption_strategy` doesn't read.
    """

    alone: list[str]
    ignored: int


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
    partners: Partners


def inspect(found: Survey, counter: TokenCounter, bars: Progress) -> tuple[list[Inspected], str]:
    """Look at every image of the surveyed datasets.

    Returns what was found of each dataset, and why a run could not start with them ("" if it
    could).
    """
    prints = [_prints(dataset, bars) for dataset in found.datasets]
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
    captions = ((c.file, caption) for c in candidates for caption in c.captions)
    return Inspected(
        dataset,
        bucket_rows(dataset),
        equal,
        near_images(distinct, [prints[file] for file in distinct]),
        long_captions(captions, counter),
        _partners(dataset),
    )


def bucket_rows(dataset: SurveyedDataset) -> list[BucketRow]:
    """The dataset's sizes, from the narrowest to the widest."""
    counts = Counter((c.crop_plan.bucket, c.crop_plan.target) for c in dataset.scan.candidates)
    rows = []
    for (aspect, size), images in sorted(counts.items(), key=lambda item: item[0][1]):
        batches = batches_in_epoch(images, repeats=dataset.repeats, batch_size=dataset.batch_size)
        filled = batches * dataset.batch_size - images * (1 + dataset.repeats)
        rows.append(BucketRow(aspect, "{}x{}".format(*size), images, batches, filled))
    return rows


def _partners(dataset: SurveyedDataset) -> Partners:
    root = Path(dataset.config.instance_data_dir)
    images, texts = set(), []
    for path in files_below(root, skip=dataset.skip):
        if path.suffix == ".txt":
            texts.append(path)
        elif looks_like_an_image(path):
            images.add(path.with_suffix(""))
    paired = [path for path in texts if path.with_suffix("") in images]
    if dataset.config.caption_strategy != "textfile":
        return Partners([], len(paired))
    alone = sorted(set(texts) - set(paired))
    return Partners([path.relative_to(root).as_posix() for path in alone], 0)


def _prints(dataset: SurveyedDataset, bars: Progress) -> dict[str, bytes]:
    """The print of each image by its file; images that can't be decoded are left out."""
    bar = bars.add_task(
        f"looking at {escape(dataset.config.id)}", total=len(dataset.scan.candidates)
    )
    found: dict[str, bytes] = {}
    damaged, unsaved = [], []
    for candidate, (known, stat) in _looked_at(dataset):
        bars.advance(bar)
        if isinstance(known, UnreadableImage):
            damaged.append(Skipped(candidate.file, UNREADABLE, known.reason))
            continue
        found[candidate.file] = known
        if stat is not None:
            unsaved.append((_name(dataset, candidate), stat, {"print": known.hex()}))
        if len(unsaved) == _FILES_PER_WRITE:
            dataset.cache.remember_files(unsaved)
            unsaved = []
    dataset.cache.remember_files(unsaved)
    dataset.leave_out(damaged)
    return found


def _looked_at(
    dataset: SurveyedDataset,
) -> Iterator[tuple[Candidate, tuple[bytes | UnreadableImage, os.stat_result | None]]]:
    """Each image with its print, and with its stat where the cache did not know the print."""

    def look(candidate: Candidate) -> tuple[bytes | UnreadableImage, os.stat_result | None]:
        try:
            stat = candidate.path.stat()
            known = dataset.cache.file_facts(_name(dataset, candidate), stat)
            if known is not None:
                return bytes.fromhex(known["print"]), None
            return image_print(load_image(candidate.path, at_least=_PRINT_DECODE)), stat
        except UnreadableImage as error:
            return error, None
        except OSError as error:
            return UnreadableImage(candidate.path, f"can't be read: {error.strerror}"), None

    # a decoded image may take a hundred megabytes, and more threads than cores gain nothing
    threads = min(dataset.workers, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        candidates = dataset.scan.candidates
        yield from zip(candidates, map_files(pool, look, candidates), strict=True)


def _name(dataset: SurveyedDataset, candidate: Candidate) -> str:
    # no file's name holds a zero
    return f"{dataset.key(candidate)}\0print {_PRINT_VERSION}"
