"""Captions from tables: cells that hold one text, several or none."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fluxfast.config.settings import did_you_mean, quoted
from fluxfast.text import is_text


def texts(cell: Any) -> list[str]:
    """The captions in a cell: a text, a list of texts, or nothing (null, NaN, another type)."""
    if isinstance(cell, str):
        return [cell] if cell.strip() and is_text(cell) else []
    if isinstance(cell, list | tuple):
        return [text for part in cell for text in texts(part)]
    return []


def row_captions(row: Mapping[str, Any], *columns: str | Sequence[str] | None) -> list[str]:
    """The captions of a row: those of the first of `columns` that has any.

    Several columns in one place are taken together.
    """
    for names in columns:
        if names is None:
            continue
        found = texts([row.get(name) for name in ([names] if isinstance(names, str) else names)])
        if found:
            return list(dict.fromkeys(found))
    return []


def check_columns(
    wanted: Mapping[str, str | Sequence[str] | None], known: Iterable[str], table: str
) -> None:
    """Raise ValueError naming the keys whose column the table lacks, and the columns it has."""
    known = list(known)
    problems = []
    for key, names in wanted.items():
        for name in () if names is None else [names] if isinstance(names, str) else names:
            if name not in known:
                problems.append(
                    f'{table}: has no column "{name}" ("{key}"){did_you_mean(name, known)}; '
                    f"it has {quoted(known)}"
                )
    if problems:
        raise ValueError("\n".join(problems))
