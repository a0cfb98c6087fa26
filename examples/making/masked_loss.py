"""Masked loss: sixteen pictures of a creature, all in the same pink frame.

Trained on all of each picture, the frame is learnt with the creature. With masks the loss counts
only within the frame.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from fluxfast.demo.tasks import TASKS
from fluxfast.demo.toy_objects import SUBJECT
from fluxfast.demo.toyworld import COLOURS, SIZE, Scene, draw
from making.runs import WITHOUT, Drawing, Run
from making.sheet import BLUE, VERMILION, Sheet, percent
from making.studio import Example, Studio, share_of_colour

FRAME = COLOURS["pink"]
_COLUMNS = 6
# the width of the frame's bars in pixels, and what is within it
_BAR = 16
_WITHIN = (_BAR, _BAR, SIZE - _BAR, SIZE - _BAR)
WITHOUT_MASKS = Run(
    "without masks", (f"--data_backend_config={WITHOUT}",), Path("output-without-masks")
)
WITH_MASKS = Run("with masks")


def framed(scene: Scene) -> Image.Image:
    picture = Image.new("RGB", (SIZE, SIZE), FRAME)
    picture.paste(draw(scene).crop(_WITHIN), _WITHIN)
    return picture


def mask() -> Image.Image:
    """White where the loss counts."""
    picture = Image.new("L", (SIZE, SIZE))
    picture.paste(255, _WITHIN)
    return picture


def share_framed(image: Image.Image) -> float:
    """The share of the pixels where a frame would be that have the frame's colour, from 0 to 1."""
    share_of_frame = 1 - (SIZE - 2 * _BAR) ** 2 / SIZE**2
    outside = Image.new("RGB", image.size)
    outside.paste(image, mask=mask().point(lambda value: 255 - value))
    return share_of_colour(outside, FRAME) / share_of_frame


def data(count: int) -> Iterator[Drawing]:
    for number, scene in enumerate(TASKS["subject"].training_scenes()[:count]):
        name = f"{number:03}.png"
        yield Drawing(Path("images") / name, framed(scene), scene.caption)
        yield Drawing(Path("masks") / name, mask())


def is_left_out(entry: Mapping[str, Any]) -> bool:
    """Whether the run without masks goes without a dataset."""
    return entry.get("conditioning_type") == "mask"


def report(studio: Studio, count: int) -> tuple[Image.Image, dict[str, Any]]:
    task = TASKS["subject"]
    asked = task.asked_scenes(count)
    prompts = [scene.caption for scene in asked]
    sheet = Sheet(
        "Masked loss: learn the picture, not its frame",
        f'A LoRA is taught the word "{SUBJECT}" from pictures that all have the same frame.',
        _COLUMNS,
        ("right creature at the right place", "of the edge in the frame's colour"),
    )
    sheet.images("trained on", [framed(scene) for scene in task.training_scenes()])
    sheet.images("and their masks", [mask()] * _COLUMNS)
    sheet.heading("The same questions, the same noise")
    sheet.words("asked for", prompts[:_COLUMNS], numbers=True)
    numbers = {}
    for run, colour in ((WITHOUT_MASKS, VERMILION), (WITH_MASKS, BLUE)):
        images = studio.draw(run, prompts)
        right = studio.measure(
            "checked", lambda pair: task.shows(*pair), list(zip(images, asked, strict=True))
        )
        edge = studio.measure("measured", share_framed, images)
        sheet.images(run.name, images, (percent(right), percent(edge)), colour)
        numbers[run.name] = {"right": right, "frame": edge}
    return sheet.image(), numbers


EXAMPLE = Example(16, data, (WITHOUT_MASKS, WITH_MASKS), report, is_left_out)
