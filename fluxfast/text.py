"""Names and texts as they come: not always UTF-8, and not always printable.

Python gives a file name that isn't UTF-8 as a string in which each odd byte is half of a character
(a "surrogate"). Such a string opens the file, but it can't be encoded, and so can't be printed,
hashed or stored as text. JSON may hold such halves too.
"""

import difflib
import os
import re
import sys
import textwrap
import unicodedata
from collections.abc import Iterable, Mapping

# categories of Unicode that break a line or move the cursor: controls, surrogates, line and
# paragraph separators
_UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")


def printable(text: object) -> str:
    r"""`text` in one line that any UTF-8 terminal can show.

    A newline becomes `\n`, a byte that is no UTF-8 becomes for example `\xfc`.
    """
    return "".join(_escaped(c) if unicodedata.category(c) in _UNPRINTABLE else c for c in str(text))


def duration(seconds: float) -> str:
    """A time as people say it, to about two digits: "40 s", "35 min", "1 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _escaped(character: str) -> str:
    if _is_byte(character):
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def _is_byte(character: str) -> bool:
    """Whether it stands for a byte of a file's name, as Python's "surrogateescape" writes it."""
    return "\udc80" <= character <= "\udcff"


def to_bytes(text: str) -> bytes:
    """UTF-8 for hashes and seeds: different texts give different bytes, whatever they hold."""
    return text.encode("utf-8", "surrogatepass")


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8, so holds no half of a character."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def text_problem(text: str, *, file_name: bool = False) -> str | None:
    """Why a config's string can't be a text, or with `file_name` a file's name; None if it can."""
    if "\0" in text:
        return "holds a zero character (\\u0000), which no text and no file's name can; remove it"
    try:
        os.fsencode(text) if file_name else text.encode()
    except UnicodeEncodeError as error:
        wrong = text[error.start]
        if _is_byte(wrong):
            return (
                f"holds a byte that is no UTF-8 ({_escaped(wrong)}); write the text in UTF-8, "
                "or rename the file"
            )
        if not is_text(wrong):
            return f"holds half of a character ({_escaped(wrong)}); write the whole one"
        encoding = sys.getfilesystemencoding()
        return (
            f"can be no file's name where these are {encoding} ({_escaped(wrong)}); set "
            "PYTHONUTF8=1 in the environment"
        )
    return None


def lines(text: str) -> list[str]:
    r"""The lines of a text, which end at `\n` or `\r\n` only.

    Other line breaks of Unicode belong to the text.
    """
    return text.replace("\r\n", "\n").split("\n")


def wrapped(text: str, width: int) -> str:
    """A text in lines of at most `width` columns, which end between words.

    Paths stay whole. Further lines of a paragraph stand as far to the right as its first words.
    """
    filled = []
    for line in lines(text):
        margin = re.match(r"[ ·]*(\d+\. )?", line)[0]  # type: ignore[index]
        filled += textwrap.wrap(
            line[len(margin) :],
            width,
            initial_indent=margin,
            subsequent_indent=" " * len(margin),
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]
    return "\n".join(filled)


def command_list(commands: Mapping[str, str], width: int = 80) -> str:
    """A program's commands with what each does, in lines of at most `width` columns."""
    margin = max(map(len, commands)) + 4
    return "\n".join(
        textwrap.fill(
            text,
            width,
            initial_indent=f"  {name}".ljust(margin),
            subsequent_indent=" " * margin,
            break_on_hyphens=False,
        )
        for name, text in commands.items()
    )


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that somebody who wrote `name` most likely meant; None where none is near."""
    written = {each.lower(): each for each in known}
    begins = [each for lower, each in written.items() if lower.startswith(name.lower())]
    near = begins or difflib.get_close_matches(name.lower(), written, n=1)
    return written[near[0].lower()] if name and near else None


def wrong_choice(what: str, got: object, known: Iterable[str]) -> str:
    """The message for a value that is none of the known names.

    It lists them, and says which one is near. `what` is the argument or option.
    """
    names = list(known)
    near = nearest(got, names) if isinstance(got, str) else None
    question = "" if near is None else f"; did you mean {near!r}?"
    return f"{what}: expected one of {', '.join(names)}; got {got!r}{question}"
