"""`fluxfast-bench prewarm`: compile the kernels of training steps into Triton's cache.

The launches are recorded from steps on meta tensors. Many processes compile them, by Triton's JIT
itself for a mock driver (`mock_gpu`), so that a run on the GPU finds each kernel under the key that
it asks for. Where there is no GPU, this shows that the installed Triton compiles them all.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fluxfast_bench.counted.compilers import SHARED_LIMITS, Compilers
from fluxfast_bench.counted.floor import RECOMPUTE
from fluxfast_bench.counted.launches import Launch, compile_launch, prepare_jit
from fluxfast_bench.counted.meta_step import fluxfast_model, forward_backward, inputs_of, recorded
from fluxfast_bench.options import chosen, print_faults, wide_console
from fluxfast_bench.progress import Steps
from fluxfast_bench.report import results
from fluxfast_bench.run import Run
from fluxfast_bench.shapes import SHAPES, Shape
from fluxfast_bench.step.contestants import Contestant
from fluxfast_bench.step.ours import CONTESTANTS
from fluxfast_bench.step.runner import engine_of
from fluxfast_kernels.launch import reads_transposed

OURS = {contestant.name: contestant for contestant in CONTESTANTS}
DEFAULT = (
    *(
        "fluxfast-int8+int8",
        "fluxfast",
        "fluxfast+fused",
        "fluxfast-nf4+int8",
        "fluxfast-int4+int8",
    ),
    *(
        "fluxfast-int4+int8+streamed",
        "fluxfast-fp8_e4m3+e4m3",
        "fluxfast-int8+int8+tread",
        "fluxfast-int8+int8+lokr",
        "fluxfast+lokr",
    ),
)
DEFAULT_SHAPES = ("1024px-b1", "512px-b1")


def launches_of(contestant: Contestant, shape: Shape, recompute: str, target: str) -> set[Launch]:
    """What a full step of one of ours launches on a GPU of that target.

    It is recorded from a shallow model, which launches the same as a deep one.
    """
    shape = shape.shallow() if contestant.route is None else shape
    with engine_of(contestant):
        model = fluxfast_model(
            shape,
            adapters=torch.bfloat16,
            format=None if contestant.storage == "bf16" else contestant.storage,
            compute=contestant.compute,
            recompute=recompute,
            # as `step.ours` has it: a streamed block's codes are there in one order only
            transposed_codes=(
                contestant.transposes and not contestant.streamed and reads_transposed(target)
            ),
            target=target,
            adapter=contestant.adapter,
        )
        if contestant.route is not None:
            model.set_routes([contestant.route.as_config()])
        inputs = inputs_of(shape)
        return set(recorded(lambda: forward_backward(model, inputs), target))


def compile_all(
    launches: Sequence[Launch],
    target: str,
    jobs: int,
    journal: results.Journal,
    console: Console,
    cache: str = "",
) -> list[dict[str, Any]]:
    """Every launch's kernel into the cache; the records, which are in the journal as they come."""
    with (
        Compilers(jobs, prepare_jit, (cache, target)) as compilers,
        Steps(len(launches), console) as steps,
    ):
        for launch, found in compilers.each(compile_launch, launches):
            found = found or {"reason": "the compiler crashed"}
            journal.record({"case": target, "contestant": str(launch), "ours": True, **found})
            steps.begin(f"compiled {launch}")
    return journal.records()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fluxfast-bench prewarm",
        description=(
            "Compile what training steps launch into Triton's cache. Exit status 1: a kernel "
            "failed."
        ),
    )
    parser.add_argument("--contestants", metavar="C,…", help=f"default: {','.join(DEFAULT)}")
    parser.add_argument("--shapes", metavar="S,…", help=f"default: {','.join(DEFAULT_SHAPES)}")
    parser.add_argument(
        "--recompute", metavar="P,…", default="full,none", help="policies (default: %(default)s)"
    )
    parser.add_argument(
        "--target",
        help=f"of {', '.join(SHARED_LIMITS)} (default: the GPU's own; without one sm_90)",
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)"
    )
    parser.add_argument(
        "--cache",
        default="",
        metavar="DIR",
        help="Triton's (default: TRITON_CACHE_DIR, or its own)",
    )
    parser.add_argument("--results", type=Path, default=results.ROOT, help="default: %(default)s")
    return parser.parse_args(argv)


def own_target() -> str:
    """The GPU's, as a key of AOT_TARGETS; sm_90 where there is none."""
    from fluxfast_kernels.launch import arch_key

    return arch_key(torch.device("cuda")) if torch.cuda.is_available() else "sm_90"


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    try:
        names = chosen("--contestants", options.contestants, list(OURS), DEFAULT)
        shapes = chosen("--shapes", options.shapes, list(SHAPES), DEFAULT_SHAPES)
        policies = chosen("--recompute", options.recompute, RECOMPUTE)
        (target,) = chosen("--target", options.target or own_target(), list(SHARED_LIMITS))
        if options.jobs < 1:
            raise ValueError(f"--jobs: expected 1 or more, got {options.jobs}")
    except ValueError as error:
        print(f"fluxfast-bench prewarm: {error}", file=sys.stderr)
        return 1
    run = Run(options.results, torch.device("cpu"), ["prewarm", *argv])
    journal = run.journal
    wanted: set[Launch] = set()
    for name in names:
        for shape in shapes:
            for recompute in policies:
                wanted |= launches_of(OURS[name], SHAPES[shape], recompute, target)
    # the longest first: the wide products take seconds
    ordered = sorted(wanted, key=lambda launch: ("matmul" not in launch.kernel, str(launch)))
    begun = time.perf_counter()
    records = compile_all(
        ordered, target, options.jobs, journal, Console(stderr=True), options.cache
    )
    console = wide_console()
    console.print(
        f"{len(records)} kernels for {target} in {time.perf_counter() - begun:.1f} s, "
        f"{options.jobs} processes"
    )
    run.finish(console)
    return print_faults(
        [f"{r['contestant']}: {r['reason']}" for r in records if "reason" in r], console
    )
