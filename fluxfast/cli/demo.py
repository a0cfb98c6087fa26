"""`fluxfast-train demo`: write a small pipeline, photographs and a config, then train on them.

Training is the same as any run's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from fluxfast.cli.arguments import CommandLine
from fluxfast.cli.complain import complain
from fluxfast.config.run import load_config
from fluxfast.config.settings import ConfigError
from fluxfast.files import write_atomic

STEPS = 500
RESOLUTION = 256
TRANSFORMER_CONFIG = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 14, 14),
}
# validation's: three of the captions
PROMPTS = {
    "astronaut": "a portrait of an astronaut in an orange suit",
    "coffee": "a cup of coffee on a wooden table",
    "cat": "a close photo of a tabby cat",
}


def config_json(root: Path, steps: int) -> dict[str, object]:
    """The demo's config.json, in SimpleTuner's keys as in any run."""
    return {
        "model_type": "lora",
        "model_family": "flux",
        "model_flavour": "dev",
        "pretrained_model_name_or_path": str(root / "pipeline"),
        "output_dir": str(root / "output"),
        "data_backend_config": str(root / "multidatabackend.json"),
        "seed": 42,
        "lora_rank": 32,
        "lora_dropout": 0.0,
        "flux_lora_target": "ai-toolkit",
        "optimizer": "torch-adamw",
        "mixed_precision": "no",
        "learning_rate": 4e-3,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": min(20, steps // 4),
        "train_batch_size": 2,
        "gradient_checkpointing": False,
        "caption_dropout_probability": 0.0,
        "max_train_steps": steps,
        "num_train_epochs": 0,
        "checkpoint_step_interval": 200,
        "validation_step_interval": 0,
        "validation_resolution": f"{RESOLUTION}x{RESOLUTION}",
        "validation_num_inference_steps": 20,
        "validation_guidance": 1.0,
        "validation_seed": 1,
        "user_prompt_library": str(root / "user_prompt_library.json"),
    }


def dataset_json(root: Path) -> list[dict[str, object]]:
    """The demo's multidatabackend.json."""
    return [
        {
            "id": "photographs",
            "type": "local",
            "instance_data_dir": str(root / "images"),
            "caption_strategy": "textfile",
            "resolution": RESOLUTION,
            "resolution_type": "pixel_area",
            "crop": True,
            "crop_style": "center",
            "crop_aspect": "square",
            "repeats": 100,
            "cache_dir_vae": str(root / "cache" / "vae"),
        },
        {
            "id": "text-embeds",
            "type": "local",
            "dataset_type": "text_embeds",
            "default": True,
            "cache_dir": str(root / "cache" / "text"),
        },
    ]


def write_demo(root: Path, steps: int) -> Path:
    """Write pipeline, images, captions and configs under `root`; returns config.json's path."""
    write_data(root)
    return write_configs(root, steps)


def write_data(root: Path) -> None:
    """Write pipeline, images and captions under `root`."""
    # the pipeline's libraries take seconds to import; `--help` doesn't need them
    from fluxfast.demo.pipeline import PHOTOGRAPHS, make_pipeline, photographs

    make_pipeline(root / "pipeline", TRANSFORMER_CONFIG)
    (root / "images").mkdir(parents=True, exist_ok=True)
    for photograph in photographs():
        shutil.copyfile(photograph, root / "images" / photograph.name)
        write_atomic(
            (root / "images" / photograph.name).with_suffix(".txt"),
            PHOTOGRAPHS[photograph.name].encode(),
        )


def write_configs(root: Path, steps: int) -> Path:
    """Write the configs under `root`; returns config.json's path."""
    for name, content in (
        ("user_prompt_library.json", PROMPTS),
        ("multidatabackend.json", dataset_json(root)),
        ("config.json", config_json(root, steps)),
    ):
        write_atomic(root / name, json.dumps(content, indent=2).encode())
    return root / "config.json"


def main(words: Sequence[str]) -> int:
    parser = CommandLine(
        "fluxfast-train demo",
        description=(
            "Train a LoRA on a few photographs and a small FLUX.1-shaped model: no network, no "
            "GPU, no account. Options of a config work here as well, such as --lora_rank=8."
        ),
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output", type=Path, default=Path("fluxfast-demo"), help="folder to write (%(default)s)"
    )
    parser.add_argument(
        "--max-train-steps",
        "--max_train_steps",
        type=int,
        default=STEPS,
        help="steps to train (%(default)s)",
    )
    arguments, options = parser.parse_beside_config(words)
    if arguments.max_train_steps < 1:
        parser.error(f"--max-train-steps {arguments.max_train_steps}: expected at least 1")
    root = arguments.output.resolve()
    config = write_configs(root, arguments.max_train_steps)
    try:
        load_config(config, options)
    except ConfigError as error:
        complain(error)
        return 2
    write_data(root)
    print(f"config: {config}")
    print(f"data:   {root / 'multidatabackend.json'}")
    print(f"images: {root / 'images'}")
    from fluxfast.cli import train

    return train.main([str(config), *options])
