"""A demo's picture: training images, what was drawn before and after, scores and losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw

from fluxfast.data.lettering import Lettering
from fluxfast.demo.exam import Answers, Exam, Scores
from fluxfast.demo.tasks import OLD_SHOWN
from fluxfast.files import atomic_file
from fluxfast.train.loss_chart import running_mean

WIDTH = 1400
_MARGIN, GAP = 40, 8
# training images stand in a square of 4 x 4
_TRAINED, _ACROSS = 96, 4
_TRAINED_WIDTH = _ACROSS * (_TRAINED + GAP) - GAP
# what is right of them starts here
_RIGHT = _MARGIN + _TRAINED_WIDTH + 48
# the answers: a row a model, whose name stands left of it
_NAMES = 130
CELL = 160
# between the columns of what is new and those of what is old
_BETWEEN = 30
_PROMPT_LINES = 3
# the blue and the vermilion of Okabe and Ito's colours, which colour-blind people tell apart
BLUE, VERMILION = "#0072b2", "#d55e00"
_INK, _GREY, _EMPTY, _PAPER = "#1c1c24", "#5c5c66", "#eeeef1", "#ffffff"

_TITLE, _HEADING = Lettering(34, bold=True), Lettering(19, bold=True)
_TEXT, _NUMBER = Lettering(17), Lettering(54, bold=True)
_BADGE = Lettering(20, bold=True)


@dataclass(frozen=True)
class Contents:
    """What there is to show; what comes later in a run may be missing.

    Attributes:
        trained: the training images.
        subtitle: what the run was, in a line.
        base, lora: the answers of the base and of the base with the LoRA, at least those shown.
        scores: the base's, and the LoRA's.
        losses: by the number of the step.
    """

    trained: Sequence[Image.Image]
    subtitle: str
    base: Answers
    lora: Answers | None = None
    scores: tuple[Scores, Scores] | None = None
    losses: Mapping[int, float] = field(default_factory=dict)


def draw_picture(exam: Exam, contents: Contents, path: Path) -> None:
    """Write the picture, a PNG that is WIDTH pixels wide."""
    with atomic_file(path) as stream:
        picture(exam, contents).save(stream, format="PNG", optimize=True)


def picture(exam: Exam, contents: Contents) -> Image.Image:
    """The same as an image."""
    top = _MARGIN + _TITLE.line_height + _TEXT.line_height + 28
    answers = top + _HEADING.line_height + _TRAINED_WIDTH + 3 * GAP + 24
    rows = answers + _HEADING.line_height + _PROMPT_LINES * _TEXT.line_height + 3 * GAP
    sheet = Image.new("RGB", (WIDTH, rows + 2 * (CELL + GAP) + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    title = f"Taught from {len(contents.trained)} pictures: {exam.task.title}"
    _TITLE.draw(draw, (_MARGIN, _MARGIN - 6), title, _INK)
    _TEXT.draw(draw, (_MARGIN, _MARGIN + _TITLE.line_height), contents.subtitle, _GREY)
    _draw_trained(sheet, draw, contents.trained, top)
    _draw_scores(draw, exam, contents.scores, top)
    _draw_losses(sheet, draw, contents.losses, top)
    _draw_prompts(draw, exam, answers)
    for row, (name, given) in enumerate(
        ((("the base",), contents.base), (("the base", "with the LoRA"), contents.lora))
    ):
        y = rows + row * (CELL + GAP)
        for line, words in enumerate(name):
            at = y + CELL / 2 + (line - len(name) / 2) * _TEXT.line_height
            _TEXT.draw(draw, (_MARGIN, at), words, _INK)
        _draw_answers(sheet, draw, exam, given, y)
    return sheet


def column(exam: Exam, number: int) -> int:
    """Where the images of a shown question begin, in pixels from the left."""
    between = _BETWEEN if number >= exam.SHOWN[0] else 0
    return _MARGIN + _NAMES + number * (CELL + GAP) + between


def _draw_trained(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, images: Sequence[Image.Image], top: int
) -> None:
    _HEADING.draw(draw, (_MARGIN, top), "What it was trained on", _INK)
    first = top + _HEADING.line_height + GAP
    for number, image in enumerate(images[: _ACROSS**2]):
        row, across = divmod(number, _ACROSS)
        at = _MARGIN + across * (_TRAINED + GAP), first + row * (_TRAINED + GAP)
        sheet.paste(image.resize((_TRAINED, _TRAINED), Image.Resampling.LANCZOS), at)


def _draw_scores(
    draw: ImageDraw.ImageDraw, exam: Exam, scores: tuple[Scores, Scores] | None, top: int
) -> None:
    """Two numbers before and after, side by side."""
    half = (WIDTH - _MARGIN - _RIGHT) // 2
    kinds = (
        ("New captions", exam.task.shown, BLUE),
        ("Old captions", OLD_SHOWN, _INK),
    )
    for number, (heading, shown, colour) in enumerate(kinds):
        x = _RIGHT + number * half
        _HEADING.draw(draw, (x, top), heading, _INK)
        _TEXT.draw(draw, (x, top + _HEADING.line_height), shown, _GREY)
        y = top + _HEADING.line_height + _TEXT.line_height + 4
        if scores is None:
            _TEXT.draw(draw, (x, y + 20), "scored at the end of the run", _GREY)
            continue
        before, after = (percent(each[number]) for each in scores)
        arrow = f"{before} → "
        _NUMBER.draw(draw, (x, y), arrow, _GREY)
        _NUMBER.draw(draw, (x + _NUMBER.width(arrow), y), after, colour)


def percent(share: float) -> str:
    return f"{share:.0%}"


def _draw_losses(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, losses: Mapping[int, float], top: int
) -> None:
    y = top + _HEADING.line_height + _TEXT.line_height + _NUMBER.line_height + 28
    bottom = top + _HEADING.line_height + GAP + _TRAINED_WIDTH
    _HEADING.draw(draw, (_RIGHT, y), "Loss", _INK)
    y += _HEADING.line_height
    if losses:
        sheet.paste(_chart(losses, WIDTH - _MARGIN - _RIGHT, bottom - y), (_RIGHT, y))
    else:
        _TEXT.draw(draw, (_RIGHT, y), "drawn at the end of the run", _GREY)


def _chart(losses: Mapping[int, float], width: int, height: int) -> Image.Image:
    """The losses of steps, and their running mean."""
    # matplotlib's charts take a second to import, and the first picture has none
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dpi, points = 100, 72 / 100
    figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    steps, values, window = list(losses), list(losses.values()), max(1, len(losses) // 10)
    axes.plot(steps, values, ".", color="0.75", markersize=5, label="each step")
    axes.plot(
        steps, running_mean(values, window), color=BLUE, linewidth=2.5,
        label=f"mean of {window} steps",
    )  # fmt: skip
    size = 16 * points
    axes.set_xlabel("step", fontsize=size)
    axes.set_ylabel("flow-matching loss", fontsize=size)
    axes.tick_params(labelsize=size * 0.9)
    axes.set_ylim(0, sorted(values)[int(0.98 * (len(values) - 1))] * 1.2 or 1)
    axes.legend(fontsize=size, frameon=False, loc="upper right", ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    canvas.draw()
    return Image.frombytes("RGBA", (width, height), bytes(canvas.buffer_rgba())).convert("RGB")


def _draw_prompts(draw: ImageDraw.ImageDraw, exam: Exam, top: int) -> None:
    new, _ = exam.SHOWN
    for first, heading in (
        (0, "Asked for what is new, in scenes that it was not trained on"),
        (new, "Asked for what it knew"),
    ):
        _HEADING.draw(draw, (column(exam, first), top), heading, _INK)
    y = top + _HEADING.line_height + GAP
    for number, question in enumerate(exam.questions[: exam.shown]):
        lines = _TEXT.lines(question.prompt, CELL, _PROMPT_LINES)
        for line, words in enumerate(lines, _PROMPT_LINES - len(lines)):
            _TEXT.draw(draw, (column(exam, number), y + line * _TEXT.line_height), words, _GREY)


def _draw_answers(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, exam: Exam, answers: Answers | None, top: int
) -> None:
    for number in range(exam.shown):
        x = column(exam, number)
        if answers is None:
            draw.rectangle((x, top, x + CELL - 1, top + CELL - 1), _EMPTY)
            continue
        sheet.paste(answers.images[number].resize((CELL, CELL), Image.Resampling.LANCZOS), (x, top))
        if number < len(answers.right):
            _draw_badge(draw, (x + CELL - 30, top + CELL - 30), answers.right[number])


def _draw_badge(draw: ImageDraw.ImageDraw, at: tuple[int, int], is_right: bool) -> None:
    """A tick or a cross on a disc, which says what the checker thinks of an image."""
    x, y = at
    draw.ellipse((x, y, x + 25, y + 25), BLUE if is_right else VERMILION, _PAPER, 2)
    sign = "✓" if is_right else "✗"
    _BADGE.draw(draw, (x + 13 - _BADGE.width(sign) / 2, y), sign, _PAPER)
