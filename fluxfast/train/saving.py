"""What a run writes to go on from, and what it leaves: checkpoints and the adapter's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from fluxfast.adapters.writing import modelspec_metadata
from fluxfast.config.run import TrainConfig
from fluxfast.model.transformer import FluxTransformer
from fluxfast.train import ema, resume, state
from fluxfast.train.adapter import adapter_metadata, kind_of
from fluxfast.train.build_data import RunData
from fluxfast.train.ema import WeightAverage
from fluxfast.train.intervals import Interval
from fluxfast.train.optim import averaged


class Saver:
    """Writes a run's checkpoints and its adapter.

    The adapter's file holds the weights to draw with (`optim.averaged`); where the run keeps a
    moving average of them, that is in the folder `ema` beside it.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: RunData,
        transformer: FluxTransformer,
        optimizer: Optimizer,
        average: WeightAverage | None,
    ) -> None:
        self._config, self._data, self._transformer = config, data, transformer
        self._optimizer, self._average = optimizer, average
        self._kind = kind_of(config)

    def checkpoint(
        self, step: int, facts: Mapping[str, Any], evaluations: Sequence[tuple[int, float]]
    ) -> Path:
        """Write the checkpoint of a step; returns its folder.

        facts: what it holds beside tensors, as JSON. evaluations: (step, loss) so far, of which the
        best checkpoints stay. Raises SaveError.
        """
        config = self._config
        return state.save_checkpoint(
            config.output_dir,
            step,
            adapter=self._kind.state(self._transformer),
            optimizer=self._optimizer,
            state={
                **facts,
                "fixed": resume.fixed(config)
                | {"lora_rank": config.lora_rank, "lora_alpha": config.alpha},
            },
            save_lora=lambda folder: self.adapter(folder, step),
            keep=config.checkpoints_total_limit,
            best=best_steps(evaluations, config.checkpoints_keep_best),
            average=None if self._average is None else self._average.state(),
        )

    def adapter(self, folder: Path, step: int) -> Path:
        """Write the adapter's file into a folder; returns its path."""
        with averaged(self._optimizer):
            path = self._write(folder, step)
        if self._average is not None:
            (folder / ema.FOLDER).mkdir(exist_ok=True)
            with self._average.in_place():
                self._write(folder / ema.FOLDER, step)
        return path

    def _write(self, folder: Path, step: int) -> Path:
        config = self._config
        metadata = modelspec_metadata(
            architecture=config.flavour.architecture + ("" if config.trains_all else "/lora"),
            title=config.tracker_run_name,
            resolution=self._data.resolution,
            global_step=step,
            trained_words=self._data.instance_prompts,
        ) | adapter_metadata(config)
        return self._kind.save(
            self._transformer, folder, style=config.lora_format, metadata=metadata
        )


def checkpoint_interval(config: TrainConfig) -> Interval:
    """When a run saves, beside its end."""
    return Interval(config.checkpoint_step_interval, config.checkpoint_epoch_interval or 0)


def best_steps(evaluations: Sequence[tuple[int, float]], number: int) -> list[int]:
    """The steps of the lowest losses, the lowest first; of equal ones the earliest.

    evaluations: (step, loss) in order. Step 0 is the base model, and no checkpoint.
    """
    trained = [(step, loss) for step, loss in evaluations if step > 0]
    ranked = sorted(trained, key=lambda each: each[1])
    return [step for step, _ in ranked[:number]]


def evaluations_since_best(evaluations: Sequence[tuple[int, float]]) -> int:
    """How many evaluations have followed the one of the lowest loss."""
    best = min(range(len(evaluations)), key=lambda i: evaluations[i][1], default=0)
    return max(0, len(evaluations) - 1 - best)
