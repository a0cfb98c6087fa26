"""LoRA, through PEFT: W x becomes W x + (alpha / rank) · B A x, with W frozen."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import Parameter

from fluxfast.adapters.kind import AdapterFile, AdapterKind, AdapterSettings, Wrapped
from fluxfast.adapters.lora_init import check_init, init_from_base
from fluxfast.adapters.lora_read import LoraFile, read_lora
from fluxfast.adapters.lora_state import (
    adapter_state,
    factors_of,
    load_adapter_state,
    lora_layers,
)
from fluxfast.adapters.lora_write import save_lora
from fluxfast.adapters.presets import find_targets, preset_targets
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


class LoraKind(AdapterKind):
    """SimpleTuner's `lora_type` "standard": PEFT's LoRA, under PEFT's adapter name "default"."""

    label = "LoRA"

    def shapes(self, out_features: int, in_features: int, size: int) -> dict[str, tuple[int, ...]]:
        return {"lora_A.weight": (size, in_features), "lora_B.weight": (out_features, size)}

    def tensors(self, module: nn.Module) -> dict[str, Parameter]:
        return factors_of(module)

    def add(self, transformer: nn.Module, settings: AdapterSettings) -> None:
        add_lora(
            transformer,
            targets=settings.targets if settings.by_module is None else tuple(settings.by_module),
            rank=settings.rank,
            alpha=settings.alpha,
            dropout=settings.dropout,
            init=settings.init,
            dtype=settings.dtype,
        )

    def modules(self, transformer: nn.Module) -> dict[str, nn.Module]:
        return lora_layers(transformer)

    def set_enabled(self, transformer: nn.Module, enabled: bool) -> None:
        for layer in lora_layers(transformer).values():
            layer.enable_adapters(enabled)

    def read(self, module: Any, *, share_dropout: bool) -> Wrapped | None:
        if (type(module).__module__, type(module).__name__) not in _PEFT_LINEARS:
            return None
        return Wrapped(module.base_layer, _read_peft(module, share_dropout))

    def check(self, transformer: nn.Module, settings: AdapterSettings) -> dict[str, int]:
        ranks = super().check(transformer, settings)
        check_init(transformer, list(ranks), settings.init, settings.rank)
        return ranks

    def add_from(
        self, transformer: nn.Module, file: AdapterFile, settings: AdapterSettings
    ) -> None:
        assert isinstance(file, LoraFile)
        load_lora(transformer, file, dropout=settings.dropout, dtype=settings.dtype)

    def state(self, transformer: nn.Module) -> dict[str, Tensor]:
        return adapter_state(transformer)

    def load_state(self, transformer: nn.Module, state: Mapping[str, Tensor]) -> None:
        load_adapter_state(transformer, state)

    def from_state(self, path: Path, state: Mapping[str, Tensor]) -> LoraFile:
        factors = {key: tensor for key, tensor in state.items() if key.endswith(".weight")}
        targets = [
            key.removesuffix(".lora_A.weight") for key in factors if key.endswith(".lora_A.weight")
        ]
        return LoraFile.of(
            path,
            factors,
            ranks={name: len(factors[f"{name}.lora_A.weight"]) for name in targets},
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


def _read_peft(module: Any, share_dropout: bool) -> tuple[Adapter, ...] | str:
    """The active adapters of one of PEFT's linears, or why only PEFT can compute what they add."""
    if module.merged and module.disable_adapters:
        return "only PEFT can take its merged adapter out of the base again"
    if module.merged or module.disable_adapters:
        return ()
    adapters: list[Adapter] = []
    # from the dicts that hold them, since blocks ask for each linear in each step, and a module
    # looks for an attribute elsewhere first
    parts: Any = module._modules
    for name in module.active_adapters:
        if (a := parts["lora_A"]._modules.get(name)) is None:
            continue
        b, scale = parts["lora_B"]._modules[name], module.scaling[name]
        if (variant := module.lora_variant.get(name)) is not None:
            return f"adapter {name!r} is no plain LoRA but {type(variant).__name__}"
        if not (_is_plain(a) and _is_plain(b)) or own_parameter(b, "bias") is not None:
            return f"adapter {name!r} has a bias, hooks or layers of its own"
        if isinstance(scale, Tensor):
            return f"adapter {name!r} keeps its scale in a tensor, for hot-swapping"
        dropout = parts["lora_dropout"]._modules[name]
        p = dropout.p if isinstance(dropout, nn.Dropout) and module.training else 0.0
        if p > 0 and not share_dropout:
            return f"adapter {name!r} has a dropout"
        weights = own_parameter(a, "weight"), own_parameter(b, "weight")
        adapters.append(Lora(*weights, scale, p))
    return tuple(adapters)


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
) -> list[Parameter]:
    """Freezes `transformer` (a diffusers model) and puts a new LoRA on it.

    Returns the new parameters in order. `targets` is the name of a preset or a list of module names
    or their ends. `alpha` None means `rank`. `init`: `default` (A Kaiming-uniform, B zero),
    `gaussian` (A normal / rank, B zero), `olora` and `pissa` (from the base's weights, which must
    be floating point), `pissa_niter_<n>` (PiSSA by n steps of a randomised SVD: seconds, not
    minutes). Random numbers come from torch's global generator. `dtype` is that of the parameters.
    Raises ValueError, before anything is changed, for targets that match nothing, unknown inits and
    impossible ranks.
    """
    if rank < 1:
        raise ValueError(f"lora_rank must be at least 1, got {rank}")
    from_base = check_init(transformer, find_targets(transformer, targets), init, rank)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=list(preset_targets(targets) if isinstance(targets, str) else targets),
        # olora and pissa change the base, which `init_from_base` does below; a config with their
        # names would have it done again to the base of whoever loads the file
        init_lora_weights="gaussian" if init == "gaussian" else True,
    )
    return _inject(transformer, config, adapter_name, dtype, init if from_base else None)


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
    LoraKind().check_fits(transformer, lora)
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
    )
    parameters = _inject(transformer, config, adapter_name, dtype)
    with torch.no_grad():
        for name, layer in lora_layers(transformer, adapter_name).items():
            for key, factor in factors_of(layer, adapter_name).items():
                factor.copy_(lora.state[f"{name}.{key}"])
    return parameters


def _exactly(name: str) -> str:
    return name.replace(".", r"\.")


def _inject(
    transformer: Any,
    config: LoraConfig,
    adapter_name: str,
    dtype: torch.dtype,
    from_base: str | None = None,
) -> list[Parameter]:
    """Adds the adapter that `config` describes, with parameters in `dtype`; returns them."""
    # PEFT asks each linear for its weight some twenty times
    with shapes_only():
        transformer.add_adapter(config, adapter_name)
    layers = lora_layers(transformer, adapter_name).values()
    for layer in layers:
        if from_base is not None:
            init_from_base(layer, adapter_name, from_base, dtype)
        layer.lora_A[adapter_name].to(dtype)
        layer.lora_B[adapter_name].to(dtype)
    # PEFT's new modules start in training mode, whatever mode the model is in
    transformer.train(transformer.training)
    return [factor for layer in layers for factor in factors_of(layer, adapter_name).values()]
