"""When which group of blocks is copied into which slot: decided here, carried out by the stream.

There is a ring of slots, each of which holds one group. Events go in (`begin`, `enter`, `leave`)
and actions come out. They are to be issued in order on two queues: copies on one; waits, the
groups' own work and marks on the other.

On entering a group, that group and the next ones in the direction of travel are wanted, as many as
there are slots. A wanted group that is not there is copied into a slot that holds an unwanted one,
after that slot's last use. At the end of forward the last groups stay, since backward begins with
them; at the end of backward the first ones do. So a step of G groups through n slots costs 2 (G -
n) copies. A wrong guess (a group is skipped, or the direction changes) costs a copy, never a wrong
read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from fluxfast.model.residency import Direction


class Copy(NamedTuple):
    """Start copying `group` into `slot`, once the use `after` has ended (None: at once)."""

    number: int
    group: int
    slot: int
    after: int | None


class Wait(NamedTuple):
    """Everything issued from here on runs after this copy, the last one into `slot`."""

    copy: int
    slot: int


class Mark(NamedTuple):
    """The use with this number, of what is in `slot`, ends here.

    Everything that was issued so far belongs to it.
    """

    use: int
    slot: int


Action = Copy | Wait | Mark


@dataclass(eq=False)
class _Slot:
    group: int | None = None
    copy: int = -1
    # how often its group was entered and not yet left
    depth: int = 0
    # the last use that was marked, whichever group's it was
    use: int | None = None


class Schedule:
    """Decides what to copy, wait for and mark, without any device.

    groups: how many there are, numbered in the order of forward. slots: at least 2, or 1 for a
    single group.
    """

    def __init__(self, groups: int, slots: int) -> None:
        if slots < 2 and groups > 1:
            raise ValueError(
                f"a ring of {slots} slot: at least 2 are needed, one to compute with and one to "
                "copy into"
            )
        self.groups = groups
        self._slots = [_Slot() for _ in range(min(slots, groups))]
        self._backward_follows = True
        self._copies = self._uses = 0

    @property
    def slots(self) -> int:
        return len(self._slots)

    def begin(self, backward_follows: bool = True) -> list[Action]:
        """A forward pass starts; what an exception left entered is left now.

        backward_follows: whether to keep the last groups for backward; else the first ones are
        fetched for the next forward.
        """
        self._backward_follows = backward_follows
        marks: list[Action] = []
        for slot in self._slots:
            if slot.depth:
                slot.depth = 0
                marks.append(self._mark(slot))
        return marks

    def enter(self, group: int, direction: Direction) -> list[Action]:
        """The group is about to be read.

        Entering a group again before leaving it changes nothing, whatever the direction.
        """
        assert 0 <= group < self.groups
        actions: list[Action] = []
        slot = self._find(group)
        if slot is not None and slot.depth:
            # it is in use already, so it is there and nothing has to be waited for
            slot.depth += 1
            return actions
        wanted = self._wanted(group, direction)
        if slot is None:
            slot = self._victim(wanted)
            # it may take the slot of a wanted group: this one is needed now
            assert slot is not None, "every slot is in use: a group was entered and never left"
            actions.append(self._copy(group, slot))
        slot.depth = 1
        actions.append(Wait(slot.copy, self._slots.index(slot)))
        # prefetch what comes next, but never into a slot whose group is wanted as well
        for ahead in wanted[1:]:
            if (
                self._find(ahead) is None
                and (free := self._victim(wanted, keep_wanted=True)) is not None
            ):
                actions.append(self._copy(ahead, free))
        return actions

    def leave(self, group: int) -> list[Action]:
        """One `enter` of the group is over."""
        slot = self._find(group)
        assert slot is not None and slot.depth, f"group {group} is not in use"
        slot.depth -= 1
        return [] if slot.depth else [self._mark(slot)]

    def forget(self) -> None:
        """The slots no longer hold what the groups are; none may be in use."""
        for slot in self._slots:
            assert not slot.depth, f"group {slot.group} is in use"
            slot.group = None

    def slot_of(self, group: int) -> int | None:
        """The slot that holds the group, or will when its copy has ended."""
        return next((i for i, slot in enumerate(self._slots) if slot.group == group), None)

    def _find(self, group: int) -> _Slot | None:
        index = self.slot_of(group)
        return None if index is None else self._slots[index]

    def _wanted(self, group: int, direction: Direction) -> list[int]:
        """The group and those after it, without repeats, as many as there are slots."""
        wanted: list[int] = []
        for candidate in self._travel(group, direction):
            if candidate not in wanted:
                wanted.append(candidate)
            if len(wanted) == len(self._slots):
                break
        return wanted

    def _travel(self, group: int, direction: Direction) -> Iterator[int]:
        """The groups from this one on, in the order in which they will be entered."""
        if direction == "backward":
            yield from range(group, -1, -1)
            # after backward comes the next step's forward
            yield from range(self.groups)
            return
        yield from range(group, self.groups)
        yield from reversed(range(self.groups)) if self._backward_follows else range(self.groups)

    def _victim(self, wanted: list[int], keep_wanted: bool = False) -> _Slot | None:
        """The slot to overwrite: an empty one, else an unwanted one, else the one wanted last.

        None if all are in use or, with `keep_wanted`, wanted.
        """
        free = [
            slot
            for slot in self._slots
            if not slot.depth and not (keep_wanted and slot.group in wanted)
        ]

        # how far in the future its group is wanted; an empty slot comes before all others
        def distance(slot: _Slot) -> int:
            if slot.group is None:
                return len(wanted) + 1
            return wanted.index(slot.group) if slot.group in wanted else len(wanted)

        return max(free, key=distance, default=None)

    def _copy(self, group: int, slot: _Slot) -> Copy:
        slot.group, slot.copy = group, self._copies
        self._copies += 1
        return Copy(slot.copy, group, self._slots.index(slot), slot.use)

    def _mark(self, slot: _Slot) -> Mark:
        slot.use = self._uses
        self._uses += 1
        return Mark(slot.use, self._slots.index(slot))
