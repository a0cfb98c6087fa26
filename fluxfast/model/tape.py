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

from fluxfast.model.block_call import BlockCall, BlockLinears
from fluxfast.model.linear import read_or_because
from fluxfast.model.residency import fetch_input, keep_input, residency_of
from fluxfast.ops.linear.adapters import over_tensors, tensors_of

Policy = Literal["none", "selective", "full"]
POLICIES: tuple[str, ...] = get_args(Policy)

# the gradients of a group's adapters: those of each adapter's tensors
Grads = list[tuple[Tensor, ...]]


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
    linears: BlockLinears,
    streams: Sequence[Tensor],
    *,
    mods: Sequence[Tensor],
    trained: Sequence[Tensor],
    kept: Any,
) -> None:
    """Leave for backward what `saved` and `linears_again` give it.

    streams: the block's inputs, which a residency may put aside. mods: their modulation. trained:
    the `adapter_tensors` of linears. kept: tensors in tuples, lists and dicts, which come back in
    the same form.
    """
    moves = residency_of(block) is not None
    ctx.block, ctx.call = block, call
    ctx.linears = None if moves else linears
    ctx.adapters = [[p.adapters for p in group] for group in linears]
    # policy "none" keeps tensors that share the streams' memory, so that putting the streams aside
    # would free nothing
    puts_aside = moves and call.policy != "none"
    ctx.aside = [keep_input(block, x) for x in streams] if puts_aside else None
    inputs = () if puts_aside else tuple(streams)
    tensors, ctx.form = tree_flatten((inputs, tuple(mods), tuple(trained), kept))
    ctx.save_for_backward(*tensors)


def saved(ctx: Any) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Any]:
    """The streams, their modulation, what trains, and what was kept, as `save` was given them."""
    streams, mods, trained, kept = tree_unflatten(ctx.saved_tensors, ctx.form)
    if ctx.aside is not None:
        streams = [fetch_input(ctx.block, handle) for handle in ctx.aside]
    return streams, mods, trained, kept


def read_linears(
    groups: Sequence[Sequence[nn.Module]], *, share_dropout: bool = True
) -> BlockLinears | str:
    """What a block's linears hold; a str says why one of them has to be called instead."""
    linears: BlockLinears = []
    for modules in groups:
        group = []
        for module in modules:
            params = read_or_because(module, share_dropout=share_dropout)
            if isinstance(params, str):
                return params
            group.append(params)
        linears.append(group)
    return linears


def linears_again(ctx: Any, trained: Sequence[Tensor]) -> BlockLinears:
    """The linears that forward was given, with the adapters' tensors that were saved.

    Weights that a residency has moved since are read from the block's modules again.
    """
    linears = ctx.linears if ctx.linears is not None else read_linears(ctx.block.linear_groups())
    assert not isinstance(linears, str), "a block's linears changed between forward and backward"
    tensors = iter(trained)
    return [
        [
            p._replace(adapters=over_tensors(adapters, tensors))
            for p, adapters in zip(group, adapters_of_group, strict=True)
        ]
        for group, adapters_of_group in zip(linears, ctx.adapters, strict=True)
    ]


def adapter_tensors(linears: BlockLinears) -> list[Tensor]:
    """The tensors of a block's adapters, one adapter after the other, in the groups' order."""
    return [t for group in linears for p in group for t in tensors_of(p.adapters)]


def adapter_grads(of_groups: Sequence[Grads]) -> Iterator[Tensor]:
    """The gradients of `adapter_tensors`, from those of each group."""
    return (grad for group in of_groups for of_adapter in group for grad in of_adapter)
