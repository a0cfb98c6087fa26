"""From the config to a run's parts: the model, ready to train, and what streams it and draws."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from rich.console import Console
from torch import Tensor

from fluxfast.adapters.kind import AdapterFile
from fluxfast.config.run import TrainConfig
from fluxfast.data.model_folders import local_folder
from fluxfast.memory.choices import Facts
from fluxfast.memory.stream import BlockStream, stream_blocks
from fluxfast.memory.wishes import Wishes, wishes_of
from fluxfast.model.apply import Choices, make_ready
from fluxfast.model.compiled import cache_in
from fluxfast.model.transformer import FluxTransformer
from fluxfast.train import choose
from fluxfast.train.adapter import add_adapter
from fluxfast.train.assistant import activate, add_assistant
from fluxfast.train.base_model import load_transformer, open_base, originals_of
from fluxfast.train.build_data import RunData
from fluxfast.train.build_validator import build_validator
from fluxfast.train.compiling import CompileProgress
from fluxfast.train.events import say
from fluxfast.train.validation import Validator


@dataclass
class Parts:
    """The model, ready to train, and what depends on it.

    Attributes:
        choices: how the model computes. facts: what they were chosen from.
        stream: who streams its blocks; None: they are resident.
        scheduler: the pipeline's.
        validator: None where validation is off or has no prompt.
        compiling: tells how torch.compile goes; None: nothing is compiled.
    """

    transformer: FluxTransformer
    choices: Choices
    facts: Facts
    stream: BlockStream | None
    scheduler: FlowMatchEulerDiscreteScheduler
    validator: Validator | None
    compiling: CompileProgress | None = None

    @property
    def trains_all(self) -> bool:
        """Whether the transformer itself trains, and no adapter on it."""
        return self.facts.workload is not None and self.facts.workload.trains_all

    @property
    def shift_bounds(self) -> dict[str, Any]:
        """`flow.auto_shift`'s keyword arguments."""
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        return {name: self.scheduler.config[name] for name in names}


def load_parts(
    config: TrainConfig,
    lora: AdapterFile | None,
    data: RunData,
    seed: int,
    device: torch.device,
    console: Console,
    *,
    saved: Mapping[str, Tensor] | None,
) -> Parts:
    """Load the transformer, give it its adapter, and get it ready to train and to validate.

    lora: the file that says what the adapter is like, if the config doesn't. saved: a checkpoint's
    adapter, which takes the place of a new one. What the run chooses by itself is
    chosen before anything is loaded, and once more when the model is there to be looked at.
    """
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(
        local_folder(config.base_source._replace(subfolder="scheduler"))
    )
    base, wishes = open_base(config), wishes_of(config)
    facts = choose.facts_before_loading(
        config, base, data.batch_shapes, device, encoded_pixels=data.encoded_pixels
    )
    choices = choose.choose(wishes, facts)
    choose.tell_budget(choices, wishes, facts, console)
    transformer = load_transformer(config, base, choices, device, console)
    if config.tread_config:
        transformer.set_routes([route.model_dump() for route in config.tread_config.routes])
    originals = originals_of(config, base, device)
    add_assistant(config, transformer, console)
    add_adapter(
        config, transformer, lora, seed=seed, saved=saved, originals=originals, console=console
    )
    activate(transformer)
    transformer.autocast_dtype = config.autocast_dtype
    facts = choose.facts_of_model(facts, config, transformer)
    choices = choose.choose(wishes, facts)
    make_ready(transformer, choices)
    if choices.deterministic:
        use_deterministic_algorithms()
    choose.tell(choices, wishes, facts, transformer, console)
    stream = _stream(config, choices, transformer, device, console)
    if choices.graphs:
        transformer.set_cuda_graphs(
            True, optional=wishes.cuda_graphs == "auto", say=partial(say, console)
        )
    return Parts(
        transformer,
        choices,
        facts,
        stream,
        scheduler,
        build_validator(config, wishes, data.config, data.prepared, seed, transformer, scheduler),
        _compiling(config, wishes, console),
    )


def _compiling(config: TrainConfig, wishes: Wishes, console: Console) -> CompileProgress | None:
    """Who tells of torch.compile, once its results have a folder; None where nobody compiles."""
    if wishes.compile is None and wishes.draws_compiled is None:
        return None
    return CompileProgress(partial(say, console), str(cache_in(config.cache_dir / "compiled")))


def use_deterministic_algorithms() -> None:
    """Have PyTorch compute the same bits each time on a GPU; our own kernels always do."""
    # cuBLAS, where it computes on several streams; read when its first handle is made
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # it is no matter of ours, and a pass over all memory that is taken
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _stream(
    config: TrainConfig,
    choices: Choices,
    transformer: FluxTransformer,
    device: torch.device,
    console: Console,
) -> BlockStream | None:
    """Stream the blocks of a transformer that has its adapters, and say so, if that was chosen."""
    if not choices.streams:
        return None
    if choices.use_stream and device.type != "cuda":
        say(console, '"group_offload_use_stream" has no effect: there is no CUDA device')
    if device.type == "cuda" and not choices.use_stream:
        say(
            console,
            'the step waits for each copy of weights: "group_offload_use_stream": true copies '
            "beside the computation",
        )
    folder = config.group_offload_to_disk_path
    disk_path = Path(folder).expanduser() if folder else None
    stream = stream_blocks(
        transformer,
        device,
        slots=choices.slots,
        blocks_per_group=choices.blocks_per_group,
        use_stream=choices.use_stream,
        disk_path=disk_path,
        inputs_on_host=choices.host_inputs,
    )
    where = "in host memory" if disk_path is None else f"in {disk_path}"
    say(
        console,
        f"blocks are streamed: {stream.block_bytes / 2**30:.2f} GiB {where}, "
        f"{stream.ring_bytes / 2**30:.2f} GiB on the device (a ring of {stream.schedule.slots})",
    )
    if stream.shortfall:
        say(console, stream.shortfall)
    return stream
