"""Room for adapters beside the frozen weights of a model, where its products take them as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fluxfast.model.linear import read_or_because
from fluxfast.ops.linear import augmented, products_triton
from fluxfast.ops.linear.params import LinearParams, loras_of

# tokens of a sequence long enough to train on, for the engine that its products take
LONG = 1 << 20


def wants_room(device: torch.device) -> bool:
    """Whether products on that device read weights with their adapters beside them."""
    return products_triton.augments(LONG, device)


def make_room_for_adapters(blocks: Sequence[Any]) -> None:
    """Bring the weights of each group of linears with LoRAs into one augmented weight, in place.

    It is done where the engine of the blocks' products reads them so (`launch.WIDE_ENGINES`), for
    weights that are plain tensors of one dtype; quantised ones get theirs when they are decoded.
    What has room enough already is not touched. Call it when the adapters are there, and after the
    model has been moved: `.to()` gives each tensor memory of its own, without room. While it works
    it needs the memory of one group's weights.
    """
    for block in blocks:
        if block.compute != "same":
            continue
        moved = [_make_room(modules) for modules in block.groups_with_room()]
        if any(moved) and torch.cuda.is_initialized():
            # what the weights lay in is too small for other augmented weights, and would stay taken
            torch.cuda.empty_cache()


def _make_room(modules: Sequence[nn.Module]) -> bool:
    """Whether the weights of a group of linears have been moved."""
    linears = [read_or_because(module) for module in modules]
    known = [linear for linear in linears if isinstance(linear, LinearParams)]
    weights = [p.weight for p in known if isinstance(p.weight, nn.Parameter)]
    rank = sum(lora.a.shape[0] for p in known for lora in loras_of(p))
    if len(weights) < len(modules) or rank == 0 or len({_kind(w) for w in weights}) > 1:
        return False
    if not wants_room(weights[0].device):
        return False
    if augmented.placed(weights, rank) is not None:
        return False
    for weight, place in zip(weights, augmented.make_room(weights, rank), strict=True):
        # the parameters stay the same objects, for others that hold them
        weight.data = place
    return True


def _kind(weight: nn.Parameter) -> tuple[torch.dtype, torch.device, int]:
    return weight.dtype, weight.device, weight.shape[1]
