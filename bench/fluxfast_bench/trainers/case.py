"""A trainer's model with its adapters, and what a step of it computes, or a forward alone."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import fluxfast
from fluxfast.dropin.hosts import accelerated_blocks
from fluxfast.dropin.report import Report
from fluxfast_bench.shapes import Shape
from fluxfast_bench.timing import time_each

RANK = 16
# the largest relative difference in fp32 that is rounding, over six blocks and two steps
SAME = 1e-4
# the last two are of what trains
ERRORS = ("output_error", "gradient_error", "two_steps_error")
_CPU = torch.device("cpu")


class Absent(Exception):
    """That a checkout, or the machine, has nothing of what a case is about."""


@dataclass
class Case:
    """A model, what trains on it, and a forward of it.

    Where nothing trains, the forward is all that is measured, without gradients. same: the largest
    error that is rounding. holds: what has to live as long as the case.
    """

    model: nn.Module
    trained: list[nn.Parameter]
    call: Callable[[], Tensor]
    same: float = SAME
    holds: Any = None

    def draw(self) -> None:
        """Give the adapters the size of trained ones: most begin as zeros, which hide errors."""
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in self.trained:
                p.add_(torch.randn(p.shape, generator=g) * 0.02)

    def loss(self) -> tuple[Tensor, Tensor]:
        out = self.call()
        return out.detach(), out.float().square().mean()

    def gradients(self) -> tuple[Tensor, list[Tensor | None]]:
        if not self.trained:
            with torch.inference_mode():
                return self.call(), []
        for p in self.trained:
            p.grad = None
        out, loss = self.loss()
        loss.backward()
        return out, [None if p.grad is None else p.grad.clone() for p in self.trained]

    def steps(self, count: int) -> None:
        """That many steps of an optimiser."""
        # a gradient that is nothing but rounding must not be divided by its own size
        optimizer = torch.optim.AdamW(self.trained, lr=1e-3, eps=1e-6)
        for _ in range(count):
            optimizer.zero_grad()
            self.loss()[1].backward()
            optimizer.step()


def error_of(actual: Iterable[Tensor | None], expected: Iterable[Tensor | None]) -> float:
    """The largest difference of any tensor, as a part of its largest value.

    Infinite where one of two is missing, or not finite.
    """
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        if a is None or e is None:
            worst = worst if a is e else float("inf")
            continue
        error = (a.double() - e.double()).abs().max() / e.double().abs().max().clamp(min=1e-30)
        worst = max(worst, float(error)) if torch.isfinite(error) else float("inf")
    return worst


def measure(make: Callable[[Shape], Case], shape: Shape, rounds: int) -> dict[str, Any]:
    """What of a case runs fused, how far it is from the trainer's own, and how fast it is."""
    cases = []
    for _ in range(2):
        torch.manual_seed(0)
        cases.append(make(shape))
        cases[-1].draw()
    theirs, ours = cases
    report = fluxfast.accelerate(ours.model)
    (out, grads), (expected, expected_grads) = ours.gradients(), theirs.gradients()
    counted = counts_of(ours.model, report)
    errors = {"output_error": error_of([out], [expected])}
    seconds = times_of(theirs, ours, rounds)
    if theirs.trained:
        for case in (ours, theirs):
            case.steps(2)
        errors["gradient_error"] = error_of(grads, expected_grads)
        errors["two_steps_error"] = error_of(ours.trained, theirs.trained)
    return {**counted, **errors, "same": theirs.same, **seconds}


def worst_error(record: dict[str, Any]) -> str:
    """The name of the largest error that was measured of a case."""
    return max((name for name in ERRORS if name in record), key=lambda name: record[name])


def was_measured(record: dict[str, Any]) -> bool:
    """Whether a case ran; of the others the record says why they did not."""
    return "output_error" in record


def counts_of(model: nn.Module, report: Report) -> dict[str, Any]:
    """How many blocks, linears and adapters run fused, and why others don't.

    A modulation's linear is never part of a fused block, and is counted with the adapters alone.
    """
    modules = dict(model.named_modules())
    blocks = [block.maths() for _, block in accelerated_blocks(model)]
    products = {id(m) for block in blocks for group in block.linear_groups() for m in group}
    in_products = [each for each in report.linears if id(modules[each.name]) in products]
    called = [each for each in report.linears if each.runs == "module"]
    read = sum(each.adapters for each in report.linears if each.runs != "module")
    adapted = [each for each in called if _is_adapted(modules[each.name])]
    # those of which every call ran fused, whatever the report expected
    ran = [each for each in report.blocks if 0 < each.calls.total == each.calls.count("fused")]
    return {
        "blocks": len(report.blocks),
        "blocks_fused": len(ran),
        "calls": report.calls(),
        "calls_fused": report.calls("fused"),
        "linears": len(in_products),
        "linears_fused": sum(each.runs == "fused" for each in in_products),
        "adapters": read + len(adapted),
        "adapters_fused": read,
        "remains": dict(Counter(each.because for each in called if each.because is not None)),
    }


def _is_adapted(linear: nn.Module) -> bool:
    return "forward" in linear.__dict__ or hasattr(linear, "base_layer")


def times_of(theirs: Case, ours: Case, rounds: int) -> dict[str, float]:
    """Median seconds of a forward of each, and backward where something trains, taken in turn."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for case in (theirs, ours):
        case.gradients()
    gc.collect()
    for _ in range(rounds):
        for case, found in zip((theirs, ours), seconds, strict=True):
            found += time_each(case.gradients, 1, _CPU)
    plain, accelerated = map(median, seconds)
    return {
        "plain_seconds": round(plain, 5),
        "seconds": round(accelerated, 5),
        "ratio": round(plain / accelerated, 3),
    }
