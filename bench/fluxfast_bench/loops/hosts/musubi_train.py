"""musubi-tuner's own training script for FLUX.1-Kontext, on latents and embeddings from files.

Its block swap asks CUDA which device is the current one, and can't run without.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from fluxfast_bench.loops.bfl_files import flux_sizes, write_transformer
from fluxfast_bench.loops.loop import Loop, Prepare
from fluxfast_bench.loops.tiny import logged, write_pictures

_SCRIPT = "src/musubi_tuner/flux_kontext_train_network.py"
# makes the model that the script builds as small as our file
_START = ("-m", "fluxfast_bench.loops.starts.musubi")
_SIDE, _TEXT_TOKENS = 64, 24


def _prepare(
    checkout: Path,
    folder: Path,
    steps: int,
    *,
    network: str = "networks.lora_flux",
    rate: float = 100,
    more: Sequence[str] = (),
) -> Loop:
    """A case: of which network, and with what else on the command line.

    rate: large enough for the second loss to show what the first step did. LoRA's B is 0 before
    that step, and its gradients are small: at a rate of 10 the loss moves by less than 0.1 %.
    """
    options = {
        "dit": write_transformer(folder / "models" / "flux.safetensors"),
        "dataset_config": _dataset(folder),
        "network_module": network,
        "network_dim": 4,
        "max_train_steps": steps,
        "seed": 1,
        # its steps are as large as the gradients: one that scaled them would do so to rounding's
        "optimizer_type": "SGD",
        "learning_rate": rate,
        "mixed_precision": "no",
        "timestep_sampling": "flux_shift",
        "max_data_loader_n_workers": 0,
        "logging_dir": folder / "logs",
        "output_dir": folder / "output",
        "output_name": "lora",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    path = [str(checkout / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return Loop(
        words=[*_START, str(checkout / _SCRIPT), "--sdpa", *words, *more],
        saved="output/lora.safetensors",
        losses=lambda _, mine: logged(mine, "loss/current"),
        folder=folder,
        environment={"PYTHONPATH": os.pathsep.join(path)},
    )


def _dataset(folder: Path) -> Path:
    """Writes two datasets of a picture each, and their config; returns the config's path.

    Latents and embeddings are cached under the names and keys that musubi-tuner's own programs
    give them, so that neither autoencoder nor text encoders are needed. Two datasets, since the
    pictures of one come in the order in which the file system lists them.
    """
    pictures = write_pictures(folder / "pictures", side=_SIDE)
    lines = ["[general]", f"resolution = [{_SIDE}, {_SIDE}]", "batch_size = 1"]
    sizes, latent = flux_sizes(), (16, _SIDE // 8, _SIDE // 8)
    generator = torch.Generator().manual_seed(1)
    for number in range(2):
        cache = folder / f"cache_{number}"
        cache.mkdir()
        shape = f"1x{latent[1]}x{latent[2]}"
        latents = {
            f"{name}_{shape}_float32": torch.randn(latent, generator=generator)
            for name in ("latents", "latents_control")
        }
        embeddings = {
            "t5_vec_float32": torch.randn(
                _TEXT_TOKENS, sizes["context_in_dim"], generator=generator
            ),
            "clip_l_pooler_float32": torch.randn(sizes["vec_in_dim"], generator=generator),
        }
        save_file(latents, cache / f"{number}_{_SIDE:04}x{_SIDE:04}_fk.safetensors")
        save_file(embeddings, cache / f"{number}_fk_te.safetensors")
        lines += [
            "[[datasets]]",
            f'image_directory = "{pictures.as_posix()}"',
            f'cache_directory = "{cache.as_posix()}"',
        ]
    config = folder / "dataset.toml"
    config.write_text("\n".join(lines) + "\n")
    return config


CASES: dict[str, Prepare] = {
    "LoRA": _prepare,
    "LoRA checkpointing": partial(_prepare, more=["--gradient_checkpointing"]),
    "LoRA activations offloaded": partial(
        _prepare, more=["--gradient_checkpointing", "--gradient_checkpointing_cpu_offload"]
    ),
    "LoRA split attention": partial(_prepare, more=["--split_attn"]),
    "LoRA scaled fp8": partial(_prepare, more=["--fp8_base", "--fp8_scaled"]),
    "LoHa": partial(_prepare, network="networks.loha", rate=10),
    "LoKr": partial(_prepare, network="networks.lokr", rate=10),
}
