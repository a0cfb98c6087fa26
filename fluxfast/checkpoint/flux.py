"""Loading FLUX.1 transformers from safetensors: a diffusers folder, one file in diffusers', BFL's
or Comfy's layout, or what fluxfast quantised.

Tensors are read one by one into a model whose memory is all that is allocated; a quantised file is
mapped. Before the first one is read, names and shapes are compared with the model that the config
(or the file's own sizes) describes: a wrong, truncated or incomplete file is refused by name, and
what is another kind of file or model by what it is.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel

from fluxfast.checkpoint import locate, naming, quantized, side_by_side, stream
from fluxfast.checkpoint.locate import CONFIG_NAME, WEIGHTS_NAME, shown, weight_files
from fluxfast.checkpoint.reader import BrokenFile, CheckpointError, TensorFiles
from fluxfast.checkpoint.tensor_kinds import (
    TAKE_TRANSFORMER,
    why_not_channels,
    why_not_config,
    why_not_flux,
)
from fluxfast.checkpoint.writer import write_tensors
from fluxfast.quant import Format
from fluxfast.quant.rules import KEPT

Model = TypeVar("Model", bound=FluxTransformer2DModel)

HUB_ARGUMENTS = {"revision", "cache_dir", "token", "local_files_only", "force_download"}
# a map up to this size is read through and verified before it is used, which takes less than a
# second
VERIFIED_BYTES = 1 << 30
_SHOWN_PROBLEMS = 5
_PART = re.compile(r"-\d{5}-of-(\d{5})$")


def _check(
    where: str, layout: str, files: TensorFiles, ours: Mapping[str, naming.Shape]
) -> dict[str, naming.Source]:
    """Compare the file's names and shapes with the model's; returns where each of the model's
    tensors lies.
    """
    sources = naming.sources(layout, ours)
    wanted = {source.key for source in sources.values()}
    missing = sorted(wanted - files.shapes.keys())
    unexpected = sorted(naming.strangers(layout, files.shapes, wanted))
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {shown(missing)}")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected: {shown(unexpected)}")
    rows: dict[str, int] = {}
    for name, source in sources.items():
        rows[source.key] = rows.get(source.key, 0) + ours[name][0]
    for name, source in sources.items():
        if source.key in files.shapes:
            expected = (rows[source.key], *ours[name][1:])
            if files.shapes[source.key] != expected:
                problems.append(
                    f"{source.key} has shape {files.shapes[source.key]}, expected {expected}"
                )
    if problems:
        raise CheckpointError(
            f"{where}: tensors don't fit the FLUX.1 transformer ({layout} layout): "
            f"{'; '.join(problems[:_SHOWN_PROBLEMS])}"
        )
    return sources


@dataclass(frozen=True)
class Checkpoint:
    """A transformer's files, opened but not read: where they are, the model's config, and how its
    tensors are named in them.
    """

    where: str
    config: Mapping[str, Any]
    files: TensorFiles
    layout: str

    @property
    def quantized(self) -> quantized.QuantizedInfo | None:
        """What the file says of itself if fluxfast quantised it, else None."""
        return quantized.read_info(self.files) if quantized.is_quantized(self.files) else None

    def load(
        self,
        cls: type[Model],
        dtype: torch.dtype,
        *,
        device: torch.device | str = "cpu",
        format: Format | None = None,
        quantize_on: torch.device | str = "cpu",
        on_host: Collection[str] = (),
    ) -> Model:
        """The model on `device`; floats in `dtype`, linears in `format` if one is given, quantised
        where `quantize_on` says.

        A checkpoint that is quantised already is mapped on a CPU, read into place elsewhere;
        `format` must be None or its own. on_host: full names of modules whose tensors go to host
        memory, and never to the device.
        """
        model = self._empty(cls)
        sources = self._prepare(model, dtype)
        if (info := self.quantized) is not None:
            if format not in (None, info.format):
                raise CheckpointError(
                    f"{self.where}: holds {info.format.name}, asked for "
                    f"{format.name if format else None}"
                )
            if torch.device(device).type == "cpu":
                self._map(model, dtype)
            else:
                stream.place(model, self.files.stream(sources), dtype, device, on_host)
        else:
            tensors = stream.float_tensors(
                self.files,
                sources,
                "loading the transformer",
                quantize_on if format is not None else None,
                # `quantized` looks by itself, at less cost
                checked=format is None,
            )
            if format is not None:
                names = stream.linears(model, KEPT)
                tensors = stream.quantized(tensors, format, names, self.where, sources)
                stream.quantize_empty(model, format, names, dtype)
            stream.place(model, tensors, dtype, device, on_host)
        model.register_to_config(_name_or_path=self.where)
        return model.eval()

    def check(self, cls: type[FluxTransformer2DModel]) -> None:
        """Compare names, shapes and dtypes with the model's, as `load` does first; reads no weight.

        Raises CheckpointError naming what is missing, unexpected, of another shape or of a dtype
        that can't be loaded.
        """
        self._prepare(self._empty(cls), torch.bfloat16)

    def _prepare(
        self, model: FluxTransformer2DModel, dtype: torch.dtype
    ) -> dict[str, naming.Source]:
        """Where each tensor of an empty model lies in the files; a quantised file's model is given
        its quantised linears.
        """
        if (info := self.quantized) is None:
            sources = _check(self.where, self.layout, self.files, _shapes(model))
            stream.require_floats(self.files, sources)
            return sources
        stream.quantize_empty(model, info.format, stream.linears(model, KEPT), dtype)
        sources = _check(self.where, "diffusers", self.files, _shapes(model))
        floats = dict(model.named_parameters())
        for name, tensor in model.state_dict().items():
            stored = self.files.dtypes[name]
            if not stored.is_floating_point if name in floats else stored != tensor.dtype:
                raise CheckpointError(
                    f"{self.where}: {name} holds {stored}, expected {tensor.dtype} in "
                    f"{info.format.name}"
                )
        return sources

    def _map(self, model: FluxTransformer2DModel, dtype: torch.dtype) -> None:
        if self.verified_when_mapped:
            self.files.verify()
        stream.adopt(model, self.files.mapped(), dtype)
        # biases that were cast have left the file's order
        side_by_side.pack_groups(model)

    @property
    def verified_when_mapped(self) -> bool:
        """Whether `load` on a CPU holds a quantised file against its checksums: reading a large one
        takes many seconds.
        """
        return self.nbytes <= VERIFIED_BYTES

    def quantize(
        self,
        cls: type[Model],
        path: Path,
        format: Format,
        *,
        quantize_on: torch.device | str = "cpu",
    ) -> int:
        """Write this checkpoint's transformer in `format` to `path`, tensor by tensor; returns the
        new file's bytes.

        Raises CheckpointError if it is quantised already, or if `path` is one of its own files or
        somebody else's.
        """
        if quantized.is_quantized(self.files):
            raise CheckpointError(
                f"{self.where}: is quantised already; quantise the checkpoint that it was made from"
            )
        _check_target(path, self.files)
        model = self._empty(cls)
        ours = _shapes(model)
        sources = self._prepare(model, torch.bfloat16)
        names = stream.linears(model, KEPT)
        specs = stream.quantized_specs(self.files, sources, ours, format, names)
        # before the weights are read: what changes from here on makes the file stale
        metadata = quantized.metadata(self.where, self.files, format, model.config)
        tensors = stream.float_tensors(
            self.files, sources, f"quantising to {format.name}", quantize_on
        )
        made = stream.quantized(tensors, format, names, self.where, sources)
        return write_tensors(path, specs, metadata, made, checked=True)

    def config_json(self, cls: type[FluxTransformer2DModel], format: Format) -> str:
        """The config.json to lie beside what `quantize` wrote: other programs see by it that they
        can't read the weights.
        """
        config = json.loads(self._empty(cls).to_json_string())
        config["quantization_config"] = {"quant_method": "fluxfast", "format": format.name}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @property
    def nbytes(self) -> int:
        """Bytes of the files."""
        return sum(path.stat().st_size for path in self.files.files)

    def _empty(self, cls: type[Model]) -> Model:
        try:
            with init_empty_weights():
                return cls.from_config(dict(self.config))
        except (ValueError, TypeError, ZeroDivisionError, RuntimeError) as error:
            # sizes that contradict each other, or are no numbers
            raise CheckpointError(
                f"{self.where}: no FLUX.1 transformer has such a config: {error}"
            ) from error


def _shapes(model: FluxTransformer2DModel) -> dict[str, naming.Shape]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _check_target(path: Path, source: TensorFiles) -> None:
    if any(path.resolve() == file.resolve() for file in source.files):
        raise CheckpointError(f"{path}: is the checkpoint itself; write to another file")
    if not path.exists():
        return
    try:
        ours = quantized.is_quantized(TensorFiles([path]))
    except BrokenFile:
        ours = False
    if not ours:
        raise CheckpointError(
            f"{path}: is there already, and not made by fluxfast: move it away, or write elsewhere"
        )


def open_checkpoint(
    name: str | os.PathLike,
    *,
    subfolder: str | None = None,
    variant: str | None = None,
    in_channels: int | None = None,
    **hub: Any,
) -> Checkpoint:
    """Open whatever a base's name leads to: one file of any ending, a folder, a repository of the
    hub (with `hub` going to huggingface_hub's `snapshot_download`).

    The transformer of a folder is looked for in `subfolder`, then in the folder itself; without
    `subfolder` in the folder itself, then in a pipeline's `transformer`. in_channels: what the run
    will give to it; a transformer that takes another number is refused, and its weights are not
    downloaded. Raises CheckpointError saying what the name leads to.
    """
    path = locate.local_path(name)
    if path is not None and path.is_file():
        checkpoint = open_single_file(path)
        _check_channels(checkpoint.where, checkpoint.config, in_channels)
        return checkpoint
    subfolders = (subfolder, None) if subfolder else (None, "transformer")
    return _open_folder(name, path, subfolders, variant, in_channels, hub)


def open_single_file(
    path: str | os.PathLike,
    *,
    axes_dims_rope: tuple[int, ...] | None = None,
    config: Mapping[str, Any] | str | os.PathLike | None = None,
) -> Checkpoint:
    """Open one safetensors file; see `FluxTransformer.from_single_file`."""
    path = Path(path).expanduser()
    if path.is_dir():
        raise CheckpointError(f"{path}: a folder, expected one file: load it with from_pretrained")
    files = TensorFiles([path])
    if quantized.is_quantized(files):
        return Checkpoint(str(path), quantized.read_info(files).config, files, "diffusers")
    layout = _layout(path, files)
    if config is None:
        try:
            config = naming.infer_config(layout, files.shapes, axes_dims_rope)
        except KeyError as error:
            raise CheckpointError(
                f"{path}: incomplete ({layout} layout): tensor {error.args[0]} is missing. Is "
                "it one part of a sharded "
                "checkpoint? Then name the folder that holds all parts"
            ) from error
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
    elif not isinstance(config, Mapping):
        config = locate.read_json(
            Path(config) / CONFIG_NAME if Path(config).is_dir() else Path(config)
        )
    return Checkpoint(str(path), config, files, layout)


def _layout(path: Path, files: TensorFiles) -> str:
    """The layout of a file's transformer. Raises CheckpointError saying what the file is if it
    holds none.
    """
    if (part := _PART.search(path.stem)) is not None and int(part[1]) > 1:
        raise CheckpointError(
            f"{path}: one of {int(part[1])} parts of a sharded checkpoint: name the folder that "
            "holds all of them, "
            f"{path.absolute().parent}"
        )
    if (why := why_not_flux(files.shapes)) is not None:
        raise CheckpointError(f"{path}: {why}")
    if (layout := naming.detect(files.shapes)) is None:
        raise CheckpointError(
            f"{path}: not a FLUX.1 transformer: expected keys double_blocks.* (BFL), "
            f"{naming.COMFY_PREFIX}double_blocks.* "
            "(Comfy) or transformer_blocks.* (diffusers), found "
            f"{shown(sorted(files.shapes)) or 'no tensor at all'}; "
            f"{TAKE_TRANSFORMER}; if it is a part of a sharded checkpoint, name the folder that "
            "holds all parts"
        )
    return layout


def load_single_file(
    cls: type[Model],
    path: str | os.PathLike,
    *,
    torch_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    axes_dims_rope: tuple[int, ...] | None = None,
    config: Mapping[str, Any] | str | os.PathLike | None = None,
) -> Model:
    """See `FluxTransformer.from_single_file`."""
    checkpoint = open_single_file(path, axes_dims_rope=axes_dims_rope, config=config)
    return checkpoint.load(cls, torch_dtype or dtype or torch.float32)


def open_folder(
    path: str | os.PathLike, *, subfolder: str | None = None, variant: str | None = None, **hub: Any
) -> Checkpoint:
    """Open a folder in diffusers' layout, or a repository of the hub; `hub` goes to
    huggingface_hub's `snapshot_download`.

    A name that leads to a file opens that file.
    """
    if unknown := sorted(hub.keys() - HUB_ARGUMENTS):
        raise TypeError(
            f"from_pretrained: unknown arguments {', '.join(unknown)}; see "
            "FluxTransformer.from_pretrained"
        )
    root = locate.local_path(path)
    if root is not None and root.is_file():
        return open_single_file(root)
    return _open_folder(path, root, (subfolder,), variant, None, hub)


def _open_folder(
    name: str | os.PathLike,
    root: Path | None,
    subfolders: tuple[str | None, ...],
    variant: str | None,
    in_channels: int | None,
    hub: dict[str, Any],
) -> Checkpoint:
    """Open the transformer in one of the subfolders of `root`, which is None for a repository that
    is called `name`.
    """
    inners = [f"{subfolder}/" if subfolder else "" for subfolder in subfolders]
    here = root
    if root is None:
        # a few KB say whether the rest is worth its download
        here = locate.download(
            name, ["model_index.json", *(f"{inner}{CONFIG_NAME}" for inner in inners)], hub
        )
    assert here is not None
    folder = locate.model_folder(here, subfolders)
    config = locate.read_json(folder / CONFIG_NAME)
    if (why := why_not_config(config)) is not None:
        raise CheckpointError(f"{folder / CONFIG_NAME}: {why}")
    _check_channels(str(folder / CONFIG_NAME), config, in_channels)
    if root is None:
        inner = "" if folder == here else f"{folder.relative_to(here).as_posix()}/"
        suffix = f".{variant}" if variant else ""
        locate.download(
            name, [f"{inner}*{suffix}*.json", f"{inner}{WEIGHTS_NAME}*{suffix}*.safetensors"], hub
        )
    files = TensorFiles(weight_files(folder, variant))
    if quantized.is_quantized(files):
        config = dict(quantized.read_info(files).config)
    elif (why := why_not_flux(files.shapes)) is not None:
        raise CheckpointError(f"{folder}: {why}")
    return Checkpoint(str(folder), config, files, "diffusers")


def _check_channels(where: str, config: Mapping[str, Any], expected: int | None) -> None:
    # a config that doesn't say means FLUX.1's 64, as diffusers' class does
    found = config.get("in_channels", 64)
    if expected is not None and (why := why_not_channels(found, expected)) is not None:
        raise CheckpointError(f"{where}: {why}")


def load_folder(
    cls: type[Model],
    path: str | os.PathLike,
    *,
    subfolder: str | None = None,
    torch_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    low_cpu_mem_usage: bool | None = None,
    **hub: Any,
) -> Model:
    """See `FluxTransformer.from_pretrained`; `hub` goes to huggingface_hub's `snapshot_download`.

    Loading never holds more than the model, so `low_cpu_mem_usage` changes nothing.
    """
    if use_safetensors is False:
        raise ValueError(
            "use_safetensors=False: only safetensors files are loaded (a pickle can run code)"
        )
    checkpoint = open_folder(path, subfolder=subfolder, variant=variant, **hub)
    return checkpoint.load(cls, torch_dtype or dtype or torch.float32)
