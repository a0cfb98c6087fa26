"""OneTrainer's `scripts/train.py`, which a config file tells everything.

Beside its requirements of importance to training (`parse`, `av`, and `mgds` from GitHub), it needs
none of what it has for other models, for its windows and for the cloud. Its products of W8A8 need a
GPU.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from fluxfast_bench.loops.loop import Loop, Prepare
from fluxfast_bench.loops.tiny import PIPELINE, logged, write_pictures

_START, _SCRIPT = "fluxfast_bench.loops.starts.seeded", "scripts/train.py"
# the version of OneTrainer's config files that the keys here belong to
_VERSION = 11
_FROZEN = {"train": False, "train_embedding": False, "weight_dtype": "FLOAT_32"}


def _base(folder: Path) -> Path:
    """A copy of the tiny pipeline whose CLIP has the names that FLUX.1's own files have.

    The version of transformers that OneTrainer pins knows no others.
    """
    shutil.copytree(PIPELINE, folder)
    file = folder / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name}": tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    return folder


def _config(folder: Path, steps: int) -> dict[str, Any]:
    """A LoRA on every linear in float32 on the CPU: one epoch of as many pictures as steps."""
    pictures = write_pictures(folder / "pictures", count=steps)
    never = {f"{what}_unit": "NEVER" for what in ("sample_after", "backup_after", "save_every")}
    return never | {
        "__version": _VERSION,
        "training_method": "LORA",
        "model_type": "FLUX_DEV_1",
        "base_model_name": str(_base(folder / "base")),
        "workspace_dir": str(folder / "workspace"),
        "cache_dir": str(folder / "cache"),
        "output_model_destination": str(folder / "output" / "lora.safetensors"),
        "output_model_format": "DIFFUSERS_LORA",
        "output_dtype": "FLOAT_32",
        "concepts": [{"__version": 2, "name": "toys", "path": str(pictures), "seed": 1}],
        "samples": [],
        "backup_before_save": False,
        # the server; the losses are logged anyway
        "tensorboard": False,
        "offline_mode": True,
        "epochs": 1,
        "batch_size": 1,
        "resolution": "64",
        # its buckets start at larger pictures
        "aspect_ratio_bucketing": False,
        "dataloader_threads": 1,
        "train_device": "cpu",
        "temp_device": "cpu",
        "train_dtype": "FLOAT_32",
        "fallback_train_dtype": "FLOAT_32",
        # a step is as large as the gradient, which rounding changes a little, not by its sign
        "optimizer": {"optimizer": "SGD"},
        "learning_rate": 0.1,
        "learning_rate_warmup_steps": 0,
        "clip_grad_norm": None,
        "lora_rank": 4,
        "lora_alpha": 4.0,
        "timestep_distribution": "LOGIT_NORMAL",
        "dynamic_timestep_shifting": True,
        "transformer": {"train": True, "weight_dtype": "FLOAT_32", "gradient_checkpointing": False},
        "text_encoder": _FROZEN,
        "text_encoder_2": _FROZEN,
        "vae": _FROZEN,
    }


def _prepare(
    checkout: Path,
    folder: Path,
    steps: int,
    *,
    transformer: dict[str, Any] | None = None,
    **changes: Any,
) -> Loop:
    config = _config(folder, steps) | changes
    config["transformer"] |= transformer or {}
    file = folder / "config.json"
    file.write_text(json.dumps(config, indent=2))
    script = str(checkout / _SCRIPT)
    return Loop(
        words=["-m", _START, script, "--config-path", str(file)],
        saved="output/lora.safetensors",
        losses=lambda _, mine: logged(mine, "loss/train_step"),
        # its script finds its own files below the folder that it is run in
        folder=checkout,
    )


def _on(base: str) -> Prepare:
    """LoRA on a transformer whose weights OneTrainer stores in this of its data types."""
    return partial(_prepare, transformer={"weight_dtype": base})


# one adapter for q, k and v, which are one linear in files for ComfyUI
_shared = partial(_prepare, output_model_format="COMFY_LORA")
_SAMPLE = {"prompt": "a red circle", "width": 64, "height": 64, "diffusion_steps": 2, "seed": 1}
CASES: dict[str, Prepare] = {
    "LoRA": _prepare,
    "LoRA checkpointing": partial(_prepare, transformer={"gradient_checkpointing": True}),
    "LoRA and text encoders": partial(
        _prepare, text_encoder={"train": True}, text_encoder_2={"train": True}
    ),
    "LoRA with samples": partial(
        _prepare, sample_after_unit="STEP", sample_after=1, samples=[_SAMPLE]
    ),
    "LoRA prior preservation": partial(
        _prepare, masked_training=True, masked_prior_preservation_weight=1.0
    ),
    "DoRA": partial(_prepare, lora_decompose=True),
    "LoHa": partial(_prepare, peft_type="LOHA"),
    "LoKr": partial(_prepare, peft_type="LOKR", lokr_dim=4, lokr_decompose_factor=8),
    "LoRA shared qkv": _shared,
    "LoRA shared qkv checkpointing": partial(_shared, transformer={"gradient_checkpointing": True}),
    "DoRA shared qkv": partial(_shared, lora_decompose=True),
    "LoHa shared qkv": partial(_shared, peft_type="LOHA"),
    "LoKr shared qkv": partial(_shared, peft_type="LOKR", lokr_dim=4, lokr_decompose_factor=8),
    "LoRA on fp8": _on("FLOAT_8"),
    "LoRA on nf4": _on("NFLOAT_4"),
}
