"""Streamed blocks, as a config asks for them (SimpleTuner's `group_offload` options)."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from fluxfast.config.run import TrainConfig
from fluxfast.memory.stream import DEFAULT_SLOTS, BlockStream, stream_blocks
from fluxfast.model.transformer import FluxTransformer

# the parts of a transformer that are loaded into host memory if they are to be streamed
STREAMED_MODULES = ("transformer_blocks", "single_transformer_blocks")


def stream(
    config: TrainConfig,
    transformer: FluxTransformer,
    device: torch.device,
    console: Console,
    *,
    slots: int = DEFAULT_SLOTS,
    inputs_on_host: bool = False,
) -> BlockStream | None:
    """Stream the blocks of a transformer that has its adapters, and say so; None where the config
    doesn't ask for it.

    slots: groups of blocks on the device at a time. inputs_on_host: as `stream_blocks` takes it.
    """
    if not config.enable_group_offload:
        return None

    def say(text: str) -> None:
        console.print(f"· {text}", highlight=False, markup=False, soft_wrap=True)

    disk_path = (
        Path(config.group_offload_to_disk_path).expanduser()
        if config.group_offload_to_disk_path
        else None
    )
    on_cuda = device.type == "cuda"
    if config.group_offload_use_stream and not on_cuda:
        say('"group_offload_use_stream" has no effect: there is no CUDA device')
    if on_cuda and not config.group_offload_use_stream:
        say(
            'the step waits for each copy of weights: "group_offload_use_stream": true copies '
            "beside the computation"
        )
    made = stream_blocks(
        transformer,
        device,
        slots=slots,
        blocks_per_group=config.group_offload_blocks_per_group,
        use_stream=config.group_offload_use_stream,
        disk_path=disk_path,
        inputs_on_host=inputs_on_host,
    )
    where = "in host memory" if disk_path is None else f"in {disk_path}"
    say(
        f"blocks are streamed: {made.block_bytes / 2**30:.2f} GiB {where}, "
        f"{made.ring_bytes / 2**30:.2f} GiB on the device (a ring of {made.schedule.slots})"
    )
    if made.shortfall:
        say(made.shortfall)
    return made
