"""LoRA and DoRA, through PEFT, over a frozen W.

With s = alpha / rank, LoRA computes W x + s·B A x, and DoRA m / ‖W + s·B A‖ times that, by rows.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.nn import Parameter

from fluxfast.adapters.dora import MAGNITUDE, magnitude_of, start_magnitude
from fluxfast.adapters.kind import AdapterFile, AdapterKind, AdapterSettings, Originals, Wrapped
from fluxfast.adapters.lora_init import check_init, init_from_base
from fluxfast.adapters.lora_read import LoraFile, read_lora
from fluxfast.adapters.lora_state import (
    adapter_state,
    load_adapter_state,
    lora_layers,
    trained_in,
    trained_of,
)
from fluxfast.adapters.lora_write import save_lora
from fluxfast.adapters.presets import find_targets, preset_targets
from fluxfast.config.adapters import LORA_FORMATS
from fluxfast.hooks import hooked, own_parameter
from fluxfast.ops.linear.adapters import Adapter, Lora
from fluxfast.quant.linear import shapes_only

# PEFT's modules whose forward is LoRA's formula and nothing more. They are known by name, as some
# of them can only be imported beside the library whose linears they wrap
_PEFT_LINEARS = {
    ("peft.tuners.lora.layer", "Linear"),
    ("peft.tuners.lora.bnb", "Linear4bit"),
    ("peft.tuners.lora.bnb", "Linear8bitLt"),
    ("peft.tuners.lora.torchao", "TorchaoLoraLinear"),
}
# whether each class that was seen is one of them
_known: dict[type, bool] = {}


class LoraKind(AdapterKind):
    """SimpleTuner's `lora_type` "standard": PEFT's LoRA, under PEFT's adapter name "default"."""

    label = "LoRA"
    styles = LORA_FORMATS
    # whether a new adapter is made with a magnitude; one that is there already says so itself
    _dora = False

    def shapes(self, out_features: int, in_features: int, size: int) -> dict[str, tuple[int, ...]]:
        return {"lora_A.weight": (size, in_features), "lora_B.weight": (out_features, size)}

    def tensors(self, module: nn.Module) -> dict[str, Parameter]:
        return trained_of(module)

    def add(self, transformer: nn.Module, settings: AdapterSettings) -> list[str]:
        return _add(transformer, settings, dora=self._dora)

    def modules(self, transformer: nn.Module) -> dict[str, nn.Module]:
        return lora_layers(transformer)

    def set_enabled(self, transformer: nn.Module, enabled: bool) -> None:
        for layer in lora_layers(transformer).values():
            layer.enable_adapters(enabled)

    def read(self, module: Any, *, share_dropout: bool) -> Wrapped | None:
        if not _is_peft_linear(type(module)):
            return None
        return Wrapped(module._modules["base_layer"], _read_peft(module, share_dropout))

    def check(self, transformer: nn.Module, settings: AdapterSettings) -> dict[str, int]:
        ranks = super().check(transformer, settings)
        check_init(transformer, list(ranks), settings)
        return ranks

    def add_from(
        self, transformer: nn.Module, file: AdapterFile, settings: AdapterSettings
    ) -> None:
        assert isinstance(file, LoraFile)
        load_lora(transformer, file, dropout=settings.dropout, dtype=settings.dtype)

    def state(self, transformer: nn.Module) -> dict[str, Tensor]:
        return adapter_state(transformer)

    def load_state(
        self,
        transformer: nn.Module,
        state: Mapping[str, Tensor],
        originals: Originals | None = None,
    ) -> None:
        load_adapter_state(transformer, state, originals=originals)

    def from_state(self, path: Path, state: Mapping[str, Tensor]) -> LoraFile:
        trained = trained_in(state)
        targets = [
            key.removesuffix(".lora_A.weight") for key in trained if key.endswith(".lora_A.weight")
        ]
        return LoraFile.of(
            path,
            trained,
            ranks={name: len(trained[f"{name}.lora_A.weight"]) for name in targets},
            alphas={name: float(state[f"{name}.alpha"]) for name in targets},
        )

    def save(
        self,
        transformer: nn.Module,
        path: str | os.PathLike[str],
        *,
        style: str = "diffusers",
        metadata: Mapping[str, str] | None = None,
    ) -> Path:
        return save_lora(transformer, path, format=style, metadata=metadata)

    def read_file(self, adapter: str | os.PathLike[str]) -> LoraFile:
        return read_lora(adapter)


class DoraKind(LoraKind):
    """SimpleTuner's `use_dora`: PEFT's LoRA with a magnitude for each row of the weight."""

    label = "DoRA"
    # kohya's scripts read no magnitudes, and its fused linears have no place for those of a part
    styles = tuple(style for style in LORA_FORMATS if style != "kohya")
    _dora = True

    def shapes(self, out_features: int, in_features: int, size: int) -> dict[str, tuple[int, ...]]:
        factors = super().shapes(out_features, in_features, size)
        return {**factors, MAGNITUDE: (out_features,)}


def _read_peft(module: Any, share_dropout: bool) -> tuple[Adapter, ...] | str:
    """The active adapters of one of PEFT's linears, or why only PEFT can compute what they add."""
    if module.merged and module.disable_adapters:
        return "only PEFT can take its merged adapter out of the base again"
    if module.merged or module.disable_adapters:
        return ()
    adapters: list[Lora] = []
    # from the dicts that hold them, since blocks ask for each linear in each step, and a module
    # looks for an attribute elsewhere first
    parts: Any = module._modules
    for name in module.active_adapters:
        if (a := parts["lora_A"]._modules.get(name)) is None:
            continue
        b, scale = parts["lora_B"]._modules[name], module.scaling[name]
        variant = module.lora_variant.get(name)
        if variant is not None and not isinstance(variant, DoraLinearVariant):
            return f"adapter {name!r} is no plain LoRA but {type(variant).__name__}"
        if not (_is_plain(a) and _is_plain(b)) or own_parameter(b, "bias") is not None:
            return f"adapter {name!r} has a bias, hooks or layers of its own"
        if isinstance(scale, Tensor):
            return f"adapter {name!r} keeps its scale in a tensor, for hot-swapping"
        dropout = parts["lora_dropout"]._modules[name]
        p = dropout.p if module.training and isinstance(dropout, nn.Dropout) else 0.0
        if p > 0 and not share_dropout:
            return f"adapter {name!r} has a dropout (share_dropout=True would fuse it)"
        magnitude = None if variant is None else magnitude_of(module, name)
        if magnitude is not None and p > 0:
            # PEFT multiplies the base by what dropout has left of x, too
            return f"adapter {name!r} is DoRA with a dropout"
        adapters.append(
            Lora(own_parameter(a, "weight"), own_parameter(b, "weight"), scale, p, None, magnitude)
        )
    if len(adapters) > 1 and any(adapter.magnitude is not None for adapter in adapters):
        return "one of several adapters is DoRA, which rescales what the others add"
    return tuple(adapters)


def _is_peft_linear(kind: type) -> bool:
    if kind not in _known:
        _known[kind] = (kind.__module__, kind.__name__) in _PEFT_LINEARS
    return _known[kind]


def _is_plain(module: nn.Module) -> bool:
    return type(module).forward is nn.Linear.forward and hooked(module) is None


def add_lora(
    transformer: nn.Module,
    *,
    targets: str | Sequence[str],
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    init: str = "default",
    adapter_name: str = "default",
    dtype: torch.dtype = torch.float32,
    dora: bool = False,
    loftq_iterations: int = 1,
    originals: Originals | None = None,
) -> list[Parameter]:
    """Freezes `transformer` (a diffusers model) and puts a new LoRA, or DoRA, on it.

    Returns the new parameters in order: A [rank, in] and B [out, rank] of each linear, in `dtype`.
    `targets` is a list of module names or their ends, or a preset of SimpleTuner's
    `flux_lora_target`: "all" (attention), "context", "context+ffs", "all+ffs", "all+ffs+embedder",
    "ai-toolkit", "tiny", "nano", "mmdit", "all+ffs+embedder+controlnet". What a LoRA adds is
    alpha / rank · B A, and `alpha` None means `rank`. `init`: "default" (A Kaiming-uniform, B
    zero), "gaussian" (A normal / rank, B zero), "olora" and "pissa" (from the base's weights),
    "pissa_niter_<n>" (PiSSA by n steps of a randomised SVD: seconds, not minutes), and "loftq",
    which corrects the error of a quantised base in `loftq_iterations`. Over a quantised base the
    last three take its weights from `originals`. Random numbers come from torch's global generator.
    Raises ValueError, before anything is changed, for targets that match nothing, unknown presets
    and inits, ranks below 1, and weights that are not at hand.
    """
    settings = AdapterSettings(
        targets if isinstance(targets, str) else tuple(targets),
        rank,
        float(rank) if alpha is None else alpha,
        dropout,
        init,
        dtype,
        loftq_iterations=loftq_iterations,
        originals=originals,
    )
    _add(transformer, settings, adapter_name, dora=dora)
    return _trained(transformer, adapter_name)


def _add(
    transformer: nn.Module,
    settings: AdapterSettings,
    adapter_name: str = "default",
    *,
    dora: bool,
) -> list[str]:
    """`add_lora`; returns lines about how the adapter starts, for the user."""
    targets, init = settings.targets, settings.init
    if settings.by_module is not None:
        targets = tuple(settings.by_module)
    if settings.rank < 1:
        raise ValueError(f"lora_rank must be at least 1, got {settings.rank}")
    from_base = check_init(transformer, find_targets(transformer, targets), settings)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(preset_targets(targets) if isinstance(targets, str) else targets),
        # other initialisers change the base, which `init_from_base` does below; a config with their
        # names would have it done again to the base of whoever loads the file
        init_lora_weights="gaussian" if init == "gaussian" else True,
        use_dora=dora,
    )
    _inject(transformer, config, adapter_name, settings.dtype)
    if not from_base:
        return []
    layers = lora_layers(transformer, adapter_name)
    errors = init_from_base(layers, adapter_name, settings)
    for layer in layers.values():
        start_magnitude(layer, adapter_name, settings.dtype)
    lines = [] if errors is None else [f"lora_init_type {init}: {errors}"]
    return [
        *lines,
        f"lora_init_type {init}: a saved file has what training adds to the original weights, as a "
        f"LoRA of twice the rank ({2 * settings.rank})",
    ]


def load_lora(
    transformer: nn.Module,
    lora: LoraFile | str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> list[Parameter]:
    """Freezes `transformer` and puts a LoRA on it that was trained before (`init_lora`).

    Returns its parameters as `add_lora` does; modules, ranks, alphas and values are the file's.
    `lora` is what `read_lora` gave, or a path for it. Raises `read_lora`'s errors, and ValueError
    where the transformer lacks a module of the LoRA or has it in another shape.
    """
    if not isinstance(lora, LoraFile):
        lora = read_lora(lora)
    (DoraKind() if lora.dora else LoraKind()).check_fits(transformer, lora)
    rank, alpha = lora.rank, lora.alpha
    # PEFT reads a string as a regular expression for the whole name, so that `proj_out` means that
    # module alone
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="|".join(_exactly(name) for name in lora.targets),
        rank_pattern={f"^{_exactly(name)}": r for name, r in lora.ranks.items() if r != rank},
        alpha_pattern={f"^{_exactly(name)}": a for name, a in lora.alphas.items() if a != alpha},
        use_dora=lora.dora,
    )
    _inject(transformer, config, adapter_name, dtype)
    with torch.no_grad():
        for name, layer in lora_layers(transformer, adapter_name).items():
            for key, tensor in trained_of(layer, adapter_name).items():
                tensor.copy_(lora.state[f"{name}.{key}"])
    return _trained(transformer, adapter_name)


def _exactly(name: str) -> str:
    return name.replace(".", r"\.")


def _inject(transformer: Any, config: LoraConfig, adapter_name: str, dtype: torch.dtype) -> None:
    """Adds the adapter that `config` describes, with parameters in `dtype`."""
    # PEFT asks each linear for its weight some twenty times
    with shapes_only():
        transformer.add_adapter(config, adapter_name)
    for layer in lora_layers(transformer, adapter_name).values():
        layer.lora_A[adapter_name].to(dtype)
        layer.lora_B[adapter_name].to(dtype)
        start_magnitude(layer, adapter_name, dtype)
    # PEFT's new modules start in training mode, whatever mode the model is in
    transformer.train(transformer.training)


def _trained(transformer: nn.Module, adapter_name: str) -> list[Parameter]:
    """The parameters of an adapter, in order."""
    layers = lora_layers(transformer, adapter_name).values()
    return [tensor for layer in layers for tensor in trained_of(layer, adapter_name).values()]
