"""How a host's block becomes ours and the host's again: by changing its class.

Hosts are told apart by their blocks: "diffusers", "concatenated" (diffusers' older blocks) and
"bfl". For each there is a mixin for each kind of block, which reads the host's modules and runs
`model.block_base` on them. The class that a block gets derives from the mixin and the host's
class and has the host's name, so `isinstance`, checks of class names and all methods still work.
The block stays the same object, with its parameters, hooks and attributes. Everything that a mixin
does not know (an argument, a processor, a hook on a module that would be passed by) goes to the
host's own forward.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from fluxfast.dropin import host_bfl, host_concatenated, host_diffusers
from fluxfast.dropin.arguments import signature_of
from fluxfast.dropin.wrapped import forget_left_behind, redirect
from fluxfast.model.stored_codes import keep_transposed

# the attributes of a block that `accelerate` sets
SET_BY_ACCELERATE = (
    "compute",
    "compute_because",
    "codes_because",
    "outliers",
    "impl",
    "attention",
    "launch_plans",
    "policy",
    "fixed_policy",
    "share_dropout",
    "replaced",
    "log",
)
HOSTS: dict[str, Any] = {
    "diffusers": host_diffusers,
    "concatenated": host_concatenated,
    "bfl": host_bfl,
}
EXPECTED = (
    "diffusers' FluxTransformer2DModel (0.36 or later), a model of its older blocks, whose "
    "single block takes one concatenated tensor (SimpleTuner's), or one in Black Forest Labs' "
    "layout (`double_blocks`, `single_blocks`; sd-scripts, musubi-tuner, ComfyUI)"
)


def host_kind_of(block: nn.Module) -> tuple[str, type] | None:
    """The kind of host that a block comes from, and its mixin; None for no block of FLUX.1's."""
    for kind, host in HOSTS.items():
        if (mixin := host.mixin_for(block)) is not None:
            return kind, mixin
    return None


def is_accelerated(module: nn.Module) -> bool:
    return "host_class" in type(module).__dict__


def accelerated_blocks(model: nn.Module) -> list[tuple[str, Any]]:
    """Names and blocks of ours in a model, wherever wrappers have put them."""
    return [(name, module) for name, module in model.named_modules() if is_accelerated(module)]


def take_over(block: nn.Module, kind: str, mixin: Any) -> None:
    """Give a block the class that runs our maths.

    A forward of the block's own, which a trainer has wrapped around its class's, calls the new one
    from now on. `replaced` notes whether one hides it all the same.
    """
    anything: Any = block
    host: Any = type(block)
    entry = mixin.entry
    forget_left_behind(block, entry, getattr(host, entry))
    made: Any = _class_for(host, kind, mixin)
    anything.__class__ = made
    wraps = redirect(block, getattr(host, entry), getattr(made, entry))
    anything.replaced = entry in block.__dict__ and not wraps


def give_back(block: Any) -> None:
    """Make a block the host's again: its class and everything that `accelerate` set on it go."""
    keep_transposed(block.maths().linear_groups(), None)
    for name in SET_BY_ACCELERATE:
        block.__dict__.pop(name, None)
    mine, host, entry = type(block), type(block).host_class, type(block).entry
    block.__class__ = host
    redirect(block, getattr(mine, entry), getattr(host, entry))
    forget_left_behind(block, entry, getattr(host, entry))


@functools.cache
def _class_for(host: type, kind: str, mixin: Any) -> type:
    body = {
        "__module__": host.__module__,
        "__qualname__": host.__qualname__,
        "__doc__": host.__doc__,
        "__reduce_ex__": lambda block, protocol: (_rebuild, (host, kind, mixin), block.__dict__),
        "host_class": host,
        "host_kind": kind,
        "signature": signature_of(getattr(host, mixin.entry)),
        mixin.entry: _while_ours(mixin),
    }
    made = type(host.__name__, (mixin, host), body)
    HOSTS[kind].register(host, made)
    return made


def _while_ours(mixin: Any) -> Any:
    """The mixin's forward; on a block that is the host's again, that of its class.

    Whoever wrapped the forward of an accelerated block calls it after `restore`, too.
    """
    name, run = mixin.entry, getattr(mixin, mixin.entry)

    @functools.wraps(run)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "host_class"):
            return getattr(type(self), name)(self, *args, **kwargs)
        return run(self, *args, **kwargs)

    return forward


def _rebuild(host: Any, kind: str, mixin: Any) -> Any:
    """An empty block, which is then given its attributes: how copying and unpickling begin.

    Its class belongs to no module, so pickle can't find it by name.
    """
    made: Any = _class_for(host, kind, mixin)
    return made.__new__(made)
