"""ai-toolkit's `run.py`: its sd_trainer, with its own networks on diffusers' model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fluxfast_bench.loops.loop import Loop, Prepare
from fluxfast_bench.loops.tiny import PIPELINE, logged, write_pictures

_START = "fluxfast_bench.loops.starts.without_triton"
_NAME = "loop"


def _prepare(
    checkout: Path,
    folder: Path,
    steps: int,
    *,
    network: Mapping[str, Any] = {"type": "lora", "linear": 4, "linear_alpha": 4},
    model: Mapping[str, Any] = {},
    train: Mapping[str, Any] = {},
) -> Loop:
    process = {
        "type": "sd_trainer",
        "training_folder": str(folder / "output"),
        "device": "cpu",
        "training_seed": 1,
        "log_dir": str(folder / "logged"),
        "logging": {"log_every": 1},
        "network": network,
        "save": {"dtype": "float32"},
        "datasets": [
            {
                "folder_path": str(write_pictures(folder / "pictures")),
                "caption_ext": "txt",
                "resolution": [64],
                "num_workers": 0,
            }
        ],
        "train": {
            "batch_size": 1,
            # its first step is not logged
            "steps": steps + 1,
            "gradient_checkpointing": False,
            "noise_scheduler": "flowmatch",
            "lr": 10,
            # with it a step is as large as the gradient: its Adam's epsilon can't be chosen
            "optimizer": "adagrad",
            "optimizer_params": {"eps": 1.0},
            "dtype": "float32",
            "disable_sampling": True,
            **train,
        },
        "model": {"name_or_path": str(PIPELINE), "is_flux": True, **model},
    }
    config = folder / "config.json"
    config.write_text(
        json.dumps({"job": "extension", "config": {"name": _NAME, "process": [process]}})
    )
    return Loop(
        words=["-m", _START, str(checkout / "run.py"), str(config)],
        saved=f"output/{_NAME}/{_NAME}.safetensors",
        losses=lambda _, mine: logged(mine / "logged", "loss"),
        folder=folder,
        # it takes the device from accelerate, and the seed of everything else from SEED
        environment={"ACCELERATE_USE_CPU": "true", "SEED": "1"},
    )


_CHECKPOINTING = {"gradient_checkpointing": True}
_LOKR = {"type": "lokr", "lokr_factor": 4}
_FACTORS = {"type": "lokr", "lokr_full_rank": False, "linear": 4, "linear_alpha": 4}

CASES: dict[str, Prepare] = {
    "LoRA": _prepare,
    "LoRA checkpointing": partial(_prepare, train=_CHECKPOINTING),
    "LoRA prior preservation": partial(_prepare, train={"blank_prompt_preservation": True}),
    "LoRA Kontext": partial(_prepare, model={"is_flux": False, "arch": "flux_kontext"}),
    "LoKr": partial(_prepare, network=_LOKR),
    "LoKr checkpointing": partial(_prepare, network=_LOKR, train=_CHECKPOINTING),
    "LoKr of rank 4": partial(_prepare, network=_FACTORS),
    "DoRA": partial(_prepare, network={"type": "dora", "linear": 4, "linear_alpha": 4}),
    "LoRA on float8": partial(_prepare, model={"quantize": True, "qtype": "float8"}),
    "LoRA on int8": partial(_prepare, model={"quantize": True, "qtype": "int8"}),
    "LoRA on uint4": partial(_prepare, model={"quantize": True, "qtype": "uint4"}),
}
