"""A drawing style that the toy base does not know: a linocut in four inks."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

from fluxfast.demo.toyworld import SIZE, Scene, draw

_PAPER, _TEAL, _RED, _INK = (246, 234, 208), (92, 160, 158), (214, 82, 52), (30, 36, 70)
INKS = (_PAPER, _TEAL, _RED, _INK)


def linocut(scene: Scene, size: int = SIZE) -> Image.Image:
    """The scene as a linocut: the lightest third is paper, the darkest ink, warm colours red."""
    large = draw(scene, 2 * size)
    pixels = np.asarray(large.filter(ImageFilter.GaussianBlur(1.2)), np.float32) / 255
    light = pixels @ np.array([0.3, 0.59, 0.11], np.float32)
    # from 0 at the darkest pixel to 1 at the lightest, so that night and day are cut alike
    rank = (np.argsort(np.argsort(light, axis=None)) / light.size).reshape(light.shape)
    is_warm = (pixels[..., 0] - pixels[..., 2] > 0.25) & (rank < 0.8)
    edges = large.convert("L").filter(ImageFilter.FIND_EDGES).filter(ImageFilter.MaxFilter(3))
    inks = np.select([rank > 0.62, rank > 0.28], [0, 1], 3)
    inks[is_warm] = 2
    inks[np.asarray(edges) > 46] = 3
    print_ = Image.fromarray(np.array(INKS, np.uint8)[inks])
    return print_.resize((size, size), Image.Resampling.BOX)


def share_in_ink(image: Image.Image) -> float:
    """The share of an image's pixels that have one of the linocut's colours, or nearly."""
    pixels = np.asarray(image.convert("RGB"), np.float32)
    distances = [np.abs(pixels - np.array(ink, np.float32)).max(2) for ink in INKS]
    return float((np.min(distances, axis=0) < 40).mean())
