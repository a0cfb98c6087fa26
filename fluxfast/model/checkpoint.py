"""Loading FLUX.1 transformers from safetensors: a diffusers folder, or one file in diffusers', BFL's or Comfy's layout.

Files are memory-mapped and read tensor by tensor. Before the first one is read, names and shapes are compared with the model
that the config (or the file's own sizes) describes: a wrong, truncated or incomplete file is refused by name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from rich.progress import track
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fluxfast.model import layouts

if TYPE_CHECKING:
    from fluxfast.model.transformer import FluxTransformer

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model"
SHOWN_KEYS = 5
HUB_ARGUMENTS = {"revision", "cache_dir", "token", "local_files_only", "force_download"}
# below this a load is over before a progress bar could be read
PROGRESS_BYTES = 2 << 30


class CheckpointError(ValueError):
    """A checkpoint that can't be loaded: the message names the file, what was expected and what came."""


class TensorFiles:
    """The tensors of one or several safetensors files, by key; nothing is read before it is asked for."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._files: dict[str, Any] = {}
        self.shapes: dict[str, layouts.Shape] = {}
        self.paths: dict[str, Path] = {}
        for path in paths:
            try:
                handle = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(_broken_file(path, error)) from error
            for key in handle.keys():  # noqa: SIM118 (not a dict)
                if key in self._files:
                    raise CheckpointError(f"{path}: tensor {key} is in {self.paths[key].name} as well; expected it once")
                self._files[key], self.paths[key] = handle, path
                self.shapes[key] = tuple(handle.get_slice(key).get_shape())

    def read(self, source: layouts.Source) -> Tensor:
        view = self._files[source.key].get_slice(source.key)
        tensor = view[:] if source.rows is None else view[source.rows[0] : source.rows[1]]
        return torch.cat(tensor.chunk(2)[::-1]) if source.swap else tensor


def _broken_file(path: Path, error: Exception) -> str:
    if not path.is_file():
        return f"{path}: no such file"
    size = path.stat().st_size
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        return f"{path}: a pickle file; only safetensors files are loaded (a pickle can run code): convert it first"
    return (
        f"{path}: not a whole safetensors file ({error}); it has {size:,} bytes: an interrupted download, or another kind "
        "of file. Fetch it again"
    )


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


def _load(
    cls: type[FluxTransformer], config: Mapping[str, Any], files: TensorFiles, where: str, layout: str, dtype: torch.dtype
) -> FluxTransformer:
    with init_empty_weights():
        model = cls.from_config(dict(config))
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    sources = _check(where, layout, files, ours)
    size = sum(t.numel() for t in model.state_dict().values()) * dtype.itemsize
    state = {}
    for name, source in track(sources.items(), "loading the transformer", disable=size < PROGRESS_BYTES, transient=True):
        tensor = files.read(source)
        if not tensor.is_floating_point():
            raise CheckpointError(f"{files.paths[source.key]}: {source.key} holds {tensor.dtype}, expected floating point")
        # contiguous copies, or each of q, k, v would keep the whole packed tensor of the file alive
        state[name] = tensor.to(dtype).contiguous()
    model.load_state_dict(state, strict=True, assign=True)
    model.register_to_config(_name_or_path=where)
    return model.eval()


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
    path = Path(path)
    files = TensorFiles([path])
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
    return _load(cls, config, files, str(path), layout, torch_dtype or dtype or torch.float32)


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
    if unknown := sorted(hub.keys() - HUB_ARGUMENTS):
        raise TypeError(f"from_pretrained: unknown arguments {', '.join(unknown)}; see FluxTransformer.from_pretrained")
    if use_safetensors is False:
        raise ValueError("use_safetensors=False: only safetensors files are loaded (a pickle can run code)")
    folder = _resolve_folder(path, subfolder, variant, hub)
    config = _read_json(folder / CONFIG_NAME)
    if (name := config.get("_class_name", "FluxTransformer2DModel")) != "FluxTransformer2DModel":
        raise CheckpointError(f"{folder / CONFIG_NAME}: describes a {name}, expected a FluxTransformer2DModel")
    files = TensorFiles(_weight_files(folder, variant))
    return _load(cls, config, files, str(folder), "diffusers", torch_dtype or dtype or torch.float32)


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


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    stem = f"{WEIGHTS_NAME}.{variant}" if variant else WEIGHTS_NAME
    index = folder / (
        f"{WEIGHTS_NAME}.safetensors.index.{variant}.json" if variant else f"{WEIGHTS_NAME}.safetensors.index.json"
    )
    if not index.is_file():
        single = folder / f"{stem}.safetensors"
        if not single.is_file() and list(folder.glob("*.bin")):
            raise CheckpointError(_broken_file(next(folder.glob("*.bin")), ValueError()))
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
