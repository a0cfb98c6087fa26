"""From a checkpoint to a model without holding the checkpoint: each tensor is read, quantised,
placed or written, dropped.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from fluxfast.checkpoint import side_by_side
from fluxfast.checkpoint.naming import Source
from fluxfast.checkpoint.reader import CheckpointError, TensorFiles, with_progress
from fluxfast.checkpoint.tensor_kinds import TAKE_UNQUANTISED
from fluxfast.checkpoint.writer import Spec
from fluxfast.quant import Format
from fluxfast.quant.linear import QuantLinear

# of 8-bit floats, the smallest code without sign that is not a number: e4m3fn has a NaN and no
# infinity
_FIRST_NOT_FINITE = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}


def quantize_empty(
    model: nn.Module, format: Format, names: Iterable[str], dtype: torch.dtype
) -> None:
    """Replace the `nn.Linear`s of these names in a model on the meta device by empty `QuantLinear`s
    that compute in `dtype`.
    """
    for name in list(names):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear) and linear.weight.is_meta
        made = QuantLinear(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            format=format,
            compute_dtype=dtype,
            device="meta",
        )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made.train(linear.training))


def linears(model: nn.Module, kept: Collection[str]) -> list[str]:
    """The full names of a model's linears, without those in `kept`."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in kept
    ]


def require_floats(files: TensorFiles, sources: Mapping[str, Source]) -> None:
    """Raise CheckpointError naming a tensor that is not floating point."""
    for key in dict.fromkeys(source.key for source in sources.values()):
        if not files.dtypes[key].is_floating_point:
            raise CheckpointError(
                f"{files.paths[key]}: {key} holds {files.dtypes[key]}, expected floating point: "
                "codes of another program's "
                f"quantisation are not read; {TAKE_UNQUANTISED}"
            )


def float_tensors(
    files: TensorFiles,
    sources: Mapping[str, Source],
    description: str,
    device: torch.device | str | None = None,
    *,
    checked: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) as the files hold them, each good until the next is asked for; `device` is
    where they go.

    Raises CheckpointError on a tensor that is not floating point, and, if `checked`, on a value
    that is not finite.
    """
    require_floats(files, sources)
    sizes = {name: files.nbytes([source]) for name, source in sources.items()}

    def check(source: Source, tensor: Tensor) -> None:
        require_finite(str(files.paths[source.key]), source, tensor)

    for name, tensor in with_progress(
        files.stream(sources, check if checked else None), sizes, description
    ):
        yield name, tensor if device is None else tensor.to(device)


def require_finite(where: str, source: Source, tensor: Tensor) -> None:
    """Raise CheckpointError naming the first value of a floating-point tensor that is a NaN or an
    infinity, and its place in the file's tensor, of which this one may be a part.

    One pass at the speed of memory where all is well: `isfinite().all()` would take fifty times as
    long.
    """
    if tensor.numel() == 0 or _all_finite(tensor):
        return
    values = tensor.to(torch.float64)
    place = (~values.isfinite()).nonzero()[0].tolist()
    value = values[tuple(place)].item()
    if source.swap:
        place[0] = (place[0] + len(values) // 2) % len(values)
    if source.rows is not None:
        place[0] += source.rows[0]
    raise CheckpointError(
        f"{where}: {source.key}: holds {value} at {place}, and a weight must be finite: the "
        "checkpoint is "
        "damaged, or its training failed. Fetch it again, or take another"
    )


def _all_finite(tensor: Tensor) -> bool:
    if tensor.itemsize > 1:
        # both are NaN if one value is
        return all(bound.isfinite().item() for bound in torch.aminmax(tensor))
    # 8-bit floats: of all codes with the sign bit off, or on, those of infinities and NaNs are the
    # largest
    first = _FIRST_NOT_FINITE[tensor.dtype]
    return bool(tensor.view(torch.int8).max() < first) and bool(
        tensor.view(torch.uint8).max() < first + 0x80
    )


def quantized(
    tensors: Iterable[tuple[str, Tensor]],
    format: Format,
    names: Collection[str],
    where: str,
    sources: Mapping[str, Source] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors, with `<name>.weight` of each linear in `names` as its parts,
    `<name>.weight.<part>`; all of them copies.

    Quantised from the values as they are stored, where the tensor is. Raises CheckpointError naming
    a weight that can't be, or a value that is not finite, and `where` it came from; `sources` says
    what it is called there (default: the same).
    """
    chosen = {f"{name}.weight" for name in names}
    for name, tensor in tensors:
        source = Source(name) if sources is None else sources[name]
        if name not in chosen:
            require_finite(where, source, tensor)
            yield name, tensor.clone()
            continue
        try:
            # a value that is not finite leaves a scale that isn't, so no pass over the weight is
            # spent on it every 8-bit float is a bf16 number
            parts = format.quantize(tensor.bfloat16() if tensor.itemsize == 1 else tensor)
        except ValueError as error:
            require_finite(where, source, tensor)
            raise CheckpointError(f"{where}: {source.key}: {error}") from error
        for part, value in parts.items():
            yield f"{name}.{part}", value


def quantized_specs(
    files: TensorFiles,
    sources: Mapping[str, Source],
    ours: Mapping[str, tuple[int, ...]],
    format: Format,
    names: Collection[str],
) -> dict[str, Spec]:
    """What `quantized` will give for these sources: shapes and dtypes by name, those that belong
    side by side in a row.
    """
    chosen = {f"{name}.weight" for name in names}
    specs: dict[str, Spec] = {}
    for name, source in sources.items():
        if name in chosen:
            rows, cols = ours[name]
            layout = format.layout((rows, cols))
            specs |= {
                f"{name}.{part}": Spec(shape, dtype) for part, (shape, dtype) in layout.items()
            }
        else:
            specs[name] = Spec(ours[name], files.dtypes[source.key])
    return {name: specs[name] for name in side_by_side.ordered(specs)}


def place(
    model: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    device: torch.device | str,
    on_host: Collection[str] = (),
) -> None:
    """Fill a model on the meta device: memory of its own on `device`, packed by groups, its
    parameters in `dtype`.

    `tensors` must be those of the model's state dict, in any order; each is copied and let go.
    `on_host`: names of modules whose tensors stay in host memory.
    """
    cast_empty(model, dtype)
    state = model.state_dict()
    here = {
        name: state.pop(name)
        for name in list(state)
        if any(name.startswith(f"{module}.") for module in on_host)
    }
    homes = side_by_side.allocate(state, device) | side_by_side.allocate(here, "cpu")
    missing = set(homes)
    with torch.no_grad():
        for name, tensor in tensors:
            homes[name].copy_(tensor)
            missing.remove(name)
    assert not missing, missing
    model.load_state_dict(homes, strict=True, assign=True)


def adopt(model: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Make a model on the meta device of these very tensors, such as a file's map; only floats of
    another dtype are copied.
    """
    cast_empty(model, dtype)
    wanted = model.state_dict()
    model.load_state_dict(
        {name: tensors[name].to(like.dtype) for name, like in wanted.items()},
        strict=True,
        assign=True,
    )


def cast_empty(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the parameters of a model on the meta device a dtype; a quantised linear's parts keep
    theirs.
    """
    for parameter in model.parameters():
        assert parameter.is_meta
        parameter.data = parameter.data.to(dtype)
