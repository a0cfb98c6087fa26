"""FLUX.1's rotary position tables.

A table holds cos or sin for each token and each pair of channels, [S, head_dim/2] in fp32, text
rows first. diffusers' own tables [S, head_dim] hold every value twice; tables of each sample are
[B, S, head_dim/2]. Blocks take all three. Where a route has left tokens out, a third tensor beside
cos and sin is the row of each token that is left, [B, S].
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# of a table that holds every value twice: its version, and the copy of half its size
_halves: MutableMapping[Tensor, tuple[int, Tensor]] = WeakIdKeyDictionary()
# (cos, sin), or (cos, sin, rows)
Tables = tuple[Tensor, ...]


def rope_tables(ids: Tensor, axes_dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """cos and sin [S, Σ axes_dims / 2], fp32, of position ids [S, axes].

    Frequencies are in fp64, as in BFL's `rope` (black-forest-labs/flux, src/flux/math.py).
    """
    parts = []
    for axis, dim in enumerate(axes_dims):
        exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim
        parts.append(torch.outer(ids[:, axis].double(), 10000.0**-exponents))
    angles = torch.cat(parts, dim=-1)
    return angles.cos().float(), angles.sin().float()


def rope_arguments(pe: Tables, head_dim: int) -> dict[str, Any]:
    """The tables as `qk_norm_rope` takes them.

    cos and sin [rows, head_dim/2], and index, the row of each token [B, S], or None where token i
    has row i.
    """
    cos, sin, *index = pe
    if cos.ndim == 3:
        # the tables of all samples become one table, in which each sample has its own rows
        rows = torch.arange(cos.shape[0] * cos.shape[1], device=cos.device).view(cos.shape[:2])
        cos, sin, index = cos.flatten(0, 1), sin.flatten(0, 1), [rows]
    if cos.shape[-1] == head_dim:
        cos, sin = _once_for_each_pair(cos), _once_for_each_pair(sin)
    return {"cos": cos, "sin": sin, "index": index[0] if index else None}


def _once_for_each_pair(table: Tensor) -> Tensor:
    """A table that holds every value twice, with each of them once.

    All blocks of a model are given the same tables. On a CPU the copy is kept for the next block.
    """
    if torch.compiler.is_compiling() or not table.is_cpu or table.is_inference():
        return table[:, ::2].contiguous()
    known = _halves.get(table)
    if known is None or known[0] != table._version:
        known = _halves[table] = (table._version, table[:, ::2].contiguous())
    return known[1]


def full_tables(pe: Tables | None, head_dim: int) -> tuple[Tensor, Tensor] | None:
    """The tables as diffusers' processors take them; None for a call without positions.

    Raises ValueError where a route has left tokens out: those processors take no rows.
    """
    if pe is None:
        return None
    cos, sin, *index = pe
    if index:
        raise ValueError(
            "TREAD routes need FLUX.1's own attention: the processor or hooks that were set on "
            "a block take no token positions"
        )
    if cos.shape[-1] == head_dim:
        return cos, sin
    return cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)
