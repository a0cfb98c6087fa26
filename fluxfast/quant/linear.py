"""A linear over a quantised, frozen weight: y = x Wᵀ + b.

W is decoded for the product and dropped after it, forward and backward. `QuantLinear` is an
`nn.Linear` by type, so that PEFT and everybody else's code takes it for one. Its state dict holds
`weight.<part>` for each of its format's parts (see `Format.layout`), and `bias`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fluxfast.ops.device import autocast_dtype
from fluxfast.quant import FORMATS, Format, QuantWeight
from fluxfast.quant.format import Shape
from fluxfast.quant.weight import named_parts


def _decoded(parts: tuple[Tensor, ...], format: str, shape: Shape, dtype: torch.dtype) -> Tensor:
    named = named_parts(FORMATS[format], parts, shape)
    return QuantWeight(FORMATS[format], named, shape).to(dtype)


class _QuantLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, format: str, shape: Shape, *parts: Tensor
    ) -> Tensor:
        ctx.format, ctx.shape = format, shape
        ctx.save_for_backward(*parts)
        return nn.functional.linear(x, _decoded(parts, format, shape, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = dbias = None
        # once: a checkpoint gives what it saved no second time
        parts = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            dx = dy @ _decoded(parts, ctx.format, ctx.shape, dy.dtype)
        if ctx.needs_input_grad[1]:
            dbias = dy.flatten(0, -2).sum(0)
        return (dx, dbias, None, None, *(None for _ in parts))


def quant_linear(x: Tensor, weight: QuantWeight, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times the weight [N, K], plus bias [N]: [..., N] in x's dtype.

    Gradients go to x and the bias, never to the weight.
    """
    bias = None if bias is None else bias.to(x.dtype)
    return _QuantLinear.apply(x, bias, weight.format.name, weight.shape, *weight.parts.values())


# whether `QuantLinear.weight` has a shape, a dtype and a device, but no values
_shapes_only = ContextVar("shapes_only", default=False)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Inside, `QuantLinear.weight` decodes nothing: for code that only asks weights for shapes."""
    token = _shapes_only.set(True)
    try:
        yield
    finally:
        _shapes_only.reset(token)


class QuantLinear(nn.Linear):
    """An `nn.Linear` whose weight is kept in a storage format.

    Construct it empty to load into, or by `from_linear`. `compute_dtype` is the dtype that `weight`
    comes in and that PEFT gives adapters; `forward` computes in x's own. Casts (`.to(dtype)`,
    `.half()`) change it and the bias, never the stored parts.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        format: Format,
        compute_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        # nn.Linear's own would allocate and initialise a weight
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.format, self.compute_dtype = format, compute_dtype
        parts = format.empty((out_features, in_features), device)
        # the name of each part, and that of its buffer: a step asks for them hundreds of times
        self._buffer_names = [(name, f"weight_{name}") for name in parts]
        for name, buffer in self._buffer_names:
            self.register_buffer(buffer, parts[name], persistent=False)
        empty = torch.empty(out_features, dtype=compute_dtype, device=device) if bias else None
        self.register_parameter(
            "bias", None if empty is None else nn.Parameter(empty, requires_grad=False)
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, format: Format) -> QuantLinear:
        """The quantised twin of `linear`, on its device, frozen. It shares the bias."""
        weight = linear.weight
        made = cls(
            linear.in_features,
            linear.out_features,
            bias=False,
            format=format,
            compute_dtype=weight.dtype,
            device="meta",
        )
        for name, part in format.quantize(weight.detach()).items():
            setattr(made, f"weight_{name}", part)
        if linear.bias is not None:
            made.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return made.train(linear.training)

    def packed(self) -> QuantWeight:
        """The weight as it is stored: format, parts and shape, without a copy."""
        shape, held = (self.out_features, self.in_features), self._buffers
        parts = {name: held[buffer] for name, buffer in self._buffer_names}
        return QuantWeight(self.format, parts, shape)  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight [out, in] in `compute_dtype`, decoded anew each time.

        Writing to it changes nothing.
        """
        if _shapes_only.get():
            nothing = torch.empty((), dtype=self.compute_dtype, device=self.packed().device)
            return nothing.expand(self.out_features, self.in_features)
        return self.packed().to(self.compute_dtype)

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in] to [..., out] in its dtype, or in autocast's where that is on."""
        if (dtype := autocast_dtype(input.device.type)) is not None:
            input = input.to(dtype)
        return quant_linear(input, self.packed(), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.format.name}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        parts = self.packed().parts
        for name in parts:
            del self._buffers[f"weight_{name}"]
        super()._apply(fn, recurse)
        for name, part in parts.items():
            # as bytes, which no cast touches
            self._buffers[f"weight_{name}"] = fn(part.view(torch.uint8)).view(part.dtype)
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for name, part in self.packed().parts.items():
            destination[f"{prefix}weight.{name}"] = part
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name, part in self.packed().parts.items():
            key = f"{prefix}weight.{name}"
            # nn.Module would call a key with a further dot unexpected, so it doesn't get to see it
            loaded = state_dict.pop(key, None)
            if loaded is None:
                missing_keys.append(key)
            elif loaded.shape != part.shape or loaded.dtype != part.dtype:
                error_msgs.append(
                    f"{key}: {self.format.name} of a weight [{self.out_features}, "
                    f"{self.in_features}] is {list(part.shape)} "
                    f"{part.dtype}, the file has {list(loaded.shape)} {loaded.dtype}"
                )
            elif local_metadata.get("assign_to_params_buffers", False):
                setattr(self, f"weight_{name}", loaded)
            else:
                part.copy_(loaded)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
