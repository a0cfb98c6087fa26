"""A checkpoint of FLUX.1's transformer: what it holds, and how it is loaded, checked or quantised.

Tensors are read one at a time, so the model's own memory is all that is allocated; a file that
fluxfast quantised is mapped on a CPU. Names and shapes are compared with the model that the config
describes before the first tensor is read: a wrong or incomplete file is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
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
from fluxfast.checkpoint.writer import write_tensors
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
        self._prepare(self._empty(cls), torch.bfloat16)

    def linear_weights(
        self,
        cls: type[FluxTransformer2DModel],
        names: Collection[str],
        description: str,
        device: torch.device | str = "cpu",
    ) -> Iterator[tuple[str, Tensor]]:
        """The weights [out, in] of these linears of the model, by the linears' names.

        They come one at a time, on `device`, as they are stored; each is valid until the next one
        is asked for. `description` stands beside the progress bar. Raises CheckpointError if the
        checkpoint is quantised, or its files do not hold this model.
        """
        if quantized.is_quantized(self.files):
            raise CheckpointError(f"{self.where}: is quantised, and so has no original weights")
        sources = self._prepare(self._empty(cls), torch.bfloat16)
        wanted = {name: sources[f"{name}.weight"] for name in names}
        return tensor_stream.float_tensors(self.files, wanted, description, device, checked=True)

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
        _check_target(path, self.files)
        model = self._empty(cls)
        shapes = _shapes(model)
        sources = self._prepare(model, torch.bfloat16)
        names = empty_model.linears(model, KEPT)
        specs = tensor_stream.quantized_specs(self.files, sources, shapes, format, names)
        # taken before the weights are read: if the source changes meanwhile, the result is stale
        metadata = quantized.metadata(self.where, self.files, format, model.config)
        tensors = tensor_stream.float_tensors(
            self.files, sources, f"quantising to {format.name}", quantize_on
        )
        made = tensor_stream.quantized(tensors, format, names, self.where, sources)
        return write_tensors(path, specs, metadata, made, checked=True)

    def config_json(self, cls: type[FluxTransformer2DModel], format: Format) -> str:
        """The config.json to put beside what `quantize` wrote.

        Its quantization_config tells other programs that they can't read the weights.
        """
        config = json.loads(self._empty(cls).to_json_string())
        config["quantization_config"] = {"quant_method": "fluxfast", "format": format.name}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def _empty(self, cls: type[Model]) -> Model:
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


def _check_target(path: Path, source: TensorFiles) -> None:
    """Refuse to write over the source, or over a file that fluxfast did not write."""
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
