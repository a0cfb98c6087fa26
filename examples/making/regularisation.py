"""Regularisation: a creature is taught beside pictures of what the base knows already.

On regularisation data the LoRA is trained towards the base's own prediction. So what such pictures
show stays as it was, while the other pictures teach the creature.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from fluxfast.demo.tasks import TASKS, old_scenes, shows_scene
from fluxfast.demo.toy_objects import SUBJECT
from fluxfast.demo.toyworld import draw, scenes
from making.runs import WITHOUT, Drawing, Run
from making.sheet import BLUE, INK, VERMILION, Sheet, percent
from making.studio import Example, Studio

_SEED, _COLUMNS = 21, 6
# of the columns, those that ask for what is new
_NEW = 3
WITHOUT_OLD = Run(
    "without regularisation",
    # as many steps on the creature as the other run has
    (f"--data_backend_config={WITHOUT}", "--max_train_steps=200"),
    Path("output-without-regularisation"),
)
WITH_OLD = Run("with regularisation")


def data(count: int) -> Iterator[Drawing]:
    """So many pictures of the creature, and sixteen times as many of what is old."""
    new = TASKS["subject"].training_scenes()[:count]
    for folder, some in (("images", new), ("old", scenes(_SEED, 16 * count))):
        for number, scene in enumerate(some):
            yield Drawing(Path(folder) / f"{number:03}.png", draw(scene), scene.caption)


def is_left_out(entry: Mapping[str, Any]) -> bool:
    """Whether the run without regularisation goes without a dataset."""
    return bool(entry.get("is_regularisation_data"))


def report(studio: Studio, count: int) -> tuple[Image.Image, dict[str, Any]]:
    task = TASKS["subject"]
    new, old = task.asked_scenes(count), old_scenes(count)
    # the first of each kind are shown
    shown_new, shown_old = min(_NEW, count), min(_COLUMNS - _NEW, count)
    asked = new[:shown_new] + old[:shown_old] + new[shown_new:] + old[shown_old:]
    prompts = [scene.caption for scene in asked]
    sheet = Sheet(
        "Regularisation: learn the new, keep the old",
        f'A LoRA is taught the word "{SUBJECT}", with and without pictures of what the base '
        "knows already.",
        _COLUMNS,
        ("new captions: right creature, right place", "old captions: right thing, colour, place"),
    )
    sheet.words("asked for", prompts[:_COLUMNS], numbers=True)
    numbers = {}
    for run, colour in ((None, INK), (WITHOUT_OLD, VERMILION), (WITH_OLD, BLUE)):
        images = studio.draw(run, prompts)
        pairs = list(zip(images, asked, strict=True))
        shares = {
            "new": studio.measure(
                "checked", lambda pair: task.shows(*pair),
                [pair for pair in pairs if pair[1].object == SUBJECT],
            ),
            "old": studio.measure(
                "checked", lambda pair: shows_scene(*pair),
                [pair for pair in pairs if pair[1].object != SUBJECT],
            ),
        }  # fmt: skip
        name = "the base" if run is None else run.name
        sheet.images(name, images, [percent(share) for share in shares.values()], colour)
        numbers[name] = shares
    return sheet.image(), numbers


EXAMPLE = Example(16, data, (WITHOUT_OLD, WITH_OLD), report, is_left_out)
