"""What `fluxfast-train plan` says of a run, computed: bytes and seconds by part."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from fluxfast.cli.plan_run import Run, encoded_at_a_time, length_in_steps, run_of
from fluxfast.config.conditioning import ConditioningDataset
from fluxfast.config.precision_words import in_words
from fluxfast.config.run import TrainConfig

if TYPE_CHECKING:
    # torch loads once the config is known to be right
    from fluxfast.memory.choices import Facts
    from fluxfast.memory.gpus import Gpu
    from fluxfast.memory.sizes import Workload
    from fluxfast.memory.step_time import StepTime
    from fluxfast.memory.wishes import Wishes
    from fluxfast.model.apply import Choices

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


def plan_report(
    config: TrainConfig, gpu_name: str | None, vram: float | None = None
) -> dict[str, Any]:
    """Everything that is printed, in bytes and seconds.

    vram: GiB of the GPU, in the place of the table's. Raises ValueError for a GPU that isn't in the
    table, and for what that GPU can't do.
    """
    from fluxfast.memory import plan
    from fluxfast.memory.budget import unsupported, usable_bytes
    from fluxfast.memory.gpus import GPUS
    from fluxfast.memory.rates import told
    from fluxfast.memory.wishes import wishes_of
    from fluxfast.train import encoder_sizes

    run, notes = run_of(config)
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
    preparing = encoder_sizes.preparing(config, list(encoded_at_a_time(run)))
    on_card = _on_card(target, wishes, taken.needed, max(preparing.values()))
    report: dict[str, Any] = {
        "batch": {
            "size": list(run.largest.size),
            "samples": run.largest.samples,
            "dataset": run.largest.dataset,
        },
        "compute": in_words(choices.compute),
        "choices": _choices_text(choices),
        "chosen": asdict(choices),
        "vram": taken.vram,
        "vram_peak": taken.peak,
        "vram_needed": taken.needed,
        "host": taken.host | {"while loading, at most": plan.loading_bytes(workload)},
        "preparing": preparing,
        "validating": encoder_sizes.validating(config),
        "disk": _disk(run, workload),
        "notes": notes,
        **on_card,
        "fits_on": [g.name for g in GPUS if not unsupported(g) and taken.needed <= usable_bytes(g)],
        "trained": {
            "rank": None if config.trains_all else config.lora_rank,
            "numbers": workload.adapters,
        },
        "run": length_in_steps(run),
    }
    if target.known and gpu is not None:
        report["step"] = _step(config, plan.predict(workload, choices, gpu), run.largest.samples)
        report["rates"] = told(gpu)
        report["run"] |= _times(run, choices, report["run"]["steps"], report["step"], gpu)
    if report["fits"] is False:
        report["changes"] = _changes(config, wishes, facts, timed=target.known)
    return report


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
    # nobody has timed blocks whose weights train
    return Target(gpu, gpu, known=not config.trains_all)


def _on_card(target: Target, wishes: Wishes, step: int, encoders: int) -> dict[str, Any]:
    """The card, what a run may take of it, and whether a step's and the encoders' bytes fit."""
    from fluxfast.memory.budget import budget_bytes, reserve_gib, unsupported, usable_bytes
    from fluxfast.memory.plan import CUDA_CONTEXT

    if target.gpu is None:
        known = ("gpu", "unsupported", "budget", "reserve", "fits", "encoders_fit")
        return dict.fromkeys(known)
    gpu, budget = target.gpu, budget_bytes(wishes, target.gpu)
    room = usable_bytes(gpu, wishes.vram_reserve)
    # what is left free is no matter of a budget that is a number
    reserves = wishes.vram_budget in (None, "auto")
    return {
        "gpu": gpu._asdict() if target.known else _memory_of(gpu),
        "unsupported": unsupported(gpu),
        "budget": budget,
        "reserve": reserve_gib(gpu, wishes.vram_reserve) if reserves else None,
        "fits": step <= budget,
        "encoders_fit": encoders + CUDA_CONTEXT <= room,
    }


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


def _choose(wishes: Wishes, facts: Facts) -> Choices:
    """As a run would; where nothing fits its budget, as a run without one."""
    from fluxfast.memory.choices import OverBudget, choose

    try:
        return choose(wishes, facts)
    except OverBudget:
        return choose(replace(wishes, vram_budget=None), facts)


def _changes(config: TrainConfig, wishes: Wishes, facts: Facts, *, timed: bool) -> dict[str, Any]:
    """What a run with a budget would choose so that it fits, or why nothing does."""
    from fluxfast.memory import full_training, plan
    from fluxfast.memory.budget import usable_bytes
    from fluxfast.memory.choices import OverBudget, Refused, choose

    assert facts.workload is not None and facts.gpu is not None
    if facts.workload.trains_all:
        # nothing streams or stores in fewer bits what trains
        room = usable_bytes(facts.gpu, wishes.vram_reserve)
        chosen = choose(wishes, facts)
        why_not = full_training.why_not_step(facts.workload, chosen, room, facts.gpu.name)
        return {"possible": False, "why": [why_not]}
    budget = wishes.vram_budget or "auto"
    try:
        choices = choose(replace(wishes, vram_budget=budget), facts)
    except Refused as error:
        why = error.lines if isinstance(error, OverBudget) else list(error.problems)
        return {"possible": False, "why": why}
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


def _step(config: TrainConfig, time: StepTime, samples: int) -> dict[str, float]:
    """Seconds of an optimiser step, by part."""
    times = config.gradient_accumulation_steps
    parts = time.of_batches(times)
    seconds = sum(parts.values())
    return {**parts, "seconds": seconds, "images_per_second": samples * times / seconds}


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
