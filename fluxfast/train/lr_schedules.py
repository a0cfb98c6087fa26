"""Learning-rate schedules: the courses that `lr_scheduler` names."""

import math
from typing import get_args

from diffusers.optimization import (
    get_constant_schedule,
    get_constant_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fluxfast.config.run_fields import Scheduler

LR_SCHEDULERS: tuple[str, ...] = get_args(Scheduler)


def build_lr_scheduler(
    optimizer: Optimizer,
    name: str,
    *,
    warmup: int = 0,
    total: int,
    power: float = 0.8,
    lr_end: float = 4e-7,
    cycles: int = 1,
    done: int = 0,
) -> LambdaLR:
    """The schedule that `lr_scheduler` names, over a run of `total` optimiser steps; call `step()`
    after each.

    The first `done` steps are behind: the next one's rate is what a run would have there that had
    this schedule from its start. The highest rates are those that the optimiser was built with.

    All rise linearly over the first `warmup` steps. Then constant stays, linear falls to 0 at
    `total`, and polynomial falls to `lr_end` as (1 - progress)^`power`. cosine falls to `lr_end` in
    half a wave, cosine_with_restarts does so `cycles` times, beginning at the top each time, and
    sine goes from `lr_end` to the top and back `cycles` times. (SimpleTuner's last three have a
    period of `lr_warmup_steps`, or of 1000 steps, whatever the run's length.)
    """
    for group in optimizer.param_groups:
        # torchao's optimisers have the rate in a tensor, which the schedule writes to
        group.setdefault("initial_lr", float(group["lr"]))
    # the schedule's constructor makes one step itself
    last = done - 1
    if name in ("constant", "constant_with_warmup"):
        if not warmup:
            return get_constant_schedule(optimizer, last_epoch=last)
        return get_constant_schedule_with_warmup(optimizer, warmup, last_epoch=last)
    if name == "linear":
        return get_linear_schedule_with_warmup(optimizer, warmup, total, last_epoch=last)
    if name not in LR_SCHEDULERS:
        raise ValueError(
            f"lr_scheduler {name!r} isn't implemented: choose one of {', '.join(LR_SCHEDULERS)}"
        )
    lr = optimizer.defaults["lr"]
    if lr_end >= lr:
        raise ValueError(f"lr_end must be below learning_rate for {name}, got {lr_end} and {lr}")
    if name == "polynomial":
        return get_polynomial_decay_schedule_with_warmup(
            optimizer, warmup, total, lr_end=lr_end, power=power, last_epoch=last
        )

    def height(progress: float) -> float:
        """Where the rate is between `lr_end` (0) and the top (1)."""
        if name == "sine":
            return math.sin(math.pi * cycles * progress) ** 2
        waves = cycles if name == "cosine_with_restarts" else 1
        # the end of the run is the end of its last wave
        part = waves * progress % 1 if progress < 1 else 1.0
        return 0.5 * (1 + math.cos(math.pi * part))

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return lr_end / lr + (1 - lr_end / lr) * height(progress)

    return LambdaLR(optimizer, factor, last_epoch=last)
