"""The arguments of a call of a host's block: those that fluxfast knows, and any others that matter.

An argument that equals its default in the host's own signature does not matter, whether it is given
by name or by position.
"""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

# values of these types that are equal are the same argument
_PLAIN = (bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device)


class Signature(NamedTuple):
    """A block's arguments and their defaults, without self.

    `more` says whether it takes any others by name.
    """

    defaults: Mapping[str, Any]
    more: bool


class Given(NamedTuple):
    """The known arguments of a call that are not None.

    If the call has an argument that only the host knows, `because` says so and `value` shows it.
    """

    known: dict[str, Any]
    because: str | None = None
    value: str = ""


def signature_of(forward: Callable[..., Any]) -> Signature:
    """The signature of a method, from its class's function."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return Signature(
        {p.name: p.default for p in named}, any(p.kind is p.VAR_KEYWORD for p in parameters)
    )


def arguments(
    signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any], known: frozenset[str]
) -> Given:
    """A call's arguments by name.

    A call that no host could take is left to the host, which raises.
    """
    given = {**dict(zip(signature.defaults, args, strict=False)), **kwargs}
    if len(given) != len(args) + len(kwargs):
        return Given({}, "its arguments are not those of its signature")
    for name, value in given.items():
        if name not in known and not _is_default(name, value, signature):
            return Given({}, f"only the host knows its argument {name}", f"{name}={_shown(value)}")
    return Given(
        {name: value for name, value in given.items() if name in known and value is not None}
    )


def _is_default(name: str, value: Any, signature: Signature) -> bool:
    if name not in signature.defaults:
        return signature.more and value is None
    return _same(value, signature.defaults[name])


def _same(value: Any, default: Any) -> bool:
    """Whether a value is a default, without looking into tensors."""
    if value is default or (_is_empty(value) and _is_empty(default)):
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


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (dict, list, tuple, set)) and not value)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    return reprlib.repr(value)


class HostBlock:
    """A block whose arguments only its host's signature tells: what the hosts' mixins share."""

    signature: Signature

    def host_because(self, given: dict[str, Any]) -> str | None:
        """Why the host's own forward runs for a call with these arguments; None if ours does."""
        raise NotImplementedError

    def ours(
        self: Any, args: tuple[Any, ...], kwargs: dict[str, Any], known: frozenset[str]
    ) -> dict[str, Any] | None:
        """A call's known arguments, or None if the host's own forward must run.

        In that case the block's log is told why.
        """
        given = arguments(self.signature, args, kwargs, known)
        because = given.because or self.host_because(given.known)
        if because is None:
            return given.known
        self.ran("host", because, given.value)
        return None
