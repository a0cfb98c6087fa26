"""Whether a run computes modulation ahead, on the CPU: before the base is loaded, and once its
adapters are there.

`auto` has it on a GPU unless the LoRA trains it, for the memory; and takes it back where the CPU
would take longer for it than a step, while the GPU has room for the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from rich.console import Console

from fluxfast.adapters.presets import is_target, preset_targets
from fluxfast.config.run import TrainConfig
from fluxfast.config.settings import ConfigError
from fluxfast.memory.plan import account, predict
from fluxfast.model.modulation import why_not
from fluxfast.model.transformer import FluxTransformer
from fluxfast.train.budget import (
    Batch,
    compute_of,
    gpu_of,
    stated_choices,
    usable_bytes,
    workload_of,
)


def keeps_on_host(
    config: TrainConfig, linears: Sequence[str], device: torch.device, console: Console
) -> bool:
    """Whether these linears, modulation's by their full names, are to stay in host memory.

    Raises ConfigError where they are told to, and the LoRA's targets name one.
    """
    if config.modulation_ahead is False or (
        config.modulation_ahead == "auto" and device.type == "cpu"
    ):
        # on a CPU there is neither memory nor time to be won
        return False
    if config.init_lora:
        # its file says what it targets: `settle` looks
        return True
    targets = config.peft_lora_target_modules or preset_targets(config.flux_lora_target)
    for name in linears:
        if is_target(name, targets):
            _refuse(config, f"the LoRA trains it ({name})", console)
            return False
    return True


def settle(
    config: TrainConfig,
    transformer: FluxTransformer,
    sizes: Iterable[tuple[int, int]],
    console: Console,
) -> None:
    """Turn modulation ahead off where an adapter that has come from a file sits on it, or where the
    CPU would hold the GPU up and nobody has asked for it; say where its weights are. sizes: (width,
    height) of the images.
    """
    if transformer.modulation is None:
        return
    if (reason := why_not(transformer)) is not None:
        _refuse(config, reason, console)
        transformer.set_modulation_ahead(False)
        return
    if (
        config.modulation_ahead == "auto"
        and (late := _late(config, transformer, sizes)) is not None
    ):
        _refuse(config, late, console)
        transformer.set_modulation_ahead(False)
        return
    size = transformer.modulation.nbytes / 2**30
    console.print(
        f"modulation is computed a step ahead on the CPU: its {size:.2f} GiB stay in host memory",
        highlight=False,
    )


def _late(
    config: TrainConfig, transformer: FluxTransformer, sizes: Iterable[tuple[int, int]]
) -> str | None:
    """Why the GPU would wait for modulation, where it has room to compute it itself; None where it
    wouldn't, or has none.

    What the CPU takes is measured, what a step takes is predicted. A budget, or streamed blocks,
    want the weights on the host.
    """
    if (
        transformer.device.type != "cuda"
        or config.vram_budget is not None
        or config.enable_group_offload
    ):
        return None
    gpu = gpu_of(transformer.device)
    smallest, largest = (pick(sizes, key=lambda size: size[0] * size[1]) for pick in (min, max))
    workload = workload_of(
        config, Batch(largest, config.train_batch_size, "the largest"), compute_of(config, gpu)
    )
    in_place = replace(stated_choices(config, workload), modulation_ahead=False)
    if account(workload, in_place).needed > usable_bytes(gpu.memory):
        return None
    shortest = workload_of(
        config, Batch(smallest, config.train_batch_size, "the smallest"), workload.compute
    )
    step = predict(shortest, stated_choices(config, shortest), gpu).total
    assert transformer.modulation is not None
    host = transformer.modulation.seconds(
        config.train_batch_size, transformer.device, config.weight_dtype
    )
    if host <= step:
        return None
    return (
        f"the CPU takes {host * 1000:.0f} ms for it, a step's computing should take "
        f"{step * 1000:.0f}"
    )


def _refuse(config: TrainConfig, reason: str, console: Console) -> None:
    if config.modulation_ahead != "auto":
        raise ConfigError(
            [
                f'"modulation_ahead" is true, but modulation is not constant: {reason}; set it '
                'to "auto"'
            ]
        )
    console.print(
        f"modulation is computed on the device, step by step: {reason}",
        highlight=False,
        markup=False,
    )
