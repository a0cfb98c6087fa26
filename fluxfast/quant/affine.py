"""Codes on a uniform grid per group of consecutive columns: what int4 and int2 share.

    w = scale · (unit · code - zero)      0 ≤ code ≤ top,  0 ≤ zero ≤ unit · top

Zero is an integer, but counts in 1/unit of a step, so that a group of few weights gets a grid that
fits it. All but the product with the scale is integer arithmetic, so decoding rounds once. Every
grid contains 0, so a group's range is [min(w, 0), max(w, 0)].

The grid is searched for least squared error, in steps of the plain min-max grid, u = w / step. A
search starts from the range with either end shrunk by one of `shrinks` and takes the codes that
this grid gives. Then, `refits` times, it fits scale and zero to the codes by least squares, rounds
both to what can be stored, and takes the codes anew. It keeps the best grid it has seen. u is
rounded to a multiple of `grain` first: then the sums over a group and the products with a code are
exact in fp32, and no implementation has to add in any particular order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# a group whose step is smaller becomes all zeros: its inverse, and what is computed with it, would
# leave fp32
LEAST_STEP = 2.0**-100


@dataclass(frozen=True)
class Affine:
    """The numbers of one format.

    Group size, highest code, unit of the zero, and three about the search for a grid.
    """

    group: int
    top: int
    unit: int
    grain: float
    shrinks: tuple[float, ...]
    refits: int


class Grid(NamedTuple):
    """One grid per group; codes are [..., group], and `stored` is what the scale is stored as.

    All but `stored` are fp32.
    """

    stored: Tensor
    scale: Tensor
    zero: Tensor
    codes: Tensor


def groups_of(weight: Tensor, group: int) -> Tensor:
    """[N, K] as [N, ceil(K / group), group]; columns that are not there count as zeros."""
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % group)).unflatten(1, (-1, group))


def search(
    w: Tensor,
    affine: Affine,
    store: Callable[[Tensor], tuple[Tensor, Tensor]],
    least_step: float | Tensor = LEAST_STEP,
) -> Grid:
    """The best grid found for each group of w [N, groups, group] fp32.

    `store` rounds scales [N, groups] fp32 to what the format keeps, and gives that and its value in
    fp32; steps of at least `least_step` must be in its range.
    """
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    step = high * (1 / affine.top) - low * (1 / affine.top)
    step = torch.where(step < least_step, 0.0, step)
    per_step = torch.where(step == 0, 0.0, 1 / step)
    u = torch.round(w * per_step[..., None] * (1 / affine.grain)) * affine.grain
    u_low, u_high, u_sum = low * per_step, high * per_step, u.sum(-1)
    best, least = None, torch.empty(0)
    for shrink_low in affine.shrinks:
        for shrink_high in affine.shrinks:
            # the value of code 0, and the distance between codes, both in steps
            start = u_low * shrink_low
            size = (u_high * shrink_high - start) * (1 / affine.top)
            for _ in range(affine.refits + 1):
                grid, size = _grid(u, start, size, step, per_step, affine, store)
                q, z = grid.codes, grid.zero * (1 / affine.unit)
                q_sum, qq_sum, uq_sum = q.sum(-1), (q * q).sum(-1), (u * q).sum(-1)
                # Σ(size·(q - z) - u)², less Σu²
                error = (size * size) * (
                    (qq_sum - 2 * z * q_sum) + affine.group * (z * z)
                ) - 2 * size * (uq_sum - z * u_sum)
                if best is None:
                    best, least = grid, error
                else:
                    better = error < least
                    least = torch.where(better, error, least)
                    best = Grid(
                        torch.where(better, grid.stored, best.stored),
                        torch.where(better, grid.scale, best.scale),
                        torch.where(better, grid.zero, best.zero),
                        torch.where(better[..., None], grid.codes, best.codes),
                    )
                covariance = affine.group * uq_sum - u_sum * q_sum
                variance = affine.group * qq_sum - q_sum * q_sum
                fits = (covariance > 0) & (variance > 0)
                size = torch.where(fits, covariance / variance, size)
                start = torch.where(fits, (u_sum - size * q_sum) * (1 / affine.group), -(z * size))
    assert best is not None
    return best


def _grid(
    u: Tensor,
    start: Tensor,
    size: Tensor,
    step: Tensor,
    per_step: Tensor,
    affine: Affine,
    store: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> tuple[Grid, Tensor]:
    """The nearest grid that can be stored to one from `start` in strides of `size`.

    It comes with u's codes on it. Its own stride, in steps, comes second.
    """
    stored, scale = store(size * step * (1 / affine.unit))
    size = scale * affine.unit * per_step
    per_size = torch.where(size > 0, 1 / size, 0.0)
    zero = torch.round((-start * per_size * affine.unit).clamp(0, affine.unit * affine.top))
    codes = torch.round(
        (u * per_size[..., None] + (zero * (1 / affine.unit))[..., None]).clamp(0, affine.top)
    )
    return Grid(stored, scale, zero, codes), size


def quantize_triton(weight: Tensor, parts: Mapping[str, Tensor], affine: Affine) -> None:
    """`search` by Triton's kernel: weight [N, K] into int4's parts, or int2's.

    int2's parts hold their global_scale already.
    """
    from fluxfast_kernels.quantize_affine import quantize_affine

    quantize_affine(
        weight,
        parts["packed"],
        parts["scale"],
        parts["zero"],
        parts.get("global_scale"),
        group=affine.group,
        top=affine.top,
        unit=affine.unit,
        grain=affine.grain,
        shrinks=affine.shrinks,
        refits=affine.refits,
        least_step=LEAST_STEP,
    )


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., n] of `bits` bits as bytes [..., n · bits / 8]; the first is in the high bits."""
    per_byte = 8 // bits
    shifts = torch.arange(8 - bits, -1, -bits, device=codes.device)
    return (codes.long().unflatten(-1, (-1, per_byte)) << shifts).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Bytes [..., n] as codes [..., n · 8 / bits] uint8, in the order that `pack` takes them."""
    shifts = torch.arange(8 - bits, -1, -bits, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(-2)


def evaluate(codes: Tensor, zero: Tensor, scale: Tensor, affine: Affine, cols: int) -> Tensor:
    """scale · (unit · code - zero) as [N, cols].

    codes [N, groups, group] and zero [N, groups] are uint8, scale [N, groups] is fp32.
    """
    steps = affine.unit * codes.short() - zero[..., None].short()
    return (scale[..., None] * steps).flatten(1)[:, :cols].contiguous()
