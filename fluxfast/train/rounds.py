"""What looks at the model between steps: the evaluation loss, and validation images.

Neither changes what a run trains to, and neither ends it when it fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from rich.console import Console
from torch.optim import Optimizer

from fluxfast.adapters.lycoris import strength
from fluxfast.config.run import TrainConfig
from fluxfast.config.validation_adapters import ValidationAdapterRun
from fluxfast.train.assistant import drawing
from fluxfast.train.build import Parts
from fluxfast.train.build_data import RunData
from fluxfast.train.clip_score import ClipScore
from fluxfast.train.ema import WeightAverage
from fluxfast.train.evaluation import Evaluator
from fluxfast.train.events import say
from fluxfast.train.intervals import Interval
from fluxfast.train.objective import Objective
from fluxfast.train.optim import averaged
from fluxfast.train.reporting import Reporter
from fluxfast.train.run_events import RunEvents
from fluxfast.train.saving import best_steps
from fluxfast.train.validation import Drawn
from fluxfast.train.validation_adapters import with_adapters

# a label, "" where there is one kind only, and a context with these weights
Kind = tuple[str, Callable[[], AbstractContextManager[None]]]


class Rounds:
    """A run's evaluations and validations; `evaluations` and `validations` say when they are due.

    Each is done with the weights that are saved: the optimiser's average where it keeps one, and
    the moving average where the config asks for it.
    """

    def __init__(
        self,
        config: TrainConfig,
        parts: Parts,
        data: RunData,
        objective: Objective,
        optimizer: Optimizer,
        average: WeightAverage | None,
        report: Reporter,
        events: RunEvents,
        console: Console,
    ) -> None:
        self._config, self._transformer, self._validator = (
            config,
            parts.transformer,
            parts.validator,
        )
        self._optimizer, self._average = optimizer, average
        self._report, self._events, self._console = report, events, console
        self._say = partial(say, console)
        self.evaluations = evaluation_interval(config)
        self.validations = validation_interval(config)
        self._evaluator: Evaluator | None = None
        if data.prepared.held_out and not config.eval_loss_disable:
            self._evaluator = Evaluator(
                data.prepared,
                objective,
                parts.scheduler,
                images=config.num_eval_images,
                timesteps=config.eval_timesteps,
                pooled=config.eval_dataset_pooling,
                combine_references=config.combines_references,
                say=self._say,
            )
        self._clip: ClipScore | None = None
        if config.evaluation_type == "clip":
            self._clip = ClipScore(
                config.pretrained_evaluation_model_name_or_path, parts.transformer.device
            )

    def before_training(self, step: int) -> None:
        """What is done before the first step of a run, or of a resumed one."""
        config = self._config
        if config.validation_on_startup or (step == 0 and not config.disable_benchmark):
            self.draw(step)
        if step == 0:
            self.evaluate(step)

    def evaluate(self, step: int) -> None:
        """Compute the evaluation loss after a step, where there is one, and report it."""
        if self._evaluator is None or any(at == step for at, _ in self._report.losses):
            return
        with self._surviving("Evaluation"):
            with self._weights(step)[0][1]():
                found = self._evaluator.run(step, self._console)
            if found:
                self._report.evaluation(step, found)

    def is_among_best(self, step: int) -> bool:
        """Whether a step's evaluation is one of those whose checkpoints stay."""
        keep = self._config.checkpoints_keep_best
        return keep > 0 and step in best_steps(self._report.losses, keep)

    def draw(self, step: int, *, is_last: bool = False) -> None:
        """Draw and report validation images after a step, where the config asks for any."""
        if self._validator is None:
            return
        stage: AbstractContextManager[None] = nullcontext()
        if step == 0 or is_last:
            stage = self._events.stage("benchmark_base_model" if step == 0 else "final_validation")
        with self._surviving("Validation"), stage:
            drawn = []
            for label, weights in self._kinds(step):
                with (
                    weights(),
                    drawing(self._transformer, self._config),
                    strength(self._transformer, self._config.validation_lycoris_strength),
                ):
                    drawn += self._validator.run(step, self._console, label=label)
            self._tell_drawn(step, drawn)
            if self._clip is not None and drawn:
                scores = self._clip.run([(each.label, each.image, each.prompt) for each in drawn])
                self._report.evaluation(step, scores)

    def _tell_drawn(self, step: int, drawn: list[Drawn]) -> None:
        assert self._validator is not None
        grid = self._validator.grid(step, drawn)
        self._report.images(step, drawn, grid)

    def _weights(self, step: int) -> list[Kind]:
        """The kinds of weights to look at after a step: at step 0, which is the base, one."""
        trained: Kind = ("", partial(averaged, self._optimizer))
        how = self._config.ema_validation
        if self._average is None or how == "none" or step == 0:
            return [trained]
        if how == "ema_only":
            return [("", self._average.in_place)]
        return [trained, ("ema", self._average.in_place)]

    def _kinds(self, step: int) -> list[Kind]:
        """The same for drawing, with the further LoRAs that the config names."""
        weights, runs = self._weights(step), self._config.validation_adapters
        if step == 0 or not runs:
            return weights
        beside: list[Kind] = []
        for label, own in weights:
            for run in runs:
                name = f"{label}_{run.label}" if label else run.label
                beside.append((name, partial(self._both, own, run)))
        only = self._config.validation_adapter_mode == "adapter_only"
        return beside if only else [*weights, *beside]

    @contextmanager
    def _both(
        self, weights: Callable[[], AbstractContextManager[None]], run: ValidationAdapterRun
    ) -> Iterator[None]:
        with weights(), with_adapters(self._transformer, run):
            yield

    @contextmanager
    def _surviving(self, what: str) -> Iterator[None]:
        """Tell and announce a failure in the block, and go on."""
        try:
            yield
        # whatever fails here, the steps so far and those to come are worth more
        except Exception as error:
            told = str(error) or type(error).__name__
            self._say(f"{what.lower()} failed, the run goes on: {told}")
            self._events.emit_error(f"{what} has failed", error)
        finally:
            self._report.bar.pause()


def evaluation_interval(config: TrainConfig) -> Interval:
    """When the evaluation loss is computed: with each checkpoint, unless the config says."""
    steps, epochs = config.eval_steps_interval, config.eval_epoch_interval
    if steps is None and epochs is None:
        steps, epochs = config.checkpoint_step_interval, config.checkpoint_epoch_interval
    return Interval(steps or 0, epochs or 0)


def validation_interval(config: TrainConfig) -> Interval:
    """When validation images are drawn, beside the beginning and the end."""
    return Interval(
        config.validation_step_interval,
        config.validation_epoch_interval or 0,
        config.validate_after_step or 0,
        config.validate_after_epoch or 0,
    )
