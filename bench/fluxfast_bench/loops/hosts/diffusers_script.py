"""diffusers' own DreamBooth script, whose adapters are PEFT's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fluxfast_bench.loops.loop import Loop, Prepare
from fluxfast_bench.loops.tiny import PIPELINE, logged, write_pictures

_SCRIPT = "examples/dreambooth/train_dreambooth_lora_flux.py"


def _prepare(checkout: Path, folder: Path, steps: int, *, more: Sequence[str] = ()) -> Loop:
    pictures = write_pictures(folder / "pictures", captions=False)
    options = {
        "pretrained_model_name_or_path": PIPELINE,
        "instance_data_dir": pictures,
        "instance_prompt": "a red circle",
        "resolution": 64,
        "train_batch_size": 1,
        "rank": 4,
        "max_train_steps": steps,
        "seed": 1,
        # with it a step is as large as the gradient: else rounding's gradients move by 1 too
        "adam_epsilon": 1.0,
        "learning_rate": 10,
        "mixed_precision": "no",
        "optimizer": "adamw",
        "report_to": "tensorboard",
        "output_dir": folder / "output",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return Loop(
        words=[str(checkout / _SCRIPT), *words, *more],
        saved="output/pytorch_lora_weights.safetensors",
        losses=lambda _, mine: logged(mine, "loss"),
        folder=folder,
    )


CASES: dict[str, Prepare] = {
    "LoRA": _prepare,
    "LoRA checkpointing": partial(_prepare, more=["--gradient_checkpointing"]),
}
