"""Where the gradients of a group's LoRAs come to lie: in new memory, or where `Lora.grads` says.

One launch makes dA of all LoRAs of a group, [Σ ranks, K], and one makes dB of its linears,
[N, widest]. It writes to the given places itself where these lie in memory as its result does, one
behind the other. Else it writes to new memory, from which the gradients are copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fluxfast.ops.linear.adapters import Lora
from fluxfast.ops.linear.products_torch import adjoining


class Runs(NamedTuple):
    """Given memory for dA [Σ ranks, K] and dB [N, rank], a tensor for each part of the rows.

    None stands for new memory.
    """

    d_a: list[Tensor] | None
    d_b: list[Tensor] | None


NO_RUNS = Runs(None, None)


def runs_of(parts: Sequence[Sequence[Lora]], counts: Sequence[int]) -> Runs:
    """The places of the LoRAs of each part, where they lie in memory as products make gradients.

    counts: how many LoRAs each linear has. dB is made without gaps where each has one, and all have
    the same rank.
    """
    if not parts[0] or parts[0][0].grads is None:
        return NO_RUNS
    runs = []
    for loras in parts:
        places = [lora.grads for lora in loras if lora.grads is not None]
        if not places or len(places) < len(loras):
            return NO_RUNS
        one_each = all(count == 1 for count in counts)
        d_b = adjoining([d_b for _, d_b in places]) if one_each else None
        runs.append((adjoining([d_a for d_a, _ in places]), d_b))
    return Runs(*(_all_of(of_parts) for of_parts in zip(*runs, strict=True)))


def _all_of(tensors: Sequence[Tensor | None]) -> list[Tensor] | None:
    """The tensors, or None if one of them is missing."""
    present = [t for t in tensors if t is not None]
    return present if len(present) == len(tensors) else None


def in_places(
    loras: Sequence[Lora], d_a: Sequence[Tensor], d_b: Sequence[Tensor], runs: Runs
) -> list[tuple[Tensor, ...]]:
    """(dA, dB) of every LoRA in the dtypes of its tensors, in its places where it has some.

    runs: the memory to which d_a and d_b were written.
    """
    pairs: list[tuple[Tensor, ...]] = []
    for lora, grad_a, grad_b in zip(loras, d_a, d_b, strict=True):
        if lora.grads is None:
            pairs.append((grad_a.to(lora.a.dtype), grad_b.to(lora.b.dtype).contiguous()))
            continue
        for place, grad, run in zip(lora.grads, (grad_a, grad_b), runs, strict=True):
            if run is None:
                place.copy_(grad)
        pairs.append(lora.grads)
    return pairs
