"""What a demo writes before it trains: the toy base, images with captions, and a run's two configs.

DIR/pipeline/                      the toy base, which all tasks train on
DIR/<task>/images/                 what is trained on: an image and a caption each
DIR/<task>/config.json             the run, as any other is written down
DIR/<task>/multidatabackend.json
DIR/<task>/output/                 what the run makes
DIR/<task>/demo.png, demo.json     the picture and the scores, which come last
"""

from __future__ import annotations

import filecmp
import json
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from fluxfast.demo import BASE
from fluxfast.demo.tasks import TASKS, Task, regularisation_scenes
from fluxfast.demo.toyworld import SIZE, draw
from fluxfast.files import atomic_file, write_atomic

STEPS = 400


def pipeline_of(root: Path) -> Path:
    return root / "pipeline"


def config_json(root: Path, steps: int, task: str = "subject") -> dict[str, object]:
    """A task's config.json, in SimpleTuner's keys as in any run."""
    folder = root / task
    return {
        "model_type": "lora",
        "model_family": "flux",
        "model_flavour": "dev",
        "pretrained_model_name_or_path": str(pipeline_of(root)),
        "output_dir": str(folder / "output"),
        "cache_dir": str(folder / "cache"),
        "data_backend_config": str(folder / "multidatabackend.json"),
        "seed": 42,
        "lora_rank": 32,
        "lora_dropout": 0.0,
        "flux_lora_target": "all+ffs",
        "optimizer": "torch-adamw",
        "mixed_precision": "no",
        "learning_rate": TASKS[task].learning_rate,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": min(10, steps // 4),
        # most steps at high noise, where it is decided which parts a thing has, and where
        "flow_schedule_shift": 5,
        "train_batch_size": 8,
        "gradient_checkpointing": False,
        # as the base was trained: it has never seen padding
        "flux_attention_masked_training": True,
        "caption_dropout_probability": 0.0,
        "max_train_steps": steps,
        "num_train_epochs": 0,
        # the datasets' shares of the steps are their probabilities, whatever their sizes
        "data_backend_sampling": "uniform",
        "checkpoint_step_interval": 100,
        "checkpoints_total_limit": 1,
        # the demo draws by itself, many images at once
        "validation_disable": True,
    }


def dataset_json(root: Path, task: str = "subject") -> list[dict[str, object]]:
    """A task's multidatabackend.json."""
    images = {
        "type": "local",
        "caption_strategy": "textfile",
        "resolution": SIZE,
        "resolution_type": "pixel_area",
        # a dataset whose epoch is over waits for the others, so no epoch ends within a run
        "repeats": 10_000,
    }
    share = TASKS[task].regularised
    return [
        {
            "id": task,
            "instance_data_dir": str(root / task / "images"),
            "probability": 1 - share,
        }
        | images,
        # without these, whatever the LoRA draws becomes a little like what it is taught
        {
            "id": "regularisation",
            "instance_data_dir": str(root / task / "regularisation"),
            "is_regularisation_data": True,
            "probability": share,
        }
        | images,
        {"id": "text-embeds", "type": "local", "dataset_type": "text_embeds", "default": True},
    ]


def write_demo(root: Path, steps: int = STEPS, task: str = "subject") -> Path:
    """Write the base, images, captions and configs under `root`; returns config.json's path."""
    write_data(root, TASKS[task])
    return write_configs(root, steps, task)


def write_data(root: Path, task: Task) -> None:
    """Write the base, and the task's images and captions, under `root`."""
    for file in (path for path in BASE.rglob("*") if path.is_file()):
        copy = pipeline_of(root) / file.relative_to(BASE)
        # a second task or run finds it there
        if not copy.exists() or not filecmp.cmp(file, copy, shallow=False):
            write_atomic(copy, file.read_bytes())
    regular = [(scene.caption, draw(scene)) for scene in regularisation_scenes()]
    taught = [(task.caption(scene), task.draw(scene)) for scene in task.training_scenes()]
    _write_images(root / task.name / "images", taught)
    _write_images(root / task.name / "regularisation", regular)


def _write_images(folder: Path, captioned: Iterable[tuple[str, Image.Image]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, (caption, image) in enumerate(captioned):
        write_captioned(folder / f"{number:02}.png", image, caption)


def write_captioned(path: Path, image: Image.Image, caption: str) -> None:
    """Write an image as PNG, and its caption beside it; an image that is there has its caption."""
    write_atomic(path.with_suffix(".txt"), caption.encode())
    with atomic_file(path) as stream:
        image.save(stream, format="PNG")


def write_configs(root: Path, steps: int, task: str) -> Path:
    """Write a task's configs under `root`; returns config.json's path."""
    folder = root / task
    for name, content in (
        ("multidatabackend.json", dataset_json(root, task)),
        ("config.json", config_json(root, steps, task)),
    ):
        write_atomic(folder / name, json.dumps(content, indent=2).encode())
    return folder / "config.json"
