"""The fused AdamW and Lion with states in 8 bits or fp32, beside their formulas in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from fluxfast.doctor.checks import Finding, Part, Random, Tolerance
from fluxfast.doctor.scope import Scope
from fluxfast.ops.blockwise_update import code_maps, decode, encode, in_blocks, update_ref

Formula = Literal["adamw", "lion"]
STEP, LR, BETAS, EPS, DECAY = 3, 1e-2, (0.9, 0.99), 1e-6, 0.1
_ROUNDED = {
    torch.float32: Tolerance(1e-4, "a few roundings of fp32, where terms cancel"),
    torch.bfloat16: Tolerance(2.0**-7 + 1e-4, "one rounding to bfloat16"),
}
_STATES = {
    # the map's neighbouring numbers are at most 0.0141 apart
    8: Tolerance(0.0071, "the nearest of 256 numbers, as a share of the block's largest"),
    32: Tolerance(1e-5, "a few roundings of fp32"),
}


def check_blockwise(formula: Formula) -> Callable[[Scope, torch.dtype], Finding]:
    """A check of one update of parameters of a type, with states in 8 bits and in fp32."""
    return lambda scope, dtype: Finding(
        tuple(part for bits in (8, 32) for part in _check(scope, formula, bits, dtype))
    )


def _check(scope: Scope, formula: Formula, bits: int, dtype: torch.dtype) -> list[Part]:
    from fluxfast_kernels.blockwise_update import States, blockwise_table, blockwise_update
    from fluxfast_kernels.update_tables import gradient_table

    randn = Random(scope.torch_device, dtype, seed=12)
    shapes = [(1,), (63,), (scope.rank, 1 + 3 * scope.sizes.dim // 4), (2, 4096)]
    params, grads = ([randn(*shape) for shape in shapes] for _ in range(2))
    values = [[randn(*shape, dtype=torch.float32) for shape in shapes]]
    if formula == "adamw":
        values.append([v.square() for v in values[0]])
    maps = code_maps(scope.torch_device)
    states: list[list[Tensor]] = list(values)
    scales: list[list[Any]] = [[None] * len(shapes) for _ in values]
    if bits == 8:
        coded = [
            [encode(in_blocks(v), maps[i, 1]) for v in of_state]
            for i, of_state in enumerate(values)
        ]
        states = [
            [
                codes.flatten()[: p.numel()].clone()
                for (codes, _), p in zip(each, params, strict=True)
            ]
            for each in coded
        ]
        scales = [[scale for _, scale in each] for each in coded]
    absent = [[None] * len(shapes)] * (2 - len(values))
    kept = States(*states, *absent, *scales, *absent)

    def numbers() -> list[list[Tensor]]:
        """The states in fp64, in rows of 256."""
        if bits == 32:
            return [[in_blocks(s.double()) for s in each] for each in states]
        zero = [int((maps[i, 0] == 0).nonzero()[0]) for i in range(2)]
        return [
            [
                decode(in_blocks(codes, zero[i]), scale.double(), maps[i, 0].double())
                for codes, scale in zip(states[i], scales[i], strict=True)
            ]
            for i in range(len(states))
        ]

    exact, before = [in_blocks(p.double()) for p in params], numbers()
    hyper: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
    for p, grad, *own in zip(exact, grads, *before, strict=True):
        update_ref(formula, p, in_blocks(grad.double()), own, hyper, STEP)
    table = blockwise_table(params, kept)
    blockwise_update(formula, table, gradient_table(table, grads), maps, step=STEP, **hyper)
    errors = [
        (in_blocks(p.double()) - e) / e.abs().clamp_min(1e-2)
        for p, e in zip(params, exact, strict=True)
    ]
    parts = [_part(f"parameters, states in {bits} bits", errors, _ROUNDED[dtype])]
    for name, actual, wanted in zip(("first", "second"), numbers(), before, strict=False):
        errors = [
            (a - w) / w.abs().amax(1, keepdim=True).clamp_min(1e-30)
            for a, w in zip(actual, wanted, strict=True)
        ]
        parts.append(_part(f"{name} states in {bits} bits", errors, _STATES[bits]))
    return parts


def _part(name: str, errors: list[Tensor], tolerance: Tolerance) -> Part:
    return Part(name, max(float(error.abs().max()) for error in errors), tolerance)
