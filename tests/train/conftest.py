"""A run small enough for tests: a few photographs, a pipeline of a few MB, a short config."""

import io
import json
import shutil

import pytest
from rich.console import Console

TINY = {
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 4, 8),
}


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """Pipeline, images and caches, filled by the first run that uses them."""
    from PIL import Image

    from fluxfast.demo.pipeline import make_pipeline
    from photographs import PHOTOGRAPHS, photographs

    root = tmp_path_factory.mktemp("run")
    make_pipeline(root / "pipeline", TINY)
    (root / "images").mkdir()
    for photograph in photographs()[:4]:
        with Image.open(photograph) as image:
            image.convert("RGB").resize((96, 96)).save(root / "images" / f"{photograph.stem}.png")
        (root / "images" / f"{photograph.stem}.txt").write_text(PHOTOGRAPHS[photograph.name])
    return root


@pytest.fixture
def write_config(workspace, tmp_path):
    """Write a config with some keys changed; returns its path. dataset: keys of the image entry to
    change; others: further entries of the dataloader's config.
    """

    def write(dataset=None, name="output", others=(), **changes):
        images = {
            "id": "photos",
            "type": "local",
            "instance_data_dir": str(workspace / "images"),
            "caption_strategy": "textfile",
            "resolution": 64,
            "resolution_type": "pixel_area",
            "crop": True,
            "crop_style": "center",
            "crop_aspect": "square",
            "repeats": 20,
            "cache_dir_vae": str(workspace / "cache" / "vae"),
        } | (dataset or {})
        texts = {
            "id": "texts",
            "type": "local",
            "dataset_type": "text_embeds",
            "default": True,
            "cache_dir": str(workspace / "cache" / "text"),
        }
        (tmp_path / "data.json").write_text(json.dumps([images, *others, texts]))
        config = {
            "model_type": "lora",
            "model_family": "flux",
            "model_flavour": "dev",
            "pretrained_model_name_or_path": str(workspace / "pipeline"),
            "output_dir": str(tmp_path / name),
            "data_backend_config": str(tmp_path / "data.json"),
            "seed": 11,
            "lora_rank": 3,
            "flux_lora_target": "all+ffs",
            "learning_rate": 1e-3,
            "train_batch_size": 2,
            "max_train_steps": 6,
            "checkpoint_step_interval": 2,
            "validation_disable": True,
            # the LoRA's title, which is its folder's otherwise: tests compare files to the byte
            "tracker_run_name": "a run of the tests",
        } | changes
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        return path

    return write


@pytest.fixture
def run(write_config):
    """Run a config in this process; returns the LoRA's path and what was printed."""
    from fluxfast.config.run import load_config
    from fluxfast.train.trainer import train

    def run_config(**changes):
        out = io.StringIO()
        return train(load_config(write_config(**changes)), Console(file=out, width=160)), out

    return run_config


@pytest.fixture
def trainer(write_config):
    """Builds the trainer of a config, as a run does before its first step."""
    from trainer_cases import make_trainer

    from fluxfast.config.run import load_config

    made = []

    def build(**settings):
        made.append(make_trainer(load_config(write_config(**settings))))
        return made[-1]

    yield build
    for each in made:
        each.close()


@pytest.fixture
def references(workspace, tmp_path):
    """Grey copies as references; returns the entry of such a dataset."""

    from PIL import Image, ImageOps

    def write(kind="reference_strict", id="before"):
        folder = tmp_path / id
        folder.mkdir(exist_ok=True)
        for path in (workspace / "images").glob("*.png"):
            with Image.open(path) as image:
                grey = ImageOps.grayscale(image).convert("RGB")
            grey = grey.resize((192, 96)) if kind == "reference_loose" else grey
            grey.save(folder / path.name)
        return {
            "id": id, "type": "local", "dataset_type": "conditioning", "conditioning_type": kind,
            "source_dataset_id": "photos", "instance_data_dir": str(folder),
            "cache_dir_vae": str(tmp_path / "cache" / id), "caption_strategy": None,
        }  # fmt: skip

    return write


@pytest.fixture
def server():
    """A web server that gets events."""
    from webhook_server import Server

    with Server() as served:
        yield served


@pytest.fixture
def pretend_gpu(monkeypatch):
    """Have all who choose find that GPU of the table on this machine; tensors stay on the CPU."""
    from fluxfast.memory import gpus

    def pretend(name):
        monkeypatch.setattr(gpus, "this_gpu", lambda device: gpus.find_gpu(name))

    return pretend


@pytest.fixture
def fresh_output(tmp_path):
    def remove(name="output"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)

    return remove
