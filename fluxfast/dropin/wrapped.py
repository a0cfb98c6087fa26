"""Where a wrapper around a block's forward keeps the forward from before it.

A trainer that checkpoints or offloads a block often sets the block's `forward` to a function of its
own, which calls the one that was there before: OneTrainer's checkpoint layers, diffusers' hooks and
accelerate's do. A block that gets another class afterwards is not affected by that, since the
wrapper keeps the old class's method. `redirect` finds it there and puts the new class's in its
place, as if the wrapper had come later.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

# what a module keeps about itself; no wrapper is in there
_OF_TORCH = {
    *("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_compiled_call_impl"),
}
# how far from the block a wrapper's method may be: hooks have a registry, references and closures
_DEPTH = 6
# a wrapper may also hold all of its trainer
_MOST = 1000
# a value, and what puts another in its place; None where it can't be replaced
_Held = tuple[Any, Callable[[Any], None] | None]


def redirect(block: nn.Module, before: FunctionType, after: FunctionType) -> bool:
    """Put `after`, bound to the block, wherever its wrappers keep `before` bound to it.

    Returns whether that was anywhere.
    """
    found, seen = False, {id(block)}
    things: deque[tuple[Any, int]] = deque([(block, 0)])
    while things and len(seen) < _MOST:
        thing, depth = things.popleft()
        for value, put in _held_by(thing):
            if isinstance(value, MethodType) and value.__self__ is block:
                if value.__func__ is before:
                    if put is not None:
                        put(MethodType(after, block))
                        found = True
                    continue
                # a wrapper that is bound to the block itself
                value = value.__func__
            if depth < _DEPTH and id(value) not in seen and _may_hold(value):
                seen.add(id(value))
                things.append((value, depth + 1))
    return found


def _may_hold(value: Any) -> bool:
    """Whether a wrapper's method may be somewhere in a value."""
    if isinstance(value, (MethodType, FunctionType, functools.partial, list, dict)):
        return True
    # a module is a wrapper only where a method of it is in the way, which `_held_by` follows
    other = isinstance(value, (nn.Module, Tensor, type, ModuleType))
    return not other and hasattr(value, "__dict__")


def _held_by(thing: Any) -> Iterator[_Held]:
    """What a thing holds, as far as wrappers use it."""
    if isinstance(thing, MethodType):
        yield from _held_by(thing.__func__)
        yield from _held_by(thing.__self__)
    elif isinstance(thing, FunctionType):
        for cell in thing.__closure__ or ():
            try:
                yield cell.cell_contents, functools.partial(setattr, cell, "cell_contents")
            except ValueError:
                # a name that has no value yet
                continue
        for i, default in enumerate(thing.__defaults__ or ()):
            yield default, functools.partial(_put_default, thing, i)
        yield from _held_by(thing.__kwdefaults__ or {})
        yield from _held_by(thing.__dict__)
    elif isinstance(thing, functools.partial):
        yield thing.func, functools.partial(_put_function, thing)
        for i, value in enumerate(thing.args):
            yield value, functools.partial(_put_argument, thing, i)
        yield from _held_by(thing.keywords)
    elif isinstance(thing, dict):
        for key in [key for key in thing if key not in _OF_TORCH]:
            yield thing[key], functools.partial(thing.__setitem__, key)
    elif isinstance(thing, list):
        for i, value in enumerate(thing):
            yield value, functools.partial(thing.__setitem__, i)
    else:
        yield from _held_by(getattr(thing, "__dict__", {}))


def _put_default(function: FunctionType, i: int, value: Any) -> None:
    defaults = function.__defaults__ or ()
    function.__defaults__ = (*defaults[:i], value, *defaults[i + 1 :])


def _put_function(of: Any, value: Any) -> None:
    of.__setstate__((value, of.args, of.keywords, of.__dict__))


def _put_argument(of: Any, i: int, value: Any) -> None:
    arguments = (*of.args[:i], value, *of.args[i + 1 :])
    of.__setstate__((of.func, arguments, of.keywords, of.__dict__))


def forget_left_behind(block: nn.Module, entry: str, function: FunctionType) -> None:
    """Take away an attribute that is the class's own forward, `function`.

    Some libraries leave one when they take their hooks off; that is no forward of the block's own.
    """
    left = block.__dict__.get(entry)
    if isinstance(left, MethodType) and left.__self__ is block and left.__func__ is function:
        del block.__dict__[entry]
