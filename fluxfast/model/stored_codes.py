"""Transposed copies of the codes that a model's linears are stored as, for GPUs whose dgrad reads
them (`fluxfast.ops.linear.transposed_codes`).

A copy takes as much memory as its codes. It is no part of a state dict, and a model that is moved
or loaded into has none until it is given one again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fluxfast.model.linear import read_linear
from fluxfast.ops.linear import transposed_codes
from fluxfast.ops.linear.weights import FrozenWeight
from fluxfast.ops.row_quant import FORMATS

# linears that read the same input; their copies are one [K, ΣN]
Group = Sequence[nn.Module]


def codes_of(group: Group, compute: str) -> list[Tensor]:
    """The codes [N, K] that a group's linears are stored as, where products of `compute` read them.

    Empty unless they all are.
    """
    found = []
    for module in group:
        # read twice, because codes that a library hands out anew each time can keep no copy
        first, second = (_codes(module, compute) for _ in range(2))
        if first is None or first is not second:
            return []
        found.append(first)
    return found


def _codes(module: nn.Module, compute: str) -> Tensor | None:
    params = read_linear(module)
    if params is None or not isinstance(params.weight, FrozenWeight):
        return None
    return params.weight.codes(compute).q if params.weight.stores(compute) else None


@torch.no_grad()
def keep_transposed(groups: Iterable[Group], compute: str | None) -> None:
    """Give each group's codes that products of `compute` read a transposed copy beside them.

    Copies that are there stay. Copies of codes that such products do not read go, and for None so
    do all.
    """
    for group in groups:
        for fmt in FORMATS:
            codes = codes_of(group, fmt)
            if fmt != compute:
                for q in codes:
                    transposed_codes.forget(q)
            elif codes and transposed_codes.copies_of(codes) is None:
                outs = [len(q) for q in codes]
                whole = codes[0].new_empty(codes[0].shape[1], sum(outs))
                for q, copy in zip(codes, whole.split_with_sizes(outs, dim=1), strict=True):
                    copy.copy_(q.T)
                    transposed_codes.remember(q, copy)


def transposed_copies(groups: Iterable[Group], compute: str) -> list[Tensor]:
    """The copies that these groups have."""
    every = [codes_of(group, compute) for group in groups]
    return [copy for codes in every if codes for copy in transposed_codes.copies_of(codes) or []]
