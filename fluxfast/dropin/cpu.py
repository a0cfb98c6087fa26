"""CPUs that multiply bfloat16 faster than our fp32 arithmetic.

A host that computes in bfloat16 on a CPU with instructions for it keeps its own forward: AMX's
matrix unit, or AVX-512's dot products of bfloat16, which are up to four times as fast as products
of fp32. Without them our fp32 is many times faster than bfloat16.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

REASON = "this CPU has a matrix unit or dot products for bfloat16, which the host's products use"


@functools.cache
def has_matrix_unit() -> bool:
    """Whether the CPU has instructions that multiply bfloat16."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def host_is_faster(x: Tensor, maths: Any) -> str | None:
    """Why the host should run a block itself; None if ours is faster.

    x tells dtype and device; autocast counts too. maths: what computes the block.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if dtype != torch.bfloat16 or not has_matrix_unit():
        return None
    linear = maths.linear_groups()[-1][0]
    weight = getattr(linear, "base_layer", linear).weight
    # decoding a quantised weight would cost the host more than the unit gains
    plain = type(weight) in (Tensor, torch.nn.Parameter) and weight.dtype in (
        torch.float32,
        torch.bfloat16,
    )
    return REASON if plain else None
