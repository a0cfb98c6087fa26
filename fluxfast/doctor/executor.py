"""Running checks in this process, or in several of their own side by side.

Several processes compile kernels on all cores. A process of its own also survives a kernel that
hangs or breaks the GPU's context: the process is ended, the check has failed, and the next check
gets a new process.
"""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from fluxfast.doctor.checks import Check, Outcome
from fluxfast.doctor.examine import NO_MEMORY, examine
from fluxfast.doctor.scope import Scope
from fluxfast.ops.device import usable_cores

# GiB of a process: its CUDA context, and the tensors of a check
WORKER_GIB = 3.0
MOST_WORKERS = 8
# seconds after which a check, or a process's start, is given up; a check compiles kernels
LIMIT, START_LIMIT = 120.0, 180.0
COMMAND = [sys.executable, "-m", "fluxfast.doctor.worker"]

Done = Callable[[Outcome], object]


class Request(NamedTuple):
    """A check, and which of its halves are wanted."""

    check: Check
    comparing: bool
    timing: bool


def workers_for(device: torch.device) -> int:
    """How many processes to use; 0 means this one, where nothing has to be compiled."""
    if device.type != "cuda":
        return 0
    free = torch.cuda.mem_get_info(device)[0] / 2**30
    return max(1, min(MOST_WORKERS, usable_cores(), int(free / WORKER_GIB)))


def run_checks(
    checks: Sequence[Check], scope: Scope, workers: int, done: Done = lambda _: None
) -> list[Outcome]:
    """Run the checks; returns an outcome of each, in order.

    `done` is called with each outcome as soon as it is known, from any thread. With processes of
    their own, first everything is compared, side by side. Then, one at a time, what passed is
    timed, and what had too little memory beside the others is tried again.
    """
    outcomes: dict[str, Outcome] = {}

    def finished(outcome: Outcome) -> None:
        outcomes[outcome.name] = outcome
        done(outcome)

    if not workers:
        for check in checks:
            finished(examine(check))
        return list(outcomes.values())
    for check in checks:
        if check.obstacle is not None:
            finished(examine(check))
    todo = [check for check in checks if check.obstacle is None]
    compared: dict[str, Outcome] = {}

    def compared_once(outcome: Outcome) -> None:
        compared[outcome.name] = outcome
        if not _second_look(by_name[outcome.name], outcome):
            finished(outcome)

    by_name = {check.name: check for check in todo}
    with Pool(scope, workers) as pool:
        # in reverse: whole models come last in the list, and take longest
        pool.run(
            [Request(check, True, False) for check in reversed(todo) if check.run is not None],
            workers,
            compared_once,
        )
        second = [
            Request(check, check.run is not None and compared[check.name].status != "pass", True)
            for check in todo
            if check.run is None or _second_look(check, compared[check.name])
        ]
        pool.run(second, 1, lambda outcome: finished(_merged(compared.get(outcome.name), outcome)))
    return [outcomes[check.name] for check in checks]


def _second_look(check: Check, outcome: Outcome) -> bool:
    """Whether a check has to be run again, with the device to itself."""
    if outcome.status == "not checked":
        return outcome.cause.startswith(NO_MEMORY)
    return outcome.status == "pass" and check.time is not None


def _merged(compared: Outcome | None, second: Outcome) -> Outcome:
    """The outcome of both looks: a comparison that passed, and the rate measured after it."""
    if compared is None or compared.status != "pass":
        return second
    if second.status == "not checked":
        return replace(compared, note=f"{compared.note} no rate: {second.cause}".strip())
    seconds = round(compared.seconds + second.seconds, 3)
    rest = {
        "rate": second.rate,
        "unit": second.unit,
        "cause": second.cause,
        "way_out": second.way_out,
    }
    return replace(compared, status=second.status, seconds=seconds, **rest)  # type: ignore[arg-type]


class Pool:
    """Processes that check; a context manager."""

    def __init__(self, scope: Scope, count: int) -> None:
        self._workers = [Worker(scope) for _ in range(count)]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.close()

    def run(self, requests: Sequence[Request], count: int, done: Done) -> None:
        """Let the first `count` processes answer the requests, each one after the other.

        The other processes are ended.
        """
        waiting: queue.SimpleQueue[Request] = queue.SimpleQueue()
        for request in requests:
            waiting.put(request)
        for worker in self._workers[count:]:
            worker.close()
        # `done` is not to be called by several threads at a time
        lock = threading.Lock()

        def serve(worker: Worker) -> None:
            while True:
                try:
                    request = waiting.get_nowait()
                except queue.Empty:
                    return
                outcome = worker.ask(request)
                with lock:
                    done(outcome)

        threads = [
            threading.Thread(target=serve, args=(worker,), daemon=True)
            for worker in self._workers[:count]
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


class Worker:
    """One process, started when it is first asked, and again after it has died."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._process: subprocess.Popen[str] | None = None
        self._errors: Any = None
        # why no process can be started
        self._unstartable: str | None = None

    def ask(self, request: Request) -> Outcome:
        """The outcome of a check; a process that ends or hangs meanwhile gives one too."""
        check = request.check
        if self._unstartable is None:
            try:
                self._start()
            except (_NoAnswer, OSError) as error:
                self.close()
                self._unstartable = f"no process to check in could be started: {error}"
        if self._unstartable is not None:
            return Outcome(
                check.name,
                "not checked",
                check.what,
                check.way,
                cause=self._unstartable,
                again=True,
            )
        try:
            asked = {"name": check.name, "comparing": request.comparing, "timing": request.timing}
            answer = self._exchange(asked, LIMIT)
        except _NoAnswer as gone:
            self.close()
            outside = gone.killed_from_outside
            status: Any = "not checked" if outside else "fail"
            return Outcome(
                check.name,
                status,
                check.what,
                check.way,
                cause=str(gone),
                way_out=check.way_out,
                again=outside,
            )
        if answer.pop("broken", False):
            self.close()
        return Outcome.from_json(answer)

    def _start(self) -> None:
        if self._process is not None:
            return
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
        self._process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
        )
        self._exchange(self._scope.as_json(), START_LIMIT)

    def _exchange(self, message: dict[str, Any], limit: float) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(limit, give_up)
        timer.start()
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            raise _NoAnswer(process.wait(), limit if late.is_set() else None, self._said())
        return json.loads(line)

    def _said(self) -> str:
        """The last line of the process's error output."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            # killing it loses nothing: it holds no state
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, self._errors):
                if stream is not None:
                    stream.close()


class _NoAnswer(Exception):
    """A process ended, or had to be ended, instead of answering."""

    def __init__(self, status: int, limit: float | None, said: str) -> None:
        self.killed_from_outside = limit is None and status == -signal.SIGKILL
        if limit is not None:
            text = f"it did not end within {limit:.0f} seconds"
        elif self.killed_from_outside:
            text = "its process was killed from outside: most often there is not enough host memory"
        elif status < 0:
            text = f"its process ended with {signal.Signals(-status).name}"
        else:
            text = f"its process ended with exit status {status}"
        super().__init__(f"{text}; it said: {said[:200]}" if said else text)
