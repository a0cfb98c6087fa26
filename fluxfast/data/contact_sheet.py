"""The contact sheet of a dataset: its images in one picture, with what each step will see of them.

Images are grouped by bucket. Each is shown whole, dark where the crop leaves it out, and what its
conditioning datasets hold for it stands beside it.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path

from PIL import Image, ImageDraw, ImageEnhance

from fluxfast.data.buckets import CropPlan
from fluxfast.data.images import UnreadableImage, load_image
from fluxfast.data.lettering import Lettering
from fluxfast.data.pairs import Pairing, loss_weight, mask_weights
from fluxfast.data.scan import Candidate
from fluxfast.files import atomic_file
from fluxfast.text import printable

COLUMNS, CELL, GAP, MARGIN = 6, 200, 18, 24
CAPTION_LINES = 3
# how bright the part of an image stays that a crop leaves out
OUTSIDE = 0.3
PAPER, INK, FAINT, FRAME, WRONG = "#ffffff", "#1a1a1a", "#6b6b6b", "#ff7a00", "#c00000"
# over what a mask keeps out of the loss, and how much of the image it covers there
TINT, TINTED = "#2000c0", 0.75
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
    """A place on the sheet: its picture and that one's size, and the lines under it, coloured."""

    picture: Callable[[], Image.Image]
    size: tuple[int, int]
    lines: list[tuple[str, str]]


def write_sheet(
    path: Path,
    title: str,
    candidates: Sequence[Candidate],
    *,
    images: int,
    pairings: Sequence[Pairing] = (),
) -> int:
    """Draw at most `images` of a dataset's images, and write them as a PNG; returns how many.

    Each bucket has its share, and shows images from all over the folder. Each of `pairings` adds a
    place beside each image for its partner.
    """
    chosen = choose(candidates, images)
    styles = _Styles(Lettering(20, bold=True), Lettering(15, bold=True), Lettering(12))
    shown = sum(map(len, chosen.values()))
    more = " (--images N shows more)" if shown < len(candidates) else ""
    note = f"{shown} of {len(candidates)} images{more}; crops leave out what is dark"
    if any(pairing.config.is_mask for pairing in pairings):
        note += ", masks what is blue"
    counts: dict[tuple[int, int], int] = defaultdict(int)
    for candidate in candidates:
        counts[candidate.crop_plan.target] += 1
    groups = [
        (
            _heading(group, counts[target]),
            [cell for image in group for cell in _cells(image, pairings, styles.text)],
        )
        for target, group in chosen.items()
    ]
    # an image and its partners stay in one row
    together = 1 + len(pairings)
    sheet = _draw(title, note, groups, styles, max(1, COLUMNS // together) * together)
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


def crop_shown(
    img: Image.Image,
    plan: CropPlan,
    size: tuple[int, int],
    weights: Image.Image | None = None,
) -> Image.Image:
    """An upright image in `size`, dark outside the crop, and the crop in a frame.

    weights: a greyscale image of the crop's loss weights; what is black in it is tinted.
    """
    small = img.resize(size, Image.Resampling.LANCZOS)
    across, down = size[0] / plan.intermediary[0], size[1] / plan.intermediary[1]
    x, y, right, bottom = plan.crop_box
    # a pixel of it stays, however small the crop is beside the image
    left, top = min(round(x * across), size[0] - 1), min(round(y * down), size[1] - 1)
    box = (left, top, max(round(right * across), left + 1), max(round(bottom * down), top + 1))
    shown = ImageEnhance.Brightness(small).enhance(OUTSIDE)
    inside = small.crop(box)
    if weights is not None:
        tinted = Image.blend(inside, Image.new("RGB", inside.size, TINT), TINTED)
        mask = weights.resize(inside.size, Image.Resampling.NEAREST)
        inside = Image.composite(inside, tinted, mask)
    shown.paste(inside, box)
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


def _cells(image: Candidate, pairings: Sequence[Pairing], text: Lettering) -> Iterator[_Cell]:
    """An image's place, and one for its partner in each conditioning dataset."""
    size = fitted(image.size)
    yield _Cell(partial(_picture, image, size), size, _lines(image, text))
    for pairing in pairings:
        yield _partner_cell(image, pairing, text)


def _partner_cell(image: Candidate, pairing: Pairing, text: Lettering) -> _Cell:
    kind = pairing.config.conditioning_type
    head = (text.shortened(f"{kind}, {printable(pairing.config.id)}", CELL), INK)
    size = fitted(image.size)
    if pairing.fits(image):
        partner = pairing.of(image)
        if not pairing.config.copies_crops:
            size = fitted(partner.size)
        picture = (
            partial(_weighed_picture, image, partner, kind, size)
            if pairing.config.is_mask
            else partial(_picture, partner, size)
        )
        return _Cell(picture, size, [head, *_lines(partner, text)])
    if image.file in pairing.unfit:
        # it can't be cut as its image, so it is shown with a crop of its own
        partner = pairing.partners[image.file]
        size = fitted(partner.size)
        wrong = ("another shape than the image", WRONG)
        return _Cell(partial(_picture, partner, size), size, [head, wrong, *_lines(partner, text)])
    reason = text.lines(pairing.missing[image.file], CELL, CAPTION_LINES)
    lines = [head, ("missing", WRONG), *((line, WRONG) for line in reason)]
    return _Cell(partial(_empty, size), size, lines)


def _lines(candidate: Candidate, text: Lettering) -> list[tuple[str, str]]:
    """What stands under a picture: file, sizes, and the first caption, if it has any."""
    count = len(candidate.captions)
    captions = f", {count} captions" if count > 1 else ""
    size, target = ("{}x{}".format(*each) for each in (candidate.size, candidate.crop_plan.target))
    lines = [
        (text.shortened(printable(candidate.file), CELL), FAINT),
        (f"{size} → {target}{captions}", FAINT),
    ]
    for caption in candidate.captions[:1]:
        lines += [(line, INK) for line in text.lines(printable(caption), CELL, CAPTION_LINES)]
    return lines


def _draw(
    title: str,
    note: str,
    groups: Sequence[tuple[str, Sequence[_Cell]]],
    styles: _Styles,
    columns: int,
) -> Image.Image:
    rows = [[cells[i : i + columns] for i in range(0, len(cells), columns)] for _, cells in groups]
    width = 2 * MARGIN + columns * CELL + (columns - 1) * GAP
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
            pictures = list(pool.map(lambda cell: cell.picture(), cells))
            styles.heading.draw(pen, (MARGIN, y), name, INK)
            y += heading
            for number, row in enumerate(group_rows):
                shown = pictures[number * columns : (number + 1) * columns]
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


def _picture(candidate: Candidate, size: tuple[int, int]) -> Image.Image:
    try:
        img = load_image(candidate.path, at_least=CELL)
    except UnreadableImage:
        # removed or rewritten since it was looked at
        return Image.new("RGB", size, FAINT)
    return crop_shown(img, candidate.crop_plan, size)


def _weighed_picture(
    image: Candidate, mask: Candidate, kind: str, size: tuple[int, int]
) -> Image.Image:
    """An image under its mask, as the loss of a step weighs the latents of the crop."""
    try:
        weights = loss_weight(mask_weights(mask), kind)[0]
        img = load_image(image.path, at_least=CELL)
    except UnreadableImage:
        return Image.new("RGB", size, FAINT)
    levels = Image.fromarray((weights * 255).round().byte().numpy())
    return crop_shown(img, image.crop_plan, size, levels)


def _empty(size: tuple[int, int]) -> Image.Image:
    """The place of a partner that is missing."""
    place = Image.new("RGB", size, PAPER)
    ImageDraw.Draw(place).rectangle((0, 0, size[0] - 1, size[1] - 1), outline=WRONG)
    return place
