"""How the calls of an accelerated model's blocks ran: counted, and each new reason warned of once.

A call that is not fused can also be made an error. Inside torch.compile nothing is counted and
nobody is warned, since that would break its graph.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

# how a call can run, as `block_base.CallRecorder` names it, in words
WORDS: Mapping[str, str] = {
    "fused": "as one fused block",
    "composed": "op by op",
    "host": "by the host's own forward",
    "module": "with a modulation's linear called by its module",
}
# each call of a block runs in exactly one of these
WAYS = ("fused", "composed", "host")
# two threads may call the same block; the lock is held for a few instructions only
_lock = threading.Lock()


@dataclass
class Notices:
    """What the blocks of one model share.

    strict: a fallback is an error. said: the (block's way, reason) pairs that a warning has named.
    """

    strict: bool
    said: set[tuple[str, str]] = field(default_factory=set)


@dataclass
class Fallback:
    """The calls of a block that ran in one way for one reason.

    `last` shows the argument of the last of them that the reason is about.
    """

    calls: int = 0
    last: str = ""


class CallLog:
    """The calls of one block since `accelerate`; a copy of the block starts with none."""

    def __init__(self, name: str, notices: Notices) -> None:
        self.name, self.notices = name, notices
        # how the last call within torch.compile ran, and why
        self.compiled: tuple[str, str] | None = None
        self._counts = dict.fromkeys(WAYS, 0)
        self._fallbacks: dict[tuple[str, str], Fallback] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return CallLog, (self.name, self.notices)

    def count(self, how: str) -> int:
        """How many calls ran that way."""
        return self._counts[how]

    @property
    def total(self) -> int:
        """How many calls there were."""
        return sum(self._counts.values())

    def fallbacks(self) -> dict[tuple[str, str], Fallback]:
        """The calls that were not fused, by way and reason; `module` calls are counted among others
        too.
        """
        with _lock:
            return {key: Fallback(seen.calls, seen.last) for key, seen in self._fallbacks.items()}

    def record(self, how: str, because: str | None = None, value: str = "") -> None:
        """Count a call; arguments as `block_base.CallRecorder.record` takes them.

        Raises ValueError for a call that is not fused if accelerate was told to be strict. That
        torch.compile runs blocks op by op is no reason for the error.
        """
        if torch.compiler.is_compiling():
            if how == "host" and self.notices.strict:
                raise ValueError(self._error(how, because, value))
            if how in WAYS:
                self.compiled = (how, because or "")
            return
        if because is None:
            with _lock:
                self._counts[how] += 1
            return
        if self.notices.strict:
            raise ValueError(self._error(how, because, value))
        key = (how, because)
        with _lock:
            if how in self._counts:
                self._counts[how] += 1
            seen = self._fallbacks.setdefault(key, Fallback())
            seen.calls, seen.last = seen.calls + 1, value
            is_new = key not in self.notices.said
            self.notices.said.add(key)
        if is_new:
            text = (
                f"fluxfast: {self.name} ran {WORDS[how]}: {with_value(because, value)}. The "
                "report counts such calls, and this is said once; accelerate(..., strict=True) "
                "makes it an error"
            )
            # `warn` would say it for the first of two models only
            warnings.warn_explicit(text, UserWarning, __file__, 0)

    def _error(self, how: str, because: str | None, value: str) -> str:
        return (
            f"accelerate(strict=True): {self.name} would run {WORDS[how]}: "
            f"{with_value(because or '', value)}. Take away what is in the way, or leave strict "
            "out: such calls run then, and the report counts them"
        )


def with_value(because: str, value: str) -> str:
    return f"{because} ({value})" if value else because
