"""Which arguments of a block's call matter: those that are not at their defaults."""

import pytest
import torch

from fluxfast.dropin.arguments import arguments, signature_of


def block(
    self, x, vec, mask=None, flag=False, scale=1.0, sizes=(1, 2), extra=None, *, mode="a"
): ...


def open_block(self, x, vec, mask=None, **more): ...


SAME_AS_DEFAULT = [
    {"mask": None},
    {"flag": False},
    {"scale": 1},
    {"sizes": (1, 2)},
    {"extra": {}},
    {"extra": []},
    {"mode": "a"},
    {"mask": None, "flag": False, "scale": 1.0, "sizes": (1, 2), "extra": None, "mode": "a"},
]


@pytest.mark.parametrize("given", SAME_AS_DEFAULT)
def test_an_argument_at_its_default_says_nothing(given):
    signature = signature_of(block)
    by_name = arguments(signature, ("x",), {"vec": "v", **given}, frozenset({"x", "vec"}))
    assert by_name == ({"x": "x", "vec": "v"}, None, "")
    order = ["mask", "flag", "scale", "sizes", "extra"]
    positional = [given.get(name, signature.defaults[name]) for name in order]
    named = {name: value for name, value in given.items() if name not in order}
    assert arguments(signature, ("x", "v", *positional), named, frozenset({"x", "vec"})) == by_name


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"flag": True}, "flag=True"),
        ({"scale": 0.5}, "scale=0.5"),
        ({"sizes": (1, 3)}, "sizes=(1, 3)"),
        ({"sizes": None}, "sizes=None"),
        ({"extra": {"a": None}}, "extra={'a': None}"),
        ({"mask": torch.ones(2, 7)}, "mask=a tensor [2, 7] of torch.float32"),
        ({"mode": "b"}, "mode='b'"),
    ],
)
def test_any_other_value_is_the_hosts_affair(given, shown):
    known, because, value = arguments(
        signature_of(block), ("x", "v"), given, frozenset({"x", "vec"})
    )
    assert (
        not known
        and because == f"only the host knows its argument {shown.partition('=')[0]}"
        and value == shown
    )


def test_arguments_that_no_signature_has():
    x, v, known = "x", "v", frozenset({"x", "vec"})
    assert arguments(signature_of(block), (x, v), {"other": None}, known).because
    assert arguments(signature_of(block), (x, v), {"x": x}, known).because
    assert arguments(signature_of(block), (x, v, *range(9)), {}, known).because
    # a host that takes anything by name finds None where nothing is given
    assert arguments(signature_of(open_block), (x, v), {"other": None}, known).because is None
    assert arguments(signature_of(open_block), (x, v), {"other": False}, known).because
