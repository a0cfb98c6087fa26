"""The training run, from a config to a LoRA: prepare the data, build the model, loop.

The loop is `Trainer.loop`, one step of it `Trainer.train_step`. Everything random in a step comes
from the run's seed and the step's number. So a resumed run needs no random state, and it ends with
the same bits as one that was never stopped.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch.optim.lr_scheduler import LambdaLR

from fluxfast.adapters.kind import trainable_parameters
from fluxfast.config.run import TrainConfig
from fluxfast.data.batches import Batch, BatchLoader
from fluxfast.files import remove_leftovers
from fluxfast.model.flat_gradients import FlatGradients
from fluxfast.model.pinned import Readback
from fluxfast.train import ending, finished, health, overview, pace, preflight, resume
from fluxfast.train.adapter import config_of, init_lora_of, values_of_average
from fluxfast.train.build import Parts, load_parts
from fluxfast.train.build_data import RunData, load_data
from fluxfast.train.cache_contents import tell_size
from fluxfast.train.cache_use import using
from fluxfast.train.control import SAVE, STOP, VALIDATE, Requests, Stopped
from fluxfast.train.ema import WeightAverage
from fluxfast.train.events import Numbers, say, tell
from fluxfast.train.lr_schedules import build_lr_scheduler
from fluxfast.train.objective import Objective
from fluxfast.train.optim import build_optimizer, clip_gradients, load_moments
from fluxfast.train.previews import previewer_of
from fluxfast.train.publish import Publisher, run_record
from fluxfast.train.released_gradients import ReleasedGradients
from fluxfast.train.reporting import Reporter, StepResult
from fluxfast.train.rounds import Rounds
from fluxfast.train.run_events import RunEvents
from fluxfast.train.run_lock import RunLock
from fluxfast.train.saving import Saver, best_steps, checkpoint_interval, evaluations_since_best
from fluxfast.train.trackers import Trackers
from fluxfast.train.webhooks import webhooks_of


def train(config: TrainConfig, console: Console | None = None) -> Path:
    """Run a config to its end; returns the LoRA's path. One that was complete before is left so.

    Raises Stopped where somebody ended the run, once a checkpoint is written, and FolderInUse
    where another run works in its output folder.
    """
    console = console or Console()
    try:
        return _prepare(config, console)
    except finished.Finished as told:
        tell(console, str(told))
        return told.lora


def _prepare(config: TrainConfig, console: Console) -> Path:
    """Check the run, have its output folder for itself, and train."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with Requests(config.output_dir, partial(say, console)) as requests:
        checked = preflight.check(config, device)
        if config.max_train_steps:
            finished.check(config, checked.saved, config.max_train_steps)
        for note in config.notes:
            say(console, note)
        config.output_dir.mkdir(parents=True, exist_ok=True)
        with (
            RunLock(config.output_dir, partial(say, console)),
            using(config.cache_dir, partial(say, console)),
        ):
            remove_leftovers(config.output_dir)
            requests.forget_old()
            notes = partial(say, console)
            with (
                webhooks_of(config, notes) as webhooks,
                ending.reported(config, notes),
                RunEvents(config.output_dir, notes) as events,
            ):
                if config.webhook_config:
                    events.subscribe(webhooks)
                lora = _train(config, console, checked, requests, events)
        ending.show(console, config, lora)
        return lora


def _train(
    config: TrainConfig,
    console: Console,
    checked: preflight.Checked,
    requests: Requests,
    events: RunEvents,
) -> Path:
    trainer = Trainer(config, console, checked, requests, events)
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

    def __init__(
        self,
        config: TrainConfig,
        console: Console,
        checked: preflight.Checked,
        requests: Requests,
        events: RunEvents,
    ) -> None:
        # as it was given; `self.config` has what the LoRA says that the run goes on with
        self.given, self.console, self._say = config, console, partial(say, console)
        self.saved, self.requests, self.events = checked.saved, requests, events
        self.numbers = Numbers(self._say)
        for note in checked.notes:
            self._say(note)
        self.device = Accelerator().device
        torch.backends.cuda.matmul.allow_tf32 = not config.disable_tf32
        self.seed = resume.run_seed(config, self.saved)
        self.init_lora = init_lora_of(config, self.saved)
        health.ensure_checked(config, self.device, console)
        with events.stage("init_data_backend"):
            self.data: RunData = load_data(config, self.seed, self.device, console, events)
        # optimiser steps of the run
        self.steps = config.max_train_steps or self.data.sampler.steps(config.num_train_epochs)
        finished.check(config, self.saved, self.steps)
        self.config = config_of(config, checked.lora)
        with events.stage("init_load_base_model"):
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
        tell_size(config.cache_dir, self._say)
        with events.stage("init_prepare_models"):
            self.objective = Objective(
                self.config, self.transformer, self.seed, self.parts.shift_bounds
            )
            self._make_optimizer()
        self.step = 0
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
        self.optimizer = build_optimizer(
            config.optimizer,
            named,
            lr=config.learning_rate,
            seed=self.seed,
            version=config.optimizer_impl,
            **config.optimizer_arguments,
        )
        self.gradients: FlatGradients | ReleasedGradients
        if config.releases_gradients:
            self.gradients = ReleasedGradients(self.transformer, self.optimizer)
        else:
            self.gradients = FlatGradients(
                self.transformer, accumulates=config.gradient_accumulation_steps > 1
            )
        self.average: WeightAverage | None = None
        if config.use_ema:
            self.average = WeightAverage(
                named,
                decay=config.ema_decay,
                interval=config.ema_update_interval,
                warmup_steps=config.ema_warmup_steps,
                device=self.device if config.average_is_on == "device" else torch.device("cpu"),
            )
            if config.init_lora_ema and self.saved is None:
                self.average.load_state(values_of_average(self.transformer, config.init_lora_ema))
        self.saver = Saver(config, self.data, self.transformer, self.optimizer, self.average)

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
        with self.events.stage("init_resume_checkpoint"):
            load_moments(self.optimizer, saved.optimizer)
            self.step = saved.step
            self.scheduler = self._schedule()
            moved = self.data.sampler.load_state_dict(saved.state["sampler"])
            if self.average is not None and saved.average is not None:
                self.average.load_state(saved.average)
        newer = resume.newer(self.config.output_dir, self.step)
        for note in [*resume.notes(saved, self._settings()), *moved, *newer]:
            self._say(note)
        if self.average is not None and saved.average is None:
            self._say(f"the moving average begins at step {self.step}: {saved.path} has none")
        resumed = f"resumed from {saved.path}: step {self.step} of {self.steps}"
        self.console.print(resumed, highlight=False, markup=False)

    def _settings(self) -> dict[str, Any]:
        return resume.settings(
            self.given, self.data.config.folders, seed=self.seed, steps=self.steps
        )

    def close(self) -> None:
        """End uploads, and free what outlives the objects: threads, memory, files."""
        try:
            self.publisher.close()
        finally:
            if self.stream is not None:
                self.stream.close()
            if self.parts.compiling is not None:
                self.parts.compiling.close()

    def loop(self) -> Path:
        """Train to the last step, save, and return the final LoRA's path."""
        config = self.config
        self.publisher.start(self.step)
        self.report = Reporter(
            config,
            self.device,
            Trackers(self.given, seed=self.seed, done=self.step, say=self._say),
            self.events,
            self.console,
            self.numbers,
            steps=self.steps,
            done=self.step,
        )
        if self.parts.validator is not None:
            self.parts.validator.previewer = previewer_of(
                config, self.device, self.parts.validator.folder, self.events, self._say
            )
        self.rounds = Rounds(
            config, self.parts, self.data, self.objective, self.optimizer, self.average,
            self.report, self.events, self.console,
        )  # fmt: skip
        self.checkpoints = checkpoint_interval(config)
        so_far = {"steps": self.steps, "done": self.step}
        forward = pace.forward_seconds(self.data, self.objective, self.parts, **so_far)
        overview.show(self.console, config, self.data, self.parts, **so_far, forward=forward)
        try:
            self.rounds.before_training(self.step)
            self._train_to_the_end()
            self.rounds.draw(self.step, is_last=True)
            return self._finish()
        finally:
            self.report.close()

    def _train_to_the_end(self) -> None:
        """Every step that is left, with what is due between them, and the last checkpoint."""
        self.batches = self.data.loader(
            self.step * self.config.gradient_accumulation_steps, self.objective.example
        )
        try:
            with self.requests.after_steps(), self.report.bar:
                self._look_ahead(self.step + 1)
                while self.step < self.steps and not self._ends_early():
                    result = self.train_step(self.step + 1)
                    self.step += 1
                    self.report.step(self.pending)
                    self.pending = result
                    if self.step < self.steps:
                        self._between_steps()
                self._report_last_step()
                self.rounds.evaluate(self.step)
                self._save(is_final=True)
        finally:
            self.batches.close()
            if self.transformer.modulation is not None:
                self.transformer.modulation.forget()

    def _between_steps(self) -> None:
        """Do what is due or asked for after a step that is not the run's last."""
        if (by := self.requests.asked(STOP)) is not None:
            path = self._save()
            self.requests.done(STOP)
            raise Stopped(by, path)
        assert self.batches is not None
        epoch, ends_epoch = self.batches.epoch, self.batches.ends_epoch
        if self.rounds.evaluations.is_due(self.step, epoch, ends_epoch=ends_epoch):
            self._report_last_step()
            self.rounds.evaluate(self.step)
        due = self.checkpoints.is_due(self.step, epoch, ends_epoch=ends_epoch)
        if due or self.requests.asked(SAVE) or self.rounds.is_among_best(self.step):
            self._save()
            self.requests.done(SAVE)
        due = self.rounds.validations.is_due(self.step, epoch, ends_epoch=ends_epoch)
        if due or self.requests.asked(VALIDATE):
            self.rounds.draw(self.step)
            self.requests.done(VALIDATE)

    def _ends_early(self) -> bool:
        """Whether the evaluation loss has not got lower for as long as the config allows."""
        patience, evaluations = self.config.early_stopping_patience, self.report.losses
        ends = patience is not None and evaluations_since_best(evaluations) >= patience
        if ends:
            (best,) = best_steps(evaluations, 1) or [0]
            self._say(
                f"stopped early at step {self.step}: no lower evaluation loss for {patience} "
                f"evaluations; the lowest was at step {best}"
            )
        return ends

    # ---- one optimisation step -------------------------------------------------------------------

    def train_step(self, step: int) -> StepResult:
        """Forward and backward of every micro-batch, clip, update; `step` counts from 1."""
        assert self.batches is not None
        accumulation = self.config.gradient_accumulation_steps
        total, batches = torch.zeros((), device=self.device), list[Batch]()
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
        if self.parts.compiling is not None:
            self.parts.compiling.tell()
        self.gradients.hand_over()
        if isinstance(self.gradients, ReleasedGradients):
            norm = self.gradients.norm()
        else:
            norm = clip_gradients(
                self.gradients.buffers, self.config.grad_clip_method, self.config.clipped_to
            )
        learning_rate = float(self.scheduler.get_last_lr()[0])
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(step)
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

    def _report_last_step(self) -> None:
        """Wait for the numbers of the last step; what follows is no part of its time."""
        self.report.step(self.pending)
        self.pending = None

    def _save(self, *, is_final: bool = False) -> Path:
        """A checkpoint of this step; never of a step whose loss nobody has looked at."""
        assert self.batches is not None
        self._report_last_step()
        facts = {
            "seed": self.seed,
            "sampler": self.batches.state_dict(),
            "init_lora": self.init_lora,
            "settings": self._settings(),
        }
        with self.events.stage("checkpoint_save"):
            path = self.saver.checkpoint(self.step, facts, self.report.losses)
        if not is_final:
            self.publisher.checkpoint(path, self.step)
        self.report.checkpoint(path, is_final=is_final)
        return path

    def _finish(self) -> Path:
        with self.events.stage("model_save"):
            lora = self.saver.adapter(self.config.output_dir, self.step)
        self.events.complete(self.step, lora)
        self.publisher.end(self.step)
        return lora
