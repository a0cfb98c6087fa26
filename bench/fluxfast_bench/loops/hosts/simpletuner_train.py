"""SimpleTuner's own training script, with its own model: PEFT's LoRA, or a network of LyCORIS."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from fluxfast_bench.loops.loop import Loop, Prepare
from fluxfast_bench.loops.tiny import PIPELINE, logged, write_pictures

_TREAD = {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -2}]}
_START, _SCRIPT = "fluxfast_bench.loops.starts.unpinned", "simpletuner/train.py"


def _settings(steps: int) -> dict[str, Any]:
    return {
        "model_family": "flux",
        "model_flavour": "dev",
        "model_type": "lora",
        "pretrained_model_name_or_path": str(PIPELINE),
        "data_backend_config": "config/multidatabackend.json",
        "output_dir": "output",
        "lora_type": "standard",
        "lora_rank": 4,
        "lora_alpha": 4,
        "flux_lora_target": "all+ffs",
        # a LoRA with a dropout, as by default, is called as a module
        "lora_dropout": 0.0,
        "train_batch_size": 1,
        "num_train_epochs": 0,
        "max_train_steps": steps,
        "seed": 1,
        "mixed_precision": "no",
        "base_model_default_dtype": "fp32",
        "optimizer": "torch-sgd",
        "learning_rate": 1.0,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "report_to": "tensorboard",
        "resolution": 64,
        "resolution_type": "pixel",
        "validation_disable": True,
        "push_to_hub": False,
        "disable_benchmark": True,
    }


def _datasets(pictures: Path) -> list[dict[str, Any]]:
    return [
        {
            "id": "pictures",
            "type": "local",
            "instance_data_dir": str(pictures),
            "caption_strategy": "textfile",
            "metadata_backend": "discovery",
            "crop": True,
            "crop_aspect": "square",
            "crop_style": "center",
            "resolution": 64,
            "resolution_type": "pixel",
            "minimum_image_size": 0,
            "cache_dir_vae": "cache/vae",
        },
        {
            "id": "captions",
            "type": "local",
            "dataset_type": "text_embeds",
            "default": True,
            "cache_dir": "cache/text",
        },
    ]


_LOKR = {
    "algo": "lokr",
    "multiplier": 1.0,
    "linear_dim": 4,
    "linear_alpha": 4,
    "factor": 8,
    "apply_preset": {"target_module": ["Attention", "FeedForward"]},
}


def _prepare(
    checkout: Path, folder: Path, steps: int, *, more: dict[str, Any] | None = None
) -> Loop:
    pictures = write_pictures(folder / "pictures")
    config = folder / "config"
    config.mkdir()
    (config / "config.json").write_text(json.dumps(_settings(steps) | (more or {}), indent=1))
    (config / "multidatabackend.json").write_text(json.dumps(_datasets(pictures), indent=1))
    (config / "lycoris.json").write_text(json.dumps(_LOKR, indent=1))
    paths = [str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])]
    return Loop(
        words=["-m", _START, str(checkout / _SCRIPT)],
        saved="output/pytorch_lora_weights.safetensors",
        losses=lambda _, mine: logged(mine, "train_loss"),
        folder=folder,
        environment={
            "PYTHONPATH": os.pathsep.join(paths),
            "CONFIG_BACKEND": "json",
            "ACCELERATE_USE_CPU": "true",
            "HF_HUB_OFFLINE": "1",
        },
    )


CASES: dict[str, Prepare] = {
    "LoRA": _prepare,
    "LoRA checkpointing": partial(_prepare, more={"gradient_checkpointing": True}),
    "LyCORIS LoKr": partial(
        _prepare, more={"lora_type": "lycoris", "lycoris_config": "config/lycoris.json"}
    ),
    "LoRA int8 quanto": partial(_prepare, more={"base_model_precision": "int8-quanto"}),
    "LoRA int8 torchao": partial(_prepare, more={"base_model_precision": "int8-torchao"}),
    "LoRA TREAD": partial(_prepare, more={"tread_config": _TREAD}),
    "LoRA masked attention": partial(_prepare, more={"flux_attention_masked_training": True}),
}
