"""A checkpoint of FLUX.1's transformer: what it holds, and how it is loaded, checked or quantised.

Tensors are read one at a time, so the model's own memory is all that is allocated; a file that
fluxfast quantised is mapped on a CPU. Names and shapes are compared with the model that the config
describes before the first tensor is read: a wrong or incomplete file is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel
from torch import Tensor

from fluxfast.checkpoint import empty_model, keys, quantized, side_by_side, tensor_stream
from fluxfast.checkpoint.keys import Shape, TensorSource
from fluxfast.checkpoint.locate import shown
from fluxfast.checkpoint.reader import BrokenFile, CheckpointError, TensorFiles
from fluxfast.checkpoint.weights import Weights
from fluxfast.checkpoint.writer import Spec, write_tensors
from fluxfast.quant import Format
from fluxfast.quant.rules import KEPT

Model = TypeVar("Model", bound=FluxTransformer2DModel)

# verifying a gigabyte takes less than a second; a file of 12 GB would delay every start by many
VERIFIED_BYTES = 1 << 30
_SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class Checkpoint:
    """A transformer's files, opened but not read.

    `where` is the path that messages name, `config` the arguments of the model's constructor, and
    `style` the naming style of the tensors: "diffusers", "bfl" or "comfy" (see `keys`).
    """

    where: str
    config: Mapping[str, Any]
    files: TensorFiles
    style: str

    @property
    def quantized(self) -> quantized.QuantizedInfo | None:
        """What the file says of itself if fluxfast quantised it, else None."""
        return quantized.read_info(self.files) if quantized.is_quantized(self.files) else None

    @property
    def nbytes(self) -> int:
        """The size of all files together, in bytes."""
        return sum(path.stat().st_size for path in self.files.files)

    @property
    def verified_when_mapped(self) -> bool:
        """Whether `load` on a CPU compares a quantised file with its checksums."""
        return self.nbytes <= VERIFIED_BYTES

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
        """Load the model onto `device`, its floating-point parameters in `dtype`.

        format: quantise the linears to it while reading, on the device `quantize_on`. A checkpoint
        that is quantised already takes None or its own format; it is mapped on a CPU and copied
        elsewhere. on_host: full names of modules whose tensors stay in host memory.
        Raises CheckpointError if the files do not hold this model.
        """
        model = self.empty(cls)
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
                tensors = self.files.stream(sources)
                empty_model.fill(model, tensors, dtype, device, on_host)
        else:
            tensors = tensor_stream.float_tensors(
                self.files,
                sources,
                "loading the transformer",
                quantize_on if format is not None else None,
                # quantising finds values that are not finite by itself, and at less cost
                checked=format is None,
            )
            if format is not None:
                names = empty_model.linears(model, KEPT)
                tensors = tensor_stream.quantized(tensors, format, names, self.where, sources)
                empty_model.quantize_empty(model, format, names, dtype)
            empty_model.fill(model, tensors, dtype, device, on_host)
        model.register_to_config(_name_or_path=self.where)
        return model.eval()

    def check(self, cls: type[FluxTransformer2DModel]) -> None:
        """Compare names, shapes and dtypes with the model's without reading a weight.

        `load` begins with the same comparison. Raises CheckpointError naming what is missing,
        unexpected, of another shape or of a dtype that can't be loaded.
        """
        self._prepare(self.empty(cls), torch.bfloat16)

    def quantize(
        self,
        cls: type[Model],
        path: Path,
        format: Format,
        *,
        quantize_on: torch.device | str = "cpu",
    ) -> int:
        """Write this transformer in `format` to `path`, one tensor at a time.

        Returns the new file's size in bytes. Raises CheckpointError if the checkpoint is quantised
        already, or if `path` is one of its own files or a file that fluxfast did not write.
        """
        if quantized.is_quantized(self.files):
            raise CheckpointError(
                f"{self.where}: is quantised already; quantise the checkpoint that it was made from"
            )
        self._check_target(path)
        _check_foreign(path)
        # taken before the weights are read: if the source changes meanwhile, the result is stale
        metadata = quantized.metadata(self.where, self.files.files, format, self.empty(cls).config)
        return self._write(cls, path, format, f"quantising to {format.name}", metadata, quantize_on)

    def write_changed(
        self,
        cls: type[Model],
        path: Path,
        storage: Format | torch.dtype,
        change: Callable[[str, Tensor], Tensor],
        description: str,
        *,
        metadata: Mapping[str, str],
        device: torch.device | str = "cpu",
    ) -> int:
        """Write this transformer to `path` with other weights, one tensor at a time.

        `change` gets each tensor by its name in diffusers' layout, in the floating dtype of the
        file, or in fp32 where the file has it quantised; it returns the tensor, or a new one in any
        floating dtype. `storage` is the format that linears are then quantised to, or the dtype of
        all tensors; names are diffusers'. `metadata` is added to the file's own. `description`
        stands beside the progress bar.

        Returns the new file's size in bytes. Raises CheckpointError if `path` is one of the
        checkpoint's own files, or for a value that `storage` can't hold.
        """
        self._check_target(path)
        told = {"format": "pt"}
        if isinstance(storage, Format):
            told = quantized.metadata(self.where, (), storage, self.empty(cls).config)
        return self._write(
            cls, path, storage, description, {**told, **metadata}, device, change=change
        )

    def _write(
        self,
        cls: type[Model],
        path: Path,
        storage: Format | torch.dtype,
        description: str,
        metadata: Mapping[str, str],
        device: torch.device | str,
        change: Callable[[str, Tensor], Tensor] | None = None,
    ) -> int:
        weights = self.weights(cls)
        tensors = weights.stream(description, device)
        if change is not None:
            tensors = ((name, change(name, tensor)) for name, tensor in tensors)
        # messages are to name what the file holds, under the names that it has there
        sources = weights.sources if weights.format is None else None
        if not isinstance(storage, Format):
            specs = {name: Spec(shape, storage) for name, shape in weights.shapes.items()}
            made = tensor_stream.rounded(tensors, storage, self.where, sources)
            return write_tensors(path, specs, metadata, made)
        linears, dtypes = weights.linears, weights.dtypes
        specs = tensor_stream.quantized_specs(dtypes, weights.shapes, storage, linears)
        made = tensor_stream.quantized(tensors, storage, linears, self.where, sources, dtypes)
        return write_tensors(path, specs, metadata, made, checked=True)

    def config_json(self, cls: type[FluxTransformer2DModel], storage: Format | torch.dtype) -> str:
        """The config.json to put beside what was written in `storage`.

        Of a format, its quantization_config tells other programs that they can't read the weights.
        """
        config = json.loads(self.empty(cls).to_json_string())
        if isinstance(storage, Format):
            config["quantization_config"] = {"quant_method": "fluxfast", "format": storage.name}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def weights(self, cls: type[FluxTransformer2DModel]) -> Weights:
        """What the files hold as numbers, one tensor at a time.

        Raises CheckpointError where `check` does.
        """
        model = self.empty(cls)
        shapes, linears = _shapes(model), empty_model.linears(model, KEPT)
        format = self.quantized.format if self.quantized else None
        sources = self._prepare(model, torch.bfloat16)
        return Weights(self.files, shapes, sources, linears, format)

    def _check_target(self, path: Path) -> None:
        if any(path.resolve() == file.resolve() for file in self.files.files):
            raise CheckpointError(f"{path}: is the checkpoint itself; write to another file")

    def empty(self, cls: type[Model]) -> Model:
        """The model that the config describes, without memory.

        Raises CheckpointError if there is no such model.
        """
        try:
            with init_empty_weights():
                return cls.from_config(dict(self.config))
        except (ValueError, TypeError, ZeroDivisionError, RuntimeError) as error:
            # the sizes contradict each other, or are no numbers
            raise CheckpointError(
                f"{self.where}: no FLUX.1 transformer has such a config: {error}"
            ) from error

    def _prepare(
        self, model: FluxTransformer2DModel, dtype: torch.dtype
    ) -> dict[str, TensorSource]:
        """Check the files against an empty model, and say where each of its tensors lies in them.

        For a quantised file the model's linears are replaced by quantised ones first.
        """
        if (info := self.quantized) is None:
            sources = _compare(self.where, self.style, self.files, _shapes(model))
            tensor_stream.require_floats(self.files, sources)
            return sources
        empty_model.quantize_empty(model, info.format, empty_model.linears(model, KEPT), dtype)
        sources = _compare(self.where, "diffusers", self.files, _shapes(model))
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
        empty_model.use_tensors(model, self.files.mapped(), dtype)
        # biases that were cast to `dtype` are copies, and no longer lie in the file's order
        side_by_side.pack_groups(model)


def _shapes(model: FluxTransformer2DModel) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _compare(
    where: str, style: str, files: TensorFiles, shapes: Mapping[str, Shape]
) -> dict[str, TensorSource]:
    """Compare the files' names and shapes with a model's; return where each of its tensors lies.

    Raises CheckpointError listing the first few differences.
    """
    sources = keys.sources(style, shapes)
    wanted = {source.key for source in sources.values()}
    missing = sorted(wanted - files.shapes.keys())
    unexpected = sorted(keys.strangers(style, files.shapes, wanted))
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {shown(missing)}")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected: {shown(unexpected)}")
    # several of the model's tensors may be rows of one tensor in the file: add their rows up
    rows: dict[str, int] = {}
    for name, source in sources.items():
        rows[source.key] = rows.get(source.key, 0) + shapes[name][0]
    for name, source in sources.items():
        if source.key in files.shapes:
            expected = (rows[source.key], *shapes[name][1:])
            if files.shapes[source.key] != expected:
                problems.append(
                    f"{source.key} has shape {files.shapes[source.key]}, expected {expected}"
                )
    if problems:
        raise CheckpointError(
            f"{where}: tensors don't fit the FLUX.1 transformer ({style} layout): "
            f"{'; '.join(problems[:_SHOWN_PROBLEMS])}"
        )
    return sources


def _check_foreign(path: Path) -> None:
    """Refuse to write over a file that fluxfast did not quantise."""
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
