"""What `fluxfast-bench quality` trains: the demo's subject on the toy base, as any run is trained.

Beside the training images lie images that are held out, whose loss the trainer computes at the end,
always with the same noise.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

from fluxfast.config.run import TrainConfig, load_config
from fluxfast.config.settings import ConfigError
from fluxfast.data.model_folders import file_hash
from fluxfast.demo.folder import config_json as config_of_demo
from fluxfast.demo.folder import write_captioned
from fluxfast.demo.tasks import TASKS, Task, old_scenes, share_shown
from fluxfast.demo.toyworld import SIZE
from fluxfast.files import without_spaces, write_atomic
from fluxfast_bench.quality.modes import Mode

TASK = TASKS["subject"]
HELD_OUT = 16


def config_json(root: Path, base: Path, steps: int) -> dict[str, Any]:
    """The demo's config, in other folders and with an evaluation, without what a mode changes."""
    return config_of_demo(root, steps) | {
        "pretrained_model_name_or_path": str(base),
        "data_backend_config": str(root / "multidatabackend.json"),
        "cache_dir": str(root / "cache"),
        # at the demo's rate, without regularisation, the loss of what is held out rises again
        "learning_rate": 3e-3,
        "resume_from_checkpoint": "",
        "checkpoint_step_interval": 0,
        "eval_steps_interval": steps,
        "eval_timesteps": 8,
        "num_eval_images": HELD_OUT,
    }


def dataset_json(root: Path) -> list[dict[str, Any]]:
    """The run's datasets: the training images, those that are held out, and the text cache."""
    images = {
        "type": "local",
        "caption_strategy": "textfile",
        "resolution": SIZE,
        "resolution_type": "pixel_area",
    }
    return [
        images | {"id": "training", "instance_data_dir": str(root / "training"), "repeats": 1000},
        images
        | {
            "id": "held-out",
            "dataset_type": "eval",
            "instance_data_dir": str(root / "held-out"),
        },
        {"id": "text-embeds", "type": "local", "dataset_type": "text_embeds", "default": True},
    ]


def write_task(root: Path, task: Task = TASK) -> None:
    """Write the images, their captions and the list of datasets under `root`."""
    for folder, scenes in (
        ("training", task.training_scenes()),
        ("held-out", task.asked_scenes(HELD_OUT)),
    ):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number, scene in enumerate(scenes):
            path = root / folder / f"{number:03}.png"
            write_captioned(path, task.draw(scene), task.caption(scene))
    write_atomic(root / "multidatabackend.json", json.dumps(dataset_json(root)).encode())


def mode_config(root: Path, base: Path, steps: int, mode: Mode, seed: int) -> TrainConfig:
    """The config of a mode's run with a seed, whose files are in a folder of their own in `root`.

    Raises ConfigError where the mode can't be.
    """
    folder = root / f"{without_spaces(mode.name)}-{seed}"
    keys = config_json(root, base, steps) | dict(mode.changes)
    keys |= {"seed": seed, "output_dir": str(folder / "output")}
    if mode.lycoris is not None:
        keys["lycoris_config"] = str(folder / "lycoris_config.json")
        # a rank, and the names of linears, are LyCORIS's own options
        del keys["lora_rank"], keys["lora_dropout"], keys["flux_lora_target"]
        write_atomic(folder / "lycoris_config.json", json.dumps(mode.lycoris).encode())
    write_atomic(folder / "config.json", json.dumps(keys).encode())
    return load_config(folder / "config.json")


@dataclass(frozen=True)
class Scores:
    """What the checker says of drawings.

    Attributes:
        concept: share of the drawings of the new concept that show it, from 0 to 1.
        old: the same of what the base knew before.
    """

    concept: float
    old: float


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        loss_before, loss: the evaluation loss before the first step and after the last one, in the
            precision that is trained in.
        scores: of drawings by the unquantised base in fp32 with the LoRA.
        digest: of the LoRA's values; equal where every bit is.
        seconds: that training and scoring took.
    """

    loss_before: float
    loss: float
    scores: Scores
    digest: str
    seconds: float


def problems_of(config: TrainConfig) -> tuple[str, ...]:
    """Why a run can't be trained on this machine; empty where it can."""
    from fluxfast.train import preflight

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        preflight.check(config, device)
    except ConfigError as error:
        return error.problems
    return ()


def train(config: TrainConfig, base: Path, images: int) -> Outcome:
    """Train a run to its end, and score its LoRA by as many drawings of new and of old."""
    from fluxfast.train.evaluation import POOLED
    from fluxfast.train.events import EVALUATIONS_NAME, read_evaluations
    from fluxfast.train.trainer import train as train_run

    begin = time.monotonic()
    lora = train_run(config, Console(file=io.StringIO()))
    first, last = read_evaluations(config.output_dir / EVALUATIONS_NAME)
    scores = score(base, lora, images)
    seconds = time.monotonic() - begin
    return Outcome(first[POOLED], last[POOLED], scores, digest_of(lora), seconds)


def score(base: Path, lora: Path | None, images: int, task: Task = TASK) -> Scores:
    """The checker's scores of the base, with a LoRA or alone."""
    from fluxfast.demo import sampling

    sampler = sampling.Sampler(base, lora=lora)
    new, old = task.asked_scenes(images), old_scenes(images)
    prompts = [*map(task.caption, new), *(scene.caption for scene in old)]
    drawn = sampler.draw(prompts, size=SIZE, steps=sampling.DENOISING)
    return Scores(share_shown(drawn[:images], new, task.shows), share_shown(drawn[images:], old))


def digest_of(lora: Path) -> str:
    """A hash of a LoRA's names and values, whatever else its file says."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(lora).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint(folder: Path) -> str:
    """A hash of every file of a pipeline's folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()} {file_hash(path)}".encode())
    return digest.hexdigest()[:16]
