"""Frozen weights of other libraries' linears: bitsandbytes, optimum-quanto and torchao.

If the bytes are those of one of our formats (bitsandbytes' nf4 with nested statistics and its int8;
quanto's and torchao's 8-bit codes with a scale a row), the weight is a `QuantWeight` over the
library's tensors, and our kernels decode it. Otherwise the library decodes it each time that it is
used (`Decoded`). A library is only imported for a module that comes from it.

A library's own product may do more than the weight says. bitsandbytes' int8, for instance, also
rounds its input to 8 bits. Here the product runs in what `compute` says.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fluxfast.ops.linear.params import LinearParams
from fluxfast.ops.linear.weights import FrozenWeight
from fluxfast.ops.row_quant import Quantized
from fluxfast.ops.tensors import divide, version_of
from fluxfast.quant import FORMATS, QuantWeight
from fluxfast.quant.format import Format
from fluxfast.quant.nf4 import BLOCK, NESTED_BLOCK

# for a library's tensor of scales: (what it was, its memory, the fp32 vector made of it then)
_row_scales = WeakIdKeyDictionary()
# for a library's tensor of zero points: whether all of them are 0
_zero_points = WeakIdKeyDictionary()


class Decoded(FrozenWeight):
    """A weight [N, K] that its own library decodes, each time that it is used.

    stored: how, in words, where that is known.
    """

    def __init__(
        self,
        shape: Sequence[int],
        device: torch.device,
        decode: Callable[[], Tensor],
        stored: str | None = None,
    ) -> None:
        super().__init__(shape, device)
        self.decode, self.stored = decode, stored

    def to(self, dtype: torch.dtype, /) -> Tensor:
        with torch.no_grad():
            # a weight decoded from groups need not be contiguous
            return self.decode().to(dtype).contiguous()


class Unpacked(FrozenWeight):
    """A weight in one of our formats that its own library packs, and unpacks for each use.

    stored: how, in words.
    """

    def __init__(
        self,
        format: Format,
        shape: Sequence[int],
        device: torch.device,
        unpack: Callable[[], QuantWeight],
        stored: str,
    ) -> None:
        super().__init__(shape, device)
        self.format, self.unpack, self.stored = format, unpack, stored

    def to(self, dtype: torch.dtype, /) -> Tensor:
        return self.unpack().to(dtype)

    def codes(self, fmt: str, /) -> Quantized:
        return self.unpack().codes(fmt)

    def decode_into(
        self, out: Tensor, out_scale: Tensor | None = None, /, *, transposed: Tensor | None = None
    ) -> None:
        self.unpack().decode_into(out, out_scale, transposed=transposed)


def foreign_weight(module: nn.Module) -> QuantWeight | Decoded | str | None:
    """The frozen weight of another library's linear, or of a library's tensor in an `nn.Linear`.

    None if the module is no such linear; a str says why only the module itself can be called.
    """
    library = type(module).__module__.split(".")[0]
    if library == "bitsandbytes":
        return _bitsandbytes(module)
    if library == "optimum":
        return _quanto(module)
    if type(module).forward is nn.Linear.forward:
        weight = module.weight
        # a tensor class that quantises overrides dequantize; fake tensors and parameters don't
        if isinstance(weight, Tensor) and type(weight).dequantize is not Tensor.dequantize:
            return _tensor_subclass(weight)
        if _is_distributed(weight):
            return "its weight is spread over devices"
    return None


def _is_distributed(weight: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(weight, module.DTensor)


def as_it_is(weight: Tensor, bias: Tensor | None) -> LinearParams:
    """A linear of plain tensors.

    A weight of 8 bits without a scale is decoded, since no product reads it.
    """
    if weight.dtype.itemsize > 1 or torch.compiler.is_compiling():
        return LinearParams(weight, bias)
    # fp32 holds each of a bias's values
    wide = bias if bias is None or bias.dtype.itemsize > 1 else bias.detach().float()
    return LinearParams(Decoded(weight.shape, weight.device, weight.detach), wide)


def rows_of(name: str, codes: Tensor, scale: Tensor, divisor: float = 1.0) -> QuantWeight:
    """A weight of the format `name` over codes [N, K].

    scale: one for each row, or one for all, of any shape, type and device. They are divided by
    `divisor` to be the format's.
    """
    rows, cols = codes.shape
    parts = {"packed": codes, "scale": _row_scale(scale, rows, codes.device, divisor)}
    return QuantWeight(FORMATS[name], parts, (rows, cols))


def _row_scale(scale: Tensor, rows: int, device: torch.device, divisor: float) -> Tensor:
    """The scales as [rows] fp32, kept as long as nobody changes the library's tensor."""
    as_it_is = scale.dtype == torch.float32 and divisor == 1 and scale.device == device
    if as_it_is and scale.numel() == rows:
        return scale.detach().reshape(-1)
    version = None if torch.compiler.is_compiling() else version_of(scale)
    if version is None:
        return _row_vector(scale, rows, device, divisor)
    # a tensor's version stays as it is where its data is put in place of others
    state = (version, scale.data_ptr(), scale.device, rows, device)
    known = _row_scales.get(scale)
    if known is None or known[0] != state:
        # its memory is kept with it, so that no other data can come to lie there
        known = (state, scale.detach(), _row_vector(scale, rows, device, divisor))
        _row_scales[scale] = known
    return known[2]


def _row_vector(scale: Tensor, rows: int, device: torch.device, divisor: float) -> Tensor:
    vector = divide(scale.detach().reshape(-1).to(device).float(), divisor)
    return vector.expand(rows).contiguous()


def _bitsandbytes(module: Any) -> QuantWeight | Decoded | str:
    import bitsandbytes as bnb

    weight = module.weight
    if type(module).forward is bnb.nn.Linear8bitLt.forward:
        scale = module.state.SCB if module.state.SCB is not None else getattr(weight, "SCB", None)
        if module.state.has_fp16_weights or weight.dtype != torch.int8 or scale is None:
            return "its weight is not quantised yet"
        return rows_of("int8", weight.data, scale, divisor=127)
    if type(module).forward is not bnb.nn.Linear4bit.forward:
        return f"{type(module).__name__} is not known"
    state = getattr(weight, "quant_state", None) or module.quant_state
    if state is None:
        return "its weight is not quantised yet"
    if getattr(state, "packing_format_for_cpu", False):
        return "its weight is packed for inference on a CPU"
    return four_bit(weight.data, state)


def four_bit(weight: Tensor, state: Any) -> QuantWeight | Decoded:
    """A weight of bitsandbytes' 4-bit kinds, with its state."""
    import bitsandbytes as bnb

    packed = weight.reshape(-1).view(torch.uint8)
    if (
        state.quant_type == "nf4"
        and state.nested
        and (state.blocksize, state.state2.blocksize) == (BLOCK, NESTED_BLOCK)
    ):
        parts = {
            "packed": packed,
            "absmax": state.absmax,
            "nested_absmax": state.state2.absmax,
            "offset": state.offset.reshape(1),
        }
        # a trainer that offloads layers may have left the small ones where they were
        parts = {name: part.to(packed.device) for name, part in parts.items()}
        return QuantWeight(FORMATS["nf4"], parts, (state.shape[0], state.shape[1]))
    return Decoded(
        state.shape, packed.device, lambda: bnb.functional.dequantize_4bit(weight, state)
    )


def _quanto(module: Any) -> QuantWeight | Decoded | str:
    from optimum.quanto import QLinear, WeightQBytesTensor

    if type(module).forward is not QLinear.forward:
        return f"{type(module).__name__} is not known"
    if not module.frozen:
        return "its weight is not frozen yet"
    if module.activation_qtype is not None:
        return "it quantises its activations"
    weight = module.weight
    names = {torch.int8: "int8", torch.float8_e4m3fn: "fp8_e4m3"}
    if type(weight) is WeightQBytesTensor and weight.axis == 0 and weight._data.dtype in names:
        return rows_of(names[weight._data.dtype], weight._data, weight._scale)
    return Decoded(weight.shape, weight.device, weight.dequantize)


def _tensor_subclass(weight: Any) -> QuantWeight | Decoded | str:
    name = type(weight).__name__
    if type(weight).__module__.split(".")[0] != "torchao" or hasattr(weight, "input_quant_func"):
        return f"its weight is of the class {name}"
    if any(
        getattr(weight, part, None) is not None
        for part in ("act_quant_kwargs", "act_quant_scale", "act_pre_scale")
    ):
        return f"{name} quantises its activations"
    codes: Any = getattr(weight, "qdata", None)
    names = {torch.int8: "int8", torch.float8_e4m3fn: "fp8_e4m3"}
    if (
        codes is None
        or codes.dtype not in names
        or not codes.is_contiguous()
        or codes.shape != weight.shape
    ):
        return Decoded(weight.shape, weight.device, weight.dequantize)
    if weight.scale.numel() != weight.shape[0] or not _symmetric(
        getattr(weight, "zero_point", None)
    ):
        return Decoded(weight.shape, weight.device, weight.dequantize)
    return rows_of(names[codes.dtype], codes, weight.scale)


def _symmetric(zero_point: Tensor | None) -> bool:
    if zero_point is None:
        return True
    if zero_point not in _zero_points:
        # kept, since asking waits for the device
        _zero_points[zero_point] = not bool(zero_point.any())
    return _zero_points[zero_point]
