"""Which linears of FLUX.1 an adapter sits on: the rule, and the presets of `flux_lora_target`.

A target is a module name or the end of one (PEFT's rule, `is_target`). So `proj_out` means each
single block's and the transformer's own last linear as well.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from fluxfast.text import wrong_choice


@dataclass(frozen=True)
class TargetPreset:
    """Targets, and how many modules they name in FLUX.1's 19 double and 38 single blocks."""

    targets: tuple[str, ...]
    modules: int


# only a model whose projections diffusers has fused has these, in place of the unfused ones
FUSED_PROJECTIONS = ("to_qkv", "add_qkv_proj")

_CONTEXT = ("add_k_proj", "add_q_proj", "add_v_proj", "add_qkv_proj", "to_add_out")
_CONTEXT_FFS = (*_CONTEXT, "ff_context.net.0.proj", "ff_context.net.2")
_ALL = ("to_q", "to_k", "to_v", "to_qkv", "to_out.0", *_CONTEXT)
_ALL_FFS = (
    *_ALL,
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
    "proj_mlp",
    "proj_out",
)
_IMAGE_ATTENTION = ("to_q", "to_k", "to_v", "to_qkv", "to_out.0")

PRESETS: dict[str, TargetPreset] = {
    "all": TargetPreset(_ALL, 266),
    "context": TargetPreset(_CONTEXT, 76),
    "context+ffs": TargetPreset(_CONTEXT_FFS, 114),
    "all+ffs": TargetPreset(_ALL_FFS, 419),
    "all+ffs+embedder": TargetPreset((*_ALL_FFS, "x_embedder"), 420),
    "ai-toolkit": TargetPreset(
        (*_ALL_FFS, "norm.linear", "norm1.linear", "norm1_context.linear"), 495
    ),
    "tiny": TargetPreset(
        ("single_transformer_blocks.7.proj_out", "single_transformer_blocks.20.proj_out"), 2
    ),
    "nano": TargetPreset(("single_transformer_blocks.7.proj_out",), 1),
    # SimpleTuner accepts these two names and gives them its default list
    "mmdit": TargetPreset(_IMAGE_ATTENTION, 190),
    "all+ffs+embedder+controlnet": TargetPreset(_IMAGE_ATTENTION, 190),
}


def preset_targets(name: str) -> tuple[str, ...]:
    """A preset's targets. ValueError for an unknown name, and for `controlnet`."""
    if name == "controlnet":
        raise ValueError(
            "flux_lora_target 'controlnet' needs a ControlNet, which fluxfast doesn't train yet"
        )
    if name not in PRESETS:
        raise ValueError(wrong_choice("flux_lora_target", name, PRESETS))
    return PRESETS[name].targets


def is_target(name: str, targets: Iterable[str]) -> bool:
    """Whether targets name a module: its dotted name equals one, or ends in `.` and one."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def find_targets(transformer: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """The modules that a preset, by its name, or a list of targets stands for (`match_targets`)."""
    if isinstance(targets, str):
        return match_targets(transformer, preset_targets(targets), optional=FUSED_PROJECTIONS)
    return match_targets(transformer, targets)


def match_targets(
    transformer: nn.Module, targets: Sequence[str], *, optional: Iterable[str] = ()
) -> list[str]:
    """The names of the modules that `targets` name, in the model's order.

    ValueError names each target, unless in `optional`, that matches nothing, and any matched module
    that isn't linear.
    """
    modules = dict(transformer.named_modules())
    matched = {
        target: [name for name in modules if is_target(name, [target])] for target in targets
    }
    absent = [target for target, names in matched.items() if not names]
    absent = [target for target in absent if target not in set(optional)]
    if absent or not any(matched.values()):
        raise ValueError(
            f"LoRA targets that match no module of {type(transformer).__name__}: "
            f"{', '.join(absent or targets)}"
        )
    wanted = {name for names in matched.values() for name in names}
    # a linear that carries an adapter already is that adapter's module, with the linear below it
    other = [
        name
        for name in wanted
        if not isinstance(modules[name], nn.Linear) and not hasattr(modules[name], "base_layer")
    ]
    if other:
        raise ValueError(
            f"LoRA targets must be linear layers; these aren't: {', '.join(sorted(other)[:3])}"
        )
    return [name for name in modules if name in wanted]
