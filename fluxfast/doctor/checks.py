"""A check: something is computed as a run computes it and by the reference, and the two compared.

An error is relative, and that of the worst row: the norm of the difference of two rows, divided by
the norm of the expected row or by the mean of all rows' norms, whichever is larger. So one wrong
row of a million is seen, and a row that is nearly zero makes no false alarm.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Named = dict[str, Tensor]
Status = Literal["pass", "fail", "not checked"]


class Tolerance(NamedTuple):
    """How large an error may be, and what explains an error of that size."""

    bound: float
    why: str


class Part(NamedTuple):
    """One result of a check: its error, and what is allowed."""

    name: str
    error: float
    tolerance: Tolerance

    @property
    def passed(self) -> bool:
        # a NaN does not pass, since it compares as false
        return self.error <= self.tolerance.bound

    @property
    def excess(self) -> float:
        """The error as a share of what is allowed; more than 1 is a failure."""
        if self.passed:
            return self.error / self.tolerance.bound if self.tolerance.bound else 0.0
        return (
            self.error / max(self.tolerance.bound, 1e-30) if math.isfinite(self.error) else math.inf
        )


class Rate(NamedTuple):
    """Work a second: bytes or operations, and which of the two."""

    per_second: float
    unit: Literal["B/s", "op/s"]


@dataclass(frozen=True)
class Finding:
    """What a check found. `note` is worth telling, but is no failure."""

    parts: tuple[Part, ...]
    note: str = ""

    @property
    def worst(self) -> Part:
        return max(self.parts, key=lambda part: part.excess)


@dataclass(frozen=True)
class Check:
    """One check.

    name: unique among the checks.
    run: computes and compares.
    what, way: what is checked and by which implementation, in `ops.verdicts`' words ("": neither).
    time: measures the rate of the same, or of what the check is about.
    short: whether it is part of the short form, which a run makes at its first start.
    obstacle: why it can't be run here.
    way_out: what a user can do if it fails.
    optional: if it raises, the thing is merely absent on this device.
    assumed: the rate that `fluxfast-train plan` assumes.
    """

    name: str
    run: Callable[[], Finding] | None = None
    what: str = ""
    way: str = ""
    time: Callable[[], Rate] | None = None
    short: bool = False
    obstacle: str | None = None
    way_out: str = ""
    optional: bool = False
    assumed: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of a check, as plain values.

    error, bound, why, worst: of the part with the largest excess, whose name is `worst`.
    cause, way_out: of a failure, or why it was not checked.
    again: nothing is known of what should have been checked, and another try may tell.
    """

    name: str
    status: Status
    what: str = ""
    way: str = ""
    error: float | None = None
    bound: float | None = None
    why: str = ""
    worst: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)
    rate: float | None = None
    unit: str = ""
    assumed: float | None = None
    seconds: float = 0.0
    cause: str = ""
    way_out: str = ""
    note: str = ""
    again: bool = False

    def as_json(self) -> dict[str, Any]:
        """The fields that say something.

        Numbers that are not finite become text, as JSON has none.
        """
        found = {
            name: value
            for name, value in asdict(self).items()
            if value not in (None, "", {}) and value is not False
        }
        for name in ("error", "rate"):
            if name in found:
                found[name] = _json_number(found[name])
        if "parts" in found:
            found["parts"] = {name: _json_number(error) for name, error in found["parts"].items()}
        return found

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Outcome:
        found = dict(values)
        for name in ("error", "rate"):
            if name in found:
                found[name] = float(found[name])
        if "parts" in found:
            found["parts"] = {name: float(error) for name, error in found["parts"].items()}
        return cls(**found)


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The error of the worst row (see the module's docstring); NaN if a value is not finite.

    Raises AssertionError on tensors of different shapes.
    """
    if actual.shape != expected.shape:
        raise AssertionError(
            f"a result has the shape {list(actual.shape)}, the reference's is "
            f"{list(expected.shape)}"
        )
    if actual.numel() == 0:
        return 0.0
    wide = torch.promote_types(expected.dtype, torch.float32)
    rows, exact = (
        t.detach().to(wide).reshape(-1, t.shape[-1] if t.ndim else 1) for t in (actual, expected)
    )
    norms = exact.norm(dim=1)
    error = (rows - exact).norm(dim=1) / norms.clamp_min(
        max(float(norms.mean()), torch.finfo(torch.float32).tiny)
    )
    # amax keeps a NaN
    return float(error.amax())


def compare(actual: Named, expected: Named, tolerance: Callable[[str], Tolerance]) -> list[Part]:
    """A part for each result of the reference.

    Raises AssertionError if ours are not the same results by name.
    """
    if actual.keys() != expected.keys():
        raise AssertionError(
            f"the results are {sorted(actual)}, the reference's {sorted(expected)}"
        )
    return [
        Part(name, relative_error(actual[name], expected[name]), tolerance(name))
        for name in expected
    ]


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill new tensors with NaN (integers: their maximum), so that what nobody wrote is seen."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    # the public function would import torch's compiler, which takes seconds
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
        torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])


# what arithmetic alone explains: sums of D terms in another order, and roundings on the way
_VALUES = {
    torch.float32: Tolerance(2e-5, "fp32 sums of thousands of terms in another order"),
    torch.bfloat16: Tolerance(2**-7, "one or two roundings to bfloat16's 8 bits"),
    torch.float16: Tolerance(2**-10, "one or two roundings to float16's 11 bits"),
}
_PRODUCTS = {
    torch.float32: Tolerance(5e-5, "fp32 sums of thousands of products in another order"),
    torch.bfloat16: Tolerance(
        2e-2, "three roundings to bfloat16's 8 bits, in the low-rank products and at the end"
    ),
    torch.float16: Tolerance(
        3e-3, "three roundings to float16's 11 bits, in the low-rank products and at the end"
    ),
}
_LOST = "e4m3 products, of which a tensor core keeps some 13 bits below the largest"
_CODES = Tolerance(
    6e-3,
    "a few codes that fall on the other side of a rounding; one step of every code would be 1e-2",
)


def of_values(dtype: torch.dtype) -> Callable[[str], Tolerance]:
    """The tolerances of an op's results, by their names.

    Names that end in "codes" are those of 8-bit codes, decoded.
    """
    return lambda name: _CODES if name.endswith("codes") else _VALUES[dtype]


def of_products(
    dtype: torch.dtype, adapters: torch.dtype | None = None, lost: float = 0.0
) -> Callable[[str], Tolerance]:
    """The tolerances of matrix products and of attention, by the results' names.

    adapters: the dtype in which the adapters' gradients, dA, dB and dC, are stored. lost: how much
    of its sums the device loses (`ops.device.sum_loss`).
    """

    def tolerance(name: str) -> Tolerance:
        stored = (
            name.startswith(("dA", "dB", "dC"))
            and adapters is not None
            and adapters.itemsize < dtype.itemsize
        )
        known = stored_in(adapters) if stored and adapters is not None else _PRODUCTS[dtype]
        return known if known.bound >= lost else Tolerance(lost, _LOST)

    return tolerance


def stored_in(dtype: torch.dtype) -> Tolerance:
    """The tolerance of a result that was computed in fp32 and is stored in `dtype`."""
    return _VALUES[dtype]


def reference_dtype(dtype: torch.dtype) -> torch.dtype:
    """The reference's dtype for activations of `dtype`: fp32 for 16 bits, fp64 for fp32."""
    return torch.float32 if dtype.itemsize == 2 else torch.float64


def widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as the reference reads it: floating-point numbers at least in `dtype`.

    Integers and 8-bit codes stay as they are.
    """
    if not x.is_floating_point() or x.itemsize == 1:
        return x
    return x.to(torch.promote_types(x.dtype, dtype))


def overall_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖ of whole tensors, whose rows many ops have mixed."""
    wide = torch.promote_types(expected.dtype, torch.float32)
    return float((actual.to(wide) - expected.to(wide)).norm() / expected.to(wide).norm())


class Random:
    """Random tensors of one device and dtype; the same seed gives the same tensors."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """Normal numbers, times scale, drawn in fp32."""
        made = torch.randn(shape, generator=self._generator, device=self.device)
        return (made * scale if scale != 1 else made).to(dtype or self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self._generator, device=self.device)

    def permutation(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self._generator, device=self.device)
