"""A run of a command that measures: its results, and what the machine did meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from fluxfast_bench.machine_load import Load, others_now, told_busy
from fluxfast_bench.report.conditions import conditions
from fluxfast_bench.report.results import Journal


class Run:
    """A measurement from its first look at the machine to its stored result.

    `journal` takes its records. Whether other programs used the processor is said before the first
    measurement and after the last, and is among the stored conditions.
    """

    def __init__(self, root: Path, device: torch.device, command: Sequence[str]) -> None:
        """command: the words after `fluxfast-bench`, the first of which is the result's kind."""
        self._errors = Console(stderr=True)
        before = others_now()
        self._warn(before, "before the first measurement")
        self.conditions = conditions(device, command) | {"others_before": before}
        self.journal = Journal(root, command[0], self.conditions)
        self._load = Load()

    def finish(self, console: Console) -> None:
        """Stores the result, and says where it is and whether the machine was busy."""
        others = self._load.others()
        self.journal.note(conditions={"others": others})
        told_written(self.journal.finish(), console)
        self._warn(others, "meanwhile")

    def _warn(self, others: float, when: str) -> None:
        if (line := told_busy(others, when)) is not None:
            # a log keeps it in one line
            soft_wrap = not self._errors.is_terminal
            self._errors.print(line, style="yellow", highlight=False, soft_wrap=soft_wrap)


def told_written(path: Path, console: Console) -> None:
    """Says where a command wrote what it found."""
    console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
