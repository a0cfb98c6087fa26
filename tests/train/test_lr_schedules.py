import math

import pytest
import torch
from torch.nn import Parameter

from fluxfast.train.lr_schedules import LR_SCHEDULERS, build_lr_scheduler


def _curve(name, steps=12, lr=1e-3, **arguments):
    optimizer = torch.optim.SGD([Parameter(torch.ones(1))], lr=lr)
    scheduler = build_lr_scheduler(optimizer, name, total=10, lr_end=1e-4, **arguments)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


RISE = [0.0, 5e-4]


def _expected(name, progress):
    low, high = 1e-4, 1e-3
    return {
        "constant": high,
        "constant_with_warmup": high,
        "linear": high * (1 - progress),
        "polynomial": low + (high - low) * (1 - progress) ** 0.8,
        "cosine": low + (high - low) * (1 + math.cos(math.pi * progress)) / 2,
        "cosine_with_restarts": low
        + (high - low) * (1 + math.cos(math.pi * (1 if progress == 1 else 2 * progress % 1))) / 2,
        "sine": low + (high - low) * (1 - math.cos(2 * math.pi * 2 * progress)) / 2,
    }[name]


@pytest.mark.parametrize("name", LR_SCHEDULERS)
@pytest.mark.parametrize("warmup", [0, 2])
def test_schedules(name, warmup):
    rates = _curve(name, warmup=warmup, cycles=2)
    progress = [min(1.0, (step - warmup) / (10 - warmup)) for step in range(warmup, 12)]
    assert rates == pytest.approx(
        RISE[:warmup] + [_expected(name, p) for p in progress], rel=1e-9, abs=1e-12
    )


def test_schedules_refuse():
    with pytest.raises(ValueError, match="'step' isn't implemented: choose one of constant, "):
        _curve("step")
    with pytest.raises(
        ValueError,
        match=r"lr_end must be below learning_rate for polynomial, got 0\.0001 and 5e-05",
    ):
        _curve("polynomial", lr=5e-5)
    assert _curve("constant", lr=5e-5)[-1] == 5e-5
