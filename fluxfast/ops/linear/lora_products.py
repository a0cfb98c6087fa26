"""The low-rank products of a group's LoRAs: s, and the gradients that come from it and from dy.

They belong to `group.LinearGroup`. LoRAs with the same dropout that are neighbours share a product.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluxfast.ops.linear import products_native
from fluxfast.ops.linear.adapters import Lora
from fluxfast.ops.linear.beside import operand_of
from fluxfast.ops.linear.decomposed import Decompositions
from fluxfast.ops.linear.grad_places import NO_RUNS, Runs, in_places, runs_of
from fluxfast.ops.linear.products_torch import stack
from fluxfast.ops.row_quant import RowOutput


class SameDropout(NamedTuple):
    """Neighbouring LoRAs with the same dropout: that dropout, and their columns of s."""

    dropout: float
    ranks: slice
    loras: Sequence[Lora]


class LoraProducts:
    """What a group does with its LoRAs.

    own_loras: the LoRAs of each linear; counts: how many each has; outs: each linear's columns;
    drops: whether one of them drops elements of its x.
    """

    own_loras: Sequence[Sequence[Lora]]
    loras: Sequence[Lora]
    counts: list[int]
    outs: list[int]
    dtype: torch.dtype
    products: Any
    drops: bool
    decompositions: Decompositions

    def dropped(self, x: Tensor, p: float, number: int | None = None) -> Tensor:
        """x [M, K] with a mask of dropout p."""
        raise NotImplementedError

    def merges(self, tokens: int) -> bool:
        """Whether products read a copy of W that has the LoRAs in it."""
        raise NotImplementedError

    @property
    def a(self) -> list[Tensor]:
        """A of every LoRA, in order."""
        return [lora.a for lora in self.loras]

    @property
    def b(self) -> list[Tensor]:
        """B of every LoRA, in order, with its linear's row scale in it."""
        if not self.decompositions.exist:
            return [lora.b for lora in self.loras]
        return [
            self.decompositions.scaled_b(i, lora)
            for i, own in enumerate(self.own_loras)
            for lora in own
        ]

    @property
    def scales(self) -> list[float]:
        """The scale of every LoRA, in order."""
        return [lora.scale for lora in self.loras]

    def narrow(self, rows: RowOutput, *, copy: Tensor | None = None) -> Tensor | None:
        """s = scale · x Aᵀ [M, Σ ranks], each LoRA on its own dropped x, or None without LoRAs.

        Triton's kernels write it to `copy` as well, where that is given.
        """
        if not self.loras:
            return None
        operand = operand_of(rows)
        if self.merges(operand[0].shape[0]):
            return None
        if not self.drops:
            # all see the same x
            copies = {} if copy is None else {"copy": copy}
            return self.products.down(*operand, self.a, self.scales, self.dtype, **copies)
        columns = []
        for same in self.by_dropout():
            a, scales = (
                [lora.a for lora in same.loras],
                [lora.scale for lora in same.loras],
            )
            seen = self._seen_by_loras(same.dropout, rows)
            copies = {} if copy is None else {"copy": copy[:, same.ranks]}
            columns.append(self.products.down(*seen, a, scales, self.dtype, **copies))
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)

    def lora_backward(
        self, dy: Tensor, x: RowOutput, s: Tensor | None, room: Tensor | None
    ) -> tuple[Tensor | None, list[tuple[Tensor, ...]]]:
        """dS [M, Σ ranks], where dx needs it, and (dA, dB) of every LoRA.

        dS is written to `room`, where there is some.
        """
        if not self.loras:
            return None, []
        scales, b = self.scales, self.b
        if self.merges(len(dy)):
            a, b = (
                [lora.a.to(self.dtype) for lora in self.loras],
                [t.to(self.dtype) for t in b],
            )
            starts = accumulate(self.outs, initial=0)
            cols = [col for col, n in zip(starts, self.counts, strict=False) for _ in range(n)]
            d_a, d_b = products_native.lora_grads(operand_of(x)[0], dy, a, b, scales, cols)
            return None, in_places(self.loras, d_a, d_b, NO_RUNS)
        assert s is not None
        out: dict[str, Any] = {} if room is None else {"out": room}
        runs = runs_of([self.loras], self.counts)
        ds, packed_b = self.products.lora_grads(
            dy, s, b, scales, self.counts, self.outs, b[0].dtype,
            db=runs.d_b, **out,
        )  # fmt: skip
        if self.decompositions.exist:
            # s met B with the row scale in it
            of_linears = packed_b.split_with_sizes(self.outs)
            for rows, g in zip(of_linears, self.decompositions.row_scales, strict=True):
                if g is not None:
                    rows.mul_(g[:, None])
        d_a = []
        for same in self.by_dropout():
            seen = self._seen_by_loras(same.dropout, x)
            of_these = ds if len(same.loras) == len(self.loras) else ds[:, same.ranks]
            grad = self.products.grad_a(
                of_these, *seen, same.loras[0].a.dtype,
                da=None if runs.d_a is None else [runs.d_a[0][same.ranks]],
            )  # fmt: skip
            d_a += grad.split_with_sizes([lora.a.shape[0] for lora in same.loras])
        return ds, self.lora_grads_of(d_a, packed_b, runs)

    def lora_grads_of(
        self, d_a: Sequence[Tensor], packed_b: Tensor, runs: Runs
    ) -> list[tuple[Tensor, ...]]:
        """(dA, dB) of every LoRA, from their dA and from packed dB [N, widest].

        runs: the memory to which these were written.
        """
        d_b: list[Tensor] = []
        for own, rows in zip(self.own_loras, packed_b.split_with_sizes(self.outs), strict=True):
            widths = [lora.b.shape[1] for lora in own]
            if widths == [rows.shape[1]]:
                d_b.append(rows)
            else:
                d_b += rows[:, : sum(widths)].split_with_sizes(widths, dim=1)
        return in_places(self.loras, d_a, d_b, runs)

    def add_dropped(self, ds: Tensor, dx: Tensor) -> None:
        """Adds dS A to dx [M, K], of each LoRA with the mask of its dropout."""
        for same in self.by_dropout():
            delta = ds[:, same.ranks] @ stack([lora.a for lora in same.loras]).to(self.dtype)
            dx += delta if same.dropout == 0 else self.dropped(delta, same.dropout)

    def by_dropout(self) -> list[SameDropout]:
        if not self.drops:
            return [SameDropout(0.0, slice(None), self.loras)]
        found: list[SameDropout] = []
        rank = 0
        for lora in self.loras:
            p, stop = lora.dropout, rank + lora.a.shape[0]
            if found and found[-1].dropout == p:
                last = found.pop()
                found.append(SameDropout(p, slice(last.ranks.start, stop), [*last.loras, lora]))
            else:
                found.append(SameDropout(p, slice(rank, stop), [lora]))
            rank = stop
        return found

    def _seen_by_loras(self, p: float, x: RowOutput) -> tuple[Tensor, Tensor | None]:
        """The x that LoRAs with dropout p see: codes and scales where there are any, or values."""
        if p == 0:
            return operand_of(x)
        assert x.y is not None
        return self.dropped(x.y, p), None
