"""A model without memory (on the meta device), and how a checkpoint's tensors become its memory."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from fluxfast.checkpoint import side_by_side
from fluxfast.quant import Format
from fluxfast.quant.linear import QuantLinear


def linears(model: nn.Module, kept: Collection[str]) -> list[str]:
    """The full names of a model's linears, without those in `kept`."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in kept
    ]


def quantize_empty(
    model: nn.Module, format: Format, names: Iterable[str], dtype: torch.dtype
) -> None:
    """Replace these linears of an empty model by `QuantLinear`s that compute in `dtype`."""
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


def fill(
    model: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    device: torch.device | str,
    on_host: Collection[str] = (),
) -> None:
    """Give an empty model memory on `device`, its parameters in `dtype`, and copy the tensors in.

    `tensors` must be exactly those of the model's state dict, in any order; each is copied and let
    go. Linears that are read as one lie side by side. on_host: names of modules whose tensors stay
    in host memory.
    """
    _cast_parameters(model, dtype)
    state = model.state_dict()
    host_state = {
        name: state.pop(name)
        for name in list(state)
        if any(name.startswith(f"{module}.") for module in on_host)
    }
    made = side_by_side.allocate(state, device) | side_by_side.allocate(host_state, "cpu")
    missing = set(made)
    with torch.no_grad():
        for name, tensor in tensors:
            made[name].copy_(tensor)
            missing.remove(name)
    assert not missing, missing
    model.load_state_dict(made, strict=True, assign=True)


def use_tensors(model: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Make these tensors themselves, such as views of a mapped file, an empty model's memory.

    Only floating-point tensors of another dtype are copied.
    """
    _cast_parameters(model, dtype)
    wanted = model.state_dict()
    model.load_state_dict(
        {name: tensors[name].to(like.dtype) for name, like in wanted.items()},
        strict=True,
        assign=True,
    )


def _cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    # the parts of quantised weights are buffers, and keep their own dtypes
    for parameter in model.parameters():
        assert parameter.is_meta
        parameter.data = parameter.data.to(dtype)
