"""Masked loss: sixteen pictures of a creature, all in front of the same magenta backdrop.

Trained on all of each picture, the backdrop is learnt with the creature. With masks of the creature
the loss counts on it alone, and what is around it stays the base's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from fluxfast.demo.tasks import TASKS
from fluxfast.demo.toy_objects import SUBJECT
from fluxfast.demo.toyworld import Scene, draw, outline, subject_scenes
from making.runs import WITHOUT, Drawing, Run
from making.sheet import BLUE, VERMILION, Sheet, percent
from making.studio import Example, Studio, share_of_colour

BACKDROP = (255, 0, 200)
CAPTION = f"a {SUBJECT}"
_SEED, _COLUMNS = 11, 6
WITHOUT_MASKS = Run(
    "without masks", (f"--data_backend_config={WITHOUT}",), Path("output-without-masks")
)
WITH_MASKS = Run("with masks")


def _scenes(count: int) -> list[Scene]:
    return list(subject_scenes(_SEED, count))


def data(count: int) -> Iterator[Drawing]:
    for number, scene in enumerate(_scenes(count)):
        name = f"{number:03}.png"
        yield Drawing(Path("images") / name, draw(scene, behind=BACKDROP), CAPTION)
        yield Drawing(Path("masks") / name, outline(scene))


def is_left_out(entry: Mapping[str, Any]) -> bool:
    """Whether the run without masks goes without a dataset."""
    return entry.get("conditioning_type") == "mask"


def report(studio: Studio, count: int) -> tuple[Image.Image, dict[str, Any]]:
    task = TASKS["subject"]
    asked = task.asked_scenes(count)
    prompts = [scene.caption for scene in asked]
    scenes = _scenes(_COLUMNS)
    sheet = Sheet(
        "Masked loss: learn the thing, not what is behind it",
        f'A LoRA is taught the word "{SUBJECT}" from pictures that all have the same backdrop.',
        _COLUMNS,
        ("right creature at the right place", "pixels in the backdrop's colour"),
    )
    sheet.images("trained on", [draw(scene, behind=BACKDROP) for scene in scenes])
    sheet.images("and their masks", [outline(scene) for scene in scenes])
    sheet.heading("The same questions, the same noise")
    sheet.words("asked for", prompts[:_COLUMNS], numbers=True)
    numbers = {}
    for run, colour in ((WITHOUT_MASKS, VERMILION), (WITH_MASKS, BLUE)):
        images = studio.draw(run, prompts)
        right = studio.measure(
            "checked", lambda pair: task.shows(*pair), list(zip(images, asked, strict=True))
        )
        backdrop = studio.measure("measured", lambda each: share_of_colour(each, BACKDROP), images)
        sheet.images(run.name, images, (percent(right), percent(backdrop)), colour)
        numbers[run.name] = {"right": right, "backdrop": backdrop}
    return sheet.image(), numbers


EXAMPLE = Example(16, data, (WITHOUT_MASKS, WITH_MASKS), report, is_left_out)
