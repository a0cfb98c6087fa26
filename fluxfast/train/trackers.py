"""Trackers: programs and sites that keep a run's metrics and images beside those of other runs.

What they are sent of the config is its public part (`config.public`). A tracker that fails is told
once, and neither the run nor another tracker ends by it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from fluxfast.config.option import facts_of
from fluxfast.config.public import public_settings
from fluxfast.config.run import TrainConfig
from fluxfast.train.events import Numbers

# SimpleTuner's names of metrics that `metrics.jsonl` calls otherwise
_NAMES = {"loss": "train_loss"}
# options that a run may be resumed with other values of, and that say nothing of how it trains
_OF_LENGTH = frozenset({"max_train_steps", "num_train_epochs"})
# seconds to wait for a site at the start and at the end of a run; its local files stay
_START_TIMEOUT, _END_TIMEOUT = 60, 120


class Tracker(Protocol):
    """What a tracker does with a step's numbers and images. Each call may fail."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def log_images(self, step: int, images: Mapping[str, Sequence[Image.Image]]) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """All trackers that a config's `report_to` names."""

    def __init__(
        self, config: TrainConfig, *, seed: int, done: int, say: Callable[[str], None]
    ) -> None:
        """seed: the run's. done: steps before it goes on; 0 for a new run."""
        self._guard = Numbers(say).guard
        self._trackers: dict[str, Tracker] = {}
        if config.report_to == "all":
            say(f"report_to all: {', '.join(config.trackers)}")
        for name in config.trackers:
            with self._guard(name):
                self._trackers[name] = _KINDS[name](config, seed, done)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send a step's metrics, under the names of `metrics.jsonl`; others than numbers stay."""
        numbers = {
            _NAMES.get(name, name): value
            for name, value in metrics.items()
            if isinstance(value, int | float) and name != "step"
        }
        for name, tracker in self._trackers.items():
            with self._guard(name):
                tracker.log(step, numbers)

    def log_images(self, step: int, files: Mapping[str, Sequence[Path]]) -> None:
        """Send validation images, by their prompts' nicknames."""
        if not self._trackers:
            return
        with self._guard("images for trackers"):
            images = {name: [_read(path) for path in paths] for name, paths in files.items()}
            for name, tracker in self._trackers.items():
                with self._guard(name):
                    tracker.log_images(step, images)

    def close(self) -> None:
        """Send what is still here; takes two minutes at most."""
        for name, tracker in self._trackers.items():
            with self._guard(name):
                tracker.close()
        self._trackers = {}


def _read(path: Path) -> Image.Image:
    with Image.open(path) as file:
        return file.convert("RGB")


class TensorBoard:
    """Files for TensorBoard, in a folder of the project's name below `logging_dir`."""

    def __init__(self, config: TrainConfig, seed: int, done: int) -> None:
        # it takes seconds to import
        from torch.utils.tensorboard import SummaryWriter

        folder = config.output_dir / config.logging_dir / config.tracker_project_name
        # the steps that a resumed run repeats take the place of those that were there
        self._writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None)
        told = json.dumps(public_settings(config) | {"seed": seed}, indent=2)
        self._writer.add_text("config", "```\n" + told + "\n```", done)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_images(self, step: int, images: Mapping[str, Sequence[Image.Image]]) -> None:
        for nickname, drawn in images.items():
            for i, image in enumerate(drawn):
                tag = f"validation/{nickname}" + (f"/{i}" if len(drawn) > 1 else "")
                self._writer.add_image(tag, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, which a resumed run of ours goes on with."""

    def __init__(self, config: TrainConfig, seed: int, done: int) -> None:
        # it takes seconds to import, and is installed with an extra
        import wandb

        folder = config.output_dir / config.logging_dir
        folder.mkdir(parents=True, exist_ok=True)
        self._wandb, self._is_table = wandb, config.tracker_image_layout == "table"
        settings = wandb.Settings(
            init_timeout=_START_TIMEOUT,
            login_timeout=_START_TIMEOUT,
            finish_timeout=_END_TIMEOUT,
            # no name of this machine, its folders or its repositories is sent
            x_disable_meta=True,
            x_disable_machine_info=True,
            disable_git=True,
            disable_code=True,
            console="off",
            host="",
        )
        self._run = wandb.init(
            project=config.tracker_project_name,
            name=config.tracker_run_name,
            id=run_id(config, seed),
            resume="allow",
            config=public_settings(config) | {"seed": seed},
            # a resumed run may have other values
            allow_val_change=True,
            dir=str(folder),
            settings=settings,
        )
        # a resumed run repeats steps, which W&B's own count would not take
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def log_images(self, step: int, images: Mapping[str, Sequence[Image.Image]]) -> None:
        drawn = [(name, each) for name, several in images.items() for each in several]
        made = [(name, self._wandb.Image(each, caption=name)) for name, each in drawn]
        shown: Any = [image for _, image in made]
        if self._is_table:
            shown = self._wandb.Table(columns=["prompt", "image"], data=[list(row) for row in made])
        self._run.log({"step": step, "validation": shown})

    def close(self) -> None:
        self._run.finish()


_KINDS: Mapping[str, Callable[[TrainConfig, int, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def run_id(config: TrainConfig, seed: int) -> str:
    """The id of a run at a site of trackers: the same for the same run when it is resumed.

    It is a hash of what decides the run's result, of its names and of its folder, so that runs on
    other data have others. The folder can't be read from it.
    """
    fields = type(config).model_fields
    told = {
        name: value
        for name, value in public_settings(config).items()
        if name not in _OF_LENGTH and facts_of(fields[name]).on_resume != "ignored"
    }
    names = (config.tracker_project_name, config.tracker_run_name, str(config.output_dir.resolve()))
    text = json.dumps([told, seed, names], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
