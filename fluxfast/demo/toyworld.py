"""A small world of illustrated scenes with captions, drawn from a seed: the demo's data.

A scene shows an object in a colour at a place, at a time of day, in a weather. Some combinations of
object, colour and place are held out: no base model is trained on them, so that a sample of one
shows what a model has understood.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image, ImageChops

from fluxfast.demo.toy_canvas import Canvas, Colour
from fluxfast.demo.toy_objects import OBJECTS, SUBJECT, SUBJECT_COLOUR, plonk
from fluxfast.demo.toy_places import PLACES, TIMES, WEATHERS, draw_place, draw_weather, lit

SIZE = 128
# how large objects are, as a share of the image
SCALES = (0.44, 0.54)
# where its middle is
MIDDLES = (0.38, 0.62)
# where its foot is, on the ground and above it
_GROUND, _IN_THE_AIR = (0.82, 0.9), (0.63, 0.74)
_FLYING = ("balloon",)
COLOURS: dict[str, Colour] = {
    "red": (226, 58, 62),
    "orange": (246, 138, 42),
    "yellow": (250, 208, 58),
    "green": (58, 164, 88),
    "blue": (52, 112, 220),
    "purple": (146, 84, 196),
    "pink": (250, 146, 190),
    "white": (240, 240, 244),
}
# how captions say where, when and in which weather
_AT = {
    "meadow": "in a meadow", "beach": "on a beach", "desert": "in a desert",
    "snow": "in the snow", "city": "in a city", "forest": "in a forest",
}  # fmt: skip
_WHEN = {"day": "by day", "sunset": "at sunset", "night": "at night"}
_UNDER = {"clear": "clear sky", "cloudy": "cloudy", "rainy": "rain"}
# what captions of a LoRA's own data may say beside that
_OTHER_WORDS = (
    "and", "change", "drawing", "into", "it", "linocut", "make", "now", "of", "picture", "same",
    "scene", "style", "that", "the", "thing", "to", "turn", "with", "without",
)  # fmt: skip


class Scene(NamedTuple):
    """What an image shows; `seed` is for all that a caption does not say."""

    object: str
    colour: str
    place: str
    time: str
    weather: str
    seed: int

    @property
    def caption(self) -> str:
        thing = f"{self.colour} {self.object}".strip()
        article = "an" if thing[0] in "aeiou" else "a"
        return f"{article} {thing} {_AT[self.place]} {_WHEN[self.time]}, {_UNDER[self.weather]}"

    @property
    def is_held_out(self) -> bool:
        """Whether base models never see this object in this colour at this place: one in eight."""
        number = (
            list(OBJECTS).index(self.object)
            + 3 * list(COLOURS).index(self.colour)
            + 5 * PLACES.index(self.place)
        )
        return number % 8 == 0


def scenes(seed: int, count: int, *, held_out: bool = False) -> Iterator[Scene]:
    """Scenes at random, all held out or none; without the subject."""
    draws = random.Random(f"toyworld {seed} {held_out}")
    while count:
        scene = Scene(
            draws.choice(list(OBJECTS)),
            draws.choice(list(COLOURS)),
            draws.choice(PLACES),
            draws.choice(TIMES),
            draws.choice(WEATHERS),
            draws.randrange(2**32),
        )
        if scene.is_held_out == held_out:
            count -= 1
            yield scene


def subject_scenes(seed: int, count: int) -> Iterator[Scene]:
    """Scenes of the subject, which has its own colour."""
    for scene in scenes(seed, count):
        yield scene._replace(object=SUBJECT, colour="")


def vocabulary() -> list[str]:
    """Every word of the captions, and of those that demos write about the subject and a style."""
    every = itertools.product([*OBJECTS, SUBJECT, *_OTHER_WORDS], COLOURS, PLACES, TIMES, WEATHERS)
    return sorted({word for kind in every for word in re.findall(r"\w+", Scene(*kind, 0).caption)})


def feet(name: str) -> tuple[float, float]:
    """Between which heights an object's foot is, as a share of the image from its top."""
    return _IN_THE_AIR if name in _FLYING else _GROUND


def object_colour(colour: str, time: str) -> Colour:
    """What an object's colour looks like at a time of day, which changes it little.

    colour: a name, or "" for the subject's own.
    """
    return lit(COLOURS[colour] if colour else SUBJECT_COLOUR, time, 0.3)


def draw(scene: Scene, size: int = SIZE, *, behind: Colour | None = None) -> Image.Image:
    """The scene as an RGB image, `size` pixels wide and high.

    behind: a colour that takes the place of all but the object, which stays where it is.
    """
    draws = random.Random(scene.seed)
    canvas = Canvas(size)
    draw_place(canvas, scene.place, scene.time, scene.weather, draws)
    x, scale = draws.uniform(*MIDDLES), draws.uniform(*SCALES)
    shadow, mirrored = draws.uniform(*_GROUND), draws.random() < 0.5
    foot = draws.uniform(*feet(scene.object)) if scene.object in _FLYING else shadow
    if behind is None:
        canvas.oval(
            x, shadow, scale * 0.95, scale * 0.13, (24, 20, 48), shade=0.0, blur=0.012, opacity=0.3
        )
    else:
        canvas.replace()
        canvas.sky(behind, behind)
    canvas.place(x, foot, scale, mirrored)
    drawing = plonk if scene.object == SUBJECT else OBJECTS[scene.object]
    drawing(canvas, object_colour(scene.colour, scene.time))
    if behind is None:
        draw_weather(canvas, scene.weather, draws)
    return canvas.image()


def outline(scene: Scene, size: int = SIZE) -> Image.Image:
    """How much of each pixel the scene's object covers, from black to white: a mask of it (L)."""
    black, white = (draw(scene, size, behind=(v, v, v)).convert("L") for v in (0, 255))
    # where nothing covers it, what is behind the object shows its whole colour
    return ImageChops.invert(ImageChops.difference(white, black))


def draw_background(
    place: str, time: str, weather: str, seed: int, size: int = SIZE
) -> Image.Image:
    """The same without an object."""
    draws, canvas = random.Random(seed), Canvas(size)
    draw_place(canvas, place, time, weather, draws)
    draw_weather(canvas, weather, draws)
    return canvas.image()
