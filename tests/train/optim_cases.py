"""Parameters of awkward sizes, and gradients that differ in every step."""

import pytest
import torch
from torch.nn import Parameter

from fluxfast.config.optimizers import OPTIMIZERS, OptimizerKind

BF16 = torch.bfloat16
# one element, odd sizes, and more than one pass of the CPU
SHAPES = [(1,), (63,), (5, 7), (1000,), (300, 500)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parameters(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    g = generator(1)
    return [Parameter(torch.randn(shape, generator=g).to(dtype)) for shape in SHAPES]


def set_gradients(params: list[Parameter], step: int) -> None:
    g = generator(100 + step)
    for p in params:
        # elements of very different size
        p.grad = (
            torch.randn(p.shape, generator=g) * 10.0 ** torch.randint(-6, 1, p.shape, generator=g)
        ).to(p.dtype)


def installed(name: str) -> OptimizerKind:
    """The optimiser's record.

    The test is skipped where that is one of torchao's, which is no part of the extra `test`, and
    torchao is not there. Every other package has to be.
    """
    kind = OPTIMIZERS[name]
    missing = kind.missing_extra(None)
    assert missing in (None, "torchao"), f"{name}: {missing} is not installed"
    if missing:
        pytest.skip('torchao is not installed: pip install "fluxfast[torchao]" runs this')
    return kind
