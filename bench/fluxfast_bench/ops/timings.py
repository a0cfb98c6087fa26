"""`fluxfast-bench ops`: time each fused op beside eager PyTorch and torch.compile.

An op is first compared with its reference, in values and gradients, and is not timed where that
fails. pytest-benchmark does the timing. On a GPU the clock is the GPU's own, and calls are replayed
as a CUDA graph over inputs that no cache holds, so that only the kernels are timed; on a CPU it is
the wall clock.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from fluxfast_bench.ops import ceilings
from fluxfast_bench.ops.fused_ops import FUSED_OPS
from fluxfast_bench.ops.session import CONTENDERS, Session, Timing
from fluxfast_bench.options import add_case_options, chosen, chosen_device, wide_console
from fluxfast_bench.progress import Steps
from fluxfast_bench.report import results
from fluxfast_bench.run import Run
from fluxfast_bench.shapes import SHAPES, default_shapes
from fluxfast_bench.timing import MOST_OF_COPIES, MOST_OF_PRODUCTS, share_of, share_told


def runs_on(device: torch.device, op: str) -> bool:
    return device.type != "cpu" or not FUSED_OPS[op].cuda_only


def timings_of(
    ops: Sequence[str], shapes: Sequence[str], contenders: Sequence[str], device: torch.device
) -> list[Timing]:
    return [
        Timing(op, shape, mode, contender)
        for shape in shapes
        for op in ops
        if runs_on(device, op)
        for mode in FUSED_OPS[op].modes
        for contender in contenders
    ]


def run_pytest(session: Session, seconds: float) -> str:
    """Runs the session's timings; returns what pytest said."""
    arguments = [
        str(Path(__file__).with_name("timings_pytest.py")),
        # nobody's configuration but this
        *("-c", os.devnull, "-q", "--no-header", "--no-summary", "--capture=sys"),
        *("-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly"),
        *(
            f"--benchmark-max-time={seconds}",
            "--benchmark-min-rounds=5",
            "--benchmark-warmup=on",
            "--benchmark-disable-gc",
        ),
        *("--benchmark-columns=median", "--benchmark-quiet"),
    ]
    if session.device.type == "cuda":
        arguments.append("--benchmark-timer=fluxfast_bench.timing.gpu_clock")
    import pytest

    said = io.StringIO()
    # a worker of pytest-xdist that runs the command in a test: pytest-benchmark takes the variable
    # to mean that this pytest is one as well, and doesn't measure
    worker = os.environ.pop("PYTEST_XDIST_WORKER", None)
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(said):
            pytest.main([*arguments, f"--rootdir={folder}"], plugins=[session])
    finally:
        if worker is not None:
            os.environ["PYTEST_XDIST_WORKER"] = worker
    return said.getvalue()


def records_of(session: Session, measured: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """A record for each timing, with its rate.

    Ours also has its ratios to the others' times and its share of the ceiling.
    """
    by_timing = {Timing(r["op"], r["shape"], r["mode"], r["contender"]): r for r in session.records}
    records = []
    for timing in session.timings:
        head: dict[str, Any] = {
            "case": f"{timing.op} {timing.shape}", "mode": timing.mode,
            "contestant": timing.contender,
            "ours": timing.contender == "fluxfast",
        }  # fmt: skip
        if timing not in by_timing:
            records.append(head | {"reason": session.reasons.get(timing, "was not reached")})
            continue
        found = by_timing[timing]
        case, shape = FUSED_OPS[timing.op], SHAPES[timing.shape]
        moved, flops = case.work(shape, session.dtype.itemsize, timing.mode)
        record = head | {key: found[key] for key in ("seconds", "low", "high", "count")}
        limits = measured[timing.shape]
        if flops:
            rate, ceiling = flops / found["seconds"], limits.get(case.compute, limits["float"])
            record["tflops"], most = round(rate / 1e12, 3), MOST_OF_PRODUCTS
        else:
            rate, ceiling = moved / found["seconds"], limits["copy"]
            record["gb_s"], most = round(rate / 1e9, 3), MOST_OF_COPIES[session.device.type]
        record |= share_of("ceiling_share", rate / ceiling, most)
        if record["ours"]:
            others = [timing._replace(contender=name) for name in CONTENDERS[1:]]
            record["ratios"] = {
                other.contender: round(by_timing[other]["seconds"] / found["seconds"], 4)
                for other in others
                if other in by_timing
            }
        records.append(record)
    return records


def table_of(records: Sequence[dict[str, Any]]) -> Table:
    # where the terminal is narrow, names are folded and figures stay whole
    table = Table(
        Column("case", overflow="fold"), "mode", "contender", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for column in ("µs", "rate", "ceiling", "vs eager", "vs compile"):
        table.add_column(column, justify="right", no_wrap=True)
    for record in records:
        names = record["case"], record["mode"], record["contestant"]
        if "reason" in record:
            table.add_row(*names, Text(record["reason"], style="red"))
            continue
        rate = (
            f"{record['tflops']:.2f} TFLOP/s"
            if "tflops" in record
            else f"{record['gb_s']:.1f} GB/s"
        )
        ratios = record.get("ratios", {})
        shown = [f"{ratios[name]:.2f}" if name in ratios else "" for name in CONTENDERS[1:]]
        table.add_row(
            *names, f"{record['seconds'] * 1e6:.1f}", rate, share_told(record, "ceiling_share"),
            *shown,
        )  # fmt: skip
    return table


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fluxfast-bench ops",
        description="Time the fused ops. Exit status 1: one of them is wrong or fails.",
    )
    add_case_options(parser)
    parser.add_argument("--ops", metavar="OP,…", help=f"of {', '.join(FUSED_OPS)} (default: all)")
    parser.add_argument(
        "--contenders", metavar="C,…", help=f"of {', '.join(CONTENDERS)} (default: all)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.5,
        help="that each timing takes, about (default: %(default)s)",
    )
    parser.add_argument("--verbose", action="store_true", help="show what pytest says")
    parser.add_argument("--results", type=Path, default=results.ROOT, help="default: %(default)s")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    try:
        for module, package in (("pytest", "pytest"), ("pytest_benchmark", "pytest-benchmark")):
            if importlib.util.find_spec(module) is None:
                raise ValueError(f"{package} is not installed: pip install {package}")
        device = chosen_device(options.device)
        shapes = chosen("--shapes", options.shapes, list(SHAPES), default_shapes(device))
        ops = chosen("--ops", options.ops, list(FUSED_OPS))
        contenders = chosen("--contenders", options.contenders, CONTENDERS)
        if options.ops and (unfit := [name for name in ops if not runs_on(device, name)]):
            raise ValueError(f"--ops: {', '.join(unfit)}: on a GPU alone, and this is a CPU")
    except ValueError as error:
        print(f"fluxfast-bench ops: {error}", file=sys.stderr)
        return 1
    run = Run(options.results, device, ["ops", *argv])
    measured = {shape: ceilings.measure(SHAPES[shape], device) for shape in shapes}
    timings = timings_of(ops, shapes, contenders, device)
    # named here, since pytest puts something of its own in its place
    with Steps(len(timings), Console(file=sys.stderr)) as steps:
        session = Session(device, timings, steps.begin)
        said = run_pytest(session, options.seconds)
    if options.verbose:
        print(said)
    records = records_of(session, measured)
    console = wide_console()
    console.print(table_of(records))
    run.journal.note(ceilings=measured)
    for record in records:
        run.journal.record(record)
    run.finish(console)
    return 1 if any("reason" in record for record in records) else 0
