"""Going on from a checkpoint with a config that may have changed since: what holds, what is said,
what is refused.

A checkpoint brings values (the adapter's, the optimiser's moments, the position in the data) and no
setting. Learning rate and schedule, objective and seed are the config's from the next step on, and
each that differs from what the steps so far were trained with is told in one line. What would make
another run of it is refused.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from fluxfast.config.datasets import DatasetDefaults, ImageDataset
from fluxfast.config.run import TrainConfig
from fluxfast.config.settings import shown
from fluxfast.train import state
from fluxfast.train.adapter import ADAPTER_KEYS
from fluxfast.train.state import SavedRun

# another value would be another run under the same name; the adapter's rank, alpha and modules are
# looked at by `adapter`
FIXED = ("train_batch_size", "gradient_accumulation_steps", "optimizer", "base_model_precision")
# settings that only decide what a run's adapter begins with
STARTING = ("init_lora", "lora_init_type")
# settings that no step's result depends on: where things lie, what is shown, how memory and time
# are spent
_NO_PART_IN_STEPS = (
    "model_type", "model_family", "output_dir", "cache_dir", "logging_dir", "data_backend_config", "resume_from_checkpoint",
    "i_know_what_i_am_doing", "lora_format", "report_to", "tracker_project_name", "tracker_run_name", "num_processes",
    "max_workers", "quantize_via", "offload_during_startup", "vae_batch_size", "vae_enable_slicing", "attention_mechanism",
    "cuda_graphs", "recompute", "gradient_checkpointing", "gradient_checkpointing_interval", "modulation_ahead", "vram_budget",
    "enable_group_offload", "group_offload_type", "group_offload_blocks_per_group", "group_offload_use_stream",
    "group_offload_to_disk_path", "checkpoint_step_interval", "checkpoints_total_limit", "disable_benchmark",
    "num_validation_images", "user_prompt_library", "lr_num_cycles", "aspect_bucket_alignment",
)  # fmt: skip
# settings that are recorded as what they come to, under one name
_SETTLED = ("seed", "max_train_steps", "num_train_epochs", "optimizer_beta1", "optimizer_beta2")
# keys of a dataset that say where it lies
_NO_PART_IN_DATA = {
    "id", "type", "dataset_type", "instance_data_dir", "cache_dir_vae", "text_embeds", "metadata_backend",
}  # fmt: skip


def compared(key: str) -> bool:
    """Whether a change of this option of the config, as it is written, is told when a run goes on."""
    elsewhere = (
        *FIXED,
        *ADAPTER_KEYS,
        *_SETTLED,
        *(field.name for field in fields(DatasetDefaults)),
    )
    return key not in (*elsewhere, *_NO_PART_IN_STEPS) and not key.startswith("validation_")


def settings(
    config: TrainConfig, datasets: Iterable[ImageDataset], *, seed: int, steps: int
) -> dict[str, Any]:
    """What a run's steps depend on, as JSON, for its checkpoints. seed and steps: those in use,
    however they were told.
    """
    told = {key: value for key, value in config.model_dump(mode="json").items() if compared(key)}
    told |= {
        "adam_beta1": config.betas[0],
        "adam_beta2": config.betas[1],
        "adam_epsilon": config.epsilon,
    }
    told |= {"seed": seed, "steps": steps}
    return told | {
        "datasets": {
            dataset.id: dataset.model_dump(mode="json", exclude=_NO_PART_IN_DATA)
            for dataset in datasets
        }
    }


def fixed(config: TrainConfig) -> dict[str, Any]:
    """The settings that can't change within a run, for its checkpoints."""
    return {key: getattr(config, key) for key in FIXED}


def run_seed(config: TrainConfig, saved: SavedRun | None) -> int:
    """The seed of everything random: the config's, else that of the run that goes on, else a new
    one.
    """
    if config.seed is not None and config.seed > 0:
        return config.seed
    return random.SystemRandom().randrange(1, 2**31) if saved is None else int(saved.state["seed"])


def find(config: TrainConfig) -> SavedRun | None:
    """The checkpoint that the config goes on from, read; None for a run from the start. ResumeError
    where it is damaged.
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
        # a dataset that has the run's, then and now, has been said above
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
        "values, or start anew in another "
        'output_dir (or with "resume_from_checkpoint": "")'
    )


def notes(saved: SavedRun, now: Mapping[str, Any]) -> list[str]:
    """A line for each setting of `now` (`settings`) that differs from the checkpoint's."""
    then = saved.state.get("settings")
    lines = []
    if then is None:
        then = _settings_of_version_1(saved)
        lines.append(
            f"{saved.path} is of an earlier version of fluxfast, without checksums and most "
            "settings: damage to it would not "
            f"be noticed, and of the settings only {', '.join(then)} are compared"
        )
    known = [key for key in now if key in then and key not in ("datasets", "steps")]
    lines += [_line(key, then[key], now[key], saved.step) for key in known if then[key] != now[key]]
    if then.get("steps", now["steps"]) != now["steps"]:
        lines.append(
            f"the run's length was {then['steps']} steps and is {now['steps']}: the learning "
            "rate follows the new one"
        )
    for id, dataset in now["datasets"].items():
        before = then.get("datasets", {}).get(id, {})
        lines += [
            f'dataset "{id}": {_line(key, before[key], value, saved.step)}'
            for key, value in dataset.items()
            if key in before and before[key] != value
        ]
    return lines


def _line(key: str, then: Any, now: Any, step: int) -> str:
    change = f'"{key}" was {shown(then)} and is {shown(now)}'
    if key in STARTING:
        return f"{change}: no effect, the adapter's values are the checkpoint's"
    return f"{change} from step {step + 1} on"


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
