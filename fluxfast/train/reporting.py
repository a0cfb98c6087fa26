"""What a run tells of itself as it goes: each step's numbers, checkpoints, evaluations, images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fluxfast.config.run import TrainConfig
from fluxfast.data.batches import Batch
from fluxfast.model.pinned import Readback
from fluxfast.train import state
from fluxfast.train.evaluation import POOLED, PREFIX
from fluxfast.train.events import (
    EVALUATIONS_NAME,
    METRICS_NAME,
    Metrics,
    Numbers,
    memory_gib,
    read_evaluations,
    read_metrics,
    tell,
)
from fluxfast.train.loss_chart import CHART_NAME, plot_loss
from fluxfast.train.run_events import RunEvents
from fluxfast.train.trackers import Trackers
from fluxfast.train.training_bar import TrainingBar
from fluxfast.train.validation import Drawn, png_of


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite.

    The message names the step, the batch's files and the last good checkpoint.
    """


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


class Reporter:
    """Tells what happens, to the terminal, to the files of numbers, to trackers and as events.

    `bar` is the progress bar of the loop, which starts and stops it. `losses` are (step, loss over
    all held-out images) of every evaluation so far, in order.
    """

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        trackers: Trackers,
        events: RunEvents,
        console: Console,
        numbers: Numbers,
        *,
        steps: int,
        done: int,
    ) -> None:
        """steps: of the whole run. done: those before it goes on."""
        self.config, self._device, self._trackers, self._events = config, device, trackers, events
        self._console, self._numbers, self._steps = console, numbers, steps
        folder = config.output_dir
        self._metrics = Metrics(folder / METRICS_NAME, done, numbers.say)
        self._evaluations = Metrics(folder / EVALUATIONS_NAME, done, numbers.say)
        self.losses = self._losses_so_far()
        self.bar = TrainingBar(console, steps, done)

    def step(self, result: StepResult | None) -> None:
        """Read a step's numbers and write them down; the device is a step ahead by now.

        Raises NonFiniteLoss where the loss or the gradients' norm is not finite.
        """
        if result is None:
            return
        loss, norm, held = result.numbers.read()
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise NonFiniteLoss(self._told_of_non_finite(result, loss, norm))
        memory = memory_gib(self._device)
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
        self._metrics.write(line)
        self.bar.show(result.step, line)
        self._announce_step(line)
        self._trackers.log(result.step, line)

    def _told_of_non_finite(self, result: StepResult, loss: float, norm: float) -> str:
        files = ", ".join(
            f"{file} ({batch.dataset})" for batch in result.batches for file in batch.files
        )
        good = state.find_checkpoint(self.config.output_dir, "latest")
        return (
            f"step {result.step}: the loss is {loss}, the gradients' norm {norm}. The batch: "
            f"{files}. The last good checkpoint: {good or 'none yet'}. A lower learning_rate "
            "or max_grad_norm may help, or leaving out a damaged image"
        )

    def _announce_step(self, line: Mapping[str, Any]) -> None:
        step, rate = line["step"], line["steps_per_second"]
        progress = {
            "label": "training",
            "current": step,
            "total": self._steps,
            "percent": round(100 * step / self._steps, 2),
            "eta_seconds": round((self._steps - step) / rate, 1) if rate else None,
            "metrics": {k: v for k, v in line.items() if k != "step" and v is not None},
        }
        text = f"step {step} of {self._steps}: loss {line['loss']:.4f}"
        self._events.emit(
            "training.status", text=text, progress=progress, data={"status": "running"}
        )

    def _losses_so_far(self) -> list[tuple[int, float]]:
        with self._numbers.guard(str(self._evaluations.path)):
            lines = read_evaluations(self._evaluations.path)
            return [(line["step"], line[POOLED]) for line in lines if POOLED in line]
        return []

    def evaluation(self, step: int, found: Mapping[str, float]) -> None:
        """Tell what an evaluation found, by metric."""
        if POOLED in found:
            self.losses.append((step, found[POOLED]))
        self._evaluations.write({"step": step, **found})
        shown = {k: v for k, v in found.items() if k != POOLED or len(found) == 1} or found
        told = ", ".join(f"{name.removeprefix(PREFIX)} {v:.4f}" for name, v in shown.items())
        kind = "held out" if any(name.startswith(PREFIX) for name in found) else "score"
        self.tell(f"step {step}: {kind}: {told}")
        self._events.emit(
            "training.validation", text=f"step {step}: {told}", step=step, metrics=dict(found)
        )
        self._trackers.log(step, found)

    def checkpoint(self, path: Path, *, is_final: bool) -> None:
        """Tell of a checkpoint that has been written."""
        told = {"path": str(path), "label": path.name, "is_final": is_final}
        self._events.emit("training.checkpoint", text=f"saved {path.name}", checkpoint=told)
        self.bar.pause()

    def images(self, step: int, drawn: Sequence[Drawn], grid: Path | None) -> None:
        """Tell of validation images that have been written."""
        for path in [grid] if grid else [each.path for each in drawn]:
            self.tell(f"drawn: {path}")
        names = list(dict.fromkeys(each.name for each in drawn))
        of_names = {name: [each for each in drawn if each.name == name] for name in names}
        for name, several in of_names.items():
            title = f"Validation of step {step}: {name}"
            told = {"step": step, "validation_type": "final", "prompt": several[0].prompt}
            heard = self._events.is_listened_to
            images = [png_of(each.path) for each in several] if heard else []
            self._events.emit("validation.image", images=images, text=title, title=title, data=told)
        self._events.emit(
            "training.validation",
            text=f"validation images of step {step}",
            step=step,
            files=[each.path.name for each in drawn],
            prompts=[each.prompt for each in drawn],
            grid=grid.name if grid else None,
        )
        files = {name: [each.path for each in several] for name, several in of_names.items()}
        self._trackers.log_images(step, files)

    def tell(self, text: str) -> None:
        """Print a line as it is."""
        tell(self._console, text)

    def close(self) -> None:
        """Close the files of numbers, and draw `loss.png` of what they hold."""
        self._metrics.close()
        self._evaluations.close()
        plot = self.config.output_dir / CHART_NAME
        with self._numbers.guard(str(plot)):
            if metrics := read_metrics(self._metrics.path):
                plot_loss(metrics, plot, read_evaluations(self._evaluations.path))
        self._trackers.close()
