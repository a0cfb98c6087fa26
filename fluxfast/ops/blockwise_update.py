"""A step of AdamW or Lion, and states in 8 bits: the reference of the fused update.

The formulas are in `fluxfast_kernels.blockwise_update`. A state is coded in bitsandbytes' map of
256 numbers, by the nearest of them. That is how bitsandbytes' own plain version codes it, beside
which the tests hold this one; its GPU kernel has not been compared. Its CPU version first rounds
what it codes to a multiple of 2/65535, and so takes second moments of less than 1/65535 of their
block's largest for zeros.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# elements of a tensor that share a scale
QUANT_BLOCK = 256


def dynamic_map(signed: bool) -> Tensor:
    """The 256 numbers between -1 (or 0) and 1 that codes stand for, in order; fp32.

    Seven decades, of which each has twice as many numbers as the one below it, in the middles of
    equal intervals; and 0 and 1 (Dettmers, "8-Bit Approximations for Parallelism in Deep
    Learning"). They are bit by bit those of `bitsandbytes.functional.create_dynamic_map`.
    """
    numbers = [0.0, 1.0]
    for decade in range(7):
        bounds = torch.linspace(0.1, 1, 2**decade * (1 if signed else 2) + 1)
        middles = (10 ** (decade - 6) * ((bounds[:-1] + bounds[1:]) / 2)).tolist()
        numbers += [*middles, *(-x for x in middles if signed)]
    return torch.tensor(sorted(numbers + [0.0] * (256 - len(numbers))))


@functools.cache
def code_maps(device: torch.device) -> Tensor:
    """For signed and unsigned states, the map's numbers and the bounds between them.

    A bound is the largest fp32 number that is no nearer to the next number of the map than to its
    own. [2, 2, 256] fp32 on the device; the last bound is infinite.
    """
    maps = []
    for numbers in (dynamic_map(signed=True), dynamic_map(signed=False)):
        middles = (numbers[1:].double() + numbers[:-1].double()) / 2
        bounds = middles.float()
        below = torch.nextafter(bounds, torch.full_like(bounds, -torch.inf))
        bounds = torch.where(bounds.double() > middles, below, bounds)
        maps.append(torch.stack((numbers, F.pad(bounds, (0, 1), value=torch.inf))))
    return torch.stack(maps).to(device)


def encode(x: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest code of each of x's numbers, as uint8, and each row's scale; x is [N, 256]."""
    scales = x.abs().amax(dim=1)
    divisors = torch.where(scales > 0, scales, 1)
    return torch.bucketize(x / divisors[:, None], bounds[:255]).to(torch.uint8), scales


def decode(codes: Tensor, scales: Tensor, numbers: Tensor) -> Tensor:
    """The numbers that rows of codes [N, 256] stand for, with a scale for each row."""
    return numbers[codes.int()] * scales[:, None]


def in_blocks(x: Tensor, filling: float = 0) -> Tensor:
    """x's elements in order, in rows of 256 of which the last is filled up. [N, 256]"""
    return F.pad(x.reshape(-1), (0, -x.numel() % QUANT_BLOCK), value=filling).view(-1, QUANT_BLOCK)


def update_ref(
    formula: str,
    p: Tensor,
    grad: Tensor,
    states: Sequence[Tensor],
    group: Mapping[str, Any],
    step: int,
) -> None:
    """A step of parameters and states in place, by the formulas; all of them in one dtype."""
    (beta1, beta2), lr = group["betas"][:2], group["lr"]
    p.mul_(1 - lr * group["weight_decay"])
    m = states[0]
    if formula == "lion":
        p.add_((m * beta1).add_(grad * (1 - beta1)).sign_(), alpha=-lr)
        m.mul_(beta2).add_(grad, alpha=1 - beta2)
        return
    v = states[1]
    m.mul_(beta1).add_(grad, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = v.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    p.addcdiv_(m, denominator, value=-lr / (1 - beta1**step))
