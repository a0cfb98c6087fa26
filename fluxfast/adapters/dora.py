"""DoRA in PEFT's modules: y = (m / ‖W + s·B A‖) · (W + s·B A) x, norms and m by rows.

Source: arXiv 2402.09353. PEFT takes the norm for a constant in backward, as section 4.3 says.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor
from torch.nn import Parameter

# its name beside the factors, in files and in PEFT's modules
MAGNITUDE = "lora_magnitude_vector"


def magnitude_of(layer: Any, adapter_name: str) -> Parameter | None:
    """The magnitude [out] of an adapter in one of PEFT's layers; None for a plain LoRA."""
    held = getattr(layer, MAGNITUDE)
    return held[adapter_name].weight if adapter_name in held else None


@torch.no_grad()
def start_magnitude(layer: Any, adapter_name: str, dtype: torch.dtype) -> None:
    """Makes the magnitude of an adapter what leaves W + s·B A as it is, in `dtype`.

    PEFT does so when it makes the adapter. That is too early where the factors change after it, and
    while a quantised weight has a shape but no values (`quant.linear.shapes_only`).
    """
    if (magnitude := magnitude_of(layer, adapter_name)) is None:
        return
    # a plan's model has no values, and formats decode none
    norms = magnitude.detach() if magnitude.is_meta else row_norms(layer, adapter_name)
    magnitude.data = norms.to(dtype)


def row_norms(layer: Any, adapter_name: str) -> Tensor:
    """‖W + s·B A‖ [out] in fp64, of the base as it is stored."""
    a, b = (getattr(layer, key)[adapter_name].weight for key in ("lora_A", "lora_B"))
    weight = dequantize_module_weight(layer.get_base_layer()).double()
    whole = weight.addmm(b.double(), a.double(), alpha=layer.scaling[adapter_name])
    return torch.linalg.norm(whole, dim=1)
