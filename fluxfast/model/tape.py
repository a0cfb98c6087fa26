"""What a block's forward leaves for its backward.

A block is one node of autograd's graph. Forward keeps some of the values that it makes, which ones
is a table by recompute policy (`KEPT_DOUBLE`, `KEPT_SINGLE`), and backward computes the others
again. Both run the same function of the block, which asks a `Tape` for each value first:

    y, s = tape.kept("y") or tape.keep("y", *linears.forward(x))

In forward the tape is empty, so that everything is computed, and `keep` records what the policy
names. In backward the tape holds what forward kept, and `keep` records nothing.

Weights are not kept where a residency moves them between forward and backward: backward reads them
again. The adapters' scales and dropouts are those that forward read, even if they have changed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fluxfast.model.block_call import BlockCall, Reads
from fluxfast.model.linear import read_or_because
from fluxfast.model.residency import fetch_input, keep_input, residency_of
from fluxfast.ops.linear.adapters import over_tensors, tensors_of

Policy = Literal["none", "selective", "full"]
POLICIES: tuple[str, ...] = get_args(Policy)


class Tape:
    """Values of a block by name; each name has a tuple of tensors, and of tuples of tensors."""

    def __init__(
        self, keeps: Collection[str] = (), values: dict[str, tuple[Any, ...]] | None = None
    ) -> None:
        """keeps: the names that `keep` records. values: what an earlier tape recorded."""
        self._keeps, self.values = keeps, {} if values is None else values

    def kept(self, name: str) -> Any:
        """The values that were kept under a name; None where it was not kept."""
        return self.values.get(name)

    def keep(self, name: str, *values: Any) -> Any:
        """Record values under a name, if the tape keeps that name, and return them."""
        if name in self._keeps:
            self.values[name] = values
        return values


def save(
    ctx: Any,
    block: Any,
    call: BlockCall,
    reads: Reads,
    streams: Sequence[Tensor],
    *,
    mods: Sequence[Tensor],
    factors: Sequence[Tensor],
    kept: Any,
) -> None:
    """Leave for backward what `saved` and `reads_again` give it.

    streams: the block's inputs. A residency may put them aside. mods: their modulation. factors:
    `factors_of` reads. kept: tensors in tuples, lists and dicts; it comes back in the same form.
    """
    moves = residency_of(block) is not None
    ctx.block, ctx.call = block, call
    ctx.reads = None if moves else reads
    ctx.adapters = [[p.adapters for p in linears] for linears in reads]
    # policy "none" keeps tensors that share the streams' memory, so that putting the streams aside
    # would free nothing
    puts_aside = moves and call.policy != "none"
    ctx.aside = [keep_input(block, x) for x in streams] if puts_aside else None
    inputs = () if puts_aside else tuple(streams)
    tensors, ctx.form = tree_flatten((inputs, tuple(mods), tuple(factors), kept))
    ctx.save_for_backward(*tensors)


def saved(ctx: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor], Any]:
    """The streams, their modulation, the factors, and what was kept, as `save` was given them."""
    streams, mods, factors, kept = tree_unflatten(ctx.saved_tensors, ctx.form)
    if ctx.aside is not None:
        streams = [fetch_input(ctx.block, handle) for handle in ctx.aside]
    return streams, mods, factors, kept


def read_groups(
    groups: Sequence[Sequence[nn.Module]], *, share_dropout: bool = True
) -> Reads | str:
    """What the linears of each group hold; a str says why one of them has to be called instead."""
    reads: Reads = []
    for modules in groups:
        linears = []
        for module in modules:
            params = read_or_because(module, share_dropout=share_dropout)
            if isinstance(params, str):
                return params
            linears.append(params)
        reads.append(linears)
    return reads


def factors_of(reads: Reads) -> list[Tensor]:
    """The adapters' tensors, one adapter after the other, in the order of the groups."""
    return [t for linears in reads for p in linears for t in tensors_of(p.adapters)]


def reads_again(ctx: Any, factors: Sequence[Tensor]) -> Reads:
    """What forward read, with the factors that were saved.

    Weights that a residency has moved since are read from the block's modules again.
    """
    reads = ctx.reads if ctx.reads is not None else read_groups(ctx.block.linear_groups())
    assert not isinstance(reads, str), "the linears of a block changed between forward and backward"
    it = iter(factors)
    return [
        [
            p._replace(adapters=over_tensors(adapters, it))
            for p, adapters in zip(linears, of_group, strict=True)
        ]
        for linears, of_group in zip(reads, ctx.adapters, strict=True)
    ]


def flat(grads: Sequence[Sequence[tuple[Tensor, ...]]]) -> Iterator[Tensor]:
    """The gradients of the adapters' tensors in the order of `factors_of`, from those of groups."""
    return (grad for group in grads for of_adapter in group for grad in of_adapter)
