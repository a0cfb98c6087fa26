"""`fluxfast-train plan CONFIG.json [--gpu NAME] [--json] [--option=value ...]`"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from fluxfast.config.dataset_fields import ImageDataset
from fluxfast.config.datasets import DataConfig, load_data_config
from fluxfast.config.precision_words import in_words
from fluxfast.config.run import TrainConfig, load_config
from fluxfast.config.settings import ConfigError

if TYPE_CHECKING:
    # torch loads once the config is known to be right
    from fluxfast.checkpoint.transformer import Checkpoint
    from fluxfast.memory.choices import Facts
    from fluxfast.memory.gpus import Gpu
    from fluxfast.memory.wishes import Wishes
    from fluxfast.model.apply import Choices

HELP = """fluxfast-train plan CONFIG.json [--gpu NAME] [--json] [--option=value ...]

What a run takes, before anything is downloaded: VRAM by part, host memory, disk, and the time of a
step on that GPU; where it does not fit, what makes it fit. Needs no weights, network or GPU.

  --gpu NAME   such as "RTX 3080" (default: this machine's, if it has one); `--gpu list` shows the
               table
  --json       the same as one JSON object"""

GIB = 2**30


def main(words: Sequence[str]) -> int:
    if not words or any(word in ("-h", "--help") for word in words):
        print(HELP)
        return 0 if words else 2
    from fluxfast.memory.gpus import GPUS

    try:
        gpu_name, as_json, rest = _options(words)
        if gpu_name == "list":
            Console().print(_gpu_table(GPUS))
            return 0
        path = rest[0] if rest and not rest[0].startswith("-") else None
        config = load_config(path, rest[1:] if path else rest)
        report = plan_report(config, gpu_name)
    except (ConfigError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        show(report, Console())
    return 0 if report["fits"] is not False else 1


def _options(words: Sequence[str]) -> tuple[str | None, bool, list[str]]:
    """(--gpu, --json, everything else)."""
    gpu, as_json = None, False
    rest: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        if word == "--json":
            as_json = True
        elif word.startswith("--gpu="):
            gpu = word.removeprefix("--gpu=")
        elif word == "--gpu":
            if not left:
                raise ValueError('--gpu needs a name, such as --gpu "RTX 3080"')
            gpu = left.pop(0)
        else:
            rest.append(word)
    return gpu, as_json, rest


def plan_report(config: TrainConfig, gpu_name: str | None) -> dict[str, Any]:
    """Everything that is printed, in bytes and seconds.

    Raises ValueError for a GPU that isn't in the table, and for what that GPU can't do.
    """
    from fluxfast.memory import plan
    from fluxfast.memory.choices import budget_bytes, usable_bytes
    from fluxfast.memory.gpus import GPUS, find_gpu
    from fluxfast.memory.rates import modulation_on_host, told
    from fluxfast.memory.wishes import wishes_of
    from fluxfast.train.adapter import config_of, read_init_lora
    from fluxfast.train.choose import encoded_pixels, facts_of, largest_batch, workload_of

    data, datasets, notes = _datasets(config)
    if config.init_lora and Path(config.init_lora).exists():
        # its file says rank and modules
        config = config_of(config, read_init_lora(config, None))
    batch = largest_batch(config, datasets, data)
    workload = workload_of(
        config,
        batch,
        _local_base(config),
        encoded_pixels=encoded_pixels(config, datasets),
        assistant=_assistant(config, notes),
    )
    gpu = find_gpu(gpu_name) if gpu_name else _this_gpu(config)
    wishes = wishes_of(config)
    if gpu is None:
        # without a GPU to ask, one that has everything, and no memory that could be too small
        wishes = replace(wishes, vram_budget=None)
    modulation = sum(workload.modulation_weights) + workload.outer_modulation_weights
    facts = replace(
        facts_of(config, workload, gpu or find_gpu("RTX 4090")),
        host_seconds=modulation_on_host(modulation),
    )
    choices = _choose(wishes, facts)
    workload = replace(workload, compute=choices.compute)
    limit = None if gpu is None else budget_bytes(wishes, gpu)
    taken = plan.account(workload, choices)
    fits = None if limit is None else taken.needed <= limit
    report: dict[str, Any] = {
        "batch": {"size": list(batch.size), "samples": batch.samples, "dataset": batch.dataset},
        "compute": in_words(choices.compute),
        "choices": _choices_text(choices),
        "chosen": asdict(choices),
        "vram": taken.vram,
        "vram_peak": taken.peak,
        "vram_needed": taken.needed,
        "host": taken.host | {"while loading, at most": plan.loading_bytes(workload)},
        "preparing": _preparing(config),
        "disk": _disk(config, workload, datasets),
        "notes": notes,
        "gpu": None if gpu is None else gpu._asdict(),
        "budget": limit,
        "fits": fits,
        "fits_on": [g.name for g in GPUS if taken.needed <= usable_bytes(g.memory)],
    }
    if gpu is not None:
        report["step"] = _step(config, plan.predict(workload, choices, gpu), batch.samples)
        report["rates"] = told(gpu)
        if not fits:
            report["changes"] = _changes(config, wishes, facts)
    return report


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


def _changes(config: TrainConfig, wishes: Wishes, facts: Facts) -> dict[str, Any]:
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
    return {
        "possible": True,
        "config": {"vram_budget": budget},
        "choices": _choices_text(choices),
        "vram": taken.vram,
        "vram_needed": taken.needed,
        "host": taken.host,
        "step": _step(config, plan.predict(workload, choices, facts.gpu), workload.batch),
    }


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


def _preparing(config: TrainConfig) -> dict[str, int]:
    """VRAM that the encoders take before the transformer is loaded, one after the other."""
    from fluxfast.quant import FORMATS
    from fluxfast.quant.rules import PRECISIONS

    def encoder(parameters: int, precision: str) -> int:
        format = PRECISIONS[precision]
        bits = (
            8 * config.weight_dtype.itemsize if format is None else FORMATS[format].bits_per_weight
        )
        return round(parameters * bits / 8)

    # T5 v1.1 XXL's encoder, CLIP ViT-L/14's text encoder, FLUX.1's autoencoder
    text = encoder(4_762_310_656, config.text_encoder_2_precision) + encoder(
        123_060_480, config.text_encoder_1_precision
    )
    return {"text encoders": text, "autoencoder": 2 * 83_819_683}


def _disk(config: TrainConfig, workload: Any, datasets: Sequence[ImageDataset]) -> dict[str, int]:
    """Bytes of caches and checkpoints; images are counted where their folder is there already."""
    from fluxfast.train.disk_space import cache_bytes, checkpoint_bytes

    caches = [cache_bytes(config, dataset) for dataset in datasets if dataset.id != "?"]
    return {
        "latents": sum(latents for latents, _ in caches),
        "text embeddings": sum(texts for _, texts in caches),
        "quantised base": workload.frozen_bytes if workload.storage.format else 0,
        "checkpoints": (config.checkpoints_total_limit + config.checkpoints_keep_best)
        * checkpoint_bytes(config, workload.adapters),
    }


def show(report: dict[str, Any], console: Console) -> None:
    """Print the report for people."""
    batch, say = report["batch"], _sayer(console)
    width, height = batch["size"]
    say(
        f"largest batch: {batch['samples']} of {width}x{height} ({batch['dataset']}); products "
        f"run in {report['compute']}"
    )
    for note in report["notes"]:
        say(f"· {note}")
    say(report["choices"]["summary"])
    for choice, reason in report["chosen"]["reasons"].items():
        say(f"· {_told(choice, report['chosen'])}: {reason}")
    console.print(
        _bytes_table("VRAM, at a step's peak", report["vram"], "needed", report["vram_needed"])
    )
    console.print(_bytes_table("host memory", report["host"]))
    console.print(_bytes_table("VRAM before the transformer is loaded", report["preparing"]))
    console.print(_bytes_table("disk, beside the downloads", report["disk"]))
    if report["gpu"] is None:
        say(f"fits on: {', '.join(report['fits_on']) or 'no GPU of the table'}")
        return
    name = report["gpu"]["name"]
    if (encoders := report["preparing"]["text encoders"]) > report["gpu"]["memory"] * GIB * 0.95:
        say(
            f"· the text encoders take {encoders / GIB:.1f} GiB before that: set "
            '"text_encoder_2_precision": "int8-quanto"'
        )
    say(f"{name}: a step in {_step_line(report['step'])}, predicted {report['rates']}")
    budget = report["budget"] / GIB
    if report["fits"]:
        say(f"fits: {report['vram_needed'] / GIB:.2f} of {budget:.2f} GiB")
        return
    say(f"does not fit: {report['vram_needed'] / GIB:.2f} GiB of {budget:.2f}")
    changes = report["changes"]
    if not changes["possible"]:
        for line in changes["why"]:
            say(f"· {line}")
        return
    asked = json.dumps(changes["config"]["vram_budget"])
    say(f'"vram_budget": {asked} makes it fit, in {changes["vram_needed"] / GIB:.2f} GiB:')
    say(f"· {changes['choices']['summary']}")
    say(f"· a step in {_step_line(changes['step'])}")


def _sayer(console: Console) -> Any:
    return lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)


def _told(choice: str, chosen: dict[str, Any]) -> str:
    """A choice, and what it has come to, if that is not in the summary already."""
    names = {
        "compute": "products",
        "transposed_codes": "transposed codes",
        "modulation_ahead": "modulation",
        "graphs": "CUDA graphs",
        "compile": "torch.compile",
    }
    value = {
        "compute": f" in {in_words(chosen['compute'])}",
        "transposed_codes": " kept" if chosen["transposed_codes"] else " not kept",
        "graphs": " on" if chosen["graphs"] else " off",
        "compile": " off" if chosen["compile"] is None else " on",
        "attention": f" {chosen['attention']}",
    }
    return names.get(choice, choice) + value.get(choice, "")


def _step_line(step: dict[str, float]) -> str:
    from fluxfast.memory.step_time import PARTS

    parts = ", ".join(f"{name} {step[name]:.2f}" for name in PARTS if step[name] > 0.005)
    return f"{step['seconds']:.2f} s ({parts}), {step['images_per_second']:.2f} images a second"


def _bytes_table(
    title: str, parts: dict[str, int], total: str | None = None, amount: int = 0
) -> Table:
    table = Table("", "GiB", title=title, title_justify="left")
    table.columns[1].justify = "right"
    for name, count in parts.items():
        if count:
            table.add_row(name, f"{count / GIB:.2f}")
    if total is not None:
        table.add_section()
        table.add_row(total, f"{amount / GIB:.2f}")
    return table


def _gpu_table(gpus: Sequence[Any]) -> Table:
    table = Table(
        title="rates in tera-operations a second, bandwidths in GB/s", title_justify="left"
    )
    for column in ("GPU", "architecture"):
        table.add_column(column, no_wrap=True)
    for column in ("SMs", "GiB", "bandwidth", "bf16", "int8", "fp8", "PCIe"):
        table.add_column(column, justify="right")
    table.add_column("source")
    for gpu in gpus:
        table.add_row(
            gpu.name, gpu.arch, *(f"{value:g}" if value else "-" for value in gpu[2:9]), gpu.source
        )
    return table
