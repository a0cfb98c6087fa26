"""What failed its check on this machine: what `auto` passes over, and what an explicit choice may
not have.

A verdict is about an op ("gelu", "int4.dequantize", "attention") or one of the choices below, and
one way to do it ("triton", "native", "cudnn", "int8"). There are none until `fluxfast.doctor` sets
what it found on this combination of device, driver and versions. Everybody who chooses by himself
asks here, so that nobody takes what is known to be wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

Verdicts = Mapping[tuple[str, str], str]

# a block as one autograd.Function (ways: the implementations); what products run in (ways: "int8",
# "e4m3")
FUSED_BLOCK, COMPUTE = "a fused block", "compute"
# choices that there is one way to have
GRAPHS, STREAMING = "CUDA graphs", "streamed blocks"
ONLY_WAY = "on"

# (what, way) to why it failed; and by what, the ways that failed
_failed: dict[tuple[str, str], str] = {}
_ways: dict[str, frozenset[str]] = {}
_NONE: frozenset[str] = frozenset()


def set_failed(found: Verdicts) -> None:
    """Takes the place of all verdicts that there were; found: (what, way) to one line that says
    what was seen.
    """
    _failed.clear()
    _failed.update(found)
    _ways.clear()
    for what, way in found:
        _ways[what] = _ways.get(what, _NONE) | {way}


def failed(what: str, way: str) -> str | None:
    """Why this way to do it is not to be trusted here, for the end of a message; None where nothing
    is known against it.
    """
    found = _failed.get((what, way))
    return (
        None
        if found is None
        else f"it failed its check on this machine ({found}); `fluxfast-train doctor` says more"
    )


def ways_failed(what: str) -> frozenset[str]:
    """All ways to do it that failed."""
    return _ways.get(what, _NONE)


@contextmanager
def ignored() -> Iterator[None]:
    """Nothing counts as failed in here: for those who check anew."""
    before = dict(_failed)
    set_failed({})
    try:
        yield
    finally:
        set_failed(before)
