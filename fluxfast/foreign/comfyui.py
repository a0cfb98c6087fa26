"""ComfyUI's linears and norms (`comfy.ops`), which cast their weights to their input's dtype.

Such a module computes what torch's own class of it computes, with a weight that it makes for the
call: cast, unpacked from 8 bits or fewer, changed by functions that ComfyUI or a node has put
there. LoRAs among these are read (`comfyui_patches`), and run beside the base; for all others the
weight is made as ComfyUI makes it, each time that it is used. Where ComfyUI would round the input
of a product to 8 bits, `compute` says what ours runs in.

A module is known by its structure, and what the code of its forward names must be known, since
other classes of the same kind do more.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fluxfast.foreign.code_names import names_in, unknown_in, words
from fluxfast.foreign.comfyui_patches import is_patch, loras_of
from fluxfast.foreign.linears import ROW_FORMATS
from fluxfast.foreign.weights import as_it_is, rows_of
from fluxfast.hooks import own_parameter
from fluxfast.ops.linear.adapters import Lora
from fluxfast.ops.linear.params import LinearParams
from fluxfast.ops.linear.weights import FrozenWeight

_MARKS = ("comfy_cast_weights", "weight_function", "bias_function")
_FORWARDS = ("forward", "forward_comfy_cast_weights", "_forward")
# all that the code of these may name: plain and casting linears and norms, ...
_NAMES = words(
    "run_every_op comfy_cast_weights weight_function bias_function len forward super "
    "forward_comfy_cast_weights cast_bias_weight uncast_bias_weight weight bias "
    "normalized_shape eps torch nn functional linear layer_norm"
)
# ... linears in fp8 without and with a scale, and those whose weights may each have a format
_NAMES_OF_LINEARS = _NAMES | words(
    "fp8_linear training logging info format Exception scale_weight numel to device dtype "
    "_forward _full_precision_mm layout_type QuantizedTensor from_float getattr isinstance "
    "ndim reshape shape fp8_matrix_mult"
)
_TRACED = "torch.compile traces ComfyUI's own module"
# whether each class that was seen is one of them; torch.compile warns of caches of functools
_known: dict[type, bool] = {}
# the layouts of its quantised tensors that are codes and one scale
_ONE_SCALE = words("TensorCoreFP8Layout TensorCoreFP8E4M3Layout")


class MadeForCall(FrozenWeight):
    """A weight that is made for each call, as ComfyUI makes it.

    held: what is kept. functions: what it is given to after its cast, one after the other. scale:
    what the result is multiplied by. stored: how it is kept, in words.
    """

    def __init__(
        self, held: Any, functions: Sequence[Any], scale: Tensor | None, stored: str
    ) -> None:
        super().__init__(held.shape, held.device)
        self.held, self.functions, self.scale, self.stored = held, functions, scale, stored

    def to(self, dtype: torch.dtype, /) -> Tensor:
        with torch.no_grad():
            if _is_quantised(self.held):
                weight = self.held.to(dtype=dtype).dequantize()
            else:
                weight = self.held.detach().to(dtype, copy=True)
            for function in self.functions:
                weight = function(weight)
            if self.scale is not None:
                weight = weight * self.scale.detach().to(weight.device, weight.dtype)
            return weight.to(dtype).contiguous()


def comfy_because(module: nn.Module, plain: type[nn.Module]) -> str | None:
    """Why a module does not compute what torch's class `plain` computes; None where it does."""
    if not isinstance(module, plain):
        return f"{type(module).__name__} is not known"
    if torch.compiler.is_compiling():
        return _TRACED
    kind: Any = type(module)
    if (because := _class_because(kind, _NAMES)) is not None:
        return because
    for name in _functions(module):
        if getattr(module, name):
            return f"its {name} changes what it multiplies by"
    weight = getattr(module, "weight", None)
    if weight is not None and type(weight) not in (Tensor, nn.Parameter):
        return f"its weight is of the class {type(weight).__name__}"
    return None


def is_comfy(module: nn.Module) -> bool:
    """Whether a module is of ComfyUI's classes, which take their input in any dtype."""
    kind = type(module)
    if kind not in _known:
        _known[kind] = all(hasattr(kind, name) for name in _MARKS)
    return _known[kind]


def comfy_linear(module: Any) -> LinearParams | str:
    """A linear of ComfyUI's, or why only it can be called.

    Its adapters are the LoRAs that it adds to its weight at each call; there are none where
    something else changes the weight, too, which the weight itself has then.
    """
    if torch.compiler.is_compiling():
        return _TRACED
    kind: Any = type(module)
    if (because := _class_because(kind, _NAMES_OF_LINEARS)) is not None:
        return because
    if "_v" in module.__dict__:
        return "ComfyUI brings its weight for the length of a call"
    held, bias = own_parameter(module, "weight"), own_parameter(module, "bias")
    if not _is_quantised(held) and type(held) not in (Tensor, nn.Parameter):
        return f"its weight is of the class {type(held).__name__}"
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (held, bias)):
        return "its base is trained"
    for name in _functions(module):
        functions = getattr(module, name)
        if functions and name not in _MARKS:
            return f"its {name} changes what it multiplies by"
        if torch.is_grad_enabled() and not all(map(is_patch, functions or ())):
            return f"its {name} may be trained"
    scale = _scale(module)
    if scale is not None and "scale_weight" not in _named(kind):
        return "its scale_weight is not that of its class"
    loras = _loras(module)
    base = _with_bias(held, module.weight_function if loras is None else (), scale, bias)
    return LinearParams(base.weight, _changed(base.bias, module.bias_function), loras or ())


def _loras(module: Any) -> tuple[Lora, ...] | None:
    """The LoRAs that are all that changes a linear's weight; None where there is more."""
    functions = module.weight_function
    know_of_scale = (getattr(each, "convert_func", None) is not None for each in functions)
    if functions and _scale(module) is not None and not all(know_of_scale):
        # they add to the codes, which are scaled after that
        return None
    held = own_parameter(module, "weight")
    return loras_of(functions, tuple(held.shape), held.device)


def _scale(module: Any) -> Tensor | None:
    """What a linear multiplies its weight by, if it is of a class that has that."""
    kind: Any = type(module)
    return getattr(module, "scale_weight", None) if "fp8_linear" in _named(kind) else None


def _with_bias(
    held: Any, functions: Sequence[Any], scale: Tensor | None, bias: Tensor | None
) -> LinearParams:
    """A linear whose weight is kept as `held`, with what ComfyUI makes of it."""
    codes, scales = held, scale
    if _is_quantised(held):
        codes = held._qdata
        scales = held._params.scale if held._layout_cls in _ONE_SCALE else None
    stored = _words_of(held, codes)
    if functions:
        made = MadeForCall(held, functions, scale, f"{stored}, changed at each call")
        return LinearParams(made, bias)
    if codes is held and scale is None:
        return as_it_is(held, bias)
    name = ROW_FORMATS.get(codes.dtype)
    if name and scales is not None and scales.numel() == 1 and codes.shape == held.shape:
        return LinearParams(rows_of(name, codes, scales), bias)
    return LinearParams(MadeForCall(held, (), scale, stored), bias)


def _words_of(held: Any, codes: Tensor) -> str:
    if codes is not held and codes.dtype not in ROW_FORMATS:
        return str(held._layout_cls).removeprefix("TensorCore").removesuffix("Layout")
    return ROW_FORMATS.get(codes.dtype) or str(codes.dtype).removeprefix("torch.")


def _changed(bias: Tensor | None, functions: Sequence[Any]) -> Tensor | None:
    """A bias as the functions that change it at each call leave it."""
    if bias is None or not functions:
        return bias
    with torch.no_grad():
        made = bias.detach().to(torch.float32, copy=True)
        for function in functions:
            made = function(made)
    return made


def _is_quantised(weight: Any) -> bool:
    """Whether it is a tensor of ComfyUI's that has codes and their scales in it."""
    if type(weight) in (Tensor, nn.Parameter):
        return False
    return all(hasattr(weight, name) for name in ("_qdata", "_layout_cls", "_params"))


@functools.cache
def _class_because(kind: Any, known: frozenset[str]) -> str | None:
    """Why a module's class is not one that can be read; None where it is."""
    # a class's own method to cast with may do more than ComfyUI's function of that name
    if not all(hasattr(kind, name) for name in _MARKS) or hasattr(kind, "cast_bias_weight"):
        return f"{kind.__name__} is not known"
    unknown = unknown_in(_forwards(kind), known)
    return unknown and f"its forward has names that fluxfast doesn't know: {unknown}"


def _functions(module: Any) -> Iterator[str]:
    """The names of what may be called on a weight or a bias on its way."""
    yield from _MARKS[1:]
    others = (name for name in module.__dict__ if name.endswith("_function"))
    yield from (name for name in others if name not in _MARKS)


@functools.cache
def _named(kind: Any) -> frozenset[str]:
    """All that the code of a class's forwards names."""
    return frozenset[str]().union(*map(names_in, _forwards(kind)))


def _forwards(kind: Any) -> list[Any]:
    return [getattr(kind, name) for name in _FORWARDS if hasattr(kind, name)]
