"""What a run is about to do, in a few lines before its first step."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fluxfast.adapters.kind import trainable_parameters
from fluxfast.config.precision_words import in_words
from fluxfast.config.run import TrainConfig
from fluxfast.memory import plan
from fluxfast.memory.gpus import Gpu
from fluxfast.memory.rates import told as told_of_rates
from fluxfast.memory.sizes import Workload
from fluxfast.model.apply import Choices
from fluxfast.model.transformer import compute_dtype
from fluxfast.ops.dispatch import HAS_NATIVE, HAS_TRITON
from fluxfast.text import duration, printable
from fluxfast.train.adapter import kind_of
from fluxfast.train.build import Parts
from fluxfast.train.build_data import RunData
from fluxfast.train.intervals import Interval
from fluxfast.train.pace import step_seconds
from fluxfast.train.rounds import evaluation_interval, validation_interval
from fluxfast.train.saving import checkpoint_interval


def show(
    console: Console,
    config: TrainConfig,
    data: RunData,
    parts: Parts,
    *,
    steps: int,
    done: int,
    forward: float | None = None,
) -> None:
    """Print the overview of a run of so many steps, of which some are done.

    forward: seconds of a forward pass of a micro-batch, where `pace` has timed one.
    """
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows(config, data, parts, steps=steps, done=done, forward=forward):
        # as Text, since a path may look like markup
        table.add_row(Text(name), Text(text))
    console.print(table)


def rows(
    config: TrainConfig,
    data: RunData,
    parts: Parts,
    *,
    steps: int,
    done: int,
    forward: float | None = None,
) -> list[tuple[str, str]]:
    """The overview's lines, each with what it is about."""
    found = [
        ("steps", _steps(config, data, steps, done)),
        ("time", _time(config, parts, steps - done, forward)),
        ("trains", _adapter(config, parts)),
        ("learning", _learning(config)),
        ("timesteps", config.schedule_text),
        ("kernels", _kernels(parts)),
        ("saves", _saves(config, steps)),
        ("evaluates", _evaluates(config, data, steps, done)),
        ("draws", _draws(config, parts, steps, done)),
        ("folder", printable(config.output_dir)),
    ]
    return [(name, text) for name, text in found if text]


def _steps(config: TrainConfig, data: RunData, steps: int, done: int) -> str:
    trained = {dataset.id for dataset in data.prepared.datasets}
    reports = [report for report in data.prepared.report.datasets if report.id in trained]
    images = sum(report.used for report in reports)
    samples = sum(report.samples_per_epoch for report in reports)
    of_them = f" in {len(reports)} datasets"
    if len(reports) == 1:
        of_them = f" x {1 + reports[0].repeats}"
    times = config.gradient_accumulation_steps
    batches = " or ".join(map(str, sorted({d.train_batch_size for d in data.prepared.datasets})))
    each = f"{times} x {batches}" if times > 1 else batches
    number = f"{steps - done:,} of {steps:,} steps left" if done else f"{steps:,} steps"
    epochs = steps * times / max(1, data.sampler.batches_per_epoch)
    return (
        f"{number}, each of {each} image{'' if each == '1' else 's'}: {epochs:,.2f} epochs of "
        f"{samples:,} ({images:,} images{of_them})"
    )


def _time(config: TrainConfig, parts: Parts, steps: int, forward: float | None) -> str:
    """What all steps take: as a GPU's is predicted of the largest batch, or by a forward pass."""
    gpu, workload = parts.facts.gpu, parts.facts.workload
    if forward is not None:
        seconds = step_seconds(config, parts, forward)
        return (
            f"very roughly {duration(steps * seconds)}, by a forward pass that took {forward:.2g} "
            "s; the bar tells it better"
        )
    if gpu is None or workload is None:
        return "what is left stands behind the bar from the first step on"
    seconds = predicted(workload, parts.choices, gpu, config.gradient_accumulation_steps)
    return (
        f"about {duration(steps * seconds)} at {seconds:.2f} s a step, and drawing beside it "
        f"(predicted {told_of_rates(gpu)})"
    )


def predicted(workload: Workload, choices: Choices, gpu: Gpu, micro_batches: int) -> float:
    """Seconds of an optimiser's step of so many batches."""
    step = plan.predict(replace(workload, compute=choices.compute), choices, gpu)
    return sum(step.of_batches(micro_batches).values())


def _adapter(config: TrainConfig, parts: Parts) -> str:
    kind = kind_of(config)
    if config.trains_all:
        what = "all of the transformer"
    else:
        rank = "" if config.lycoris_config else f" of rank {config.lora_rank}"
        what = f"{kind.label}{rank} on {len(kind.modules(parts.transformer))} layers"
    parameters = list(trainable_parameters(parts.transformer).values())
    count = sum(p.numel() for p in parameters)
    megabytes = sum(p.numel() * p.element_size() for p in parameters) / 1e6
    return f"{what}: {count:,} parameters, {megabytes:.1f} MB"


def _learning(config: TrainConfig) -> str:
    return f"{config.optimizer} at a rate of {config.learning_rate:g} ({config.lr_scheduler})"


def _kernels(parts: Parts) -> str:
    """Which kernels run. An op that can't run on them says so when it is called."""
    choices, transformer = parts.choices, parts.transformer
    if transformer.device.type == "cuda":
        own = "Triton" if HAS_TRITON else "plain PyTorch (triton is not installed)"
    else:
        own = "native (C++)" if HAS_NATIVE else "plain PyTorch (fluxfast._C was not built)"
    if choices.compute == "same":
        dtype = transformer.autocast_dtype or compute_dtype(transformer.device, transformer.dtype)
        if parts.trains_all and transformer.autocast_dtype is None:
            # their linears are called as they are, in the weights' dtype
            dtype = transformer.dtype
        own += f", products in {str(dtype).removeprefix('torch.')}"
    else:
        own += f", products in {in_words(choices.compute)}"
        own += f" but for {choices.outliers} channels" if choices.outliers else ""
    more = [own]
    if parts.trains_all:
        more.append("blocks op by op, as their weights train")
    if transformer.modulation is not None:
        size = f"{transformer.modulation.nbytes / 2**30:.2f} GiB of host memory"
        more.append(f"modulation a step ahead on the CPU ({size})")
    if choices.graphs:
        more.append("CUDA graphs, once they agree")
    if choices.compile is not None:
        what = "the blocks and" if choices.compile.blocks else "no block but"
        more.append(f"torch.compile ({choices.compile.backend}) of {what} what is around them")
    return "; ".join(more)


def _when(interval: Interval, steps: int, *, first: bool = False) -> str:
    """When something happens that happens at the end, and else at its interval."""
    times = ["before the first step"] if first else []
    times += [*interval.told(steps), "at the end"]
    return " and ".join([", ".join(times[:-1]), times[-1]] if len(times) > 1 else times)


def _saves(config: TrainConfig, steps: int) -> str:
    kept = config.checkpoints_total_limit
    when = _when(checkpoint_interval(config), steps)
    best = f", and the best {config.checkpoints_keep_best}" if config.checkpoints_keep_best else ""
    return f"{when}; the newest {kept} stay{best}"


def _evaluates(config: TrainConfig, data: RunData, steps: int, done: int) -> str:
    held_out = data.prepared.held_out
    if not held_out or config.eval_loss_disable:
        return ""
    images = sum(min(config.num_eval_images, len(dataset.samples)) for dataset in held_out)
    when = _when(evaluation_interval(config), steps, first=done == 0)
    return f"the loss of {images:,} held-out images {when}"


def _draws(config: TrainConfig, parts: Parts, steps: int, done: int) -> str:
    if parts.validator is None:
        return "" if config.validation_disable else 'nothing: there is no "validation_prompt"'
    settings = parts.validator.settings
    prompts, images = len(settings.prompts), settings.images_per_prompt
    sizes = " and ".join(f"{width}x{height}" for width, height in settings.resolutions)
    each = f", {images} images each," if images > 1 else ""
    first = config.validation_on_startup or (done == 0 and not config.disable_benchmark)
    when = _when(validation_interval(config), steps, first=first)
    return f"{prompts} prompt{'' if prompts == 1 else 's'} at {sizes}{each} {when}"
