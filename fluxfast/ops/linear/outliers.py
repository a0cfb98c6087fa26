"""The largest channels of x, which 8-bit products leave out of the codes.

They meet their columns of W in x's dtype, like one more LoRA of each linear.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fluxfast.ops import row_quant
from fluxfast.ops.linear.weights import Ready


def outliers_apart(
    x: Tensor,
    s: Tensor | None,
    ready: Ready,
    b: Sequence[Tensor],
    counts: Sequence[int],
    outliers: int,
    compute: str,
    impl: str,
) -> tuple[tuple[Tensor, Tensor], Tensor, list[Tensor], list[int]]:
    """x [M, K] as codes without its largest channels, and these as one more LoRA of each linear.

    ready: the linears' codes; s [M, Σ ranks], b and counts: of their LoRAs. Returns the codes with
    their scales, and what `wide` takes for the LoRAs: s, all B, counts.
    """
    largest = x.abs().amax(0).topk(outliers).indices
    keep = torch.ones(x.shape[1], device=x.device).index_fill_(0, largest, 0)
    codes = row_quant.forward(x, compute, keep, impl=impl)
    columns, all_b, left, rank = [], [], iter(b), 0
    for count, w, scale in zip(counts, *ready.operands, strict=True):
        own = [next(left).to(x.dtype) for _ in range(count)]
        width = sum(t.shape[1] for t in own)
        columns += [] if s is None else [s[:, rank : rank + width]]
        columns.append(x[:, largest])
        rank += width
        all_b += [*own, (w[:, largest].to(scale.dtype) * scale[:, None]).to(x.dtype)]
    apart = torch.cat(columns, dim=1)
    return (codes.q, codes.scale), apart, all_b, [count + 1 for count in counts]
