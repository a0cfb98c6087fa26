"""`fluxfast-bench loops`: other trainers' own scripts on tiny models, plain and accelerated.

Each trainer's script is run twice as a user runs it: by itself, and by `python -m fluxfast.dropin`,
which has to run every block fused. It trains a tiny model for a few steps on the CPU. Both have to
tell the same losses and to save the same adapter.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fluxfast.text import wrong_choice
from fluxfast_bench.loops.loop import SAME_LOSS, SAME_WEIGHTS, Prepare, measure, versions_in
from fluxfast_bench.options import chosen, print_faults, wide_console
from fluxfast_bench.progress import Steps
from fluxfast_bench.report import results
from fluxfast_bench.run import Run
from fluxfast_bench.trainers.worker import commit_of

# each trainer's module in `hosts`
LOOPS = {
    "diffusers": "diffusers_script",
    "simpletuner": "simpletuner_train",
    "onetrainer": "onetrainer_train",
    "ai-toolkit": "ai_toolkit_run",
    "sd-scripts": "sd_scripts_train",
    "musubi-tuner": "musubi_train",
}


def cases_of(trainer: str) -> dict[str, Prepare]:
    """What a trainer's script is made to train, and how it is prepared for that."""
    module = importlib.import_module(f"fluxfast_bench.loops.hosts.{LOOPS[trainer]}")
    found: dict[str, Prepare] = module.CASES
    return found


def violations(records: Sequence[dict[str, Any]]) -> list[str]:
    """Scripts that did not run, whose blocks did not all run fused, or that trained otherwise."""
    lines = []
    for record in records:
        what = f"{record['contestant']}, {record['mode']}"
        if "reason" in record:
            lines.append(f"{what}: {record['reason']}")
            continue
        for error, most in (("loss_error", SAME_LOSS), ("weights_error", SAME_WEIGHTS)):
            # a NaN compares as false
            if not record[error] <= most:
                lines.append(f"{what}: {error} is {record[error]:.2g}, at most {most:g}")
        if not 0 < record["calls"] == record["calls_fused"]:
            ran = f"{record['calls_fused']} of {record['calls']}"
            lines.append(f"{what}: {ran} calls of its blocks ran fused")
    return lines


def table_of(records: Sequence[dict[str, Any]]) -> Table:
    table = Table("trainer", "trains")
    for head in ("steps", "last loss", "accelerated", "adapter's error", "calls fused"):
        table.add_column(head, justify="right")
    for r in records:
        if "reason" not in r:
            table.add_row(
                r["contestant"],
                r["mode"],
                str(r["steps"]),
                f"{r['losses'][-1]:.6f}",
                f"{r['losses_accelerated'][-1]:.6f}",
                f"{r['weights_error']:.1g}",
                f"{r['calls_fused']} of {r['calls']}",
            )
    return table


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fluxfast-bench loops",
        description=(
            "Other trainers' own scripts on tiny models, by themselves and by `python -m "
            "fluxfast.dropin`: whether they train the same, on this CPU. Exit status 1: one could "
            "not be run, or trains something else."
        ),
    )
    parser.add_argument(
        "--host-path",
        action="append",
        default=[],
        metavar="TRAINER=FOLDER",
        help=f"a checkout of one of {', '.join(LOOPS)}; may be repeated",
    )
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="TRAINER=FILE",
        help="the Python that has a trainer's packages and fluxfast (default: this one)",
    )
    parser.add_argument("--cases", metavar="C,…", help="of a trainer's (default: all)")
    parser.add_argument("--steps", type=int, default=2, help="default: %(default)s")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="keep what was prepared and trained here"
    )
    parser.add_argument("--results", type=Path, default=results.ROOT, help="default: %(default)s")
    return parser.parse_args(argv)


def paths_of(option: str, given: Sequence[str]) -> dict[str, Path]:
    """The path that each TRAINER=PATH names. Raises ValueError for what is none."""
    found = {}
    for text in given:
        trainer, _, path = text.partition("=")
        if trainer not in LOOPS:
            raise ValueError(wrong_choice(option, trainer, list(LOOPS)))
        if not path or not Path(path).exists():
            raise ValueError(f"{option}: {text!r} names nothing that exists")
        # a virtual environment's Python is a link, and is known by its name
        found[trainer] = Path(path).absolute()
    return found


def main(argv: Sequence[str]) -> int:
    options, console, errors = parse(argv), wide_console(), Console(stderr=True)
    try:
        checkouts = paths_of("--host-path", options.host_path)
        pythons = paths_of("--python", options.python)
        if not checkouts:
            raise ValueError("name a checkout: --host-path TRAINER=FOLDER")
        cases = {
            (trainer, case): prepare
            for trainer in checkouts
            for case, prepare in _chosen_cases(trainer, options.cases).items()
        }
    except ValueError as error:
        errors.print(f"fluxfast-bench loops: {error}", markup=False, soft_wrap=True)
        return 1
    run = Run(options.results, torch.device("cpu"), ["loops", *_without_paths(argv)])
    python_of = {trainer: str(pythons.get(trainer, sys.executable)) for trainer in checkouts}
    # not those of this Python, which are among the run's conditions
    run.journal.note(installed={trainer: versions_in(file) for trainer, file in python_of.items()})
    with tempfile.TemporaryDirectory() as temporary, Steps(len(cases)) as steps:
        root = options.keep.absolute() if options.keep else Path(temporary)
        for (trainer, case), prepare in cases.items():
            steps.begin(f"{trainer}: {case}")
            record: dict[str, Any] = {"case": "tiny", "contestant": trainer, "mode": case}
            record["version"] = commit_of(str(checkouts[trainer]))
            folder = root / f"{trainer}-{case}".replace(" ", "-")
            try:
                record |= measure(
                    prepare, checkouts[trainer], folder, options.steps, python_of[trainer]
                )
            except RuntimeError as error:
                record["reason"] = str(error)
            run.journal.record(record)
    records = run.journal.records()
    console.print(table_of(records))
    run.finish(console)
    return print_faults(violations(records), errors)


def _chosen_cases(trainer: str, asked: str | None) -> dict[str, Prepare]:
    cases = cases_of(trainer)
    return {name: cases[name] for name in chosen("--cases", asked, list(cases))}


def _without_paths(argv: Sequence[str]) -> list[str]:
    """A command line as it is stored: where a checkout lay on a machine helps nobody."""
    return [
        f"{trainer}=…" if (trainer := word.partition("=")[0]) in LOOPS else word for word in argv
    ]
