"""What the made tables have in common: Markdown, and a line on how their figures came about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fluxfast_bench.machine_load import QUIET
from fluxfast_bench.report.results import Result


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """The first `left` columns are aligned to the left, the others, numbers, to the right."""
    lines = [head, ["---" if i < left else "---:" for i in range(len(head))], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def versions_of(run: dict[str, Any]) -> str:
    """Versions, commit and date of a run, as its conditions have them."""
    names = [name for name in ("torch", "diffusers", "peft") if name in run["versions"]]
    versions = ", ".join(f"{name} {run['versions'][name]}" for name in names)
    return f"{versions}; {_commit_and_date(run)}"


def _commit_and_date(run: dict[str, Any]) -> str:
    return f"{run['commit']}, {run['date'][:10]}"


def made_by(run: dict[str, Any]) -> str:
    """The same, and the command that was run."""
    return f"{versions_of(run)}: `{run['command']}`"


def _device_of(run: dict[str, Any]) -> str:
    words = [run["device"]]
    if (others := run.get("others", 0.0)) > QUIET:
        words.append(f"a busy machine (other programs took {others:.1f} cores)")
    if gpu := run.get("gpu"):
        clocks = f"SM clock {gpu['clocks.sm']} of {gpu['clocks.max.sm']} MHz"
        words.append(f"driver {gpu['driver_version']}, {clocks}")
    return ", ".join(words)


def conditions_of(result: Result) -> str:
    """The device that a run was measured on, a GPU's driver and clocks, versions, commit, date."""
    run = result.data["conditions"]
    return f"{_device_of(run)}, {versions_of(run)}"


def machine_of(result: Result) -> str:
    """The same without versions, of a run in other Pythons than the one that stored it."""
    run = result.data["conditions"]
    return f"{_device_of(run)}; {_commit_and_date(run)}"


def conditions_line(result: Result) -> str:
    """The same with the command, and whether the run was cut short."""
    run = result.data["conditions"]
    return f"{_device_of(run)}, {made_by(run)}{' (cut short)' if result.cut else ''}"
