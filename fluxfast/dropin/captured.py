"""A block's forward as hooks keep it: a bound method, taken when the hook came.

diffusers' hooks (its caches among them) and accelerate's put a forward of their own on the block
and call the one that was there before. A block that becomes ours, or the host's again, has that one
exchanged, so that hooks may come before or after `accelerate`, and stay when it is undone.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any


def exchange(block: Any, entry: str, before: Any, after: Any) -> bool:
    """Have the hooks of a block that call the function `before` call `after`; whether any does.

    entry: the name of the block's forward.
    """
    found = [place for place in _places(block, entry) if _is_bound(getattr(*place), block, before)]
    for owner, name in found:
        setattr(owner, name, MethodType(after, block))
    return bool(found)


def forget_left_behind(block: Any, entry: str, function: Any) -> None:
    """Take away an attribute that is the class's own forward, `function`.

    Some libraries leave one when they take their hooks off; that is no forward of the block's own.
    """
    if _is_bound(block.__dict__.get(entry), block, function):
        del block.__dict__[entry]


def _places(block: Any, entry: str) -> Iterator[tuple[Any, str]]:
    """Where hooks keep a forward: its owner, and the owner's attribute."""
    if entry != "forward":
        return
    registry = block.__dict__.get("_diffusers_hook")
    for reference in getattr(registry, "_fn_refs", ()):
        yield reference, "forward"
        yield reference, "original_forward"
    # accelerate's
    if "_old_forward" in block.__dict__:
        yield block, "_old_forward"


def _is_bound(method: Any, block: Any, function: Any) -> bool:
    return (
        getattr(method, "__self__", None) is block and getattr(method, "__func__", None) is function
    )
