"""How far long work is: bars on a terminal, and plain lines in a log or a pipe.

Text has the terminal's own colour, since some of rich's can't be read on white.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID
from rich.table import Column
from rich.text import Text

# seconds between two plain lines about the same work
BETWEEN_LINES = 30.0
# work that ends sooner has no plain line
_WORTH_A_LINE = 10.0
_BAR_WIDTH = 24


class Bars(Progress):
    """Progress bars that become plain lines where nobody can see a bar move.

    A line is printed for each BETWEEN_LINES seconds that work takes, and at its end.
    """

    def __init__(
        self,
        *columns: ProgressColumn,
        console: Console | None = None,
        transient: bool = False,
        amount: Callable[[float], str] = "{:,.0f}".format,
    ) -> None:
        """amount: how an amount of work is written in a plain line."""
        console = console or Console()
        self._plain = not console.is_interactive
        self._amount = amount
        # when each task was last told of, and those whose end was
        self._told: dict[TaskID, float] = {}
        self._ended: set[TaskID] = set()
        super().__init__(
            *columns, console=console, transient=transient, disable=self._plain, expand=False
        )

    def __exit__(self, kind: type[BaseException] | None, *others: Any) -> None:
        """Stop; where an error has ended the work, its bars go, so that it stands alone."""
        self.live.transient |= kind is not None
        super().__exit__(kind, *others)

    def add_task(self, *args: Any, **options: Any) -> TaskID:
        task = super().add_task(*args, **options)
        self._told[task] = self.get_time()
        return task

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._tell(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._tell(task_id)

    def _tell(self, task_id: TaskID) -> None:
        """Print a plain line, if one is due."""
        if not self._plain or task_id in self._ended:
            return
        with self._lock:
            task, now = self._tasks[task_id], self.get_time()
            began = now if task.start_time is None else task.start_time
            ends = task.finished and now - began >= _WORTH_A_LINE
            if not ends and now - self._told[task_id] < BETWEEN_LINES:
                return
            self._told[task_id] = now
            if task.finished:
                self._ended.add(task_id)
        done = self._amount(task.completed)
        of = "" if task.total is None else f" of {self._amount(task.total)}"
        text = f"{task.description}: {done}{of}, {clock_time(now - began)}"
        if (left := task.time_remaining) is not None and not task.finished:
            text += f", {clock_time(left)} left"
        self.console.print(text, highlight=False, soft_wrap=True)


class OwnColour(ProgressColumn):
    """Text about a task, never cut, in the terminal's own colour."""

    def __init__(self, text: Callable[[Task], str], *, markup: bool = False) -> None:
        self._text, self._markup = text, markup
        super().__init__(table_column=Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        text = self._text(task)
        return Text.from_markup(text) if self._markup else Text(text)


def description() -> ProgressColumn:
    """What is done."""
    return OwnColour(lambda task: task.description, markup=True)


def counting(console: Console | None = None, *, transient: bool = False) -> Bars:
    """Bars that say how many of how many are done, and how long the rest will take."""
    return Bars(
        description(),
        BarColumn(_BAR_WIDTH),
        OwnColour(_count),
        OwnColour(_left),
        console=console,
        transient=transient,
    )


def weighing(console: Console | None = None) -> Bars:
    """The same of bytes."""
    return Bars(
        description(),
        BarColumn(_BAR_WIDTH),
        OwnColour(lambda task: f"{_bytes(task.completed)}/{_bytes(task.total or 0)}"),
        OwnColour(_left),
        console=console,
        transient=True,
        amount=_bytes,
    )


def clock_time(seconds: float) -> str:
    """Such as 0:01:30, or 2 days, 0:01:30."""
    days, rest = divmod(int(seconds), 86400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days} day{'s' if days > 1 else ''}, {clock}" if days else clock


def _count(task: Task) -> str:
    return f"{task.completed:,.0f}/" + ("?" if task.total is None else f"{task.total:,.0f}")


def _left(task: Task) -> str:
    left = task.time_remaining
    return "" if left is None or task.finished else f"{clock_time(left)} left"


def _bytes(count: float) -> str:
    return decimal(int(count))
