"""Loading FLUX.1 transformers from safetensors: a diffusers folder, one file in diffusers', BFL's or Comfy's layout, or what
fluxfast quantised.

Tensors are read one by one into a model whose memory is all that is allocated; a quantised file is mapped. Before the first
one is read, names and shapes are compared with the model that the config (or the file's own sizes) describes: a wrong,
truncated or incomplete file is refused by name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from fluxfast.model import layouts, packing, quantized_file, streaming
from fluxfast.model.tensor_files import BrokenFile, CheckpointError, TensorFiles, broken_file
from fluxfast.model.tensor_writer import write_tensors
from fluxfast.quant import Format
from fluxfast.quant.rules import KEPT

if TYPE_CHECKING:
    from fluxfast.model.transformer import FluxTransformer

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model"
SHOWN_KEYS = 5
HUB_ARGUMENTS = {"revision", "cache_dir", "token", "local_files_only", "force_download"}


def _shown(keys: list[str]) -> str:
    more = f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else ""
    return ", ".join(keys[:SHOWN_KEYS]) + more


def _check(where: str, layout: str, files: TensorFiles, ours: Mapping[str, layouts.Shape]) -> dict[str, layouts.Source]:
    """Compare the file's names and shapes with the model's; returns where each of the model's tensors lies."""
    sources = layouts.sources(layout, ours)
    wanted = {source.key for source in sources.values()}
    missing = sorted(wanted - files.shapes.keys())
    unexpected = sorted(layouts.strangers(layout, files.shapes, wanted))
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {_shown(missing)}")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected: {_shown(unexpected)}")
    rows: dict[str, int] = {}
    for name, source in sources.items():
        rows[source.key] = rows.get(source.key, 0) + ours[name][0]
    for name, source in sources.items():
        if source.key in files.shapes:
            expected = (rows[source.key], *ours[name][1:])
            if files.shapes[source.key] != expected:
                problems.append(f"{source.key} has shape {files.shapes[source.key]}, expected {expected}")
    if problems:
        raise CheckpointError(
            f"{where}: tensors don't fit the FLUX.1 transformer ({layout} layout): {'; '.join(problems[:SHOWN_KEYS])}"
        )
    return sources


@dataclass(frozen=True)
class Checkpoint:
    """A transformer's files, opened but not read: where they are, the model's config, and how its tensors are named in them."""

    where: str
    config: Mapping[str, Any]
    files: TensorFiles
    layout: str

    @property
    def quantized(self) -> quantized_file.QuantizedInfo | None:
        """What the file says of itself if fluxfast quantised it, else None."""
        return quantized_file.read_info(self.files) if quantized_file.is_quantized(self.files) else None

    def check(self, cls: type[FluxTransformer]) -> None:
        """Compare the files' names and shapes with the model's, without reading a weight. Raises CheckpointError."""
        if self.quantized is None:
            _check(self.where, self.layout, self.files, _shapes(self._empty(cls)))

    def load(
        self,
        cls: type[FluxTransformer],
        dtype: torch.dtype,
        *,
        device: torch.device | str = "cpu",
        format: Format | None = None,
        quantize_on: torch.device | str = "cpu",
        on_host: Collection[str] = (),
    ) -> FluxTransformer:
        """The model on `device`; floats in `dtype`, linears in `format` if one is given, quantised where `quantize_on` says.

        A checkpoint that is quantised already is mapped on a CPU, read into place elsewhere; `format` must be None or its own.
        on_host: full names of modules whose tensors go to host memory, and never to the device.
        """
        model = self._empty(cls)
        if (info := self.quantized) is not None:
            if format not in (None, info.format):
                raise CheckpointError(f"{self.where}: holds {info.format.name}, asked for {format.name if format else None}")
            self._load_quantized(model, info, dtype, device, on_host)
        else:
            sources = _check(self.where, self.layout, self.files, _shapes(model))
            tensors = streaming.float_tensors(
                self.files, sources, "loading the transformer", quantize_on if format is not None else None
            )
            if format is not None:
                names = streaming.linears(model, KEPT)
                tensors = streaming.quantized(tensors, format, names, self.where)
                streaming.quantize_empty(model, format, names, dtype)
            streaming.place(model, tensors, dtype, device, on_host)
        model.register_to_config(_name_or_path=self.where)
        return model.eval()

    def _load_quantized(
        self,
        model: FluxTransformer,
        info: quantized_file.QuantizedInfo,
        dtype: torch.dtype,
        device: torch.device | str,
        on_host: Collection[str],
    ) -> None:
        streaming.quantize_empty(model, info.format, streaming.linears(model, KEPT), dtype)
        wanted = model.state_dict()
        sources = _check(self.where, "diffusers", self.files, _shapes(model))
        floats = dict(model.named_parameters())
        for name, tensor in wanted.items():
            stored = self.files.dtypes[name]
            if not stored.is_floating_point if name in floats else stored != tensor.dtype:
                raise CheckpointError(f"{self.where}: {name} holds {stored}, expected {tensor.dtype} in {info.format.name}")
        if torch.device(device).type == "cpu":
            streaming.adopt(model, self.files.mapped(), dtype)
            # biases that were cast have left the file's order
            packing.pack_groups(model)
        else:
            streaming.place(model, self.files.stream(sources), dtype, device, on_host)

    def quantize(
        self, cls: type[FluxTransformer], path: Path, format: Format, *, quantize_on: torch.device | str = "cpu"
    ) -> int:
        """Write this checkpoint's transformer in `format` to `path`, tensor by tensor; returns the new file's bytes.

        Raises CheckpointError if it is quantised already, or if `path` is one of its own files or somebody else's.
        """
        if quantized_file.is_quantized(self.files):
            raise CheckpointError(f"{self.where}: is quantised already; quantise the checkpoint that it was made from")
        _check_target(path, self.files)
        model = self._empty(cls)
        ours = _shapes(model)
        sources = _check(self.where, self.layout, self.files, ours)
        names = streaming.linears(model, KEPT)
        specs = streaming.quantized_specs(self.files, sources, ours, format, names)
        # before the weights are read: what changes from here on makes the file stale
        metadata = quantized_file.metadata(self.where, self.files, format, model.config)
        tensors = streaming.float_tensors(self.files, sources, f"quantising to {format.name}", quantize_on)
        return write_tensors(path, specs, metadata, streaming.quantized(tensors, format, names, self.where))

    def config_json(self, cls: type[FluxTransformer], format: Format) -> str:
        """The config.json to lie beside what `quantize` wrote: other programs see by it that they can't read the weights."""
        config = json.loads(self._empty(cls).to_json_string())
        config["quantization_config"] = {"quant_method": "fluxfast", "format": format.name}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @property
    def nbytes(self) -> int:
        """Bytes of the files."""
        return sum(path.stat().st_size for path in self.files.files)

    def _empty(self, cls: type[FluxTransformer]) -> FluxTransformer:
        with init_empty_weights():
            return cls.from_config(dict(self.config))


def _shapes(model: FluxTransformer) -> dict[str, layouts.Shape]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _check_target(path: Path, source: TensorFiles) -> None:
    if any(path.resolve() == file.resolve() for file in source.files):
        raise CheckpointError(f"{path}: is the checkpoint itself; write to another file")
    if not path.exists():
        return
    try:
        ours = quantized_file.is_quantized(TensorFiles([path]))
    except BrokenFile:
        ours = False
    if not ours:
        raise CheckpointError(f"{path}: is there already, and not made by fluxfast: move it away, or write elsewhere")


def open_single_file(
    path: str | os.PathLike,
    *,
    axes_dims_rope: tuple[int, ...] | None = None,
    config: Mapping[str, Any] | str | os.PathLike | None = None,
) -> Checkpoint:
    """Open one safetensors file; see `FluxTransformer.from_single_file`."""
    path = Path(path)
    files = TensorFiles([path])
    if quantized_file.is_quantized(files):
        return Checkpoint(str(path), quantized_file.read_info(files).config, files, "diffusers")
    layout = layouts.detect(files.shapes)
    if layout is None:
        raise CheckpointError(
            f"{path}: not a FLUX.1 transformer: expected keys double_blocks.* (BFL), {layouts.COMFY_PREFIX}double_blocks.* "
            f"(Comfy) or transformer_blocks.* (diffusers), found {_shown(sorted(files.shapes)) or 'no tensor at all'}"
        )
    if config is None:
        try:
            config = layouts.infer_config(layout, files.shapes, axes_dims_rope)
        except KeyError as error:
            raise CheckpointError(f"{path}: incomplete ({layout} layout): tensor {error.args[0]} is missing") from error
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
    elif not isinstance(config, Mapping):
        config = _read_json(Path(config) / CONFIG_NAME if Path(config).is_dir() else Path(config))
    return Checkpoint(str(path), config, files, layout)


def load_single_file(
    cls: type[FluxTransformer],
    path: str | os.PathLike,
    *,
    torch_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    axes_dims_rope: tuple[int, ...] | None = None,
    config: Mapping[str, Any] | str | os.PathLike | None = None,
) -> FluxTransformer:
    """See `FluxTransformer.from_single_file`."""
    checkpoint = open_single_file(path, axes_dims_rope=axes_dims_rope, config=config)
    return checkpoint.load(cls, torch_dtype or dtype or torch.float32)


def open_folder(path: str | os.PathLike, *, subfolder: str | None = None, variant: str | None = None, **hub: Any) -> Checkpoint:
    """Open a folder in diffusers' layout, or a repository of the hub; `hub` goes to huggingface_hub's `snapshot_download`."""
    if unknown := sorted(hub.keys() - HUB_ARGUMENTS):
        raise TypeError(f"from_pretrained: unknown arguments {', '.join(unknown)}; see FluxTransformer.from_pretrained")
    folder = _resolve_folder(path, subfolder, variant, hub)
    config = _read_json(folder / CONFIG_NAME)
    if (name := config.get("_class_name", "FluxTransformer2DModel")) != "FluxTransformer2DModel":
        raise CheckpointError(f"{folder / CONFIG_NAME}: describes a {name}, expected a FluxTransformer2DModel")
    files = TensorFiles(weight_files(folder, variant))
    if quantized_file.is_quantized(files):
        config = dict(quantized_file.read_info(files).config)
    return Checkpoint(str(folder), config, files, "diffusers")


def load_folder(
    cls: type[FluxTransformer],
    path: str | os.PathLike,
    *,
    subfolder: str | None = None,
    torch_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    low_cpu_mem_usage: bool | None = None,
    **hub: Any,
) -> FluxTransformer:
    """See `FluxTransformer.from_pretrained`; `hub` goes to huggingface_hub's `snapshot_download`.

    Loading never holds more than the model, so `low_cpu_mem_usage` changes nothing.
    """
    if use_safetensors is False:
        raise ValueError("use_safetensors=False: only safetensors files are loaded (a pickle can run code)")
    checkpoint = open_folder(path, subfolder=subfolder, variant=variant, **hub)
    return checkpoint.load(cls, torch_dtype or dtype or torch.float32)


def _resolve_folder(path: str | os.PathLike, subfolder: str | None, variant: str | None, hub: dict[str, Any]) -> Path:
    root = Path(path)
    if not root.is_dir():
        if root.is_absolute() or str(path).startswith(".") or len(root.parts) > 2:
            raise CheckpointError(f"{path}: no such folder")
        inner = f"{subfolder}/" if subfolder else ""
        suffix = f".{variant}" if variant else ""
        patterns = [f"{inner}{CONFIG_NAME}", f"{inner}*{suffix}*.json", f"{inner}{WEIGHTS_NAME}*{suffix}*.safetensors"]
        try:
            root = Path(snapshot_download(str(path), allow_patterns=patterns, **hub))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            raise CheckpointError(f"{path}: no such folder here, and the hub gave none by that name: {error}") from error
    folder = root / subfolder if subfolder else root
    if not (folder / CONFIG_NAME).is_file():
        hint = ""
        if not subfolder and (root / "model_index.json").is_file():
            hint = "; this is a pipeline's folder: its transformer is in subfolder='transformer'"
        raise CheckpointError(f"{folder / CONFIG_NAME}: no such file{hint}")
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def weight_files(folder: Path, variant: str | None, name: str = WEIGHTS_NAME) -> list[Path]:
    """The safetensors files of a model's folder: one, or those that its index lists."""
    stem = f"{name}.{variant}" if variant else name
    index = folder / (f"{name}.safetensors.index.{variant}.json" if variant else f"{name}.safetensors.index.json")
    if not index.is_file():
        single = folder / f"{stem}.safetensors"
        if not single.is_file() and list(folder.glob("*.bin")):
            raise BrokenFile(broken_file(next(folder.glob("*.bin")), ValueError()))
        if not single.is_file():
            raise CheckpointError(f"{folder}: neither {index.name} nor {single.name} is there")
        return [single]
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected a table weight_map from tensor names to files")
    shards = sorted({str(name) for name in weight_map.values()})
    for shard in shards:
        if not (folder / shard).is_file():
            keys = sorted(k for k, v in weight_map.items() if v == shard)
            raise CheckpointError(f"{folder / shard}: no such file; {index.name} places {_shown(keys)} in it")
    return [folder / shard for shard in shards]
