"""What `fluxfast-train plan` says of a run, computed: bytes and seconds by part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fluxfast.config.conditioning import ConditioningDataset
from fluxfast.config.dataset_fields import ImageDataset
from fluxfast.config.datasets import DataConfig, load_data_config
from fluxfast.config.run import TrainConfig

if TYPE_CHECKING:
    # torch loads once the config is known to be right
    from fluxfast.checkpoint.transformer import Checkpoint
    from fluxfast.memory.choices import Facts
    from fluxfast.memory.gpus import Gpu
    from fluxfast.memory.sizes import Workload
    from fluxfast.memory.wishes import Wishes
    from fluxfast.model.apply import Choices
    from fluxfast.train.choose import BatchShape
    from fluxfast.train.outlook import SeenDataset

# what nobody can know before a run, so that its time leaves it out
NOT_COUNTED = ("downloads", "loading and quantising the model", "validation", "saving")
# of what torch's GEMM sustains, what the encoders are assumed to
ENCODING = 0.5


class Target(NamedTuple):
    """The GPU that is planned for.

    gpu: None where there is none to plan for. chooses_as: the GPU whose choices are made; one that
    has everything, where nothing is known but its memory. known: whether times can be predicted.
    """

    gpu: Gpu | None
    chooses_as: Gpu
    known: bool


@dataclass(frozen=True)
class Run:
    """A run that is planned: its config, and what is here of its data and its model.

    Attributes:
        data: the dataloader's config; None where its file is not there.
        datasets: those that are trained on, or a stand-in for them.
        seen: what is known of the images that are here.
        base: the transformer's checkpoint; None where it is not on this machine.
        assistant: bytes of the assistant LoRA.
    """

    config: TrainConfig
    data: DataConfig | None
    datasets: Sequence[ImageDataset]
    seen: Sequence[SeenDataset]
    base: Checkpoint | None
    assistant: int

    @cached_property
    def sizes(self) -> dict[str, list[tuple[int, int]]]:
        """The sizes of the images that are here, by their datasets' ids."""
        return {each.dataset.id: list(each.sizes) for each in self.seen}

    @cached_property
    def largest(self) -> BatchShape:
        from fluxfast.train.choose import largest_batch

        return largest_batch(self.config, self.datasets, self.data, self.sizes)

    @cached_property
    def batches(self) -> dict[BatchShape, int]:
        """The batches of an epoch that are known, each with its number."""
        from fluxfast.train.outlook import batches_of

        return {} if self.data is None else batches_of(self.config, self.data, self.seen)

    def workload(self, batch: BatchShape, compute: str = "same") -> Workload:
        from fluxfast.train.choose import encoded_pixels, workload_of

        pixels = encoded_pixels(self.config, self.datasets, self.sizes)
        work = workload_of(
            self.config, batch, self.base, encoded_pixels=pixels, assistant=self.assistant
        )
        return replace(work, compute=compute)


def plan_report(
    config: TrainConfig, gpu_name: str | None, vram: float | None = None
) -> dict[str, Any]:
    """Everything that is printed, in bytes and seconds.

    vram: GiB of the GPU, in the place of the table's. Raises ValueError for a GPU that isn't in the
    table, and for what that GPU can't do.
    """
    from fluxfast.memory import plan
    from fluxfast.memory.budget import budget_bytes, reserve_gib, unsupported, usable_bytes
    from fluxfast.memory.gpus import GPUS
    from fluxfast.memory.rates import told
    from fluxfast.memory.wishes import wishes_of
    from fluxfast.train import encoder_sizes

    run, notes = _run_of(config)
    config = run.config
    target, wishes = _target(config, gpu_name, vram), wishes_of(config)
    gpu = target.gpu
    if gpu is None:
        # without a GPU to ask there is no memory that could be too small
        wishes = replace(wishes, vram_budget=None)
    facts = _facts(config, run.workload(run.largest), target.chooses_as)
    choices = _choose(wishes, facts)
    workload = run.workload(run.largest, choices.compute)
    taken = plan.account(workload, choices)
    limit = None if gpu is None else budget_bytes(wishes, gpu)
    fits = None if limit is None else taken.needed <= limit
    report: dict[str, Any] = {
        "batch": {
            "size": list(run.largest.size),
            "samples": run.largest.samples,
            "dataset": run.largest.dataset,
        },
        "compute": choices.compute,
        "choices": _choices_text(choices),
        "chosen": asdict(choices),
        "vram": taken.vram,
        "vram_peak": taken.peak,
        "vram_needed": taken.needed,
        "host": taken.host | {"while loading, at most": plan.loading_bytes(workload)},
        "preparing": encoder_sizes.preparing(config, list(_encoded_at_a_time(run))),
        "validating": encoder_sizes.validating(config),
        "disk": _disk(run, workload),
        "notes": notes,
        "gpu": None if gpu is None else gpu._asdict() if target.known else _memory_of(gpu),
        "unsupported": unsupported(gpu),
        "budget": limit,
        "reserve": None if gpu is None else reserve_gib(gpu, wishes.vram_reserve),
        "fits": fits,
        "fits_on": [g.name for g in GPUS if not unsupported(g) and taken.needed <= usable_bytes(g)],
        "trained": {"rank": config.lora_rank, "numbers": workload.adapters},
        "run": _length(run),
    }
    if target.known and gpu is not None:
        report["step"] = _step(config, plan.predict(workload, choices, gpu), run.largest.samples)
        report["rates"] = told(gpu)
        report["run"] |= _times(run, choices, report["run"]["steps"], report["step"], gpu)
    if fits is False:
        report["changes"] = _changes(config, wishes, facts, timed=target.known)
    return report


def _run_of(config: TrainConfig) -> tuple[Run, list[str]]:
    """(the run, what has to be said of what is not here)."""
    from fluxfast.train.adapter import config_of, read_init_lora
    from fluxfast.train.outlook import look

    data, datasets, notes = _datasets(config)
    if config.init_lora and Path(config.init_lora).exists():
        # its file says rank and modules
        config = config_of(config, read_init_lora(config, None))
    seen, unseen = look(config, data) if data else ([], [])
    notes += unseen
    assistant = _assistant(config, notes)
    return Run(config, data, datasets, seen, _local_base(config), assistant), notes


def _target(config: TrainConfig, name: str | None, vram: float | None) -> Target:
    """What is planned for: a card by name, one with so much memory, or this machine's."""
    from fluxfast.memory.budget import unsupported
    from fluxfast.memory.gpus import find_gpu

    stand_in = find_gpu("RTX 4090")
    gpu = find_gpu(name) if name else None if vram else _this_gpu(config)
    if gpu is None and vram is None:
        return Target(None, stand_in, False)
    if gpu is None:
        assert vram is not None
        gpu = stand_in._replace(name=f"a card with {vram:g} GiB", memory=vram)
        return Target(gpu, gpu, False)
    gpu = gpu._replace(memory=vram or gpu.memory)
    if unsupported(gpu):
        as_large = stand_in._replace(name=gpu.name, memory=gpu.memory, screen=gpu.screen)
        return Target(gpu, as_large, False)
    return Target(gpu, gpu, True)


def _memory_of(gpu: Gpu) -> dict[str, Any]:
    """What is known of a GPU without rates."""
    return {"name": gpu.name, "memory": gpu.memory, "screen": gpu.screen}


def _facts(config: TrainConfig, workload: Workload, gpu: Gpu) -> Facts:
    from fluxfast.memory.rates import modulation_on_host
    from fluxfast.train.choose import facts_of

    modulation = sum(workload.modulation_weights) + workload.outer_modulation_weights
    facts = facts_of(config, workload, gpu)
    return replace(facts, host_seconds=modulation_on_host(modulation))


def _this_gpu(config: TrainConfig) -> Gpu | None:
    """This machine's GPU, if it has one, with what `fluxfast-train doctor` has found on it."""
    import torch

    from fluxfast.doctor.startup import recall
    from fluxfast.memory import gpus
    from fluxfast.model.transformer import compute_dtype

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = gpus.this_gpu(device)
    if gpu is not None:
        recall(device, compute_dtype(device, config.base_dtype))
    return gpu


def _local_base(config: TrainConfig) -> Checkpoint | None:
    """The transformer's checkpoint, opened, if it is on this machine; nothing is downloaded."""
    from fluxfast.train.base_model import open_base

    where = Path(config.transformer_source.path).expanduser()
    return open_base(config) if where.exists() else None


def _choose(wishes: Wishes, facts: Facts) -> Choices:
    """As a run would; where nothing fits its budget, as a run without one."""
    from fluxfast.memory.choices import OverBudget, choose

    try:
        return choose(wishes, facts)
    except OverBudget:
        return choose(replace(wishes, vram_budget=None), facts)


def _datasets(config: TrainConfig) -> tuple[DataConfig | None, list[ImageDataset], list[str]]:
    """The dataloader's config, the datasets whose sizes count, and what has to be said of them."""
    if config.data_backend_config.exists():
        data = load_data_config(config.data_backend_config, defaults=config.dataset_defaults)
        return data, list(data.images), []
    stand_in = ImageDataset.model_validate(
        {
            "id": "?",
            "resolution": config.resolution,
            "resolution_type": config.resolution_type,
            "caption_strategy": "filename",
            "instance_data_dir": ".",
            "cache_dir_vae": ".",
        }
    )
    return (
        None,
        [stand_in],
        [f"{config.data_backend_config} is not there: reckoned with the config's own resolution"],
    )


def _assistant(config: TrainConfig, notes: list[str]) -> int:
    """Bytes of the assistant LoRA. One that would have to be fetched is noted, and not counted."""
    from fluxfast.train.assistant import assistant_bytes

    if config.assistant_lora is None or Path(config.assistant_lora).exists():
        return assistant_bytes(config)
    notes.append(f"the assistant LoRA {config.assistant_lora} is not here, and not counted")
    return 0


def _changes(config: TrainConfig, wishes: Wishes, facts: Facts, *, timed: bool) -> dict[str, Any]:
    """What a run with a budget would choose so that it fits, or why nothing does."""
    from fluxfast.memory import plan
    from fluxfast.memory.choices import OverBudget, Refused, choose

    budget = wishes.vram_budget or "auto"
    try:
        choices = choose(replace(wishes, vram_budget=budget), facts)
    except Refused as error:
        why = error.lines if isinstance(error, OverBudget) else list(error.problems)
        return {"possible": False, "why": why}
    assert facts.workload is not None and facts.gpu is not None
    workload = replace(facts.workload, compute=choices.compute)
    taken = plan.account(workload, choices)
    found: dict[str, Any] = {
        "possible": True,
        "config": {"vram_budget": budget},
        "choices": _choices_text(choices),
        "vram": taken.vram,
        "vram_needed": taken.needed,
        "chosen": asdict(choices),
        "host": taken.host,
    }
    if timed:
        time = plan.predict(workload, choices, facts.gpu)
        found["step"] = _step(config, time, workload.batch)
    return found


def _choices_text(choices: Choices) -> dict[str, Any]:
    counts = {policy: choices.recompute.count(policy) for policy in ("none", "selective", "full")}
    return {
        "recompute": {policy: count for policy, count in counts.items() if count},
        "blocks": f"streamed through a ring of {choices.slots}" if choices.streams else "resident",
        "modulation": "ahead, in host memory" if choices.modulation_ahead else "on the GPU",
        "blocks' inputs": "in host memory" if choices.host_inputs else "on the GPU",
        "summary": choices.summary(),
    }


def _step(config: TrainConfig, time: Any, samples: int) -> dict[str, float]:
    """Seconds of an optimiser step, by part."""
    from fluxfast.memory.step_time import PARTS

    times = config.gradient_accumulation_steps
    parts = {part: getattr(time, part) * (1 if part == "update" else times) for part in PARTS}
    seconds = sum(parts.values())
    return {**parts, "seconds": seconds, "images_per_second": samples * times / seconds}


def _length(run: Run) -> dict[str, int | None]:
    """Images, steps and the steps of an epoch; None where nobody knows them yet."""
    from fluxfast.train.outlook import length_of

    length = length_of(run.config, run.data, run.seen)
    trained = [each for each in run.seen if not each.dataset.is_held_out]
    return {
        "images": sum(each.images for each in trained) if trained else None,
        "steps": length.steps,
        "steps_per_epoch": length.steps_per_epoch,
    }


def _times(
    run: Run, choices: Choices, steps: int | None, largest: dict[str, float], gpu: Gpu
) -> dict[str, Any]:
    """Seconds of a run: of all its steps, and of encoding the captions and images that are here.

    largest: the step on the largest batch, which stands for all where the images are not here.
    """
    from fluxfast.memory import plan
    from fluxfast.memory.rates import rates_of
    from fluxfast.train.encoder_sizes import encoding_operations

    step = largest["seconds"]
    if batches := sum(run.batches.values()):
        weighed = 0.0
        for shape, count in run.batches.items():
            work = run.workload(shape, choices.compute)
            time = _step(run.config, plan.predict(work, choices, gpu), shape.samples)
            weighed += count * time["seconds"]
        step = weighed / batches
    captions = frozenset().union(*(each.captions for each in run.seen))
    pixels = sum(
        width * height * count for each in run.seen for (width, height), count in each.sizes.items()
    )
    operations = encoding_operations(run.config, len(captions), pixels)
    return {
        "mean_step_seconds": step,
        "training_seconds": None if steps is None else steps * step,
        "encoding_seconds": operations / (ENCODING * rates_of(gpu)["library"].value)
        if run.seen
        else None,
        "not_counted": list(NOT_COUNTED),
    }


def _encoded_at_a_time(run: Run) -> Iterator[tuple[int, int, int]]:
    """(width, height, how many) of the images that the autoencoder encodes at a time."""
    from fluxfast.train.choose import largest_batch

    seen = {each.dataset.id: each for each in run.seen}
    for dataset in run.datasets:
        most = dataset.vae_batch_size or run.config.vae_batch_size
        if dataset.id in seen:
            for size, count in seen[dataset.id].sizes.items():
                yield *size, min(most, max(count, 1))
        else:
            yield *largest_batch(run.config, [dataset]).size, most


def _disk(run: Run, workload: Workload) -> dict[str, int]:
    """Bytes of caches and checkpoints; images are counted where their folder is there already."""
    from fluxfast.train.disk_space import cache_bytes, checkpoint_bytes, checkpoints_kept

    config = run.config
    sizes = {each.dataset.id: each.sizes for each in run.seen}
    # masks are images, and are not encoded
    folders = [
        folder
        for folder in (run.data.folders if run.data else ())
        if not (isinstance(folder, ConditioningDataset) and folder.is_mask)
    ]
    widths = (workload.sizes.joint_attention_dim, workload.sizes.pooled_projection_dim)
    caches = [cache_bytes(config, folder, *widths, sizes.get(folder.id)) for folder in folders]
    return {
        "latents": sum(latents for latents, _ in caches),
        "text embeddings": sum(texts for _, texts in caches),
        "quantised base": workload.frozen_bytes if workload.storage.format else 0,
        "checkpoints": checkpoints_kept(config) * checkpoint_bytes(config, workload.adapters),
    }
