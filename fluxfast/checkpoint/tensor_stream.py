"""A checkpoint's tensors on their way to a model or a file: checked and quantised one at a time.

Each function takes and gives (name, tensor) pairs lazily, so that a 24 GB checkpoint needs the
memory of a few tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from fluxfast.checkpoint import side_by_side
from fluxfast.checkpoint.keys import Shape, TensorSource
from fluxfast.checkpoint.not_flux import TAKE_UNQUANTISED
from fluxfast.checkpoint.reader import CheckpointError, TensorFiles, with_progress
from fluxfast.checkpoint.writer import Spec
from fluxfast.quant import Format, QuantWeight

# the smallest code without its sign bit that is a NaN or an infinity; e4m3fn has no infinity
_FIRST_NOT_FINITE = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}


def require_floats(files: TensorFiles, sources: Mapping[str, TensorSource]) -> None:
    """Raise CheckpointError naming a tensor that is not floating point."""
    for key in dict.fromkeys(source.key for source in sources.values()):
        if not files.dtypes[key].is_floating_point:
            raise CheckpointError(
                f"{files.paths[key]}: {key} holds {files.dtypes[key]}, expected floating point: "
                f"codes of another program's quantisation are not read; {TAKE_UNQUANTISED}"
            )


def float_tensors(
    files: TensorFiles,
    sources: Mapping[str, TensorSource],
    description: str,
    device: torch.device | str | None = None,
    *,
    checked: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors as the files hold them, moved to `device` if one is given.

    Each is valid until the next one is asked for. `description` stands beside the progress bar.
    Raises CheckpointError on a tensor that is not floating point and, if `checked`, on a value that
    is not finite.
    """
    require_floats(files, sources)
    sizes = {name: files.nbytes([source]) for name, source in sources.items()}

    def check(source: TensorSource, tensor: Tensor) -> None:
        require_finite(str(files.paths[source.key]), source, tensor)

    for name, tensor in with_progress(
        files.stream(sources, check if checked else None), sizes, description
    ):
        yield name, tensor if device is None else tensor.to(device)


def decoded_tensors(
    files: TensorFiles,
    format: Format,
    shapes: Mapping[str, Shape],
    names: Collection[str],
    description: str,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a quantised file on `device`, with the weights of `names` decoded to fp32.

    `shapes` are those of the model's tensors before it was quantised, in the order in which they
    are given out. `description` stands beside the progress bar.
    """
    chosen = {f"{name}.weight" for name in names}
    # a linear's parts lie apart in the file, each among its like
    parts = {
        name: {part: TensorSource(f"{name}.{part}") for part in format.layout((shape[0], shape[1]))}
        if name in chosen
        else {name: TensorSource(name)}
        for name, shape in shapes.items()
    }

    def decode() -> Iterator[tuple[str, Tensor]]:
        for name, sources in parts.items():
            stored = {part: t.to(device, copy=True) for part, t in files.stream(sources)}
            if name not in chosen:
                yield name, stored[name]
                continue
            rows, cols = shapes[name]
            yield name, QuantWeight(format, stored, (rows, cols)).to(torch.float32)

    sizes = {name: files.nbytes(sources.values()) for name, sources in parts.items()}
    yield from with_progress(decode(), sizes, description)


def require_finite(where: str, source: TensorSource, tensor: Tensor) -> None:
    """Raise CheckpointError naming the first NaN or infinity of a floating-point tensor.

    The message gives its index in the file's tensor, of which this one may be a part. Where all
    values are finite this costs one pass at the speed of memory; `isfinite().all()` would take
    fifty times as long.
    """
    if tensor.numel() == 0 or _all_finite(tensor):
        return
    values = tensor.to(torch.float64)
    index = (~values.isfinite()).nonzero()[0].tolist()
    value = values[tuple(index)].item()
    if source.swap:
        index[0] = (index[0] + len(values) // 2) % len(values)
    if source.rows is not None:
        index[0] += source.rows[0]
    raise CheckpointError(
        f"{where}: {source.key}: holds {value} at {index}, and a weight must be finite: the "
        "checkpoint is damaged, or its training failed. Fetch it again, or take another"
    )


def _all_finite(tensor: Tensor) -> bool:
    if tensor.itemsize > 1:
        # a single NaN makes both bounds NaN, so two numbers answer for all
        return all(bound.isfinite().item() for bound in torch.aminmax(tensor))
    # torch has no aminmax of 8-bit floats; read as integers, NaNs and infinities are the largest
    # codes: as int8 among the positive numbers, as uint8 among the negative ones
    first = _FIRST_NOT_FINITE[tensor.dtype]
    return bool(tensor.view(torch.int8).max() < first) and bool(
        tensor.view(torch.uint8).max() < first + 0x80
    )


def quantized(
    tensors: Iterable[tuple[str, Tensor]],
    format: Format,
    names: Collection[str],
    where: str,
    sources: Mapping[str, TensorSource] | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors, with the weight of each linear in `names` quantised to `format`.

    `<name>.weight` becomes its parts, `<name>.weight.<part>`, computed from the values as they come
    and on the tensor's device; the others are copied, in the dtype of `dtypes` if given. Raises
    CheckpointError naming a weight that can't be quantised or holds a value that is not finite. The
    message says `where` it came from, and what `sources` says it is called there (default: the same
    name).
    """
    chosen = {f"{name}.weight" for name in names}
    for name, tensor in tensors:
        source = TensorSource(name) if sources is None else sources[name]
        if name not in chosen:
            require_finite(where, source, tensor)
            yield name, tensor.to(tensor.dtype if dtypes is None else dtypes[name], copy=True)
            continue
        try:
            # a value that is not finite gives a scale that `quantize` refuses, so weights need no
            # pass of their own; bf16 holds every 8-bit float exactly
            parts = format.quantize(tensor.bfloat16() if tensor.itemsize == 1 else tensor)
        except ValueError as error:
            require_finite(where, source, tensor)
            raise CheckpointError(f"{where}: {source.key}: {error}") from error
        for part, value in parts.items():
            yield f"{name}.{part}", value


def rounded(
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    where: str,
    sources: Mapping[str, TensorSource] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Copies of the tensors in `dtype`; the other arguments are those of `quantized`.

    Raises CheckpointError naming a tensor that holds a value that is not finite, or too large.
    """
    for name, tensor in tensors:
        made = tensor.to(dtype, copy=True)
        if made.numel() and not _all_finite(made):
            source = TensorSource(name) if sources is None else sources[name]
            require_finite(where, source, tensor)
            raise CheckpointError(
                f"{where}: {source.key}: reaches {tensor.abs().max().item():g}, which {dtype} "
                "can't hold: write bf16"
            )
        yield name, made


def quantized_specs(
    dtypes: Mapping[str, torch.dtype],
    shapes: Mapping[str, Shape],
    format: Format,
    names: Collection[str],
) -> dict[str, Spec]:
    """Shape and dtype of everything that `quantized` will give, by name.

    `dtypes` has those of the tensors that are copied. Tensors that are read as one
    (`side_by_side`) follow each other.
    """
    chosen = {f"{name}.weight" for name in names}
    specs: dict[str, Spec] = {}
    for name, shape in shapes.items():
        if name in chosen:
            rows, cols = shape
            layout = format.layout((rows, cols))
            specs |= {
                f"{name}.{part}": Spec(shape, dtype) for part, (shape, dtype) in layout.items()
            }
        else:
            specs[name] = Spec(shape, dtypes[name])
    return {name: specs[name] for name in side_by_side.ordered(specs)}
