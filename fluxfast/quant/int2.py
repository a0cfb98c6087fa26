"""int2: 16 columns share an 8-bit scale and a 4-bit zero; 2.75 bits a weight.

The zero counts in fifths of a step. A group's scale is global_scale · (1 + m/8) · 2^(e - 31), where
e is the upper 5 and m the lower 3 bits of its byte. That spans 32 octaves below the largest step
that the weight can need, so that small rows keep their grid beside rows that are a million times
larger.

Relative error (root mean square) on gaussian rows / Student-t rows of 3 degrees of freedom,
measured on [192, 3072]:

    this format                                   .262 / .285
    group 32, bf16 scale, 8-bit zero, 2.75 bits   .296 / .35
    symmetric, group 16, scales searched          .310 / .47
    optimum-quanto qint2, group 128, 2.25 bits    .501 / .841
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fluxfast.ops.tensors import divide
from fluxfast.quant.affine import (
    LEAST_STEP,
    Affine,
    evaluate,
    groups_of,
    pack,
    quantize_triton,
    search,
    unpack,
)
from fluxfast.quant.format import Format, Parts, Shape
from fluxfast.quant.rows import LEAST_NORMAL, decode, encode

AFFINE = Affine(group=16, top=3, unit=5, grain=2**-10, shrinks=(1.0, 0.75, 0.5), refits=1)
# a step is at most 2·max|w| / 3, the scale a fifth of it, and a byte's highest value 1.875
GLOBAL = 1.875 * 5 * 3 / 2
# from a byte to the bits of its value in fp32, and back
_SHIFT, _BIAS = 20, (127 - 31) << 3


class Int2(Format):
    """parts: packed [N, 4 · groups] uint8, four columns a byte, the first in the highest bits;
    scale [N, groups] uint8; zero [N, ceil(groups / 2)] uint8, the even group in the high bits;
    global_scale [1] fp32.

    groups = ceil(K / 16); the codes of columns past K mean nothing.
    """

    name = "int2"
    gpu_tasks = ("dequantize",)
    witness = "global_scale"

    def layout(self, shape: Shape) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        rows, groups = shape[0], -(-shape[1] // AFFINE.group)
        return {
            "packed": ((rows, groups * AFFINE.group // 4), torch.uint8),
            "scale": ((rows, groups), torch.uint8),
            "zero": ((rows, -(-groups // 2)), torch.uint8),
            "global_scale": ((1,), torch.float32),
        }

    def quantize_ref(self, weight: Tensor) -> Parts:
        global_scale = global_scale_of(weight.abs().amax())
        per_global = 1 / global_scale

        def store(scale: Tensor) -> tuple[Tensor, Tensor]:
            # half up in the last bit that is kept
            bits = (scale * per_global).view(torch.int32) + (1 << (_SHIFT - 1))
            stored = ((bits >> _SHIFT) - _BIAS).clamp(0, 255)
            return stored, byte_values(stored) * global_scale

        grid = search(groups_of(weight, AFFINE.group), AFFINE, store, least_step(global_scale))
        zero = torch.nn.functional.pad(grid.zero, (0, grid.zero.shape[1] % 2))
        return {
            "packed": pack(grid.codes, 2).flatten(1),
            "scale": grid.stored.to(torch.uint8),
            "zero": pack(zero, 4),
            "global_scale": global_scale,
        }

    def quantize_native(self, weight: Tensor) -> Parts:
        parts = self.empty((weight.shape[0], weight.shape[1]))
        encode("int2", weight, parts.values())
        return parts

    def quantize_triton(self, weight: Tensor) -> Parts:
        parts = self.empty((weight.shape[0], weight.shape[1]), weight.device)
        low, high = torch.aminmax(weight)
        parts["global_scale"] = global_scale_of(torch.maximum(-low, high).float())
        quantize_triton(weight, parts, AFFINE)
        return parts

    def dequantize_ref(self, parts: Mapping[str, Tensor], shape: Shape) -> Tensor:
        codes = unpack(parts["packed"], 2).unflatten(1, (-1, AFFINE.group))
        scale = byte_values(parts["scale"]) * parts["global_scale"]
        return evaluate(
            codes, unpack(parts["zero"], 4)[:, : scale.shape[1]], scale, AFFINE, shape[1]
        )

    def decode_native(
        self, parts: Mapping[str, Tensor], out: Tensor, out_scale: Tensor | None
    ) -> None:
        decode(
            "int2",
            out,
            out_scale,
            [parts[name] for name in ("packed", "scale", "zero", "global_scale")],
        )

    def decode_triton(
        self,
        parts: Mapping[str, Tensor],
        out: Tensor,
        out_scale: Tensor | None,
        transposed: Tensor | None,
        outs: Sequence[int],
    ) -> None:
        from fluxfast_kernels.dequant_int2 import dequant_int2

        dequant_int2(**parts, out=out, out_scale=out_scale, transposed=transposed, outs=outs)

    def decodes_joined(self, shape: Shape) -> bool:
        return True


def global_scale_of(largest: Tensor) -> Tensor:
    """global_scale [1] fp32 of a weight whose largest magnitude is `largest`, a scalar in fp32."""
    scale = divide(largest, GLOBAL).reshape(1)
    return torch.where(scale < LEAST_NORMAL, 1.0, scale)


def least_step(global_scale: Tensor) -> Tensor:
    """The step below which a group is all zeros: half of the one that belongs to byte 0."""
    return (global_scale * (AFFINE.unit * 2.0**-32)).clamp(min=LEAST_STEP)


def byte_values(stored: Tensor) -> Tensor:
    """The fp32 value of scale bytes, before global_scale."""
    return ((stored.int() + _BIAS) << _SHIFT).view(torch.float32)


INT2 = Int2()
