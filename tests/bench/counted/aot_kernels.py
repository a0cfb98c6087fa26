"""Kernels that are bad on purpose; workers import this, with Triton's interpreter off."""

import triton
import triton.language as tl

from fluxfast_bench.counted.compilers import Compiled, measure
from fluxfast_kernels.aot import AotVariant


@triton.jit
def hoard_kernel(x, BLOCK: tl.constexpr):
    """Holds BLOCK elements in the registers of one warp, all alive at once."""
    values = tl.load(x + tl.arange(0, BLOCK))
    tl.store(x + tl.arange(0, BLOCK), values / tl.sum(values, 0))


@triton.jit
def misspelt_kernel(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), no_such_name)  # noqa: F821


@triton.jit
def square_kernel(x, BLOCK: tl.constexpr):
    """Takes BLOCK² elements through shared memory, as the transpose of a product."""
    at = x + tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    values = tl.load(at)
    tl.store(at, tl.dot(tl.trans(values), values).to(tl.bfloat16))


KERNELS = {
    "hoard": (hoard_kernel, "*fp32", 1),
    "misspelt": (misspelt_kernel, "*fp32", 1),
    "square": (square_kernel, "*bf16", 8),
}


def measure_kernel(name: str, block: int, target: str) -> Compiled:
    kernel, pointer, num_warps = KERNELS[name]
    return measure(
        AotVariant(name, kernel, {"x": pointer}, {"BLOCK": block}, num_warps=num_warps), target
    )
