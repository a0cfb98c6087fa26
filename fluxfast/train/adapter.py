"""The run's LoRA: made as the config says, or as the file that it goes on from has it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.nn import Parameter

from fluxfast.adapters.formats import LoraFile, load_lora, read_lora
from fluxfast.adapters.lora import add_lora
from fluxfast.adapters.presets import FUSED_PROJECTIONS, match_targets, preset_targets
from fluxfast.config.run import TrainConfig
from fluxfast.train.objective import step_seed
from fluxfast.train.state import SavedRun

# what a config says about the adapter, and a file that the run goes on from knows better
ADAPTER_KEYS = ("lora_rank", "lora_alpha", "flux_lora_target", "peft_lora_target_modules")


def init_lora_of(config: TrainConfig, saved: SavedRun | None) -> dict[str, Any] | None:
    """Where the run's adapter had its first values from: {"file": init_lora, "asked": what the
    config said of the adapter}.

    None for an adapter that was made as the config says. A checkpoint knows it of its run; one of
    version 1 doesn't, and is taken to be of a run with the config's own init_lora.
    """
    if saved is not None and "init_lora" in saved.state:
        return saved.state["init_lora"]
    return {"file": config.init_lora, "asked": _asked(config)} if config.init_lora else None


def read_init_lora(config: TrainConfig, saved: SavedRun | None) -> LoraFile | None:
    """The LoRA whose modules, ranks and alphas the run's adapter takes; None where the config says
    them.

    Of a run that is resumed it is the checkpoint's own, so that the file it began with need not be
    there any more. Raises `read_lora`'s errors.
    """
    if init_lora_of(config, saved) is None:
        return None
    return read_lora(config.init_lora or "") if saved is None else saved_lora(saved)


def saved_lora(saved: SavedRun) -> LoraFile:
    """A checkpoint's adapter as a LoRA that was read."""
    weights = {key: tensor for key, tensor in saved.adapter.items() if key.endswith(".weight")}
    ranks = {
        key.removesuffix(".lora_A.weight"): len(a)
        for key, a in weights.items()
        if key.endswith(".lora_A.weight")
    }
    alphas = {name: float(saved.adapter[f"{name}.alpha"]) for name in ranks}
    return LoraFile(saved.path, weights, ranks, alphas, {})


def config_of(config: TrainConfig, lora: LoraFile | None) -> TrainConfig:
    """The config with the file's rank, alpha and modules in the place of what it said, for whatever
    reckons with them.
    """
    if lora is None:
        return config
    true = {
        "lora_rank": lora.rank,
        "lora_alpha": lora.alpha,
        "peft_lora_target_modules": tuple(lora.targets),
    }
    return config.model_copy(update=true)


def differences(
    config: TrainConfig, lora: LoraFile, transformer: nn.Module
) -> dict[str, tuple[str, str]]:
    """What the config says of the adapter, and what the LoRA has instead: (both, as text) by the
    config's key.
    """
    found = {}
    if set(lora.ranks.values()) != {config.lora_rank}:
        found["lora_rank"] = (str(config.lora_rank), _several(lora.ranks.values()))
    if set(lora.alphas.values()) != {config.alpha}:
        found["lora_alpha"] = (f"{config.alpha:g}", _several(lora.alphas.values()))
    key = (
        "flux_lora_target"
        if config.peft_lora_target_modules is None
        else "peft_lora_target_modules"
    )
    try:
        modules = targeted(config, transformer)
    except ValueError:
        modules = []
    if set(modules) != set(lora.targets):
        asked = (
            config.flux_lora_target
            if key == "flux_lora_target"
            else ", ".join(config.peft_lora_target_modules or ())
        )
        found[key] = (f"{asked} ({len(modules)} modules)", _modules(lora.targets, modules))
    return found


def targeted(config: TrainConfig, transformer: nn.Module) -> list[str]:
    """The modules that the config has a LoRA sit on. ValueError names targets that match none."""
    if config.peft_lora_target_modules is not None:
        return match_targets(transformer, config.peft_lora_target_modules)
    return match_targets(
        transformer, preset_targets(config.flux_lora_target), optional=FUSED_PROJECTIONS
    )


def told_beside_init_lora(config: TrainConfig, lora: LoraFile, transformer: nn.Module) -> list[str]:
    """Lines on a LoRA that a run began with: what it is, and which of the config's own words don't
    hold beside it.
    """
    ranks, alphas = _several(lora.ranks.values()), _several(lora.alphas.values())
    lines = [
        f"LoRA: {lora.path}, rank {ranks}, alpha {alphas}, {len(lora.targets)} modules",
        *lora.notes,
    ]
    for key, (asked, true) in differences(config, lora, transformer).items():
        if key in config.model_fields_set:
            lines.append(
                f'"{key}" is {asked}: no effect, the LoRA that the run began with ("init_lora") '
                f"has {true}"
            )
    if config.lora_init_type != "default":
        lines.append(f'"lora_init_type" is {config.lora_init_type}: no effect beside "init_lora"')
    return lines


def not_resumable(config: TrainConfig, saved: SavedRun, transformer: nn.Module) -> list[str]:
    """What the config says of the adapter, and the checkpoint's isn't: what it was and is, for
    each.

    A run that began with init_lora may be told what it was told then, or what is true of its
    adapter.
    """
    origin = init_lora_of(config, saved)
    asked = _asked(config)
    return [
        f"{key} {true}, this run has {now}"
        for key, (now, true) in differences(config, saved_lora(saved), transformer).items()
        if origin is None or asked[key] != origin["asked"][key]
    ]


def add_adapter(
    config: TrainConfig,
    transformer: nn.Module,
    lora: LoraFile | None,
    *,
    seed: int,
    resumed: bool,
    console: Console,
) -> list[Parameter]:
    """Give the transformer the LoRA to train: the one that was read, or else a new one; returns its
    parameters.

    resumed: a checkpoint's values will take the place of these.
    """
    dtype = config.adapter_dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step_seed(seed, 0, 0, "adapter"))
        if lora is not None:
            parameters = load_lora(transformer, lora, dtype=dtype, dropout=config.lora_dropout)
        else:
            parameters = add_lora(
                transformer,
                targets=config.peft_lora_target_modules or config.flux_lora_target,
                rank=config.lora_rank,
                alpha=config.alpha,
                dropout=config.lora_dropout,
                # a checkpoint brings what an initialiser took from the base
                init="default" if resumed else config.lora_init_type,
                dtype=dtype,
            )
    count = sum(p.numel() for p in parameters)
    console.print(
        f"training {count:,} parameters in {len(parameters)} tensors ({dtype})", highlight=False
    )
    return parameters


def _asked(config: TrainConfig) -> dict[str, Any]:
    """The config's words about the adapter, as JSON."""
    return {**config.model_dump(mode="json", include=set(ADAPTER_KEYS)), "lora_alpha": config.alpha}


def _several(values: Iterable[float]) -> str:
    """One number, or the range of several."""
    low, high = min(values := list(values)), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _modules(true: list[str], asked: list[str]) -> str:
    differing = sorted(set(true) ^ set(asked))
    return f"{len(true)} modules (the first that only one of them has: {differing[0]})"
