"""Groups of linears for `lora_linear`, and what it must give: its formula in fp64 on the codes that
it is to read.
"""

from collections.abc import Sequence
from typing import Any

import torch
from op_checks import TRITON_DEVICE
from torch import Tensor

from fluxfast.ops.linear.adapters import Lora
from fluxfast.ops.linear.lora_linear import lora_linear
from fluxfast.ops.linear.params import LinearParams
from fluxfast.ops.linear.weights import FrozenWeight
from fluxfast.ops.row_quant import Quantized, row_quant_ref
from fluxfast.quant import FORMATS, QuantWeight
from support import product_tolerance, relative_error


def make_group(
    n_in: int,
    outs: Sequence[int],
    ranks: Sequence[Sequence[int]],
    dtype: torch.dtype,
    *,
    bias: bool = True,
    packed: bool = True,
    store: torch.dtype | None = None,
    dropout: float = 0.0,
    device: str = "cpu",
    seed: int = 0,
) -> list[LinearParams]:
    """Linears with random numbers that dtype holds; `packed`: weights side by side in memory."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(
            device, store or dtype
        )

    weight = rand(sum(outs), n_in, scale=n_in**-0.5)
    weights = weight.split(list(outs)) if packed else [w.clone() for w in weight.split(list(outs))]
    linears = []
    for i, (w, adapter_ranks) in enumerate(zip(weights, ranks, strict=True)):
        adapters = tuple(
            Lora(
                rand(r, n_in, scale=n_in**-0.5).requires_grad_(),
                rand(len(w), r, scale=0.5).requires_grad_(),
                0.25 * (1 + (i + j) % 3),
                dropout,
            )
            for j, r in enumerate(adapter_ranks)
        )
        # one linear of a group without a bias is as good as zeros
        linears.append(
            LinearParams(w, rand(len(w)) if bias and (i != 1 or not packed) else None, adapters)
        )
    return linears


def as_codes(
    linears: Sequence[LinearParams], stored: str | None, packed: bool
) -> list[LinearParams]:
    """The same linears with weights that are stored as codes, side by side in memory if `packed`.

    For None the weights are of no format: they can only be decoded.
    """
    weights = [p.weight for p in linears]
    if stored is None:
        return [p._replace(weight=Decodable(p.weight)) for p in linears]
    q, scale = row_quant_ref(torch.cat(weights), stored)
    outs = [len(w) for w in weights]
    made = []
    for p, q_i, scale_i in zip(linears, q.split(outs), scale.split(outs), strict=True):
        codes = Quantized(q_i, scale_i) if packed else Quantized(q_i.clone(), scale_i.clone())
        made.append(p._replace(weight=coded_weight(codes, stored)))
    return made


def coded_weight(codes: Quantized, fmt: str) -> QuantWeight:
    """A weight that is stored as codes of fmt, "int8" or "e4m3"."""
    format = next(f for f in FORMATS.values() if f.stored_codes == fmt)
    n, k = codes.q.shape
    return QuantWeight(format, {"packed": codes.q, "scale": codes.scale}, (n, k))


class Decodable(FrozenWeight):
    """A frozen weight that has nothing but what every one must have."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.shape, weight.device)
        self._weight = weight

    def to(self, dtype: torch.dtype, /) -> Tensor:
        return self._weight.to(dtype, copy=True)


def leaves(linears: Sequence[LinearParams]) -> list[Tensor]:
    return [t for p in linears for adapter in p.adapters for t in (adapter.a, adapter.b)]


def decoded(codes: Quantized) -> Tensor:
    return codes.q.double() * codes.scale.double()[..., None]


def weight_codes(p: LinearParams, compute: str) -> Quantized:
    return (
        row_quant_ref(p.weight, compute)
        if isinstance(p.weight, Tensor)
        else p.weight.codes(compute)
    )


def expected(
    x: Tensor, dy: Tensor, linears: Sequence[LinearParams], compute: str
) -> tuple[Tensor, list[Tensor]]:
    """y, and the gradients of x and of `leaves`, all in fp64."""
    rows, d_rows = x.detach().flatten(0, -2), dy.detach().flatten(0, -2)
    if compute == "same":
        xs = rows.double()
        weights = [p.weight.to(torch.float64) for p in linears]
        dx = d_rows.double() @ torch.cat(weights)
    else:
        xs = decoded(row_quant_ref(rows, compute))
        codes = [weight_codes(p, compute) for p in linears]
        weights = [decoded(c) for c in codes]
        folded = row_quant_ref(d_rows, compute, torch.cat([c.scale for c in codes]))
        dx = decoded(folded) @ torch.cat([c.q.double() for c in codes])
    ys, grads, col = [], [], 0
    for p, w in zip(linears, weights, strict=True):
        y = xs @ w.T + (0 if p.bias is None else p.bias.double())
        dy_i = d_rows[:, col : col + len(w)].double()
        col += len(w)
        for a, b, scale, *_ in p.adapters:
            a, b = a.detach().double(), b.detach().double()
            s, ds = scale * xs @ a.T, scale * dy_i @ b
            y = y + s @ b.T
            dx = dx + ds @ a
            grads += [ds.T @ xs, dy_i.T @ s]
        ys.append(y)
    return torch.cat(ys, dim=1).view(dy.shape), [dx.view(x.shape), *grads]


CASES = {
    "one token, rank 1": (1, 63, [17], [[1]], True),
    "packed, odd ranks, one without": (17, 40, [32, 16, 48], [[3], [], [16]], True),
    "packed, two adapters": (9, 51, [16, 32], [[3, 5], [1, 2]], True),
    "apart": (33, 24, [32, 16], [[5], [5]], False),
    "side by side, but not in the kernels' unit": (5, 63, [31, 5], [[4], [2]], True),
    "one input feature": (6, 1, [8, 16], [[1], [2]], True),
    "rank past a block": (7, 48, [32], [[256]], True),
    "no adapters": (7, 63, [31, 5], [[], []], True),
    "no tokens": (0, 8, [16], [[2]], True),
}

# sums of up to 1000 fp32 terms in another order; 16 bits: s, dS and the output are rounded one
# after the other, each to half a step, which the interpreter cuts to a whole one
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


def device_of(impl: str) -> str:
    return TRITON_DEVICE if impl == "triton" else "cpu"


def check(
    impl: str,
    case: str,
    dtype: torch.dtype,
    compute: str = "same",
    *,
    stored: bool = False,
    **options: Any,
) -> None:
    """One of CASES against its formula; `stored`: its weights are codes of the format that the
    product wants.
    """
    tokens, n_in, outs, ranks, packed = CASES[case]
    device = device_of(impl)
    linears = make_group(n_in, outs, ranks, dtype, packed=packed, device=device, **options)
    if stored:
        linears = as_codes(linears, compute, packed)
    g = torch.Generator().manual_seed(7)
    x = torch.randn(1, tokens, n_in, generator=g, dtype=torch.float64).to(device, dtype)
    if tokens > 2:
        # a row of zeros, and one whose largest element is far above the rest
        x[:, 1] = 0
        x[:, 2, 0] = 100
    dy = torch.randn(1, tokens, sum(outs), generator=g, dtype=torch.float64).to(device, dtype)
    x.requires_grad_()
    y = lora_linear(x, linears, impl, compute=compute)
    assert y.dtype == dtype and y.shape == dy.shape
    grads = torch.autograd.grad(y, [x, *leaves(linears)], dy)
    wanted, wanted_grads = expected(x, dy, linears, compute)
    of_products = product_tolerance(TOLERANCES[dtype], compute, x.device)
    assert relative_error(y, wanted) < of_products
    for i, (grad, reference, leaf) in enumerate(
        zip(grads, wanted_grads, [x, *leaves(linears)], strict=True)
    ):
        assert grad.dtype == leaf.dtype
        # those of the adapters are sums of values
        tolerance = TOLERANCES[dtype] if i else of_products
        assert relative_error(grad, reference) < tolerance, f"gradient {i}"
