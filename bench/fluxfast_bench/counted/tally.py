"""What a step launches and moves, added up: `fluxfast.memory.launched` says what is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from fluxfast.memory.launched import Launched, Watching
from fluxfast_bench.counted.meta_step import as_on_gpu


@dataclass
class Tally:
    """Launches and bytes, by category, and within it by op."""

    launches: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    # (category, op): launches, and bytes
    op_launches: Counter[tuple[str, str]] = field(default_factory=Counter)
    op_bytes: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, found: Launched) -> None:
        self.launches[found.category] += found.launches
        self.bytes[found.category] += found.nbytes
        self.op_launches[found.category, found.op] += found.launches
        self.op_bytes[found.category, found.op] += found.nbytes

    @property
    def total_launches(self) -> int:
        return sum(self.launches.values())


def counted(run: Callable[[], object], batch: int = 1) -> Tally:
    """What `run()` launches and moves."""
    tally = Tally()
    watching = Watching(tally.add, batch)
    with as_on_gpu(watching.on_launch), watching:
        run()
    return tally
