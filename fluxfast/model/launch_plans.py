"""When a fused block's direction runs by a launch plan, and by which.

A plan (`launch_recording`) is right as long as all that the block's function depends on is what it
was when the function was recorded. Each call gathers this as a key:

- what its `BlockCall` says, how each linear is stored, each adapter's scale and dropout, which
  gradients are wanted;
- of each tensor its shape, strides, dtype and device, how its address is aligned, which tensors are
  the same one, and which of them lie side by side in memory;
- what lies beside the weights (`Surroundings`), which is looked up anew in each direction: room for
  adapters, and transposed copies of codes;
- the stream, whose launches share semaphores;
- the numbers that the function reads of the block, such as a norm's epsilon: whatever it reads
  while it is recorded is noted, and compared with the block at hand.

Addresses are no part of it: they are read anew in each call, so that weights may move, as streamed
ones do, and blocks that are alike share a plan. Where a kernel reads addresses from a table on the
device, the plan finds or makes the table of the tensors at hand; where a launcher compared
addresses, the plan compares them again, and the function runs if that comes out differently. What
can't be taken as a key, such as a weight that
another library decodes, is not planned. Tables of block sizes and what failed its check on this
machine stay as they are for a process.

The first call with a key runs the function, the second records it, the third compares its plan with
it, and from then on the plan is replayed. A plan that gives something else than its function turns
all plans off, with a warning. While they are compared, one block's results are there twice.

Streamed steps could have a CUDA graph for each block instead. But addresses are fixed in a graph,
so that there would have to be one for each block and each slot of the ring, with memory of its own
for what the block keeps, and the checks that are most of what a plan leaves to do would remain.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import operator
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from itertools import zip_longest
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fluxfast.model.block_call import BlockCall, BlockLinears
from fluxfast.model.graphs import TOLERANCE, relative
from fluxfast.model.launch_recording import Unplannable, record
from fluxfast.model.launch_replay import LaunchPlan, OtherAddresses
from fluxfast.ops import attention_sage
from fluxfast.ops.device import pretending
from fluxfast.ops.linear.adapters import Lora
from fluxfast.ops.linear.augmented import Placed
from fluxfast.ops.linear.group import in_place
from fluxfast.ops.linear.lokr import Lokr
from fluxfast.ops.linear.transposed_codes import each_copy_of
from fluxfast.ops.registration import PLAIN

# plans of a model: two directions of a few kinds of block, for each of its batches' shapes
MOST_PLANS = 256
# bytes to which Triton asks whether an address is aligned
_ALIGNED = 16
_PLAIN = {*PLAIN, type(None)}

# what a function makes, as a flat sequence, and what it takes to put that together again
Made = tuple[Sequence[Tensor | None], Any]
# a direction of a block, as a function of the block alone
Direction = Callable[[Any], Made]

logger = logging.getLogger("fluxfast")


class Operands(NamedTuple):
    """What a direction depends on beside the block's inputs and the values of its adapters.

    fixed: what is no tensor. tensors: the call's own and the frozen ones. rows: slices of these and
    of the adapters' tensors behind them. The tensors of a row are the same part of neighbouring
    linears, which a product reads as one where they adjoin in memory.
    """

    fixed: Hashable
    tensors: list[Tensor]
    rows: list[slice]


def operands(call: BlockCall, linears: BlockLinears) -> Operands | None:
    """Those of a call; None where something in them can't be the key of a plan."""
    said = [getattr(call, name) for name in _CALL_FIELDS]
    tensors = [value for value in said if isinstance(value, Tensor)]
    fixed: list[Hashable] = [Tensor if isinstance(value, Tensor) else value for value in said]
    rows, counts = [], []
    for group in linears:
        parts = []
        for weight, bias, adapters in group:
            stored: Any = ((), (weight,)) if isinstance(weight, Tensor) else weight.identity()
            known = [a for a in adapters if isinstance(a, Lora | Lokr)]
            if stored is None or len(known) < len(adapters):
                return None
            fixed.append((stored[0], bias is None, *(_numbers_of(a) for a in known)))
            parts.append(stored[1] if bias is None else (*stored[1], bias))
        for of_linears in zip_longest(*parts):
            start = len(tensors)
            tensors += [part for part in of_linears if part is not None]
            rows.append(slice(start, len(tensors)))
        sizes = [len(adapter.tensors) for p in group for adapter in p.adapters]
        if len(set(sizes)) > 1:
            return None
        counts.append((sum(sizes), sizes[0] if sizes else 1))
        fixed.append(len(group))
    start = len(tensors)
    for count, step in counts:
        # such as A and B of each adapter in turn
        rows += [slice(start + i, start + count, step) for i in range(step)]
        start += count
    return Operands(tuple(fixed), tensors, [row for row in rows if row.stop - row.start > 1])


def _numbers_of(adapter: Lora | Lokr) -> Hashable:
    """All that an adapter says beside its tensors, and which of these it has."""
    said = (value for name, value in adapter._asdict().items() if name != "grads")
    return type(adapter), *(
        len(value) if isinstance(value, tuple) else Tensor if isinstance(value, Tensor) else value
        for value in said
    )


# `filled` is the one field that differs from forward to backward
_CALL_FIELDS = [field.name for field in dataclasses.fields(BlockCall) if field.name != "filled"]


class Surroundings(NamedTuple):
    """What products find beside the weights, which may come, go and move at any time.

    places: of each group the augmented weight in which it lives. copies: the transposed copies of
    codes. form: what of both belongs to a plan's key.
    """

    places: list[Placed]
    copies: list[Tensor]
    form: Hashable


def surroundings(call: BlockCall, linears: BlockLinears, *, backward: bool) -> Surroundings:
    """What is beside a call's linears. Only backward reads transposed copies."""
    if call.impl != "triton":
        return Surroundings([], [], None)
    if call.compute == "same":
        of_groups = [in_place(group) for group in linears]
        rooms = [None if place is None else place.layout.room for place in of_groups]
        return Surroundings([p for p in of_groups if p is not None], [], tuple(rooms))
    copies: list[Tensor] = []
    forms = []
    for group in linears if backward else ():
        weights = [p.weight for p in group if not isinstance(p.weight, Tensor)]
        stored = [w.codes(call.compute).q for w in weights if w.stores(call.compute)]
        found = each_copy_of(stored) if len(stored) == len(group) else None
        copies += [] if found is None else found[0]
        forms.append(None if found is None else found[1])
    return Surroundings([], copies, tuple(forms))


class _Reading:
    """A block that notes which of its numbers are read, by their dotted names."""

    def __init__(self, module: Any, read: dict[str, Any], path: str = "") -> None:
        self._of = (module, read, path)

    def __getattr__(self, name: str) -> Any:
        module, read, path = self._of
        value = getattr(module, name)
        if isinstance(value, nn.Module):
            return _Reading(value, read, f"{path}{name}.")
        if not isinstance(value, (bool, int, float, str)):
            raise Unplannable(f"it reads {path}{name} of its block, a {type(value).__name__}")
        read[path + name] = value
        return value


@dataclasses.dataclass
class _Known:
    """What is known of one key."""

    calls: int = 0
    plan: LaunchPlan | None = None
    form: Any = None
    # what the recorded function read of its block: how to read it again, and what it read
    reads: Callable[[Any], Any] | None = None
    values: Any = None
    checked: bool = False
    unplannable: str | None = None


class LaunchPlans:
    """The plans of one model's blocks.

    replayed: how many directions of blocks ran by a plan. off: why none runs any more.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, _Known] = OrderedDict()
        self.replayed = 0
        self.off: str | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LaunchPlans:
        return LaunchPlans()

    def __reduce__(self) -> Any:
        # a copy of the model makes its own
        return LaunchPlans, ()

    @property
    def reasons(self) -> set[str]:
        """Why directions that were tried have no plan."""
        return {known.unplannable for known in self._known.values() if known.unplannable}

    @property
    def launches(self) -> list[int]:
        """The launches of each plan."""
        return [known.plan.launches for known in self._known.values() if known.plan is not None]

    def run(
        self,
        direction: Direction,
        block: Any,
        fixed: Hashable,
        operands: Operands,
        beside: Surroundings,
        others: Sequence[Tensor | None],
        written: Sequence[Tensor] = (),
    ) -> Made:
        """What `direction(block)` makes, by a plan where there is one that is right.

        fixed, operands, beside, others: all that the direction depends on; others begin with the
        adapters' tensors. written: tensors that it fills; how they lie to each other is part of
        `fixed`.
        """
        tensors = [*operands.tensors, *others, *beside.copies, *written]
        if not _PLAIN.issuperset(map(type, tensors)):
            return direction(block)
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        key = (fixed, operands.fixed, beside.form, *_layout(tensors, addresses, operands.rows))
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= MOST_PLANS:
                self._known.popitem(last=False)
            known = self._known[key] = _Known()
        known.calls += 1
        if known.calls == 1 or known.unplannable is not None:
            return direction(block)
        if known.plan is None:
            return _record(known, direction, block, tensors)
        assert known.reads is not None
        if known.reads(block) != known.values:
            return direction(block)
        # no kernel writes anything inside `pretend`, so that there is nothing to compare
        if not known.checked and not pretending():
            return self._compare(known, direction, block, tensors, addresses, written)
        try:
            made = _replay(known.plan, tensors, addresses)
        except OtherAddresses:
            return direction(block)
        self.replayed += 1
        return made, known.form

    def _compare(
        self,
        known: _Known,
        direction: Direction,
        block: Any,
        tensors: Sequence[Tensor | None],
        addresses: Sequence[int],
        written: Sequence[Tensor],
    ) -> Made:
        assert known.plan is not None
        expected, form = direction(block)
        try:
            filled = [tensor.clone() for tensor in written]
        except torch.OutOfMemoryError:
            return expected, form
        # a plan that fills none of them must not be taken for one that does
        for tensor in written:
            tensor.zero_()
        try:
            actual = _replay(known.plan, tensors, addresses)
            error = _difference([*actual, *written], [*expected, *filled])
        except (torch.OutOfMemoryError, OtherAddresses):
            # for a moment there are two of everything; another time there may be room
            return expected, form
        finally:
            for tensor, values in zip(written, filled, strict=True):
                tensor.copy_(values)
        known.checked = True
        if error is not None:
            self.off = error
            self._known.clear()
            logger.warning("launch plans: off, and blocks run as they are: %s", error)
        return expected, form


def usable(plans: LaunchPlans | None, call: BlockCall, x: Tensor) -> bool:
    """Whether a call on x may run by plans: nobody else has to see, or traces, what it asks for."""
    if plans is None or plans.off is not None or call.impl != "triton" or call.failed:
        return False
    # a package's kernels are launched where nobody can record it
    if call.attention in attention_sage.FUNCTIONS:
        return False
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or x.is_meta:
        return False
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    from fluxfast_kernels.relaunch import watched

    return not watched()


def _replay(
    plan: LaunchPlan, tensors: Sequence[Tensor | None], addresses: Sequence[int]
) -> list[Tensor | None]:
    from fluxfast_kernels.launch import on_device
    from fluxfast_kernels.persistent_matmul import provide_scratch
    from fluxfast_kernels.relaunch import current_stream

    first = next(t for t in tensors if t is not None)
    if first.is_cuda:
        provide_scratch()
    with on_device(first):
        return plan.replay(tensors, addresses, current_stream(first.device))


def _record(
    known: _Known, direction: Direction, block: Any, tensors: Sequence[Tensor | None]
) -> Made:
    read: dict[str, Any] = {}
    forms = []

    def function() -> Sequence[Tensor | None]:
        made, form = direction(_Reading(block, read))
        forms.append(form)
        return made

    try:
        made, known.plan = record(function, tensors)
    except Unplannable as error:
        known.unplannable = str(error)
        return direction(block)
    (known.form,) = forms
    known.reads = attrgetter(*read) if read else lambda _: None
    known.values = known.reads(block)
    return made, known.form


def _layout(
    tensors: Sequence[Tensor | None], addresses: Sequence[int], rows: Sequence[slice]
) -> tuple[Hashable, ...]:
    """All that a direction may depend on in its tensors, but for their values and addresses."""
    from fluxfast_kernels.launch import pretence
    from fluxfast_kernels.relaunch import current_stream

    forms = tuple([
        None if t is None else (t.shape, t.stride(), t.dtype, t.get_device()) for t in tensors
    ])  # fmt: skip
    adjoin = tuple([
        _adjoins(tensors, addresses, i, i + (row.step or 1))
        for row in rows
        for i in range(row.start, row.stop - (row.step or 1), row.step or 1)
    ])  # fmt: skip
    together = functools.reduce(operator.or_, addresses, 0) % _ALIGNED
    alignment = tuple([a % _ALIGNED for a in addresses]) if together else None
    ids = [id(t) for t in tensors]
    twice = tuple(map(ids.index, ids)) if len(set(ids)) < len(ids) else None
    # launches on one stream share semaphores, which those on another may not touch
    stream = current_stream(next(t.device for t in tensors if t is not None))
    return pretence(), stream, forms, adjoin, alignment, twice


def _adjoins(
    tensors: Sequence[Tensor | None], addresses: Sequence[int], first: int, second: int
) -> bool:
    """Whether one tensor lies right behind another, in the same allocation."""
    a, b = tensors[first], tensors[second]
    if a is None or b is None or addresses[first] + a.nbytes != addresses[second]:
        return False
    offset = a.storage_offset() * a.itemsize + a.nbytes
    return offset == b.storage_offset() * b.itemsize


def _difference(actual: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> str | None:
    """How a replay's tensors differ from the function's own; None where they are the same.

    Only the order of attention's atomic additions may change their bits.
    """
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if a is None or e is None or a.shape != e.shape or a.dtype != e.dtype:
            if a is not e:
                return f"what it makes as number {i} has another form"
            continue
        # a state of attention's generator, which nobody reads without dropout
        if a.dtype in (torch.int64, torch.uint64) or _same_bits(a, e):
            continue
        limit = TOLERANCE.get(e.dtype, TOLERANCE[torch.bfloat16])
        error = relative(a.float(), e.float())
        # a NaN compares as false
        if not error <= limit:
            return f"what it makes as number {i} is {error:.2g} from the function's own"
    return None


def _same_bits(a: Tensor, b: Tensor) -> bool:
    unsigned = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
    return torch.equal(a.contiguous().view(unsigned), b.contiguous().view(unsigned))
