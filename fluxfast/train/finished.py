"""A run that is complete already: found before a model is loaded, told, and left as it is."""

from __future__ import annotations

import filecmp
from pathlib import Path

from fluxfast.config.run import TrainConfig
from fluxfast.train.adapter import kind_of
from fluxfast.train.state import SavedRun


class Finished(Exception):
    """The run has no step left and its LoRA is written; the message says what trains it on."""

    def __init__(self, config: TrainConfig, lora: Path, done: int) -> None:
        """done: the steps that it has trained."""
        option = "max_train_steps" if config.max_train_steps else "num_train_epochs"
        asked = getattr(config, option)
        least = done if config.max_train_steps else asked
        what = f"the {kind_of(config).label}"
        super().__init__(
            f"This run is complete: {done} steps are trained.\n"
            f"  {what:11} {lora}\n"
            f'  train on    raise "{option}" above {least} (it is {asked})\n'
            '  start anew  choose another "output_dir"'
        )
        self.lora = lora


def check(config: TrainConfig, saved: SavedRun | None, steps: int) -> None:
    """Raise Finished where a run of so many steps has come to its end before.

    saved: the checkpoint that the run would go on from. A run that uploads its adapter is never
    taken for finished, so that the same command can upload it once more.
    """
    if config.push_to_hub or saved is None or saved.step < steps:
        return
    file_of = kind_of(config).file_of
    lora, last = file_of(config.output_dir), file_of(saved.path)
    # a run that was stopped in its last images has not written its own file yet
    if lora.exists() and last.exists() and filecmp.cmp(lora, last, shallow=False):
        raise Finished(config, lora, saved.step)
