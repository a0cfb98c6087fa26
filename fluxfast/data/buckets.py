"""The size that each image trains at: aspect buckets, resizing and cropping.

An image is resized to its *intermediary* size, which keeps its own proportions and covers the
target, and is then cropped to the *target* size, whose sides are multiples of 64 pixels. Images of
equal target size can share a batch.

The behaviour is SimpleTuner's, with one difference: SimpleTuner reuses the first size that it meets
for an aspect key (width / height to two decimals), so that the sizes of very narrow images depend
on the order of the files. Here an image's plan depends on that image only.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any, Literal

from PIL import Image

from fluxfast.text import to_bytes

ALIGNMENT = 64

ResolutionType = Literal["pixel", "area", "pixel_area"]
CropStyle = Literal["random", "center", "centre", "corner", "face"]
CropAspect = Literal["square", "preserve", "random", "closest"]
Size = tuple[int, int]


@dataclass(frozen=True)
class CropPlan:
    """How one image becomes a training image; sizes are (width, height) in pixels.

    target: the final size, multiples of 64.
    intermediary: the size to resize to before the crop; it covers the target.
    crop_box: (left, top, right, bottom) within the resized image.
    bucket: the target's width / height, rounded; SimpleTuner names its buckets so.
    """

    target: Size
    intermediary: Size
    crop_box: tuple[int, int, int, int]
    bucket: str


def round64(value: float) -> int:
    """The nearest multiple of 64, at least 64; a tie goes to the even multiple."""
    return max(ALIGNMENT, round(value / ALIGNMENT) * ALIGNMENT)


def target_size(aspect: float, resolution: float, resolution_type: ResolutionType) -> Size:
    """The target size for an aspect ratio (width / height).

    `resolution` is the edge of the square with the wanted area (`pixel_area`, in pixels), that area
    (`area`, in megapixels of 10⁶ pixels), or the shorter side (`pixel`, in pixels).
    """
    if resolution_type == "pixel":
        if aspect < 1:
            return round64(resolution), round64(int(resolution / aspect))
        return round64(int(resolution * aspect)), round64(resolution)
    edge = round64(int(sqrt(_area(resolution, resolution_type))))
    return round64(edge * sqrt(aspect)), round64(edge / sqrt(aspect))


def plan_crop(
    size: Size,
    *,
    resolution: float,
    resolution_type: ResolutionType = "pixel_area",
    crop: bool = False,
    crop_style: CropStyle = "random",
    crop_aspect: CropAspect = "square",
    crop_aspect_buckets: Sequence[Any] | None = None,
    maximum_image_size: float | None = None,
    target_downsample_size: float | None = None,
    rounding: int = 2,
    face: tuple[int, int, int, int] | None = None,
    rng: random.Random,
) -> CropPlan:
    """Plan the resize and crop of an upright image of `size` (width, height).

    The arguments are the dataset's keys of the same names, and sizes are in the unit of
    `resolution_type` (see `target_size`). Without `crop`, only what extends beyond the target is
    cut off, also by `crop_style`. With `crop`, an image above `maximum_image_size` is resized to
    `target_downsample_size` and the target is cut out of that; any other is resized to just cover
    the target. `crop_aspect_buckets` holds ratios, or `{"aspect": ratio, "weight": w}`. `rng`
    decides random crops and aspects; `crop_rng` makes it. A crop of `crop_style` face has `face`
    (left, top, right, bottom; in the image's pixels) in its middle, as near as the image allows;
    without one it keeps the image's middle.
    """
    # the aspect of a very thin image must not round to zero
    own_aspect = max(round(size[0] / size[1], rounding), 10**-rounding)
    aspect = _crop_aspect(own_aspect, crop_aspect, crop_aspect_buckets, rng) if crop else own_aspect
    target = _snapped(aspect, resolution, resolution_type, rounding)
    intermediary = _covering_size(size, target, portrait=aspect < 1)
    if (
        crop
        and maximum_image_size
        and target_downsample_size
        and _exceeds(size, maximum_image_size, resolution_type)
    ):
        downsampled = target_size(own_aspect, target_downsample_size, resolution_type)
        intermediary = _covering_size(size, downsampled, portrait=own_aspect < 1)
        if intermediary[0] < target[0] or intermediary[1] < target[1]:
            intermediary = _covering_size(size, target, portrait=aspect < 1)

    middle = None
    if crop_style == "face" and face is not None:
        middle = (
            (face[0] + face[2]) / 2 * intermediary[0] / size[0],
            (face[1] + face[3]) / 2 * intermediary[1] / size[1],
        )
    left, top = _crop_origin(intermediary, target, crop_style, middle, rng)
    return CropPlan(
        target=target,
        intermediary=intermediary,
        crop_box=(left, top, left + target[0], top + target[1]),
        bucket=str(round(target[0] / target[1], rounding)),
    )


def bucket_size(
    bucket: Any, resolution: float, resolution_type: ResolutionType, rounding: int = 2
) -> Size:
    """The target size of an entry of `crop_aspect_buckets`; see `plan_crop` for the arguments."""
    return _snapped(_weighted(bucket)[0], resolution, resolution_type, rounding)


def within_upscaling(
    size: Size,
    buckets: Sequence[Any],
    threshold: float,
    *,
    resolution: float,
    resolution_type: ResolutionType = "pixel_area",
    rounding: int = 2,
) -> list[Any]:
    """The `crop_aspect_buckets` that enlarge an image of `size` by at most `threshold`.

    The arguments are `plan_crop`'s; 0.2 allows 20 %. The enlargement is that of the resize which
    covers the bucket, in whole per cent, as in SimpleTuner's example: 850 pixels to 1024 are 20 %.
    """
    within = []
    for bucket in buckets:
        width, height = bucket_size(bucket, resolution, resolution_type, rounding)
        if round(max(width / size[0], height / size[1]) - 1, 2) <= threshold:
            within.append(bucket)
    return within


def crop_rng(seed: int, dataset_id: str, file: str, epoch: int = 1) -> random.Random:
    """The generator for one image's random crop in one epoch.

    The same seed, dataset, file and epoch give the same crop on any machine.
    """
    later = f":{epoch}" if epoch > 1 else ""
    return random.Random(to_bytes(f"{seed}:{dataset_id}:{file}{later}"))


def rejection(
    size: Size,
    *,
    resolution_type: ResolutionType = "pixel_area",
    square_crop: bool = False,
    minimum_image_size: float | None = None,
    minimum_aspect_ratio: float | None = None,
    maximum_aspect_ratio: float | None = None,
    rounding: int = 2,
) -> str | None:
    """Which of the dataset's limits an image of `size` (width, height) breaks; None if none.

    `minimum_image_size` is compared with the shorter side for `pixel`, else with the area. A square
    crop needs both sides to be large enough too, since it would enlarge a shorter one.
    """
    width, height = size
    if minimum_image_size:
        if resolution_type == "pixel":
            too_small = min(size) < minimum_image_size
        else:
            area = _area(minimum_image_size, resolution_type)
            too_small = width * height < area or (square_crop and min(size) < int(sqrt(area)))
        if too_small:
            return f"smaller than minimum_image_size {minimum_image_size:g}"
    aspect = round(width / height, rounding)
    if minimum_aspect_ratio and aspect < minimum_aspect_ratio:
        return f"narrower than minimum_aspect_ratio {minimum_aspect_ratio:g}"
    if maximum_aspect_ratio and aspect > maximum_aspect_ratio:
        return f"wider than maximum_aspect_ratio {maximum_aspect_ratio:g}"
    return None


def batches_in_epoch(images: int, *, repeats: int, batch_size: int) -> int:
    """How many batches an epoch makes of a bucket with so many images.

    The last one is filled up from a further pass.
    """
    return ceil(images * (1 + repeats) / batch_size)


def apply(img: Image.Image, plan: CropPlan) -> Image.Image:
    """Resize (Lanczos) and crop `img` as planned; the result has the size `plan.target`."""
    return img.resize(plan.intermediary, Image.Resampling.LANCZOS).crop(plan.crop_box)


def _area(value: float, resolution_type: ResolutionType) -> int:
    """A size of one of the area types in pixels.

    Megapixels are rounded, since 0.262144 * 1e6 falls short of 512² in floating point.
    """
    return round(value * value if resolution_type == "pixel_area" else value * 1e6)


def _exceeds(size: Size, maximum: float, resolution_type: ResolutionType) -> bool:
    if resolution_type == "pixel":
        return max(size) > maximum
    return size[0] * size[1] > _area(maximum, resolution_type)


def _crop_aspect(
    own: float, crop_aspect: CropAspect, buckets: Sequence[Any] | None, rng: random.Random
) -> float:
    if crop_aspect == "square":
        return 1.0
    if crop_aspect == "preserve":
        return own
    if not buckets:
        raise ValueError(
            f"crop_aspect {crop_aspect!r} needs crop_aspect_buckets, a list of aspect ratios "
            "such as [1.0, 0.75]"
        )
    aspects, weights = zip(*map(_weighted, buckets), strict=True)
    if crop_aspect == "closest":
        return min(aspects, key=lambda aspect: abs(aspect - own))
    return rng.choices(aspects, weights)[0]


def _weighted(bucket: Any) -> tuple[float, float]:
    """(width / height, weight) of an entry of `crop_aspect_buckets`."""
    aspect, weight = (
        (bucket["aspect"], bucket["weight"]) if isinstance(bucket, dict) else (bucket, 1.0)
    )
    return float(aspect), float(weight)


def _snapped(
    aspect: float, resolution: float, resolution_type: ResolutionType, rounding: int
) -> Size:
    """The target size; a square where the aspect is one but for rounding."""
    target = target_size(aspect, resolution, resolution_type)
    if round(target[0] / target[1], rounding) != 1.0:
        return target
    edge = target_size(1.0, resolution, resolution_type)[0]
    return edge, edge


def _covering_size(size: Size, target: Size, *, portrait: bool) -> Size:
    """The size with the proportions of `size` that covers `target`.

    It is rounded down to whole pixels, as SimpleTuner does.
    """
    ratio = size[0] / size[1]
    if portrait:
        width, height = target[0], int(target[0] / ratio)
    else:
        width, height = int(target[1] * ratio), target[1]
    if width < target[0]:
        width, height = target[0], height + int((target[0] - width) / ratio)
    if height < target[1]:
        width, height = width + int((target[1] - height) * ratio), target[1]
    return width, height


def _crop_origin(
    intermediary: Size,
    target: Size,
    style: CropStyle,
    middle: tuple[float, float] | None,
    rng: random.Random,
) -> tuple[int, int]:
    spare = (intermediary[0] - target[0], intermediary[1] - target[1])
    if style == "random":
        return rng.randint(0, spare[0]), rng.randint(0, spare[1])
    if style == "corner":
        return 0, 0
    if middle is not None:
        left, top = (round(middle[axis] - target[axis] / 2) for axis in (0, 1))
        return min(max(left, 0), spare[0]), min(max(top, 0), spare[1])
    return spare[0] // 2, spare[1] // 2
