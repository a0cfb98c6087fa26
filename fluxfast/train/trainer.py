"""The training run, from a config to a LoRA: prepare the data, build the model, loop.

The loop is `Trainer.loop`, one step of it `Trainer.train_step`. Everything random in a step comes
from the run's seed and the step's number. So a resumed run needs no random state, and it ends with
the same bits as one that was never stopped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch.optim.lr_scheduler import LambdaLR

from fluxfast.adapters.kind import trainable_parameters
from fluxfast.adapters.lycoris import strength
from fluxfast.adapters.writing import modelspec_metadata
from fluxfast.config.run import TrainConfig
from fluxfast.data.batches import Batch, BatchLoader
from fluxfast.files import remove_leftovers
from fluxfast.model.flat_gradients import FlatGradients
from fluxfast.model.pinned import Readback
from fluxfast.train import health, preflight, resume, state
from fluxfast.train.adapter import adapter_metadata, config_of, init_lora_of, kind_of
from fluxfast.train.assistant import drawing
from fluxfast.train.build import Parts, RunData, load_data, load_parts
from fluxfast.train.events import (
    Metrics,
    Numbers,
    StopRequest,
    TrainingBar,
    memory_gib,
    plot_loss,
    read_metrics,
    say,
)
from fluxfast.train.lr_schedules import build_lr_scheduler
from fluxfast.train.objective import Objective
from fluxfast.train.optim import averaged, build_optimizer, clip_gradients, load_moments
from fluxfast.train.publish import Publisher, run_record


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite.

    The message names the step, the batch's files and the last good checkpoint.
    """


class Stopped(Exception):
    """A signal ended the run after a step; `checkpoint` is where it goes on from."""

    def __init__(self, number: int, checkpoint: Path) -> None:
        super().__init__(
            f"stopped by signal {number}; go on from {checkpoint} with the same command"
        )
        self.signal, self.checkpoint = number, checkpoint


@dataclass
class StepResult:
    """What a step leaves to report.

    numbers: its loss, the gradients' norm and the mean loss of its batches of regularisation data,
    which are on their way from the device.
    """

    step: int
    epoch: int
    numbers: Readback
    learning_rate: float
    batches: list[Batch]


def train(config: TrainConfig, console: Console | None = None) -> Path:
    """Run a config to its end; returns the LoRA's path.

    Raises Stopped after a signal, once a checkpoint is written.
    """
    console = console or Console()
    for note in config.notes:
        say(console, note)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checked = preflight.check(config, device)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    remove_leftovers(config.output_dir)
    trainer = Trainer(config, console, checked)
    try:
        trainer.resume()
        return trainer.loop()
    finally:
        trainer.close()


class Trainer:
    """A run's parts and state.

    Building one prepares the data, then loads the model. The models that prepare the data and the
    transformer are never in memory together.
    """

    def __init__(self, config: TrainConfig, console: Console, checked: preflight.Checked) -> None:
        # as it was given; `self.config` has what the LoRA says that the run goes on with
        self.given, self.console, self._say = config, console, partial(say, console)
        self.saved = checked.saved
        self.numbers = Numbers(self._say)
        for note in checked.notes:
            self._say(note)
        self.accelerator = Accelerator(
            log_with=None if config.report_to == "none" else config.report_to,
            project_dir=str(config.output_dir / config.logging_dir),
        )
        self.device = self.accelerator.device
        torch.backends.cuda.matmul.allow_tf32 = not config.disable_tf32
        self.seed = resume.run_seed(config, self.saved)
        self.init_lora = init_lora_of(config, self.saved)
        health.ensure_checked(config, self.device, console)
        self.data: RunData = load_data(config, self.seed, self.device, console)
        self.config = config_of(config, checked.lora)
        self.adapter_kind = kind_of(self.config)
        self.parts: Parts = load_parts(
            self.config,
            checked.lora,
            self.data,
            self.seed,
            self.device,
            console,
            saved=self.saved and self.saved.adapter,
        )
        self.transformer, self.stream = self.parts.transformer, self.parts.stream
        self.objective = Objective(
            self.config, self.transformer, self.seed, self.parts.shift_bounds
        )
        self._make_optimizer()
        self.step = 0
        # optimiser steps of the run
        self.steps = self.config.max_train_steps or self.data.sampler.steps(
            self.config.num_train_epochs
        )
        self.scheduler = self._schedule()
        self.pending: StepResult | None = None
        self.batches: BatchLoader | None = None
        record = run_record(
            self.config, self.data, self.parts, seed=self.seed, steps=self.steps, device=self.device
        )
        self.publisher = Publisher(self.config, checked.repository, record, self._say)

    def _make_optimizer(self) -> None:
        config = self.config
        named = trainable_parameters(self.transformer)
        self.gradients = FlatGradients(
            self.transformer, accumulates=config.gradient_accumulation_steps > 1
        )
        self.optimizer = build_optimizer(
            config.optimizer,
            named,
            lr=config.learning_rate,
            seed=self.seed,
            **config.optimizer_arguments,
        )

    def _schedule(self) -> LambdaLR:
        """The learning rate's course, from the step that the run is at on."""
        config = self.config
        return build_lr_scheduler(
            self.optimizer,
            config.lr_scheduler,
            warmup=config.scheduled_warmup,
            total=self.steps,
            power=config.lr_power,
            lr_end=config.lr_end,
            cycles=config.lr_num_cycles,
            done=self.step,
        )

    def resume(self) -> None:
        """Go on from the checkpoint that was found, if there is one.

        The adapter has its values already. The settings are those that the config has now.
        """
        if self.saved is None:
            return
        saved, self.saved = self.saved, None
        load_moments(self.optimizer, saved.optimizer)
        self.step = saved.step
        self.scheduler = self._schedule()
        moved = self.data.sampler.load_state_dict(saved.state["sampler"])
        for note in [*resume.notes(saved, self._settings()), *moved]:
            self._say(note)
        newer = [
            p.name
            for p in state.checkpoints(self.config.output_dir)
            if int(p.name.split("-")[1]) > self.step
        ]
        if newer:
            self._say(
                f"{', '.join(newer)}: of a longer run; move what is of no use away, or the next "
                '"latest" is the newest'
            )
        resumed = f"resumed from {saved.path}: step {self.step} of {self.steps}"
        self.console.print(resumed, highlight=False, markup=False)

    def _settings(self) -> dict[str, Any]:
        return resume.settings(
            self.given, self.data.config.folders, seed=self.seed, steps=self.steps
        )

    def close(self) -> None:
        """End uploads, and free what outlives the objects: memory or files of streamed blocks."""
        try:
            self.publisher.close()
        finally:
            if self.stream is not None:
                self.stream.close()

    def loop(self) -> Path:
        """Train to the last step, save, and return the final LoRA's path."""
        config = self.config
        self.publisher.start(self.step)
        self._start_trackers()
        if (
            self.parts.validator
            and self.step == 0
            and (config.validation_on_startup or not config.disable_benchmark)
        ):
            self._validate(0)
        self.metrics = Metrics(config.output_dir, self.step, self._say)
        self.batches = self.data.loader(
            self.step * config.gradient_accumulation_steps, self.objective.example
        )
        with StopRequest() as stop, TrainingBar(self.console, self.steps, self.step) as self.bar:
            try:
                self._look_ahead(self.step + 1)
                while self.step < self.steps:
                    result = self.train_step(self.step + 1)
                    self.step += 1
                    self._report(self.pending)
                    self.pending = result
                    if stop.signal is not None and self.step < self.steps:
                        raise Stopped(stop.signal, self._save())
                    if self._due(config.checkpoint_step_interval):
                        self._save()
                    if self._due(config.validation_step_interval):
                        self._validate(self.step)
                self._save()
            finally:
                self.metrics.close()
                self.batches.close()
                if self.transformer.modulation is not None:
                    self.transformer.modulation.forget()
        self._validate(self.step)
        return self._finish()

    def _due(self, interval: int) -> bool:
        """Whether something happens after this step that happens every so many (0: never).

        After the last step it happens in any case.
        """
        return bool(interval) and self.step % interval == 0 and self.step < self.steps

    # ---- one optimisation step -------------------------------------------------------------------

    def train_step(self, step: int) -> StepResult:
        """Forward and backward of every micro-batch, clip, update; `step` counts from 1."""
        assert self.batches is not None
        accumulation = self.config.gradient_accumulation_steps
        total, batches = torch.zeros((), device=self.device), []
        # of the micro-batches that hold the adapter to the base's own predictions
        held, held_batches = torch.zeros((), device=self.device), 0
        for micro in range(accumulation):
            example = next(self.batches)
            epoch = self.batches.epoch
            self._look_ahead(step if micro + 1 < accumulation else step + 1)
            loss = self.objective.loss(example)
            (loss / accumulation).backward()
            self.gradients.take()
            total += loss.detach() / accumulation
            batches.append(example.batch)
            if example.batch.is_regularisation_data:
                held, held_batches = held + loss.detach(), held_batches + 1
        self.gradients.hand_over()
        norm = clip_gradients(
            self.gradients.buffers, self.config.grad_clip_method, self.config.clipped_to
        )
        learning_rate = float(self.scheduler.get_last_lr()[0])
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(
            step, epoch, Readback(total, norm, held / max(1, held_batches)), learning_rate, batches
        )

    def _look_ahead(self, step: int) -> None:
        """Have a thread compute the modulation of the next micro-batch while the device works.

        step: the step that the micro-batch belongs to.
        """
        if self.transformer.modulation is None or step > self.steps:
            return
        assert self.batches is not None
        upcoming = self.batches.upcoming()
        self.transformer.prepare_modulation(
            lambda: self.objective.modulation_conditions(upcoming())
        )

    # ----------------------------------------------------------------------------------------------

    def _report(self, result: StepResult | None) -> None:
        """Read a step's numbers and write them down; the device is a step ahead by now.

        Raises NonFiniteLoss where the loss or the gradients' norm is not finite.
        """
        if result is None:
            return
        loss, norm, held = result.numbers.read()
        if not math.isfinite(loss) or not math.isfinite(norm):
            files = ", ".join(
                f"{file} ({batch.dataset})" for batch in result.batches for file in batch.files
            )
            good = state.find_checkpoint(self.config.output_dir, "latest")
            raise NonFiniteLoss(
                f"step {result.step}: the loss is {loss}, the gradients' norm {norm}. The batch: "
                f"{files}. The last good checkpoint: {good or 'none yet'}. A lower learning_rate "
                "or max_grad_norm may help, or leaving out a damaged image"
            )
        memory = memory_gib(self.device)
        line = {
            "step": result.step,
            "epoch": result.epoch,
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": result.learning_rate,
            "steps_per_second": round(self.bar.tick(), 4),
            "memory_gib": None if memory is None else round(memory, 3),
            "dataset": result.batches[-1].dataset,
        }
        if any(batch.is_regularisation_data for batch in result.batches):
            line["regularisation_loss"] = held
        self.metrics.write(line)
        self.bar.show(result.step, line)
        if (config := self.config).report_to != "none":
            values = {
                k: v for k, v in line.items() if k not in ("step", "dataset") and v is not None
            }
            with self.numbers.guard(config.report_to):
                self.accelerator.log(values, step=result.step)

    def _save(self) -> Path:
        """A checkpoint of this step; never of a step whose loss nobody has looked at."""
        assert self.batches is not None
        self._report(self.pending)
        self.pending = None
        path = state.save_checkpoint(
            self.config.output_dir,
            self.step,
            adapter=self.adapter_kind.state(self.transformer),
            optimizer=self.optimizer,
            state={
                "seed": self.seed,
                "sampler": self.batches.state_dict(),
                "fixed": resume.fixed(self.config)
                | {"lora_rank": self.config.lora_rank, "lora_alpha": self.config.alpha},
                "init_lora": self.init_lora,
                "settings": self._settings(),
            },
            save_lora=self._save_lora,
            keep=self.config.checkpoints_total_limit,
        )
        if self.step < self.steps:
            self.publisher.checkpoint(path, self.step)
        self.bar.pause()
        return path

    def _save_lora(self, folder: Path) -> Path:
        config = self.config
        metadata = modelspec_metadata(
            architecture=config.flavour.architecture,
            title=config.tracker_run_name,
            resolution=self.data.resolution,
            global_step=self.step,
            trained_words=self.data.instance_prompts,
        ) | adapter_metadata(config)
        with averaged(self.optimizer):
            return self.adapter_kind.save(
                self.transformer, folder, style=config.lora_format, metadata=metadata
            )

    def _validate(self, step: int) -> None:
        if self.parts.validator is None:
            return
        config = self.config
        with (
            averaged(self.optimizer),
            drawing(self.transformer, config),
            strength(self.transformer, config.validation_lycoris_strength),
        ):
            paths = self.parts.validator.run(step, self.console)
        for path in paths:
            self.console.print(f"  {path}", highlight=False, markup=False, soft_wrap=True)
        if step > 0:
            self.bar.pause()

    def _start_trackers(self) -> None:
        if self.config.report_to == "none":
            return
        values = self.config.model_dump().items()
        flat = {k: v for k, v in values if isinstance(v, int | float | str | bool)}
        with self.numbers.guard(self.config.report_to):
            self.accelerator.init_trackers(self.config.tracker_project_name, config=flat)

    def _finish(self) -> Path:
        lora = self._save_lora(self.config.output_dir)
        plot = self.config.output_dir / "loss.png"
        with self.numbers.guard(str(plot)):
            if metrics := read_metrics(self.metrics.path):
                plot_loss(metrics, plot)
        if self.config.report_to != "none":
            with self.numbers.guard(self.config.report_to):
                self.accelerator.end_training()
        self.publisher.end(self.step)
        label = self.adapter_kind.label
        self.console.print(f"{label}: {lora}", highlight=False, markup=False, soft_wrap=True)
        return lora
