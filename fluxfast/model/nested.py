"""Tensors in nested tuples, lists and dicts as one list, and nested again.

torch's `pytree` does this for any class, and takes three times as long, which a block of a small
model notices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def flattened(value: Any, leaves: list[Tensor | None]) -> Any:
    """Appends the tensors of a value, and each None for one, to `leaves`; returns the value's form.

    That is the value with a place in `leaves` for each tensor: what `nested` takes.
    """
    if value is None or isinstance(value, Tensor):
        leaves.append(value)
        return len(leaves) - 1
    if isinstance(value, dict):
        return {key: flattened(part, leaves) for key, part in value.items()}
    return _like(value, [flattened(part, leaves) for part in value])


def nested(form: Any, leaves: Sequence[Tensor | None]) -> Any:
    """The value whose form `flattened` has returned, of these tensors."""
    if isinstance(form, int):
        return leaves[form]
    if isinstance(form, dict):
        return {key: nested(part, leaves) for key, part in form.items()}
    return _like(form, [nested(part, leaves) for part in form])


def _like(value: Any, parts: list[Any]) -> Any:
    """The parts in a container of a value's class: a list, a tuple, or a named one."""
    kind = type(value)
    if kind is list:
        return parts
    return tuple(parts) if kind is tuple else kind(*parts)
