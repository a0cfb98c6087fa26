"""The examples' pictures: a table of images, with a row a model and its numbers at the right."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw

from fluxfast.data.lettering import Lettering
from fluxfast.train.loss_chart import running_mean

_MARGIN, _GAP, _CELL = 28, 8, 128
_NAMES, _NUMBERS = 150, 150
_LINES = 4
# the blue and the vermilion of Okabe and Ito's colours, which colour-blind people tell apart
BLUE, VERMILION = "#0072b2", "#d55e00"
INK, _GREY, _PAPER = "#1c1c24", "#5c5c66", "#ffffff"
_TITLE, _HEADING = Lettering(26, bold=True), Lettering(17, bold=True)
_TEXT, _NUMBER = Lettering(15), Lettering(34, bold=True)

Block = Callable[[Image.Image, ImageDraw.ImageDraw, int], None]


class Sheet:
    """A picture that grows downwards, row by row.

    columns: images in a row. numbers: what the numbers right of the rows say, in words.
    """

    def __init__(self, title: str, subtitle: str, columns: int, numbers: Sequence[str]) -> None:
        self._columns, self._number_titles = columns, numbers
        self._right = _MARGIN + _NAMES + columns * (_CELL + _GAP) + 2 * _GAP
        self._width = self._right + len(numbers) * _NUMBERS + _MARGIN - _GAP
        self._blocks: list[tuple[int, Block]] = []
        self._height = _MARGIN

        def draw_titles(sheet: Image.Image, draw: ImageDraw.ImageDraw, top: int) -> None:
            _TITLE.draw(draw, (_MARGIN, top - 6), title, INK)
            for line, words in enumerate(lines):
                y = top + _TITLE.line_height + line * _TEXT.line_height
                _TEXT.draw(draw, (_MARGIN, y), words, _GREY)

        lines = _TEXT.lines(subtitle, self._width - 2 * _MARGIN, _LINES)
        self._add(_TITLE.line_height + len(lines) * _TEXT.line_height + 2 * _GAP, draw_titles)

    def heading(self, text: str) -> None:
        """A line in bold above what follows."""
        self._add(
            _HEADING.line_height + 2 * _GAP,
            lambda sheet, draw, top: _HEADING.draw(draw, (_MARGIN, top + _GAP), text, INK),
        )

    def words(self, name: str, texts: Sequence[str], *, numbers: bool = False) -> None:
        """A row of texts, one a column; `numbers`: with the words of the numbers at its right."""
        cells = [_TEXT.lines(text, _CELL, _LINES) for text in texts]
        titles = [
            _TEXT.lines(text, _NUMBERS - 2 * _GAP, _LINES)
            for text in self._number_titles if numbers
        ]  # fmt: skip
        count = max(map(len, cells + titles), default=1)

        def draw_words(sheet: Image.Image, draw: ImageDraw.ImageDraw, top: int) -> None:
            starts = [self._left(column) for column in range(len(cells))]
            starts += [self._number_left(number) for number in range(len(titles))]
            for left, lines in zip(starts, cells + titles, strict=True):
                for line, words in enumerate(lines, count - len(lines)):
                    _TEXT.draw(draw, (left, top + line * _TEXT.line_height), words, _GREY)
            y = top + (count - 1) * _TEXT.line_height
            _TEXT.draw(draw, (_MARGIN, y), name, INK)

        self._add(count * _TEXT.line_height + _GAP, draw_words)

    def images(
        self,
        name: str,
        images: Sequence[Image.Image],
        numbers: Sequence[str] = (),
        colour: str = INK,
    ) -> None:
        """A row of images; `numbers` in `colour`, as many as the sheet's."""

        def draw_images(sheet: Image.Image, draw: ImageDraw.ImageDraw, top: int) -> None:
            lines = _TEXT.lines(name, _NAMES - 2 * _GAP, _LINES)
            y = top + _CELL / 2 - len(lines) * _TEXT.line_height / 2
            for line, words in enumerate(lines):
                _TEXT.draw(draw, (_MARGIN, y + line * _TEXT.line_height), words, INK)
            for column, image in enumerate(images[: self._columns]):
                resized = image.resize((_CELL, _CELL), Image.Resampling.LANCZOS)
                sheet.paste(resized.convert("RGB"), (self._left(column), top))
            for number, text in enumerate(numbers):
                at = self._number_left(number), top + (_CELL - _NUMBER.line_height) / 2
                _NUMBER.draw(draw, at, text, colour)

        self._add(_CELL + _GAP, draw_images)

    def curves(self, name: str, curves: Sequence[tuple[str, Sequence[float], str]]) -> None:
        """A chart of losses over steps: each curve's label, values and colour."""
        chart = _chart(curves, self._width - 2 * _MARGIN - _NAMES, 230)

        def draw_chart(sheet: Image.Image, draw: ImageDraw.ImageDraw, top: int) -> None:
            _TEXT.draw(draw, (_MARGIN, top + 2 * _GAP), name, INK)
            sheet.paste(chart, (_MARGIN + _NAMES, top))

        self._add(chart.height + _GAP, draw_chart)

    def image(self) -> Image.Image:
        """The picture, in a palette of 256 colours, which is a quarter of the bytes."""
        sheet = Image.new("RGB", (self._width, self._height + _MARGIN - _GAP), _PAPER)
        draw = ImageDraw.Draw(sheet)
        for top, block in self._blocks:
            block(sheet, draw, top)
        # the colours that cover most, moved to the means of what they stand for: a palette by the
        # median alone turns a small thing's colour into that of its surroundings
        return sheet.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1)

    def _add(self, height: int, block: Block) -> None:
        self._blocks.append((self._height, block))
        self._height += height

    def _left(self, column: int) -> int:
        return _MARGIN + _NAMES + column * (_CELL + _GAP)

    def _number_left(self, number: int) -> int:
        return self._right + number * _NUMBERS


def percent(share: float) -> str:
    return f"{share:.0%}"


def _chart(
    curves: Sequence[tuple[str, Sequence[float], str]], width: int, height: int
) -> Image.Image:
    # matplotlib takes a second to import, and few sheets have a chart
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 100, height / 100), dpi=100, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    for (label, losses, colour), line in zip(curves, ("-", "--"), strict=False):
        means = running_mean(losses, max(1, len(losses) // 10))
        steps = range(1, len(losses) + 1)
        axes.plot(steps, means, line, color=colour, linewidth=2, label=label)
    axes.set_xlabel("step", fontsize=11)
    axes.set_ylabel("loss, running mean", fontsize=11)
    axes.set_ylim(0)
    axes.legend(fontsize=11, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    canvas.draw()
    return Image.frombytes("RGBA", (width, height), bytes(canvas.buffer_rgba())).convert("RGB")
