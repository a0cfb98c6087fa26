"""When something happens again and again in a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """Every so many optimiser steps, at the end of every so many epochs, or both (0: not so).

    `after_step` and `after_epoch` put the first time off.
    """

    steps: int = 0
    epochs: int = 0
    after_step: int = 0
    after_epoch: int = 0

    def told(self, steps: int) -> list[str]:
        """Words for when it happens within so many steps; none where it never does."""
        told = []
        if 0 < self.steps < steps:
            told.append("after each step" if self.steps == 1 else f"every {self.steps:,} steps")
        if self.epochs:
            told.append("every epoch" if self.epochs == 1 else f"every {self.epochs} epochs")
        return told

    def is_due(self, step: int, epoch: int, *, ends_epoch: bool) -> bool:
        """Whether it happens after this step, the last of its epoch or not."""
        if step < self.after_step or epoch + ends_epoch <= self.after_epoch:
            return False
        by_step = self.steps > 0 and step % self.steps == 0
        return by_step or (ends_epoch and self.epochs > 0 and epoch % self.epochs == 0)
