"""What a run's config asks of this machine, as `fluxfast.doctor` checks it, and what the config may
not ask after that.
"""

from __future__ import annotations

import torch
from rich.console import Console

from fluxfast.config.run import TrainConfig
from fluxfast.config.settings import ConfigError
from fluxfast.doctor import startup
from fluxfast.doctor.scope import PLAIN, Scope, sizes_for
from fluxfast.model.transformer import compute_dtype
from fluxfast.ops import verdicts
from fluxfast.quant.rules import PRECISIONS
from fluxfast.train.compute import compute_for


def scope_of(config: TrainConfig, device: torch.device, *, interpreted: bool = False) -> Scope:
    """The formats and modes that a run of this config uses on the device.

    Raises ValueError where the device has no tensor cores for what was asked for.
    """
    format = PRECISIONS[config.base_model_precision]
    computes = [compute_for(config.compute_precision, {format} if format else set(), device)[0]]
    if config.compute_precision == "auto" and computes != ["same"]:
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
        fused_adamw=config.optimizer_kind.has_kernel,
        routes=config.tread_config is not None,
        graphs=bool(config.cuda_graphs) and device.type == "cuda",
        streams=config.enable_group_offload or config.vram_budget is not None,
        modulation_ahead=config.modulation_ahead is not False and device.type == "cuda",
        interpreted=interpreted,
        sizes=sizes_for(device, short=False, interpreted=interpreted),
    )


def settle(config: TrainConfig, device: torch.device, console: Console) -> None:
    """Check what nobody has checked here yet, and have `auto` pass over what failed.

    Raises ConfigError naming the options that ask for something which failed.
    """

    def say(text: str) -> None:
        console.print(f"· {text}", highlight=False, markup=False, soft_wrap=True)

    with verdicts.ignored():
        scope = scope_of(config, device)
    startup.settle(scope, say)
    problems = []
    try:
        compute_for(config.compute_precision, set(), device)
    except ValueError as error:
        problems.append(str(error))
    for asked, option, what in (
        (config.cuda_graphs is True, "cuda_graphs", verdicts.GRAPHS),
        (config.enable_group_offload, "enable_group_offload", verdicts.STREAMING),
    ):
        if asked and (verdict := verdicts.failed(what, verdicts.ONLY_WAY)) is not None:
            problems.append(f'"{option}" is true, but {verdict}: set it to false')
    if problems:
        raise ConfigError(problems)
