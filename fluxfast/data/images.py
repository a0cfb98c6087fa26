"""Finding image files, and decoding whatever kind they are into 8-bit RGB.

Every kind becomes PIL mode `RGB`, upright: EXIF orientation is applied, transparency is laid on
white, deeper samples are scaled (never clipped) to 8 bits, CMYK goes through its embedded profile
where it has one, and an animation gives its first frame. The ICC profile of an RGB image is not
applied.
"""

import os
import struct
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from fluxfast.data.image_kinds import (
    decoders,
    holds_other_kind,
    how_to_read,
    is_readable,
    looks_like_an_image,
)

# what Pillow's decoders raise on damaged files (found by fuzzing each format), and what its own
# opener catches
_DECODE_ERRORS = (
    OSError, SyntaxError, EOFError, ValueError, TypeError, IndexError, KeyError, OverflowError,
    RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = (5, 6, 7, 8)


class SkippedImage(ValueError):
    """An image that training does without.

    `path` and `reason` are kept apart, so that a table can group images by reason.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


class UnreadableImage(SkippedImage):
    """A file that can't be decoded."""


class Discovered(NamedTuple):
    """A folder's images, and its files that look like images of a kind that isn't read.

    Each list is sorted by path.
    """

    images: list[Path]
    unread: list[Path]


def discover(root: str | Path, *, skip: Iterable[str | Path] = ()) -> Discovered:
    """Find all image files under `root`, recursively.

    Hidden files and folders are left out, and so are the folders in `skip` (caches, outputs). Links
    to folders are followed; a folder that can be reached twice is read once, under its real path if
    that lies below `root`. A link that points nowhere is listed, so that it is reported like any
    other unreadable image. Raises ValueError if `root` or a folder in it can't be looked into.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(
            f"{root}: no such folder; instance_data_dir must name an existing folder of images"
        )
    found = Discovered([], [])
    for path in files_below(root, skip=skip):
        if looks_like_an_image(path):
            (found.images if is_readable(path) else found.unread).append(path)
    return Discovered(sorted(found.images), sorted(found.unread))


def files_below(root: Path, *, skip: Iterable[str | Path] = ()) -> Iterator[Path]:
    """Every file that `discover` looks at, whatever its kind."""
    skipped = {Path(folder).resolve() for folder in skip}
    seen: set[Path] = set()
    folders, linked_folders = deque([root]), deque[Path]()
    while folders or linked_folders:
        folder = (folders or linked_folders).popleft()
        real = folder.resolve()
        if real in seen or (real in skipped and folder != root):
            continue
        seen.add(real)
        try:
            entries = sorted(folder.iterdir())
        except FileNotFoundError:
            # removed since its parent was listed
            continue
        except OSError as error:
            raise ValueError(f"{folder}: can't be looked into: {error.strerror}") from error
        for path in entries:
            if path.name.startswith("."):
                continue
            if os.path.isdir(path):  # noqa: PTH112  (Path.is_dir raises on a link that points to itself)
                (linked_folders if path.is_symlink() else folders).append(path)
            elif path.is_symlink() or path.is_file():
                yield path


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) in pixels of the upright image, from the header where the format allows it.

    Raises UnreadableImage if the file is no image, or its header is damaged.
    """
    path = Path(path)
    try:
        with Image.open(path, formats=decoders(path)) as img:
            # Pillow swaps the sides of a TIFF by itself, but still reports its orientation
            swapped = (
                img.format != "TIFF"
                and img.getexif().get(ExifTags.Base.Orientation) in _SWAPS_SIDES
            )
            width, height = img.size
    except _DECODE_ERRORS as error:
        raise UnreadableImage(path, _reason(path, error)) from error
    return (height, width) if swapped else (width, height)


def load_image(path: str | Path, *, at_least: int | None = None) -> Image.Image:
    """Decode `path` to an upright RGB image.

    at_least: a JPEG may be decoded at a half, a quarter or an eighth of its size, which is many
    times faster, as long as neither side falls below so many pixels.

    Raises UnreadableImage naming the file and why it can't be decoded: it is truncated, empty, not
    an image, has too many pixels and so on.
    """
    path = Path(path)
    try:
        with Image.open(path, formats=decoders(path)) as img:
            if at_least is not None:
                img.draft(None, (at_least, at_least))
            img.load()
            # after load(): a PNG may hold it behind the pixels, and by then a TIFF has been turned
            method = _UPRIGHT.get(img.getexif().get(ExifTags.Base.Orientation, 1))
            rgb = _to_rgb(img)
    except _DECODE_ERRORS as error:
        raise UnreadableImage(path, _reason(path, error)) from error
    return rgb.transpose(method) if method is not None else rgb


def to_tensor(img: Image.Image) -> torch.Tensor:
    """Convert an RGB image to fp32 [3, H, W] in [-1, 1]."""
    array = np.array(img, dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous().div_(127.5).sub_(1)


def _to_rgb(img: Image.Image) -> Image.Image:
    if img.mode == "F" or img.mode.startswith("I"):
        return _deep_grey_to_rgb(img)
    if img.mode == "CMYK":
        return _cmyk_to_rgb(img)
    if img.has_transparency_data:
        rgba = img.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return img.convert("RGB")


def _deep_grey_to_rgb(img: Image.Image) -> Image.Image:
    """Convert one channel of 16-bit, 32-bit or float samples to RGB.

    `I;16` spans 0…65535. The other modes don't record which value is white: it is taken as the
    smallest of 1 (float only), 255 (float only), 65535 and 2³¹-1 that no sample exceeds, or the
    maximum itself where all are exceeded. NaN and negative samples become black.
    """
    samples = np.asarray(img).astype(np.float64)
    grey = np.clip(np.nan_to_num(samples, posinf=0.0, neginf=0.0), 0, None)
    if img.mode.startswith("I;16"):
        white = 65535.0
    else:
        whites = ([1.0, 255.0] if img.mode == "F" else []) + [65535.0, 2.0**31 - 1]
        peak = float(grey.max())
        white = next((value for value in whites if peak <= value), peak)
    grey = np.rint(grey * (255 / white))
    if "transparency" in img.info:
        grey[samples == img.info["transparency"]] = 255
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def _cmyk_to_rgb(img: Image.Image) -> Image.Image:
    profile = img.info.get("icc_profile")
    if profile:
        try:
            converted = ImageCms.profileToProfile(
                img, BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
        except ImageCms.PyCMSError:
            # the profile is damaged, or for another colour space: go on as if there were none
            return img.convert("RGB")
        assert converted is not None
        return converted
    return img.convert("RGB")


def _reason(path: Path, error: BaseException) -> str:
    """Why a file can't be decoded, in a few words."""
    if isinstance(error, FileNotFoundError):
        return "the link points nowhere" if path.is_symlink() else "no such file"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, Image.DecompressionBombError):
        return f"has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
    if isinstance(error, UnidentifiedImageError):
        return _unidentified(path)
    if isinstance(error, OSError) and "truncated" in str(error):
        return "truncated"
    return f"damaged ({str(error) or type(error).__name__})"


def _unidentified(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(16)
    if not start:
        return "empty file"
    kind = holds_other_kind(start)
    if kind is None:
        return "not an image, or not one of the known formats"
    package = how_to_read(kind)
    remedy = f"convert it, or {package}" if package else "convert it"
    return f"holds {kind.removeprefix('.').upper()} under another name, which isn't read: {remedy}"
