"""`caption_filter_list`: regular expressions that edit a caption before a run uses it."""

import re
from collections.abc import Callable, Sequence

CaptionFilter = Callable[[str], str]


def caption_filter(entries: Sequence[str]) -> CaptionFilter:
    """The function that applies the entries of a `caption_filter_list`.

    An entry is a regular expression whose matches are removed, or `s/pattern/replacement/`, which
    replaces the first match.

    Raises:
        ValueError: an entry is no regular expression.
    """
    # (what to find, a template of what to put there, how many times; 0: every time)
    rules: list[tuple[re.Pattern[str], str, int]] = []
    for entry in entries:
        replace = re.fullmatch(r"s/((?:\\/|[^/])+)/((?:\\/|[^/])*)/", entry)
        pattern, replacement = (replace[1], replace[2]) if replace else (entry, "")
        if not pattern:
            continue
        # the replacement is literal text
        template = replacement.replace("\\/", "/").replace("\\", "\\\\")
        try:
            rules.append((re.compile(pattern), template, 1 if replace else 0))
        except re.error as error:
            raise ValueError(
                f"caption_filter_list: {entry!r} is not a regular expression: {error}"
            ) from error

    def apply(caption: str) -> str:
        for pattern, template, count in rules:
            caption = pattern.sub(template, caption, count=count)
        return caption

    return apply
