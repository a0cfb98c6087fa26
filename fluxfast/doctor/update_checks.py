"""The optimisers' fused updates on Triton, which have no native implementation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from fluxfast.doctor.adamw_checks import check_adamw
from fluxfast.doctor.blockwise_checks import check_blockwise
from fluxfast.doctor.checks import Check, Finding
from fluxfast.doctor.scope import Scope
from fluxfast.doctor.ways import WAY_OUT, obstacle_of, ways

# what a check is called, and what it runs for parameters of a type, by the kernel's name
_UPDATES: dict[str, tuple[str, Callable[[Scope, torch.dtype], Finding]]] = {
    "adamw_bf16": ("AdamW", check_adamw),
    "blockwise_adamw": ("AdamW with blockwise states", check_blockwise("adamw")),
    "blockwise_lion": ("Lion with blockwise states", check_blockwise("lion")),
}


def update_checks(scope: Scope) -> Iterator[Check]:
    """The checks of the optimisers' kernels that the run uses."""
    for impl, said, _ in ways(scope):
        if impl != "triton":
            continue
        for what in scope.updates:
            label, run = _UPDATES[what]
            for name in ("bfloat16", "float32") if scope.exhaustive else (scope.adapter_dtype,):
                yield Check(
                    name=f"{label}, {name} ({said})",
                    run=functools.partial(run, scope, getattr(torch, name)),
                    what=what,
                    way=impl,
                    short=True,
                    obstacle=obstacle_of(impl, scope),
                    way_out=WAY_OUT[impl],
                )
