"""sd-scripts' own training script, on files in Black Forest Labs' layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from fluxfast_bench.loops import bfl_files
from fluxfast_bench.loops.loop import Loop, Prepare
from fluxfast_bench.loops.tiny import logged, write_pictures

_SCRIPT = "flux_train_network.py"
# makes the models that the script builds as small as our files
_START = ("-m", "fluxfast_bench.loops.starts.sd_scripts")
_LAUNCH = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1")


def _prepare(
    checkout: Path,
    folder: Path,
    steps: int,
    *,
    network: Mapping[str, object] | None = None,
    network_args: Sequence[str] = (),
    more: Sequence[str] = (),
    before: Sequence[str] = (),
) -> Loop:
    """A case: of which network, with what else on the command line, and what starts it."""
    clip, t5 = bfl_files.write_text_encoders(folder / "models")
    options = {
        "pretrained_model_name_or_path": bfl_files.write_transformer(
            folder / "models" / "flux.safetensors"
        ),
        "clip_l": clip,
        "t5xxl": t5,
        "ae": bfl_files.write_autoencoder(folder / "models" / "ae.safetensors"),
        "tokenizer_cache_dir": bfl_files.write_tokenizers(folder / "tokenizers"),
        "train_data_dir": _pictures(folder / "pictures"),
        "resolution": 64,
        "caption_extension": ".txt",
        "t5xxl_max_token_length": 64,
        "max_train_steps": steps,
        "seed": 1,
        # its steps are as large as the gradients: one that scaled them would do so to rounding's
        "optimizer_type": "SGD",
        "learning_rate": 10,
        "mixed_precision": "no",
        "save_precision": "float",
        "timestep_sampling": "shift",
        "guidance_scale": 1,
        "max_data_loader_n_workers": 0,
        "logging_dir": folder / "logs",
        "output_dir": folder / "output",
        "output_name": "lora",
    }
    options |= network or {"network_module": "networks.lora_flux", "network_dim": 4}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    words += ["--network_train_unet_only", "--cache_latents", "--cache_text_encoder_outputs"]
    if network_args:
        words += ["--network_args", *network_args]
    return Loop(
        words=[*before, *_START, str(checkout / _SCRIPT), *words, *more],
        saved="output/lora.safetensors",
        losses=lambda _, mine: logged(mine, "loss/current"),
        folder=folder,
    )


def _pictures(folder: Path) -> Path:
    """Pictures in a folder below this one, whose name says how often each is repeated."""
    write_pictures(folder / "1_toys")
    return folder


_MODULES = "preset=attn-mlp"
_LYCORIS = {"network_module": "lycoris.kohya", "network_dim": 4, "network_alpha": 4}
CASES: dict[str, Prepare] = {
    "LoRA": _prepare,
    "LoRA checkpointing": partial(_prepare, more=["--gradient_checkpointing"]),
    "LoRA block swap": partial(_prepare, more=["--gradient_checkpointing", "--blocks_to_swap=1"]),
    "LoRA masked attention": partial(_prepare, more=["--apply_t5_attn_mask"]),
    "LoRA batch of 2": partial(_prepare, more=["--train_batch_size=2"]),
    "LoRA by accelerate launch": partial(_prepare, before=_LAUNCH),
    "LyCORIS LoCon": partial(_prepare, network=_LYCORIS, network_args=["algo=locon", _MODULES]),
    "LyCORIS LoHa": partial(_prepare, network=_LYCORIS, network_args=["algo=loha", _MODULES]),
    "LyCORIS LoKr": partial(
        _prepare, network=_LYCORIS, network_args=["algo=lokr", _MODULES, "factor=8"]
    ),
}
