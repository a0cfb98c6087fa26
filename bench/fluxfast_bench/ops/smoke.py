"""`fluxfast-bench smoke`: compare every kernel that a step launches with fp32 on the device.

    attention     PyTorch's back ends, forward and backward, at each shape's length, with operands
                  laid out as a block has them
    op            each fused op, values and gradients
    a contestant  a shallow model's prediction and gradients against diffusers + PEFT in fp32: it
                  launches what a deep one does, at the same sizes

What fails is named. The checks run in a process that a fault of the device may kill: the remaining
ones get another.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from fluxfast.model.graphs import what_failed
from fluxfast.ops.attention import attention, attention_ref
from fluxfast_bench.ops.fused_ops import FUSED_OPS, PRODUCT_ROUNDING
from fluxfast_bench.ops.session import Session, Timing, WrongOp
from fluxfast_bench.options import add_case_options, chosen, chosen_device, wide_console
from fluxfast_bench.progress import Steps
from fluxfast_bench.report import results
from fluxfast_bench.run import Run
from fluxfast_bench.shapes import SHAPES, Shape, default_shapes
from fluxfast_bench.step import worker
from fluxfast_bench.step.contestants import Setup
from fluxfast_bench.step.runner import WrongResult, free, verify
from fluxfast_bench.step.worker import CONTESTANTS, Event

DEFAULT = (
    *(
        "fluxfast-int8+int8",
        "fluxfast-int8+int8+graphs",
        "fluxfast",
        "fluxfast+graphs",
        "fluxfast+library",
    ),
    *(
        "fluxfast-nf4+int8",
        "fluxfast-int4+int8",
        "fluxfast-fp8_e4m3+e4m3",
        "fluxfast-int8",
        "fluxfast-nf4",
        "fluxfast-int4",
    ),
    *("fluxfast-int4+int8+streamed",),
)
ON_GPU, ON_CPU = ("cudnn", "flash", "efficient"), ("cpu", "native")
RANK = 16


def names_of(contestants: Sequence[str], device: torch.device) -> list[str]:
    """The checks on one shape, what everything else is made of first."""
    backends = ON_CPU if device.type == "cpu" else ON_GPU
    ops = [name for name, case in FUSED_OPS.items() if device.type != "cpu" or not case.cuda_only]
    able = [name for name in contestants if CONTESTANTS[name].missing(device) is None]
    return [*(f"attention:{name}" for name in backends), *(f"op:{name}" for name in ops), *able]


def check(name: str, shape: Shape, device: torch.device) -> float:
    """The relative error. Raises WrongResult, WrongOp, or whatever the device does."""
    kind, _, of = name.partition(":")
    if kind == "attention":
        return _attention_error(of, shape, device)
    if kind == "op":
        timing = Timing(of, shape.name, "forward", "fluxfast")
        return Session(device, [timing]).check(timing)
    return verify(CONTESTANTS[name], Setup((shape,), "full", RANK, "torch-adamw", device))


def _attention_error(backend: str, shape: Shape, device: torch.device) -> float:
    """The largest relative error of a back end's output and gradients.

    v is a slice of q, k and v side by side, and dout a slice of a wider tensor, as in a block.
    """
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    # two heads tell as much as all of them, and leave room for the scores of the reference
    heads, dim = min(shape.heads, 2), shape.head_dim

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    q, k = (randn(shape.batch, shape.tokens, heads, dim) for _ in range(2))
    v = randn(shape.batch, shape.tokens, 3 * heads, dim)[:, :, 2 * heads :]
    dout = randn(shape.batch, shape.tokens, 5 * heads, dim)[:, :, :heads]
    found = []
    for run, wide in (
        (lambda *qkv: attention(*qkv, backend=backend), dtype),
        (attention_ref, torch.float32),
    ):
        inputs = [x.to(wide).detach().requires_grad_() for x in (q, k, v)]
        out = run(*inputs)
        found.append([out.detach(), *torch.autograd.grad(out, inputs, dout.to(wide))])
    errors = [
        float((a.double() - b.double()).norm() / b.double().norm())
        for a, b in zip(*found, strict=True)
    ]
    bound = PRODUCT_ROUNDING[dtype]
    # a NaN compares as false
    if not all(error <= bound for error in errors):
        raise WrongResult(
            f"wrong: relative errors {[f'{e:.2g}' for e in errors]}, where rounding explains "
            f"{bound:g}"
        )
    return max(errors)


def checked(
    names: Sequence[str], shape: str, device_name: str, send: Callable[[Event], object]
) -> None:
    """A worker's job: runs the checks and sends ("start", name) before each.

    After it comes ("checked", name, seconds, error) or ("failed", name, seconds, reason).
    """
    device = torch.device(device_name)
    for name in names:
        send(("start", name))
        begun = time.perf_counter()
        try:
            error = check(name, SHAPES[shape], device)
        except Exception as failure:
            # whatever a kernel, a compiler or a back end raises is what this command is there to
            # find
            told = (
                str(failure)
                if isinstance(failure, WrongResult | WrongOp)
                else f"{type(failure).__name__}: {what_failed(failure)}"
            )
            send(("failed", name, time.perf_counter() - begun, " ".join(told.split())[:600]))
            if device.type == "cuda":
                # raises again where the device has failed for good, which ends this process
                torch.cuda.synchronize(device)
        else:
            send(("checked", name, time.perf_counter() - begun, error))
        free(device)
    send(("done",))


def run(
    names: Sequence[str],
    shape: str,
    device: torch.device,
    limit: float,
    apart: bool,
    told: Callable[..., None],
    began: Callable[[str], object] = lambda name: None,
) -> None:
    """Runs every check, in as few processes as the device's faults allow.

    `began(name)` hears of each before, and `told(name, seconds, error, reason)` after it.
    """
    waiting = list(names)
    while waiting:
        job, started = ("smoke", list(waiting), shape, str(device)), waiting[0]
        for kind, *rest in worker.run_apart(*job, limit=limit) if apart else worker.run(*job):
            if kind == "start":
                (started,) = rest
                began(started)
            elif kind in ("checked", "failed"):
                name, seconds, found = rest
                told(name, seconds, *((found, None) if kind == "checked" else (None, found)))
                waiting.remove(name)
            elif kind == "died" and started in waiting:
                told(started, None, None, rest[0])
                waiting.remove(started)


def table_of(records: Sequence[dict[str, Any]]) -> Table:
    table = Table("case", "check", "s", "error")
    for r in records:
        found = (
            Text(r["reason"], style="red") if "reason" in r else Text(f"{r['relative_error']:.2g}")
        )
        table.add_row(
            r["case"],
            r["contestant"],
            f"{r['seconds']:.1f}" if r["seconds"] is not None else "",
            found,
        )
    return table


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fluxfast-bench smoke",
        description="Hold what a step launches against fp32. Exit status 1: a check failed.",
    )
    add_case_options(parser)
    parser.add_argument("--contestants", metavar="C,…", help=f"default: {','.join(DEFAULT)}")
    parser.add_argument(
        "--limit", type=float, default=60, help="seconds without an answer that end a check"
    )
    parser.add_argument(
        "--one-process", action="store_true", help="check in this process, for debuggers"
    )
    parser.add_argument("--results", type=Path, default=results.ROOT, help="default: %(default)s")
    options = parser.parse_args(argv)
    try:
        device = chosen_device(options.device)
        shapes = chosen("--shapes", options.shapes, list(SHAPES), default_shapes(device))
        contestants = chosen("--contestants", options.contestants, list(CONTESTANTS), DEFAULT)
    except ValueError as error:
        print(f"fluxfast-bench smoke: {error}", file=sys.stderr)
        return 1
    measured = Run(options.results, device, ["smoke", *argv])
    journal = measured.journal
    names = names_of(contestants, device)

    def told(
        shape: str, name: str, seconds: float | None, error: float | None, reason: str | None
    ) -> None:
        record: dict[str, Any] = {"case": shape, "contestant": name, "ours": True}
        record["seconds"] = None if seconds is None else round(seconds, 3)
        journal.record(
            record | ({"relative_error": error} if reason is None else {"reason": reason})
        )

    apart = not options.one_process
    with Steps(len(names) * len(shapes)) as steps:
        for shape in shapes:
            run(names, shape, device, options.limit, apart, partial(told, shape), steps.begin)
    records, console = journal.records(), wide_console()
    console.print(table_of(records))
    measured.finish(console)
    return 1 if any("reason" in record for record in records) else 0
