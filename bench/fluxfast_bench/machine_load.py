"""How much of the processor other programs take while something is measured.

A step waits for its slowest thread, so its time says little where others take a part of a core. On
a virtual machine, "others" are also the host and its other guests (steal time).
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

import psutil

# cores that others may take before the machine counts as busy: an idle desktop takes about a tenth
QUIET = 0.25
# seconds of the look before the first measurement; the system counts in hundredths of a second
LOOK = 0.3
# cpu_times' fields of time in which a core does no work, and of time that another field has as well
_IDLE = ("idle", "iowait", "guest", "guest_nice")


@dataclass(frozen=True)
class _Reading:
    """Seconds: of the clock, of all cores' work, and of this process's and its children's work."""

    clock: float
    machine: float
    own: float

    @classmethod
    def now(cls) -> _Reading:
        times = psutil.cpu_times()._asdict()
        machine = sum(seconds for name, seconds in times.items() if name not in _IDLE)
        this = psutil.Process()
        own = 0.0
        for process in (this, *this.children(recursive=True)):
            # one that has ended is among its parent's children_user
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                spent = process.cpu_times()
                own += sum((spent.user, spent.system, spent.children_user, spent.children_system))
        return cls(time.monotonic(), machine, own)


class Load:
    """What others take of the processor from the moment that this is made."""

    def __init__(self) -> None:
        self._first = _Reading.now()

    def others(self) -> float:
        """Cores that others have kept busy since, on average."""
        now, first = _Reading.now(), self._first
        busy = (now.machine - first.machine) - (now.own - first.own)
        return max(0.0, round(busy / max(now.clock - first.clock, 1e-9), 2))


def others_now() -> float:
    """Cores that others keep busy at the moment; takes a moment."""
    load = Load()
    time.sleep(LOOK)
    return load.others()


def told_busy(others: float, when: str) -> str | None:
    """A line that says that the machine is, or was, busy; None where it is quiet."""
    if others <= QUIET:
        return None
    return (
        f"busy machine: other programs took {others:.1f} of {psutil.cpu_count()} cores {when}; "
        "times are too long and uneven"
    )
