"""What the modules of all LyCORIS algorithms share: a frozen linear, and an adapter on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from fluxfast.config.lycoris import LycorisOptions
from fluxfast.ops.linear.adapters import Adapter
from fluxfast.quant.linear import shapes_only


class LycorisLinear(nn.Module):
    """A frozen linear and an adapter on it.

    Attributes:
        base_layer: the linear, of any kind.
        options: the algorithm and what it was told.
        enabled: whether the adapter adds anything.
    """

    def __init__(self, base_layer: nn.Module, options: LycorisOptions) -> None:
        super().__init__()
        self.base_layer, self.options, self.enabled = base_layer, options, True
        self.in_features: int = base_layer.in_features  # type: ignore[assignment]
        self.out_features: int = base_layer.out_features  # type: ignore[assignment]
        self.train(base_layer.training)

    def trained(self) -> dict[str, Parameter]:
        """What trains, by the names of a run's own state."""
        raise NotImplementedError

    def numbers(self) -> dict[str, Tensor]:
        """What scales the tensors, by the names that it has in files; fp64, or a whole number.

        The multiplier is contained, as files know none.
        """
        raise NotImplementedError

    def exported(self) -> dict[str, Tensor]:
        """What a file has to hold: `numbers`, and tensors by the names of `trained`."""
        raise NotImplementedError

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Puts a file's tensors into the adapter, so that it computes what the file says.

        By the names of `trained`, but DyLoRA's are not in blocks; a trained scalar is 1 then. The
        numbers that scale the tensors are in the options already.
        """
        raise NotImplementedError

    def read(self, *, share_dropout: bool) -> tuple[Adapter, ...] | str:
        """What blocks compute in the module's place, or why they have to call it.

        share_dropout: as in `AdapterKind.read`.
        """
        raise NotImplementedError


def device_of(linear: Any) -> torch.device:
    """Where a linear's weight is, whatever it is stored in."""
    with shapes_only():
        return linear.weight.device


def whole_weight(linear: Any) -> Tensor:
    """A linear's weight [out, in]; ValueError where its library keeps it in another form."""
    weight = linear.weight.detach()
    if not weight.is_floating_point() or weight.shape != (linear.out_features, linear.in_features):
        raise ValueError(
            f"{type(linear).__name__} keeps its weight as {list(weight.shape)} {weight.dtype}, "
            "and weight decomposition reads it as it is"
        )
    return weight
