"""How far a command is, on standard error: a bar on a terminal, elsewhere plain lines."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

T = TypeVar("T")
# seconds between two lines where there is no terminal
BETWEEN_LINES = 5.0


class Steps:
    """A context in which a command says what it begins, of `total` things that it will do."""

    def __init__(self, total: int, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._total, self._begun = total, 0
        self._last_line = -BETWEEN_LINES
        # a bar on a terminal alone: elsewhere it would be printed once, when all is over
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=total)

    def __enter__(self) -> Steps:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def begin(self, what: str, total: int | None = None) -> None:
        """The thing before is done, and `what` begins; `total` where their number is known now."""
        self._begun += 1
        # things that were not foreseen are counted as they come
        self._total = max(self._total if total is None else total, self._begun)
        self._bar.update(
            self._task, completed=self._begun - 1, total=self._total, description=what[:40]
        )
        if self._console.is_terminal or time.monotonic() - self._last_line < BETWEEN_LINES:
            return
        self._last_line = time.monotonic()
        self._console.print(
            f"{self._begun} of {self._total}: {what}", markup=False, highlight=False, soft_wrap=True
        )


def in_turn(things: Sequence[T], console: Console | None = None) -> Iterator[T]:
    """The things, each named by its str() when it begins."""
    with Steps(len(things), console) as steps:
        for thing in things:
            steps.begin(str(thing))
            yield thing
