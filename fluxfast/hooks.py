"""Hooks on modules: what a call of a module runs besides its class's own forward."""

from __future__ import annotations

from typing import Any

from torch import nn


def hooked(module: nn.Module) -> str | None:
    """What calling the module would run besides its class's own forward; None for nothing.

    That is a hook, or a forward that was replaced. Either may change the weights for the length of
    a call, as diffusers' layerwise casting and group offloading and accelerate's offloading do, so
    that only the module itself can say what it computes.
    """
    if "forward" in module.__dict__ and not _is_own_forward(module, module.__dict__["forward"]):
        registry, hook = module.__dict__.get("_diffusers_hook"), module.__dict__.get("_hf_hook")
        if hook is not None:
            return f"it has hooks: accelerate's {type(hook).__name__}"
        if registry is not None and registry.hooks:
            return f"it has hooks: diffusers' {', '.join(registry.hooks)}"
        return "its forward was replaced"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "it has hooks"
    return None


def _is_own_forward(module: nn.Module, forward: Any) -> bool:
    """Whether an instance's `forward` is its class's own, as libraries leave it behind."""
    own = getattr(forward, "__self__", None) is module
    return own and getattr(forward, "__func__", None) is type(module).forward
