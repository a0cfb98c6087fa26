"""A comparison of contestants on shapes of one model, in as many processes as it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from fluxfast_bench.counted.floor import floor_seconds, step_work
from fluxfast_bench.shapes import SHAPES
from fluxfast_bench.step import worker
from fluxfast_bench.step.worker import Entry, Plan
from fluxfast_bench.timing import MOST_OF_PRODUCTS, share_of, stats


@dataclass
class Timed:
    """What is known of an entry on one shape.

    figures: what was found once it was ready. rounds: its step times, turn by turn; anchor: those
    of the anchor's turns just before, in the same process.
    """

    figures: dict[str, Any] = field(default_factory=dict)
    rounds: list[list[float]] = field(default_factory=list)
    anchor: list[list[float]] = field(default_factory=list)

    @property
    def slowness(self) -> float:
        """Time against the anchor's: the median over turns that followed one another."""
        return median(
            median(own) / median(other) for own, other in zip(self.rounds, self.anchor, strict=True)
        )


class Outcome:
    """What is known of an entry, by shape, or why there is nothing."""

    def __init__(self, entry: Entry, shapes: Sequence[str]) -> None:
        self.entry = entry
        self.on = {shape: Timed() for shape in shapes}
        self.reason: str | None = None

    def ready(self, figures: dict[str, dict[str, Any]]) -> None:
        for shape, found in figures.items():
            self.on[shape].figures = found

    @property
    def measured(self) -> bool:
        return any(timed.rounds for timed in self.on.values())


class Comparison:
    """Measures entries beside one another.

    `told` is called whenever an outcome has changed, and `began` with the name of what begins.
    The first entry that can run is the anchor, which takes part in every process.
    """

    def __init__(
        self,
        plan: Plan,
        entries: Sequence[Entry],
        *,
        apart: bool,
        limit: float,
        told: Callable[[], object] = lambda: None,
        began: Callable[[str], object] = lambda name: None,
    ) -> None:
        self.plan, self.entries, self.apart, self.limit = plan, entries, apart, limit
        self._told, self._began = told, began
        self.outcomes = {entry.key: Outcome(entry, plan.shapes) for entry in entries}

    def measure(self) -> list[Outcome]:
        """Everything that can be measured, in as many processes as it takes."""
        device = torch.device(self.plan.device)
        for outcome in self.outcomes.values():
            outcome.reason = outcome.entry.contestant.missing(device)
        able = [key for key, outcome in self.outcomes.items() if outcome.reason is None]
        anchor = able[0] if able else None
        waiting = able[1:]
        while anchor is not None and (waiting or not self.outcomes[anchor].measured):
            before = list(waiting)
            waiting = self._group(anchor, waiting)
            if self.outcomes[anchor].reason is not None:
                # the next one takes its place
                anchor = waiting.pop(0) if waiting else None
            elif waiting == before and waiting:
                self._alone(anchor, waiting.pop(0))
        return list(self.outcomes.values())

    def _run(self, keys: list[str]) -> Iterable[worker.Event]:
        if self.apart:
            return worker.run_apart("measure", keys, self.plan, limit=self.limit)
        return worker.run("measure", keys, self.plan)

    def _group(self, anchor: str, keys: list[str]) -> list[str]:
        """One process; returns the keys that have to be measured in another."""
        everybody = [anchor, *keys]
        turns: dict[tuple[str, str], list[list[float]]] = {
            (key, s): [] for key in everybody for s in self.plan.shapes
        }
        started, settled = anchor, set()

        def turned(key: str) -> bool:
            return any(turns[key, shape] for shape in self.plan.shapes)

        for event in self._run(everybody):
            kind, *rest = event
            if kind == "start":
                (started,) = rest
                self._began(started)
            elif kind == "ready":
                self.outcomes[rest[0]].ready(rest[1])
                settled.add(rest[0])
            elif kind == "failed":
                self.outcomes[rest[0]].reason = rest[1]
                settled.add(rest[0])
            elif kind == "round":
                key, shape, seconds = rest
                if key == anchor and settled.issuperset(everybody):
                    self._began(f"a turn of everybody on {shape}")
                turns[key, shape].append(seconds)
                timed = self.outcomes[key].on[shape]
                timed.rounds.append(seconds)
                # the anchor's turn is just before
                timed.anchor.append(turns[anchor, shape][-1])
            elif kind == "died" and started not in settled:
                self.outcomes[started].reason = rest[0]
            elif kind == "died" and self.outcomes[started].reason is None and not turned(started):
                # it was ready: its first turn did it
                self.outcomes[started].reason = rest[0]
            self._told()
        return [key for key in keys if self.outcomes[key].reason is None and not turned(key)]

    def _alone(self, anchor: str, key: str) -> None:
        """What doesn't fit beside the anchor: processes of its own and of the anchor's, in turn."""
        outcome = self.outcomes[key]
        for _ in range(2):
            turns: dict[str, list[list[float]]] = {shape: [] for shape in self.plan.shapes}
            for one in (anchor, key):
                times: dict[str, list[float]] = {shape: [] for shape in self.plan.shapes}
                for event in self._alone_events(one):
                    if event[0] == "round":
                        times[event[2]] += event[3]
                for shape, seconds in times.items():
                    turns[shape].append(seconds)
            if outcome.reason is not None or not all(all(of_shape) for of_shape in turns.values()):
                outcome.reason = outcome.reason or "did not fit in memory"
                self._told()
                return
            for shape, (others, own) in turns.items():
                outcome.on[shape].anchor.append(others)
                outcome.on[shape].rounds.append(own)
            self._told()

    def _alone_events(self, key: str) -> Iterable[worker.Event]:
        for event in self._run([key]):
            if event[0] in ("failed", "died"):
                self.outcomes[key].reason = event[-1]
            elif event[0] == "ready":
                self.outcomes[key].ready(event[2])
            yield event


def record_of(
    outcome: Outcome, outcomes: Sequence[Outcome], plan: Plan, case: str, ceilings: dict[str, float]
) -> dict[str, Any]:
    """An entry's record on a shape: conditions, figures, and for ours the ratios to all others."""
    entry, contestant, shape = outcome.entry, outcome.entry.contestant, SHAPES[case]
    record: dict[str, Any] = {
        "case": case,
        "contestant": entry.key,
        "title": contestant.title,
        "ours": contestant.ours,
        "storage": contestant.storage
        if plan.device != "cpu" or contestant.storage != "bf16"
        else "fp32",
        "recompute": entry.recompute,
        "batch": shape.batch,
        "tokens": shape.tokens,
        "rank": plan.rank,
        "optimizer": plan.optimizer,
    }
    own = outcome.on[case]
    # on another shape it may have failed later
    if not own.rounds:
        return record | {"reason": outcome.reason or "was not reached"}
    timed = stats([second for turn in own.rounds for second in turn])
    record |= timed.as_record() | own.figures
    itemsize = plan.setup(entry.recompute).dtype.itemsize
    work = step_work(
        shape,
        entry.recompute,
        rank=plan.rank,
        itemsize=itemsize,
        codes=contestant.compute != "float",
        route=contestant.route,
    )
    if ceilings:
        floor = floor_seconds(work, ceilings, contestant.compute)
        record["floor_seconds"] = round(floor, 6)
        record |= share_of("floor_share", floor / timed.seconds, MOST_OF_PRODUCTS)
    if contestant.ours:
        others = [o for o in outcomes if o is not outcome and o.on[case].rounds]
        record["ratios"] = {
            other.entry.key: round(other.on[case].slowness / own.slowness, 4) for other in others
        }
    return record
