"""Running one check: what came of it, and a cause that says something for what went wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fluxfast.doctor.checks import Check, Finding, Outcome, Rate, Status
from fluxfast.ops import verdicts

# what exceptions mean whose own text does not say it, by the names of their types
_MEANINGS = {
    "OutOfResources": "the kernel wants more of this GPU's registers or shared memory than it has",
    "CompilationError": "Triton can't compile the kernel",
    "CompileTimeAssertionFailure": "Triton can't compile the kernel",
    "PTXASError": "NVIDIA's assembler refuses the kernel",
    "ModuleNotFoundError": "a package is missing",
}
_LONGEST = 300
NO_MEMORY = "there is not enough free memory"
# texts of libraries that have no type of exception for too little memory
_MEMORY_SIGNS = ("out of memory", "STATUS_ALLOC_FAILED", "can't allocate memory")


def examine(check: Check, *, comparing: bool = True, timing: bool = True) -> Outcome:
    """Run a check here and now. Whatever it raises becomes its outcome.

    comparing, timing: which of its two halves are wanted.
    """
    if check.obstacle is not None:
        return Outcome(check.name, "not checked", check.what, check.way, cause=check.obstacle)
    start = time.perf_counter()
    finding, rate = None, None
    try:
        with verdicts.ignored(), _exact_products():
            if comparing and check.run is not None:
                finding = check.run()
                if torch.cuda.is_available():
                    # a kernel's error may be raised only here
                    torch.cuda.synchronize()
            if timing and check.time is not None and (finding is None or _passed(finding)):
                rate = check.time()
    except (torch.OutOfMemoryError, MemoryError) as error:
        return _gone_wrong(check, start, error, "not checked", NO_MEMORY)
    except Exception as error:
        # any exception at all: the point is to find what goes wrong on a machine never seen before
        if any(sign in str(error) for sign in _MEMORY_SIGNS):
            return _gone_wrong(check, start, error, "not checked", NO_MEMORY)
        return _gone_wrong(check, start, error, "not checked" if check.optional else "fail", "")
    return outcome_of(check, finding, rate, time.perf_counter() - start)


def outcome_of(check: Check, finding: Finding | None, rate: Rate | None, seconds: float) -> Outcome:
    """The outcome of a check that ran to its end."""
    common: dict[str, Any] = {
        "what": check.what,
        "way": check.way,
        "assumed": check.assumed,
        "seconds": round(seconds, 3),
    }
    if rate is not None:
        common |= {"rate": rate.per_second, "unit": rate.unit}
    if finding is None:
        return Outcome(check.name, "pass", **common)
    worst = finding.worst
    common |= {
        "error": worst.error,
        "bound": worst.tolerance.bound,
        "why": worst.tolerance.why,
        "worst": worst.name,
        "parts": {part.name: part.error for part in finding.parts},
        "note": finding.note,
    }
    if _passed(finding):
        return Outcome(check.name, "pass", **common)
    cause = (
        f"{worst.name} is off by {worst.error:.2g}, where {worst.tolerance.bound:.2g} is "
        f"explained by {worst.tolerance.why}"
    )
    if worst.error != worst.error:
        cause = f"{worst.name} holds numbers that are not finite, or that nobody wrote"
    return Outcome(check.name, "fail", cause=cause, way_out=check.way_out, **common)


def _passed(finding: Finding) -> bool:
    return all(part.passed for part in finding.parts)


def _gone_wrong(
    check: Check, start: float, error: BaseException, status: Status, meaning: str
) -> Outcome:
    name = type(error).__name__
    meaning = meaning or _MEANINGS.get(name, "")
    text = " ".join(str(error).split())[:_LONGEST] or name
    return Outcome(
        check.name,
        status,
        check.what,
        check.way,
        seconds=round(time.perf_counter() - start, 3),
        cause=f"{meaning or name}: {text}",
        way_out=check.way_out,
        again=meaning == NO_MEMORY,
    )


@contextmanager
def _exact_products() -> Iterator[None]:
    """Compute references in full fp32, whatever the run allows itself."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
