"""A run's frozen transformer: found, quantised while it is read, kept in the cache, placed.

A quantised base is written to `<cache_dir>/transformer/` once; later starts map that file and read
nothing else. Where the file in the cache turns out to be stale or damaged, it is removed and
made anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from fluxfast.adapters.kind import Originals
from fluxfast.checkpoint.opening import open_checkpoint, open_single_file
from fluxfast.checkpoint.quantized import FILE_VERSION, StaleFile, fingerprint
from fluxfast.checkpoint.reader import BrokenFile, CheckpointError, DamagedFile
from fluxfast.checkpoint.transformer import Checkpoint
from fluxfast.config.precision_words import in_words
from fluxfast.config.run import TrainConfig
from fluxfast.files import free_bytes, mark_used, short_path
from fluxfast.memory.stream import STREAMED_MODULES
from fluxfast.model.apply import Choices
from fluxfast.model.modulation import linear_names
from fluxfast.model.transformer import FluxTransformer
from fluxfast.quant import Format
from fluxfast.quant.rules import PRECISIONS, format_of
from fluxfast.text import to_bytes
from fluxfast.train.events import say

# of quantised bases, in the cache
FOLDER = "transformer"
# left free beside a cached base: checkpoints, images and logs of the run need room too
SPARE_BYTES = 2 << 30


def open_base(config: TrainConfig) -> Checkpoint:
    """Open the transformer that the config names: a file, a folder or a repository.

    No weight is read. Raises CheckpointError, which says what the name leads to, where that can't
    be trained: another kind of file, other weights, a transformer that takes more than the noisy
    image, a file that fluxfast quantised to another format than the config asks for or from
    something that has changed since.
    """
    pipeline = config.base_source.path
    if Path(pipeline).expanduser().is_file():
        raise CheckpointError(
            f'"pretrained_model_name_or_path" {pipeline}: is one file, expected the folder or '
            "repository of a whole pipeline, "
            "with text encoders and VAE: name the file as "
            '"pretrained_transformer_model_name_or_path"'
        )
    path, subfolder, revision = config.transformer_source
    checkpoint = open_checkpoint(
        path,
        subfolder=subfolder,
        revision=revision,
        variant=config.variant,
        in_channels=config.flavour.in_channels,
    )
    if (info := checkpoint.quantized) is not None:
        if config.trains_all:
            raise CheckpointError(
                f"{checkpoint.where}: is quantised to {in_words(info.format.name)}, and with "
                '"model_type" full its weights would train: name the checkpoint that the file '
                "was made from"
            )
        if PRECISIONS[config.base_model_precision] not in (None, info.format.name):
            raise CheckpointError(
                f"{checkpoint.where}: is quantised to {in_words(info.format.name)}, but "
                "base_model_precision is "
                f'{config.base_model_precision}: set it to "no_change", or name the checkpoint '
                "that the file was made from"
            )
        info.check_own_source()
    return checkpoint


def load_transformer(
    config: TrainConfig,
    checkpoint: Checkpoint,
    choices: Choices,
    device: torch.device,
    console: Console,
) -> FluxTransformer:
    """The transformer of a checkpoint that `open_base` opened, frozen, quantised, on the device.

    What the choices keep off the device, streamed blocks and modulation's weights, is loaded into
    host memory.
    """
    format = format_of(config.base_model_precision)
    quantize_on = torch.device("cpu")
    on_host = [
        *(linear_names(checkpoint.config) if choices.modulation_ahead else ()),
        *(STREAMED_MODULES if choices.streams else ()),
    ]

    def load(checkpoint: Checkpoint, format: Format | None) -> FluxTransformer:
        return checkpoint.load(
            FluxTransformer,
            config.base_dtype,
            device=device,
            format=format,
            quantize_on=quantize_on,
            on_host=on_host,
        )

    if (info := checkpoint.quantized) is not None:
        unread = device.type == "cpu" and not checkpoint.verified_when_mapped
        how = (
            "; not verified (`fluxfast-train quantize --verify` reads it through)" if unread else ""
        )
        say(console, f"{info.path}: {in_words(info.format.name)}, quantised before{how}")
        transformer = load(checkpoint, None)
    elif format is not None:
        quantize_on = quantizing_device(config.quantize_via, device)
        transformer = _load_cached(config, checkpoint, format, quantize_on, console, load)
    else:
        transformer = load(checkpoint, None)
    transformer.requires_grad_(False)
    transformer.set_modulation_ahead(choices.modulation_ahead)
    return transformer


def quantizing_device(quantize_via: str | None, device: torch.device | None = None) -> torch.device:
    """Where weights are quantised. device: the run's; None: the first accelerator that there is."""
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if quantize_via == "accelerator" and device.type != "cuda":
        raise ValueError(
            'quantize_via is "accelerator", and there is no CUDA or ROCm device: leave it out, '
            'or set "cpu"'
        )
    return device if device.type == "cuda" and quantize_via != "cpu" else torch.device("cpu")


def stored_format(config: TrainConfig, checkpoint: Checkpoint) -> str | None:
    """The format in which a run has this base: the file's own, or the config's; None: in floats."""
    info = checkpoint.quantized
    return PRECISIONS[config.base_model_precision] if info is None else info.format.name


def originals_of(
    config: TrainConfig, checkpoint: Checkpoint, device: torch.device
) -> Originals | None:
    """The weights of a run's base before they are, or were, quantised.

    None where the checkpoint is a quantised one whose source is not there any more. They are read
    when they are asked for, and come to where the run quantises.
    """
    info = checkpoint.quantized
    if info is not None and not Path(info.source).exists():
        return None

    def weights(names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        source = checkpoint
        if info is not None:
            source = open_checkpoint(
                info.source, variant=config.variant, in_channels=config.flavour.in_channels
            )
        stored = source.weights(FluxTransformer)
        if stored.format is not None:
            raise CheckpointError(f"{source.where}: is quantised, and so has no original weights")
        place = quantizing_device(config.quantize_via, device)
        wanted = [f"{name}.weight" for name in names]
        for name, weight in stored.stream("adapting to the base", place, wanted, checked=True):
            yield name.removesuffix(".weight"), weight

    return weights


class CachedBase:
    """A base in one format, in the cache: a file whose name stands for what it is made from.

    So runs share it that train on the same weights, wherever these lie, and another base never
    takes its place.
    """

    def __init__(self, cache_dir: Path, source: Checkpoint, format: Format) -> None:
        self.source, self.format = source, format
        self.prints = [fingerprint(path) for path in source.files.files]
        config = {name: value for name, value in source.config.items() if name[0] != "_"}
        made_of = [FILE_VERSION, [each.sha256 for each in self.prints], config]
        digest = hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode())
        self.path = cache_dir / FOLDER / f"{digest.hexdigest()[:16]}-{format.name}.safetensors"

    def opened(self, console: Console) -> Checkpoint | None:
        """The file, opened; None where there is none. One that is stale or damaged is removed."""
        self._adopt()
        if not self.path.exists():
            return None
        try:
            kept = open_single_file(self.path)
            if (info := kept.quantized) is None:
                raise CheckpointError(
                    f"{self.path}: not made by fluxfast, but in its cache: move it away"
                )
            info.check_made_from(self.prints, self.format)
        except (StaleFile, BrokenFile) as error:
            say(console, f"{error} (done now)")
            self.path.unlink(missing_ok=True)
            return None
        mark_used(self.path)
        say(console, f"base: {in_words(self.format.name)} from {short_path(self.path)}")
        return kept

    def make(self, quantize_on: torch.device, console: Console) -> Checkpoint | None:
        """Quantise the base into the cache; None, and a note, where the disk has no room."""
        self._remove_superseded(console)
        path, source, format = self.path, self.source, self.format
        word = in_words(format.name)
        needed = int(source.nbytes * format.bits_per_weight / 16) + SPARE_BYTES
        if (free := free_bytes(path)) < needed:
            room = f"{path.parent} has {free / 1e9:.1f} GB left, and should have {needed / 1e9:.1f}"
            say(console, f"base: {word}, not kept: {room}")
            return None
        size = source.quantize(FluxTransformer, path, format, quantize_on=quantize_on)
        say(
            console,
            f"base: {source.nbytes / 1e9:.2f} GB became {size / 1e9:.2f} in {word}, kept in "
            f"{short_path(path)}",
        )
        return open_single_file(path)

    def _adopt(self) -> None:
        """Take over the file of an earlier version, which named it after the source's path."""
        where = Path(self.source.where).absolute()
        digest = hashlib.sha256(to_bytes(str(where))).hexdigest()[:8]
        earlier = self.path.with_name(f"{where.stem}-{digest}-{self.format.name}.safetensors")
        if earlier.exists() and not self.path.exists():
            # another run may have been faster
            with suppress(FileNotFoundError):
                earlier.replace(self.path)

    def _remove_superseded(self, console: Console) -> None:
        """Remove files whose source has been overwritten since: nothing can use them any more."""
        for path in self.path.parent.glob(f"*-{self.format.name}.safetensors"):
            try:
                if (info := open_single_file(path).quantized) is not None:
                    info.check_own_source()
            except StaleFile as error:
                say(console, f"{error} (done now)")
                with suppress(OSError):
                    path.unlink()
            except (CheckpointError, OSError):
                # somebody else's file, which stays
                continue


def _load_cached(
    config: TrainConfig,
    source: Checkpoint,
    format: Format,
    quantize_on: torch.device,
    console: Console,
    load: Callable[[Checkpoint, Format | None], FluxTransformer],
) -> FluxTransformer:
    """Load the source in `format` from the cache, which is filled first if it has to be.

    Where the disk has no room for that, the source is quantised while it is loaded.
    """
    cached = CachedBase(config.cache_dir, source, format)
    damage = ""
    if (kept := cached.opened(console)) is not None:
        try:
            return load(kept, None)
        except DamagedFile as error:
            # loaded anew further down, once the exception holds nothing of the first model any more
            damage = str(error)
    if damage:
        say(console, f"{damage} (done now)")
        del kept
        cached.path.unlink(missing_ok=True)
    made = cached.make(quantize_on, console)
    return load(source, format) if made is None else load(made, None)
