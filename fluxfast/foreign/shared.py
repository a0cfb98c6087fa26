"""One adapter that several linears share, as OneTrainer trains it for some kinds of file.

Files for ComfyUI, for example, have one linear for q, k and v, and in a single block one for q, k,
v and the MLP's first. OneTrainer trains one adapter for it, on a linear that stands for all: its
rows are theirs, one below the other. The forward of each of them is a method of their group, by its
place in it, and gives its own rows. So each linear has an ordinary adapter, made of the shared
one's tensors and of views of them, and autograd adds up the gradients.

A group is known by its structure, as the modules in `adapters` are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

from torch import Tensor, nn

from fluxfast.foreign.code_names import names_in, unknown_in, words
from fluxfast.foreign.linears import summed
from fluxfast.hooks import is_own_forward
from fluxfast.ops.linear.adapters import Adapter, Lora
from fluxfast.ops.linear.column_dora import ColumnDora
from fluxfast.ops.linear.loha import Loha
from fluxfast.ops.linear.lokr import Lokr
from fluxfast.ops.linear.params import LinearParams
from fluxfast.ops.linear.row_part import RowPart
from fluxfast.ops.linear.weights import FrozenWeight

# a linear to what its base holds, without adapters, or why that can't be read
ReadBase = Callable[[nn.Module], LinearParams | str]

# a linear's forward, by its place in the group
_FORWARDS = tuple(f"_leaf_forward_{place}" for place in range(4))
_HAS = ("leaves", "slices", "synthetic", "module", "_leaf_output")
# all that the code of a group and of the linear that stands for all may name
_NAMES = words(
    "_leaf_output slices module delta_forward forward synthetic _leaf_forwards torch cat"
)


class Share(NamedTuple):
    """A linear's part of a shared adapter.

    Attributes:
        group: what has the linears and their adapter.
        place: which of the linears this is.
    """

    group: Any
    place: int

    @property
    def owner(self) -> Any:
        """The module that trains."""
        return self.group.module

    @property
    def before(self) -> Any:
        """The forward that the linear had before."""
        return self.group.synthetic._leaf_forwards[self.place]

    @property
    def rows(self) -> list[slice]:
        """The rows of each linear."""
        stops = list(self.group.slices)
        return [slice(*each) for each in zip([0, *stops], stops, strict=False)]

    def because(self, module: nn.Module, *, adds: bool) -> str | None:
        """Why only the group can say what it adds to a linear; None where its adapter says it.

        adds: whether its reader knows `delta_forward`, of which the group then adds rows to the
        linear's own output. Elsewhere the group has to take rows of the adapter's whole forward.
        """
        group = self.group
        if (unknown := _unknown_names(group.__class__, group.synthetic.__class__)) is not None:
            return f"its group's forward has names that fluxfast doesn't know: {unknown}"
        if not adds and names_in(getattr(type(self.owner), "delta_forward", None)):
            return "what its adapter adds in a group is not what it adds by itself"
        if not is_own_forward(group.synthetic, self.owner.orig_forward):
            return "the adapter of its group is around another forward than its linears'"
        features = [leaf.out_features for leaf in group.leaves]
        heights = [rows.stop - rows.start for rows in self.rows]
        if features != heights or group.leaves[self.place] is not module:
            return "its group's rows are not those of its linears"
        return None

    def parts_of(
        self, adapters: tuple[Adapter, ...], read_base: ReadBase
    ) -> tuple[Adapter, ...] | str:
        """The linear's part of what the shared adapter adds, or why there is none."""
        parts: list[Adapter] = []
        for adapter in adapters:
            part = rows_of(adapter, self.rows[self.place])
            if isinstance(part, ColumnDora):
                others = self._others(adapter, read_base)
                if isinstance(others, str):
                    return others
                part = part._replace(others=others)
            parts.append(part)
        return tuple(parts)

    def _others(
        self, whole: Any, read_base: ReadBase
    ) -> tuple[tuple[Tensor | FrozenWeight, Tensor], ...] | str:
        """W and B of the other linears, with which DoRA by columns has its lengths in common."""
        found: list[tuple[Tensor | FrozenWeight, Tensor]] = []
        for place, (leaf, rows) in enumerate(zip(self.group.leaves, self.rows, strict=True)):
            if place == self.place:
                continue
            base = read_base(leaf)
            if isinstance(base, str):
                return f"a linear that shares its adapter can't be read: {base}"
            # a trainer's DoRA rescales all of its base
            weight = summed(base).weight if base.adapters else base.weight
            found.append((weight, whole.b.detach()[rows]))
        return tuple(found)


def share_of(forward: Any) -> Share | None:
    """Whose part of which group a linear's forward gives; None for a forward that is no group's."""
    group, name = getattr(forward, "__self__", None), getattr(forward, "__name__", "")
    if not isinstance(forward, MethodType) or name not in _FORWARDS:
        return None
    if forward.__func__ is not getattr(type(group), name, None):
        return None
    if not all(hasattr(group, each) for each in _HAS):
        return None
    return Share(group, _FORWARDS.index(name))


def rows_of(adapter: Any, rows: slice) -> Adapter:
    """An adapter that adds, to a linear of so many rows, what another adds to these of its own."""
    if isinstance(adapter, Lora):
        magnitude = None if adapter.magnitude is None else adapter.magnitude[rows]
        return adapter._replace(b=adapter.b[rows], magnitude=magnitude)
    if isinstance(adapter, ColumnDora):
        return adapter._replace(b=adapter.b[rows])
    if isinstance(adapter, Loha):
        (b1, a1), (b2, a2) = adapter.w1, adapter.w2
        return Loha((b1[rows], a1), (b2[rows], a2), adapter.scale)
    assert isinstance(adapter, Lokr)
    # rows of w1, each of which is as many rows of the product as w2 has
    high = adapter.w2[0].shape[0]
    first, stop = rows.start // high, -(-rows.stop // high)
    w1, *w1_b = adapter.w1
    cover = adapter._replace(w1=(w1[first:stop], *w1_b))
    if first * high == rows.start and stop * high == rows.stop:
        return cover
    return RowPart(cover, rows.start - first * high, (stop - first) * high)


@functools.cache
def _unknown_names(group: Any, synthetic: Any) -> str | None:
    """What the code of a group's forwards names that fluxfast doesn't know, or None."""
    functions = [
        getattr(group, name) for name in (*_FORWARDS, "_leaf_output") if hasattr(group, name)
    ]
    return unknown_in((*functions, synthetic.forward), _NAMES)
