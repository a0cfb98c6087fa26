"""What a block's forward leaves for its backward.

A block is one node of autograd's graph. Forward keeps some of the values that it makes, which ones
is a table by recompute policy (`KEPT_DOUBLE`, `KEPT_SINGLE`), and backward computes the others
again. Both run the same function of the block, which asks a `Tape` for each value first:

    x_in, norm = tape.kept("x_in") or tape.keep("x_in", *layer_norm.forward(x, …))
    y, s = tape.product("y", linears, x_in)

In forward the tape is empty, so that everything is computed, and `keep` records what the policy
names. In backward the tape holds what forward kept, and `keep` records nothing.

Weights are not kept where a residency moves them between forward and backward: backward reads them
again. A host may move its weights too, without saying so: backward looks whether they are where
they were. The adapters' scales and dropouts are those that forward read, even if they have changed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor, nn

from fluxfast.model.block_call import BlockCall, BlockLinears
from fluxfast.model.linear import base_of, read_base, read_or_because
from fluxfast.model.nested import flattened, nested
from fluxfast.model.residency import fetch_input, keep_input, residency_of
from fluxfast.ops.linear.adapters import Adapter, over_tensors, tensors_of, writing_to
from fluxfast.ops.linear.beside import operand_of
from fluxfast.ops.linear.column_dora import on_columns
from fluxfast.ops.linear.decomposed import Narrow
from fluxfast.ops.linear.pair import AnyGroup
from fluxfast.ops.linear.params import LinearParams
from fluxfast.ops.row_quant import RowOutput

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
        self._again = values is not None

    def kept(self, name: str) -> Any:
        """The values that were kept under a name; None where it was not kept."""
        return self.values.get(name)

    def keep(self, name: str, *values: Any) -> Any:
        """Record values under a name, if the tape keeps that name, and return them."""
        if name in self._keeps:
            self.values[name] = values
        return values

    def product(self, name: str, group: AnyGroup, x: RowOutput) -> tuple[Tensor, Narrow]:
        """A group's y and its adapters' narrow product s, kept under `name` and under s_`name`.

        A y that is computed again takes the s that was kept.
        """
        y, (s,) = self.kept(name), self.kept(f"s_{name}") or (None,)
        if y is not None:
            group.recall(s)
            return y[0], s
        # a y that backward computes again is overwritten by its gradient
        rows = operand_of(x)[0].shape[:-1]
        made, s = group.forward(x, group.new_output(*rows) if self._again else None, s)
        self.keep(name, made)
        self.keep(f"s_{name}", s)
        return made, s


class Kept(NamedTuple):
    """What a forward pass kept: its tensors, and the form in which `values` puts them together."""

    leaves: Sequence[Tensor | None]
    form: Any

    @classmethod
    def of(cls, values: Any) -> Kept:
        """values: tensors in tuples, lists and dicts."""
        leaves: list[Tensor | None] = []
        form = flattened(values, leaves)
        return cls(leaves, form)

    @property
    def values(self) -> Any:
        return nested(self.form, self.leaves)


def save(
    ctx: Any,
    block: Any,
    call: BlockCall,
    linears: BlockLinears,
    inputs: Sequence[Tensor],
    trained: Sequence[Tensor],
    kept: Kept,
) -> None:
    """Leave for backward what `saved` and `linears_again` give it.

    inputs: the block's streams, which a residency may put aside, and their modulation. trained: the
    `adapter_tensors` of linears.
    """
    moves = residency_of(block) is not None
    ctx.block, ctx.call, ctx.form = block, call, kept.form
    ctx.linears = None if moves else linears
    ctx.homes = None if moves or block.log is None else homes_of(block)
    ctx.adapters = [[p.adapters for p in group] for group in linears]
    # policy "none" keeps tensors that share the streams' memory, so that putting the streams aside
    # would free nothing
    puts_aside = moves and call.policy != "none"
    count = len(inputs) - len(block.modulation_linears()) if puts_aside else 0
    ctx.aside = [keep_input(block, x) for x in inputs[:count]]
    ctx.counts = (len(inputs) - count, len(trained))
    ctx.save_for_backward(*inputs[count:], *trained, *kept.leaves)


def saved(ctx: Any) -> tuple[Sequence[Tensor], Sequence[Tensor], Kept]:
    """The inputs, what trains, and what was kept, as `save` was given them."""
    tensors, (count, trained) = ctx.saved_tensors, ctx.counts
    aside = [fetch_input(ctx.block, handle) for handle in ctx.aside]
    leaves = tensors[count + trained :]
    return [*aside, *tensors[:count]], tensors[count : count + trained], Kept(leaves, ctx.form)


def homes_of(block: Any) -> list[tuple[int, int]]:
    """Where the weights of a block's linears are: which tensor, and which memory."""
    homes = []
    for group in block.linear_groups():
        for module in group:
            held = base_of(module).__dict__
            weight = held["_parameters"].get("weight", held["_buffers"].get("weight"))
            if weight is not None:
                homes.append((id(weight), weight.untyped_storage()._cdata))
    return homes


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


def read_moved(ctx: Any) -> None:
    """Read the linears again where a host has moved their weights since forward read them."""
    if ctx.homes is None or homes_of(ctx.block) == ctx.homes:
        return
    linears = read_linears(ctx.block.linear_groups(), share_dropout=ctx.block.share_dropout)
    assert not isinstance(linears, str), "a block's linears changed between forward and backward"
    ctx.linears, ctx.operands = linears, None


def linears_again(
    ctx: Any, trained: Sequence[Tensor], places: Sequence[Tensor] = ()
) -> BlockLinears:
    """The linears that forward was given, with the adapters' tensors that were saved, `trained`.

    Weights that a residency has moved since are read from the block's modules again. places: where
    the gradients of `trained` are written; none: in new memory.
    """
    linears = ctx.linears
    if linears is None:
        groups = ctx.block.linear_groups()
        linears = [[read_base(module) for module in modules] for modules in groups]
    tensors, rest = iter(trained), iter(places)

    def again(adapters: Sequence[Adapter]) -> tuple[Adapter, ...]:
        adapters = over_tensors(adapters, tensors)
        return writing_to(adapters, rest) if places else adapters

    return [
        [
            on_columns(LinearParams(weight, bias, again(adapters) if adapters else ()))
            for (weight, bias, _), adapters in zip(group, adapters_of_group, strict=True)
        ]
        for group, adapters_of_group in zip(linears, ctx.adapters, strict=True)
    ]


def adapter_tensors(linears: BlockLinears) -> list[Tensor]:
    """The tensors of a block's adapters, one adapter after the other, in the groups' order."""
    return [t for group in linears for p in group for t in tensors_of(p.adapters)]


def adapter_grads(of_groups: Sequence[Grads]) -> Iterator[Tensor]:
    """The gradients of `adapter_tensors`, from those of each group."""
    return (grad for group in of_groups for of_adapter in group for grad in of_adapter)
