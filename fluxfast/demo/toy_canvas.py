"""A canvas for small illustrations: smooth shapes with soft shading, drawn large, scaled down."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, int, int]
Point = tuple[float, float]
# the canvas is drawn so many times larger than the image, which makes edges smooth
SUPERSAMPLING = 4


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """A colour between two: `share` 0 is the first, 1 the second."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


def lighter(colour: Colour, share: float) -> Colour:
    return mix(colour, (255, 255, 255), share)


def darker(colour: Colour, share: float) -> Colour:
    # towards a blue that is nearly black, as shadows in illustrations are
    return mix(colour, (24, 20, 48), share)


@functools.lru_cache
def _ramp(angle: int) -> Image.Image:
    """A square that goes from white to black in a direction, in degrees from straight down."""
    y, x = np.mgrid[0:64, 0:64] / 63 - 0.5
    along = x * math.sin(math.radians(angle)) + y * math.cos(math.radians(angle))
    along = (along - along.min()) / (along.max() - along.min())
    return Image.fromarray((255 * (1 - along)).astype(np.uint8))


def smooth(points: Sequence[Point], steps: int = 8) -> list[Point]:
    """The closed Catmull-Rom curve through points."""
    count, curve = len(points), []
    for index in range(count):
        p0, p1, p2, p3 = (points[(index + k) % count] for k in (-1, 0, 1, 2))
        for step in range(steps):
            t = step / steps
            curve.append(
                tuple(
                    0.5
                    * (
                        2 * b
                        + (c - a) * t
                        + (2 * a - 5 * b + 4 * c - d) * t**2
                        + (3 * b - a - 3 * c + d) * t**3
                    )
                    for a, b, c, d in zip(p0, p1, p2, p3, strict=True)
                )
            )
    return curve  # type: ignore[return-value]


class Canvas:
    """Draws shapes whose coordinates run from 0 to 1, to the right and down.

    `place` moves, scales and mirrors what is drawn after it; a shape's own coordinates then run
    from -0.5 to 0.5 around the middle and upwards from 0 at its foot.
    """

    def __init__(self, size: int) -> None:
        self.size, self._large = size, size * SUPERSAMPLING
        self.picture = Image.new("RGB", (self._large, self._large))
        self._x = self._y = 0.0
        self._scale, self._mirror, self._up = 1.0, 1, False

    def place(self, x: float, foot: float, scale: float, mirrored: bool) -> None:
        """Let the next shapes be around `x`, above `foot`, `scale` wide and high."""
        self._x, self._y, self._scale = x, foot, scale
        self._mirror, self._up = (-1 if mirrored else 1), True

    def replace(self) -> None:
        """Take the whole canvas as the coordinates again."""
        self._x = self._y = 0.0
        self._scale, self._mirror, self._up = 1.0, 1, False

    def _at(self, point: Point) -> Point:
        x, y = point
        if self._up:
            y = -y
        return (
            (self._x + self._mirror * x * self._scale) * self._large,
            (self._y + y * self._scale) * self._large,
        )

    def sky(self, top: Colour, bottom: Colour, horizon: float = 1.0) -> None:
        """Fill the canvas from the top colour to the bottom one at `horizon`."""
        rows = np.clip(np.arange(self._large) / (self._large * horizon), 0, 1)[:, None]
        colours = np.array(top) * (1 - rows) + np.array(bottom) * rows
        column = Image.fromarray(colours.round().astype(np.uint8)[:, None, :])
        self.picture.paste(column.resize(self.picture.size))

    def shape(
        self,
        points: Sequence[Point],
        colour: Colour,
        *,
        curved: bool = True,
        shade: float = 0.18,
        angle: int = 30,
        blur: float = 0.0,
        opacity: float = 1.0,
    ) -> None:
        """Fill a closed outline.

        shade: how much lighter it begins and darker it ends, in the direction of `angle`. blur: the
        edge's width, as a share of the canvas.
        """
        corners = [self._at(point) for point in (smooth(points) if curved else points)]
        margin = 2 + 3 * blur * self._large
        left = math.floor(min(x for x, _ in corners) - margin)
        top = math.floor(min(y for _, y in corners) - margin)
        width = math.ceil(max(x for x, _ in corners) + margin) - left
        height = math.ceil(max(y for _, y in corners) + margin) - top
        mask = Image.new("L", (width, height))
        ImageDraw.Draw(mask).polygon(
            [(x - left, y - top) for x, y in corners], fill=round(255 * opacity)
        )
        if blur:
            mask = mask.filter(ImageFilter.GaussianBlur(blur * self._large))
        fill = Image.new("RGB", mask.size, colour)
        if shade:
            ramp = _ramp(angle).resize(mask.size)
            fill = Image.composite(
                Image.new("RGB", mask.size, lighter(colour, shade)),
                Image.new("RGB", mask.size, darker(colour, shade)),
                ramp,
            )
        self.picture.paste(fill, (left, top), mask)

    def oval(
        self, x: float, y: float, width: float, height: float, colour: Colour, **how: float
    ) -> None:
        """Fill an ellipse around (x, y); `width` and `height` are its whole extents."""
        turns = [2 * math.pi * k / 48 for k in range(48)]
        points = [
            (x + width / 2 * math.cos(turn), y + height / 2 * math.sin(turn)) for turn in turns
        ]
        self.shape(points, colour, curved=False, **how)  # type: ignore[arg-type]

    def line(self, points: Sequence[Point], width: float, colour: Colour) -> None:
        """Draw a line with round ends, `width` in the units of its points."""
        corners = [self._at(point) for point in points]
        thick = max(round(width * self._scale * self._large), 1)
        draw = ImageDraw.Draw(self.picture)
        draw.line(corners, fill=colour, width=thick, joint="curve")
        for x, y in (corners[0], corners[-1]):
            draw.ellipse((x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2), fill=colour)

    def image(self) -> Image.Image:
        """The picture at its size."""
        return self.picture.resize((self.size, self.size), Image.Resampling.BOX)
