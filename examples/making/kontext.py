"""Kontext: pairs of the same scene in which one thing has another colour, and what to do in words.

The base has never seen a reference. The LoRA learns to look at it, to do what the caption says, and
to leave everything else as it is.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from fluxfast.demo.tasks import shows_scene
from fluxfast.demo.toyworld import COLOURS, Scene, draw, scenes
from making.runs import Drawing, Run
from making.sheet import BLUE, INK, Sheet, percent
from making.studio import Example, Studio, difference

_TRAINED, _ASKED, _COLUMNS = 31, 132, 6
RUN = Run("after training")


class Edit(NamedTuple):
    """A scene before and after, and the words that ask for it."""

    before: Scene
    after: Scene
    instruction: str


def edits(seed: int, count: int) -> list[Edit]:
    """Scenes whose object gets another colour."""
    draws, found = random.Random(f"edits {seed}"), []
    for before in scenes(seed, count):
        colour = draws.choice([each for each in COLOURS if each != before.colour])
        found.append(Edit(before, before._replace(colour=colour), f"make it {colour}"))
    return found


def data(count: int) -> Iterator[Drawing]:
    for number, edit in enumerate(edits(_TRAINED, count)):
        name = f"{number:03}.png"
        yield Drawing(Path("images") / name, draw(edit.after), edit.instruction)
        yield Drawing(Path("references") / name, draw(edit.before))


def report(studio: Studio, count: int) -> tuple[Image.Image, dict[str, Any]]:
    asked = edits(_ASKED, count)
    instructions = [edit.instruction for edit in asked]
    references = [draw(edit.before) for edit in asked]
    answers = [draw(edit.after) for edit in asked]
    sheet = Sheet(
        "Kontext: change one thing, keep the rest",
        "A LoRA learns an edit from pairs of pictures. These references are none of them.",
        _COLUMNS,
        ("right thing, colour, place", "difference from the answer"),
    )
    sheet.images("reference", references)
    sheet.words("instruction", instructions[:_COLUMNS], numbers=True)
    numbers = {}
    for name, run, colour in (("before training", None, INK), (RUN.name, RUN, BLUE)):
        # nothing was trained without an instruction, which guidance would start from
        images = studio.draw(run, instructions, references, guidance_real=1.0)
        right = studio.measure(
            "checked", lambda pair: shows_scene(pair[0], pair[1].after),
            list(zip(images, asked, strict=True)),
        )  # fmt: skip
        off = studio.measure(
            "measured", lambda pair: difference(*pair), list(zip(images, answers, strict=True))
        )
        sheet.images(name, images, (percent(right), f"{off:.1%}"), colour)
        numbers[name] = {"right": right, "difference": off}
    sheet.images("the answer", answers)
    return sheet.image(), numbers


EXAMPLE = Example(400, data, (RUN,), report)
