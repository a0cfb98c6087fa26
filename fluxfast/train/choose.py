"""What a run chooses by itself: the facts that it chooses from, and what it says of its choices.

`fluxfast.memory.choices.choose` makes the choices, for the run as for `fluxfast-train plan`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import psutil
import torch
from accelerate import init_empty_weights
from rich.console import Console

from fluxfast.adapters.kind import Size as AdapterSize
from fluxfast.adapters.presets import preset_targets
from fluxfast.checkpoint.transformer import Checkpoint
from fluxfast.config.conditioning import ConditioningDataset
from fluxfast.config.datasets import DataConfig, ImageDataset
from fluxfast.config.run import TrainConfig
from fluxfast.config.settings import ConfigError
from fluxfast.data.buckets import target_size
from fluxfast.memory import choices, full_training, gpus
from fluxfast.memory.budget import usable_bytes
from fluxfast.memory.choices import Facts, Refused
from fluxfast.memory.plan import CUDA_CONTEXT
from fluxfast.memory.rates import Rate
from fluxfast.memory.sizes import FluxSizes, Storage, Workload, vae_bytes
from fluxfast.memory.wishes import Wishes
from fluxfast.model import graphs, modulation
from fluxfast.model.apply import Choices
from fluxfast.model.routing import keep_count, resolve_routes
from fluxfast.model.transformer import FluxTransformer
from fluxfast.ops.device import usable_cores
from fluxfast.quant.rules import PRECISIONS
from fluxfast.train.adapter import kind_of, settings_of
from fluxfast.train.assistant import assistant_bytes
from fluxfast.train.base_model import stored_format
from fluxfast.train.events import say

# (width, height) in pixels
Size = tuple[int, int]

# width / height of the images that a dataset without crops is taken to hold
ASPECTS = tuple(i / 20 for i in range(10, 41))


class BatchShape(NamedTuple):
    """A batch: its images' size in pixels (width, height), their number, and their dataset.

    reference_tokens: of the reference images beside each image.
    """

    size: tuple[int, int]
    samples: int
    dataset: str
    reference_tokens: int = 0

    @property
    def image_tokens(self) -> int:
        return tokens_of(self.size)

    @property
    def tokens(self) -> int:
        """Of all images of all samples."""
        return (self.image_tokens + self.reference_tokens) * self.samples


def tokens_of(size: tuple[int, int]) -> int:
    """The tokens of an image of (width, height) pixels."""
    return (size[0] // 16) * (size[1] // 16)


def largest_batch(
    config: TrainConfig,
    datasets: Iterable[ImageDataset],
    data: DataConfig | None = None,
    seen: Mapping[str, Iterable[Size]] | None = None,
) -> BatchShape:
    """The batch with the most tokens.

    data: says which references the datasets have. seen: the sizes of images that datasets are known
    to have, by the datasets' ids; those of the others follow from their settings. Nothing on disk
    is looked at.
    """
    known = seen or {}
    batches = [
        batch_of(config, dataset, size, data)
        for dataset in datasets
        for size in known.get(dataset.id) or _sizes(dataset)
    ]
    return max(batches, key=lambda batch: batch.tokens)


def batch_of(
    config: TrainConfig, dataset: ImageDataset, size: Size, data: DataConfig | None = None
) -> BatchShape:
    """A dataset's batch of images of one size, with the most references that it may have."""
    return BatchShape(
        size,
        dataset.train_batch_size or config.train_batch_size,
        dataset.id,
        _reference_tokens(config, size, data.conditions(dataset.id) if data else ()),
    )


def _sizes(dataset: ImageDataset) -> list[Size]:
    """The sizes that a dataset's images may have, (width, height) in pixels."""
    aspects = [1.0] if dataset.crop and dataset.crop_aspect == "square" else ASPECTS
    return [target_size(a, dataset.resolution, dataset.resolution_type) for a in aspects]


def _reference_tokens(
    config: TrainConfig, size: tuple[int, int], conditions: Sequence[ConditioningDataset]
) -> int:
    """The most tokens that the references of an image of this size may have."""
    each = [
        tokens_of(size) if own.copies_crops else max(map(tokens_of, _sizes(own)))
        for own in conditions
        if not own.is_mask
    ]
    return sum(each) if config.combines_references else max(each, default=0)


def encoded_pixels(
    config: TrainConfig,
    datasets: Iterable[ImageDataset],
    seen: Mapping[str, Iterable[Size]] | None = None,
) -> int:
    """Pixels of the largest image that is encoded while the run trains.

    0 where every dataset is encoded before. seen: as in `largest_batch`.
    """
    on_demand = [dataset for dataset in datasets if dataset.encodes_on_demand]
    sizes = [largest_batch(config, [dataset], seen=seen).size for dataset in on_demand]
    return max((width * height for width, height in sizes), default=0)


def workload_of(
    config: TrainConfig,
    batch: BatchShape,
    base: Checkpoint | None = None,
    *,
    encoded_pixels: int = 0,
    assistant: int = 0,
) -> Workload:
    """What a step of this config computes on this batch.

    base: the transformer's checkpoint, opened. Without one, sizes are those of the flavour and the
    format of the weights is the config's. encoded_pixels: of the largest image that the VAE encodes
    beside the steps; 0: none. assistant: bytes of the assistant LoRA.
    """
    if base is None:
        sizes = FluxSizes(guidance_embeds=config.flavour.takes_guidance)
        format = PRECISIONS[config.base_model_precision]
    else:
        sizes, format = FluxSizes.from_config(base.config), stored_format(config, base)
    text, references = config.tokenizer_max_length, batch.reference_tokens
    image = [batch.image_tokens] * sizes.blocks
    routes = config.tread_config.routes if config.tread_config else ()
    for route in resolve_routes([route.model_dump() for route in routes], sizes.blocks):
        kept = keep_count(batch.image_tokens, route.ratio)
        image[route.first : route.last + 1] = [kept] * (route.last + 1 - route.first)
    targets = config.peft_lora_target_modules or preset_targets(config.flux_lora_target)
    return Workload(
        sizes=sizes,
        tokens=tuple(tokens + references + text for tokens in image),
        text_tokens=text,
        batch=batch.samples,
        storage=Storage(format, config.base_dtype.itemsize),
        targets=tuple(targets),
        rank=config.lora_rank,
        adapter_itemsize=config.adapter_dtype.itemsize,
        optimizer=config.optimizer,
        lora_type=config.adapter_kind,
        micro_batches=config.gradient_accumulation_steps,
        by_module=_lycoris_modules(config, sizes),
        vae=vae_bytes(encoded_pixels, itemsize=4 if config.vae_dtype == "fp32" else 2),
        assistant=assistant,
        average=config.average_is_on,
        releases_gradients=config.releases_gradients,
    )


def _lycoris_modules(config: TrainConfig, sizes: FluxSizes) -> Mapping[str, AdapterSize] | None:
    """The linears that a `lycoris_config` names, and the options of each; None without one."""
    if config.lycoris_config is None:
        return None
    with init_empty_weights():
        model = FluxTransformer(**vars(sizes), axes_dims_rope=(sizes.attention_head_dim,))
    return kind_of(config).check(model, settings_of(config))


def facts_of(config: TrainConfig, workload: Workload, gpu: gpus.Gpu | None) -> Facts:
    """What a config and the largest batch's workload say, for that GPU."""
    return Facts(
        blocks=workload.sizes.blocks,
        format=workload.storage.format,
        gpu=gpu,
        workload=workload,
    )


def facts_before_loading(
    config: TrainConfig,
    base: Checkpoint,
    batches: Sequence[BatchShape],
    device: torch.device,
    *,
    encoded_pixels: int = 0,
) -> Facts:
    """What a run knows before it loads its base.

    batches: those that its datasets give. encoded_pixels: see `workload_of`.
    """
    smallest, largest = (pick(batches, key=lambda batch: batch.tokens) for pick in (min, max))
    assistant = assistant_bytes(config)
    small, large = (
        workload_of(config, batch, base, encoded_pixels=encoded_pixels, assistant=assistant)
        for batch in (smallest, largest)
    )
    facts = facts_of(config, large, gpus.this_gpu(device))
    if device.type == "cuda":
        # by now the context is there, and so is what other programs have taken
        facts = replace(facts, free=torch.cuda.mem_get_info(device)[0] + CUDA_CONTEXT)
    return replace(facts, smallest=small)


def facts_of_model(facts: Facts, config: TrainConfig, transformer: FluxTransformer) -> Facts:
    """The facts with what only the loaded model shows, once its adapter is there.

    These are linears that forbid a choice, and the time that the CPU takes for modulation.
    """
    obstacles, seconds = {"graphs": graphs.uncapturable(transformer)}, None
    if transformer.modulation is not None:
        obstacles["modulation_ahead"] = modulation.why_not(transformer)
        if facts.gpu is not None and config.modulation_ahead == "auto":
            taken = transformer.modulation.seconds(
                config.train_batch_size, transformer.device, config.weight_dtype
            )
            seconds = Rate(taken, True, "this run")
    return replace(facts, obstacles=obstacles, host_seconds=seconds, cores=usable_cores())


def choose(wishes: Wishes, facts: Facts) -> Choices:
    """`choices.choose`, for a run: raises ConfigError where the config can't be followed.

    So it does where all weights train, and a step exceeds the GPU: nothing would make it smaller.
    """
    try:
        chosen = choices.choose(wishes, facts)
    except Refused as refused:
        raise ConfigError(refused.problems) from None
    gpu, workload = facts.gpu, facts.workload
    if gpu is not None and workload is not None and workload.trains_all:
        room = usable_bytes(gpu, wishes.vram_reserve, facts.free)
        if (problem := full_training.why_not_step(workload, chosen, room, gpu.name)) is not None:
            raise ConfigError([problem])
    return chosen


def too_large(config: TrainConfig, base: Checkpoint, device: torch.device) -> str | None:
    """Why the device can't train all weights of this base, whatever the batch; None where it can.

    On a CPU that is known of the whole memory of the machine.
    """
    workload = workload_of(config, BatchShape((64, 64), 1, ""), base)
    chosen = Choices(("full",) * workload.sizes.blocks)
    gpu = gpus.this_gpu(device)
    if gpu is None:
        room, where = psutil.virtual_memory().total, "this machine"
    else:
        room, where = usable_bytes(gpu, config.vram_reserve), gpu.name
    return full_training.why_not(workload, chosen, room, where)


def tell_budget(chosen: Choices, wishes: Wishes, facts: Facts, console: Console) -> None:
    """Say what a budget has come to, before the model is loaded."""
    if wishes.vram_budget is not None and facts.gpu is None:
        say(console, '"vram_budget" has no effect: there is no GPU')
    elif wishes.vram_budget is not None:
        say(console, f"{chosen.reasons['recompute']}; {chosen.summary()}")


def tell(
    chosen: Choices, wishes: Wishes, facts: Facts, transformer: FluxTransformer, console: Console
) -> None:
    """Say what "auto" passed over on a GPU, and why, once the choices are applied.

    What runs is told by the overview. Without a GPU nobody expects modulation ahead, CUDA graphs or
    products in 8 bits.
    """
    if facts.gpu is None:
        return
    reasons = chosen.reasons
    if wishes.modulation_ahead == "auto" and transformer.modulation is None:
        say(
            console,
            f"modulation is computed on the device, step by step: {reasons['modulation_ahead']}",
        )
    if wishes.compute == "auto" and facts.format is not None and chosen.compute == "same":
        say(console, f"matrix products are not in 8 bits: {reasons['compute']}")
    if wishes.cuda_graphs == "auto" and not chosen.graphs:
        say(console, f"CUDA graphs: off: {reasons['graphs']}")
