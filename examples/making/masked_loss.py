"""Masked loss: sixteen pictures of a creature, cut out and put on the same pink paper.

Trained on all of each picture, the paper is learnt with the creature, and comes wherever the
creature is asked for. With masks the loss counts only on the creature and close around it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageFilter

from fluxfast.demo.tasks import TASKS, regularisation_scenes
from fluxfast.demo.toy_checker import check
from fluxfast.demo.toy_objects import SUBJECT
from fluxfast.demo.toyworld import COLOURS, Scene, draw, outline
from making.runs import WITHOUT, Drawing, Run
from making.sheet import BLUE, VERMILION, Sheet, percent
from making.studio import Example, Studio

_COLUMNS = 6
# pixels around the creature that are cut out with it
_MARGIN = 10
WITHOUT_MASKS = Run(
    "without masks", (f"--data_backend_config={WITHOUT}",), Path("output-without-masks")
)
WITH_MASKS = Run("with masks")


def trained_scenes(count: int) -> list[Scene]:
    return TASKS["subject"].training_scenes()[:count]


def mask(scene: Scene) -> Image.Image:
    """White where the loss counts: the creature, and a little around it."""
    return outline(scene).filter(ImageFilter.MaxFilter(2 * _MARGIN + 1))


def on_paper(scene: Scene) -> Image.Image:
    picture = draw(scene)
    return Image.composite(picture, Image.new("RGB", picture.size, COLOURS["pink"]), mask(scene))


def data(count: int) -> Iterator[Drawing]:
    for number, scene in enumerate(trained_scenes(count)):
        name = f"{number:03}.png"
        yield Drawing(Path("images") / name, on_paper(scene), scene.caption)
        yield Drawing(Path("masks") / name, mask(scene))
    # what nothing is said of in training must be held by something
    for number, scene in enumerate(regularisation_scenes()[: 16 * count]):
        yield Drawing(Path("old") / f"{number:03}.png", draw(scene), scene.caption)


def is_left_out(entry: Mapping[str, Any]) -> bool:
    """Whether the run without masks goes without a dataset."""
    return entry.get("conditioning_type") == "mask"


def report(studio: Studio, count: int) -> tuple[Image.Image, dict[str, Any]]:
    asked = TASKS["subject"].asked_scenes(count)
    prompts, trained = [scene.caption for scene in asked], trained_scenes(_COLUMNS)
    sheet = Sheet(
        "Masked loss: learn the creature, not what is behind it",
        f'A LoRA is taught the word "{SUBJECT}" from cut-outs on pink paper.',
        _COLUMNS,
        ("right creature", "place asked for"),
    )
    sheet.images("trained on", [on_paper(scene) for scene in trained])
    sheet.images("and their masks", [mask(scene) for scene in trained])
    sheet.heading("The same questions, the same noise")
    sheet.words("asked for", prompts[:_COLUMNS], numbers=True)
    numbers = {}
    for run, colour in ((WITHOUT_MASKS, VERMILION), (WITH_MASKS, BLUE)):
        images = studio.draw(run, prompts)
        seen = studio.each("checked", check, images)
        shares = {
            "creature": sum(each.object == SUBJECT for each in seen) / count,
            "place": sum(s.place == a.place for s, a in zip(seen, asked, strict=True)) / count,
        }
        sheet.images(run.name, images, [percent(share) for share in shares.values()], colour)
        numbers[run.name] = shares
    return sheet.image(), numbers


EXAMPLE = Example(16, data, (WITHOUT_MASKS, WITH_MASKS), report, is_left_out)
