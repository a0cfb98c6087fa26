"""AdamW and Lion with states in 8 bits or fp32, as bitsandbytes has them, for all tensors at once.

The formulas and the coding of states are in `fluxfast.ops.blockwise_update`. Parameters of fewer
than 4096 elements keep fp32 states in any case.

Checkpoints have bitsandbytes' layout, so a run may go on with either implementation.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from fluxfast.ops.blockwise_update import (
    QUANT_BLOCK,
    code_maps,
    decode,
    dynamic_map,
    encode,
    in_blocks,
    update_ref,
)
from fluxfast.train.multi_tensor import MultiTensorOptimizer, gradients_of, passes

# where bitsandbytes' state dicts have what is not of the parameter's shape
_WRAPPED = "__bnb_optimizer_quant_state__"


class _Blockwise(MultiTensorOptimizer):
    """What the four optimisers below share."""

    formula: Literal["adamw", "lion"]
    bits: Literal[8, 32] = 32

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        min_8bit_size: int,
        impl: str,
    ) -> None:
        self.min_8bit_size = min_8bit_size
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, impl)

    @property
    def _numbers(self) -> tuple[int, ...]:
        """The numbers of the formula's states, in bitsandbytes' names."""
        return (1, 2) if self.formula == "adamw" else (1,)

    def _new_state(self, p: Parameter, group: dict[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = {}
        eight_bit = self.bits == 8 and p.numel() >= self.min_8bit_size
        for i in self._numbers:
            dtype = torch.uint8 if eight_bit else torch.float32
            state[f"state{i}"] = torch.zeros(p.shape, dtype=dtype, device=p.device)
            if eight_bit:
                blocks = -(-p.numel() // QUANT_BLOCK)
                state[f"absmax{i}"] = torch.zeros(blocks, device=p.device)
        return state

    def _kind(self, p: Parameter) -> Hashable:
        return self.state[p]["state1"].dtype

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "min_8bit_size": self.min_8bit_size}

    # ---- checkpoints, in bitsandbytes' layout ----------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        whole = super().state_dict()
        states = {}
        maps = {f"qmap{i}": dynamic_map(signed=i == 1) for i in self._numbers}
        for index, state in whole["state"].items():
            inner = {name: value for name, value in state.items() if name != "step"}
            if "absmax1" in inner:
                inner |= maps
            states[index] = {"step": state["step"], _WRAPPED: inner}
        return {**whole, "state": states}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take a state dict of ours, or of bitsandbytes' optimiser of the same name."""
        super().load_state_dict({**state_dict, "state": {}})
        # torch would cast codes and fp32 states to the type of their parameter
        flat = [p for group in self.param_groups for p in group["params"]]
        for index, saved in state_dict["state"].items():
            p = flat[int(index)]
            kept = {k: v for k, v in saved[_WRAPPED].items() if not k.startswith("qmap")}
            self.state[p] = {"step": int(saved["step"])} | {
                k: v.to(p.device, copy=True) for k, v in kept.items()
            }

    # ---- the update ------------------------------------------------------------------------------

    def _state_tensors(self, params: Sequence[Parameter]) -> list[list[Tensor | None]]:
        names = ("state1", "state2", "absmax1", "absmax2")
        return [[self.state[p].get(name) for p in params] for name in names]

    def _table(self, tensors: list[list[Any]]) -> Any:
        from fluxfast_kernels.blockwise_update import States, blockwise_table

        return blockwise_table(tensors[0], States(*tensors[1:]))

    def _update_fused(
        self, params: list[Parameter], group: dict[str, Any], step: int, place: tuple[int, int]
    ) -> None:
        from fluxfast_kernels.blockwise_update import blockwise_update

        grads = gradients_of(params)
        tables = self._tables_of(params, grads, place)
        blockwise_update(
            self.formula,
            tables.table,
            tables.grads,
            code_maps(params[0].device),
            lr=float(group["lr"]),
            betas=tuple(group["betas"][:2]),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=step,
        )

    def _update_plain(
        self, params: list[Parameter], group: dict[str, Any], step: int, place: tuple[int, int]
    ) -> None:
        for chunk in passes(params):
            p = _rows(chunk)
            grad = _rows([p.grad for p in chunk if p.grad is not None])
            states = [self._read(chunk, i) for i in self._numbers]
            update_ref(self.formula, p, grad, states, group, step)
            _write_back(p, chunk)
            for i, values in zip(self._numbers, states, strict=True):
                self._write(chunk, i, values)

    def _read(self, params: Sequence[Parameter], i: int) -> Tensor:
        """A state of the parameters, as `_rows` has them."""
        kept = [self.state[p][f"state{i}"] for p in params]
        if kept[0].dtype == torch.float32:
            return _rows(kept)
        numbers = code_maps(kept[0].device)[i - 1, 0]
        # what rows are filled up with stands for 0
        zero = int((numbers == 0).nonzero()[0])
        scales = torch.cat([self.state[p][f"absmax{i}"] for p in params])
        return decode(_rows(kept, zero), scales, numbers)

    def _write(self, params: Sequence[Parameter], i: int, values: Tensor) -> None:
        kept = [self.state[p][f"state{i}"] for p in params]
        if kept[0].dtype == torch.uint8:
            values, scales = encode(values, code_maps(values.device)[i - 1, 1])
            all_scales = [self.state[p][f"absmax{i}"] for p in params]
            torch._foreach_copy_(all_scales, scales.split([s.numel() for s in all_scales]))
        _write_back(values, kept)


def _rows(tensors: Sequence[Tensor], filling: int = 0) -> Tensor:
    """One new fp32 tensor [N, 256] of all of them, each filled up to whole rows."""
    return torch.cat([in_blocks(t.detach(), filling) for t in tensors]).float()


def _write_back(rows: Tensor, tensors: Sequence[Tensor]) -> None:
    """What `_rows` does, in reverse, into the tensors."""
    parts = rows.view(-1).split([-(-t.numel() // QUANT_BLOCK) * QUANT_BLOCK for t in tensors])
    values = [part[: t.numel()].view(t.shape) for part, t in zip(parts, tensors, strict=True)]
    torch._foreach_copy_([t.detach() for t in tensors], values)


class AdamW(_Blockwise):
    """AdamW with fp32 states: `bitsandbytes.optim.AdamW`'s numbers."""

    op, formula = "blockwise_adamw", "adamw"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        min_8bit_size: int = 4096,
        *,
        impl: str = "auto",
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, min_8bit_size, impl)


class AdamW8bit(AdamW):
    """AdamW with states in 8 bits: `bitsandbytes.optim.AdamW8bit`'s."""

    bits = 8


class Lion(_Blockwise):
    """Lion with an fp32 state: `bitsandbytes.optim.Lion`'s numbers."""

    op, formula = "blockwise_lion", "lion"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        min_8bit_size: int = 4096,
        *,
        impl: str = "auto",
    ) -> None:
        # Lion adds no epsilon
        super().__init__(params, lr, betas, 0.0, weight_decay, min_8bit_size, impl)


class Lion8bit(Lion):
    """Lion with a state in 8 bits: `bitsandbytes.optim.Lion8bit`'s."""

    bits = 8
