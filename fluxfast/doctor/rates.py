"""What this machine does in a second, beside what `fluxfast-train plan` assumes of it.

These rates are the ceilings of a step. Copies are far larger than any cache, products have a
block's shapes, and data is random, since products of zeros run faster.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fluxfast.doctor.attention_checks import BACKWARD
from fluxfast.doctor.checks import Check, Random, Rate
from fluxfast.doctor.format_checks import time_gemv
from fluxfast.doctor.scope import PLAIN, Scope
from fluxfast.doctor.timing import seconds_of
from fluxfast.memory.gpus import Gpu, find_gpu
from fluxfast.memory.rates import rates_of
from fluxfast.ops import dispatch

# bytes of a copy on the device, and over the link to the host
COPIED = {"cuda": 1 << 30, "cpu": 1 << 28}
LINKED = 1 << 28

Product = Callable[[Tensor, Tensor], Callable[[], object]]
# seconds of a call on a device; `fluxfast-bench` measures longer than the doctor does
Timer = Callable[[Callable[[], object], torch.device], float]


def copy_rate(
    device: torch.device, *, nbytes: int | None = None, seconds: Timer = seconds_of
) -> Rate:
    """Bytes a second of a copy on the device, those read and those written."""
    source = torch.randn((nbytes or COPIED[device.type]) // 4, device=device)
    target = torch.empty_like(source)
    return Rate(2 * source.nbytes / seconds(lambda: target.copy_(source), device), "B/s")


def link_rate(device: torch.device, to_device: bool) -> Rate:
    """Bytes a second between pinned host memory and the device, one way."""
    host = torch.empty(LINKED, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(LINKED, dtype=torch.uint8, device=device)
    source, target = (host, there) if to_device else (there, host)
    return Rate(LINKED / seconds_of(lambda: target.copy_(source, non_blocking=True), device), "B/s")


def float_product(x: Tensor, w: Tensor) -> Callable[[], object]:
    return lambda: x @ w.T


def int8_product(x: Tensor, w: Tensor) -> Callable[[], object]:
    codes = [(t / t.abs().amax() * 127).round().to(torch.int8) for t in (x, w)]
    return lambda: torch._int_mm(codes[0], codes[1].T)


def e4m3_product(x: Tensor, w: Tensor) -> Callable[[], object]:
    xq, wq = (t.to(torch.float8_e4m3fn) for t in (x, w))
    scales = torch.ones(len(x), 1, device=x.device), torch.ones(1, len(w), device=x.device)
    return lambda: torch._scaled_mm(
        xq, wq.T, *scales, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def product_rate(
    device: torch.device, dtype: torch.dtype, rows: int, dim: int, product: Product
) -> Rate:
    """Operations a second of a single block's linears, by PyTorch's own products.

    Each linear's product is timed forward and for the gradient of its input.
    """
    operations = seconds = 0.0
    shapes = [(dim, 7 * dim), (5 * dim, dim)]
    for k, n in [*shapes, *((n, k) for k, n in shapes)]:
        randn = Random(device, dtype, seed=k)
        seconds += seconds_of(product(randn(rows, k), randn(n, k)), device)
        operations += 2 * rows * k * n
    return Rate(operations / seconds, "op/s")


def attention_seconds(
    q: Tensor, k: Tensor, v: Tensor, *, seconds: Timer = seconds_of
) -> tuple[float, float]:
    """Seconds of a forward and of a backward of PyTorch's own attention, q, k, v [B, H, S, D].

    The tensors must require gradients. `torch.nn.attention.sdpa_kernel` around the call chooses the
    back end.
    """
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, q, k, v)
    out = attend()
    gradients = functools.partial(
        torch.autograd.grad, out, (q, k, v), torch.randn_like(out), retain_graph=True
    )
    with torch.no_grad():
        forward = seconds(attend, q.device)
    return forward, seconds(gradients, q.device)


def attention_rate(
    device: torch.device, dtype: torch.dtype, tokens: int, heads: int, head_dim: int, backward: bool
) -> Rate:
    """Operations a second of PyTorch's own attention, in one direction."""
    randn = Random(device, dtype, seed=tokens)
    q, k, v = (randn(1, heads, tokens, head_dim).requires_grad_() for _ in range(3))
    operations = 4 * tokens**2 * heads * head_dim
    forward_seconds, backward_seconds = attention_seconds(q, k, v)
    if backward:
        return Rate(BACKWARD * operations / backward_seconds, "op/s")
    return Rate(operations / forward_seconds, "op/s")


def gpu_of(device: torch.device) -> Gpu | None:
    """The device's entry in `memory.gpus`, if there is one."""
    if device.type != "cuda":
        return None
    try:
        return find_gpu(torch.cuda.get_device_name(device))
    except ValueError:
        return None


def rate_checks(scope: Scope) -> Iterator[Check]:
    """The rates to measure; one that a device does not have is reported as absent."""
    if not scope.sizes.timed:
        return
    device, dtype, s = scope.torch_device, scope.torch_dtype, scope.sizes
    gpu = gpu_of(device)

    def check(name: str, time: Callable[[], Rate], of: str | None) -> Check:
        rate = None if gpu is None or of is None else rates_of(gpu).get(of)
        assumed = None if rate is None else rate.value
        return Check(name=name, time=time, optional=True, assumed=assumed)

    part = functools.partial
    yield check("copy", part(copy_rate, device), "memory")
    plain = "library" if scope.dtype == "bfloat16" else None
    products: dict[str, tuple[Product, str | None]] = {scope.dtype: (float_product, plain)}
    if device.type == "cuda":
        products |= {"int8": (int8_product, "int8"), "e4m3": (e4m3_product, "e4m3")}
    for name, (product, of) in products.items():
        yield check(
            f"products in {name}", part(product_rate, device, dtype, s.timed, s.dim, product), of
        )
    for name, backward in (("forward", False), ("backward", True)):
        time = part(attention_rate, device, dtype, s.timed, s.heads, s.head_dim, backward)
        yield check(f"attention, {name}", time, "attention_backward" if backward else "attention")
    if device.type == "cuda":
        for name, to_device in (("host to device", True), ("device to host", False)):
            yield check(name, part(link_rate, device, to_device), "link")
    if dispatch.HAS_NATIVE:
        # the rate of modulation computed ahead, which `plan` assumes to hide behind the step
        yield check(
            "CPU's products with a vector, bfloat16 weights", part(time_gemv, scope, PLAIN), None
        )
