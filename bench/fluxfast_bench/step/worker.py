"""Contestants measured in turn, A B A B, in one process that they may take down with them.

The parent learns of each thing as it happens, so that a crash or a hang costs one contestant and
not the run.
"""

from __future__ import annotations

import importlib
import logging
import math
import multiprocessing
import os
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fluxfast.model.graphs import what_failed
from fluxfast_bench.counted.needs import bytes_needed
from fluxfast_bench.ops import ceilings
from fluxfast_bench.shapes import SHAPES, Shape
from fluxfast_bench.step.baselines import PEERS
from fluxfast_bench.step.contestants import Contestant, Setup
from fluxfast_bench.step.ours import CONTESTANTS as OURS
from fluxfast_bench.step.runner import (
    STEPS_BEFORE_REPLAY,
    Runner,
    WrongResult,
    check_replayed,
    free,
    verify,
)
from fluxfast_bench.timing import synchronize, time_each

CONTESTANTS: dict[str, Contestant] = {contestant.name: contestant for contestant in [*OURS, *PEERS]}
# steps before the clock runs: compilation, autotuning, the optimiser's states, the allocator
WARM_STEPS = 3
# steps of a turn, where their number follows from the time
FEWEST, MOST = 2, 30

Event = tuple[Any, ...]


@dataclass(frozen=True)
class Entry:
    """A contestant and its recompute policy: "diffusers:full"."""

    contestant: Contestant
    recompute: str

    @property
    def key(self) -> str:
        return f"{self.contestant.name}:{self.recompute}"


@dataclass(frozen=True)
class Plan:
    """How contestants of one model are measured.

    There are `rounds` rounds, and each turn has `steps` steps of a shape, or as many as take
    `seconds`.
    """

    shapes: tuple[str, ...]
    device: str
    rank: int
    optimizer: str
    rounds: int
    seconds: float
    steps: int | None = None
    profile: str | None = None

    def setup(self, recompute: str) -> Setup:
        shapes = tuple(SHAPES[shape] for shape in self.shapes)
        return Setup(shapes, recompute, self.rank, self.optimizer, torch.device(self.device))


def entry_of(text: str, default: str) -> Entry:
    """Of "NAME" or "NAME:POLICY"; raises KeyError for a name that isn't there."""
    name, _, recompute = text.partition(":")
    return Entry(CONTESTANTS[name], recompute or default)


class DoesNotFit(Exception):
    """Beside those that are there; alone it might."""


def measure(keys: Sequence[str], plan: Plan, send: Callable[[Event], object]) -> None:
    """Builds the entries, times them in turn, and sends an event for everything that happens.

    First comes ("start", key). Then for each shape ("ready", key, {shape: figures}), and a turn of
    the anchor and one of the entry itself, so that a ratio is known early. In their place may come
    ("failed", key, reason), or ("later", key) for an entry that does not fit beside the others. A
    turn is ("round", key, shape, seconds of each step). All further turns follow when everybody is
    there, and then ("done",). If the first entry, the anchor, fails, the job ends at once.
    """
    runners: dict[str, tuple[Runner, dict[str, int]]] = {}
    for key in keys:
        send(("start", key))
        entry, device = entry_of(key, "full"), torch.device(plan.device)
        anchor = None if key == keys[0] else keys[0]
        try:
            runners[key] = _enter(
                entry, plan, send, None if anchor is None else (anchor, *runners[anchor])
            )
        except (DoesNotFit, torch.OutOfMemoryError) as error:
            send(
                ("later", key)
                if runners
                else ("failed", key, f"out of memory: {str(error).splitlines()[0]}")
            )
        except WrongResult as error:
            send(("failed", key, str(error)))
        except Exception as error:
            # a peer's own code may raise anything; what it was is in the table
            send(("failed", key, f"{type(error).__name__}: {what_failed(error)}"))
            # a GPU that has failed for good raises again, which ends this process: the others get
            # another
            synchronize(device)
        free(device)
        if not runners:
            send(("done",))
            return
    for _ in range(1, plan.rounds):
        for shape in plan.shapes:
            for key, (runner, counts) in runners.items():
                _turn(key, runner, shape, counts[shape], send)
    if plan.profile is not None:
        for key, (runner, _) in runners.items():
            _profile(
                runner, Path(plan.profile) / f"{plan.shapes[0]}-{key.replace(':', '-')}.json.gz"
            )
    send(("done",))


def _enter(
    entry: Entry,
    plan: Plan,
    send: Callable[[Event], object],
    anchor: tuple[str, Runner, dict[str, int]] | None,
) -> tuple[Runner, dict[str, int]]:
    """A runner that was found to be right and has had its first turn on each shape.

    The second value is the number of steps of a turn, by shape.
    """
    setup = plan.setup(entry.recompute)
    device, cuda = setup.device, setup.device.type == "cuda"
    if (
        cuda
        and anchor is not None
        and bytes_needed(entry.contestant, setup) > torch.cuda.mem_get_info(device)[0]
    ):
        raise DoesNotFit(entry.key)
    runner: Runner | None = None
    before, counts = 0, {}
    for shape in setup.shapes:
        error = verify(entry.contestant, replace(setup, shapes=(shape,)))
        free(device)
        if runner is None:
            before = torch.cuda.memory_allocated(device) if cuda else 0
            runner = Runner(entry.contestant, setup)
        figures = {"relative_error": float(f"{error:.3g}")} | _warmed(runner, shape, before)
        send(("ready", entry.key, {shape.name: figures}))
        counts[shape.name] = _count(runner, plan)
        if anchor is not None:
            key, other, steps = anchor
            _turn(key, other, shape.name, steps[shape.name], send)
        _turn(entry.key, runner, shape.name, counts[shape.name], send)
    assert runner is not None
    return runner, counts


def _warmed(runner: Runner, shape: Shape, before: int) -> dict[str, float]:
    """Runs the first steps on a shape; returns the peak of memory in GiB, where it can be measured.

    Of that peak `before` bytes belong to others.
    """
    device = runner.setup.device
    cuda = device.type == "cuda"
    runner.begin(shape)
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    steps = WARM_STEPS + (STEPS_BEFORE_REPLAY if runner.contestant.graphs else 0)
    losses = torch.stack([runner.step() for _ in range(steps)])
    check_replayed(runner.model, runner.contestant)
    if not losses.isfinite().all():
        raise WrongResult(f"wrong: its losses are {losses.tolist()}")
    # graphs of an earlier shape keep their memory
    if not cuda or (runner.contestant.graphs and shape is not runner.setup.shapes[0]):
        return {}
    return {"peak_gib": round((torch.cuda.max_memory_allocated(device) - before) / 2**30, 3)}


def _count(runner: Runner, plan: Plan) -> int:
    """Steps of a turn on the shape that the runner is at."""
    if plan.steps is not None:
        return plan.steps
    each = median(time_each(runner.step, 2, runner.setup.device))
    return max(FEWEST, min(MOST, math.ceil(plan.seconds / each)))


def _turn(
    key: str, runner: Runner, shape: str, steps: int, send: Callable[[Event], object]
) -> None:
    runner.begin(SHAPES[shape])
    send(("round", key, shape, time_each(runner.step, steps, runner.setup.device)))


def _profile(runner: Runner, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    runner.begin(runner.setup.shapes[0])
    with torch.profiler.profile() as profile:
        for _ in range(2):
            runner.step()
    profile.export_chrome_trace(str(path))


def run(job: str, *args: Any) -> Iterator[Event]:
    """A job of this module in a thread of this process, one of JOBS.

    Its events come as they happen, so that what is known by then is not lost with it.
    """
    events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
    with ThreadPoolExecutor(1, thread_name_prefix="fluxfast-bench") as pool:
        job_done = pool.submit(_job(job), *args, events.put)
        job_done.add_done_callback(lambda _: events.put(None))
        while (event := events.get()) is not None:
            yield event
        job_done.result()


def run_apart(job: str, *args: Any, limit: float) -> Iterator[Event]:
    """The same in a process of its own, which has to send an event every `limit` seconds.

    The last event is ("died", reason) where the process did not end by itself.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, job, args), daemon=True)
    with ExitStack() as stack:
        stack.callback(process.join)
        process.start()
        stack.callback(process.kill)
        sender.close()
        while receiver.poll(limit):
            try:
                event = receiver.recv()
            except EOFError:
                process.join()
                yield ("died", f"its process died with exit code {process.exitcode}")
                return
            yield event
            if event[0] == "done":
                process.join(30)
                return
        yield ("died", f"no answer for {limit:g} s")


def _child(connection: Any, job: str, args: tuple[Any, ...]) -> None:
    # they say more than their users can act on
    os.environ |= {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    _job(job)(*args, connection.send)


def _ceilings(plan: Plan, send: Callable[[Event], object]) -> None:
    device = torch.device(plan.device)
    for shape in plan.shapes:
        send(("ceilings", shape, ceilings.measure(SHAPES[shape], device)))
    send(("done",))


# a job: what it is called, and "module:function" of this package
JOBS = {
    "measure": "step.worker:measure",
    "ceilings": "step.worker:_ceilings",
    "smoke": "ops.smoke:checked",
    "trainers": "trainers.worker:measure_trainer",
}


def _job(name: str) -> Callable[..., None]:
    module, _, function = JOBS[name].partition(":")
    return getattr(importlib.import_module(f"fluxfast_bench.{module}"), function)
