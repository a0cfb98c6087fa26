"""An image's captions: its file's name, a text file beside it, a table, or one prompt for all."""

import random
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Literal

from fluxfast.config.caption_filter import CaptionFilter
from fluxfast.config.caption_shuffle import CaptionVariants
from fluxfast.data.images import SkippedImage
from fluxfast.text import is_text, lines

CaptionStrategy = Literal[
    "filename", "textfile", "instanceprompt", "instance_prompt", "parquet", "csv", "huggingface"
]
_FROM_TABLES = ("parquet", "csv", "huggingface")


class NoCaption(SkippedImage):
    """An image without a usable caption."""


def captions(
    path: str | Path,
    *,
    strategy: CaptionStrategy = "filename",
    instance_prompt: str | None = None,
    prepend_instance_prompt: bool = False,
    only_instance_prompt: bool = False,
    disable_multiline_split: bool = False,
    caption_filter: CaptionFilter | None = None,
    variants: CaptionVariants | None = None,
    given: Sequence[str] | None = None,
) -> list[str]:
    """The captions of the image at `path`, at least one; `pick` chooses one for a step.

    strategy: `filename` takes the file's stem with spaces for underscores. `textfile` takes the
    file of the same stem ending in .txt, where each line that isn't blank is one caption (with
    `disable_multiline_split` the whole text is one; only newlines end a line, as in SimpleTuner).
    `instanceprompt` takes `instance_prompt`. `parquet`, `csv` and `huggingface` take `given`, which
    the image's row in a table holds. `only_instance_prompt` replaces the captions by
    `instance_prompt`, `prepend_instance_prompt` puts it in front of them. `caption_filter` edits
    what the file's name or text says, before that. `variants` (`config.caption_shuffle`) then adds
    the orders of its tags to each caption, which is `instance_prompt` where that replaces it.

    Raises NoCaption if the text file is missing, empty or not UTF-8, if the table has no caption
    for the image, if the name that should be the caption is not UTF-8, or if the filter left
    nothing. Raises ValueError if `instance_prompt` is needed and not given.
    """
    path = Path(path)
    needed_by = (
        "caption_strategy instanceprompt"
        if strategy in ("instanceprompt", "instance_prompt")
        else None
    )
    needed_by = "only_instance_prompt" if only_instance_prompt else needed_by
    if needed_by or prepend_instance_prompt:
        if not instance_prompt:
            raise ValueError(f"{needed_by or 'prepend_instance_prompt'} needs an instance_prompt")
        if needed_by:
            return variants(instance_prompt) if variants else [instance_prompt]
    if strategy in _FROM_TABLES:
        assert given is not None
        if not given:
            raise NoCaption(path, "the table holds no caption for it")
        found = list(given)
    elif strategy == "textfile":
        found = _textfile(path, split=not disable_multiline_split)
    else:
        found = [_stem(path)]
    if caption_filter is not None:
        found = [caption_filter(caption) for caption in found]
    found = list(dict.fromkeys(caption.strip() for caption in found if caption.strip()))
    if not found:
        raise NoCaption(path, "its caption is empty")
    if variants is not None:
        # two captions may have the same tags
        found = list(dict.fromkeys(chain.from_iterable(map(variants, found))))
    return (
        [f"{instance_prompt} {caption}" for caption in found] if prepend_instance_prompt else found
    )


def pick(choices: Sequence[str], rng: random.Random) -> str:
    """One of an image's captions."""
    return choices[rng.randrange(len(choices))]


def _stem(path: Path) -> str:
    if not is_text(path.stem):
        raise NoCaption(path, "its name, which is to be its caption, is not UTF-8")
    return path.stem.replace("_", " ")


def _textfile(path: Path, *, split: bool) -> list[str]:
    beside = path.with_suffix(".txt")
    try:
        # reading as text would turn a lone carriage return into a newline
        text = beside.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise NoCaption(path, "no caption file beside it (same name, ending in .txt)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise NoCaption(path, "its caption file can't be read as UTF-8 text") from error
    if not text.strip():
        raise NoCaption(path, "its caption file is empty")
    return lines(text) if split else ["\n".join(lines(text))]
