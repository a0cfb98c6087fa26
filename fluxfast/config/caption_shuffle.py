"""`caption_shuffle`: further captions that have the same tags in another order."""

import random
from collections.abc import Callable
from typing import Literal

from pydantic import Field

from fluxfast.config.settings import Settings
from fluxfast.text import to_bytes

CaptionVariants = Callable[[str], list[str]]

# what stands between two tags, and what joins them again
_DELIMITERS = {"comma": (",", ", "), "space": (" ", " "), "period": (".", ". ")}
# how often an order that was drawn before is drawn again, for each variant
_ATTEMPTS = 20


class CaptionShuffle(Settings):
    """A dataset's `caption_shuffle`: how many orders of a caption's tags there are to be."""

    enable: bool = False
    """Shuffle captions at all."""
    count: int = Field(1, ge=1)
    """Shuffled captions that each caption gives."""
    seed: int | None = None
    """Decides the orders (unset: the run's seed)."""
    split_on: Literal["comma", "space", "period"] = "comma"
    """What separates tags."""
    position_start: int = Field(0, ge=0)
    """So many tags at the beginning stay where they are."""
    include_original: bool = True
    """The caption as it was written is one of the captions."""


def caption_variants(
    shuffle: CaptionShuffle,
    *,
    seed: int,
    on_kept: Callable[[str], None] = lambda caption: None,
) -> CaptionVariants:
    """The function that gives a caption's variants: the caption itself, then shuffled ones.

    The orders of a caption follow from `shuffle.seed` (`seed` where it has none) and the caption
    alone, and differ from each other and from the original. There are fewer than `count` where the
    tags have fewer orders. A caption without two tags to exchange stays as it is, whatever
    `include_original` says, and `on_kept` is told of it where that leaves the original out.
    """
    seed = seed if shuffle.seed is None else shuffle.seed
    delimiter, joint = _DELIMITERS[shuffle.split_on]

    def variants(caption: str) -> list[str]:
        tags = [tag.strip() for tag in caption.split(delimiter) if tag.strip()]
        first, rest = tags[: shuffle.position_start], tags[shuffle.position_start :]
        # tags that are all the same have one order
        if len(set(rest)) < 2:
            if not shuffle.include_original:
                on_kept(caption)
            return [caption]
        end = delimiter.strip() if caption.rstrip().endswith(".") and delimiter == "." else ""
        orders = {tuple(rest): None}
        rng = random.Random(to_bytes(f"{seed}:{caption}"))
        for _ in range(_ATTEMPTS * shuffle.count):
            if len(orders) > shuffle.count:
                break
            orders[tuple(rng.sample(rest, len(rest)))] = None
        shuffled = [joint.join([*first, *order]) + end for order in list(orders)[1:]]
        return [caption, *shuffled] if shuffle.include_original else shuffled

    return variants
