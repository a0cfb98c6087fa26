"""Tensors of nested values as a list, and nested again; torch's pytree is the reference."""

from typing import NamedTuple

import pytest
import torch
from torch.utils._pytree import tree_leaves

from fluxfast.model.nested import flattened, nested


class Pair(NamedTuple):
    first: object
    second: object


def tensor(i):
    return torch.full((2,), float(i))


VALUES = {
    "a tensor": tensor(0),
    "nothing": None,
    "empty": [{}, (), []],
    "as tapes are": [
        {"x_in": (Pair(tensor(0), None), (tensor(1), tensor(2))), "s": (tensor(3),)},
        {"y": (tensor(4), [tensor(5), None])},
    ],
}


@pytest.mark.parametrize("name", VALUES)
def test_there_and_back(name):
    value, leaves = VALUES[name], []
    form = flattened(value, leaves)
    wanted = tree_leaves(value)
    assert len(leaves) == len(wanted) and all(map(lambda a, b: a is b, leaves, wanted))
    again = nested(form, leaves)
    found = tree_leaves(again)
    assert all(map(lambda a, b: a is b, found, wanted)) and _kinds(again) == _kinds(value)


def test_other_leaves_take_their_places():
    form = flattened({"a": (tensor(0), None)}, [])
    first, second = tensor(1), tensor(2)
    made = nested(form, [first, second])
    assert made["a"][0] is first and made["a"][1] is second


def test_what_holds_no_tensors():
    with pytest.raises(TypeError):
        flattened([1.5], [])


def _kinds(value):
    if isinstance(value, dict):
        return {key: _kinds(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value), [_kinds(part) for part in value]
    return type(value)
