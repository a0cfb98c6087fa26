"""One linear with one LoRA, by torch: what a `LinearGroup` computes, in as few steps as it takes.

In a model of a few dozen tokens, the time between products is longer than that of the products. So
the common group takes this way past lists of linears, their columns and their dropouts.
"""

from __future__ import annotations

from torch import Tensor

from fluxfast.ops.linear.adapters import Lora
from fluxfast.ops.linear.products_torch import linear


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
