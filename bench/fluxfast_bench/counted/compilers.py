"""Worker processes that compile kernels for absent GPUs, and read what the compilers report.

The command's own process can't do it: Triton reads TRITON_INTERPRET once, and a compiler that
crashes takes its process with it. Nothing here imports triton before a worker has prepared its
environment.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import multiprocessing
import os
import queue
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
R = TypeVar("R")

# shared memory that one program may have, in bytes; Triton's compiler does not check it
SHARED_LIMITS = {
    "sm_80": 163 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "gfx942": 64 << 10,
    "gfx1100": 64 << 10,
}


class Task(NamedTuple):
    """One kernel of `fluxfast_kernels.<op>` for one target."""

    op: str
    variant: str
    target: str


@dataclass(frozen=True)
class Compiled:
    """What came of a task.

    registers: of a thread (NVIDIA; AMD: vector registers). spills: what of them went to memory, in
    bytes of stores a thread (NVIDIA) or in registers (AMD). shared: bytes a program. All three are
    None where the compiler failed. seconds: of compiling. error: why the kernel can't run; None
    where it can.
    """

    seconds: float
    registers: int | None = None
    spills: int | None = None
    shared: int | None = None
    error: str | None = None


def ptxas_figures(log: str) -> tuple[int, int]:
    """Registers, and bytes of spill stores, from what `ptxas -v` says."""
    used = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", log)]
    assert used and spilled, f"ptxas says neither registers nor spills: {log!r}"
    return max(used), max(spilled)


def amdgcn_figures(assembly: str) -> tuple[int, int]:
    """Vector registers, and how many were spilled, from the metadata of AMD's assembly."""
    (used,) = re.findall(r"\.vgpr_count:\s+(\d+)", assembly)
    (spilled,) = re.findall(r"\.vgpr_spill_count:\s+(\d+)", assembly)
    return int(used), int(spilled)


def end_with_parent() -> None:
    """A worker's thread: the worker ends when whoever started it has ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def prepare_worker(cache: str) -> None:
    # the pool's own processes wait for ever where the command was killed
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ.pop("TRITON_INTERPRET", None)
    # a cached kernel has no compile time, and no ptxas to speak
    os.environ |= {
        "TRITON_CACHE_DIR": cache,
        "TRITON_ALWAYS_COMPILE": "1",
        "TRITON_DUMP_PTXAS_LOG": "1",
    }
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION is unset")


def variants_of(op: str) -> dict[Task, Any]:
    """In a worker: an op's AotVariants."""
    from fluxfast_kernels.aot import record_variants

    variants = record_variants(importlib.import_module(f"fluxfast_kernels.{op}").aot_cases())
    found = {Task(op, v.name, target): v for v in variants for target in v.targets}
    assert len(found) == sum(len(v.targets) for v in variants), (
        f"two variants of {op} have the same name"
    )
    return found


def tasks_of(op: str) -> list[Task]:
    """In a worker: `variants_of` without the kernels, which stay there."""
    return list(variants_of(op))


def measure(variant: Any, target: str) -> Compiled:
    """In a worker: compiles an AotVariant. A compiler's error, of whatever kind, is a result."""
    from fluxfast_kernels.aot import compile_ahead

    log = io.StringIO()
    start = time.perf_counter()
    try:
        with contextlib.redirect_stdout(log):
            kernel = compile_ahead(variant, target)
    except Exception as error:
        text = " ".join(str(error).split())
        return Compiled(
            round(time.perf_counter() - start, 2), error=f"{type(error).__name__}: {text[:300]}"
        )
    seconds = round(time.perf_counter() - start, 2)
    amd = "amdgcn" in kernel.asm
    registers, spills = (
        amdgcn_figures(kernel.asm["amdgcn"]) if amd else ptxas_figures(log.getvalue())
    )
    shared, limit = kernel.metadata.shared, SHARED_LIMITS[target]
    too_much = (
        f"needs {shared} bytes of shared memory, {target} has {limit}" if shared > limit else None
    )
    return Compiled(seconds, registers, spills, shared, too_much)


def compile_task(task: Task) -> Compiled:
    """In a worker: compiles one variant."""
    return measure(variants_of(task.op)[task], task.target)


class Worker:
    """One process, prepared by `prepare(*arguments)`; a new one after a crash."""

    def __init__(self, prepare: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self._prepare = (prepare, arguments)
        self._start()

    def _start(self) -> None:
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), *self._prepare)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """The result of `function(*args)` in the process; function and arguments are pickled.

        Raises BrokenProcessPool where the call kills the process.
        """
        try:
            return self._pool.submit(function, *args).result()
        except BrokenProcessPool:
            self.close()
            self._start()
            raise

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class Compilers:
    """`jobs` workers, each prepared by `prepare(*arguments)`; a context manager."""

    def __init__(self, jobs: int, prepare: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self._workers = [Worker(prepare, arguments) for _ in range(jobs)]

    def __enter__(self) -> Compilers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.close()

    def tasks(self, op: str) -> list[Task]:
        """Every variant of an op, for every target of its."""
        return self._workers[0].call(tasks_of, op)

    def compile(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Compiled]]:
        """Compiles the tasks, yielding each when it is done."""
        for task, compiled in self.each(compile_task, tasks):
            yield (
                task,
                Compiled(0.0, error="the compiler crashed") if compiled is None else compiled,
            )

    def each(self, function: Callable[[T], R], items: Sequence[T]) -> Iterator[tuple[T, R | None]]:
        """`function` of each item, in whichever worker is idle, as the results come.

        The result is None where the call killed its worker.
        """
        idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._workers:
            idle.put(worker)

        def run(item: T) -> R | None:
            worker = idle.get()
            try:
                return worker.call(function, item)
            except BrokenProcessPool:
                return None
            finally:
                idle.put(worker)

        threads = ThreadPoolExecutor(len(self._workers))
        try:
            futures = {threads.submit(run, item): item for item in items}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            threads.shutdown(cancel_futures=True)
