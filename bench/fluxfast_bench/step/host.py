"""`fluxfast-bench host`: how long Python takes to ask a GPU for one training step.

No GPU is needed: FLUX.1's 57 blocks, narrow and with few tokens, run on CPU tensors, and our
kernels' launches return at once. What is left is our own Python and torch's small operations. A
step can't be faster than that, unless its launches are replayed as CUDA graphs. What Triton's
launcher and the driver take for a launch comes on top. diffusers + PEFT is beside it for scale: its
operations really run, on tensors of next to nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from fluxfast.ops.device import pretend
from fluxfast_bench.options import chosen, wide_console
from fluxfast_bench.progress import in_turn
from fluxfast_bench.report import results
from fluxfast_bench.run import Run
from fluxfast_bench.shapes import Shape
from fluxfast_bench.step.contestants import Setup
from fluxfast_bench.step.runner import Runner
from fluxfast_bench.step.worker import CONTESTANTS

DROPOUT = replace(CONTESTANTS["fluxfast-int8+int8"], name="fluxfast-int8+int8+dropout", dropout=0.1)
HOSTS = CONTESTANTS | {DROPOUT.name: DROPOUT}
DEFAULT = (
    "diffusers",
    "fluxfast",
    "fluxfast-int8+int8",
    "fluxfast-nf4+int8",
    "fluxfast-int8+int8+streamed",
    DROPOUT.name,
)
# FLUX.1's blocks with two heads
NARROW = {"attention_head_dim": 64, "num_attention_heads": 2, "axes_dims_rope": (8, 28, 28)}
SIDE, TXT, RANK = 2, 4, 16
# of a record, what is counted
COUNTED = ("launches", "us_a_launch")
# launch plans take over from the third step on
WARM_STEPS, STEPS = 3, 15


def no_launch(kernel: Any, args: tuple[Any, ...], numbers: Mapping[str, Any]) -> None:
    """In the place of a launch: what is measured is the way to it."""


def launches_nothing() -> AbstractContextManager[None]:
    """Our ops run on CPU tensors as they would on a Hopper GPU, up to the launch."""
    return pretend("sm_90", no_launch)


def measure(name: str, recompute: str) -> dict[str, Any]:
    """Seconds of a forward and of a backward, the median of several, and how much they launch."""
    contestant = HOSTS[name]
    shape = Shape("flux, two heads", "flux", SIDE, TXT, 1).with_model(**NARROW)
    # as on a GPU: a thread has the modulation ready
    runner = Runner(
        contestant, Setup((shape,), recompute, RANK, "torch-adamw", torch.device("cpu"), ahead=True)
    )
    forwards, backwards = [], []
    with launches_nothing() if contestant.ours else ExitStack():
        for step in range(WARM_STEPS + STEPS):
            begun = time.perf_counter()
            loss = runner.loss()
            halfway = time.perf_counter()
            runner.backward(loss)
            if step >= WARM_STEPS:
                forwards.append(halfway - begun)
                backwards.append(time.perf_counter() - halfway)
            runner.optimizer.zero_grad(set_to_none=True)
    forward, backward = statistics.median(forwards), statistics.median(backwards)
    launches = count_launches(runner) if contestant.ours else None
    return {
        "case": "57 blocks",
        "contestant": f"{name}:{recompute}",
        "ours": contestant.ours,
        "forward_seconds": round(forward, 5),
        "backward_seconds": round(backward, 5),
        "seconds": round(forward + backward, 5),
        "launches": launches,
        "us_a_launch": launches and round(1e6 * (forward + backward) / launches, 2),
    }


def count_launches(runner: Runner) -> int:
    """How many of our kernels a step launches; torch's own are not among them."""
    launched: list[Any] = []
    with pretend("sm_90", lambda kernel, args, numbers: launched.append(kernel)):
        runner.backward(runner.loss())
    runner.optimizer.zero_grad(set_to_none=True)
    return len(launched)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fluxfast-bench host", description=__doc__.split("\n\n")[1]
    )
    parser.add_argument("--contestants", metavar="C,…", help=f"default: {','.join(DEFAULT)}")
    parser.add_argument(
        "--recompute", choices=("none", "full"), default="full", help="default: %(default)s"
    )
    parser.add_argument("--results", type=Path, default=results.ROOT, help="default: %(default)s")
    options = parser.parse_args(argv)
    try:
        names = chosen("--contestants", options.contestants, list(HOSTS), DEFAULT)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    run = Run(options.results, torch.device("cpu"), ["host", *argv])
    journal = run.journal
    for name in in_turn(names):
        journal.record(measure(name, options.recompute))
    records = journal.records()
    table = Table(
        "contestant",
        "forward",
        "backward",
        "a step, ms",
        "launches",
        "µs a launch",
        title="time of the host, one thread",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for record in records:
        times = (record[key] for key in ("forward_seconds", "backward_seconds", "seconds"))
        counted = ("" if record[key] is None else str(record[key]) for key in COUNTED)
        table.add_row(record["contestant"], *(f"{1000 * t:.1f}" for t in times), *counted)
    console = wide_console()
    console.print(table)
    run.finish(console)
    return 0
