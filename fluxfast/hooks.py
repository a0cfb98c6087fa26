"""What a call of a module runs besides its class's own forward, and what the module holds."""

from __future__ import annotations

from typing import Any

from torch import nn

REPLACED = "its forward was replaced"


def hooked(module: nn.Module) -> str | None:
    """What calling the module would run besides its class's own forward; None for nothing.

    That is a hook, or a forward that was replaced. Either may change the weights for the length of
    a call, as diffusers' layerwise casting and group offloading and accelerate's offloading do, so
    that only the module itself can say what it computes.
    """
    held = module.__dict__
    hooks = (
        held["_forward_hooks"]
        or held["_forward_pre_hooks"]
        or held["_backward_hooks"]
        or held["_backward_pre_hooks"]
    )
    if not hooks and "forward" not in held:
        return None
    if "forward" in held and not is_own_forward(module, held["forward"]):
        registry, hook = held.get("_diffusers_hook"), held.get("_hf_hook")
        if hook is not None:
            return f"it has hooks: accelerate's {type(hook).__name__}"
        if registry is not None and registry.hooks:
            return f"it has hooks: diffusers' {', '.join(registry.hooks)}"
        if "_layer_memory_manager" in held:
            return "ai-toolkit fetches its weight for the length of a call"
        return REPLACED
    return "it has hooks" if hooks else None


def is_own_forward(module: nn.Module, forward: Any) -> bool:
    """Whether an instance's `forward` is its class's own, as libraries leave it behind."""
    own = getattr(forward, "__self__", None) is module
    return own and getattr(forward, "__func__", None) is type(module).forward


def own_parameter(module: Any, name: str) -> Any:
    """`getattr(module, name)` of a parameter, in a third of the time where the module holds it."""
    held = module.__dict__.get("_parameters")
    # what is no module, and what passes on the attributes of another, only has attributes
    return held[name] if held is not None and name in held else getattr(module, name)


def own_module(module: Any, name: str) -> Any:
    """`getattr(module, name)` of a module in it, as fast."""
    held = module.__dict__.get("_modules")
    return held[name] if held is not None and name in held else getattr(module, name)
