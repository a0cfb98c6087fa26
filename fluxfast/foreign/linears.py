"""Linears of trainers' own classes, whose frozen weight is stored in fewer bits.

OneTrainer's W8A8, fp8, nf4 and SVD linears, GGUF's of diffusers and of OneTrainer, SDNQ's,
ai-toolkit's and SimpleTuner's, and the linears whose forward sd-scripts and musubi-tuner replace
for scaled fp8. If the bytes are those of one of our formats, our kernels read them where they lie;
otherwise the host decodes its weight each time that it is used. A part of low rank beside the codes
is read as a LoRA that does not train.

A class is known by its structure, as trainers' adapters are: the attributes that it has, and the
names that the code of its forward uses. A class with other names in it is called, since it may do
more than fluxfast knows. What a host's product does beyond the weight, such as rounding its input
to 8 bits, is left to `compute` here, as `weights` says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fluxfast.foreign.code_names import unknown_in, without_context, words
from fluxfast.foreign.weights import Decoded, Unpacked, four_bit, rows_of
from fluxfast.hooks import own_parameter
from fluxfast.ops.linear.adapters import Lora
from fluxfast.ops.linear.params import LinearParams
from fluxfast.quant import FORMATS, QuantWeight

Found = QuantWeight | Decoded | Unpacked | Tensor | str
_UNQUANTISED = "its weight is not quantised yet"
_TRACED = "torch.compile traces its host's own product"
# the formats that store a code of this type for each weight, and a scale for each row
ROW_FORMATS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8_e4m3"}


class HostLinear(NamedTuple):
    """How one host's linear is read.

    Attributes:
        has: attributes by which its class is known.
        names: all that the code of its forward may name: attributes, methods and globals.
        methods: its own methods that the forward may call, whose code is checked alike.
        read: the module to its weight [N, K], or to a reason why only the module can be called.
    """

    has: tuple[str, ...]
    names: frozenset[str]
    methods: tuple[str, ...]
    read: Callable[[Any], Found]


def _w8a8(module: Any) -> Found:
    """OneTrainer's LinearW8A8: codes of 8 bits and one scale, the codes compressed or not."""
    weight, scale = own_parameter(module, "weight"), module.scale
    if not getattr(module, "_compressed", False):
        name = ROW_FORMATS.get(weight.dtype)
        return _UNQUANTISED if name is None else rows_of(name, weight, scale)
    name = ROW_FORMATS[module._compressed_dtype]
    shape = module.original_weight_shape()

    def unpack() -> QuantWeight:
        return rows_of(name, module._decompress(weight.detach()).view(shape), scale)

    return Unpacked(FORMATS[name], shape, weight.device, unpack, f"{name}, compressed")


def _onetrainer_fp8(module: Any) -> Found:
    """OneTrainer's LinearFp8, whose forward reads `_scale`, which stays on its device."""
    weight = own_parameter(module, "weight")
    if weight.dtype != torch.float8_e4m3fn:
        return _UNQUANTISED
    if module._scale is None:
        return Decoded(weight.shape, weight.device, weight.detach, "float8_e4m3fn")
    return rows_of("fp8_e4m3", weight, module._scale)


def _onetrainer_nf4(module: Any) -> Found:
    """OneTrainer's LinearNf4, which keeps bitsandbytes' state."""
    if module.quant_state is None:
        return _UNQUANTISED
    return four_bit(own_parameter(module, "weight").detach(), module.quant_state)


def _gguf(module: Any) -> Found:
    """diffusers' GGUFLinear and OneTrainer's LinearGGUFA8: blocks with scales in between."""
    weight, dtype = own_parameter(module, "weight"), module.compute_dtype
    if (kind := getattr(weight, "quant_type", None)) is None:
        if weight.dtype == (dtype or weight.dtype):
            return weight
        return Decoded(weight.shape, weight.device, lambda: weight.detach().to(dtype))
    # diffusers' function, as the forward finds it
    decode = type(module).forward_native.__globals__["dequantize_gguf_tensor"]
    stored = f"GGUF {getattr(kind, 'name', kind)}"
    return Decoded(weight.quant_shape, weight.device, lambda: decode(weight), stored)


def _sdnq(module: Any) -> Found:
    """SDNQ's linear: its own parameters, or a tensor class in trainings, hold codes and scales."""
    if (unknown := _unknown_names(module.forward_func, _SDNQ_FORWARDS)) is not None:
        return f"its SDNQ forward has names that fluxfast doesn't know: {unknown}"
    held = module._parameters
    weight = held["weight"]
    in_tensor = hasattr(weight, "sdnq_dequantizer")
    if not in_tensor and "sdnq_dequantizer" not in module.__dict__:
        # a plain weight, which SDNQ rounds in each product
        return weight
    how = weight.sdnq_dequantizer if in_tensor else module.sdnq_dequantizer
    parts = vars(weight) if in_tensor else held
    tensors = {k: t for k, t in parts.items() if isinstance(t, Tensor) and k != "bias"}
    codes, scale, shape = tensors["weight"], tensors["scale"], tuple(how.original_shape)
    if how.use_quantized_matmul and not (how.re_quantize_for_matmul or how.is_packed):
        # kept for its own products
        codes = codes.t()
    name = ROW_FORMATS.get(codes.dtype)
    plain = tensors.keys() == {"weight", "scale"} and not (how.use_hadamard or how.use_codebook)
    by_rows = scale.numel() in (1, shape[0]) and scale.dtype.itemsize > 1
    if plain and by_rows and name and codes.shape == shape and codes.is_contiguous():
        return rows_of(name, codes, scale)

    def decode() -> Tensor:
        if in_tensor:
            return weight.dequantize()
        return how(**tensors, skip_quantized_matmul=how.use_quantized_matmul)

    return Decoded(shape, codes.device, decode, f"SDNQ {how.weights_dtype}")


def _native_fp8(module: Any) -> Found:
    """SimpleTuner's Fp8NativeLinear: codes and a scale for each row."""
    if module.weight.dtype != torch.float8_e4m3fn:
        return _UNQUANTISED
    return rows_of("fp8_e4m3", module.weight, module.weight_scale)


def _ostris(module: Any) -> Found:
    """ai-toolkit's OstrisLinear, whose quantiser knows the weight that raw inputs meet."""
    quantizer = module.ostris_quantizer
    if (unknown := _unknown_names(type(quantizer).forward, _OSTRIS)) is not None:
        return f"its quantiser's forward has names that fluxfast doesn't know: {unknown}"
    if getattr(quantizer, "act_qmax", 127) < 127:
        return "its product rounds its input to fewer than 8 bits"
    shape = (module.out_features, module.in_features)
    device = next(held.device for held in module._buffers.values() if held is not None)
    stored = getattr(quantizer, "qtype", None) or type(quantizer).__name__
    return Decoded(shape, device, lambda: quantizer.dequantize_folded(module), stored)


_TORCH = "torch nn functional F linear to dtype shape reshape weight bias "


def _names(more: str) -> frozenset[str]:
    return words(_TORCH + more)


_SDNQ_FORWARDS = _names(
    "numel isinstance SDNQTensor sdnq_dequantizer get_sdnq_params scale zero_point svd_up svd_down "
    "re_quantize_for_matmul re_quantize_matmul is_packed quantized_weight_shape use_hadamard "
    "get_hadamard hadamard_group_size device weights_dtype quantized_linear_with_backward "
    "quantized_linear_with_backward_ckpt "
    + " ".join(
        f"{kind}_matmul{dynamic}{backward}"
        for kind in ("int8", "uint8", "fp8", "fp16")
        for dynamic in ("", "_dynamic")
        for backward in ("", "_with_backward", "_with_backward_ckpt")
    )
)
# ai-toolkit's quantisers; one that rounds its input to 4 bits names more than these
_OSTRIS = _names(
    "no_grad dequantize _dequantize_rotated rpbh_forward orbit_block orbit_perm orbit_signs "
    "ovq_block ovq_perm ovq_signs _dequantize_native _dequantize_weight _pre_scale "
    "FUSED_GEMV_MAX_M _fake_quant_rows _gemv_args _int8_act_quant_padded _int8_epilogue "
    "_int8_gemm_supported _int_gemv_op _int_mm _linear_ste _mps_int8pack_linear "
    "_mps_int8pack_usable _qdata _rot _scales _scales_u8 _triton_available act_qmax detach device "
    "float in_features is_cuda numel out_features quantize_int8_rows requires_grad rotate split "
    "str t type unsqueeze"
)
_GGUF = _names(
    "ops is_cuda forward_cuda forward_native dequantize_gguf_tensor compute_dtype quant_type "
    "_fused_mul_mat_gguf requires_grad AssertionError detach UNQUANTIZED_TYPES _dtype int8 apply "
    "LinearGGUFIntA8RequantFunction LinearGGUFFpA8RequantFunction"
)
# what OneTrainer's SVD names, which calls the forward of the class that it extends
_SVD = _names(
    "svd_up svd_down requires_grad AssertionError super forward cat p training lora_down lora_up "
    "_LinearSVD__svd_is_quantized"
)
HOSTS = (
    HostLinear(
        ("scale", "compute_dtype", "_dtype", "original_weight_shape", "unquantized_weight"),
        _names(
            "requires_grad AssertionError _LinearW8A8__is_quantized _compressed _decompress detach "
            "LinearW8A8Function apply scale compute_dtype dequantize"
        ),
        (),
        _w8a8,
    ),
    HostLinear(
        ("fp8_dtype", "_scale", "unquantized_weight"),
        _names("detach compute_dtype _scale mul_"),
        (),
        _onetrainer_fp8,
    ),
    HostLinear(
        ("nested_block_size", "quant_state", "unquantized_weight"),
        _names("compute_dtype bnb matmul_4bit t quant_state"),
        (),
        _onetrainer_nf4,
    ),
    HostLinear(
        ("compute_dtype", "forward_native"), _GGUF, ("forward_native", "forward_cuda"), _gguf
    ),
    HostLinear(("forward_func", "original_class"), _names("forward_func"), (), _sdnq),
    HostLinear(
        ("weight_scale", "compute_dtype", "out_features"),
        _names(
            "FP8_WEIGHT_DTYPE RuntimeError weight_scale float32 _Fp8NativeLinearFn apply "
            "out_features"
        ),
        (),
        _native_fp8,
    ),
    HostLinear(
        ("ostris_quantizer", "ostris_orig_dtype"),
        _names(
            "is_cuda hasattr next _buffers values device _wrong_device_warned toolkit.print "
            "print_acc ostris_quantizer forward"
        ),
        (),
        _ostris,
    ),
)
# how each class that was seen is read; None where it is no host's
_hosts: dict[type, HostLinear | None] = {}


def host_linear(module: Any) -> LinearParams | str | None:
    """A host's own linear, without adapters, or why only the module can be called.

    None for a class that is no host's. A part of low rank comes as an adapter.
    """
    kind: type = type(module)
    # a module takes a microsecond to say that it lacks an attribute
    if kind not in _hosts:
        _hosts[kind] = next((host for host in HOSTS if _has(module, host)), None)
    host = _hosts[kind]
    if host is None:
        return None
    if torch.compiler.is_compiling():
        return _TRACED
    if (unknown := _unknown_of_class(kind, host)) is not None:
        return f"its {kind.__name__}'s forward has names that fluxfast doesn't know: {unknown}"
    if any(p is not None and p.requires_grad for p in module._parameters.values()):
        return "its base is trained"
    weight, bias = host.read(module), module.bias
    if isinstance(weight, str):
        return weight
    if bias is not None and bias.dtype.itemsize == 1:
        return "its bias is quantised"
    if not hasattr(kind, "forward_with_lora"):
        return LinearParams(weight, bias)
    if module.svd_down.ndim != 2:
        return _UNQUANTISED
    return LinearParams(weight, bias, (Lora(module.svd_down, module.svd_up, 1.0),))


def summed(linear: LinearParams) -> LinearParams:
    """A base whose part of low rank is added to its weight, each time that it is used."""
    weight: Any = linear.weight

    def decode() -> Tensor:
        whole = weight.to(torch.float32)
        for part in linear.adapters:
            assert isinstance(part, Lora)
            whole = whole.addmm_(part.b.detach().float(), part.a.detach().float(), alpha=part.scale)
        return whole

    stored = getattr(weight, "stored", None)
    if isinstance(weight, QuantWeight):
        stored = weight.format.name
    return LinearParams(Decoded(weight.shape, weight.device, decode, stored), linear.bias)


def _has(module: nn.Module, host: HostLinear) -> bool:
    return all(hasattr(module, name) for name in host.has)


@functools.cache
def _unknown_of_class(kind: type, host: HostLinear) -> str | None:
    """What the forwards of a class name that is not known, for a message, or None.

    Those of the classes that it extends count as well, since one may call the other.
    """
    known = host.names
    functions: list[Any] = []
    for each in kind.__mro__:
        if each is nn.Linear or each is nn.Module:
            break
        held = vars(each)
        functions += [held[name] for name in ("forward", *host.methods) if name in held]
        if "forward_with_lora" in held:
            functions.append(held["forward_with_lora"])
            known = known | _SVD
    return unknown_in(functions, known)


# what the code of a function names that is not known, for a message; None where all is
_unknown: dict[CodeType, str | None] = {}


def _unknown_names(function: Any, known: frozenset[str]) -> str | None:
    """The same of a function, which is looked at once for all that share its code."""
    function = without_context(function)
    if not isinstance(function, FunctionType):
        return f"{function!r} is no function of Python"
    code = function.__code__
    if code not in _unknown:
        _unknown[code] = unknown_in([function], known)
    return _unknown[code]


# ---- the forward that sd-scripts and musubi-tuner bind to a linear in scaled fp8

_SCALED_FP8 = _names(
    "fp8_linear_forward_patch scale_weight ndim ValueError max abs flatten tensor float32 device "
    "finfo min quantize_fp8 t _scaled_mm len contiguous view use_scaled_mm max_value"
)


def is_scaled_fp8(module: nn.Module, forward: Any) -> bool:
    """Whether a linear's forward is the one for scaled fp8, which reads its `scale_weight`."""
    if "scale_weight" not in module._buffers or type(module).forward is not nn.Linear.forward:
        return False
    if not isinstance(forward, MethodType) or forward.__self__ is not module:
        return False
    if torch.compiler.is_compiling():
        # it traces the forward itself, and can't ask for what is known of its code
        return False
    function: Any = forward.__func__
    if _unknown_names(function, _SCALED_FP8) is not None:
        return False
    called = (function.__globals__.get(name) for name in function.__code__.co_names)
    inner = [each for each in called if isinstance(each, FunctionType)]
    return all(_unknown_names(each, _SCALED_FP8) is None for each in inner)


def scaled_fp8(linear: Any) -> QuantWeight | Decoded:
    """The weight of such a linear: one scale, one for each row, or one for each block of a row."""
    weight, scale = own_parameter(linear, "weight"), linear._buffers["scale_weight"]
    if scale.ndim < 3 and weight.dtype in ROW_FORMATS:
        return rows_of(ROW_FORMATS[weight.dtype], weight, scale)

    def decode() -> Tensor:
        # in the type of the scales, as the host does
        blocks = scale.shape[:2] if scale.ndim == 3 else weight.shape[:1]
        values = weight.detach().to(scale.dtype).reshape(*blocks, -1)
        return (values * scale).view(weight.shape)

    stored = ROW_FORMATS.get(weight.dtype) or str(weight.dtype).removeprefix("torch.")
    if scale.ndim == 3:
        stored += f" in blocks of {weight.shape[1] // scale.shape[1]}"
    return Decoded(weight.shape, weight.device, decode, stored)
