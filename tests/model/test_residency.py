"""A block without a residency computes where it is; one with one asks it."""

from contextlib import nullcontext

import torch

from fluxfast.model.residency import fetch_input, keep_input, resident


class Recorder:
    def __init__(self):
        self.calls = []

    def use(self, direction):
        self.calls.append(direction)
        return nullcontext()

    def keep(self, x):
        return ("kept", x)

    def fetch(self, kept):
        return kept[1]


def test_without_one():
    block, x = torch.nn.Linear(2, 2), torch.ones(2)
    with resident(block, "forward"):
        assert fetch_input(block, keep_input(block, x)) is x
    block.residency = None
    with resident(block, "backward"):
        assert keep_input(block, x) is x


def test_with_one():
    block, x = torch.nn.Linear(2, 2), torch.ones(2)
    block.residency = Recorder()
    with resident(block, "forward"), resident(block, "backward"):
        kept = keep_input(block, x)
    assert kept == ("kept", x) and fetch_input(block, kept) is x
    assert block.residency.calls == ["forward", "backward"]
