"""What one linear is: its frozen weight, its bias, and its adapters."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fluxfast.ops.linear.adapters import Adapter, Lora
from fluxfast.ops.linear.weights import FrozenWeight


class LinearParams(NamedTuple):
    """One linear of a group: weight [out, in], bias [out] or None, and its adapters."""

    weight: Tensor | FrozenWeight
    bias: Tensor | None
    adapters: tuple[Adapter, ...] = ()


def loras_of(linear: LinearParams) -> list[Lora]:
    """The adapters of a linear that are one low-rank product with those of its group."""
    if not linear.adapters:
        return []
    return [adapter for adapter in linear.adapters if isinstance(adapter, Lora)]
