"""The validation images of a run side by side: a row a prompt, a column a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from fluxfast.data.lettering import Lettering
from fluxfast.files import atomic_file
from fluxfast.train.image_files import DrawnImage

# pixels of a cell's longer edge, and of the space around it
CELL, GAP = 256, 8
# pixels above images side by side, where their labels stand
LABELS = 26
# columns at most; of more steps, as many are taken evenly, with the first and the last
COLUMNS = 8


class Row(NamedTuple):
    """A series of images: those of one prompt, index and size.

    title: what stands above it. size: (width, height) of each image. images: by step; 0 is the base
    model's.
    """

    title: str
    size: tuple[int, int]
    images: Mapping[int, DrawnImage]

    @property
    def cell(self) -> tuple[int, int]:
        """(width, height) of the image in the grid."""
        scale = min(1.0, CELL / max(self.size))
        return max(1, round(self.size[0] * scale)), max(1, round(self.size[1] * scale))


def draw_grid(rows: Sequence[Row], steps: Sequence[int], path: Path) -> Path:
    """Write the grid of some series at some steps; a cell without an image stays empty."""
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
            if step in row.images:
                cell = row.images[step].open().resize(row.cell, Image.Resampling.LANCZOS)
                sheet.paste(cell, (GAP + column * (CELL + GAP), y))
        y += row.cell[1] + GAP
    with atomic_file(path) as stream:
        sheet.save(stream, format="PNG")
    return path


def side_by_side(images: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """(label, image) of one height in a row, each with its label above it."""
    heading = Lettering(14, bold=True)
    width, height = sum(image.width for _, image in images), images[0][1].height
    sheet = Image.new("RGB", (width, LABELS + height), "white")
    letters, x = ImageDraw.Draw(sheet), 0
    for label, image in images:
        told = heading.shortened(label, image.width - GAP)
        heading.draw(letters, (x + GAP / 2, (LABELS - heading.line_height) / 2), told, "black")
        sheet.paste(image, (x, LABELS))
        x += image.width
    return sheet


def evenly(steps: Sequence[int], number: int) -> list[int]:
    """At most so many of the steps, the first and the last among them."""
    if len(steps) <= number:
        return list(steps)
    last = len(steps) - 1
    return [steps[round(i * last / (number - 1))] for i in range(number)]
