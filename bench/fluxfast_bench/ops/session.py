"""One run of `fluxfast-bench ops`: its timings, what was found to be right, what was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluxfast_bench.ops.fused_ops import FUSED_OPS, FusedOp, Op
from fluxfast_bench.shapes import SHAPES, Shape
from fluxfast_bench.timing import captured, stats

CONTENDERS = ("fluxfast", "eager", "compile")
# so many bytes of inputs take turns, that none is found in a GPU's cache
ROTATED_BYTES = 512 << 20
MOST_INPUTS = 32


class Timing(NamedTuple):
    """One figure: an op at a shape, forward or both directions, by ours or another."""

    op: str
    shape: str
    mode: str
    contender: str

    def __str__(self) -> str:
        return "-".join(self)


class WrongOp(Exception):
    """An op of ours does not give what its reference gives."""


@dataclass
class Session:
    """A pytest plugin of one run."""

    device: torch.device
    timings: list[Timing]
    # hears of each timing when it begins
    began: Callable[[str], object] = lambda name: None

    def __post_init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.reasons: dict[Timing, str] = {}
        self._errors: dict[tuple[str, str], float | str] = {}

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    def inputs(
        self, case: FusedOp, shape: Shape, dtype: torch.dtype, seed: int = 0
    ) -> list[Tensor]:
        generator = torch.Generator(self.device).manual_seed(seed)

        def randn(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=self.device).to(self.dtype)

        made = case.inputs(randn, shape)
        cast = [x.to(dtype) if x.dtype == self.dtype else x for x in made]
        return [
            x.requires_grad_(i < case.differentiable and x.is_floating_point())
            for i, x in enumerate(cast)
        ]

    def check(self, timing: Timing) -> float:
        """The error of our op against its reference in fp64, in values and gradients.

        It is found once for all timings of an op at a shape. Raises WrongOp where it is larger than
        rounding explains.
        """
        key = (timing.op, timing.shape)
        if key not in self._errors:
            case, shape = FUSED_OPS[timing.op], SHAPES[timing.shape]
            try:
                self._errors[key] = self._error(case, shape)
            except (ValueError, RuntimeError) as error:
                # a launch that fails is a wrong result too, and its text the reason
                self._errors[key] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        found, bound = self._errors[key], FUSED_OPS[timing.op].bound[self.dtype]
        if isinstance(found, str):
            raise WrongOp(found)
        if not found <= bound:
            raise WrongOp(f"wrong: relative error {found:.2g}, where rounding explains {bound:g}")
        return found

    def _error(self, case: FusedOp, shape: Shape) -> float:
        # fp64 products of a whole model's width would take longer than all timings
        exact = (
            torch.float64
            if not case.flops(shape, "forward") or self.device.type == "cpu"
            else torch.float32
        )
        found = [
            _values_and_gradients(case, op, self.inputs(case, shape, dtype), self.dtype)
            for op, dtype in ((_decoding(case), self.dtype), (case.ref, exact))
        ]
        return max(_relative(actual, expected) for actual, expected in zip(*found, strict=True))

    def prepare(self, timing: Timing) -> tuple[Callable[[], object], int]:
        """What to time, and how many calls of the op it is."""
        case, shape = FUSED_OPS[timing.op], SHAPES[timing.shape]
        op = {"fluxfast": case.ours, "eager": case.eager, "compile": case.eager}[timing.contender]
        if timing.contender == "compile":
            op = torch.compile(op, dynamic=False)
        if self.device.type == "cpu":
            return _call(case, op, self.inputs(case, shape, self.dtype), timing.mode), 1
        size = sum(x.nbytes for x in self.inputs(case, shape, self.dtype))
        count = max(1, min(MOST_INPUTS, ROTATED_BYTES // size))
        calls = [
            _call(case, op, self.inputs(case, shape, self.dtype, seed), timing.mode)
            for seed in range(count)
        ]
        return captured(calls), count

    def record(self, timing: Timing, samples: Sequence[float]) -> None:
        self.records.append(timing._asdict() | stats(samples).as_record())

    # what pytest asks a plugin

    def pytest_generate_tests(self, metafunc: Any) -> None:
        metafunc.parametrize("timing", self.timings, ids=str)
        metafunc.parametrize("session", [self], ids=[""])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and report.longrepr is not None:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = crash.message if crash is not None else str(report.longrepr)
            timing = next(
                t for t in self.timings if f"[{t}-" in report.nodeid or f"-{t}]" in report.nodeid
            )
            self.reasons[timing] = " ".join(text.split()).removeprefix(
                "fluxfast_bench.ops.session.WrongOp: "
            )[:240]


def _outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _decoding(case: FusedOp) -> Op:
    decode = case.decode
    return case.ours if decode is None else lambda *inputs: decode(*case.ours(*inputs))


def _values_and_gradients(
    case: FusedOp, op: Op, inputs: list[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    outs = _outputs(op(*inputs))
    if case.backward is None:
        return [out.detach() for out in outs]
    generator = torch.Generator(outs[0].device).manual_seed(1)
    douts = [
        torch.randn(out.shape, generator=generator, device=out.device).to(dtype).to(out.dtype)
        for out in outs
    ]
    grads = torch.autograd.grad(outs, [x for x in inputs if x.requires_grad], douts)
    return [*(out.detach() for out in outs), *grads]


def _relative(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm())


def _call(case: FusedOp, op: Op, inputs: list[Tensor], mode: str) -> Callable[[], object]:
    """A call without arguments, forward alone or with backward."""
    if mode == "forward":

        def forward() -> object:
            with torch.no_grad():
                return op(*inputs)

        return forward
    outs = _outputs(op(*inputs))
    douts = [torch.randn_like(out) for out in outs]
    wanted = [x for x in inputs if x.requires_grad]
    del outs

    def both() -> object:
        return torch.autograd.grad(_outputs(op(*inputs)), wanted, douts)

    return both
