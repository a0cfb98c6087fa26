"""The progress of the training loop: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, Task

from fluxfast.progress import BETWEEN_LINES, OwnColour, clock_time

# the rate shown is the mean over this many steps
RATE_WINDOW = 20
_LABEL = "training"
# columns that the bar itself has at least, with the spaces around it
_BAR = 10
# a log has about so many lines, and more where steps are slow
_LINES = 20


class TrainingBar:
    """Steps of how many, times, loss, rate, memory and learning rate.

    What a narrow terminal has no room for is left out from the end of that list. Without a terminal
    a line is printed at every few steps and every BETWEEN_LINES seconds.
    """

    def __init__(self, console: Console, total: int, done: int) -> None:
        self._console, self._total, self._first = console, total, done + 1
        self._progress = Progress(
            OwnColour(lambda task: _LABEL),
            BarColumn(bar_width=None),
            OwnColour(self._text),
            console=console,
            disable=not console.is_interactive,
        )
        self._task = self._progress.add_task(
            _LABEL, total=total, completed=done, numbers=(), start=False
        )
        self._times: deque[float] = deque([time.perf_counter()], maxlen=RATE_WINDOW + 1)
        self._rate = 0.0
        self._line_every = _round_number((total - done) / _LINES)
        self._last_line = time.monotonic()

    def __enter__(self) -> TrainingBar:
        self._progress.start_task(self._task)
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *others: object) -> None:
        # an error stands alone
        self._progress.live.transient = kind is not None
        self._progress.stop()

    def tick(self) -> float:
        """Count a step that has ended; returns the steps per second over the last RATE_WINDOW."""
        self._times.append(time.perf_counter())
        self._rate = (len(self._times) - 1) / (self._times[-1] - self._times[0])
        return self._rate

    def pause(self) -> None:
        """Start the rate anew after a validation or a checkpoint, which are no part of it."""
        self._times.clear()
        self._times.append(time.perf_counter())

    def show(self, step: int, line: Mapping[str, Any]) -> None:
        """Show the numbers of a step, by their names in `metrics.jsonl`."""
        self._progress.update(self._task, completed=step, numbers=numbers(line))
        if self._console.is_interactive:
            return
        is_due = step % self._line_every == 0 or step in (self._first, self._total)
        if is_due or time.monotonic() - self._last_line >= BETWEEN_LINES:
            self._last_line = time.monotonic()
            (task,) = self._progress.tasks
            text = f"step {' · '.join(self._parts(task))}"
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _text(self, task: Task) -> str:
        """All of it that fits beside a bar; count, times and loss always."""
        first, *others = self._parts(task)
        return fitted(first, others, self._console.width - len(_LABEL) - _BAR, kept=3)

    def _parts(self, task: Task) -> list[str]:
        done = int(task.completed)
        parts = [f"{done}/{self._total}", clock_time(task.elapsed or 0)]
        if self._rate:
            parts.append(f"{clock_time((self._total - done) / self._rate)} left")
        return [*parts, *task.fields["numbers"]]


def numbers(line: Mapping[str, Any]) -> tuple[str, ...]:
    """The numbers of a step in words, the most important first."""
    memory = line["memory_gib"]
    return (
        f"loss {line['loss']:.4f}",
        *(("regularisation",) if "regularisation_loss" in line else ()),
        f"{line['steps_per_second']:.2f} steps/s",
        *(() if memory is None else (f"{memory:.1f} GiB",)),
        f"lr {line['learning_rate']:.2e}",
    )


def fitted(first: str, others: list[str], width: int, *, kept: int) -> str:
    """Parts in a line as far as they fit in `width` columns: the first and `kept` others always."""
    text = first
    for index, part in enumerate(others):
        longer = f"{text} · {part}"
        if index >= kept and len(longer) > width:
            break
        text = longer
    return text


def _round_number(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50 … that is no less."""
    power = 1
    while True:
        for digit in (1, 2, 5):
            if digit * power >= least:
                return digit * power
        power *= 10
