"""How a host's block becomes ours and back: by a class of the same name over the host's own.

A layout has a mixin for each kind of block, which reads the host's modules and runs
`model.block_base` on them. The class that a block gets has the mixin before the host's class, and
the host's name, so that `isinstance`, class-name checks and every method stay; parameters, hooks
and attributes are the instance's, which stays the same object. Everything that a layout does not
know (an argument, a processor, a hook on a module that would be passed by) goes to the host's own
forward.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from fluxfast.dropin import host_bfl, host_concatenated, host_diffusers
from fluxfast.dropin.arguments import signature_of

# of an accelerated block, what `accelerate` set
CHOICES = (
    *(
        "compute",
        "compute_because",
        "outliers",
        "impl",
        "attention",
        "policy",
        "fixed_policy",
        "share_dropout",
    ),
    *("replaced", "log"),
)
LAYOUTS: dict[str, Any] = {
    "diffusers": host_diffusers,
    "concatenated": host_concatenated,
    "bfl": host_bfl,
}
EXPECTED = (
    "diffusers' FluxTransformer2DModel (0.36 or later), a model of its older blocks, whose "
    "single block takes one concatenated "
    "tensor (SimpleTuner's), or one in Black Forest Labs' layout (`double_blocks`, "
    "`single_blocks`; sd-scripts, musubi-tuner)"
)


def layout_of(block: nn.Module) -> tuple[str, type] | None:
    """The name of a block's layout and its mixin; None for a module that is no block of FLUX.1's."""
    for name, layout in LAYOUTS.items():
        mixin = layout.mixin_for(block)
        if mixin is not None:
            return name, mixin
    return None


def is_accelerated(module: nn.Module) -> bool:
    return "host_class" in type(module).__dict__


def accelerated_blocks(model: nn.Module) -> list[tuple[str, Any]]:
    """Names and blocks of ours in a model, wherever wrappers have put them."""
    return [(name, module) for name, module in model.named_modules() if is_accelerated(module)]


def adopt(block: nn.Module, layout: str, mixin: Any) -> None:
    """Give a block the class that runs our maths, and note whether a forward of its own stands
    before that.
    """
    anything: Any = block
    host: Any = type(block)
    entry = mixin.entry
    left = block.__dict__.get(entry)
    # what libraries leave behind that take their hooks off: its class's own forward, as an
    # attribute
    if (
        getattr(left, "__func__", None) is getattr(host, entry)
        and getattr(left, "__self__", None) is block
    ):
        del block.__dict__[entry]
    anything.__class__ = _class_for(host, layout, mixin)
    anything.replaced = entry in block.__dict__


def give_back(block: Any) -> None:
    """Make a block the host's again; what `accelerate` set on it is gone, everything else stays."""
    for name in CHOICES:
        block.__dict__.pop(name, None)
    block.__class__ = type(block).host_class


@functools.cache
def _class_for(host: type, layout: str, mixin: Any) -> type:
    body = {
        "__module__": host.__module__,
        "__qualname__": host.__qualname__,
        "__doc__": host.__doc__,
        "__reduce_ex__": lambda block, protocol: (_rebuild, (host, layout, mixin), block.__dict__),
        "host_class": host,
        "layout": layout,
        "signature": signature_of(getattr(host, mixin.entry)),
    }
    made = type(host.__name__, (mixin, host), body)
    LAYOUTS[layout].register(host, made)
    return made


def _rebuild(host: Any, layout: str, mixin: Any) -> Any:
    """An empty block, to be given its attributes: how a copy or an unpickled block starts, as its
    class has no module.
    """
    made: Any = _class_for(host, layout, mixin)
    return made.__new__(made)
