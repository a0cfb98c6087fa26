"""Tells from the pixels of a toy world's image what it shows: plain arithmetic, nothing is learnt.

An image is explained as a place with an object in front of it. The place and the time of day are
those whose mean picture is nearest. The object, its colour, position, size and direction are those
that take away most of what the place leaves unexplained: the sum over the object's outline of the
squared difference from the place minus that from the object.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from fluxfast.demo.toy_canvas import Canvas
from fluxfast.demo.toy_objects import OBJECTS, SUBJECT, plonk
from fluxfast.demo.toy_places import PLACES, TIMES, WEATHERS
from fluxfast.demo.toyworld import COLOURS, MIDDLES, SCALES, draw_background, feet, object_colour

# the size at which images are compared
_SIZE = 64
# drawings that the mean picture of a place is made of
_DRAWINGS = 12
# what an object explains at least; drawings have 0.7 and more, noise 0.45 and less
_LEAST = 0.55
_DRAWN = OBJECTS | {SUBJECT: plonk}
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)


class Seen(NamedTuple):
    """What an image shows; `object` is "" where it has none.

    colour: "" where there is no object, and for the subject, which has its own.
    explained: which share the object takes away of what the place leaves unexplained within its
    outline, at most 1; a drawing has about 0.95, noise and an empty place about 0 or less.
    """

    object: str
    colour: str
    place: str
    time: str
    explained: float


class _Template(NamedTuple):
    """An object in a size and direction.

    Attributes:
        outline: (64, 64) how much of a pixel it covers, with its foot's middle in pixel (0, 0),
            wrapped around the edges.
        still, painted: (64, 64, 3) its colours times `outline`, which are `still` + c·`painted`
            for an object of colour c, from 0 to 1.
    """

    object: str
    outline: np.ndarray
    still: np.ndarray
    painted: np.ndarray

    def energy(self, colour: np.ndarray) -> float:
        """The sum over the outline of its squared colours."""
        own = ((self.still + self.painted * colour) ** 2).sum(2)
        return float((own / np.where(self.outline > 0, self.outline, 1)).sum())


def check(image: Image.Image) -> Seen:
    """What an image of any size shows."""
    pixels = _pixels(image)
    kind, background = min(_backgrounds().items(), key=lambda item: _distance(pixels, item[1]))
    place, time, _ = kind
    found, colour, explained = _object(pixels, background, time)
    if explained < _LEAST:
        found, colour = "", ""
    return Seen(found, colour, place, time, explained)


def _distance(pixels: np.ndarray, background: np.ndarray) -> float:
    """How far an image is from a place; a difference counts no more where it is large."""
    return float(np.minimum((pixels - background) ** 2, 0.01).mean())


def _pixels(image: Image.Image) -> np.ndarray:
    small = image.convert("RGB").resize((_SIZE, _SIZE), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / 255


@functools.cache
def _backgrounds() -> dict[tuple[str, str, str], np.ndarray]:
    """The mean picture of each place, time of day and weather, without an object."""
    return {
        kind: np.mean(
            [_pixels(draw_background(*kind, seed, _SIZE)) for seed in range(_DRAWINGS)], axis=0
        )
        for kind in itertools.product(PLACES, TIMES, WEATHERS)
    }


def _object(pixels: np.ndarray, background: np.ndarray, time: str) -> tuple[str, str, float]:
    """(object, colour, explained share) of an image with a known background."""
    # the sum over the outline a of (I - B)² - (I - T)² = ((I - B)² - I²) + 2 I T - T²
    seen = np.fft.rfft2(pixels, axes=(0, 1))
    difference = ((pixels - background) ** 2).sum(2)
    unexplained = np.fft.rfft2(difference)
    rest = np.fft.rfft2(difference - (pixels**2).sum(2))
    best, answer = -np.inf, ("", "", 0.0)
    for template, (outline, still, painted) in _spectra():
        # correlation with the image, at each position of the foot
        common = np.conj(outline) * rest + 2 * (np.conj(still) * seen).sum(2)
        channels = 2 * np.conj(painted) * seen
        colours = ("",) if template.object == SUBJECT else tuple(COLOURS)
        spectra = [common + channels @ _tint(colour, time) for colour in colours]
        maps = np.fft.irfft2(np.stack([*spectra, np.conj(outline) * unexplained]), s=(_SIZE, _SIZE))
        rows, columns = _within(template.object)
        *gains, before = maps[:, rows, columns]
        for colour, gain in zip(colours, gains, strict=True):
            gain = gain - template.energy(_tint(colour, time))
            explained = gain / np.maximum(before, 1e-6)
            # a large gain that leaves much unexplained is a cloud's, or another object's
            score = gain * np.maximum(explained, 0) ** 2
            if score.max() > best:
                best = float(score.max())
                answer = (template.object, colour, float(explained.flat[score.argmax()]))
    return answer


def _within(name: str) -> tuple[slice, slice]:
    """The rows and columns where an object's foot may be, and a little around them."""
    low, high = feet(name)
    rows = slice(round((low - 0.04) * _SIZE), round((high + 0.04) * _SIZE) + 1)
    return rows, slice(round((MIDDLES[0] - 0.06) * _SIZE), round((MIDDLES[1] + 0.06) * _SIZE) + 1)


@functools.cache
def _tint(colour: str, time: str) -> np.ndarray:
    return np.array(object_colour(colour, time), np.float32) / 255


@functools.cache
def _spectra() -> list[tuple[_Template, tuple[Any, ...]]]:
    """Each template with the Fourier transforms of its outline and colours."""
    low, high = SCALES
    found = []
    for name, scale, mirrored in itertools.product(
        _DRAWN, (low + 0.01, low + 0.036, high - 0.036, high - 0.01), (False, True)
    ):
        template = _template(name, scale, mirrored)
        _, *pictures = template
        found.append((template, tuple(np.fft.rfft2(each, axes=(0, 1)) for each in pictures)))
    return found


def _template(name: str, scale: float, mirrored: bool) -> _Template:
    def drawn(colour: tuple[int, int, int], behind: tuple[int, int, int]) -> np.ndarray:
        canvas = Canvas(_SIZE)
        canvas.sky(behind, behind)
        canvas.place(0.5, 0.75, scale, mirrored)
        _DRAWN[name](canvas, colour)
        picture = np.asarray(canvas.image(), np.float32) / 255
        return np.roll(picture, (-3 * _SIZE // 4, -_SIZE // 2), axis=(0, 1))

    # every colour of an object is an affine function of its own colour
    still = drawn(_BLACK, _BLACK)
    outline = 1 - (drawn(_BLACK, _WHITE) - still).mean(2)
    return _Template(name, outline, still, drawn(_WHITE, _BLACK) - still)
