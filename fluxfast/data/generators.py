"""The generators of conditioning datasets: an image in, its reference or mask out.

Each is a function of a Pillow image (RGB), its settings and a random generator. What it draws
depends on the dataset's id and the image's content alone, so that every start makes the same.
"""

import functools
import random
from collections.abc import Callable
from io import BytesIO
from math import pi, sqrt
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from rich.progress import Progress

from fluxfast.config.datasets import ImageDataset
from fluxfast.config.generators import Edges, Generated, JpegArtifacts, RandomMask, Superresolution
from fluxfast.data.cache import fingerprint
from fluxfast.data.cache_index import stamp
from fluxfast.data.contents import Contents
from fluxfast.data.images import UnreadableImage, discover, load_image
from fluxfast.data.mirror import FetchError, Mirror, Wanted
from fluxfast.data.model_folders import file_hash

# raise it when the same image comes to give another one
_VERSION = 1
_GREY = (127, 127, 127)
# grid of the smooth noise that an irregular shape is cut out of
_BLOBS = 6


def superresolution(img: Image.Image, params: Superresolution, rng: random.Random) -> Image.Image:
    """A blurred, shrunk, noisy and compressed copy of the same size."""
    blur = {"gaussian": ImageFilter.GaussianBlur, "box": ImageFilter.BoxBlur}[params.blur_type]
    out = img.filter(blur(params.blur_radius))
    width, height = (max(1, round(side / params.downscale_factor)) for side in img.size)
    out = out.resize((width, height), Image.Resampling.BICUBIC).resize(
        img.size, Image.Resampling.BICUBIC
    )
    if params.add_noise and params.noise_level:
        pixels = np.asarray(out, dtype=np.float32)
        noise = np.random.default_rng(rng.getrandbits(64)).normal(size=pixels.shape)
        noisy = pixels + noise * params.noise_level * 255
        out = Image.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))
    return out if params.jpeg_quality is None else _compressed(out, params.jpeg_quality)


def jpeg_artifacts(img: Image.Image, params: JpegArtifacts, rng: random.Random) -> Image.Image:
    """A copy that went through JPEG of a low quality, once or several times."""
    for _ in range(params.compression_rounds):
        low, high = params.quality_range
        img = _compressed(img, low if params.quality_mode == "fixed" else rng.randint(low, high))
    return img


def edges(img: Image.Image, params: Edges, rng: random.Random) -> Image.Image:
    """White edges on black (Canny)."""
    # a second to import, and only this one needs it
    from skimage.feature import canny

    grey = np.asarray(img.convert("L"), dtype=np.float64)
    found = canny(grey, low_threshold=params.low_threshold, high_threshold=params.high_threshold)
    return Image.fromarray(found.astype(np.uint8) * 255).convert("RGB")


def random_mask(img: Image.Image, params: RandomMask, rng: random.Random) -> Image.Image:
    """A white shape on black."""
    return _shape(img.size, params, rng).convert("RGB")


def inpainting(img: Image.Image, params: RandomMask, rng: random.Random) -> Image.Image:
    """The image with a shape of it greyed out."""
    out = img.copy()
    out.paste(_GREY, mask=_shape(img.size, params, rng))
    return out


_FUNCTIONS: dict[str, Callable[[Image.Image, Any, random.Random], Image.Image]] = {
    "superresolution": superresolution,
    "jpeg_artifacts": jpeg_artifacts,
    "canny": edges,
    "edges": edges,
    "random_masks": random_mask,
    "inpainting": inpainting,
}


def generate(dataset: ImageDataset, workers: int, bars: Progress) -> Contents:
    """Make what is missing of a generated dataset, in its folder.

    Raises ValueError where two images differ in their extension alone, or the folder can't be
    written.
    """
    origin = dataset.origin
    assert isinstance(origin, Generated)
    wanted: dict[str, Wanted] = {}
    for path in discover(origin.source).images:
        file = path.relative_to(origin.source)
        name = str(PurePosixPath(file.as_posix()).with_suffix(".png"))
        if name in wanted:
            raise ValueError(
                f'dataset "{dataset.id}": {origin.source} holds several images named '
                f"{file.with_suffix('')}: a generated one can't be told to belong to one of them"
            )
        # a dead link has none, and is told of when it is read
        seen = stamp(path.lstat())
        made_of = fingerprint(_VERSION, origin.kind, origin.params.model_dump(mode="json"), seen)
        make = functools.partial(_write, path, origin, dataset.id)
        wanted[name] = Wanted(name, made_of, make)
    skipped = Mirror(dataset.instance_data_dir).bring(
        [*wanted.values()], id=dataset.id, workers=workers, bars=bars, doing="generating"
    )
    captions = dict.fromkeys(wanted, origin.captions) if origin.captions else None
    return Contents(files=frozenset(wanted), captions=captions, skipped=tuple(skipped))


def _write(path: Path, origin: Generated, id: str, stream: BinaryIO) -> None:
    try:
        rng = random.Random(f"{id}:{file_hash(path)}")
        img = load_image(path)
    except UnreadableImage as error:
        raise FetchError(error.reason) from error
    except OSError as error:
        raise FetchError(f"can't be read: {error.strerror}") from error
    _FUNCTIONS[origin.kind](img, origin.params, rng).save(stream, format="PNG")


def _compressed(img: Image.Image, quality: int) -> Image.Image:
    stream = BytesIO()
    img.save(stream, format="JPEG", quality=quality)
    with Image.open(stream) as out:
        return out.convert("RGB")


def _shape(size: tuple[int, int], params: RandomMask, rng: random.Random) -> Image.Image:
    """A mask (mode L) whose white part covers as much as the settings say."""
    width, height = size
    coverage = rng.uniform(params.min_coverage, params.max_coverage)
    kind = rng.choice(params.mask_types)
    if kind in ("brush", "irregular"):
        return _irregular(size, coverage, rng)
    mask = Image.new("L", size, 0)
    # a circle in a box covers pi / 4 of it, and can't cover more of the image
    if kind == "circle" and coverage <= pi / 4:
        box = _box(size, coverage * 4 / pi, rng)
        ImageDraw.Draw(mask).ellipse(box, fill=255)
    else:
        ImageDraw.Draw(mask).rectangle(_box((width, height), coverage, rng), fill=255)
    return mask


def _box(size: tuple[int, int], coverage: float, rng: random.Random) -> tuple[int, ...]:
    """A box at a random place, (left, top, right, bottom) with both ends in it."""
    stretch = rng.uniform(sqrt(coverage), 1 / sqrt(coverage))
    parts = sqrt(coverage) * stretch, sqrt(coverage) / stretch
    sides = [max(1, round(side * part)) for side, part in zip(size, parts, strict=True)]
    left, top = (rng.randint(0, whole - part) for whole, part in zip(size, sides, strict=True))
    return left, top, left + sides[0] - 1, top + sides[1] - 1


def _irregular(size: tuple[int, int], coverage: float, rng: random.Random) -> Image.Image:
    """Round, connected shapes: the highest part of smooth noise."""
    noise = np.random.default_rng(rng.getrandbits(64)).random((_BLOBS, _BLOBS), dtype=np.float32)
    smooth = np.asarray(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC))
    return Image.fromarray((smooth >= np.quantile(smooth, 1 - coverage)).astype(np.uint8) * 255)
