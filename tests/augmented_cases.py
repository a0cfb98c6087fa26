"""Groups whose weights live beside room for their adapters, and the engine that multiplies so."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch

from fluxfast.ops.linear import augmented
from fluxfast.ops.linear.augmented import Placed
from fluxfast.ops.linear.params import LinearParams


def in_place(linears: Sequence[LinearParams], rank: int | None = None) -> list[LinearParams]:
    """The same linears, with their weights in one augmented weight that has room for `rank`."""
    own = sum(t.shape[0] for p in linears for lora in p.adapters for t in lora.tensors[:1])
    places = augmented.make_room([p.weight for p in linears], own if rank is None else rank)
    return [p._replace(weight=w) for p, w in zip(linears, places, strict=True)]


@contextmanager
def augmenting() -> Iterator[list[str]]:
    """Inside, products of floats take the engine "augmented"; the products that did, as names."""
    from fluxfast_kernels.launch import WIDE_ENGINES

    taken: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(WIDE_ENGINES, "float", {"default": ((None, "augmented"),)})
        for name in ("forward", "backward"):
            run = getattr(Placed, name)

            def spied(self, *args, name=name, run=run):
                taken.append(name)
                return run(self, *args)

            patch.setattr(Placed, name, spied)
        yield taken


def poison_(t: torch.Tensor) -> torch.Tensor:
    return t.fill_(torch.nan)
