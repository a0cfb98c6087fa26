"""What `fluxfast-train doctor` found, as tables and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fluxfast.config.precision_words import in_words
from fluxfast.doctor.checks import Outcome
from fluxfast.doctor.scope import Scope
from fluxfast.doctor.ways import NO_NATIVE_BUILD
from fluxfast.ops import dispatch


def as_json(
    machine: Mapping[str, str], scope: Scope, outcomes: Sequence[Outcome], seconds: float
) -> dict[str, Any]:
    """Everything that a bug report needs."""
    import torch

    return {
        "machine": dict(machine),
        "threads": torch.get_num_threads(),
        "scope": scope.as_json(),
        "seconds": round(seconds, 1),
        "passed": sum(outcome.status == "pass" for outcome in outcomes),
        "failed": [outcome.name for outcome in outcomes if outcome.status == "fail"],
        "checks": [outcome.as_json() for outcome in outcomes],
    }


def show(
    console: Console,
    machine: Mapping[str, str],
    outcomes: Sequence[Outcome],
    seconds: float,
    note: str,
) -> None:
    """Print the machine, a line for each check, the rates, and what to do about failures."""
    import torch

    def say(text: str, style: str = "") -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True, style=style)

    say(
        f"{machine['device']}, driver {machine['driver']}, torch {machine['torch']}, Triton "
        f"{machine['triton']}"
    )
    say(f"fluxfast {machine['fluxfast']}; {_native_text()}; {torch.get_num_threads()} threads")
    compared = [
        o for o in outcomes if o.status == "fail" or (o.status == "pass" and o.error is not None)
    ]
    rates = [o for o in outcomes if o.status == "pass" and o.error is None and o.rate is not None]
    if compared:
        console.print(_checks_table(compared))
    if rates:
        console.print(_rates_table(rates))
    skipped: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.status == "not checked":
            skipped.setdefault(outcome.cause, []).append(outcome.name)
    for cause, names in skipped.items():
        say(in_words(f"not checked: {', '.join(names)}: {cause}"))
    for outcome in outcomes:
        if outcome.note:
            say(in_words(f"· {outcome.name}: {outcome.note}"))
    failed = [outcome for outcome in outcomes if outcome.status == "fail"]
    for outcome in failed:
        say(in_words(f"FAILED {outcome.name}: {outcome.cause}"), style="bold red")
        if outcome.way_out:
            say(f"  {outcome.way_out}")
    passed = sum(outcome.status == "pass" for outcome in outcomes)
    say(
        f"{passed} passed, {len(failed)} failed, {sum(map(len, skipped.values()))} not checked, "
        f"in {seconds:.1f} s"
    )
    if failed:
        say(
            "training minds this: `auto` passes over what failed. Please report it with the "
            "output of --json"
        )
    if note:
        say(f"! {note}")


def _native_text() -> str:
    if not dispatch.HAS_NATIVE:
        return NO_NATIVE_BUILD
    native = dispatch.native
    return f"the native module uses {native.cpu_isa()} of {', '.join(native.cpu_isas())}"


def _checks_table(outcomes: Sequence[Outcome]) -> Table:
    table = Table()
    for column in ("check", "by"):
        table.add_column(column)
    for column in ("", "error", "allowed", "rate"):
        table.add_column(column, justify="right", no_wrap=True)
    for outcome in outcomes:
        failed = outcome.status == "fail"
        error = "" if outcome.error is None else f"{outcome.error:.1e}"
        bound = "" if outcome.bound is None else f"{outcome.bound:.1e}"
        status = Text("FAIL" if failed else "pass", style="bold red" if failed else "green")
        # names end in the implementation, in brackets
        name, _, by = outcome.name.partition(" (")
        table.add_row(
            Text(in_words(name)),
            Text(by.removesuffix(")")),
            status,
            error,
            bound,
            rate_text(outcome.rate, outcome.unit),
        )
    return table


def _rates_table(outcomes: Sequence[Outcome]) -> Table:
    table = Table()
    table.add_column("rate")
    for column in ("measured", "plan reckons with", "of it"):
        table.add_column(column, justify="right", no_wrap=True)
    for outcome in outcomes:
        share = (
            ""
            if not outcome.assumed or outcome.rate is None
            else f"{outcome.rate / outcome.assumed:.0%}"
        )
        assumed = rate_text(outcome.assumed, outcome.unit)
        table.add_row(
            Text(in_words(outcome.name)), rate_text(outcome.rate, outcome.unit), assumed, share
        )
    return table


def rate_text(rate: float | None, unit: str) -> str:
    """A rate in the unit that is usual for it."""
    if rate is None or not math.isfinite(rate):
        return ""
    return f"{rate / 1e9:,.1f} GB/s" if unit == "B/s" else f"{rate / 1e12:,.2f} TFLOP/s"
