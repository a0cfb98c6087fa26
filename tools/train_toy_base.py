"""Train the toy base that `fluxfast-train demo` teaches something new.

    python tools/train_toy_base.py FOLDER [--steps 6000] [--install] [options of a config]

Draws scenes of the toy world into FOLDER, puts a random pipeline beside them, and trains its whole
transformer with `fluxfast-train` on a config that it writes: FOLDER/config.json. What is there
already is not drawn again, and training goes on from the newest checkpoint, so the command may be
stopped at any time and given again. However it ends, it prints the losses so far beside those of
the base that is shipped. In the end it draws two hundred captions of combinations that were held
out, and prints how many of them the checker sees as they were asked for.

--install puts the result into `fluxfast/demo/base`, and the loss curve, the score and a sheet of
samples into `tools/toy-base`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import track

from fluxfast.cli import train
from fluxfast.demo.folder import write_captioned
from fluxfast.demo.pipeline import BASE_CONFIG, make_pipeline
from fluxfast.demo.sampling import DENOISING, GUIDANCE, Sampler
from fluxfast.demo.tasks import old_scenes, share_shown
from fluxfast.demo.toyworld import SIZE, Scene, draw, scenes
from fluxfast.files import atomic_folder, write_atomic
from fluxfast.progress import counting
from fluxfast.train.events import read_metrics

SCENES, ASKED = 12_000, 200
STEPS, BATCH = 6_000, 64
REPOSITORY = Path(__file__).parents[1]
SHIPPED, RESULTS = REPOSITORY / "fluxfast/demo/base", REPOSITORY / "tools/toy-base"


def config_json(folder: Path, steps: int) -> dict[str, object]:
    return {
        "model_type": "full",
        "model_family": "flux",
        "model_flavour": "dev",
        "pretrained_model_name_or_path": str(folder / "pipeline"),
        "output_dir": str(folder / "output"),
        "cache_dir": str(folder / "cache"),
        "data_backend_config": str(folder / "multidatabackend.json"),
        "seed": 1,
        "optimizer": "adamw_bf16",
        "mixed_precision": "bf16",
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 300,
        "train_batch_size": BATCH,
        "gradient_checkpointing": False,
        "flux_attention_masked_training": True,
        "caption_dropout_probability": 0.1,
        "use_ema": True,
        "ema_decay": 0.999,
        "max_train_steps": steps,
        "num_train_epochs": 0,
        "checkpoint_step_interval": 500,
        "checkpoints_total_limit": 2,
        "validation_step_interval": 0,
        "validation_disable": True,
    }


def dataset_json(folder: Path) -> list[dict[str, object]]:
    return [
        {
            "id": "toyworld",
            "type": "local",
            "instance_data_dir": str(folder / "images"),
            "caption_strategy": "textfile",
            "resolution": SIZE,
            "resolution_type": "pixel_area",
            "crop": True,
            "crop_aspect": "square",
            "repeats": 1000,
        },
        {"id": "text-embeds", "type": "local", "dataset_type": "text_embeds", "default": True},
    ]


def _write_scene(at: Path, scene: Scene) -> None:
    write_captioned(at, draw(scene), scene.caption)


def write_data(folder: Path) -> None:
    """The scenes to train on, of which those that are there are left alone."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    wanted = [(images / f"{i:05}.png", scene) for i, scene in enumerate(scenes(1, SCENES))]
    missing = [(at, scene) for at, scene in wanted if not at.exists()]
    with ProcessPoolExecutor(os.cpu_count()) as executor:
        drawn = executor.map(_write_scene, *zip(*missing, strict=True)) if missing else ()
        for _ in track(drawn, "drawing scenes", total=len(missing)):
            pass


def write_configs(folder: Path, steps: int) -> Path:
    for name, content in (
        ("multidatabackend.json", dataset_json(folder)),
        ("config.json", config_json(folder, steps)),
    ):
        write_atomic(folder / name, json.dumps(content, indent=2).encode())
    return folder / "config.json"


def losses_of(folder: Path) -> dict[int, float]:
    """The mean loss of every hundred steps so far, by the last of them."""
    parts: dict[int, list[float]] = {}
    for line in read_metrics(folder / "output" / "metrics.jsonl"):
        parts.setdefault(-(-line["step"] // 100) * 100, []).append(line["loss"])
    return {step: sum(part) / len(part) for step, part in parts.items() if len(part) == 100}


def compare(folder: Path) -> None:
    """Print this run's losses beside those of the base that is shipped."""
    path = RESULTS / "losses.json"
    recorded = json.loads(path.read_text()) if path.exists() else {}
    print("steps up to   loss   of the shipped base")
    for step, loss in losses_of(folder).items():
        print(f"{step:11,} {loss:6.4f}   {recorded.get(str(step), float('nan')):.4f}")


def assemble(folder: Path) -> Path:
    """The pipeline with the averaged transformer; returns its folder."""
    whole = folder / "base"
    shutil.rmtree(whole, ignore_errors=True)
    with atomic_folder(whole) as new:
        shutil.copytree(folder / "pipeline", new, dirs_exist_ok=True)
        shutil.rmtree(new / "transformer")
        shutil.copytree(folder / "output" / "ema" / "transformer", new / "transformer")
    return whole


def sheet(images: list[Image.Image], columns: int = 8) -> Image.Image:
    rows = -(-len(images) // columns)
    whole = Image.new("RGB", (columns * SIZE, rows * SIZE), "white")
    for place, image in enumerate(images):
        whole.paste(image, (place % columns * SIZE, place // columns * SIZE))
    return whole


def score(base: Path, folder: Path) -> dict[str, object]:
    """Draw held-out captions, write some of them to samples.png, and let the checker see all."""
    asked = old_scenes(ASKED)
    with counting(Console()) as progress:
        bar = progress.add_task("drawing held-out captions", total=3 * ASKED)
        sampler, prompts = Sampler(base), [scene.caption for scene in asked]
        by_guidance = {
            guidance: sampler.draw(
                prompts,
                guidance_real=guidance,
                drawn=lambda n: progress.advance(bar, n),
            )
            for guidance in (1.0, 2.0, GUIDANCE)
        }
    drawn = by_guidance[GUIDANCE]
    sheet(drawn[:48]).quantize(256).save(folder / "samples.png")
    shares = {
        f"object, colour and place, guidance {guidance:g}": share_shown(images, asked)
        for guidance, images in by_guidance.items()
    }
    for name, share in shares.items():
        print(f"{name}: {share:.1%} of {ASKED} as asked for")
    return {"captions": ASKED, "steps": DENOISING, "shares": shares}


def install(base: Path, folder: Path, scored: dict[str, object]) -> None:
    """Make this base the shipped one, with what is known of it."""
    shutil.rmtree(SHIPPED, ignore_errors=True)
    shutil.copytree(base, SHIPPED)
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_atomic(RESULTS / "losses.json", json.dumps(losses_of(folder), indent=1).encode())
    write_atomic(RESULTS / "score.json", json.dumps(scored, indent=1).encode())
    for path in (folder / "samples.png", folder / "output" / "loss.png"):
        shutil.copyfile(path, RESULTS / path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the toy base.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--install", action="store_true", help="make the result the shipped base")
    arguments, options = parser.parse_known_args()
    folder = arguments.folder.resolve()
    if not (folder / "pipeline" / "model_index.json").exists():
        make_pipeline(folder / "pipeline", BASE_CONFIG, to_train_whole=True)
    write_data(folder)
    status = train.main([str(write_configs(folder, arguments.steps)), *options])
    compare(folder)
    if status:
        raise SystemExit(status)
    base = assemble(folder)
    scored = score(base, folder)
    if arguments.install:
        install(base, folder, scored)


if __name__ == "__main__":
    main()
