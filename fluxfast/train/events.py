"""What a run shows and logs: the progress bar, `metrics.jsonl`, the loss curve; how it is stopped.

A number about a run never stops it: a failure to write or draw one is told once, and the run goes
on.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fluxfast.files import atomic_file, write_atomic

PROCESS_STATUS = Path("/proc/self/status")
METRICS_NAME = "metrics.jsonl"
# the rate shown is the mean over this many steps
RATE_WINDOW = 20


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


class StopRequest:
    """SIGINT and SIGTERM ask the loop to save and stop after its step; a second stops at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number


def say(console: Console, text: str) -> None:
    """Print a note as it is: what looks like markup may be a user's path."""
    console.print(f"· {text}", highlight=False, markup=False, soft_wrap=True)


class Numbers:
    """Keeps a failure of whatever handles numbers about the run, such as a tracker, from ending it.

    The name of a guarded thing and its failure are told once.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._failed: set[str] = set()

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Catch what the block raises, and tell it the first time that it happens for `what`."""
        try:
            yield
        # a tracker, a plot or a disk may raise anything
        except Exception as error:
            if what not in self._failed:
                self._say(f"{what}: {error or type(error).__name__}; the run goes on without")
            self._failed.add(what)


class Metrics:
    """`metrics.jsonl` in the output folder, a line for each step.

    A resumed run cuts off the lines of the steps that it repeats.
    """

    def __init__(self, output_dir: Path, from_step: int, say: Callable[[str], None]) -> None:
        self.path = output_dir / METRICS_NAME
        self._numbers = Numbers(say)
        self._file: TextIO | None = None
        with self._numbers.guard(str(self.path)):
            kept = [line for line in read_metrics(self.path, say) if line["step"] <= from_step]
            write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
            self._file = self.path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            with self._numbers.guard(str(self.path)):
                self._file.write(json.dumps(line) + "\n")
                self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            with self._numbers.guard(str(self.path)), self._file:
                os.fsync(self._file.fileno())


def read_metrics(
    path: Path, say: Callable[[str], None] = lambda text: None
) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl` that can be read: JSON objects with a step and a finite loss.

    A last line that a kill cut short is left out. `say` is told in one line how many others can't
    be read. OSError where there is a file that can't be opened.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    read = [_metrics_line(line) for line in lines]
    kept = [line for line in read if line is not None]
    if len(kept) < len(read):
        say(f"{path}: {len(read) - len(kept)} of {len(read)} lines can't be read, and are left out")
    return kept


def _metrics_line(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return (
        line
        if isinstance(line, dict) and _is_step(line.get("step")) and _is_finite(line.get("loss"))
        else None
    )


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_finite(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max
    )


class TrainingBar:
    """The progress bar of the training loop: loss, learning rate, step rate and memory."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("training", total=total, completed=done, numbers="")
        self._times: deque[float] = deque([time.perf_counter()], maxlen=RATE_WINDOW + 1)

    def __enter__(self) -> TrainingBar:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def tick(self) -> float:
        """Count a step that has ended; returns the steps per second over the last RATE_WINDOW."""
        self._times.append(time.perf_counter())
        return (len(self._times) - 1) / (self._times[-1] - self._times[0])

    def pause(self) -> None:
        """Start the rate anew after a validation or a checkpoint, which are no part of it."""
        self._times.clear()
        self._times.append(time.perf_counter())

    def show(self, step: int, line: dict[str, Any]) -> None:
        numbers = (
            f"loss {line['loss']:.4f}"
            + (" (regularisation)" if "regularisation_loss" in line else "")
            + f" · lr {line['learning_rate']:.2e} · "
            f"{line['steps_per_second']:.2f} steps/s"
            + ("" if line["memory_gib"] is None else f" · {line['memory_gib']:.1f} GiB")
        )
        self._progress.update(self._task, completed=step, numbers=numbers)


def plot_loss(metrics: list[dict[str, Any]], path: Path) -> None:
    """Draw `loss.png`: every step's loss and its running mean, and the learning rate below.

    metrics: lines as `read_metrics` gives them, at least one.
    """
    # matplotlib takes a second to import, and only the end of a run draws
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    held = [m for m in metrics if _is_finite(m.get("regularisation_loss"))]
    # where there is nothing else, a step's loss is that of its regularisation data
    trained = [m for m in metrics if "regularisation_loss" not in m] or metrics
    steps, losses = [m["step"] for m in trained], [m["loss"] for m in trained]
    window = max(1, len(losses) // 25)
    smooth = [
        sum(losses[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(losses))
    ]
    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(9, 6), sharex=True, height_ratios=[4, 1], layout="constrained"
    )
    top.plot(steps, losses, ".", color="0.75", markersize=4, label="each step")
    top.plot(steps, smooth, color="tab:blue", linewidth=2, label=f"mean of the last {window} steps")
    if held and trained is not metrics:
        top.plot(
            [m["step"] for m in held], [m["regularisation_loss"] for m in held],
            ".", color="tab:green", markersize=4, label="regularisation",
        )  # fmt: skip
    top.set_ylabel("loss")
    top.set_ylim(0, sorted(losses)[int(0.98 * (len(losses) - 1))] * 1.25 or 1)
    top.legend()
    top.grid(alpha=0.3)
    rates = [m.get("learning_rate") for m in metrics]
    bottom.plot(
        [m["step"] for m in metrics],
        [rate if _is_finite(rate) else math.nan for rate in rates],
        color="tab:orange",
    )
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    bottom.grid(alpha=0.3)
    with atomic_file(path) as stream:
        figure.savefig(stream, dpi=110, format="png")
    pyplot.close(figure)
