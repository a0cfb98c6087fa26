"""Going on from a checkpoint with a config that may have changed since.

A checkpoint brings values (the adapter's, the optimiser's moments, the position in the data) and no
setting. Learning rate, schedule, objective and seed are the config's from the next step on, and a
line says so for each that differs from what the steps so far were trained with. A change that would
make another run of it is refused. Which of these holds for an option, its field says
(`OptionFacts.on_resume`).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from fluxfast.config.datasets import DatasetDefaults, ImageDataset
from fluxfast.config.option import OnResume, facts_of
from fluxfast.config.run import TrainConfig
from fluxfast.config.settings import shown
from fluxfast.train import state
from fluxfast.train.state import SavedRun

# keys of a dataset that say where it lies, and when its latents are computed
_NO_PART_IN_DATA = {
    *("id", "type", "dataset_type", "instance_data_dir", "cache_dir_vae", "text_embeds"),
    *("origin", "parquet", "metadata_backend", "vae_cache_ondemand", "vae_cache_disable"),
}


def options_that_are(*on_resume: OnResume, fields: Mapping[str, FieldInfo]) -> list[str]:
    """The options that say one of these of themselves.

    A dataset that names no value of its own has the run's, so that the options of `DatasetDefaults`
    are compared with the datasets and are left out.
    """
    of_datasets = {field.name for field in dataclasses.fields(DatasetDefaults)}
    return [
        name
        for name, field in fields.items()
        if facts_of(field).on_resume in on_resume and name not in of_datasets
    ]


def settings(
    config: TrainConfig, datasets: Iterable[ImageDataset], *, seed: int, steps: int
) -> dict[str, Any]:
    """What a run's steps depend on, as JSON, for its checkpoints.

    seed and steps are those in use, however the config came to them.
    """
    compared = options_that_are("told", "start_only", fields=type(config).model_fields)
    told = config.model_dump(mode="json", include=set(compared))
    told |= {
        "model_type": config.model_type,
        "adam_beta1": config.betas[0],
        "adam_beta2": config.betas[1],
        "adam_epsilon": config.epsilon,
        "adam_weight_decay": config.weight_decay,
        "seed": seed,
        "steps": steps,
    }
    of_datasets = {
        dataset.id: dataset.model_dump(mode="json", exclude=_NO_PART_IN_DATA)
        for dataset in datasets
    }
    return told | {"datasets": of_datasets}


def fixed(config: TrainConfig) -> dict[str, Any]:
    """The settings that can't change within a run, for its checkpoints."""
    names = options_that_are("refused", fields=type(config).model_fields)
    return {name: getattr(config, name) for name in names}


def run_seed(config: TrainConfig, saved: SavedRun | None) -> int:
    """The seed of everything random: the config's, else the resumed run's, else a new one."""
    if config.seed is not None and config.seed > 0:
        return config.seed
    return random.SystemRandom().randrange(1, 2**31) if saved is None else int(saved.state["seed"])


def find(config: TrainConfig) -> SavedRun | None:
    """The checkpoint that the config goes on from, read; None for a run from the start.

    Raises ResumeError where it is damaged.
    """
    path = state.find_checkpoint(config.output_dir, config.resume_from_checkpoint)
    return None if path is None else state.load_checkpoint(path)


def refused(config: TrainConfig, saved: SavedRun, datasets: Iterable[ImageDataset]) -> list[str]:
    """For each setting that can't change within a run, and has: what it was and is."""
    then, batches = saved.state["fixed"], saved.state["sampler"].get("datasets", {})
    changes = [
        f"{key} {then.get(key)}, this run has {now}"
        for key, now in fixed(config).items()
        if then.get(key) != now
    ]
    for dataset in datasets:
        now = dataset.train_batch_size or config.train_batch_size
        before = batches.get(dataset.id, {}).get("batch_size", now)
        # a dataset that takes the run's batch size, then and now, has been named above
        if before != now and (before, now) != (
            then.get("train_batch_size"),
            config.train_batch_size,
        ):
            changes.append(f'dataset "{dataset.id}": train_batch_size {before}, this run has {now}')
    return changes


def refusal(saved: SavedRun, changes: list[str]) -> str:
    """The problem that these changes are, and what to do about it."""
    return (
        f"{saved.path}: it was written with {'; with '.join(changes)}; go on with the same "
        'values, or start anew in another output_dir (or with "resume_from_checkpoint": "")'
    )


def notes(saved: SavedRun, now: Mapping[str, Any]) -> list[str]:
    """A line for each setting of `now` (`settings`) that differs from the checkpoint's."""
    then = saved.state.get("settings")
    lines = []
    if then is None:
        then = _settings_of_version_1(saved)
        lines.append(
            f"{saved.path} is of an earlier version of fluxfast, without checksums and most "
            "settings: damage to it would not be noticed, and of the settings only "
            f"{', '.join(then)} are compared"
        )
    starting = options_that_are("start_only", fields=TrainConfig.model_fields)
    for key in [key for key in now if key in then and key not in ("datasets", "steps")]:
        if then[key] != now[key] and key in starting:
            change = _change(key, then[key], now[key])
            lines.append(f"{change}: no effect, the adapter's values are the checkpoint's")
        elif then[key] != now[key]:
            lines.append(f"{_change(key, then[key], now[key])} from step {saved.step + 1} on")
    if then.get("steps", now["steps"]) != now["steps"]:
        lines.append(
            f"the run's length was {then['steps']} steps and is {now['steps']}: the learning "
            "rate follows the new one"
        )
    for id, dataset in now["datasets"].items():
        before = then.get("datasets", {}).get(id, {})
        lines += [
            f'dataset "{id}": {_change(key, before[key], value)} from step {saved.step + 1} on'
            for key, value in dataset.items()
            if key in before and before[key] != value
        ]
    return lines


def newer(output_dir: Path, step: int) -> list[str]:
    """A line on checkpoints of later steps than the one that a run goes on from, if there are."""
    later = [p.name for p in state.checkpoints(output_dir) if int(p.name.split("-")[1]) > step]
    told = 'of a longer run; move what is of no use away, or the next "latest" is the newest'
    return [f"{', '.join(later)}: {told}"] if later else []


def _change(key: str, then: Any, now: Any) -> str:
    return f'"{key}" was {shown(then)} and is {shown(now)}'


def _settings_of_version_1(saved: SavedRun) -> dict[str, Any]:
    """What a checkpoint of version 1 says of its run's settings: the optimiser's, and the seed."""
    group = saved.optimizer["param_groups"][0]
    return {
        "learning_rate": group.get("initial_lr", group["lr"]),
        "adam_beta1": group["betas"][0],
        "adam_beta2": group["betas"][1],
        "adam_epsilon": group["eps"],
        "adam_weight_decay": group["weight_decay"],
        "seed": saved.state["seed"],
    }
