"""Linears with the interfaces of trainers' own quantised ones, in plain torch.

Written from their attributes and arithmetic; each says in its docstring whose class it stands for.
`unquantized_weight` is what the product of each multiplies by.
"""

import types

import torch
from torch import nn
from torch.nn import functional as F

try:
    import bitsandbytes as bnb
except ImportError:
    bnb = None


def quantize(weight, dtype, dim=None):
    """Codes of 8 bits, and one scale, or one for each row."""
    top = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    largest = weight.abs().amax(dim, keepdim=True) if dim is not None else weight.abs().max()
    scale = largest / top
    values = weight / scale
    return (values.round() if dtype == torch.int8 else values).to(dtype), scale


def dequantize(codes, scale):
    return codes.float() * scale


class RoundedProduct:
    """Stands for the autograd.Function that multiplies codes of x by codes of the weight."""

    @staticmethod
    def apply(x, weight, scale, bias, compute_dtype):
        codes, of_rows = quantize(x.detach(), torch.int8, dim=-1)
        return F.linear(dequantize(codes, of_rows), dequantize(weight, scale), bias)


LinearW8A8Function = RoundedProduct


class QuantisedLinear(nn.Linear):
    """Its values are those of a plain linear."""

    def __init__(self, linear, **options):
        n, k = linear.weight.shape
        super().__init__(k, n, linear.bias is not None)
        self.load_state_dict(linear.state_dict())
        self.compute_dtype = torch.float32
        self.set_up(**options)
        self.requires_grad_(False)

    def original_weight_shape(self):
        return self.out_features, self.in_features


class W8A8(QuantisedLinear):
    """OneTrainer's `LinearW8A8`: its bytes are compressed or not."""

    def set_up(self, dtype=torch.int8, compressed=False):
        self._dtype, self._compressed = dtype, compressed
        self.requires_grad_(False)
        codes, scale = quantize(self.weight.data, dtype)
        self.weight.data = codes
        self.register_buffer("scale", scale)
        if compressed:
            self._compressed_dtype = dtype
            self.weight.data = codes.view(torch.uint8).flatten().flip(0)

    def _decompress(self, blob):
        return blob.flip(0).view(self._compressed_dtype).view(self.original_weight_shape())

    def unquantized_weight(self):
        weight = self._decompress(self.weight) if self._compressed else self.weight
        return dequantize(weight, self.scale)

    def forward(self, x_orig):
        x = x_orig.reshape(-1, x_orig.shape[-1])
        weight = self._decompress(self.weight.detach()) if self._compressed else self.weight
        if x.shape[0] > 16:
            y = LinearW8A8Function.apply(x, weight, self.scale, self.bias, self.compute_dtype)
        else:
            y = F.linear(x, dequantize(weight, self.scale), self.bias)
        return y.reshape((*x_orig.shape[:-1], y.shape[-1]))


class Fp8(QuantisedLinear):
    """OneTrainer's `LinearFp8`."""

    fp8_dtype = torch.float8_e4m3fn

    def set_up(self):
        self.requires_grad_(False)
        self.weight.data, self._scale = quantize(self.weight.data, self.fp8_dtype)
        self.register_buffer("scale", self._scale)

    def unquantized_weight(self):
        return dequantize(self.weight, self._scale)

    def forward(self, x):
        weight = self.weight.detach().to(self.compute_dtype).mul_(self._scale)
        return F.linear(x, weight, self.bias)


class Nf4(QuantisedLinear):
    """OneTrainer's `LinearNf4`, over bitsandbytes' functions."""

    block_size, nested_block_size, quant_state = 64, 256, None

    def set_up(self):
        self.quantize()

    def quantize(self):
        codes, state = bnb.functional.quantize_4bit(
            self.weight.data, blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        self.requires_grad_(False)
        self.weight.data, self.quant_state = codes, state

    def unquantized_weight(self):
        return bnb.functional.dequantize_4bit(self.weight.data, self.quant_state)

    def forward(self, x):
        return bnb.matmul_4bit(
            x.to(self.compute_dtype), self.weight.t(), bias=self.bias, quant_state=self.quant_state
        )


def with_svd(base, rank=4):
    """OneTrainer's `LinearSVD` over another of its classes: a part of low rank beside the codes."""

    class LinearSVD(base):
        def set_up(self, **options):
            u, s, v = torch.linalg.svd(self.weight.data, full_matrices=False)
            up, down = u[:, :rank] * s[:rank], v[:rank]
            self.weight.data = self.weight.data - up @ down
            super().set_up(**options)
            self.svd_up, self.svd_down = (
                nn.Parameter(part.contiguous(), requires_grad=False) for part in (up, down)
            )

        def unquantized_weight(self):
            return super().unquantized_weight() + self.svd_up @ self.svd_down

        def forward(self, x):
            return F.linear(F.linear(x, self.svd_down), self.svd_up) + super().forward(x)

        def forward_with_lora(self, x, lora_down, lora_up, dropout, alpha):
            rank = lora_down.weight.shape[0]
            down = torch.cat([lora_down.weight, self.svd_down])
            up = torch.cat([lora_up.weight * (alpha / rank), self.svd_up], dim=1)
            return F.linear(F.linear(x, down), up) + super().forward(x)

    return LinearSVD


class Fp8Native(nn.Module):
    """SimpleTuner's `Fp8NativeLinear`, whose own product only a GPU has."""

    def __init__(self, linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        codes, scale = quantize(linear.weight.data, torch.float8_e4m3fn, dim=1)
        self.compute_dtype, self.bias = torch.float32, linear.bias
        self.register_buffer("weight", codes)
        self.register_buffer("weight_scale", scale.squeeze(1))
        self.requires_grad_(False)

    def unquantized_weight(self):
        return dequantize(self.weight, self.weight_scale[:, None])

    def forward(self, x):
        raise RuntimeError(self.weight_scale)


class Quantizer:
    """ai-toolkit's `OstrisQuantizer`, here of 4 bits a weight."""

    qtype = "uint4"

    def dequantize_folded(self, module):
        return (module.packed.float() - 8) * module.row_scales

    def dequantize(self, module):
        return self.dequantize_folded(module)

    def forward(self, module, x):
        with torch.no_grad():
            weight = self.dequantize(module).to(x.dtype)
        return F.linear(x, weight, module.bias)


class Ostris(QuantisedLinear):
    """ai-toolkit's `OstrisLinear`: to ask for its weight decodes all of it."""

    def set_up(self, quantizer=None):
        self.requires_grad_(False)
        scale = self.weight.abs().amax(1, keepdim=True) / 7
        self.register_buffer("packed", ((self.weight / scale).round() + 8).to(torch.uint8))
        self.register_buffer("row_scales", scale)
        self.ostris_quantizer, self.ostris_orig_dtype = quantizer or Quantizer(), torch.float32
        self.asked = 0
        del self._parameters["weight"]
        self.__class__ = OstrisQuantised

    def forward(self, x):
        return self.ostris_quantizer.forward(self, x)


class OstrisQuantised(Ostris):
    """The same once it is converted."""

    @property
    def weight(self):
        self.asked += 1
        return self.ostris_quantizer.dequantize(self)

    def unquantized_weight(self):
        return self.ostris_quantizer.dequantize(self)


def fp8_linear_forward_patch(self, x, use_scaled_mm=False, max_value=None):
    """The product of sd-scripts' and musubi-tuner's scaled fp8."""
    if self.scale_weight.ndim < 3:
        weight = self.weight.to(self.scale_weight.dtype) * self.scale_weight
    else:
        rows, blocks, _ = self.scale_weight.shape
        values = self.weight.to(self.scale_weight.dtype).contiguous().view(rows, blocks, -1)
        weight = (values * self.scale_weight).view(self.weight.shape)
    return F.linear(x, weight, self.bias)


def scaled_fp8(linear, mode="tensor", dtype=torch.float8_e4m3fn):
    """A linear as those trainers patch it: one scale, one for each row or for each block of 64."""
    weight = linear.weight.data
    if mode == "block":
        codes, scale = quantize(weight.view(len(weight), -1, 64), dtype, dim=2)
    else:
        codes, scale = quantize(weight, dtype, dim=1 if mode == "channel" else None)
    linear.weight = nn.Parameter(codes.view(weight.shape), requires_grad=False)
    linear.register_buffer("scale_weight", scale if scale.ndim else scale[None])
    linear.requires_grad_(False)
    use_scaled_mm, max_value = False, None

    def new_forward(self, x):
        return fp8_linear_forward_patch(self, x, use_scaled_mm, max_value)

    linear.forward = types.MethodType(new_forward, linear)
    return linear


def scaled_weight(linear):
    """The weight of such a linear."""
    return fp8_linear_forward_patch(
        types.SimpleNamespace(weight=linear.weight, scale_weight=linear.scale_weight, bias=None),
        torch.eye(linear.in_features),
    ).T
