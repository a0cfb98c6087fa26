"""The names that a function of another program uses, by which fluxfast knows what it does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from types import CodeType
from typing import Any

from fluxfast.adapters.kind import listed


def words(text: str) -> frozenset[str]:
    """The words of a text, as the names that may be used are written down."""
    return frozenset(text.split())


def unknown_in(functions: Iterable[Any], known: Set[str]) -> str | None:
    """What functions name that is not known, for a message; None where all is."""
    unknown = sorted(set[str]().union(*map(names_in, functions)) - known)
    return listed(unknown) if unknown else None


def names_in(function: Any) -> set[str]:
    """All attributes, methods and globals that a function names, or one nested in it.

    So are the variables of another function in which it was made: what is put around a function
    often calls it as such. What is no function of Python gives a text that is no name.
    """
    function = without_context(function)
    code = getattr(function, "__code__", None)
    if code is None:
        return {f"{getattr(function, '__name__', function)} is no function of Python"}
    made_with = set(code.co_freevars) - {"__class__"}
    return made_with | {name for each in codes_in(code) for name in each.co_names}


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
