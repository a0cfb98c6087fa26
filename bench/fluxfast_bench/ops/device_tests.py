"""`fluxfast-bench tests`: tests in forked processes, each outcome written down as it comes.

Each process runs its share of pytest's tests in a random order, so that a run that is cut short has
tried a bit of everything.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fluxfast_bench.options import chosen_device, print_faults, wide_console
from fluxfast_bench.report import results
from fluxfast_bench.run import Run

# of a failure's traceback, the end; what is written to a pipe at once stays together up to 4 KiB
LONGEST = 2500


class Share:
    """A plugin of pytest: every `of`-th test from the `index`-th on, and what becomes of each."""

    def __init__(self, index: int, of: int, tell: Callable[[dict[str, Any]], object]) -> None:
        self._index, self._of, self._tell = index, of, tell

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        random.Random(0).shuffle(items)
        items[:] = items[self._index :: self._of]
        self._tell({"share": self._index, "tests": len(items)})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            record: dict[str, Any] = {
                "case": "tests",
                "contestant": report.nodeid,
                "ours": True,
                "mode": report.outcome,
                "seconds": round(report.duration, 3),
            }
            if report.failed:
                record["reason"] = report.longreprtext[-LONGEST:]
            self._tell(record)


def run_share(index: int, of: int, words: Sequence[str], pipe: int) -> None:
    """In a process of its own: pytest, which prints nothing; outcomes go into the pipe."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)

    def tell(record: dict[str, Any]) -> None:
        os.write(pipe, json.dumps(record).encode() + b"\n")

    pytest.main(
        [*words, "-n", "0", "-q", "-p", "no:cacheprovider", "--tb=short"],
        plugins=[Share(index, of, tell)],
    )


def start(of: int, words: Sequence[str]) -> int:
    """Starts the shares; the end of a pipe that their outcomes come from, a line of JSON each."""
    reading, writing = os.pipe()
    for index in range(of):
        if os.fork() == 0:
            try:
                os.close(reading)
                run_share(index, of, words, writing)
            finally:
                os._exit(0)
    os.close(writing)
    return reading


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fluxfast-bench tests",
        description="Run tests side by side. Exit status 1: a test failed.",
    )
    parser.add_argument("words", nargs="+", help="pytest's: files, -k …")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--results", type=Path, default=results.ROOT, help="default: %(default)s")
    options, more = parser.parse_known_args(argv)
    if options.jobs < 1:
        print(f"fluxfast-bench tests: --jobs: expected 1 or more, got {options.jobs}",
              file=sys.stderr)  # fmt: skip
        return 1
    # before this process touches the GPU, which would keep its forks from it
    reading = start(options.jobs, [*options.words, *more])
    device = chosen_device(None)
    if device.type == "cuda":
        torch.cuda.init()
    run = Run(options.results, device, ["tests", *argv])
    journal = run.journal
    count = 0
    with os.fdopen(reading) as lines:
        for line in lines:
            record = json.loads(line)
            if "tests" in record:
                count += record["tests"]
            else:
                journal.record(record)
    records, console = journal.records(), wide_console()
    outcomes = Counter(record["mode"] for record in records)
    told = ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items()))
    console.print(f"of {count} tests: {told}")
    run.finish(console)
    return print_faults(
        [f"{r['contestant']}: {r['reason'][-300:]}" for r in records if "reason" in r], console
    )
