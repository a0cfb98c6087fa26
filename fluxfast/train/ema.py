"""An exponential moving average of the trained weights (EMA)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

# the folder of the averaged adapter beside the trained one
FOLDER = "ema"
# elements that an update takes together
_TOGETHER = 1 << 22


class WeightAverage:
    """The average of a model's trained weights, in fp32.

    bf16 would lose what an update adds at a decay of 0.995. An update takes
    `decay · average + (1 - decay) · weights`; its decay is `min((1 + s) / (10 + s), decay)` after
    s steps, or, with `warmup_steps`, 0 up to there and `decay` from then on.
    """

    def __init__(
        self,
        named: Mapping[str, Parameter],
        *,
        decay: float,
        interval: int = 1,
        warmup_steps: int = 0,
        device: torch.device,
    ) -> None:
        """named: the weights, whose values the average starts with. device: where it is kept."""
        self.decay, self.interval, self.warmup_steps = decay, interval, warmup_steps
        self._named = dict(named)
        self._average = {name: _copy(p, device) for name, p in named.items()}
        self._chunks = _chunks(self._named)

    def decay_at(self, step: int) -> float:
        """The decay of the update after so many steps."""
        if self.warmup_steps:
            return 0.0 if step <= self.warmup_steps else self.decay
        return min((1 + step) / (10 + step), self.decay)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step (counted from 1), where one is due."""
        if step % self.interval:
            return
        for chunk in self._chunks:
            averages = [self._average[name] for name in chunk]
            device = averages[0].device
            weights = [self._named[name].detach().to(device, torch.float32) for name in chunk]
            torch._foreach_lerp_(averages, weights, 1 - self.decay_at(step))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A context in which the model has the average for weights."""
        trained = {name: p.detach().clone() for name, p in self._named.items()}
        try:
            self._write(self._average)
            yield
        finally:
            self._write(trained)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, p in self._named.items():
            p.copy_(values[name])

    def state(self) -> dict[str, Tensor]:
        """The average by the weights' names."""
        return dict(self._average)

    def load_state(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from a `state()`. ValueError where it is of other weights."""
        shapes = {name: tuple(t.shape) for name, t in self._average.items()}
        if {name: tuple(t.shape) for name, t in saved.items()} != shapes:
            raise ValueError("the saved average is of other weights than those that are trained")
        for name, t in self._average.items():
            t.copy_(saved[name])


def _copy(p: Parameter, device: torch.device) -> Tensor:
    return p.detach().to(device, torch.float32, copy=True)


def _chunks(named: Mapping[str, Parameter]) -> list[list[str]]:
    """The names in lists of at most `_TOGETHER` elements, or of one larger tensor.

    An update copies a list's weights to fp32 at a time.
    """
    chunks: list[list[str]] = []
    elements = 0
    for name, p in named.items():
        if not chunks or elements + p.numel() > _TOGETHER:
            chunks.append([])
            elements = 0
        chunks[-1].append(name)
        elements += p.numel()
    return chunks
