"""What a run says and logs: notes, `metrics.jsonl` and `evaluations.jsonl`.

A number about a run never stops it: a failure to write or draw one is told once, and the run goes
on.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console

from fluxfast.files import write_atomic
from fluxfast.text import wrapped

PROCESS_STATUS = Path("/proc/self/status")
METRICS_NAME = "metrics.jsonl"
EVALUATIONS_NAME = "evaluations.jsonl"


def memory_gib(device: torch.device) -> float | None:
    """Peak memory so far in GiB: the allocator's on a GPU, the process's on a CPU.

    None where the system doesn't say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # the peak of the resident set, in KiB
    lines = PROCESS_STATUS.read_text().splitlines() if PROCESS_STATUS.exists() else []
    peaks = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    return peaks[0] / 2**20 if peaks else None


def say(console: Console, text: str) -> None:
    """Print a note."""
    tell(console, f"· {text}")


def tell(console: Console, text: str) -> None:
    """Print a text as it is: what looks like markup may be a user's path.

    A terminal gets it in lines that end between words, a log in one.
    """
    if console.is_interactive:
        text = wrapped(text, console.width)
    console.print(text, highlight=False, markup=False, soft_wrap=True)


class Numbers:
    """Keeps a failure of whatever handles numbers about the run, such as a tracker, from ending it.

    The name of a guarded thing and its failure are told once.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self._failed: set[str] = set()

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Catch what the block raises, and tell it the first time that it happens for `what`."""
        try:
            yield
        # a tracker, a plot or a disk may raise anything
        except Exception as error:
            if what not in self._failed:
                self.say(f"{what}: {error or type(error).__name__}; the run goes on without")
            self._failed.add(what)


class Metrics:
    """A file of numbers in the output folder, a JSON object a line.

    A resumed run cuts off the lines of the steps that it repeats.
    """

    def __init__(self, path: Path, from_step: int, say: Callable[[str], None]) -> None:
        """from_step: the step that the run goes on from."""
        self.path = path
        self._numbers = Numbers(say)
        self._file: TextIO | None = None
        read = read_evaluations if path.name == EVALUATIONS_NAME else read_metrics
        with self._numbers.guard(str(self.path)):
            if self.path.exists():
                kept = [line for line in read(self.path, say) if line["step"] <= from_step]
                write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def write(self, line: dict[str, Any]) -> None:
        with self._numbers.guard(str(self.path)):
            if self._file is None:
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            with self._numbers.guard(str(self.path)), self._file:
                os.fsync(self._file.fileno())
            self._file = None


def _say_nothing(text: str) -> None: ...


def read_metrics(path: Path, say: Callable[[str], None] = _say_nothing) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl` that can be read: objects with a step and a finite loss.

    A last line that a kill cut short is left out. `say` is told in one line how many others can't
    be read. OSError where there is a file that can't be opened.
    """
    return _read_lines(path, say, _is_metrics)


def read_evaluations(path: Path, say: Callable[[str], None] = _say_nothing) -> list[dict[str, Any]]:
    """The same of an `evaluations.jsonl`: objects with a step, and finite numbers beside it."""
    return _read_lines(path, say, _is_evaluation)


def _read_lines(
    path: Path, say: Callable[[str], None], is_good: Callable[[dict[str, Any]], bool]
) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    read = [_parsed(line) for line in lines]
    kept = [line for line in read if line is not None and is_good(line)]
    if len(kept) < len(read):
        say(f"{path}: {len(read) - len(kept)} of {len(read)} lines can't be read, and are left out")
    return kept


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def _is_metrics(line: dict[str, Any]) -> bool:
    return _is_step(line.get("step")) and line["step"] > 0 and is_finite(line.get("loss"))


def _is_evaluation(line: dict[str, Any]) -> bool:
    return _is_step(line.get("step")) and all(map(is_finite, line.values()))


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_finite(value: Any) -> bool:
    """Whether a value that JSON may hold is a number that can be drawn."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max
    )
