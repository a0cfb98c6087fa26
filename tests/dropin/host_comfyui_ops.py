"""Linears, norms and patches of `host_of_comfyui`, with the interfaces of ComfyUI's.

Written from these interfaces: linears that cast their weights to their input's dtype, and hand them
to functions on their way; such with 8-bit weights, which have a scale, or a class of tensors;
and a patcher's function that adds what it knows by a weight's name.
"""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F


def run_every_op():
    """Where ComfyUI looks whether somebody has interrupted it."""


def cast_bias_weight(module, input):
    parts = {}
    for name in ("weight", "bias"):
        part = getattr(module, name)
        if part is not None:
            part = part.to(input.dtype)
            if isinstance(part, CodedTensor):
                part = part.dequantize()
            functions = getattr(module, f"{name}_function")
            part = part.clone() if functions else part
            for function in functions:
                part = function(part)
        parts[name] = part
    return parts["weight"], parts["bias"]


class Casting:
    """What ComfyUI's own classes of modules share."""

    comfy_cast_weights = False
    weight_function, bias_function = (), ()


class Linear(nn.Linear, Casting):
    def forward_comfy_cast_weights(self, input):
        weight, bias = cast_bias_weight(self, input)
        return torch.nn.functional.linear(input, weight, bias)

    def forward(self, *args, **kwargs):
        run_every_op()
        if self.comfy_cast_weights or len(self.weight_function) > 0 or len(self.bias_function) > 0:
            return self.forward_comfy_cast_weights(*args, **kwargs)
        return super().forward(*args, **kwargs)


class CastingLinear(Linear):
    comfy_cast_weights = True


class CodesLinear(CastingLinear):
    """A linear whose product is not the plain one."""

    def forward_comfy_cast_weights(self, input):
        weight, bias = cast_bias_weight(self, input)
        return torch.nn.functional.linear(torch.round(input * 64) / 64, weight, bias)


class OwnCast(CastingLinear):
    """A linear with a method of its own that makes the weight, as GGUF's nodes have."""

    def cast_bias_weight(self, input):
        return self.weight * 1.5, self.bias

    def forward_comfy_cast_weights(self, input):
        weight, bias = self.cast_bias_weight(input)
        return torch.nn.functional.linear(input, weight, bias)


def fp8_linear(module, input):
    """The product of 8 bits, which this machine has not."""


class Fp8Linear(CastingLinear):
    """One that would multiply in 8 bits."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.scale_weight = None

    def forward_comfy_cast_weights(self, input):
        if (out := fp8_linear(self, input)) is not None:
            return out
        weight, bias = cast_bias_weight(self, input)
        return torch.nn.functional.linear(input, weight, bias)


class ScaledLinear(Fp8Linear):
    """One whose weight is multiplied by a scale after the functions have had it."""

    def forward_comfy_cast_weights(self, input):
        if (out := fp8_linear(self, input)) is not None:
            return out
        weight, bias = cast_bias_weight(self, input)
        scale = self.scale_weight.to(weight.dtype)
        return torch.nn.functional.linear(input, weight * scale, bias)

    def convert_weight(self, weight):
        """What the patcher's function adds to: the weight itself."""
        return weight * self.scale_weight.to(weight.dtype)

    def set_weight(self, weight):
        return weight / self.scale_weight.to(weight.dtype)

    def store(self, dtype=torch.float8_e4m3fn):
        weight = self.weight.detach()
        scale = weight.abs().max() / torch.finfo(dtype).max
        self.weight = nn.Parameter((weight / scale).to(dtype), requires_grad=False)
        self.scale_weight = nn.Parameter(scale, requires_grad=False)


class CodedTensor(torch.Tensor):
    """A tensor with codes and a scale in it, which is decoded wherever it is computed with."""

    @staticmethod
    def __new__(cls, codes, layout, params):
        shape, dtype = params.orig_shape, params.orig_dtype
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=codes.device)

    def __init__(self, codes, layout, params):
        self._qdata, self._layout_cls, self._params = codes, layout, params

    def dequantize(self):
        codes, scale = self._qdata, self._params.scale
        if codes.dtype == torch.uint8:
            # two codes of 4 bits in a byte
            codes = torch.stack([codes // 16, codes % 16], -1).flatten(1).float() - 8
        return (codes.float() * scale).to(self.dtype)

    def to(self, dtype):
        params = SimpleNamespace(**vars(self._params) | {"orig_dtype": dtype})
        return CodedTensor(self._qdata, self._layout_cls, params)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0]._qdata, args[0]._layout_cls, args[0]._params)
        args = [arg.dequantize() if isinstance(arg, cls) else arg for arg in args]
        return func(*args, **kwargs or {})


class MixedLinear(nn.Module, Casting):
    """A linear of any format, plain or of `CodedTensor`."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))

    def forward_comfy_cast_weights(self, input):
        weight, bias = cast_bias_weight(self, input)
        return self._forward(input, weight, bias)

    def _forward(self, input, weight, bias):
        return torch.nn.functional.linear(input, weight, bias)

    def forward(self, input):
        run_every_op()
        return self.forward_comfy_cast_weights(input)

    def store(self, layout):
        weight = self.weight.detach()
        params = SimpleNamespace(orig_shape=tuple(weight.shape), orig_dtype=torch.bfloat16)
        if layout == "TensorCoreFP8Layout":
            params.scale = weight.abs().max() / 448
            codes = (weight / params.scale).to(torch.float8_e4m3fn)
        else:
            params.scale = weight.abs().max() / 7
            nibbles = (weight / params.scale).round().add(8).to(torch.uint8).unflatten(1, (-1, 2))
            codes = nibbles[..., 0] * 16 + nibbles[..., 1]
        self.weight = nn.Parameter(CodedTensor(codes, layout, params), requires_grad=False)


class LayerNorm(nn.LayerNorm, Casting):
    def forward_comfy_cast_weights(self, input):
        weight, bias = cast_bias_weight(self, input) if self.weight is not None else (None, None)
        return torch.nn.functional.layer_norm(input, self.normalized_shape, weight, bias, self.eps)

    def forward(self, *args, **kwargs):
        run_every_op()
        if self.comfy_cast_weights or len(self.weight_function) > 0 or len(self.bias_function) > 0:
            return self.forward_comfy_cast_weights(*args, **kwargs)
        return super().forward(*args, **kwargs)


class RMSNorm(nn.RMSNorm, Casting):
    """A norm of today; one of before has its weight under the name `scale`."""

    def forward(self, x):
        weight = cast_bias_weight(self, x)[0] if self.weight_function else self.weight.to(x.dtype)
        return F.rms_norm(x, weight.shape, weight, self.eps)

    bias = None


class LoRA:
    """An adapter by ComfyUI's name for it: (up, down, alpha, mid, DoRA's scale, new shape)."""

    name = "lora"

    def __init__(self, up, down, alpha=None, dora=None):
        self.weights = (up, down, alpha, None, dora, None)

    def calculate_weight(self, weight, strength):
        up, down, alpha, _, dora, _ = self.weights
        scale = strength * (1 if alpha is None else alpha / down.shape[0])
        up, down = (factor.flatten(1).type(weight.dtype) for factor in (up, down))
        weight += scale * torch.mm(up, down)
        if dora is not None:
            weight *= dora
        return weight


class Difference:
    """Another adapter."""

    name = "diff"

    def __init__(self, change):
        self.change = change

    def calculate_weight(self, weight, strength):
        weight += strength * self.change.to(weight.dtype)
        return weight


def calculate_weight(patches, weight):
    for strength, adapter, of_model, part, function in patches:
        assert function is None
        changed = weight if part is None else weight.narrow(*part)
        changed *= of_model
        adapter.calculate_weight(changed, strength)
    return weight


class AtEachCall:
    """What a patcher leaves in `weight_function`; convert and set are those of the linear."""

    def __init__(self, key, patches, convert_func=None, set_func=None):
        self.key, self.patches = key, patches
        self.convert_func, self.set_func = convert_func, set_func

    def __call__(self, weight):
        if self.convert_func is not None:
            weight = self.convert_func(weight)
        weight = calculate_weight(self.patches[self.key], weight)
        return weight if self.set_func is None else self.set_func(weight)
