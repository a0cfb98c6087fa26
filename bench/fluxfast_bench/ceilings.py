"""What the device was measured to do at FLUX.1's shapes, at the start of a run: the ceilings that floors are made of.

    copy                                    bytes read and written a second, of a copy far larger than any cache
    float, int8, e4m3                       FLOPs a second of matrix products, over a block's shapes as a step has them
    attention_forward, attention_backward   FLOPs a second of scaled_dot_product_attention

Random data: products of zeros run faster. A format that the device has no product for is left out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from fluxfast_bench.cases import Shape
from fluxfast_bench.floor import ATTENTION_BACKWARD
from fluxfast_bench.timing import best_time

logger = logging.getLogger("fluxfast")


def products(shape: Shape) -> list[tuple[int, int, int]]:
    """(rows, in, out) of a single block's linears, forward and for the gradient of their inputs."""
    rows, dim = shape.tokens * shape.batch, shape.dim
    forward = [(rows, dim, 7 * dim), (rows, 5 * dim, dim)]
    return forward + [(rows, n, k) for rows, k, n in forward]


def measure(shape: Shape, device: torch.device) -> dict[str, float]:
    """All ceilings, for activations in bf16 on a GPU and in fp32 on a CPU."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    found = {"copy": _copy(device), "float": _rate(shape, device, lambda x, w: lambda: x @ w.T, dtype)}
    if device.type == "cuda":
        for name, product in (("int8", _int8_product), ("e4m3", _e4m3_product)):
            try:
                found[name] = _rate(shape, device, product, dtype)
            except RuntimeError as error:
                logger.warning("no %s product on this device: %s", name, str(error).splitlines()[0])
    return found | _attention(shape, device, dtype)


def _copy(device: torch.device) -> float:
    source = torch.randn((1 << 26) if device.type == "cpu" else (1 << 29), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_time(lambda: target.copy_(source), device)


def _int8_product(x: Tensor, w: Tensor) -> Callable[[], object]:
    codes = [(t / t.abs().amax() * 127).round().to(torch.int8) for t in (x, w)]
    return lambda: torch._int_mm(codes[0], codes[1].T)


def _e4m3_product(x: Tensor, w: Tensor) -> Callable[[], object]:
    xq, wq = (t.to(torch.float8_e4m3fn) for t in (x, w))
    scales = torch.ones(len(x), 1, device=x.device), torch.ones(1, len(w), device=x.device)
    return lambda: torch._scaled_mm(xq, wq.T, *scales, out_dtype=torch.bfloat16, use_fast_accum=True)


def _rate(
    shape: Shape, device: torch.device, product: Callable[[Tensor, Tensor], Callable[[], object]], dtype: torch.dtype
) -> float:
    flops = seconds = 0.0
    for rows, k, n in products(shape):
        x, w = (torch.randn(size, k, device=device).to(dtype) for size in (rows, n))
        flops += 2 * rows * k * n
        seconds += best_time(product(x, w), device)
    return flops / seconds


def _attention(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    size = (shape.batch, shape.heads, shape.tokens, shape.head_dim)
    q, k, v = (torch.randn(size, device=device).to(dtype).requires_grad_() for _ in range(3))
    flops = 4 * shape.tokens**2 * shape.dim * shape.batch
    with torch.no_grad():
        forward = best_time(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v), device)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    dout = torch.randn_like(out)
    backward = best_time(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True), device)
    return {"attention_forward": flops / forward, "attention_backward": ATTENTION_BACKWARD * flops / backward}
