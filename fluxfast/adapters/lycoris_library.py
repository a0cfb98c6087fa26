"""All LyCORIS algorithms but LoKr: lycoris-lora's own module, called for one linear.

The library's module gets the frozen linear, and nothing of it is replaced: `LibraryLinear` calls
the module in the linear's place. The package is the optional extra `lycoris`.
"""

from __future__ import annotations

import io
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from fluxfast.adapters.lokr import Shapes
from fluxfast.adapters.lycoris_linear import LycorisLinear, device_of
from fluxfast.config.lycoris import LycorisOptions
from fluxfast.ops.linear.adapters import Adapter
from fluxfast.quant.linear import QuantLinear

# what the library adds beside the base's product without reading the base's weight
_BESIDE_BASE = ("lora", "locon", "loha", "glora")
# the name in files of what `full` trains
_FULL = {"weight": "diff", "bias": "diff_b"}


class LibraryLinear(LycorisLinear):
    """A linear with one of lycoris-lora's modules, `lycoris`, on it."""

    def __init__(self, base_layer: nn.Module, options: LycorisOptions, dtype: torch.dtype) -> None:
        super().__init__(base_layer, options)
        self.lycoris = _made(base_layer, for_base(options, base_layer))
        # the linear as it is called, with the hooks that may be on it
        self.lycoris.org_forward = base_layer.__call__
        if options.algo == "full":
            # a copy of the whole weight, which only the library's own `apply_to` needs
            self.lycoris._org_weight = self.lycoris.org_bias = None
        self.lycoris.to(device_of(base_layer), dtype)

    def trained(self) -> dict[str, Parameter]:
        renamed = _FULL if self.options.algo == "full" else {}
        return {renamed.get(name, name): p for name, p in self.lycoris.named_parameters()}

    def read(self, *, share_dropout: bool) -> tuple[Adapter, ...] | str:
        return f"lycoris-lora's own module computes {self.options.algo}"

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out] in the dtype of the base's output."""
        if not self.enabled:
            return self.base_layer(x)
        self.lycoris.multiplier = self.options.multiplier
        if x.dtype == next(self.lycoris.parameters()).dtype or x.dtype.itemsize != 2:
            return self._called(x)
        if x.device.type == "meta":
            # a plan's: no types are mixed there, and so it counts nothing that the library keeps
            return self.base_layer(x) + sum(p.sum() for p in self.lycoris.parameters()).to(x.dtype)
        # the library multiplies the base's weight and its own tensors, as they are
        with torch.autocast(x.device.type, x.dtype):
            return self._called(x)

    def _called(self, x: Tensor) -> Tensor:
        if self.options.algo == "full":
            return self._full(x)
        return self._dylora(x) if self.options.algo == "dylora" else self.lycoris(x)

    def _full(self, x: Tensor) -> Tensor:
        """The library's sum W x + (W + dW - W) x without what the difference would round away."""
        options, y = self.options, self.base_layer(x)
        if self.training and options.module_dropout and torch.rand(1) < options.module_dropout:
            return y
        weight, bias = self.lycoris.get_diff_weight(options.multiplier)
        added = nn.functional.linear(
            x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        )
        if self.training and options.rank_dropout:
            added = added * (torch.rand(self.out_features, device=x.device) > options.rank_dropout)
        return y + added

    def _dylora(self, x: Tensor) -> Tensor:
        """The library draws the block of ranks by Python's generator, which nobody restores.

        So torch's generator seeds it: a recomputed forward draws the same, and so does a resumed
        run.
        """
        before = random.getstate()
        random.seed(int(torch.randint(2**31, ())))
        try:
            return self.lycoris(x)
        finally:
            random.setstate(before)

    def numbers(self) -> dict[str, Tensor]:
        options = self.options
        if options.algo == "full":
            return {}
        if options.algo == "ia3":
            return {"on_input": torch.tensor(int(options.train_on_input))}
        if options.algo in ("diag-oft", "boft"):
            return {"alpha": torch.tensor(options.constraint, dtype=torch.float64)}
        alpha = (options.alpha or options.dim) * options.multiplier
        return {"alpha": torch.tensor(alpha, dtype=torch.float64)}

    @torch.no_grad()
    def exported(self) -> dict[str, Tensor]:
        options = self.options
        held = {name: p.detach() for name, p in self.trained().items()}
        if options.algo in ("full", "ia3"):
            held = {name: tensor * options.multiplier for name, tensor in held.items()}
        return held | self.numbers()

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        options = self.options
        unscaled = options.multiplier if options.algo in ("full", "ia3") else 1.0
        for name, own in self.trained().items():
            part, _, index = name.partition(".")
            if part in ("up_list", "down_list"):
                block = slice(
                    int(index) * options.block_size, (int(index) + 1) * options.block_size
                )
                whole = "lora_up.weight" if part == "up_list" else "lora_down.weight"
                own.copy_(tensors[whole][:, block] if part == "up_list" else tensors[whole][block])
            elif name == "scalar":
                own.fill_(1)
            elif name == "diff_b" and name not in tensors:
                own.zero_()
            else:
                own.copy_(tensors[name] / unscaled)


def library_shapes(out_features: int, in_features: int, options: LycorisOptions) -> Shapes:
    """The shapes of what an algorithm trains on a linear with a bias, by the names of its state.

    ValueError where it can't be had on such a linear.
    """
    linear = nn.Linear(in_features, out_features, device="meta")
    renamed = _FULL if options.algo == "full" else {}
    named = _made(linear, options).named_parameters()
    return {renamed.get(name, name): tuple(p.shape) for name, p in named}


def for_base(options: LycorisOptions, base: nn.Module) -> LycorisOptions:
    """The options with which the library's module computes over this base.

    Over a quantised base it adds beside the base's product where it can, as the library does over
    the quantised linears that it knows. ValueError where the algorithm can't be had over it.
    """
    if type(base) is nn.Linear:
        return options
    if not isinstance(base, QuantLinear):
        raise ValueError(
            f"lycoris-lora's {options.algo} reads the base's weight, which {type(base).__name__} "
            "has in a form of its own: set base_model_precision to a format of fluxfast's"
        )
    if options.algo == "full":
        raise ValueError(
            "algo full trains a change of every weight of the base, which a quantised base would "
            'only round: set "base_model_precision": "no_change", or choose another algo'
        )
    beside = options.algo in _BESIDE_BASE and not options.weight_decompose
    return options.with_changes({"bypass_mode": beside or options.bypass_mode})


def _made(linear: nn.Module, options: LycorisOptions) -> Any:
    """The library's module for a linear."""
    named = options.model_dump(
        include={
            *("decompose_both", "factor", "block_size", "constraint", "rescaled", "wd_on_out"),
            *("weight_decompose", "full_matrix", "bypass_mode", "unbalanced_factorization"),
            *("use_scalar", "train_on_input"),
        }
    )
    drops = (options.dropout, options.rank_dropout, options.module_dropout)
    module_class = _module_class(options.algo)
    try:
        # it prints a line for each module whose dropout has no effect
        with redirect_stdout(io.StringIO()), _weights_on_meta(device_of(linear)):
            return module_class("lycoris", linear, 1.0, options.dim, options.alpha, *drops, **named)
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"lycoris-lora's {options.algo} can't be had on a linear [{linear.out_features}, "
            f"{linear.in_features}]: {error}"
        ) from None


@contextmanager
def _weights_on_meta(device: torch.device) -> Iterator[None]:
    """Inside, weights without values stay so where the library copies them to the CPU."""
    if device.type != "meta":
        yield
        return
    own = Tensor.cpu
    Tensor.cpu = lambda tensor, *_: tensor  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.cpu = own  # type: ignore[method-assign]


def _module_class(algo: str) -> Any:
    try:
        from lycoris.logging import logger
        from lycoris.wrapper import network_module_dict
    except ImportError as error:
        raise ValueError(
            f"algo {algo} needs the package lycoris-lora ({error}): pip install "
            "'fluxfast[lycoris]'; LoKr does without"
        ) from error
    # a line for each shape, at "info"
    logger.setLevel(logging.WARNING)
    return network_module_dict[algo]
