"""`fluxfast-bench profile`: a step's time summed up by kernel, without a trace.

Of each kernel: how often it runs in a step, and how long in all; of the step: what it takes, and
how much of that the device was at work. On a CPU the same of torch's operations.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity

from fluxfast_bench.options import add_case_options, chosen, chosen_device, wide_console
from fluxfast_bench.progress import in_turn
from fluxfast_bench.report import results
from fluxfast_bench.run import Run
from fluxfast_bench.shapes import SHAPES, default_shapes
from fluxfast_bench.step.runner import STEPS_BEFORE_REPLAY, Runner, free
from fluxfast_bench.step.worker import CONTESTANTS, WARM_STEPS, Entry, Plan, entry_of
from fluxfast_bench.timing import time_each

STEPS = 2
# a kernel's name is as long as its template arguments
LONGEST = 100
# the most kernels that a table shows; all are stored
SHOWN = 40


def short(name: str) -> str:
    """A kernel's name without what fills lines."""
    return re.sub(r"\s+", " ", name.removeprefix("void "))[:LONGEST]


def sums(runner: Runner, device: torch.device) -> dict[str, tuple[float, float]]:
    """Of each kernel in a step: how often, and how many seconds in all; the longest first."""
    activities = [ProfilerActivity.CPU] if device.type == "cpu" else [ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(STEPS):
            runner.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    found: dict[str, tuple[float, float]] = {}
    for event in profile.key_averages():
        taken = event.self_cpu_time_total if device.type == "cpu" else event.self_device_time_total
        if taken > 0:
            count, seconds = found.get(short(event.key), (0.0, 0.0))
            found[short(event.key)] = count + event.count / STEPS, seconds + taken / STEPS / 1e6
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def profile_entry(entry: Entry, plan: Plan, journal: results.Journal) -> None:
    """Records of a contestant on each of the plan's shapes."""
    device, setup = torch.device(plan.device), plan.setup(entry.recompute)
    runner = Runner(entry.contestant, setup)
    for shape in setup.shapes:
        runner.begin(shape)
        for _ in range(WARM_STEPS + (STEPS_BEFORE_REPLAY if entry.contestant.graphs else 0)):
            runner.step()
        step = sorted(time_each(runner.step, 3, device))[1]
        found = sums(runner, device)
        base = {"case": shape.name, "contestant": entry.key, "ours": entry.contestant.ours}
        busy = sum(seconds for _, seconds in found.values())
        launches = sum(count for count, _ in found.values())
        journal.record(
            {**base, "mode": "step", "seconds": step, "busy_seconds": busy, "count": launches}
        )
        for name, (count, seconds) in found.items():
            journal.record({**base, "mode": name, "seconds": round(seconds, 7), "count": count})


def tables_of(records: Sequence[dict[str, Any]]) -> list[Table]:
    tables = []
    for case, contestant in dict.fromkeys((r["case"], r["contestant"]) for r in records):
        of = [r for r in records if (r["case"], r["contestant"]) == (case, contestant)]
        step = next(r for r in of if r["mode"] == "step")
        title = (
            f"{case}, {contestant}: {step['seconds'] * 1e3:.1f} ms, "
            f"{step['busy_seconds'] * 1e3:.1f} of them in kernels"
        )
        table = Table("kernel", "times", "ms", "share", title=title, title_justify="left")
        for r in [r for r in of if r["mode"] != "step"][:SHOWN]:
            share = r["seconds"] / max(step["busy_seconds"], 1e-12)
            table.add_row(r["mode"], f"{r['count']:g}", f"{r['seconds'] * 1e3:.2f}", f"{share:.1%}")
        tables.append(table)
    return tables


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fluxfast-bench profile",
        description="Sum up a step's time by kernel. Exit status 1: a contestant fails.",
    )
    add_case_options(parser)
    parser.add_argument(
        "--contestants", metavar="C,…", default="fluxfast-int8+int8", help="default: %(default)s"
    )
    parser.add_argument(
        "--recompute",
        default="full",
        help="where a contestant names no policy (default: %(default)s)",
    )
    parser.add_argument("--results", type=Path, default=results.ROOT, help="default: %(default)s")
    options = parser.parse_args(argv)
    try:
        device = chosen_device(options.device)
        shapes = chosen("--shapes", options.shapes, list(SHAPES), default_shapes(device))
        texts = options.contestants.split(",")
        chosen(
            "--contestants", ",".join(text.partition(":")[0] for text in texts), list(CONTESTANTS)
        )
    except ValueError as error:
        print(f"fluxfast-bench profile: {error}", file=sys.stderr)
        return 1
    run = Run(options.results, device, ["profile", *argv])
    journal = run.journal
    plan = Plan(tuple(shapes), str(device), 16, "torch-adamw", rounds=1, seconds=0)
    failed = False
    for text in in_turn(texts):
        entry = entry_of(text, options.recompute)
        if (reason := entry.contestant.missing(device)) is not None:
            print(f"{entry.key}: {reason}", file=sys.stderr)
            failed = failed or reason != "needs a GPU"
            continue
        profile_entry(entry, plan, journal)
        free(device)
    console = wide_console()
    for table in tables_of(journal.records()):
        console.print(table)
    run.finish(console)
    return int(failed)
