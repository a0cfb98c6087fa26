"""`fluxfast-bench aot`: compile every Triton kernel ahead of time, and see what became of it.

No GPU is needed. The figures are stored as JSON, one variant a line. A run of some ops or targets
leaves the lines of the others alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import fluxfast_kernels
from fluxfast.files import write_atomic
from fluxfast_bench.counted.compilers import (
    SHARED_LIMITS,
    Compiled,
    Compilers,
    Task,
    prepare_worker,
)
from fluxfast_bench.options import chosen, print_faults
from fluxfast_bench.progress import Steps
from fluxfast_bench.report.conditions import commit
from fluxfast_bench.report.results import ROOT
from fluxfast_bench.run import told_written

Results = dict[Task, Compiled]
# every variant that there is of an op for a target
Known = dict[tuple[str, str], list[Task]]


def op_names() -> list[str]:
    """The modules of fluxfast_kernels that have something to compile ahead: one an op.

    They are found in their sources, because only workers may import Triton.
    """
    sources = (path for folder in fluxfast_kernels.__path__ for path in Path(folder).glob("*.py"))
    return sorted(p.stem for p in sources if "\ndef aot_cases(" in p.read_text(encoding="utf-8"))


def spread(tasks: Sequence[Task], count: int) -> list[Task]:
    """`count` of the tasks (all, where there are fewer), at equal distances."""
    count = min(count, len(tasks))
    return [tasks[(2 * i + 1) * len(tasks) // (2 * count)] for i in range(count)]


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote. Raises ValueError for a file that holds something else."""
    if not path.exists():
        return {"runs": {}, "variants": []}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {"runs": dict(stored["runs"]), "variants": list(stored["variants"])}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not a result of `fluxfast-bench aot` ({error}); remove it or name another "
            "--out"
        ) from None


def merge(
    stored: Mapping[str, Any], results: Results, known: Known, run: Mapping[str, str]
) -> dict[str, Any]:
    """The stored variants with the compiled ones in their place.

    Variants that no longer exist are left out: those of ops that are gone, and those that `known`,
    which lists every variant of an op for a target, does not have.
    """
    ops = op_names()
    variants = {}
    for line in stored["variants"]:
        task = Task(line["op"], line["variant"], line["target"])
        if task.op in ops and task in known.get((task.op, task.target), [task]):
            variants[task] = line
    for task, compiled in results.items():
        figures = {key: value for key, value in asdict(compiled).items() if value is not None}
        variants[task] = task._asdict() | figures | {"run": run["date"]}
    runs = stored["runs"] | {run["date"]: run}
    used = {line["run"] for line in variants.values()}
    return {
        "runs": {date: runs[date] for date in sorted(runs) if date in used},
        "variants": [variants[task] for task in sorted(variants)],
    }


def write(path: Path, merged: Mapping[str, Any]) -> None:
    runs = ",\n".join(
        f"  {json.dumps(date)}: {json.dumps(run)}" for date, run in merged["runs"].items()
    )
    lines = ",\n".join(f"  {json.dumps(line)}" for line in merged["variants"])
    write_atomic(path, f'{{\n"runs": {{\n{runs}\n}},\n"variants": [\n{lines}\n]\n}}\n'.encode())


def table_of(results: Results) -> Table:
    """How many variants each op has for each target, how many failed, and the largest figures."""
    table = Table()
    for column in ("op", "target"):
        table.add_column(column, no_wrap=True)
    for column in ("variants", "failed", "registers", "spills", "shared"):
        table.add_column(column, justify="right")
    for op, target in sorted({(task.op, task.target) for task in results}):
        group = [
            compiled for task, compiled in results.items() if (task.op, task.target) == (op, target)
        ]
        failed = sum(c.error is not None for c in group)
        figures = [[getattr(c, name) for c in group] for name in ("registers", "spills", "shared")]
        largest = [max((n for n in column if n is not None), default="-") for column in figures]
        table.add_row(op, target, *map(str, (len(group), failed, *largest)))
    return table


def compile_all(
    ops: Sequence[str], targets: Sequence[str], count: int | None, jobs: int, console: Console
) -> tuple[Results, Known]:
    """The results, and what there is of these ops for these targets; `count` as in --sample."""
    known: Known = {(op, target): [] for op in ops for target in targets}
    # Windows can't remove what a dying worker still has open
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache,
        Compilers(jobs, prepare_worker, (cache,)) as compilers,
        Steps(1, console) as steps,
    ):
        steps.begin("listing kernels")
        for task in (task for op in ops for task in compilers.tasks(op) if task.target in targets):
            known[task.op, task.target].append(task)
        chosen = [
            task
            for group in known.values()
            for task in (group if count is None else spread(group, count))
        ]
        results = {}
        for task, compiled in compilers.compile(chosen):
            results[task] = compiled
            steps.begin(f"compiled {task.op} {task.target}", total=len(chosen) + 1)
    return results, known


def report(results: Results, console: Console) -> int:
    """Prints the table and what is wrong; returns the exit status."""
    console.print(table_of(results))
    bad = [(task, c) for task, c in sorted(results.items()) if c.error is not None or c.spills]
    return print_faults(
        [f"{t.op} {t.variant} {t.target}: {c.error or f'spills {c.spills}'}" for t, c in bad],
        console,
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fluxfast-bench aot",
        description=(
            "Compile the Triton kernels for GPUs that need not be there. Exit status 1: one "
            "failed or spills."
        ),
    )
    parser.add_argument(
        "--targets", metavar="T,…", help=f"of {', '.join(SHARED_LIMITS)} (default: all)"
    )
    parser.add_argument("--ops", metavar="OP,…", help=f"of {', '.join(op_names())} (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "aot.json", help="default: %(default)s")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)"
    )
    parser.add_argument(
        "--sample", type=int, metavar="N", help="only N variants an op and target, evenly spread"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    try:
        if importlib.util.find_spec("triton") is None:
            raise ValueError("Triton is not installed: pip install triton")
        for option, number in (("--jobs", options.jobs), ("--sample", options.sample)):
            if number is not None and number < 1:
                raise ValueError(f"{option}: expected 1 or more, got {number}")
        targets = chosen("--targets", options.targets, list(SHARED_LIMITS))
        ops = chosen("--ops", options.ops, op_names())
        stored = read(options.out)
    except ValueError as error:
        print(f"fluxfast-bench aot: {error}", file=sys.stderr)
        return 1
    run = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "triton": version("triton"),
        "command": shlex.join(["fluxfast-bench", "aot", *argv]),
    }
    results, known = compile_all(ops, targets, options.sample, options.jobs, Console(stderr=True))
    write(options.out, merge(stored, results, known, run))
    console = Console()
    told_written(options.out, console)
    return report(results, console)
