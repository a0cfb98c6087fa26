"""One word for 8-bit floats wherever people write and read it: fp8.

In the code, codes and products are `e4m3`, after their bits, and the storage format is `fp8_e4m3`.
Both are read as `fp8` is, since earlier versions asked for them.
"""

import re

_NAMES = re.compile(r"\b(?:fp8_)?e4m3\b")
COMPUTE_WORDS = ("same", "int8", "fp8")


def in_words(text: str) -> str:
    """A text or name for people, which says fp8 of each of the code's names for it."""
    return _NAMES.sub("fp8", text)


def compute_named(word: str) -> str:
    """What `compute` is in the code, of a word that somebody has written."""
    return "e4m3" if in_words(word) == "fp8" else word


def format_named(word: str) -> str:
    """The key of `quant.FORMATS`, of a word that somebody has written."""
    return "fp8_e4m3" if in_words(word) == "fp8" else word
