"""`fluxfast-bench trainers`: other trainers' own models and adapters, plain and accelerated.

Each trainer's code is taken from a checkout that the command line names; diffusers with PEFT is
there always. A small model of the trainer's own class gets the trainer's own adapters twice: left
alone, and accelerated. They have to give the same outputs, the same gradients and, after two steps
of AdamW, the same weights. What of it runs fused is counted, and a forward and backward of each is
timed, in turn; of a program that only draws, a forward. Packages that a trainer imports and that
are not installed are empty ones.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fluxfast.text import wrong_choice
from fluxfast_bench.options import chosen, print_faults, wide_console
from fluxfast_bench.progress import Steps
from fluxfast_bench.report import results
from fluxfast_bench.run import Run
from fluxfast_bench.shapes import SHAPES
from fluxfast_bench.step import worker as processes
from fluxfast_bench.trainers.case import SAME, was_measured, worst_error
from fluxfast_bench.trainers.worker import INSTALLED, TRAINERS, cases_of

# seconds in which a case has to be done
LIMIT = 600.0


def measured(
    trainer: str, folder: str | None, shape: str, rounds: int, steps: Steps
) -> Iterator[dict[str, Any]]:
    """A record for each case of a trainer, with a reason for those that can't be measured."""
    waiting = cases_of(trainer)
    arguments = ("trainers", trainer, folder, shape, rounds)
    for kind, *rest in processes.run_apart(*arguments, limit=LIMIT):
        named = {"case": shape, "contestant": trainer}
        if kind == "start":
            steps.begin(f"{trainer}: {rest[0]}")
        elif kind == "died":
            for case in waiting:
                yield named | {"mode": case, "reason": rest[0]}
        elif kind in ("measured", "failed", "absent"):
            case, found = rest
            waiting.remove(case)
            why = {"failed": "reason", "absent": "absent"}
            yield named | {"mode": case} | (found if kind == "measured" else {why[kind]: found})


def violations(records: Sequence[dict[str, Any]]) -> list[str]:
    """Cases that could not be measured, and those that do not compute what the trainer does."""
    lines = []
    for record in records:
        what = f"{record['contestant']}, {record['mode']}"
        if "reason" in record:
            lines.append(f"{what}: {record['reason']}")
        if not was_measured(record):
            continue
        worst, same = worst_error(record), record.get("same", SAME)
        # a NaN compares as false
        if not record[worst] <= same:
            lines.append(f"{what}: {worst} is {record[worst]:.2g}, at most {same:g}")
    return lines


def table_of(records: Sequence[dict[str, Any]]) -> Table:
    table = Table("trainer", "case")
    for head in ("blocks fused", "linears", "adapters", "error", "plain ms", "ms", "ratio"):
        table.add_column(head, justify="right")
    for r in records:
        if "absent" in r:
            table.add_row(r["contestant"], r["mode"], r["absent"])
        if was_measured(r):
            table.add_row(
                r["contestant"],
                r["mode"],
                *(
                    f"{r[f'{what}_fused']} of {r[what]}"
                    for what in ("blocks", "linears", "adapters")
                ),
                f"{r[worst_error(r)]:.1g}",
                f"{r['plain_seconds'] * 1e3:.0f}",
                f"{r['seconds'] * 1e3:.0f}",
                f"{r['ratio']:.2f}",
            )
    return table


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fluxfast-bench trainers",
        description=(
            "Other trainers' own models and adapters, plain and accelerated: what runs fused, "
            "whether it computes the same, and how fast, on this CPU. Exit status 1: one could not "
            "be measured, or computes something else."
        ),
    )
    parser.add_argument(
        "--host-path",
        action="append",
        default=[],
        metavar="TRAINER=FOLDER",
        help=(
            "a checkout of one of "
            f"{', '.join(name for name in TRAINERS if name not in INSTALLED)}; may be repeated"
        ),
    )
    parser.add_argument("--only", metavar="T,…", help="of those that are given (default: all)")
    parser.add_argument("--shape", default="small-b2", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--results", type=Path, default=results.ROOT, help="default: %(default)s")
    return parser.parse_args(argv)


def checkouts(given: Sequence[str]) -> dict[str, str | None]:
    """The folder of each trainer that can be measured. Raises ValueError for one that is none."""
    found: dict[str, str | None] = dict.fromkeys(INSTALLED)
    for text in given:
        trainer, _, folder = text.partition("=")
        if trainer not in TRAINERS or trainer in INSTALLED:
            allowed = [name for name in TRAINERS if name not in INSTALLED]
            raise ValueError(wrong_choice("--host-path", trainer, allowed))
        if not Path(folder).is_dir() or not folder:
            raise ValueError(f"--host-path: expected {trainer}=FOLDER, got {text!r}: no folder")
        found[trainer] = folder
    return found


def main(argv: Sequence[str]) -> int:
    options, console, errors = parse(argv), wide_console(), Console(stderr=True)
    try:
        folders = checkouts(options.host_path)
        (shape,) = chosen("--shape", options.shape, list(SHAPES))
        trainers = chosen("--only", options.only, list(folders))
    except ValueError as error:
        errors.print(f"fluxfast-bench trainers: {error}", markup=False, soft_wrap=True)
        return 1
    run = Run(options.results, torch.device("cpu"), ["trainers", *_without_folders(argv)])
    with Steps(sum(len(cases_of(trainer)) for trainer in trainers)) as steps:
        for trainer in trainers:
            for record in measured(trainer, folders[trainer], shape, options.rounds, steps):
                run.journal.record(record)
    records = run.journal.records()
    console.print(table_of(records))
    run.finish(console)
    return print_faults(violations(records), errors)


def _without_folders(argv: Sequence[str]) -> list[str]:
    """A command line as it is stored: where a checkout lay on a machine helps nobody."""
    names = "|".join(name for name in TRAINERS if name not in INSTALLED)
    # as a word of its own, or in that of its option
    return [re.sub(rf"(^|=)({names})=.*", r"\1\2=…", word) for word in argv]
