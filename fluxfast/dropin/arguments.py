"""The arguments of one call of a host's block: those that fluxfast knows, and whether there are
others that matter.

An argument that is at the default of the host's own signature says nothing, whether it is given by
name or by position.
"""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

# of these, two that are equal are the same argument
_PLAIN = (bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device)


class Signature(NamedTuple):
    """A block's arguments and their defaults, without self; `more`: whether it takes any others by
    name.
    """

    defaults: Mapping[str, Any]
    more: bool


class Given(NamedTuple):
    """The known arguments of a call, less those that are None; and which other one only the host
    knows, with its value.
    """

    known: dict[str, Any]
    because: str | None = None
    value: str = ""


def signature_of(forward: Callable[..., Any]) -> Signature:
    """The signature of a method, as a function of its class."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return Signature(
        {p.name: p.default for p in named}, any(p.kind is p.VAR_KEYWORD for p in parameters)
    )


def arguments(
    signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any], known: frozenset[str]
) -> Given:
    """A call's arguments by name. What no host could be called with is left for the host to raise
    on.
    """
    given = {**dict(zip(signature.defaults, args, strict=False)), **kwargs}
    if len(given) != len(args) + len(kwargs):
        return Given({}, "its arguments are not those of its signature")
    for name, value in given.items():
        if name not in known and not _says_nothing(name, value, signature):
            return Given({}, f"only the host knows its argument {name}", f"{name}={_shown(value)}")
    return Given(
        {name: value for name, value in given.items() if name in known and value is not None}
    )


def _says_nothing(name: str, value: Any, signature: Signature) -> bool:
    if name not in signature.defaults:
        return signature.more and value is None
    return _same(value, signature.defaults[name])


def _same(value: Any, default: Any) -> bool:
    """Whether a value is a default, in a way that asks no tensor."""
    if value is default or (_is_nothing(value) and _is_nothing(default)):
        return True
    if isinstance(value, _PLAIN) and isinstance(default, _PLAIN):
        return bool(value == default)
    if (
        isinstance(value, (tuple, list))
        and type(value) is type(default)
        and len(value) == len(default)
    ):
        return all(map(_same, value, default))
    if isinstance(value, dict) and isinstance(default, dict) and value.keys() == default.keys():
        return all(_same(value[key], default[key]) for key in value)
    return False


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, (dict, list, tuple, set)) and not value)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    return reprlib.repr(value)


class HostBlock:
    """A block whose arguments only its host's signature says: what its layouts' mixins share."""

    signature: Signature

    def host_because(self, given: dict[str, Any]) -> str | None:
        """Why the host's own forward runs, for a call with these known arguments; None where ours
        does.
        """
        raise NotImplementedError

    def ours(
        self: Any, args: tuple[Any, ...], kwargs: dict[str, Any], known: frozenset[str]
    ) -> dict[str, Any] | None:
        """A call's known arguments; None, and the block's log is told why, where the host's own
        forward runs.
        """
        given = arguments(self.signature, args, kwargs, known)
        because = given.because or self.host_because(given.known)
        if because is None:
            return given.known
        self.ran("host", because, given.value)
        return None
