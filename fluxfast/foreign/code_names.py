"""The names that a function of another program uses, by which fluxfast knows what it does."""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType
from typing import Any


def names_in(function: Any) -> set[str]:
    """All attributes, methods and globals that a function names, or one nested in it.

    What is no function of Python gives a text that is no name.
    """
    function = without_context(function)
    code = getattr(function, "__code__", None)
    if code is None:
        return {f"{getattr(function, '__name__', function)} is no function of Python"}
    return {name for each in codes_in(code) for name in each.co_names}


def closed_over(function: Any) -> set[str]:
    """The variables of an enclosing function that a function uses: what it was made with."""
    code = getattr(function, "__code__", None)
    return set() if code is None else set(code.co_freevars) - {"__class__"}


def without_context(function: Any) -> Any:
    """The function that torch's own decorator, such as `no_grad`, calls in its context."""
    module = getattr(function, "__globals__", {}).get("__name__")
    return function.__wrapped__ if module == "torch.utils._contextlib" else function


def codes_in(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions and comprehensions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes_in(constant)
