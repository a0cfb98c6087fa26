"""From the config to what `fluxfast.memory.plan` reckons with: what a run is to compute, and what
it may choose itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from rich.console import Console

from fluxfast.adapters.presets import preset_targets
from fluxfast.config.datasets import ImageDataset
from fluxfast.config.run import TrainConfig
from fluxfast.config.settings import ConfigError
from fluxfast.data.buckets import target_size
from fluxfast.memory.gpus import Gpu, find_gpu
from fluxfast.memory.plan import CUDA_CONTEXT, GIB, Choices, Plan, account, fit
from fluxfast.memory.sizes import FluxSizes, Storage, Workload
from fluxfast.model.routing import keep_count, resolve_routes
from fluxfast.ops import verdicts
from fluxfast.quant.rules import PRECISIONS

# width / height of the images that a dataset without crops is taken to hold
ASPECTS = tuple(i / 20 for i in range(10, 41))
# of a GPU's memory, what its driver keeps for itself
DRIVER = 0.25
# the storage format that an 8-bit product runs on where one is asked for or chosen
FP8_FORMAT = "fp8_e4m3"
# groups of blocks on the device, where blocks stream and no budget says how many
DEFAULT_RING = 2


class Batch(NamedTuple):
    """The largest batch of a run: pixels (width, height), samples, and whose it is."""

    size: tuple[int, int]
    samples: int
    dataset: str

    @property
    def image_tokens(self) -> int:
        return (self.size[0] // 16) * (self.size[1] // 16)


class Ring(NamedTuple):
    """How blocks stream, where they do: groups of them on the device, and whether their inputs wait
    in host memory.
    """

    slots: int = DEFAULT_RING
    inputs_on_host: bool = False


def largest_batch(config: TrainConfig, datasets: Iterable[ImageDataset]) -> Batch:
    """The batch with the most tokens, by the datasets' settings; nothing on disk is looked at."""
    batches = [
        Batch(
            target_size(aspect, d.resolution, d.resolution_type),
            d.train_batch_size or config.train_batch_size,
            d.id,
        )
        for d in datasets
        for aspect in ([1.0] if d.crop and d.crop_aspect == "square" else ASPECTS)
    ]
    return max(batches, key=lambda batch: batch.image_tokens * batch.samples)


def workload_of(config: TrainConfig, batch: Batch, compute: str) -> Workload:
    """What a step of this config computes on this batch."""
    sizes = FluxSizes(guidance_embeds=config.flavour.takes_guidance)
    text = config.tokenizer_max_length
    image = [batch.image_tokens] * sizes.blocks
    routes = config.tread_config.routes if config.tread_config else ()
    for route in resolve_routes([route.model_dump() for route in routes], sizes.blocks):
        kept = keep_count(batch.image_tokens, route.ratio)
        image[route.first : route.last + 1] = [kept] * (route.last + 1 - route.first)
    targets = config.peft_lora_target_modules or preset_targets(config.flux_lora_target)
    return Workload(
        sizes=sizes,
        tokens=tuple(tokens + text for tokens in image),
        text_tokens=text,
        batch=batch.samples,
        storage=Storage(PRECISIONS[config.base_model_precision], config.base_dtype.itemsize),
        targets=tuple(targets),
        rank=config.lora_rank,
        adapter_itemsize=config.optimizer_kind.itemsize,
        optimizer=config.optimizer,
        compute=compute,
        lora_type=config.lora_type,
    )


def compute_of(config: TrainConfig, gpu: Gpu) -> str:
    """What the products will run in on that GPU, by the rules of `train.compute`."""
    format = PRECISIONS[config.base_model_precision]
    asked = config.compute_precision
    if asked != "auto":
        return "e4m3" if asked == "fp8" else asked
    if format is None:
        return "same"
    compute = "e4m3" if format == FP8_FORMAT else "int8"
    return (
        compute
        if gpu.rate(compute) and verdicts.failed(verdicts.COMPUTE, compute) is None
        else "same"
    )


def stated_choices(config: TrainConfig, workload: Workload) -> Choices:
    """What the config says about recomputation and streaming, without a budget."""
    blocks = workload.sizes.blocks
    if config.recompute is not None:
        # one for all in a config, one for each where a budget has chosen
        recompute = (
            [config.recompute] * blocks
            if isinstance(config.recompute, str)
            else list(config.recompute)
        )
    else:
        interval = config.gradient_checkpointing_interval or 1
        recompute = [
            "full" if config.gradient_checkpointing and i % interval == 0 else "none"
            for i in range(blocks)
        ]
    streams = config.enable_group_offload
    return Choices(
        tuple(recompute),
        slots=DEFAULT_RING if streams else 0,
        blocks_per_group=config.group_offload_blocks_per_group if streams else 1,
        modulation_ahead=config.modulation_ahead is not False and not workload.trains_modulation,
        host_inputs=_stated_ring(config).inputs_on_host,
    )


def _stated_ring(config: TrainConfig) -> Ring:
    # beside the computation, the inputs' way out and back costs nothing; in line with it, it would
    return Ring(inputs_on_host=config.enable_group_offload and config.group_offload_use_stream)


def usable_bytes(memory_gib: float) -> int:
    """Of a GPU of that size, what a process can have."""
    return round((memory_gib - DRIVER) * GIB)


def budget_bytes(config: TrainConfig, memory_gib: float) -> int:
    """What the config allows on a GPU of that size: all of it, unless vram_budget is a number."""
    if config.vram_budget in (None, "auto"):
        return usable_bytes(memory_gib)
    return round(float(config.vram_budget) * GIB)


def choose(config: TrainConfig, workload: Workload, gpu: Gpu, budget: int) -> tuple[Choices, Plan]:
    """The fastest choices within the budget, and their plan. Raises ConfigError where nothing fits,
    with what would help.
    """
    choices = fit(workload, gpu, budget)
    if choices is None:
        lines = why_not(workload, budget)
        if (verdict := verdicts.failed(verdicts.STREAMING, verdicts.ONLY_WAY)) is not None:
            lines.append(f"blocks are not streamed: {verdict}")
        raise ConfigError([f'"vram_budget": {text}' for text in lines])
    return choices, account(workload, choices)


def settle(
    config: TrainConfig, workload: Workload, gpu: Gpu, budget: int
) -> tuple[TrainConfig, Ring, str]:
    """The config with what the budget chooses in the place of what it said, the ring, and a line
    about it.
    """
    choices, plan = choose(config, workload, gpu, budget)
    update: dict[str, Any] = {
        "recompute": choices.recompute,
        "enable_group_offload": choices.streams,
    }
    if choices.streams:
        update |= {
            "group_offload_use_stream": True,
            "group_offload_blocks_per_group": choices.blocks_per_group,
        }
    counts = ", ".join(
        f"{n} in {choices.recompute.count(n)}"
        for n in ("none", "selective", "full")
        if n in choices.recompute
    )
    told = (
        f"vram_budget {budget / GIB:.2f} GiB: a step should take {plan.needed / GIB:.2f}; "
        f"recomputation of blocks: {counts}; "
        f"blocks {f'streamed through a ring of {choices.slots}' if choices.streams else 'resident'}"
        + (", their inputs in host memory" if choices.host_inputs else "")
    )
    ring = Ring(choices.slots, choices.host_inputs) if choices.streams else Ring()
    return config.model_copy(update=update), ring, told


def within_budget(
    config: TrainConfig, sizes: Iterable[tuple[int, int]], device: torch.device, console: Console
) -> tuple[TrainConfig, Ring]:
    """The config of a run on this device, with vram_budget's choices, and how blocks stream where
    they do.

    sizes: (width, height) of the images. Raises ConfigError where nothing fits.
    """
    if device.type != "cuda":
        if config.vram_budget is not None:
            console.print(
                '· "vram_budget" has no effect: there is no GPU', highlight=False, markup=False
            )
        return config, Ring()
    if config.vram_budget is None:
        return config, _stated_ring(config)
    gpu = gpu_of(device)
    largest = max(sizes, key=lambda size: size[0] * size[1])
    workload = workload_of(
        config, Batch(largest, config.train_batch_size, "the largest"), compute_of(config, gpu)
    )
    budget = budget_bytes(config, gpu.memory)
    if config.vram_budget == "auto":
        # by now the context is there, and so is what other programs have taken
        budget = torch.cuda.mem_get_info(device)[0] + CUDA_CONTEXT
    settled, ring, told = settle(config, workload, gpu, budget)
    console.print(f"· {told}", highlight=False, markup=False, soft_wrap=True)
    return settled, ring


def why_not(workload: Workload, budget: int) -> list[str]:
    """Lines on what a step takes at the very least, and which settings would make it fit."""
    blocks = workload.sizes.blocks
    ahead = not workload.trains_modulation
    least = Choices(
        ("full",) * blocks, slots=DEFAULT_RING, modulation_ahead=ahead, host_inputs=True
    )
    needed = account(workload, least).needed
    lines = [
        f"a step takes {needed / GIB:.2f} GiB at the least (blocks streamed, recomputed), there "
        f"are {budget / GIB:.2f}"
    ]
    smaller = {
        "a smaller train_batch_size": replace(workload, batch=1) if workload.batch > 1 else None,
        "int8-quanto as base_model_precision": _stored(workload, "int8"),
        "int4-quanto as base_model_precision": _stored(workload, "int4"),
        "half the tokens (a lower resolution)": replace(
            workload, tokens=tuple(t // 2 for t in workload.tokens)
        ),
        "lora_rank 4": replace(workload, rank=min(workload.rank, 4)),
    }
    for name, other in smaller.items():
        if other is not None and (size := account(other, least).needed) < needed:
            lines.append(f"with {name} it takes {size / GIB:.2f} GiB")
    return lines


def _stored(workload: Workload, format: str) -> Workload:
    return replace(workload, storage=replace(workload.storage, format=format))


def gpu_of(device: torch.device) -> Gpu:
    """The table's entry of a device; where it has none, an RTX 3090's rates, which only order the
    choices.
    """
    properties = torch.cuda.get_device_properties(device)
    try:
        gpu = find_gpu(properties.name)
    except ValueError:
        gpu = find_gpu("RTX 3090")._replace(name=properties.name)
    return gpu._replace(memory=properties.total_memory / GIB)
