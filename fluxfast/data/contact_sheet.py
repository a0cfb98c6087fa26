"""The contact sheet of a dataset: its images in one picture, with what each step will see of them.

Images are grouped by bucket. Each is shown whole, dark where the crop leaves it out.
"""

from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from PIL import Image, ImageDraw, ImageEnhance

from fluxfast.data.buckets import CropPlan
from fluxfast.data.images import UnreadableImage, load_image
from fluxfast.data.lettering import Lettering
from fluxfast.data.scan import Candidate
from fluxfast.files import atomic_file
from fluxfast.text import printable

COLUMNS, CELL, GAP, MARGIN = 6, 200, 18, 24
CAPTION_LINES = 3
# how bright the part of an image stays that a crop leaves out
OUTSIDE = 0.3
PAPER, INK, FAINT, FRAME = "#ffffff", "#1a1a1a", "#6b6b6b", "#ff7a00"
_THREADS = 4


@dataclass(frozen=True)
class _Styles:
    title: Lettering
    heading: Lettering
    text: Lettering

    @property
    def lacking(self) -> set[str]:
        return self.title.lacking | self.heading.lacking | self.text.lacking


@dataclass(frozen=True)
class _Cell:
    """A place on the sheet: an image, and the lines under it with their colours."""

    candidate: Candidate
    size: tuple[int, int]
    lines: list[tuple[str, str]]


def write_sheet(path: Path, title: str, candidates: Sequence[Candidate], *, images: int) -> int:
    """Draw at most `images` of a dataset's images, and write them as a PNG; returns how many.

    Each bucket has its share, and shows images from all over the folder.
    """
    chosen = choose(candidates, images)
    styles = _Styles(Lettering(20, bold=True), Lettering(15, bold=True), Lettering(12))
    shown = sum(map(len, chosen.values()))
    more = " (--images N shows more)" if shown < len(candidates) else ""
    note = f"{shown} of {len(candidates)} images{more}; crops leave out what is dark"
    counts: dict[tuple[int, int], int] = defaultdict(int)
    for candidate in candidates:
        counts[candidate.crop_plan.target] += 1
    groups = [
        (_heading(group, counts[target]), [_cell(candidate, styles.text) for candidate in group])
        for target, group in chosen.items()
    ]
    sheet = _draw(title, note, groups, styles)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        sheet.save(file, "PNG")
    return shown


def choose(candidates: Sequence[Candidate], images: int) -> dict[tuple[int, int], list[Candidate]]:
    """At most `images` candidates by their target size, from the narrowest to the widest.

    The sizes take turns, so that each has one before any has two, as far as they go.
    """
    by_size: dict[tuple[int, int], list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        by_size[candidate.crop_plan.target].append(candidate)
    turns = zip_longest(
        *([size] * len(group) for size, group in sorted(by_size.items())), fillvalue=None
    )
    places = [size for turn in turns for size in turn if size is not None][:images]
    return {
        size: [group[i * len(group) // share] for i in range(share)]
        for size, group in sorted(by_size.items())
        if (share := places.count(size))
    }


def crop_shown(img: Image.Image, plan: CropPlan, size: tuple[int, int]) -> Image.Image:
    """An upright image in `size`, dark outside the crop, and the crop in a frame."""
    small = img.resize(size, Image.Resampling.LANCZOS)
    across, down = size[0] / plan.intermediary[0], size[1] / plan.intermediary[1]
    x, y, right, bottom = plan.crop_box
    # a pixel of it stays, however small the crop is beside the image
    left, top = min(round(x * across), size[0] - 1), min(round(y * down), size[1] - 1)
    box = (left, top, max(round(right * across), left + 1), max(round(bottom * down), top + 1))
    shown = ImageEnhance.Brightness(small).enhance(OUTSIDE)
    shown.paste(small.crop(box), box)
    ImageDraw.Draw(shown).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=FRAME)
    return shown


def fitted(size: tuple[int, int]) -> tuple[int, int]:
    """The size of an image in its cell, in its own proportions."""
    scale = CELL / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _heading(group: Sequence[Candidate], count: int) -> str:
    plan = group[0].crop_plan
    width, height = plan.target
    number = f"{count} image" + ("s" if count > 1 else "")
    shown = f", {len(group)} shown" if len(group) < count else ""
    return f"{width}x{height}, aspect {plan.bucket}: {number}{shown}"


def _cell(candidate: Candidate, text: Lettering) -> _Cell:
    count = len(candidate.captions)
    captions = f", {count} captions" if count > 1 else ""
    size, target = ("{}x{}".format(*each) for each in (candidate.size, candidate.crop_plan.target))
    lines = [
        (text.shortened(printable(candidate.file), CELL), FAINT),
        (f"{size} → {target}{captions}", FAINT),
        *(
            (line, INK)
            for line in text.lines(printable(candidate.captions[0]), CELL, CAPTION_LINES)
        ),
    ]
    return _Cell(candidate, fitted(candidate.size), lines)


def _draw(
    title: str, note: str, groups: Sequence[tuple[str, Sequence[_Cell]]], styles: _Styles
) -> Image.Image:
    rows = [[cells[i : i + COLUMNS] for i in range(0, len(cells), COLUMNS)] for _, cells in groups]
    width = 2 * MARGIN + COLUMNS * CELL + (COLUMNS - 1) * GAP
    head = MARGIN + styles.title.line_height + styles.text.line_height + GAP
    heading = styles.heading.line_height + GAP // 2
    below = sum(heading + sum(_row_height(row, styles.text) for row in each) for each in rows)
    foot = styles.text.line_height
    sheet = Image.new("RGB", (width, head + below + foot + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    inner = width - 2 * MARGIN
    styles.title.draw(pen, (MARGIN, MARGIN), styles.title.shortened(printable(title), inner), INK)
    styles.text.draw(pen, (MARGIN, MARGIN + styles.title.line_height), note, FAINT)
    y = head
    with ThreadPoolExecutor(_THREADS) as pool:
        for (name, cells), group_rows in zip(groups, rows, strict=True):
            pictures = list(pool.map(_picture, cells))
            styles.heading.draw(pen, (MARGIN, y), name, INK)
            y += heading
            for number, row in enumerate(group_rows):
                shown = pictures[number * COLUMNS : (number + 1) * COLUMNS]
                _draw_row(sheet, y, row, shown, styles.text)
                y += _row_height(row, styles.text)
    if styles.lacking:
        lacking = f"□: no font of this machine has these {len(styles.lacking)} characters"
        styles.text.draw(pen, (MARGIN, y), lacking, FAINT)
    return sheet


def _row_height(row: Sequence[_Cell], text: Lettering) -> int:
    lines = max(len(cell.lines) for cell in row)
    return _picture_height(row) + lines * text.line_height + 6 + GAP


def _picture_height(row: Sequence[_Cell]) -> int:
    return max(cell.size[1] for cell in row)


def _draw_row(
    sheet: Image.Image,
    y: int,
    row: Sequence[_Cell],
    pictures: Sequence[Image.Image],
    text: Lettering,
) -> None:
    pen = ImageDraw.Draw(sheet)
    under = y + _picture_height(row) + 6
    for column, (cell, picture) in enumerate(zip(row, pictures, strict=True)):
        x = MARGIN + column * (CELL + GAP)
        # pictures stand on one line, above their texts
        sheet.paste(picture, (x, y + _picture_height(row) - cell.size[1]))
        for number, (line, colour) in enumerate(cell.lines):
            text.draw(pen, (x, under + number * text.line_height), line, colour)


def _picture(cell: _Cell) -> Image.Image:
    try:
        img = load_image(cell.candidate.path, at_least=CELL)
    except UnreadableImage:
        # removed or rewritten since it was looked at
        return Image.new("RGB", cell.size, FAINT)
    return crop_shown(img, cell.candidate.crop_plan, cell.size)
