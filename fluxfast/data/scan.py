"""Looking at a dataset's folder: which images to train on, and which are left out and why."""

import functools
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from fluxfast.config.caption_filter import caption_filter
from fluxfast.config.caption_shuffle import caption_variants
from fluxfast.config.datasets import ImageDataset
from fluxfast.data.buckets import (
    CropPlan,
    bucket_size,
    crop_rng,
    plan_crop,
    rejection,
    within_upscaling,
)
from fluxfast.data.cache import TensorCache
from fluxfast.data.captions import NoCaption, captions
from fluxfast.data.contents import Contents, Skipped
from fluxfast.data.faces import Box, largest_face
from fluxfast.data.images import UnreadableImage, discover, image_size, load_image
from fluxfast.data.model_folders import file_hash
from fluxfast.text import printable

T = TypeVar("T")
R = TypeVar("R")

UNREADABLE = "unreadable"
# facts are written to the cache in batches, since each write waits for the disk
_FILES_PER_WRITE = 256
# handing a file to a thread takes longer than asking the cache for it
_FILES_PER_TASK = 16


@dataclass(frozen=True)
class Candidate:
    """An image to train on.

    `file` is its path below the dataset's folder with slashes, `size` its upright (width, height),
    `face` the box of its largest face where the dataset's crops look for one.
    """

    file: str
    path: Path
    size: tuple[int, int]
    sha256: str
    crop_plan: CropPlan
    captions: tuple[str, ...]
    face: Box | None = None

    def key(self, *, of_an_epoch: bool = False) -> str:
        """The name of its tensors in a cache: its content, wherever the file lies.

        of_an_epoch: they are deleted when an epoch is over, so they lie apart from those that other
        runs and datasets keep.
        """
        return f"epoch/{self.sha256}" if of_an_epoch else self.sha256


@dataclass(frozen=True)
class Scan:
    """What a folder holds.

    `found` counts the image files; `candidates` and `skipped` name each of them. `unread` are files
    that look like images of a kind that isn't read, as paths below the folder. `notes` are lines
    for the user.
    """

    found: int
    candidates: list[Candidate]
    skipped: list[Skipped]
    unread: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def scan(
    dataset: ImageDataset,
    cache: TensorCache | None,
    *,
    contents: Contents = Contents(),  # noqa: B008  (it is frozen)
    skip: Iterable[Path] = (),
    crop_seed: int = 0,
    rounding: int = 2,
    max_workers: int = 32,
    on_file: Callable[[int, int], None] = lambda done, total: None,
) -> Scan:
    """Look at every image of a dataset.

    A file that `cache` has seen before, and that nobody has written since, is not opened. Without
    a cache only headers are read: the candidates have sizes and captions, and an empty `sha256`.
    `contents` is what the dataset's backend says of its images (`backends.bring`).
    `on_file(done, total)` reports progress. Raises ValueError if the folder doesn't exist, or if a
    folder in it can't be looked into.
    """
    root = Path(dataset.instance_data_dir)
    paths, unread = discover(root, skip=skip)
    left_out, ours = list(contents.skipped), contents.files
    if ours is not None:
        listed = [path.relative_to(root).as_posix() in ours for path in paths]
        if dataset.type == "local" and dataset.origin is None:
            left_out += [
                Skipped(path.relative_to(root).as_posix(), "has no row in the table")
                for path, own in zip(paths, listed, strict=True)
                if not own
            ]
        paths = [path for path, own in zip(paths, listed, strict=True) if own]
    if dataset.max_num_samples and len(paths) > dataset.max_num_samples:
        # seeded by the id alone, so that each run takes the same subset
        paths = sorted(random.Random(dataset.id).sample(paths, dataset.max_num_samples))
    kept: set[str] = set()
    captions_of = _captions_of(dataset, crop_seed, on_kept=kept.add)
    candidates, skipped, wrong_sizes = [], left_out, []
    beyond = len(left_out)
    facts = _all_facts(dataset, paths, cache, max_workers)
    for done, (path, known) in enumerate(zip(paths, facts, strict=True), 1):
        on_file(done, len(paths))
        file = path.relative_to(root).as_posix()
        if isinstance(known, UnreadableImage):
            skipped.append(Skipped(file, UNREADABLE, known.reason))
            continue
        size = (known["size"][0], known["size"][1])
        try:
            given = None if contents.captions is None else contents.captions.get(file, ())
            found = captions_of(path, given=given)
        except NoCaption as error:
            skipped.append(Skipped(file, error.reason))
            continue
        if contents.sizes is not None and contents.sizes.get(file, size) != size:
            wrong_sizes.append(file)
        reason = _rejection(dataset, size, rounding)
        if reason:
            skipped.append(Skipped(file, reason, f"{size[0]}x{size[1]}"))
            continue
        face = known.get("face") if dataset.crop_style == "face" else None
        planned = _plan(dataset, size, face, rounding, crop_rng(crop_seed, dataset.id, file))
        candidates.append(
            Candidate(
                file, path, size, known["sha256"], planned, tuple(found), face and tuple(face)
            )
        )
    return Scan(
        len(paths) + beyond,
        candidates,
        skipped,
        tuple(path.relative_to(root).as_posix() for path in unread),
        (*contents.notes, *_notes(dataset, candidates, kept, wrong_sizes)),
    )


def cropped_anew(
    dataset: ImageDataset, candidate: Candidate, epoch: int, *, crop_seed: int, rounding: int
) -> Candidate:
    """The image with its crop of that epoch; in epoch 1 it is the one that `scan` plans."""
    rng = crop_rng(crop_seed, dataset.id, candidate.file, epoch)
    planned = _plan(dataset, candidate.size, candidate.face, rounding, rng)
    return replace(candidate, crop_plan=planned)


def load_unchanged(candidate: Candidate) -> Image.Image:
    """Decode an image that is still the one that was scanned.

    What is made of it is kept under the hash of what it was then. Raises UnreadableImage if it has
    changed since, or can't be read.
    """
    try:
        changed = file_hash(candidate.path) != candidate.sha256
    except OSError as error:
        raise UnreadableImage(candidate.path, _why_not_read(candidate.path, error)) from error
    if changed:
        raise UnreadableImage(candidate.path, "changed since the start")
    return load_image(candidate.path)


def _why_not_read(path: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "the link points nowhere" if path.is_symlink() else "no such file"
    return f"can't be read: {error.strerror}"


def sizes_of_crops(dataset: ImageDataset, rounding: int) -> frozenset[tuple[int, int]]:
    """The training sizes that a crop may have by chance, (width, height); none if size is fixed."""
    if not dataset.crop or dataset.crop_aspect != "random":
        return frozenset()
    return frozenset(
        bucket_size(bucket, dataset.resolution, dataset.resolution_type, rounding)
        for bucket in dataset.drawn_buckets
    )


def map_files(pool: ThreadPoolExecutor, look: Callable[[T], R], files: Sequence[T]) -> Iterator[R]:
    """`pool.map(look, files)`, with several files for a thread at a time."""
    parts = (files[i : i + _FILES_PER_TASK] for i in range(0, len(files), _FILES_PER_TASK))
    return chain.from_iterable(pool.map(lambda part: [look(file) for file in part], parts))


def other_files(root: Path) -> Counter[str]:
    """How many files of each suffix lie below `root`, to say what a folder without images holds."""
    return Counter(path.suffix.lower() or path.name for path in root.rglob("*") if path.is_file())


def _all_facts(
    dataset: ImageDataset, paths: list[Path], cache: TensorCache | None, max_workers: int
) -> Iterator[dict | UnreadableImage]:
    """Size in pixels and SHA-256 of each file, in order, or why it can't be read.

    The box of the largest face comes with them, where crops look for faces.
    """
    faces = dataset.crop_style == "face"

    def facts(path: Path) -> tuple[dict | UnreadableImage, tuple[str, os.stat_result, dict] | None]:
        name = str(path.absolute())
        try:
            if cache is None:
                return {"size": image_size(path), "sha256": ""}, None
            # before the file is read: a write meanwhile has the next start read it again
            stat = path.stat()
            known = cache.file_facts(name, stat)
            if known is not None and ("face" in known or not faces):
                return known, None
            known = {"size": image_size(path), "sha256": file_hash(path)}
            if faces:
                known["face"] = largest_face(load_image(path))
        except UnreadableImage as error:
            return error, None
        except OSError as error:
            return UnreadableImage(path, _why_not_read(path, error)), None
        return known, (name, stat, known)

    unsaved = []
    with ThreadPoolExecutor(max_workers) as pool:
        for known, new in map_files(pool, facts, paths):
            if new:
                unsaved.append(new)
            if cache is not None and len(unsaved) == _FILES_PER_WRITE:
                cache.remember_files(unsaved)
                unsaved = []
            yield known
    if cache is not None:
        cache.remember_files(unsaved)


def _notes(
    dataset: ImageDataset,
    candidates: Sequence[Candidate],
    kept: set[str],
    wrong_sizes: Sequence[str],
) -> Iterator[str]:
    """What couldn't be done as asked: crops without a face, and captions that are as written."""
    faceless = [candidate.file for candidate in candidates if candidate.face is None]
    if dataset.crop_style == "face" and faceless:
        number = "1 image shows" if len(faceless) == 1 else f"{len(faceless)} images show"
        yield f"{number} no face (such as {printable(faceless[0])}): the middle is kept"
    if wrong_sizes:
        number = "1 image has" if len(wrong_sizes) == 1 else f"{len(wrong_sizes)} images have"
        yield (
            f"{number} another size than the table says (such as {printable(wrong_sizes[0])}): "
            "the image's own counts"
        )
    if kept:
        number = "1 caption has" if len(kept) == 1 else f"{len(kept)} captions have"
        yield (
            f'{number} no two tags to exchange (such as "{printable(min(kept))}"): used as '
            'written, although "caption_shuffle" leaves the original out'
        )


def _buckets(dataset: ImageDataset, size: tuple[int, int], rounding: int) -> Sequence[Any]:
    """The shapes that an image's crop may have, where `crop_aspect` takes one from a list."""
    if dataset.max_upscale_threshold is None or not dataset.picks_buckets:
        return dataset.crop_aspect_buckets
    return within_upscaling(
        size,
        dataset.drawn_buckets,
        dataset.max_upscale_threshold,
        resolution=dataset.resolution,
        resolution_type=dataset.resolution_type,
        rounding=rounding,
    )


def _captions_of(
    dataset: ImageDataset, seed: int, *, on_kept: Callable[[str], None]
) -> Callable[..., list[str]]:
    """The function that gives the captions of an image of a dataset.

    It takes the image's path, and those that a table gives it as `given`.
    """
    if dataset.caption_strategy is None:
        return lambda path, given: []
    filters, shuffle = dataset.caption_filter_list, dataset.caption_shuffle
    return functools.partial(
        captions,
        strategy=dataset.caption_strategy,
        instance_prompt=dataset.instance_prompt,
        prepend_instance_prompt=dataset.prepend_instance_prompt,
        only_instance_prompt=dataset.only_instance_prompt,
        disable_multiline_split=dataset.disable_multiline_split,
        caption_filter=caption_filter(filters) if filters else None,
        variants=caption_variants(shuffle, seed=seed, on_kept=on_kept) if shuffle else None,
    )


def _rejection(dataset: ImageDataset, size: tuple[int, int], rounding: int) -> str | None:
    if dataset.picks_buckets and not _buckets(dataset, size, rounding):
        return f"upscaled by more than max_upscale_threshold {dataset.max_upscale_threshold:g}"
    return rejection(
        size,
        resolution_type=dataset.resolution_type,
        square_crop=dataset.crop and dataset.crop_aspect == "square",
        minimum_image_size=dataset.minimum_image_size,
        minimum_aspect_ratio=dataset.minimum_aspect_ratio,
        maximum_aspect_ratio=dataset.maximum_aspect_ratio,
        rounding=rounding,
    )


def _plan(
    dataset: ImageDataset,
    size: tuple[int, int],
    face: Box | None,
    rounding: int,
    rng: random.Random,
) -> CropPlan:
    return plan_crop(
        size,
        resolution=dataset.resolution,
        resolution_type=dataset.resolution_type,
        crop=dataset.crop,
        crop_style=dataset.crop_style,
        crop_aspect=dataset.crop_aspect,
        crop_aspect_buckets=_buckets(dataset, size, rounding),
        maximum_image_size=dataset.maximum_image_size,
        target_downsample_size=dataset.target_downsample_size,
        rounding=rounding,
        face=face,
        rng=rng,
    )
