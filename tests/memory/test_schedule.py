"""The schedule alone, on a made-up device with two queues whose work takes random times."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxfast.memory.schedule import Copy, Mark, Schedule, Wait


class Violation(AssertionError):
    pass


class Device:
    """A copy queue and a compute queue, each in order; `sabotage` changes incoming actions."""

    def __init__(self, rng, sabotage=None):
        self.rng, self.sabotage = rng, sabotage
        self.host = self.copying = self.computing = 0.0
        self.copies, self.reads = [], []
        self.copy_end, self.use_end, self.held = {}, {}, {}

    def duration(self):
        # never zero, since work without duration has no before and after
        return self.rng.choice([1e-3, self.rng.random() + 1e-3, 20 * self.rng.random() + 1e-3])

    def issue(self, actions):
        for action in actions:
            self.host += self.duration() * 0.1
            if self.sabotage:
                action = self.sabotage(action)
            if isinstance(action, Copy):
                self._copy(action)
            elif isinstance(action, Wait):
                if action.copy not in self.copy_end:
                    raise Violation(f"{action}: no such copy was started, so this waits for ever")
                self.computing = max(self.computing, self.copy_end[action.copy])
            elif isinstance(action, Mark):
                self.use_end[action.use] = max(self.computing, self.host)

    def _copy(self, copy):
        if copy.after is not None and copy.after not in self.use_end:
            raise Violation(f"{copy}: the use it waits for has no end yet, so it may wait for ever")
        if copy.group in self.held.values():
            raise Violation(f"{copy}: the group is in a slot already")
        self.held[copy.slot] = copy.group
        start = max(self.copying, self.host, self.use_end.get(copy.after, 0.0))
        self.copying = self.copy_end[copy.number] = start + self.duration()
        self.copies.append((copy.slot, copy.group, start, self.copying))

    def read(self, slot, group):
        start = max(self.computing, self.host)
        self.computing = start + self.duration()
        self.reads.append((slot, group, start, self.computing))

    def check(self):
        for slot, group, start, end in self.reads:
            before = [copy for copy in self.copies if copy[0] == slot and copy[2] < end]
            into = before[-1] if before else None
            if into is None or into[1] != group or into[3] > start:
                raise Violation(
                    f"group {group} is read in slot {slot} from {start} to {end}, where {into} "
                    "was last"
                )


class Run:
    """Drives a schedule and a device together, as a training run would."""

    def __init__(self, groups, slots, rng, sabotage=None):
        self.schedule, self.device, self.rng = Schedule(groups, slots), Device(rng, sabotage), rng

    def enter(self, group, direction):
        self.device.issue(self.schedule.enter(group, direction))
        self.device.read(self.schedule.slot_of(group), group)

    def leave(self, group):
        self.device.issue(self.schedule.leave(group))

    def begin(self, backward_follows=True):
        self.device.issue(self.schedule.begin(backward_follows))

    def use(self, group, direction):
        self.enter(group, direction)
        while self.rng.random() < 0.2:
            # recomputed forward inside backward, a reader inside a reader
            self.enter(group, self.rng.choice(["forward", "backward"]))
            self.leave(group)
        self.leave(group)

    def step(self, backward=True):
        order = range(self.schedule.groups)
        self.begin(backward)
        for group in order:
            self.use(group, "forward")
        if backward:
            for group in reversed(order):
                self.use(group, "backward")

    def ragged(self):
        """A pass with anything in it: skips, turns, repeats, and an exception while a group is
        entered.
        """
        groups = self.schedule.groups
        kind = self.rng.choice(["skips", "turns", "breaks", "jumps", "changed"])
        self.begin(self.rng.random() < 0.5)
        order = list(range(groups))
        if kind == "skips":
            kept = [g for g in order if self.rng.random() < 0.5]
            for g in kept:
                self.use(g, "forward")
            for g in reversed(kept):
                self.use(g, "backward")
        elif kind == "turns":
            for g in order[: self.rng.randrange(groups + 1)]:
                self.use(g, "forward")
            for g in reversed(order[: self.rng.randrange(groups + 1)]):
                self.use(g, "backward")
        elif kind == "breaks":
            for g in order[: self.rng.randrange(groups)]:
                self.use(g, "forward")
            self.enter(self.rng.randrange(groups), self.rng.choice(["forward", "backward"]))
        elif kind == "jumps":
            for _ in range(groups):
                self.use(self.rng.randrange(groups), self.rng.choice(["forward", "backward"]))
        else:
            self.schedule.forget()
            self.device.held.clear()

    def many(self, passes):
        for _ in range(passes):
            if self.rng.random() < 0.5:
                self.step(backward=self.rng.random() < 0.7)
            else:
                self.ragged()
        self.device.check()


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 9), st.integers(2, 12), st.integers(0, 2**32))
def test_any_order_any_delays(groups, slots, seed):
    Run(groups, slots, random.Random(seed)).many(12)


def no_after(action):
    return action._replace(after=None) if isinstance(action, Copy) else action


def no_wait(action):
    return None if isinstance(action, Wait) else action


def late_mark(action):
    return action._replace(use=-1) if isinstance(action, Mark) else action


def old_copy(action):
    return action._replace(copy=max(0, action.copy - 1)) if isinstance(action, Wait) else action


def other_slot(action):
    return action._replace(slot=0) if isinstance(action, Copy) else action


@pytest.mark.parametrize("sabotage", [no_after, no_wait, late_mark, old_copy, other_slot])
def test_the_device_sees_what_is_wrong(sabotage):
    seen = 0
    for seed in range(20):
        try:
            Run(6, 3, random.Random(seed), sabotage).many(6)
        except Violation:
            seen += 1
    assert seen == 20


@pytest.mark.parametrize("slots", [2, 3, 4, 7, 9])
@pytest.mark.parametrize("groups", [1, 2, 7])
def test_copies_of_a_step(groups, slots):
    run = Run(groups, slots, random.Random(0))
    run.step()
    first = len(run.device.copies)
    held = min(groups, slots)
    # all of them once, then on the way back those that did not stay
    assert first == groups + (groups - held)
    for _ in range(3):
        run.step()
    assert len(run.device.copies) - first == 3 * 2 * (groups - held)


@pytest.mark.parametrize("slots", [2, 3])
def test_forward_only_fetches_the_next_forward(slots):
    run = Run(5, slots, random.Random(0))
    run.step(backward=False)
    copies = len(run.device.copies)
    run.begin(False)
    for group in range(5):
        actions = run.schedule.enter(group, "forward")
        # it is there or on its way already, so what is entered needs no copy of its own
        assert isinstance(actions[0], Wait)
        run.device.issue(actions)
        run.leave(group)
    assert len(run.device.copies) - copies == 5


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_next_one_is_on_its_way(direction):
    """Every group but the first is asked for while the one before it computes."""
    schedule = Schedule(8, 2)
    schedule.begin()
    order = list(range(8)) if direction == "forward" else list(reversed(range(8)))
    for i, group in enumerate(order):
        copied = [
            action.group for action in schedule.enter(group, direction) if isinstance(action, Copy)
        ]
        schedule.leave(group)
        if 0 < i < 7:
            assert copied == [order[i + 1]]


def test_recomputing_does_not_turn_the_travel_round():
    schedule = Schedule(6, 2)
    schedule.begin()
    schedule.enter(4, "backward")
    assert schedule.enter(4, "forward") == []
    assert schedule.leave(4) == []
    assert [type(action) for action in schedule.leave(4)] == [Mark]
    assert [a.group for a in schedule.enter(3, "backward") if isinstance(a, Copy)] == [2]


def test_a_broken_pass_is_over_when_the_next_begins():
    schedule = Schedule(6, 3)
    schedule.begin()
    schedule.enter(2, "forward")
    schedule.enter(2, "forward")
    assert schedule.begin() == [Mark(0, 0)]
    assert not [a for a in schedule.enter(2, "forward") if isinstance(a, Copy) and a.group == 2]
    assert schedule.leave(2) == [Mark(1, 0)]


def test_what_changed_is_copied_again():
    schedule = Schedule(3, 3)
    schedule.begin()
    schedule.enter(0, "forward")
    schedule.leave(0)
    schedule.forget()
    schedule.begin()
    assert [a.group for a in schedule.enter(0, "forward") if isinstance(a, Copy)] == [0, 1, 2]


def test_one_slot_is_none_to_copy_into():
    with pytest.raises(ValueError, match="at least 2"):
        Schedule(4, 1)
    assert Schedule(1, 1).slots == 1
    assert Schedule(3, 8).slots == 3
