"""The patches that ComfyUI applies to a weight each time that it is used.

Where a model is loaded in part, ComfyUI's patcher leaves a LoRA beside its weight: a function in
the linear's `weight_function`, which knows the patches of all weights and the name of its own. A
patch is (strength, what, strength of the model, part of the weight, function). Patches that are
plain LoRAs are read as adapters; of anything else only ComfyUI's functions know what it does.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fluxfast.foreign.code_names import names_in, words
from fluxfast.ops.linear.adapters import Lora

# all that the code of the function may name, ...
_OF_FUNCTION = words(
    "key patches comfy lora calculate_weight dtype convert_func set_func to torch float float32 "
    "float16 bfloat16 stochastic_rounding string_to_seed"
)
# ... and that of a LoRA, whose tensors are in the order of `_factors`
_OF_LORA = words(
    "weights name device dtype shape type flatten reshape transpose torch mm comfy "
    "model_management cast_to_device pad_tensor_to_shape weight_decompose logging error format "
    "Exception"
)


def is_patch(function: Any) -> bool:
    """Whether a function that changes a weight is the patcher's, in which nothing trains."""
    kind: Any = type(function)
    found = all(hasattr(function, name) for name in ("key", "patches"))
    return found and _knows(kind, "__call__", _OF_FUNCTION)


def loras_of(
    functions: Sequence[Any], shape: tuple[int, ...], device: torch.device
) -> tuple[Lora, ...] | None:
    """What these functions add to a weight [N, K], if all of it is LoRAs; else None."""
    found: list[Lora] = []
    for function in functions:
        if not is_patch(function):
            return None
        for patch in function.patches.get(function.key, (None,)):
            if (lora := _lora(patch, shape, device)) is None:
                return None
            found.append(lora)
    return tuple(found)


def _lora(patch: Any, shape: tuple[int, ...], device: torch.device) -> Lora | None:
    """A patch as a LoRA of the whole weight; None for anything else."""
    if not isinstance(patch, tuple) or len(patch) != 5:
        return None
    strength, what, of_model, part, function = patch
    if of_model != 1 or function is not None or (factors := _factors(what)) is None:
        return None
    a, b, scale = factors
    a, b = (t if t.device == device else t.to(device) for t in (a, b))
    if part is not None:
        axis, start, length = part
        # the rows or columns that it leaves alone
        beside = (start, shape[axis] - start - length)
        if min(beside) < 0 or (b.shape[0], a.shape[1])[axis] != length:
            return None
        a, b = (F.pad(a, beside), b) if axis == 1 else (a, F.pad(b, (0, 0, *beside)))
    if (b.shape[0], a.shape[1]) != shape or a.shape[0] != b.shape[1]:
        # ComfyUI says so, and leaves the weight as it is
        return None
    return Lora(a, b, strength * scale)


def _factors(what: Any) -> tuple[Tensor, Tensor, float] | None:
    """A and B of ComfyUI's LoRA, and alpha / r; None for another kind, or one with more to it."""
    kind: Any = type(what)
    if getattr(what, "name", None) != "lora" or not _knows(kind, "calculate_weight", _OF_LORA):
        return None
    if len(what.weights) != 6:
        return None
    up, down, alpha, *others = what.weights
    # of convolutions, weight decomposition, another shape
    if any(each is not None for each in others):
        return None
    a, b = (t.flatten(1) for t in (down, up))
    if a.dtype.itemsize == 1:
        a, b = a.float(), b.float()
    return a, b, 1.0 if alpha is None else float(alpha) / len(a)


@functools.cache
def _knows(kind: Any, method: str, names: frozenset[str]) -> bool:
    """Whether all that the code of a class's method names is known."""
    return names_in(getattr(kind, method, None)) <= names
