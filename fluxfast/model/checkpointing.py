"""What a fused block does inside a gradient checkpoint that somebody has put around it.

A non-reentrant checkpoint drops what is saved for backward inside it, and runs the block again when
backward asks for it. A fused block can do that for less: its backward computes again what it needs,
which leaves out the block's last products. So it saves past the checkpoint (`saving_for_itself`),
which then has nothing to run again.

That would be wrong where running the block again does something else as well: where hooks bring its
weights back, or where the checkpoint brings its streams back from another device. There the
checkpoint is left alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fluxfast.foreign.code_names import names_in
from fluxfast.hooks import is_own_forward

# all that the code of a wrapper may name that does nothing but checkpoint: OneTrainer's
_WRAPPERS_NAMES = {
    *("torch", "is_grad_enabled", "utils", "checkpoint"),
    *("checkpointing", "orig_forward", "dummy"),
}


def is_checkpointed(block: Any, x: Tensor) -> bool:
    """Whether a block, called with stream x, does the work of a checkpoint that is around it."""
    # a compiled block is composed of ops, which torch.compile saves as it likes
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return (
        hooks is not None
        and getattr(hooks[0], "__module__", None) == torch.utils.checkpoint.__name__
        and not came_from_another_device(x)
        and not _runs_more(block)
    )


def came_from_another_device(x: Tensor) -> bool:
    """Whether x was made by copying a tensor of autograd's graph from another device."""
    node, output = next(iter(x.grad_fn.next_functions), (None, 0)) if x.grad_fn else (None, 0)
    of_outputs = getattr(node, "_input_metadata", ())
    return len(of_outputs) > output and of_outputs[output].device != x.device


def _runs_more(block: Any) -> bool:
    """Whether calling a block runs more than its class's own forward.

    Hooks on its backward do not count: a checkpoint does not run them.
    """
    held = block.__dict__
    if held["_forward_hooks"] or held["_forward_pre_hooks"]:
        return True
    forward = held.get("forward")
    if forward is None or is_own_forward(block, forward):
        return False
    wrapper: Any = getattr(forward, "__self__", None)
    wrapped = getattr(wrapper, "orig_forward", None)
    kind: Any = type(wrapper)
    return not (is_own_forward(block, wrapped) and _only_checkpoints(kind))


@functools.cache
def _only_checkpoints(wrapper: type) -> bool:
    """Whether a class's methods do nothing but call a checkpoint, or what they wrap."""
    methods = {name: f for name, f in vars(wrapper).items() if isinstance(f, FunctionType)}
    methods.pop("__init__", None)
    named = set[str]().union(*map(names_in, methods.values()))
    return bool(methods) and named <= _WRAPPERS_NAMES | methods.keys()


@contextmanager
def saving_for_itself() -> Iterator[None]:
    """A context in which what is saved for backward goes past a checkpoint."""
    # only the innermost hooks are called
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        yield
