"""A storage format that has nothing but its reference, for tests of what a new one gets."""

import torch

from fluxfast.quant.format import Format


class Columns(Format):
    """8-bit codes with a scale a column. parts: packed [N, K] uint8, scale [K] fp32."""

    name = "columns"

    def layout(self, shape):
        return {"packed": (shape, torch.uint8), "scale": (shape[1:], torch.float32)}

    def quantize_ref(self, weight):
        scale = weight.abs().amax(0) / 127
        scale = torch.where(scale == 0, 1.0, scale)
        return {"packed": ((weight / scale).round() + 128).to(torch.uint8), "scale": scale}

    def dequantize_ref(self, parts, shape):
        return (parts["packed"].float() - 128) * parts["scale"]


COLUMNS = Columns()
