"""Writing text of any script on an image: measured, broken into lines, and cut where it must be.

DejaVu Sans, which comes with matplotlib, has the alphabets of Europe and the Near East. What it
lacks is looked for in the fonts of this machine.
"""

import functools
import unicodedata
from itertools import groupby
from pathlib import Path

import matplotlib
from matplotlib.font_manager import findSystemFonts
from matplotlib.ft2font import FT2Font
from PIL import ImageDraw, ImageFont

# what stands for a character that no font has
BOX = "□"
_ELLIPSIS = "…"
# marks that change the character before them, and controls: nothing is lost where a font lacks them
_INVISIBLE = ("Cf", "Mn", "Me")


class Lettering:
    """A size of text. `lacking` collects the characters that no font has."""

    def __init__(self, size: int, *, bold: bool = False) -> None:
        self.size = size
        self.line_height = round(size * 1.3)
        self.lacking: set[str] = set()
        name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
        self._own = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name)

    def width(self, text: str) -> float:
        """The width of a line in pixels."""
        return sum(_font(path, self.size).getlength(part) for path, part in self._runs(text))

    def draw(
        self, draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, fill: str
    ) -> None:
        """Write a line; `at` is its left end, and the top of its letters' room."""
        x, y = at
        for path, part in self._runs(text):
            font = _font(path, self.size)
            # letters of all fonts stand on one line
            draw.text((x, y + self.size), part, fill=fill, font=font, anchor="ls")
            x += font.getlength(part)

    def lines(self, text: str, width: int, count: int) -> list[str]:
        """`text` in at most so many lines of at most `width`; an ellipsis ends what is cut."""
        found: list[str] = []
        line = ""
        if not text.strip():
            return found
        # no character is narrower than a pixel, so what is behind these can't have a place
        pieces = self._pieces(" ".join(text.split())[: count * width], width)
        for i, piece in enumerate(pieces):
            if not line or self.width((line + piece).rstrip()) <= width:
                line += piece
                continue
            if len(found) == count - 1:
                return [*found, self._cut(line + "".join(pieces[i:]), width)]
            found.append(line.rstrip())
            line = piece
        return [*found, line.rstrip()] if line else found

    def shortened(self, text: str, width: int) -> str:
        """A name in one line, with its middle left out if it is too long."""
        if self.width(text) <= width:
            return text
        kept = len(text) - 1
        while kept > 2 and self.width(_without_middle(text, kept)) > width:
            kept -= 1
        return _without_middle(text, kept)

    def _pieces(self, text: str, width: int) -> list[str]:
        """Words with the space behind them; what is wider than a line is cut into characters."""
        words = [word + " " for word in text.split(" ")]
        return [
            piece
            for word in words
            for piece in ([word] if self.width(word.rstrip()) <= width else word)
        ]

    def _cut(self, line: str, width: int) -> str:
        line = line[: 4 * width].rstrip()
        while line and self.width(line + _ELLIPSIS) > width:
            line = line[:-1].rstrip()
        return line + _ELLIPSIS

    def _runs(self, text: str) -> list[tuple[str, str]]:
        """`text` in parts that one font can write: (the font's file, part)."""
        chosen: list[tuple[str, str]] = []
        for character in text:
            path = self._own if ord(character) in _characters(self._own) else None
            if path is None or character == " ":
                # a space belongs to the word before it
                path = chosen[-1][0] if character == " " and chosen else path
            if path is None:
                path = font_with(character, self.size)
            if path is None:
                if unicodedata.category(character) in _INVISIBLE:
                    continue
                self.lacking.add(character)
                path, character = self._own, BOX
            chosen.append((path, character))
        return [
            (path, "".join(character for _, character in run))
            for path, run in groupby(chosen, key=lambda each: each[0])
        ]


@functools.cache
def font_with(character: str, size: int) -> str | None:
    """The first of this machine's fonts that has the character, and can be drawn in this size."""
    return next(
        (
            path
            for path in _system_fonts()
            if ord(character) in _characters(path) and _can_draw(path, size)
        ),
        None,
    )


@functools.cache
def _system_fonts() -> list[str]:
    return sorted(findSystemFonts())


@functools.cache
def _characters(path: str) -> frozenset[int]:
    try:
        return frozenset(FT2Font(path).get_charmap())
    # what FreeType says of files that are damaged, or no fonts
    except (OSError, RuntimeError):
        return frozenset()


@functools.cache
def _can_draw(path: str, size: int) -> bool:
    try:
        _font(path, size)
    # fonts of coloured images have sizes of their own
    except OSError:
        return False
    return True


@functools.cache
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def _without_middle(text: str, kept: int) -> str:
    end = kept // 2
    return text[: kept - end] + _ELLIPSIS + text[len(text) - end :]
