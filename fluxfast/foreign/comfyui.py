"""ComfyUI's linears and norms (`comfy.ops`), which cast their weights to their input's dtype.

Where no function changes the weight on its way, such a module computes what torch's own class of it
computes; our products cast as well. It is known by its structure, and what the code of its forward
names must be known, since other classes of the same kind multiply in 8 bits or decode a weight.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fluxfast.foreign.code_names import names_in


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


_MARKS = ("comfy_cast_weights", "weight_function", "bias_function")
_FORWARDS = ("forward", "forward_comfy_cast_weights")
# all that the code of these two may name
_NAMES = _names(
    "run_every_op comfy_cast_weights weight_function bias_function len forward super "
    "forward_comfy_cast_weights cast_bias_weight uncast_bias_weight weight bias "
    "normalized_shape eps torch nn functional linear layer_norm"
)


def comfy_because(module: nn.Module, plain: type[nn.Module]) -> str | None:
    """Why a module does not compute what torch's class `plain` computes; None where it does."""
    kind: Any = type(module)
    if not isinstance(module, plain) or not all(hasattr(kind, name) for name in _MARKS):
        return f"{kind.__name__} is not known"
    if torch.compiler.is_compiling():
        return "torch.compile traces ComfyUI's own module"
    if (unknown := _unknown_names(kind)) is not None:
        return f"its forward has names that fluxfast doesn't know: {unknown}"
    for name in _functions(module):
        if getattr(module, name):
            return f"its {name} changes what it multiplies by"
    weight = getattr(module, "weight", None)
    if weight is not None and type(weight) not in (Tensor, nn.Parameter):
        return f"its weight is of the class {type(weight).__name__}"
    return None


def _functions(module: Any) -> Iterator[str]:
    """The names of what may be called on a weight or a bias on its way."""
    yield from _MARKS[1:]
    yield from (name for name in module.__dict__ if name.endswith("_function"))


@functools.cache
def _unknown_names(kind: Any) -> str | None:
    """What a class's forward names that isn't known here, for a message, or None."""
    forwards = [getattr(kind, name, None) for name in _FORWARDS]
    if any(forward is None for forward in forwards):
        return f"{kind.__name__} has no forward of the kind"
    named = set[str]().union(*map(names_in, forwards))
    return ", ".join(sorted(named - _NAMES)) or None
