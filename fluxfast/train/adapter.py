"""The run's adapter: made as the config says, or as the file has it that the run goes on from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import Parameter

from fluxfast.adapters.kind import (
    AdapterFile,
    AdapterKind,
    AdapterSettings,
    Originals,
    Size,
    check_same_tensors,
    trainable_parameters,
)
from fluxfast.adapters.kinds import KINDS
from fluxfast.adapters.lora import lora_layers
from fluxfast.adapters.lora_read import read_lora
from fluxfast.adapters.lora_state import trained_in, trained_of
from fluxfast.adapters.lycoris import counted, described
from fluxfast.adapters.lycoris_targets import match_lycoris
from fluxfast.adapters.presets import find_targets
from fluxfast.config.run import TrainConfig
from fluxfast.train.events import say
from fluxfast.train.objective import step_seed
from fluxfast.train.state import SavedRun

# the options about the adapter that a file, where the run goes on from one, decides in the config's
# place
ADAPTER_KEYS = (
    "lora_rank", "lora_alpha", "use_dora", "flux_lora_target", "peft_lora_target_modules",
    "lycoris_config",
)  # fmt: skip


def kind_of(config: TrainConfig) -> AdapterKind:
    """The kind of the run's adapter."""
    return KINDS[config.adapter_kind]


def settings_of(config: TrainConfig, originals: Originals | None = None) -> AdapterSettings:
    """What the config says about the adapter. originals: `base_model.originals_of` its base."""
    return AdapterSettings(
        targets=config.peft_lora_target_modules or config.flux_lora_target,
        rank=config.lora_rank,
        alpha=config.alpha,
        dropout=config.lora_dropout,
        init=config.lora_init_type,
        dtype=config.adapter_dtype,
        by_module=None if config.lycoris_config is None else config.lycoris_config.modules,
        lycoris=config.lycoris_config,
        lokr_norm=config.init_lokr_norm,
        loftq_iterations=config.loftq_iterations,
        originals=originals,
    )


def init_lora_of(config: TrainConfig, saved: SavedRun | None) -> dict[str, Any] | None:
    """Which file the run's adapter had its first values from, and what the config said then.

    Returns {"file": init_lora, "asked": the config's options about the adapter}, or None for an
    adapter that was made as the config says. A checkpoint knows this of its run; one of version 1
    doesn't, and is taken to be of a run with the config's own init_lora.
    """
    if saved is not None and "init_lora" in saved.state:
        return saved.state["init_lora"]
    return {"file": config.init_lora, "asked": _asked(config)} if config.init_lora else None


def read_init_lora(config: TrainConfig, saved: SavedRun | None) -> AdapterFile | None:
    """The adapter whose modules, ranks and alphas the run's takes; None where the config says them.

    For a run that is resumed it is the checkpoint's own, so that the file that the run began with
    need not be there any more. Raises the errors of the kind's `read_file`.
    """
    if init_lora_of(config, saved) is None:
        return None
    if saved is not None:
        return saved_adapter(config, saved)
    return kind_of(config).read_file(config.init_lora or "")


def saved_config(config: TrainConfig, saved: SavedRun) -> TrainConfig:
    """The config with the `model_type` and `lora_type` of a checkpoint.

    What a checkpoint of an earlier version doesn't say is taken to be the config's `lora_type`, and
    a LoRA: nothing else was trained then.
    """
    settings = saved.state.get("settings", {})
    types = {
        "model_type": settings.get("model_type", "lora"),
        "lora_type": settings.get("lora_type", config.lora_type),
    }
    return config.model_copy(update=types)


def saved_adapter(config: TrainConfig, saved: SavedRun) -> AdapterFile:
    """A checkpoint's adapter in the form that a file is read in."""
    return kind_of(saved_config(config, saved)).from_state(saved.path, saved.adapter)


def saved_kind(config: TrainConfig, saved: SavedRun) -> AdapterKind:
    """The kind of a checkpoint's adapter."""
    of_type = saved_config(config, saved)
    return kind_of(config_of(of_type, saved_adapter(config, saved)))


def config_of(config: TrainConfig, file: AdapterFile | None) -> TrainConfig:
    """The config with the file's rank, alpha and modules in the place of its own."""
    if file is None:
        return config
    if config.lycoris_config is not None:
        return config.model_copy(
            update={"lycoris_config": config.lycoris_config.of_modules(file.sizes)}
        )
    decided = {option: file.common(option) for option in file.decides}
    decided["peft_lora_target_modules"] = tuple(file.targets)
    return config.model_copy(update=decided)


def differences(
    config: TrainConfig, file: AdapterFile, transformer: nn.Module
) -> dict[str, tuple[str, str]]:
    """Where config and file differ about the adapter: (the config's, the file's) by option."""
    if config.lycoris_config is not None:
        return _lycoris_differences(config, file, transformer)
    asked = _asked(config)
    found = {
        option: (_several([asked[option]]), _several(values.values()))
        for option, values in file.decides.items()
        if set(values.values()) != {asked[option]}
    }
    try:
        modules = find_targets(transformer, settings_of(config).targets)
    except ValueError:
        modules = []
    if set(modules) != set(file.targets):
        listed = config.peft_lora_target_modules
        option = "flux_lora_target" if listed is None else "peft_lora_target_modules"
        targets = config.flux_lora_target if listed is None else ", ".join(listed)
        found[option] = f"{targets} ({len(modules)} modules)", _modules(file.targets, modules)
    return found


def _lycoris_differences(
    config: TrainConfig, file: AdapterFile, transformer: nn.Module
) -> dict[str, tuple[str, str]]:
    """`differences` of a LyCORIS run: of linears, algorithms, and the shapes of what trains."""
    try:
        asked = kind_of(config).check(transformer, settings_of(config))
    except ValueError:
        asked = {}
    if asked.keys() != set(file.targets):
        modules = f"for {len(asked)} modules", _modules(file.targets, list(asked))
        return {"lycoris_config": modules}
    for name, options in file.sizes.items():
        linear: Any = transformer.get_submodule(name)
        shape = linear.out_features, linear.in_features
        texts = described(*shape, asked[name]), described(*shape, options)
        if texts[0] != texts[1]:
            return {"lycoris_config": (f"{texts[0]} on {name}", texts[1])}
    return {}


def told_beside_init_lora(
    config: TrainConfig, file: AdapterFile, transformer: nn.Module
) -> list[str]:
    """Lines about the file that a run began with, and the options that have no effect beside it."""
    label = kind_of(config_of(config, file)).label
    if config.lycoris_config is not None:
        decided = [counted(file.sizes)]
    else:
        decided = [
            f"{option.removeprefix('lora_')} {_several(values.values())}"
            for option, values in file.decides.items()
            if option != "use_dora"
        ]
    told = ", ".join([str(file.path), *decided, f"{len(file.targets)} modules"])
    lines = [f"{label}: {told}", *file.notes]
    for option, (asked, true) in differences(config, file, transformer).items():
        if option in config.model_fields_set or config.lycoris_config is not None:
            lines.append(
                f'"{option}" is {asked}: no effect, the {label} that the run began with '
                f'("init_lora") has {true}'
            )
    if config.lora_init_type != "default":
        lines.append(f'"lora_init_type" is {config.lora_init_type}: no effect beside "init_lora"')
    return lines


def not_resumable(config: TrainConfig, saved: SavedRun, transformer: nn.Module) -> list[str]:
    """Where the config and a checkpoint differ about the adapter: a line for each option.

    A run that began with init_lora may say again what it said then, or what is true of its adapter.
    """
    then = saved_config(config, saved)
    if then.model_type != config.model_type:
        return [f"model_type {then.model_type}, this run has {config.model_type}"]
    if then.lora_type != config.lora_type:
        label = saved_kind(config, saved).label
        return [f"a {label} adapter, this run has {kind_of(config).label}"]
    if config.trains_all:
        return []
    origin = init_lora_of(config, saved)
    asked = _asked(config)
    return [
        f"{option} {true}, this run has {now}"
        for option, (now, true) in differences(
            config, saved_adapter(config, saved), transformer
        ).items()
        # what a file of an earlier version doesn't say was not an option then
        if origin is None or asked[option] != origin["asked"].get(option, False)
    ]


def told_of_targets(config: TrainConfig, transformer: nn.Module) -> list[str]:
    """Lines about the linears that a `lycoris_config` names; ValueError where it names none."""
    if config.lycoris_config is None:
        return []
    found = match_lycoris(transformer, config.lycoris_config)
    lines = [f"LyCORIS: {counted(found.modules)} modules"]
    if found.unmatched:
        lines.append(f"lycoris_config: targets that match nothing: {', '.join(found.unmatched)}")
    return lines


def adapter_metadata(config: TrainConfig) -> dict[str, str]:
    """What a run's file says of how its adapter was made."""
    if config.lycoris_config is None:
        return {}
    return {"lycoris_config": json.dumps(config.lycoris_config.given, sort_keys=True)}


def adapter_elements(config: TrainConfig, transformer: nn.Module, sizes: dict[str, Size]) -> int:
    """How many numbers an adapter on these modules, by their sizes, trains."""
    return kind_of(config).trained_elements(transformer, sizes)


def add_adapter(
    config: TrainConfig,
    transformer: nn.Module,
    file: AdapterFile | None,
    *,
    seed: int,
    saved: Mapping[str, Tensor] | None,
    originals: Originals | None,
    console: Console,
) -> list[Parameter]:
    """Puts the adapter to train on the transformer: a file's, or else a new one.

    Returns its parameters. saved: a checkpoint's adapter, whose values they get. originals: the
    weights of the base before it was quantised, if they are at hand.
    """
    kind, settings = kind_of(config), settings_of(config, originals)
    if saved is not None:
        # a checkpoint brings what an initialiser took from the base
        settings = replace(settings, init="default")
    lines = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step_seed(seed, 0, 0, "adapter"))
        if file is not None:
            kind.add_from(transformer, file, settings)
        else:
            lines = kind.add(transformer, settings)
    if saved is not None:
        kind.load_state(transformer, saved, originals)
    for line in lines or ():
        say(console, line)
    return list(trainable_parameters(transformer).values())


def _asked(config: TrainConfig) -> dict[str, Any]:
    """The config's options about the adapter, as JSON."""
    return {**config.model_dump(mode="json", include=set(ADAPTER_KEYS)), "lora_alpha": config.alpha}


def _several(values: Iterable[float]) -> str:
    """One number, or the range of several; a switch as JSON has it."""
    low, high = min(values := list(values)), max(values)
    if isinstance(low, bool):
        return str(high).lower()
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _modules(true: list[str], asked: list[str]) -> str:
    differing = sorted(set(true) ^ set(asked))
    return f"{len(true)} modules (the first that only one of them has: {differing[0]})"


def values_of_average(transformer: nn.Module, path: str) -> dict[str, Tensor]:
    """The values of a LoRA's file, by the names of the trained parameters that they are for.

    Raises the errors of `read_lora`, and ValueError where the LoRA on the model has other modules
    or ranks.
    """
    state = read_lora(path).state
    named = {p: name for name, p in trainable_parameters(transformer).items()}
    own = {
        f"{module}.{key}": p
        for module, layer in lora_layers(transformer).items()
        for key, p in trained_of(layer).items()
    }
    try:
        check_same_tensors(own, trained_in(state))
    except ValueError as error:
        raise ValueError(f'"init_lora_ema" {path}: {error}') from error
    return {named[p]: state[key] for key, p in own.items()}
