"""The runs of `fluxfast-bench quality`, summed up: means, spreads over the seeds, differences.

A record is a run: `mode`, `seed`, `loss_before`, `loss`, `concept`, `old` (see `task.Outcome`),
`digest`, `seconds`, `commit` and `config`, a hash of all that decides it. It is `failed` with an
error's text where the run broke off, and has a `reason` and no seed where the mode can't be on this
machine.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fluxfast_bench.quality.modes import MODES, Mode

Record = Mapping[str, Any]
# the mode of the record that has the base's own scores
NO_LORA = "no LoRA"


@dataclass(frozen=True)
class Spread:
    """Values of several seeds: their mean, and their standard deviation, 0 of a single one."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


@dataclass(frozen=True)
class Row:
    """A mode's runs.

    Attributes:
        loss, concept, old: of every seed that has run.
        loss_difference, concept_difference: from the reference with the same seed; None where no
            seed of the reference has run.
        same_bits: of how many of those seeds the LoRA has the reference's bits.
        failed: what broke off, by seed.
        reason: why the mode can't be on this machine; "" where it can.
    """

    mode: Mode
    loss: Spread | None = None
    concept: Spread | None = None
    old: Spread | None = None
    loss_difference: Spread | None = None
    concept_difference: Spread | None = None
    same_bits: int = 0
    failed: Mapping[int, str] | None = None
    reason: str = ""


def rows_of(records: Sequence[Record]) -> dict[str, Row]:
    """The modes that there are records of, in the order of MODES."""
    done = {(r["mode"], r["seed"]): r for r in records if "loss" in r}
    reasons = {record["mode"]: record["reason"] for record in records if "reason" in record}
    rows = {}
    for name, mode in MODES.items():
        own = {seed: record for (of, seed), record in done.items() if of == name}
        failed = {r["seed"]: r["failed"] for r in records if "failed" in r and r["mode"] == name}
        if own or failed or name in reasons:
            rows[name] = _row(mode, own, done, failed, reasons.get(name, ""))
    return rows


def _row(
    mode: Mode,
    own: Mapping[int, Record],
    done: Mapping[tuple[str, int], Record],
    failed: Mapping[int, str],
    reason: str,
) -> Row:
    pairs = [
        (record, done[mode.reference, seed])
        for seed, record in sorted(own.items())
        if (mode.reference, seed) in done
    ]

    def of_seeds(key: str) -> Spread | None:
        return Spread(tuple(own[seed][key] for seed in sorted(own))) if own else None

    def differences(key: str) -> Spread | None:
        return Spread(tuple(one[key] - other[key] for one, other in pairs)) if pairs else None

    return Row(
        mode,
        of_seeds("loss"),
        of_seeds("concept"),
        of_seeds("old"),
        differences("loss"),
        differences("concept"),
        sum(one["digest"] == other["digest"] for one, other in pairs),
        failed,
        reason,
    )
