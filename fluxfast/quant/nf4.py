"""nf4: sixteen levels at a normal distribution's quantiles; 4.13 bits a weight.

Blocks of 64 weights, along the flattened weight, share a scale. These are the bytes and numbers
that `bitsandbytes.functional.quantize_4bit(compress_statistics=True, quant_type="nf4")` gives on a
CPU (version 0.50), so a weight may come from either side. A block keeps max|w|, which is itself
quantised: less its mean over the weight (`offset`), in blocks of 256, to the 8-bit dynamic code of
arXiv 2110.02861. Levels: arXiv 2305.14314 (QLoRA).

    w = CODE[code] · (ABSMAX_CODE[absmax] · nested_absmax + offset)
"""

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fluxfast.quant.affine import pack, unpack
from fluxfast.quant.format import Format, Parts, Shape
from fluxfast.quant.rows import decode, encode
from fluxfast_kernels.launch import constant

BLOCK = 64
NESTED_BLOCK = 256
CODE = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# bitsandbytes bounds the inverse of max|w| with this
_LEAST_ABSMAX = 1e-38
# how many equal bins over [-1, 1] bitsandbytes looks a block's max|w| up in
_BINS = 65536


class Nf4(Format):
    """parts: packed [ceil(N·K / 2)] uint8, the even weight in the high bits; absmax [blocks] uint8;
    nested_absmax [ceil(blocks / 256)] fp32; offset [1] fp32. blocks = ceil(N·K / 64).
    """

    name = "nf4"
    gpu_tasks = ("dequantize",)
    witness = "offset"

    def layout(self, shape: Shape) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        weights = shape[0] * shape[1]
        blocks = -(-weights // BLOCK)
        return {
            "packed": ((-(-weights // 2),), torch.uint8),
            "absmax": ((blocks,), torch.uint8),
            "nested_absmax": ((-(-blocks // NESTED_BLOCK),), torch.float32),
            "offset": ((1,), torch.float32),
        }

    def quantize_ref(self, weight: Tensor) -> Parts:
        flat = weight.flatten()
        full = flat.numel() // BLOCK * BLOCK
        absmax = flat[:full].view(-1, BLOCK).abs().amax(1)
        scaled = (
            flat[:full].view(-1, BLOCK) * (1 / absmax.clamp(min=_LEAST_ABSMAX))[:, None]
        ).flatten()
        if full < flat.numel():
            # the last, shorter block is divided by its max|w|, the others are multiplied by its
            # inverse
            last = flat[full:].abs().amax().clamp(min=_LEAST_ABSMAX)
            absmax = torch.cat([absmax, last[None]])
            scaled = torch.cat([scaled, flat[full:] / last])
        scaled = torch.nn.functional.pad(scaled.clamp(-1, 1), (0, scaled.numel() % 2))
        codes = torch.bucketize(scaled, bounds(weight.device))
        return {"packed": pack(codes, 4), **quantize_absmax(absmax)}

    def quantize_native(self, weight: Tensor) -> Parts:
        weight = weight.contiguous()
        packed = torch.empty(-(-weight.numel() // 2), dtype=torch.uint8)
        absmax = torch.empty(-(-weight.numel() // BLOCK))
        encode("nf4", weight, (packed, absmax))
        return {"packed": packed, **quantize_absmax(absmax)}

    def quantize_triton(self, weight: Tensor) -> Parts:
        from fluxfast_kernels.quantize_nf4 import quantize_nf4

        packed, absmax = quantize_nf4(weight.contiguous(), bounds(weight.device))
        return {"packed": packed, **quantize_absmax(absmax)}

    def dequantize_ref(self, parts: Mapping[str, Tensor], shape: Shape) -> Tensor:
        count = shape[0] * shape[1]
        levels = code(parts["packed"].device)[unpack(parts["packed"], 4)[:count].int()]
        levels = torch.nn.functional.pad(levels, (0, -count % BLOCK)).view(-1, BLOCK)
        return (levels * dequantize_absmax(parts)[:, None]).flatten()[:count].view(shape)

    def decode_native(
        self, parts: Mapping[str, Tensor], out: Tensor, out_scale: Tensor | None
    ) -> None:
        if out.is_cuda:
            names = ("packed", "absmax", "nested_absmax", "offset")
            decode(
                "nf4",
                out,
                out_scale,
                [*(parts[name] for name in names), code(out.device), absmax_code(out.device)],
            )
        else:
            decode("nf4", out, out_scale, (parts["packed"], dequantize_absmax(parts)))

    def decode_triton(
        self,
        parts: Mapping[str, Tensor],
        out: Tensor,
        out_scale: Tensor | None,
        transposed: Tensor | None,
        outs: Sequence[int],
    ) -> None:
        from fluxfast_kernels.dequant_nf4 import dequant_nf4

        dequant_nf4(
            **parts,
            tables=(code(out.device), absmax_code(out.device)),
            out=out,
            out_scale=out_scale,
            transposed=transposed,
            outs=outs,
        )

    def decodes_joined(self, shape: Shape) -> bool:
        return shape[0] * shape[1] % (BLOCK * NESTED_BLOCK) == 0


def quantize_absmax(absmax: Tensor) -> Parts:
    """The parts absmax, nested_absmax and offset of max|w| [blocks] fp32."""
    # a GPU adds up in another order; the mean of so few numbers is taken where bitsandbytes' bytes
    # are defined
    offset = absmax.cpu().mean().to(absmax.device)
    count = absmax.numel()
    centred = torch.nn.functional.pad(absmax - offset, (0, -count % NESTED_BLOCK)).view(
        -1, NESTED_BLOCK
    )
    nested = centred.abs().amax(1)
    scaled = centred * (1 / nested)[:, None]
    bins = ((scaled.clamp(-1, 1) + 1) * 0.5) * (_BINS - 1) + 0.5
    # a block of zeros has no inverse: bitsandbytes gives it bin 0
    bins = torch.where(nested[:, None] > 0, bins, 0.0).int().clamp(0, _BINS - 1)
    return {
        "absmax": _bin_codes(absmax.device)[bins].flatten()[:count],
        "nested_absmax": nested,
        "offset": offset.reshape(1),
    }


def dequantize_absmax(parts: Mapping[str, Tensor]) -> Tensor:
    """max|w| [blocks] fp32."""
    codes = parts["absmax"].int()
    nested = parts["nested_absmax"].repeat_interleave(NESTED_BLOCK)[: codes.numel()]
    return absmax_code(codes.device)[codes] * nested + parts["offset"]


@functools.cache
def code(device: torch.device) -> Tensor:
    """The sixteen levels, ascending, fp32."""
    return constant(torch.tensor(CODE, device=device))


@functools.cache
def bounds(device: torch.device) -> Tensor:
    """Where one code ends and the next begins [15] fp32: half-way; a tie goes to the lower code."""
    levels = code(device)
    return (levels[:-1] + levels[1:]) / 2


@functools.cache
def absmax_code(device: torch.device) -> Tensor:
    """The 256 values of the dynamic code, ascending, fp32.

    They span seven decades, each with twice the values of the one below it.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        centres = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*centres.tolist(), *(-centres).tolist()]
    return constant(torch.tensor(sorted(values), device=device))


@functools.cache
def _bin_codes(device: torch.device) -> Tensor:
    """The code nearest to the middle of each bin, uint8."""
    values = absmax_code(torch.device("cpu")).double()
    middles = torch.arange(_BINS, dtype=torch.float64) * (2 / (_BINS - 1)) - 1
    return torch.bucketize(middles, (values[:-1] + values[1:]) / 2).to(torch.uint8).to(device)


NF4 = Nf4()
