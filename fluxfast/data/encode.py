"""Filling the caches: only what they lack is computed, and encoders are loaded only for that."""

import functools
import gc
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TypeVar

import torch
from rich.markup import escape
from rich.progress import Progress

from fluxfast.data.buckets import apply
from fluxfast.data.cache import TensorCache, fingerprint
from fluxfast.data.cache_index import owner_of_captions
from fluxfast.data.encoders import (
    STORAGE_DTYPE,
    LatentEncoder,
    T5Padding,
    TextEncoders,
    compute_dtype,
)
from fluxfast.data.images import UnreadableImage, to_tensor
from fluxfast.data.model_folders import ModelSource, identity, local_folder
from fluxfast.data.pairs import mask_entry, mask_weights
from fluxfast.data.prepared import PromptCache
from fluxfast.data.scan import UNREADABLE, Candidate, Skipped, load_unchanged
from fluxfast.quant.rules import PRECISIONS, format_of

T = TypeVar("T")
# what the cache knows an entry by: (key, fingerprint)
_Entry = tuple[str, str]
# an entry, and the image to encode for it
_Job = tuple[_Entry, Candidate]

# raise one when the same inputs come to give other values: older entries are then not used
_TEXT_VERSION, _LATENTS_VERSION = 1, 1
_MASKS_PER_WRITE = 64
_NO_NUMBERS = "the VAE gives NaN or infinity for it"


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """Which encoders to use, and how they run.

    pipeline: the pipeline's folder or repository; its subfolder is not looked at.
    vae, t5: other sources of the VAE and of T5's weights.
    variant: of the weight files, such as "fp16".
    device: where they run; on "cpu" everything is computed in fp32.
    text_dtype, vae_dtype: what they compute in on other devices.
    clip_precision, t5_precision: how their weights are stored, in SimpleTuner's words.
    quantize_on: where they are quantised for that.
    max_length: T5 tokens per caption.
    vae_batch_size: images per pass of the VAE.
    """

    pipeline: ModelSource
    vae: ModelSource | None = None
    t5: ModelSource | None = None
    variant: str | None = None
    device: str | torch.device = "cpu"
    text_dtype: torch.dtype = torch.bfloat16
    vae_dtype: torch.dtype = torch.bfloat16
    clip_precision: str = "no_change"
    t5_precision: str = "no_change"
    quantize_on: str | torch.device = "cpu"
    max_length: int = 512
    t5_padding: T5Padding = "unmodified"
    vae_batch_size: int = 4
    vae_tiling: bool = False
    vae_slicing: bool = False

    def part(self, name: str) -> ModelSource:
        """The source of one of the pipeline's folders."""
        return (self.pipeline[0], name, self.pipeline[2])


def encode_prompts(
    prompts: Sequence[str],
    cache: TensorCache,
    settings: EncoderSettings,
    *,
    batch_size: int,
    progress: Progress,
) -> tuple[PromptCache, int]:
    """Bring the embeddings of `prompts` into the cache.

    Returns the cached prompts, and how many had to be computed.
    """
    reading = progress.add_task("text encoders", total=None)
    sources = [settings.part(name) for name in ("tokenizer", "text_encoder", "tokenizer_2")]
    sources.append(settings.t5 or settings.part("text_encoder_2"))
    identities = [identity(local_folder(source), cache) for source in sources]
    progress.remove_task(reading)
    dtype = compute_dtype(settings.device, settings.text_dtype)
    quantised = [PRECISIONS[name] for name in (settings.clip_precision, settings.t5_precision)]
    parts = [
        identities,
        settings.max_length,
        settings.t5_padding,
        str(dtype),
        *(quantised if any(quantised) else ()),
    ]
    made_by = fingerprint("text", _TEXT_VERSION, *parts)
    wanted = [(prompt, made_by) for prompt in prompts]
    cache.note_use(wanted, owner_of_captions(settings.pipeline[0]))
    missing = [prompt for prompt, _ in cache.missing(wanted)]
    if missing:
        encoders = TextEncoders.from_pretrained(
            settings.pipeline,
            t5_source=settings.t5,
            device=settings.device,
            dtype=settings.text_dtype,
            variant=settings.variant,
            clip_format=format_of(settings.clip_precision, "text_encoder_1_precision"),
            t5_format=format_of(settings.t5_precision, "text_encoder_2_precision"),
            quantize_on=settings.quantize_on,
            max_length=settings.max_length,
            t5_padding=settings.t5_padding,
        )
        bar = progress.add_task("encoding captions", total=len(missing))
        for batch in _chunks(missing, batch_size):
            tensors = {name: _stored(tensor) for name, tensor in encoders.encode(batch).items()}
            cache.put_many(
                (prompt, made_by, {name: tensor[i] for name, tensor in tensors.items()})
                for i, prompt in enumerate(batch)
            )
            progress.advance(bar, len(batch))
        del encoders
        _release_memory()
    return PromptCache(cache, made_by), len(missing)


class ImageEncoding:
    """Encodes the images that a cache lacks, and knows the fingerprint of each image's latents.

    It is a context manager: the VAE is loaded for the first image that needs it, and freed at the
    end.
    """

    def __init__(self, settings: EncoderSettings, cache: TensorCache) -> None:
        """`cache` remembers the hash of the VAE's weights."""
        self._settings = settings
        self._source = settings.vae or settings.part("vae")
        dtype = compute_dtype(settings.device, settings.vae_dtype)
        # slicing does not change the values, tiling does
        self._made_by = [
            identity(local_folder(self._source), cache),
            str(dtype),
            settings.vae_tiling,
        ]

    def __enter__(self) -> "ImageEncoding":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @functools.cached_property
    def _encoder(self) -> LatentEncoder:
        settings = self._settings
        return LatentEncoder.from_pretrained(
            self._source,
            device=settings.device,
            dtype=settings.vae_dtype,
            variant=settings.variant,
            tiling=settings.vae_tiling,
            slicing=settings.vae_slicing,
        )

    def fingerprint(self, candidate: Candidate) -> str:
        """A hash of all that an image's latents depend on: its content, its crop, the VAE."""
        plan = candidate.crop_plan
        return fingerprint(
            "latents",
            _LATENTS_VERSION,
            self._made_by,
            candidate.sha256,
            plan.intermediary,
            plan.crop_box,
        )

    def entry(self, image: Candidate, *, of_an_epoch: bool = False) -> _Entry:
        """What a cache knows the latents of an image by."""
        return image.key(of_an_epoch=of_an_epoch), self.fingerprint(image)

    def encode(
        self,
        wanted: Sequence[Candidate],
        cache: TensorCache,
        *,
        batch_size: int | None = None,
        max_workers: int,
        progress: Progress,
        name: str,
    ) -> tuple[int, list[Skipped]]:
        """Bring the latents of images into `cache`.

        Returns how many were computed, and the images that couldn't be. batch_size: images per pass
        of the VAE (None: the settings'). name: the dataset's, for the progress bar.
        """
        batch_size = batch_size or self._settings.vae_batch_size
        by_entry = _by_entry(wanted, self.entry)
        jobs = [(entry, by_entry[entry][0]) for entry in _missing(by_entry, cache, name)]
        jobs.sort(key=lambda job: (job[1].crop_plan.target, job[1].file))
        skipped: list[Skipped] = []
        if not jobs:
            return 0, skipped
        bar = progress.add_task(f"encoding images of {escape(name)}", total=len(jobs))
        batches = [
            batch
            for _, same_size in groupby(jobs, key=lambda job: job[1].crop_plan.target)
            for batch in _chunks(list(same_size), batch_size)
        ]
        with ThreadPoolExecutor(min(max_workers, 2 * batch_size)) as pool:
            # the next batch is decoded while this one is encoded
            ahead = [pool.submit(_decode, candidate) for _, candidate in batches[0]]
            for batch, next_batch in zip(batches, [*batches[1:], []], strict=True):
                decoding, ahead = (
                    ahead,
                    [pool.submit(_decode, candidate) for _, candidate in next_batch],
                )
                skipped += self._encode_batch(batch, decoding, cache)
                progress.advance(bar, len(batch))
        return len(jobs) - len(skipped), _with_copies(skipped, by_entry)

    def encode_one(self, candidate: Candidate) -> torch.Tensor:
        """The latents of one image, bf16 [C, H/8, W/8] on the CPU, encoded by itself.

        The same image gives the same bits, whatever it is encoded after. Raises UnreadableImage if
        it can't be decoded, has changed since the scan, or the VAE gives no numbers for it.
        """
        image = _decode(candidate)
        (latents,) = self._encoder.encode(image[None], [_seed(self.fingerprint(candidate))])
        if not latents.isfinite().all():
            raise UnreadableImage(candidate.path, _NO_NUMBERS)
        return latents.cpu()

    def close(self) -> None:
        """Free the VAE; the next image that is encoded loads it again."""
        if self.__dict__.pop("_encoder", None) is not None:
            _release_memory()

    def _encode_batch(
        self, batch: Sequence[_Job], decoding: Sequence[Future[torch.Tensor]], cache: TensorCache
    ) -> list[Skipped]:
        entries, images, skipped = [], [], []
        for (entry, candidate), future in zip(batch, decoding, strict=True):
            try:
                images.append(future.result())
                entries.append((entry, candidate))
            except UnreadableImage as error:
                skipped.append(Skipped(candidate.file, UNREADABLE, error.reason))
        if not images:
            return skipped
        seeds = [_seed(made_by) for (_, made_by), _ in entries]
        finished = []
        for ((key, made_by), candidate), latents in zip(
            entries, self._encoder.encode(torch.stack(images), seeds), strict=True
        ):
            if latents.isfinite().all():
                finished.append((key, made_by, {"latents": latents}))
            else:
                skipped.append(Skipped(candidate.file, _NO_NUMBERS))
        cache.put_many(finished)
        return skipped


def encode_masks(
    wanted: Sequence[Candidate],
    cache: TensorCache,
    *,
    max_workers: int,
    progress: Progress,
    name: str,
) -> list[Skipped]:
    """Bring the weights of masks into `cache`; returns those that can't be read.

    name: the dataset's, for the progress bar.
    """
    by_entry = _by_entry(wanted, mask_entry)
    missing = _missing(by_entry, cache, name)
    skipped: list[Skipped] = []
    if not missing:
        return skipped
    bar = progress.add_task(f"reading masks of {escape(name)}", total=len(missing))

    def read(entry: tuple[str, str]) -> dict[str, torch.Tensor] | UnreadableImage:
        try:
            return mask_weights(by_entry[entry][0])
        except UnreadableImage as error:
            return error

    with ThreadPoolExecutor(min(max_workers, os.cpu_count() or 1)) as pool:
        for part in _chunks(missing, _MASKS_PER_WRITE):
            finished = []
            for entry, weights in zip(part, pool.map(read, part), strict=True):
                if isinstance(weights, UnreadableImage):
                    skipped.append(Skipped(by_entry[entry][0].file, UNREADABLE, weights.reason))
                else:
                    finished.append((*entry, weights))
            cache.put_many(finished)
            progress.advance(bar, len(part))
    return _with_copies(skipped, by_entry)


def _by_entry(
    images: Iterable[Candidate], entry: Callable[[Candidate], _Entry]
) -> dict[_Entry, list[Candidate]]:
    """The images by what the cache knows them by: copies of one file share an entry."""
    found: dict[_Entry, list[Candidate]] = {}
    for image in images:
        found.setdefault(entry(image), []).append(image)
    return found


def _missing(
    wanted: Mapping[_Entry, Sequence[Candidate]], cache: TensorCache, name: str
) -> list[_Entry]:
    """Those of the entries that must be computed. name: the dataset's."""
    # earlier versions named entries after the dataset and the file
    earlier = {
        entry: (f"{name}/{wanted[entry][0].file}", entry[1]) for entry in cache.missing(wanted)
    }
    return cache.adopt(earlier)


def _with_copies(
    skipped: Sequence[Skipped], by_entry: Mapping[_Entry, Sequence[Candidate]]
) -> list[Skipped]:
    """The images that could not be encoded, and those beside them that hold the same bytes."""
    copies = {images[0].file: images for images in by_entry.values()}
    return [replace(each, file=copy.file) for each in skipped for copy in copies[each.file]]


def _seed(made_by: str) -> int:
    """The seed of an image's latents.

    It comes from their fingerprint, so that computing them again gives the same values.
    """
    return int(made_by[:15], 16)


def _decode(candidate: Candidate) -> torch.Tensor:
    return to_tensor(apply(load_unchanged(candidate), candidate.crop_plan))


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(STORAGE_DTYPE) if tensor.is_floating_point() else tensor


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
