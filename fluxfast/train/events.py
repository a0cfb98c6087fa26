"""What a run tells: the progress bar, `metrics.jsonl`, the trackers; and how it is told to stop."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import deque
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fluxfast.files import atomic_file, write_atomic

METRICS_NAME = "metrics.jsonl"
# the rate shown is the mean over this many steps
RATE_WINDOW = 20


def memory_gib(device: torch.device) -> float:
    """Peak memory so far, GiB: the allocator's on a GPU, the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # peak resident set, KiB on Linux
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    return float("nan")


class StopRequest:
    """SIGINT and SIGTERM ask the loop to save and stop after its step; a second signal stops at once."""

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


class Metrics:
    """`metrics.jsonl` in the output folder: a line a step. What a resumed run repeats is cut off first."""

    def __init__(self, output_dir: Path, from_step: int) -> None:
        self.path = output_dir / METRICS_NAME
        kept = [line for line in read_metrics(self.path) if line["step"] <= from_step]
        write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


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
        """Note that a step ended; returns the steps per second over the last ones."""
        self._times.append(time.perf_counter())
        return (len(self._times) - 1) / (self._times[-1] - self._times[0])

    def pause(self) -> None:
        """Leave out of the rate what comes between two steps (validation, a checkpoint)."""
        self._times.clear()
        self._times.append(time.perf_counter())

    def show(self, step: int, line: dict[str, Any]) -> None:
        numbers = (
            f"loss {line['loss']:.4f} · lr {line['learning_rate']:.2e} · {line['steps_per_second']:.2f} steps/s "
            f"· {line['memory_gib']:.1f} GiB"
        )
        self._progress.update(self._task, completed=step, numbers=numbers)


def plot_loss(metrics: list[dict[str, Any]], path: Path) -> None:
    """`loss.png`: every step's loss and its running mean, with the learning rate below."""
    # a picture is drawn once, at the end of a run; matplotlib takes a second to import
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, losses = [m["step"] for m in metrics], [m["loss"] for m in metrics]
    window = max(1, len(losses) // 25)
    smooth = [sum(losses[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(losses))]
    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(9, 6), sharex=True, height_ratios=[4, 1], layout="constrained"
    )
    top.plot(steps, losses, ".", color="0.75", markersize=4, label="each step")
    top.plot(steps, smooth, color="tab:blue", linewidth=2, label=f"mean of the last {window} steps")
    top.set_ylabel("loss")
    top.set_ylim(0, sorted(losses)[int(0.98 * (len(losses) - 1))] * 1.25 or 1)
    top.legend()
    top.grid(alpha=0.3)
    bottom.plot(steps, [m["learning_rate"] for m in metrics], color="tab:orange")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    bottom.grid(alpha=0.3)
    with atomic_file(path) as stream:
        figure.savefig(stream, dpi=110, format="png")
    pyplot.close(figure)
