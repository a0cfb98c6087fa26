"""`fluxfast-bench check`: compare stored results with `bench/targets.toml` and with earlier runs.

A figure that nobody has measured is listed as such: it has not passed. On each device the newest
figure counts, and it may be no more than 5 % worse than the one before it.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from fluxfast_bench.options import wide_console
from fluxfast_bench.quality import guard
from fluxfast_bench.report import results, targets
from fluxfast_bench.report.results import Result
from fluxfast_bench.report.verdict import (
    COLOURS,
    MET,
    MISSED,
    UNMEASURED,
    WORSENED,
    Verdict,
)

WORSE = 0.05
# where a figure comes from that no device gave
COUNTED = "counted"
# what runs anywhere and fails by itself where a target is missed; {} is a folder to write to
GUARDS = (
    ("aot", "--sample", "1", "--out", "{}/aot.json"),
    ("vram", "--out", "{}/vram.json"),
    ("counts", "--out", "{}/counts.json"),
)


@dataclass(frozen=True)
class Where:
    """The devices that a target is about: a group of them, one device, or any CPU.

    `result in where` says whether a result is of such a device.
    """

    device: str
    beginnings: tuple[str, ...] | None

    @classmethod
    def of(cls, device: str, groups: dict[str, list[str]]) -> Where:
        return cls(device, tuple(groups[device]) if device in groups else None)

    def __contains__(self, result: Result) -> bool:
        if self.beginnings is not None:
            return result.device.startswith(self.beginnings)
        return result.device == self.device or (
            self.device == "cpu" and "cuda" not in result.data["conditions"]
        )


def _measured(
    stored: Sequence[Result], kind: str, where: Where | None = None
) -> Iterator[tuple[Result, dict[str, Any]]]:
    """Every measured record of a kind, the newest first."""
    for result in sorted(stored, key=lambda r: r.date, reverse=True):
        if result.kind == kind and (where is None or result in where):
            for record in result.records:
                if "reason" not in record:
                    yield result, record


def ratio_verdicts(
    stored: Sequence[Result], wanted: Sequence[dict[str, Any]], groups: dict[str, list[str]]
) -> Iterator[Verdict]:
    """Of a group, each device that was measured; of CPUs the newest."""
    for target in wanted:
        where, limit = Where.of(target["device"], groups), f"at least {target['at_least']:.2f}"
        found: dict[str, float] = {}
        for result, record in _measured(stored, "step", where):
            ours = (record["case"], record["contestant"]) == (target["case"], target["ours"])
            if ours and target["peer"] in record["ratios"]:
                device = where.device if where.beginnings is None else result.device
                found.setdefault(device, record["ratios"][target["peer"]])
        for device, ratio in found.items():
            verdict = MET if ratio >= target["at_least"] else MISSED
            yield Verdict(
                target["name"], f"{device}, {target['case']}", limit, f"{ratio:.2f}", verdict
            )
        if not found:
            yield Verdict(
                target["name"], f"{target['device']}, {target['case']}", limit, "", UNMEASURED
            )


def _newest_of_ours(
    stored: Sequence[Result], where: Where | None = None
) -> list[tuple[Result, dict[str, Any]]]:
    """The newest step of each of our contestants on each device and case."""
    newest: dict[tuple[str, str, str], tuple[Result, dict[str, Any]]] = {}
    for result, record in _measured(stored, "step", where):
        if record["ours"]:
            newest.setdefault(
                (result.device, record["case"], record["contestant"]), (result, record)
            )
    return list(newest.values())


def floor_verdicts(
    stored: Sequence[Result], wanted: dict[str, Any], groups: dict[str, list[str]]
) -> Iterator[Verdict]:
    least, rows = wanted["at_least"], _newest_of_ours(stored, Where.of(wanted["device"], groups))
    for result, record in rows:
        share = record.get("floor_share")
        if share is not None:
            name = f"{record['contestant']}, share of the floor's rate"
            verdict = MET if share >= least else MISSED
            yield Verdict(
                name,
                f"{result.device}, {record['case']}",
                f"at least {least:.0%}",
                f"{share:.0%}",
                verdict,
            )
    if not rows:
        yield Verdict(
            "share of the floor's rate", wanted["device"], f"at least {least:.0%}", "", UNMEASURED
        )


def vram_verdicts(
    stored: Sequence[Result],
    counted: dict[str, list[dict[str, Any]]],
    wanted: dict[str, dict[str, float]],
) -> Iterator[Verdict]:
    """Peaks that a device's allocator reported, or else those that `vram` has counted."""
    peaks: dict[tuple[str, str, str], tuple[float, str]] = {}
    for record in counted.get("vram", []):
        if record["recompute"] == "full":
            residency = "streamed" if record["streamed"] else "resident"
            peaks[record["base"], residency, record["shape"]] = record["gib"], COUNTED
    for result, record in _newest_of_ours(stored):
        if (
            "peak_gib" in record
            and record["recompute"] == "full"
            and record["optimizer"] == "adamw8bit"
        ):
            residency = "streamed" if "streamed" in record["contestant"] else "resident"
            key = record["storage"], residency, record["case"]
            # the worst, where a storage format has several ways to compute
            known = peaks.get(key, (0.0, COUNTED))
            measured = record["peak_gib"], result.device
            peaks[key] = measured if known[1] == COUNTED else max(known, measured)
    for storage, limits in wanted.items():
        for place, most in limits.items():
            residency, px = place.split("-")
            key = storage, residency, f"{px}px-b1"
            name, limit = f"peak VRAM, {storage}, {residency}", f"at most {most:g} GiB"
            if key in peaks:
                peak, device = peaks[key]
                verdict = MET if peak <= most else MISSED
                yield Verdict(name, f"{device}, {px} px", limit, f"{peak:.2f} GiB", verdict)
            else:
                yield Verdict(name, f"{px} px", limit, "", UNMEASURED)


def counts_verdicts(
    counted: dict[str, list[dict[str, Any]]], wanted: dict[str, Any]
) -> Iterator[Verdict]:
    """The worst step of ours in bytes and in launches, the steps that have limits of their own, and
    kernels that spill.
    """
    ours = [record for record in counted.get("counts", []) if record["ours"]]
    for key, target in targets.COUNT_RATIOS.items():
        name, limit = (
            f"{target} of a step, of eager diffusers + PEFT's",
            f"at most {wanted[target]:g}",
        )
        if not ours:
            yield Verdict(name, "", limit, "", UNMEASURED)
            continue
        worst = max(ours, key=lambda record: record[key])
        verdict = MET if worst[key] <= wanted[target] else MISSED
        yield Verdict(
            name,
            f"{COUNTED}, {worst['case']}, {worst['contestant']}",
            limit,
            f"{worst[key]:.4g}",
            verdict,
        )
    for step in wanted.get("steps", []):
        place = f"{COUNTED}, {step['case']}, {step['contestant']}"
        record = next(
            (r for r in ours if all(r[key] == step[key] for key in ("case", "contestant"))), None
        )
        for key, said in (("launches", "launches"), ("memory_ratio", "bytes, of eager's")):
            limit = f"at most {step[key]:,}"
            if record is None:
                yield Verdict(said, place, limit, "", UNMEASURED)
                continue
            verdict = MET if record[key] <= step[key] else MISSED
            yield Verdict(said, place, limit, f"{record[key]:,}", verdict)
    variants = counted.get("aot", [])
    bad = sum(variant.get("spills") != 0 for variant in variants)
    verdict = UNMEASURED if not variants else MET if bad == 0 else MISSED
    found = f"{bad} of {len(variants)}" if variants else ""
    yield Verdict(
        "kernels that spill or fail to compile", COUNTED if variants else "", "none", found, verdict
    )


def startup_verdicts(stored: Sequence[Result], wanted: dict[str, float]) -> Iterator[Verdict]:
    """Of each format on each device the newest."""
    for key, name in (
        ("extra_gib", "host memory above the quantised size, GiB"),
        ("times_copy", "time to load, in copies"),
    ):
        found: dict[tuple[str, str], float] = {}
        for result, record in _measured(stored, "startup"):
            if record.get(key) is not None:
                found.setdefault((result.device, record["contestant"]), record[key])
        for (device, contestant), value in found.items():
            verdict = MET if value <= wanted[key] else MISSED
            yield Verdict(
                f"start-up, {contestant}: {name}",
                device,
                f"at most {wanted[key]:g}",
                f"{value:.2f}",
                verdict,
            )
        if not found:
            yield Verdict(f"start-up: {name}", "", f"at most {wanted[key]:g}", "", UNMEASURED)


def regressions(stored: Sequence[Result]) -> Iterator[Verdict]:
    """Of each figure on each device the newest, where it is worse than the one before it."""
    history: dict[tuple[str, str], list[tuple[float, bool]]] = {}
    for result in sorted(stored, key=lambda r: r.date):
        for name, value, more in results.figures(result):
            history.setdefault((result.device, name), []).append((value, more))
    for (device, name), values in history.items():
        if len(values) < 2:
            continue
        (last, _), (now, more) = values[-2], values[-1]
        if now < last * (1 - WORSE) if more else now > last * (1 + WORSE):
            yield Verdict(name, device, f"within 5 % of {last:.4g}", f"{now:.4g}", WORSENED)


def guard_verdicts(commands: dict[str, tuple[str, str]]) -> Iterator[Verdict]:
    """Runs what needs no device."""
    for name, *arguments in GUARDS:
        if name not in commands:
            yield Verdict(
                f"fluxfast-bench {name}", "", "exit status 0", "no such command", UNMEASURED
            )
            continue
        module = importlib.import_module(f"fluxfast_bench.{commands[name][0]}")
        with tempfile.TemporaryDirectory() as folder:
            status = module.main([argument.format(folder) for argument in arguments])
        yield Verdict(
            f"fluxfast-bench {name}",
            "",
            "exit status 0",
            str(status),
            MET if status == 0 else MISSED,
        )


def verdicts_of(
    stored: Sequence[Result],
    wanted: dict[str, Any],
    counted: dict[str, list[dict[str, Any]]] | None = None,
) -> list[Verdict]:
    """counted: `results.read_counted`'s."""
    counted = counted or {}
    return [
        *ratio_verdicts(stored, wanted["ratio"], wanted["devices"]),
        *floor_verdicts(stored, wanted["floor"], wanted["devices"]),
        *vram_verdicts(stored, counted, wanted["vram"]),
        *counts_verdicts(counted, wanted["counts"]),
        *startup_verdicts(stored, wanted["startup"]),
        *guard.verdicts(counted.get("quality", []), wanted["quality"]),
        *regressions(stored),
    ]


def table_of(verdicts: Sequence[Verdict]) -> Table:
    table = Table()
    for column in ("figure", "where", "wanted", "found", ""):
        table.add_column(column)
    for line in verdicts:
        table.add_row(
            line.name,
            line.where,
            line.wanted,
            line.found,
            f"[{COLOURS[line.verdict]}]{line.verdict}",
        )
    return table


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fluxfast-bench check",
        description=(
            "Hold stored results against the targets and the runs before them. Exit status 1: "
            "one is missed or worse."
        ),
    )
    parser.add_argument(
        "--ci",
        action="store_true",
        help="also run the guards that need no device: aot, vram, counts",
    )
    targets.add_option(parser)
    parser.add_argument("--results", type=Path, default=results.ROOT, help="default: %(default)s")
    options = parser.parse_args(argv)
    try:
        stored, counted = results.read_all(options.results), results.read_counted(options.results)
        verdicts = verdicts_of(stored, targets.read(options.targets), counted)
    except ValueError as error:
        print(f"fluxfast-bench check: {error}", file=sys.stderr)
        return 1
    if options.ci:
        from fluxfast_bench.main import COMMANDS

        verdicts += guard_verdicts(COMMANDS)
    console = wide_console()
    console.print(table_of(verdicts))
    counts = Counter(line.verdict for line in verdicts)
    console.print(", ".join(f"{counts[verdict]} {verdict}" for verdict in COLOURS), highlight=False)
    return 1 if any(line.red for line in verdicts) else 0
