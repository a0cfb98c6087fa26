"""What a run's config asks of this machine, which `fluxfast.doctor` checks before the run."""

from __future__ import annotations

from functools import partial

import torch
from rich.console import Console

from fluxfast.config.run import TrainConfig
from fluxfast.config.settings import ConfigError
from fluxfast.doctor import startup
from fluxfast.doctor.scope import PLAIN, Scope, sizes_for
from fluxfast.memory import gpus
from fluxfast.memory.choices import choose_compute, refusals
from fluxfast.memory.wishes import wishes_of
from fluxfast.model.transformer import compute_dtype
from fluxfast.ops import verdicts
from fluxfast.quant.rules import PRECISIONS
from fluxfast.train.events import say


def scope_of(config: TrainConfig, device: torch.device, *, interpreted: bool = False) -> Scope:
    """The formats and modes that a run of this config uses on the device."""
    format = PRECISIONS[config.base_model_precision]
    wishes = wishes_of(config)
    computes = [choose_compute(wishes, format, gpus.this_gpu(device))[0]]
    if wishes.compute == "auto" and computes != ["same"]:
        # what `auto` takes where 8 bits fail
        computes.insert(0, "same")
    return Scope(
        device=str(device),
        dtype=str(compute_dtype(device, config.base_dtype)).removeprefix("torch."),
        formats=(format or PLAIN,),
        computes=tuple(computes),
        outliers=config.compute_outliers,
        rank=config.lora_rank,
        lora_scale=config.alpha / config.lora_rank,
        dropout=config.lora_dropout,
        adapter_dtype=str(config.adapter_dtype).removeprefix("torch."),
        updates=(config.optimizer_kernel,) if config.optimizer_kernel else (),
        routes=config.tread_config is not None,
        graphs=bool(config.cuda_graphs) and device.type == "cuda",
        streams=config.enable_group_offload or config.vram_budget is not None,
        modulation_ahead=config.modulation_ahead is not False and device.type == "cuda",
        interpreted=interpreted,
        sizes=sizes_for(device, short=False, interpreted=interpreted),
    )


def ensure_checked(config: TrainConfig, device: torch.device, console: Console) -> None:
    """Check what nobody has checked here yet, and have "auto" pass over what failed.

    Raises ConfigError naming the options that ask for something that failed.
    """
    with verdicts.ignored():
        scope = scope_of(config, device)
    startup.ensure_checked(scope, partial(say, console))
    if problems := refusals(wishes_of(config), gpus.this_gpu(device)):
        raise ConfigError(problems)
