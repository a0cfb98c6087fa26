"""The validation images of a run side by side: a row a prompt, a column a step."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from fluxfast.data.lettering import Lettering
from fluxfast.files import atomic_file

# pixels of a cell's longer edge, and of the space around it
CELL, GAP = 256, 8
# columns at most; of more steps, as many are taken evenly, with the first and the last
COLUMNS = 8


class Row(NamedTuple):
    """A series of images: those of one prompt, index and size.

    title: what stands above it.
    size: (width, height) of an image, without what stands beside it in its file.
    files: the images' files by step; 0 is the base model's.
    is_left: whether the image is at the left of a step's file, and not at its right.
    """

    title: str
    size: tuple[int, int]
    files: Mapping[int, Path]
    is_left: Callable[[int], bool]

    @property
    def cell(self) -> tuple[int, int]:
        """(width, height) of the image in the grid."""
        scale = min(1.0, CELL / max(self.size))
        return max(1, round(self.size[0] * scale)), max(1, round(self.size[1] * scale))


def steps_in(folder: Path) -> list[int]:
    """The steps that a folder of validation images has images of, in order."""
    found = {
        int(match[1])
        for path in folder.glob("step_*")
        if (match := re.match(r"step_(\d+)_", path.name))
    }
    return sorted(found)


def draw_grid(rows: Sequence[Row], steps: Sequence[int], path: Path) -> Path:
    """Write the grid of some series at some steps; a cell without a file stays empty."""
    columns = evenly(steps, COLUMNS)
    heading, label = Lettering(14, bold=True), Lettering(12)
    line = heading.line_height + GAP
    width = GAP + len(columns) * (CELL + GAP)
    height = line + sum(line + row.cell[1] + GAP for row in rows)
    sheet = Image.new("RGB", (width, height), "white")
    letters, y = ImageDraw.Draw(sheet), line
    for column, step in enumerate(columns):
        text = "base model" if step == 0 else f"step {step}"
        heading.draw(letters, (GAP + column * (CELL + GAP), GAP), text, "black")
    for row in rows:
        label.draw(letters, (GAP, y + GAP), label.shortened(row.title, width - 2 * GAP), "black")
        y += line
        for column, step in enumerate(columns):
            if step in row.files and row.files[step].exists():
                sheet.paste(_image_alone(row, step), (GAP + column * (CELL + GAP), y))
        y += row.cell[1] + GAP
    with atomic_file(path) as stream:
        sheet.save(stream, format="PNG")
    return path


def _image_alone(row: Row, step: int) -> Image.Image:
    """A step's image without the base's and the references beside it, in the cell's size."""
    with Image.open(row.files[step]) as image:
        width, height = min(row.size[0], image.width), image.height
        left = 0 if row.is_left(step) else image.width - width
        cut = image.convert("RGB").crop((left, 0, left + width, height))
    return cut.resize(row.cell, Image.Resampling.LANCZOS)


def evenly(steps: Sequence[int], number: int) -> list[int]:
    """At most so many of the steps, the first and the last among them."""
    if len(steps) <= number:
        return list(steps)
    last = len(steps) - 1
    return [steps[round(i * last / (number - 1))] for i in range(number)]
