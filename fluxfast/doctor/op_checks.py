"""Each fused op beside its reference, by every implementation that this machine has."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from fluxfast.doctor.checks import (
    Check,
    Finding,
    Part,
    Random,
    Rate,
    compare,
    of_values,
    poisoned_memory,
    reference_dtype,
    widened,
)
from fluxfast.doctor.op_cases import OpCase, op_cases
from fluxfast.doctor.scope import Scope
from fluxfast.doctor.timing import seconds_of
from fluxfast.doctor.ways import WAY_OUT, obstacle_of, ways, with_isa
from fluxfast.ops import dispatch


def run_case(case: OpCase, scope: Scope, impl: str) -> Finding:
    """Compare an op at every length of the scope, and keep the worst of each result."""
    worst: dict[str, Part] = {}
    with torch.no_grad():
        for number, tokens in enumerate(scope.sizes.tokens):
            inputs = case.inputs(
                Random(scope.torch_device, scope.torch_dtype, number), scope.sizes, tokens
            )
            with poisoned_memory():
                actual = case.compute(impl, inputs)
            wide = reference_dtype(scope.torch_dtype)
            expected = case.compute("ref", {name: widened(t, wide) for name, t in inputs.items()})
            for part in compare(actual, expected, of_values(scope.torch_dtype)):
                part = part._replace(name=f"{part.name}, {tokens} tokens")
                known = worst.get(part.name.partition(",")[0])
                if known is None or not part.error <= known.error:
                    worst[part.name.partition(",")[0]] = part
    return Finding(tuple(worst.values()))


def time_case(case: OpCase, scope: Scope, impl: str) -> Rate:
    """Bytes a second, as if every input and every result were moved once."""
    inputs = case.inputs(
        Random(scope.torch_device, scope.torch_dtype), scope.sizes, scope.sizes.timed
    )
    with torch.no_grad():
        made = case.compute(impl, inputs)
        moved = sum(t.nbytes for t in (*inputs.values(), *made.values()))
        return Rate(
            moved / seconds_of(lambda: case.compute(impl, inputs), scope.torch_device), "B/s"
        )


def op_checks(scope: Scope) -> Iterator[Check]:
    """A check of each fused op in each form, by each implementation."""
    in_use = dispatch.native.cpu_isa() if dispatch.HAS_NATIVE else None
    for case in op_cases(scope):
        lacks = "the native module doesn't route tokens" if case.op.startswith("token_") else None
        for impl, said, isa in ways(scope):
            # an instruction set that is not in use gives no verdict on the one that is
            counts = isa is None or isa == in_use
            if not counts and (lacks or not case.plain):
                continue
            if case.only_triton and impl != "triton":
                continue
            timed = scope.sizes.timed and counts
            yield Check(
                name=f"{case.name} ({said})",
                run=with_isa(functools.partial(run_case, case, scope, impl), isa),
                what=case.op if counts else "",
                way=impl if counts else "",
                time=functools.partial(time_case, case, scope, impl) if timed else None,
                short=True,
                obstacle=obstacle_of(impl, scope, native=lacks),
                way_out=WAY_OUT[impl],
            )
