"""The frozen transformer of a run, as the config wants it: found, quantised while it is read, kept in the cache, placed.

A quantised base is written to `<cache_dir>/transformer/` once; a later start maps that file and reads nothing else.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from rich.console import Console

from fluxfast.model.checkpoint import Checkpoint, open_folder, open_single_file
from fluxfast.model.modulation import linear_names
from fluxfast.model.quantized_file import StaleFile
from fluxfast.model.tensor_files import BrokenFile, CheckpointError
from fluxfast.model.tensor_writer import free_bytes
from fluxfast.model.transformer import FluxTransformer
from fluxfast.quant import Format
from fluxfast.quant.rules import format_of
from fluxfast.train.config import TrainConfig
from fluxfast.train.modulation import keeps_on_host
from fluxfast.train.offload import STREAMED_MODULES

# left free beside a cached base: checkpoints, images and logs of the run need room too
SPARE_BYTES = 2 << 30


def load_transformer(config: TrainConfig, device: torch.device, console: Console) -> FluxTransformer:
    """The transformer that the config names (a single file, a folder, a repository), frozen, quantised, on the device."""
    checkpoint = open_base(config)
    quantize_on = torch.device("cpu")
    format = format_of(config.base_model_precision)
    if (info := checkpoint.quantized) is not None:
        if format not in (None, info.format):
            raise CheckpointError(
                f"{checkpoint.where}: is quantised to {info.format.name}, but base_model_precision is "
                f'{config.base_model_precision}: set it to "no_change", or name the checkpoint that the file was made from'
            )
        info.check_own_source()
        console.print(f"· {info.path}: {info.format.name}, quantised before", highlight=False, markup=False)
    elif format is not None:
        quantize_on = quantizing_device(config.quantize_via, device)
        if (cached := _cached(config, checkpoint, format, quantize_on, console)) is not None:
            checkpoint, format = cached, None
    modulation = linear_names(checkpoint.config)
    ahead = keeps_on_host(config, modulation, device, console)
    transformer = checkpoint.load(
        FluxTransformer,
        config.base_dtype,
        device=device,
        format=format,
        quantize_on=quantize_on,
        on_host=[*(modulation if ahead else ()), *(STREAMED_MODULES if config.enable_group_offload else ())],
    )
    transformer.requires_grad_(False)
    transformer.set_modulation_ahead(ahead)
    return transformer


def quantizing_device(quantize_via: str | None, device: torch.device | None = None) -> torch.device:
    """Where weights are quantised; `device` is the run's, None the first accelerator that there is."""
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if quantize_via == "accelerator" and device.type != "cuda":
        raise ValueError('quantize_via is "accelerator", and there is no CUDA or ROCm device: leave it out, or set "cpu"')
    return device if device.type == "cuda" and quantize_via != "cpu" else torch.device("cpu")


def open_base(config: TrainConfig) -> Checkpoint:
    """The transformer's files that the config names, opened but not read; downloaded, if they are a repository's.

    Raises CheckpointError where they are missing or not a FLUX.1 transformer."""
    path, subfolder, revision = config.transformer_source
    if Path(path).suffix == ".safetensors":
        return open_single_file(path)
    return open_folder(path, subfolder=subfolder, revision=revision, variant=config.variant)


def cache_path(config: TrainConfig, checkpoint: Checkpoint, format: Format) -> Path:
    """Where a run keeps its quantised base: one file for each source and format."""
    where = Path(checkpoint.where).absolute()
    digest = hashlib.sha256(str(where).encode()).hexdigest()[:8]
    return config.cache_dir / "transformer" / f"{where.stem}-{digest}-{format.name}.safetensors"


def _cached(
    config: TrainConfig, checkpoint: Checkpoint, format: Format, quantize_on: torch.device, console: Console
) -> Checkpoint | None:
    """The quantised base in the cache, made if it isn't there; None, and a line that says so, where the disk has no room."""
    path = cache_path(config, checkpoint, format)

    def say(text: str) -> None:
        console.print(f"· {text}", highlight=False, markup=False, soft_wrap=True)

    if path.exists():
        try:
            kept = open_single_file(path)
            info = kept.quantized
            if info is None:
                raise CheckpointError(f"{path}: not made by fluxfast, but in its cache: move it away")
            info.check(checkpoint.files.files, format)
            say(f"base: {format.name} from {path}")
            return kept
        except (StaleFile, BrokenFile) as error:
            say(f"{error} (done now)")
            path.unlink()
    needed = int(checkpoint.nbytes * format.bits_per_weight / 16) + SPARE_BYTES
    if (free := free_bytes(path)) < needed:
        say(f"base: {format.name}, not kept: {path.parent} has {free / 1e9:.1f} GB left, and should have {needed / 1e9:.1f}")
        return None
    size = checkpoint.quantize(FluxTransformer, path, format, quantize_on=quantize_on)
    say(f"base: {checkpoint.nbytes / 1e9:.2f} GB became {size / 1e9:.2f} in {format.name}, kept in {path}")
    return open_single_file(path)
