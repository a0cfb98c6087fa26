"""Launch plans, and how they are replayed: the steps that `launch_recording` has taken down."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Ref(NamedTuple):
    """A tensor in the arguments of a recorded operation, by its number."""

    number: int


class Place(NamedTuple):
    """Where a tensor lies: `offset` bytes from the beginning of the tensor `root`."""

    root: int
    offset: int


@dataclass
class Launch:
    run: Callable[..., Any]
    arguments: list[Any]
    # (position in arguments, place)
    slots: list[tuple[int, Place]]
    # (position in arguments, what makes the table, whose addresses are in it)
    tables: list[tuple[int, Table, list[Place]]]


@dataclass
class Check:
    """A comparison of addresses that has to come out as it did when it was recorded."""

    holds: Callable[..., bool]
    places: list[Place]
    found: bool


@dataclass
class Empty:
    number: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass
class View:
    """Part of a tensor, which somebody else than a kernel reads."""

    number: int
    root: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    # elements from the beginning of the root
    offset: int


@dataclass
class Call:
    op: Any
    # tensors in them, and in lists in args, are `Ref`s
    args: list[Any]
    kwargs: dict[str, Any]
    # the numbers of what it returns, None for what is no tensor or was there before
    outs: list[int | None]
    # whether it changes what it is given
    writes: bool


Step = Launch | Check | Empty | View | Call
# a table of addresses on the device
Table = Callable[[tuple[int, ...]], Tensor]

# kinds of a plan's steps
_LAUNCH, _EMPTY_STEP, _VIEW, _CALL, _CHECK = range(5)


class OtherAddresses(Exception):
    """Tensors lie so that the function would not do what was recorded."""


@dataclass
class LaunchPlan:
    """What a recorded function asks for, in order.

    Steps are tuples that begin with their kind. `room` is how many tensors there are beside the
    given ones; `constants` are some of these, by number.
    """

    steps: list[tuple[Any, ...]]
    outs: list[int | None]
    constants: dict[int, Tensor]
    room: int
    launches: int = field(default=0)

    def replay(
        self, given: Sequence[Tensor | None], addresses: Sequence[int], stream: int
    ) -> list[Tensor | None]:
        """What the function would return for these tensors; addresses: theirs.

        stream: the handle of the stream for our launches. torch's own operations go to the current
        one, which should be the same. Raises OtherAddresses where the function has to run; then
        nothing is written that it would not write as well.
        """
        from fluxfast_kernels.relaunch import STREAM

        tensors: list[Any] = [*given, *[None] * self.room]
        where = [*addresses, *[0] * self.room]
        for number, constant in self.constants.items():
            tensors[number], where[number] = constant, constant.data_ptr()
        for step in self.steps:
            if step[0] == _LAUNCH:
                _, run, arguments, slots, tables, dead = step
                arguments = arguments.copy()
                arguments[STREAM] = stream
                for i, root, offset in slots:
                    arguments[i] = where[root] + offset
                for i, table, places in tables:
                    made = table(tuple([where[root] + offset for root, offset in places]))
                    arguments[i] = made.data_ptr()
                run(*arguments)
            elif step[0] == _EMPTY_STEP:
                _, number, size, stride, dtype, device, dead = step
                tensor = torch.empty_strided(size, stride, dtype=dtype, device=device)
                tensors[number], where[number] = tensor, tensor.data_ptr()
            elif step[0] == _VIEW:
                _, number, root, size, stride, offset, dead = step
                base = tensors[root]
                offset += base.storage_offset()
                tensors[number] = torch.as_strided(base, size, stride, offset)
            elif step[0] == _CHECK:
                _, holds, places, found, dead = step
                if holds(*[where[root] + offset for root, offset in places]) != found:
                    raise OtherAddresses
            else:
                _, op, args, slots, lists, kwargs, named, outs, dead = step
                args = args.copy()
                for i, number in slots:
                    args[i] = tensors[number]
                for i, numbers in lists:
                    args[i] = [None if n is None else tensors[n] for n in numbers]
                if named:
                    kwargs = kwargs | {name: tensors[number] for name, number in named}
                made = op(*args, **kwargs)
                of_outs = made if isinstance(made, (tuple, list)) else (made,)
                for number, out in zip(outs, of_outs, strict=True):
                    if number is not None:
                        tensors[number], where[number] = out, out.data_ptr()
            for number in dead:
                tensors[number] = None
        return [None if number is None else tensors[number] for number in self.outs]


def make_plan(
    steps: Sequence[Step], *, given: int, constants: dict[int, Tensor], tensors: int,
    outs: list[int | None],
) -> LaunchPlan:  # fmt: skip
    """The steps that matter, each with the numbers of the tensors that nobody uses after it.

    given: how many tensors the plan is given; tensors: how many there are, with these; outs: the
    numbers of those that it returns.
    """
    steps = _needed(steps, [number for number in outs if number is not None])
    last: dict[int, int] = {}
    for i, step in enumerate(steps):
        last.update(dict.fromkeys((*_made(step), *_used(step)), i))
    stay = {*range(given), *constants, *outs}
    dead: list[list[int]] = [[] for _ in steps]
    for number, i in last.items():
        if number not in stay:
            dead[i].append(number)
    return LaunchPlan(
        [_as_tuple(step, tuple(gone)) for step, gone in zip(steps, dead, strict=True)],
        outs,
        constants,
        tensors - given,
        sum(isinstance(step, Launch) for step in steps),
    )


def _needed(steps: Sequence[Step], outs: Sequence[int]) -> list[Step]:
    """The steps without those that make what nobody uses, such as views that only kernels read."""
    needed, found = set(outs), []
    for step in reversed(steps):
        if isinstance(step, (Launch, Check)) or needed.intersection(_made(step)) or _acts(step):
            needed.update(_used(step))
            found.append(step)
    return found[::-1]


def _acts(step: Step) -> bool:
    return isinstance(step, Call) and step.writes


def _made(step: Step) -> list[int]:
    if isinstance(step, (Empty, View)):
        return [step.number]
    return [n for n in step.outs if n is not None] if isinstance(step, Call) else []


def _used(step: Step) -> list[int]:
    if isinstance(step, Launch):
        in_tables = [place.root for *_, places in step.tables for place in places]
        return [*(place.root for _, place in step.slots), *in_tables]
    if isinstance(step, Check):
        return [place.root for place in step.places]
    if isinstance(step, View):
        return [step.root]
    return refs_in([*step.args, *step.kwargs.values()]) if isinstance(step, Call) else []


def refs_in(values: Iterable[Any]) -> list[int]:
    """The numbers of the tensors in an operation's arguments."""
    parts = (part for v in values for part in (v if isinstance(v, list) else [v]))
    return [part.number for part in parts if isinstance(part, Ref)]


def _as_tuple(step: Step, dead: tuple[int, ...]) -> tuple[Any, ...]:
    if isinstance(step, Launch):
        places = [(i, *place) for i, place in step.slots]
        return _LAUNCH, step.run, step.arguments, places, step.tables, dead
    if isinstance(step, Check):
        return _CHECK, step.holds, step.places, step.found, dead
    if isinstance(step, Empty):
        return _EMPTY_STEP, step.number, step.size, step.stride, step.dtype, step.device, dead
    if isinstance(step, View):
        return _VIEW, step.number, step.root, step.size, step.stride, step.offset, dead
    slots = [(i, arg.number) for i, arg in enumerate(step.args) if isinstance(arg, Ref)]
    lists = [
        (i, [None if part is None else part.number for part in arg])
        for i, arg in enumerate(step.args)
        if isinstance(arg, list) and refs_in(arg)
    ]
    named = [(name, arg.number) for name, arg in step.kwargs.items() if isinstance(arg, Ref)]
    return _CALL, step.op, step.args, slots, lists, step.kwargs, named, step.outs, dead
