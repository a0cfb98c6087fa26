"""`fluxfast-bench step`: a whole optimisation step, beside the peers, in turn, in one run.

Forward, backward, clip, optimiser, zero; warm; on random weights, which have no influence on speed.
All contestants of a case have the same shape, adapters, optimiser and recompute policy, unless a
policy is named with a contestant (NAME:POLICY). The first one named is the anchor: it takes part in
every process, and what doesn't fit beside the others is compared through it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from fluxfast.quant import FORMATS
from fluxfast_bench.counted.floor import RECOMPUTE
from fluxfast_bench.options import add_case_options, chosen, chosen_device, wide_console
from fluxfast_bench.progress import Steps
from fluxfast_bench.report import results
from fluxfast_bench.report.conditions import device_name, installed, slug
from fluxfast_bench.run import Run
from fluxfast_bench.shapes import SHAPES, default_shapes
from fluxfast_bench.step import worker
from fluxfast_bench.step.comparison import Comparison, record_of
from fluxfast_bench.step.runner import OPTIMIZERS
from fluxfast_bench.step.worker import CONTESTANTS, Entry, Plan, entry_of
from fluxfast_bench.timing import share_told

CPU_DEFAULT = (
    *("diffusers", "fluxfast", *(f"fluxfast-{name}" for name in FORMATS)),
    *(
        "fluxfast+int8",
        "fluxfast-int8+int8",
        "fluxfast-int4+int8",
        "fluxfast-nf4+int8",
        "fluxfast-fp8_e4m3+e4m3",
    ),
)
# the targets' pairs first, so that a run that is cut has them
GPU_DEFAULT = (
    *(
        "fluxfast-int8+int8+graphs",
        "diffusers-compile",
        "fluxfast-int8+int8",
        "diffusers",
        "fluxfast+graphs",
        "quanto-int8",
    ),
    *(
        "fluxfast-int8+int8+graphs:none",
        "sdnq-int8",
        "fluxfast-int8+int8+tread+graphs",
        "bnb-nf4",
        "fluxfast-nf4+int8+graphs",
    ),
    *(
        "fluxfast+int8+graphs",
        "fluxfast-int4+int8+graphs",
        "fluxfast-int4+int8+streamed",
        "fluxfast+fused+graphs",
    ),
    *("fluxfast-fp8_e4m3+e4m3+graphs", "torchao-fp8", "torchao-int8", "quanto-int4", "quanto-int2"),
)


def table_of(records: Sequence[dict[str, Any]], case: str) -> Table:
    table = Table(title=case)
    table.add_column("contestant", no_wrap=True)
    for column in ("steps/s", "ms", "10 % … 90 %", "peak GiB", "floor", "error"):
        table.add_column(column, justify="right")
    for record in records:
        if "reason" in record:
            table.add_row(record["contestant"], *[""] * 5, Text(record["reason"], style="red"))
            continue
        table.add_row(
            record["contestant"],
            f"{1 / record['seconds']:.3f}",
            f"{record['seconds'] * 1e3:.1f}",
            f"{record['low'] * 1e3:.1f} … {record['high'] * 1e3:.1f}",
            f"{record['peak_gib']:.2f}" if "peak_gib" in record else "-",
            share_told(record, "floor_share") or "-",
            f"{record['relative_error']:.1e}",
        )
    return table


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fluxfast-bench step",
        description=(
            "Measure whole training steps, beside the peers. Exit status 1: one of ours is "
            "wrong or fails."
        ),
    )
    add_case_options(parser)
    parser.add_argument(
        "--contestants", metavar="C,…", help=f"NAME or NAME:POLICY, of {', '.join(CONTESTANTS)}"
    )
    parser.add_argument(
        "--recompute",
        choices=RECOMPUTE,
        help="policy where none is named (default: full; on a CPU none)",
    )
    parser.add_argument(
        "--rank",
        type=int,
        default=16,
        help="of the LoRA on every linear of the blocks (default: %(default)s)",
    )
    parser.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        help="default: adamw8bit on a GPU that has bitsandbytes, else AdamW",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="turns that each contestant gets (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds", type=float, default=1.5, help="of steps at each turn (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, help="at each turn, in the place of --seconds")
    parser.add_argument(
        "--limit", type=float, default=300, help="seconds without an answer that end a contestant"
    )
    parser.add_argument(
        "--one-process", action="store_true", help="measure in this process, for debuggers"
    )
    parser.add_argument(
        "--stored-ceilings", action="store_true", help="take an earlier `ceilings`'s, measure none"
    )
    parser.add_argument(
        "--torch-profile", metavar="DIR", help="leave a trace of two steps of each contestant there"
    )
    parser.add_argument("--results", type=Path, default=results.ROOT, help="default: %(default)s")
    return parser.parse_args(argv)


def default_optimizer(device: torch.device) -> str:
    return "adamw8bit" if device.type == "cuda" and installed("bitsandbytes") else "torch-adamw"


def entries_of(options: argparse.Namespace, device: torch.device) -> list[Entry]:
    recompute = options.recompute or ("none" if device.type == "cpu" else "full")
    default = CPU_DEFAULT if device.type == "cpu" else GPU_DEFAULT
    texts = options.contestants.split(",") if options.contestants else default
    chosen("--contestants", ",".join(text.partition(":")[0] for text in texts), list(CONTESTANTS))
    entries = [entry_of(text, recompute) for text in texts]
    policies = [entry.recompute for entry in entries]
    chosen("--contestants: policy", ",".join(policies), RECOMPUTE)
    return entries


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    try:
        device = chosen_device(options.device)
        shapes = chosen("--shapes", options.shapes, list(SHAPES), default_shapes(device))
        entries = entries_of(options, device)
        for name, number in (("--rounds", options.rounds), ("--steps", options.steps)):
            if number is not None and number < 1:
                raise ValueError(f"{name}: expected 1 or more, got {number}")
    except ValueError as error:
        print(f"fluxfast-bench step: {error}", file=sys.stderr)
        return 1
    console = wide_console()
    run = Run(options.results, device, ["step", *argv])
    journal = run.journal
    models = dict.fromkeys(SHAPES[shape].model for shape in shapes)
    for model in models:
        plan = Plan(
            tuple(shape for shape in shapes if SHAPES[shape].model == model), str(device),
            options.rank,
            options.optimizer or default_optimizer(device), options.rounds, options.seconds,
            options.steps,
            options.torch_profile,
        )  # fmt: skip
        _measure(plan, entries, options, journal)
        records = [r for r in journal.records() if r["case"] in plan.shapes]
        for shape in plan.shapes:
            console.print(
                table_of(
                    [r for r in records if r["case"] == shape],
                    f"{shape}, {run.conditions['device']}",
                )
            )
    records = journal.records()
    run.finish(console)
    return (
        1
        if any(r["ours"] and "reason" in r and r["reason"] != "needs a GPU" for r in records)
        else 0
    )


def _measure(
    plan: Plan, entries: Sequence[Entry], options: argparse.Namespace, journal: results.Journal
) -> None:
    """Measures the entries on the plan's shapes.

    A record is in the journal as soon as it is known, and again when it changes.
    """
    ceilings = _ceilings(plan, options)
    journal.note(ceilings=ceilings)
    written: dict[tuple[str, str], dict[str, Any]] = {}

    def told() -> None:
        outcomes = list(comparison.outcomes.values())
        for shape in plan.shapes:
            for outcome in outcomes:
                record = record_of(outcome, outcomes, plan, shape, ceilings.get(shape, {}))
                key = shape, outcome.entry.key
                if record != written.get(key):
                    written[key] = record
                    journal.record(record)

    # each is built and checked; then all take their turns, but for the first, together
    with Steps(len(entries) + (plan.rounds - 1) * len(plan.shapes)) as steps:
        comparison = Comparison(
            plan,
            entries,
            apart=not options.one_process,
            limit=options.limit,
            told=told,
            began=steps.begin,
        )
        comparison.measure()
    told()


def _ceilings(plan: Plan, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The ceilings by shape: measured, or with --stored-ceilings those of an earlier run.

    A shape is left out where they can't be measured, or none are stored.
    """
    found: dict[str, dict[str, float]] = {}
    if options.stored_ceilings:
        device = slug(device_name(torch.device(plan.device)))
        for result in results.read_all(options.results):
            if result.kind == "ceilings" and result.device == device:
                found |= {
                    shape: rates
                    for shape, rates in result.data.get("ceilings", {}).items()
                    if shape in plan.shapes
                }
        return found
    events = (
        worker.run("ceilings", plan)
        if options.one_process
        else worker.run_apart("ceilings", plan, limit=options.limit)
    )
    return {event[1]: event[2] for event in events if event[0] == "ceilings"}
