"""One linear with one LoRA, by torch: what a `LinearGroup` computes, in as few steps as it takes.

In a model of a few dozen tokens, the time between products is longer than that of the products. So
the common group takes this way past lists of linears, their columns and their dropouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fluxfast.ops.linear.adapters import Adapter, Lora
from fluxfast.ops.linear.params import LinearParams
from fluxfast.ops.linear.products_torch import linear
from fluxfast.ops.linear.weights import Ready


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora: Lora, s: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y = x Wᵀ + s Bᵀ + bias [..., N], and s = scale · x Aᵀ [M, r], which may be given.

    x [..., K]; weight, bias and the LoRA's tensors are cast to its dtype.
    """
    y = linear(x, weight, bias)
    if s is None:
        s = x.reshape(-1, x.shape[-1]) @ lora.a.to(x.dtype).T
        if lora.scale != 1:
            s.mul_(lora.scale)
    y.view(-1, y.shape[-1]).addmm_(s, lora.b.to(x.dtype).T)
    return y, s


def backward(
    dy: Tensor, x: Tensor, s: Tensor, weight: Tensor | None, lora: Lora
) -> tuple[Tensor | None, tuple[Tensor, Tensor]]:
    """dx [..., K], None without a weight, and (dA, dB) in the dtypes of A and B.

    dy [..., N], x [..., K] and s as `forward` had and gave them.
    """
    dtype = dy.dtype
    a, b = lora.a.to(dtype), lora.b.to(dtype)
    dy_rows = dy.reshape(-1, dy.shape[-1])
    ds = dy_rows @ b
    if lora.scale != 1:
        ds.mul_(lora.scale)
    d_a = ds.T @ x.reshape(-1, x.shape[-1])
    # BLAS is up to twice as fast with the narrow matrix on the left
    d_b = (s.T @ dy_rows).T.contiguous()
    grads = d_a.to(lora.a.dtype), d_b.to(lora.b.dtype)
    if weight is None:
        return None, grads
    dx = (dy_rows @ weight.to(dtype)).addmm_(ds, a)
    return dx.view(*dy.shape[:-1], dx.shape[-1]), grads


class OneLora:
    """The part of a group that takes this way.

    is_one: whether the group is one linear, which torch's own function computes. Other attributes
    are those of the group.
    """

    is_one: bool
    linears: Sequence[LinearParams]
    adapters: Sequence[Adapter]
    loras: Sequence[Lora]
    drops: bool

    def merges(self, tokens: int) -> bool:
        """Whether products read a copy of W that has the LoRA in it."""
        raise NotImplementedError

    def weights(self, tokens: int) -> Ready:
        """The weights as products read them."""
        raise NotImplementedError

    def short_forward(self, x: Tensor, s: Any) -> tuple[Tensor, Tensor | None] | None:
        """y [..., N] and s of one linear, as `forward` gives them; None where it can't."""
        bias = self.linears[0].bias
        if not self.adapters:
            return linear(x, self._weight(), bias), None
        lora = self._only_lora(x)
        return None if lora is None else forward(x, self._weight(), bias, lora, s)

    def short_backward(
        self, dy: Tensor, x: Tensor | None, s: Any, *, need_dx: bool
    ) -> tuple[Tensor | None, list[tuple[Tensor, ...]]] | None:
        """dx, if it is needed, and the gradients of the LoRA, as `backward`; None where it can't.

        It can't write to memory that is given.
        """
        if not self.is_one or x is None or not isinstance(s, Tensor):
            return None
        lora = self._only_lora(dy)
        if lora is None or lora.grads is not None:
            return None
        dx, grads = backward(dy, x, s, self._weight() if need_dx else None, lora)
        return dx, [grads]

    def _only_lora(self, rows: Tensor) -> Lora | None:
        """The LoRA, for x or dy [..., K or N], if it is the only adapter; else None."""
        if len(self.loras) != 1 or len(self.adapters) != 1 or self.drops:
            return None
        return None if self.merges(rows.numel() // rows.shape[-1]) else self.loras[0]

    def _weight(self) -> Tensor:
        """The weight, into which no adapter goes."""
        weight = self.linears[0].weight
        return weight if isinstance(weight, Tensor) else self.weights(0).weights[0]
