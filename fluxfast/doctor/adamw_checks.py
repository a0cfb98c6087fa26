"""adamw_bf16's fused update on Triton, beside its formula in fp64.

It is checked in fp32, and in bf16 with stochastic rounding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fluxfast.doctor.checks import Finding, Part, Random, Tolerance
from fluxfast.doctor.scope import Scope

LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.999), 1e-6, 0.1
# neighbouring bf16 numbers are at most 2^-7 apart, and stochastic rounding stays within one step
_BF16_STEP = 2.0**-7


def _exact(
    p: Tensor, m: Tensor, v: Tensor, grad: Tensor, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """AdamW's parameters and moments after a step, as its paper has them."""
    beta1, beta2 = BETAS
    m = m + (1 - beta1) * (grad - m)
    v = beta2 * v + (1 - beta2) * grad.square()
    update = m / (v.sqrt() / math.sqrt(1 - beta2**step) + EPS)
    return p * (1 - LR * DECAY) - LR / (1 - beta1**step) * update, m, v


def check_adamw(scope: Scope, dtype: torch.dtype) -> Finding:
    """Run one update, and compare all parameters and moments with the formula's.

    Stochastic rounding must land on one of the two neighbours in bf16, and be right on average.
    """
    from fluxfast_kernels.optim import adamw_step, adamw_table
    from fluxfast_kernels.update_tables import gradient_table

    randn = Random(scope.torch_device, dtype, seed=11)
    shapes = [(1,), (63,), (scope.rank, 1 + 3 * scope.sizes.dim // 4), (2, 4096)]
    params, m, grads = ([randn(*shape) for shape in shapes] for _ in range(3))
    v = [randn(*shape).square() for shape in shapes]
    tensors = (params, m, v)
    step, parts = 3, []
    before = zip(*([t.double() for t in each] for each in (*tensors, grads)), strict=True)
    expected = [_exact(p0, m0, v0, grad, step) for p0, m0, v0, grad in before]
    options = {"lr": LR, "eps": EPS, "weight_decay": DECAY}
    table = adamw_table(*tensors)
    adamw_step(table, gradient_table(table, grads), betas=BETAS, step=step, seed=1 << 40, **options)
    for place, name in enumerate(("parameters", "first moments", "second moments")):
        exact = torch.cat([one[place].flatten() for one in expected])
        error = (
            torch.cat([t.double().flatten() for t in tensors[place]]) - exact
        ) / exact.abs().clamp_min(1e-3)
        if dtype == torch.float32:
            parts.append(
                Part(
                    name,
                    float(error.abs().max()),
                    Tolerance(1e-4, "a few roundings of fp32, where terms cancel"),
                )
            )
            continue
        one_step = Tolerance(
            _BF16_STEP + 1e-4, "stochastic rounding, to one of the two neighbours in bfloat16"
        )
        parts.append(Part(name, float(error.abs().max()), one_step))
        deviations = abs(float(error.mean())) / (_BF16_STEP / math.sqrt(12 * len(error)))
        by_chance = Tolerance(6, "one draw in 10^9 is further off")
        parts.append(Part(f"mean of the {name}, in standard deviations", deviations, by_chance))
    return Finding(tuple(parts))
