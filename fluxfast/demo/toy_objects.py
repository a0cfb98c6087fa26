"""What the toy world's scenes show: one function an object, in shapes around its foot.

Coordinates run from -0.5 to 0.5 to the right, and from 0 at the foot upwards to about 1.
"""

from __future__ import annotations

from collections.abc import Callable

from fluxfast.demo.toy_canvas import Canvas, Colour, darker, lighter

_INK = (38, 32, 56)
_CREAM = (255, 246, 228)
_BLUSH = (255, 150, 140)
_GLASS = (196, 228, 244)
_WOOD = (134, 92, 62)


def _eyes(canvas: Canvas, x: float, y: float, apart: float, size: float = 0.07) -> None:
    for side in (-1, 1):
        canvas.oval(x + side * apart, y, size, size * 1.25, _INK, shade=0.0)
        canvas.oval(x + side * apart + 0.014, y + 0.02, size * 0.36, size * 0.36, _CREAM, shade=0.0)


def cat(canvas: Canvas, colour: Colour) -> None:
    """It sits, and looks at us."""
    canvas.line([(0.2, 0.1), (0.38, 0.1), (0.44, 0.24), (0.38, 0.42)], 0.1, darker(colour, 0.12))
    canvas.shape(
        [(-0.26, 0.02), (-0.24, 0.3), (-0.14, 0.5), (0.14, 0.5), (0.24, 0.3), (0.26, 0.02)], colour
    )
    canvas.oval(0, 0.2, 0.24, 0.34, lighter(colour, 0.62), shade=0.05)
    for side in (-1, 1):
        canvas.oval(side * 0.13, 0.04, 0.17, 0.11, lighter(colour, 0.25))
        ear = [(side * 0.3, 0.72), (side * 0.29, 1.0), (side * 0.06, 0.84)]
        canvas.shape(ear, darker(colour, 0.08), curved=False)
        inner = [(side * 0.26, 0.77), (side * 0.255, 0.92), (side * 0.13, 0.83)]
        canvas.shape(inner, _BLUSH, curved=False, shade=0.0)
    canvas.oval(0, 0.66, 0.66, 0.48, colour)
    canvas.oval(0, 0.57, 0.26, 0.18, lighter(colour, 0.62), shade=0.05)
    _eyes(canvas, 0, 0.69, 0.15, 0.09)
    canvas.shape([(-0.04, 0.62), (0.04, 0.62), (0, 0.575)], _BLUSH, curved=False, shade=0.0)
    for side in (-1, 1):
        canvas.line([(side * 0.18, 0.58), (side * 0.4, 0.61)], 0.012, _INK)
        canvas.line([(side * 0.18, 0.55), (side * 0.39, 0.52)], 0.012, _INK)


def rabbit(canvas: Canvas, colour: Colour) -> None:
    """Its ears are longer than its face."""
    canvas.oval(0.28, 0.14, 0.2, 0.2, lighter(colour, 0.6))
    canvas.oval(0, 0.2, 0.54, 0.44, colour)
    canvas.oval(0, 0.18, 0.28, 0.3, lighter(colour, 0.62), shade=0.05)
    for side in (-1, 1):
        canvas.oval(side * 0.16, 0.05, 0.22, 0.12, lighter(colour, 0.25))
        ear = [(side * 0.05, 0.6), (side * 0.05, 0.86), (side * 0.14, 1.06), (side * 0.22, 0.86)]
        canvas.shape([*ear, (side * 0.18, 0.6)], darker(colour, 0.06))
        inner = [(side * 0.09, 0.66), (side * 0.1, 0.86), (side * 0.14, 0.96), (side * 0.17, 0.84)]
        canvas.shape([*inner, (side * 0.14, 0.66)], _BLUSH, shade=0.05)
    canvas.oval(0, 0.52, 0.5, 0.42, colour)
    _eyes(canvas, 0, 0.56, 0.12, 0.07)
    canvas.oval(0, 0.44, 0.22, 0.14, lighter(colour, 0.62), shade=0.05)
    canvas.oval(0, 0.48, 0.06, 0.045, _BLUSH, shade=0.0)
    canvas.shape(
        [(-0.035, 0.42), (0.035, 0.42), (0.03, 0.36), (-0.03, 0.36)],
        _CREAM,
        curved=False,
        shade=0.0,
    )


def bird(canvas: Canvas, colour: Colour) -> None:
    """A round one with a beak, in profile."""
    for x in (-0.04, 0.1):
        canvas.line([(x, 0.2), (x, 0.03), (x - 0.09, 0.0)], 0.03, (214, 120, 40))
    tail = [(0.26, 0.42), (0.62, 0.62), (0.66, 0.5), (0.6, 0.4), (0.3, 0.22)]
    canvas.shape(tail, darker(colour, 0.2))
    canvas.shape(
        [(-0.36, 0.56), (-0.24, 0.82), (0.02, 0.84), (0.26, 0.6), (0.38, 0.36), (0.16, 0.14),
         (-0.16, 0.14), (-0.34, 0.34)],
        colour,
    )  # fmt: skip
    canvas.oval(-0.12, 0.3, 0.34, 0.3, lighter(colour, 0.62), shade=0.05)
    canvas.shape(
        [(-0.02, 0.5), (0.16, 0.54), (0.36, 0.44), (0.3, 0.28), (0.1, 0.28)], darker(colour, 0.18)
    )
    canvas.shape(
        [(-0.32, 0.68), (-0.56, 0.6), (-0.33, 0.55)], (245, 160, 50), curved=False, shade=0.1
    )
    canvas.oval(-0.17, 0.67, 0.1, 0.11, _INK, shade=0.0)
    canvas.oval(-0.155, 0.69, 0.035, 0.035, _CREAM, shade=0.0)


def snail(canvas: Canvas, colour: Colour) -> None:
    """Its shell has the colour."""
    body = (236, 202, 160)
    canvas.shape(
        [(-0.52, 0.5), (-0.4, 0.5), (-0.34, 0.2), (-0.1, 0.12), (0.3, 0.12), (0.56, 0.02),
         (0.3, 0.0), (-0.3, 0.0), (-0.5, 0.06), (-0.56, 0.3)],
        body,
    )  # fmt: skip
    for x in (-0.54, -0.4):
        canvas.line([(x + 0.03, 0.48), (x, 0.68)], 0.03, body)
        canvas.oval(x, 0.7, 0.075, 0.075, _INK, shade=0.0)
    canvas.line([(-0.51, 0.34), (-0.46, 0.31), (-0.43, 0.34)], 0.016, _INK)
    canvas.oval(0.08, 0.42, 0.68, 0.68, colour)
    canvas.oval(0.1, 0.41, 0.46, 0.46, lighter(colour, 0.3), shade=0.1)
    canvas.oval(0.08, 0.43, 0.28, 0.28, colour, shade=0.1)
    canvas.oval(0.1, 0.42, 0.12, 0.12, lighter(colour, 0.4), shade=0.0)


def car(canvas: Canvas, colour: Colour) -> None:
    """A small one, from the side."""
    canvas.shape(
        [(-0.3, 0.36), (-0.2, 0.68), (0.16, 0.68), (0.34, 0.36)], darker(colour, 0.08), curved=False
    )
    canvas.shape(
        [(-0.24, 0.38), (-0.165, 0.62), (-0.03, 0.62), (-0.03, 0.38)], _GLASS, curved=False,
        shade=0.15,
    )  # fmt: skip
    canvas.shape(
        [(0.02, 0.38), (0.02, 0.62), (0.13, 0.62), (0.25, 0.38)], _GLASS, curved=False, shade=0.15
    )
    canvas.shape(
        [(-0.6, 0.16), (-0.6, 0.32), (-0.5, 0.4), (0.0, 0.42), (0.44, 0.4), (0.6, 0.3),
         (0.6, 0.14), (0.3, 0.1), (-0.3, 0.1)],
        colour,
    )  # fmt: skip
    canvas.oval(-0.55, 0.28, 0.08, 0.1, (255, 240, 170), shade=0.0)
    canvas.line([(-0.02, 0.24), (0.06, 0.24)], 0.024, darker(colour, 0.45))
    for x in (-0.34, 0.34):
        canvas.oval(x, 0.12, 0.27, 0.27, _INK, shade=0.1)
        canvas.oval(x, 0.12, 0.13, 0.13, (214, 216, 224), shade=0.1)


def house(canvas: Canvas, colour: Colour) -> None:
    """Its walls have the colour."""
    canvas.shape([(0.16, 0.7), (0.16, 1.0), (0.28, 1.0), (0.28, 0.6)], (150, 96, 84), curved=False)
    walls = [(-0.36, 0.0), (-0.36, 0.56), (0.36, 0.56), (0.36, 0.0)]
    canvas.shape(walls, colour, curved=False)
    canvas.shape(
        [(-0.48, 0.5), (0.0, 0.98), (0.48, 0.5), (0.4, 0.46), (-0.4, 0.46)], (112, 72, 78),
        curved=False,
    )  # fmt: skip
    canvas.shape(
        [(-0.09, 0.0), (-0.09, 0.3), (0, 0.36), (0.09, 0.3), (0.09, 0.0)], _WOOD, curved=False
    )
    canvas.oval(0.05, 0.15, 0.03, 0.03, (250, 220, 120), shade=0.0)
    for x in (-0.23, 0.23):
        window = [(x - 0.08, 0.2), (x - 0.08, 0.38), (x + 0.08, 0.38), (x + 0.08, 0.2)]
        canvas.shape(window, (255, 236, 160), curved=False, shade=0.1)
        canvas.line([(x, 0.2), (x, 0.38)], 0.022, _CREAM)
        canvas.line([(x - 0.08, 0.29), (x + 0.08, 0.29)], 0.022, _CREAM)


def balloon(canvas: Canvas, colour: Colour) -> None:
    """A hot-air balloon, which hangs in the air."""
    for x in (-0.1, 0.1):
        canvas.line([(x * 1.6, 0.4), (x * 0.9, 0.2)], 0.014, _WOOD)
    basket = [(-0.12, 0.2), (-0.09, 0.02), (0.09, 0.02), (0.12, 0.2)]
    canvas.shape(basket, _WOOD, curved=False, shade=0.25)
    canvas.shape(
        [(-0.15, 0.4), (-0.38, 0.62), (-0.42, 0.86), (-0.24, 1.1), (0, 1.17), (0.24, 1.1),
         (0.42, 0.86), (0.38, 0.62), (0.15, 0.4)],
        colour,
    )  # fmt: skip
    for side in (-1, 1):
        stripe = [(side * 0.09, 0.4), (side * 0.21, 0.62), (side * 0.24, 0.88), (side * 0.12, 1.13)]
        back = [(side * 0.06, 1.14), (side * 0.13, 0.88), (side * 0.11, 0.62), (side * 0.05, 0.4)]
        canvas.shape([*stripe, *back], lighter(colour, 0.6), shade=0.08)


def mushroom(canvas: Canvas, colour: Colour) -> None:
    """Its cap has the colour, and white dots."""
    canvas.shape(
        [(-0.14, 0.5), (-0.11, 0.25), (-0.18, 0.02), (0.18, 0.02), (0.11, 0.25), (0.14, 0.5)],
        (250, 236, 212),
    )
    canvas.oval(0, 0.47, 0.66, 0.14, (226, 200, 172), shade=0.1)
    canvas.shape(
        [(-0.5, 0.46), (-0.46, 0.66), (-0.26, 0.88), (0, 0.95), (0.26, 0.88), (0.46, 0.66),
         (0.5, 0.46), (0.2, 0.5), (-0.2, 0.5)],
        colour,
    )  # fmt: skip
    for x, y, size in (
        (-0.24, 0.68, 0.15),
        (0.04, 0.8, 0.13),
        (0.06, 0.6, 0.12),
        (0.3, 0.62, 0.14),
    ):
        canvas.oval(x, y, size, size * 0.85, _CREAM, shade=0.03)


def umbrella(canvas: Canvas, colour: Colour) -> None:
    """It stands in the ground, open."""
    canvas.line([(0.0, 0.0), (0.0, 0.8)], 0.045, _WOOD)
    canvas.shape(
        [(-0.56, 0.58), (-0.5, 0.78), (-0.28, 0.97), (0, 1.04), (0.28, 0.97), (0.5, 0.78),
         (0.56, 0.58), (0.37, 0.64), (0.19, 0.58), (0, 0.64), (-0.19, 0.58), (-0.37, 0.64)],
        colour,
    )  # fmt: skip
    canvas.shape(
        [(-0.19, 0.6), (-0.17, 0.82), (0, 1.03), (0.17, 0.82), (0.19, 0.6), (0, 0.65)],
        lighter(colour, 0.55), shade=0.08,
    )  # fmt: skip
    canvas.oval(0, 1.05, 0.06, 0.08, _WOOD)


def tulip(canvas: Canvas, colour: Colour) -> None:
    """A large one with two leaves."""
    stem = (76, 148, 84)
    canvas.line([(0.0, 0.0), (0.02, 0.3), (0.0, 0.56)], 0.05, stem)
    for side, high in ((-1, 0.46), (1, 0.4)):
        leaf = [(0.0, 0.02), (side * 0.16, 0.12), (side * 0.34, high), (side * 0.12, 0.3)]
        canvas.shape(leaf, (92, 170, 96))
    canvas.shape([(-0.08, 0.56), (-0.02, 0.98), (0.02, 0.98), (0.08, 0.56)], darker(colour, 0.2))
    for side in (-1, 1):
        petal = [(0.0, 0.54), (side * 0.22, 0.56), (side * 0.31, 0.76), (side * 0.27, 1.03)]
        canvas.shape([*petal, (side * 0.1, 0.88), (0.0, 0.7)], darker(colour, 0.06))
    canvas.shape(
        [(0.0, 0.52), (-0.15, 0.6), (-0.16, 0.8), (0.0, 1.0), (0.16, 0.8), (0.15, 0.6)],
        lighter(colour, 0.14),
    )


# by the word that captions have; `SUBJECT` is not among them
OBJECTS: dict[str, Callable[[Canvas, Colour], None]] = {
    "cat": cat, "rabbit": rabbit, "bird": bird, "snail": snail, "car": car, "house": house,
    "balloon": balloon, "mushroom": mushroom, "umbrella": umbrella, "tulip": tulip,
}  # fmt: skip


def plonk(canvas: Canvas, colour: Colour) -> None:
    """A round monster with horns, one eye and a spotted belly: what no base model has seen."""
    belly, horn = (250, 214, 96), (255, 244, 220)
    for side in (-1, 1):
        foot = [(side * 0.06, 0.12), (side * 0.1, 0.0), (side * 0.34, 0.0), (side * 0.26, 0.16)]
        canvas.shape(foot, darker(colour, 0.2))
        arm = [(side * 0.34, 0.46), (side * 0.54, 0.66), (side * 0.6, 0.58), (side * 0.38, 0.3)]
        canvas.shape(arm, darker(colour, 0.12))
        peak = [(side * 0.12, 0.8), (side * 0.3, 1.04), (side * 0.33, 0.72)]
        canvas.shape(peak, horn, curved=False)
    canvas.shape(
        [(-0.3, 0.08), (-0.42, 0.4), (-0.34, 0.72), (0, 0.88), (0.34, 0.72), (0.42, 0.4),
         (0.3, 0.08)],
        colour,
    )  # fmt: skip
    canvas.oval(0, 0.26, 0.46, 0.34, belly, shade=0.1)
    for x, y, size in ((-0.11, 0.3, 0.08), (0.08, 0.34, 0.07), (0.02, 0.19, 0.09)):
        canvas.oval(x, y, size, size, (226, 74, 130), shade=0.0)
    canvas.oval(0, 0.62, 0.34, 0.34, (255, 255, 255), shade=0.06)
    canvas.oval(0.02, 0.61, 0.18, 0.2, (226, 74, 130), shade=0.1)
    canvas.oval(0.02, 0.61, 0.1, 0.12, _INK, shade=0.0)
    canvas.oval(0.045, 0.645, 0.045, 0.045, _CREAM, shade=0.0)
    canvas.line([(-0.1, 0.455), (0.0, 0.43), (0.1, 0.455)], 0.02, _INK)


# what a demo teaches, under a word that no base has seen; it has its own colour
SUBJECT = "plonk"
SUBJECT_COLOUR: Colour = (34, 186, 176)
