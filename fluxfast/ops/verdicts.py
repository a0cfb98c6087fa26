"""What failed its check on this machine: `auto` passes over it, and an explicit choice is refused.

A verdict is about an op ("gelu", "int4.dequantize", "attention") or one of the choices below, and
one way to do it ("triton", "native", "cudnn", "int8"). There are none until `fluxfast.doctor` sets
what it found on this combination of device, driver and versions. All code that chooses between
ways asks here, so that nothing takes what is known to be wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

Verdicts = Mapping[tuple[str, str], str]

# a block as one autograd.Function, whose ways are the implementations
FUSED_BLOCK = "a fused block"
# what products run in, whose ways are "int8" and "e4m3"
COMPUTE = "compute"
# these have one way, ONLY_WAY
GRAPHS, STREAMING = "CUDA graphs", "streamed blocks"
ONLY_WAY = "on"

# (what, way) to why it failed; and by what, the ways that failed
_failed: dict[tuple[str, str], str] = {}
_ways: dict[str, frozenset[str]] = {}
_NONE: frozenset[str] = frozenset()


def set_failed(found: Verdicts) -> None:
    """Replaces all verdicts; found: from (what, way) to one line that says what was seen."""
    _failed.clear()
    _failed.update(found)
    _ways.clear()
    for what, way in found:
        _ways[what] = _ways.get(what, _NONE) | {way}


def exist() -> bool:
    """Whether anything failed."""
    return len(_failed) > 0


def failed(what: str, way: str) -> str | None:
    """Why this way to do it can't be trusted here, for the end of a message, or None."""
    found = _failed.get((what, way))
    if found is None:
        return None
    return f"it failed its check on this machine ({found}); `fluxfast-train doctor` says more"


def ways_failed(what: str) -> frozenset[str]:
    """All ways to do it that failed."""
    return _ways.get(what, _NONE)


@contextmanager
def ignored() -> Iterator[None]:
    """Nothing counts as failed inside: for the checks themselves."""
    before = dict(_failed)
    set_failed({})
    try:
        yield
    finally:
        set_failed(before)
