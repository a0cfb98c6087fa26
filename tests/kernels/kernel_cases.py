"""What the kernels' tests share: the device, inputs, bounds for a dtype, and codes."""

import contextlib
from collections.abc import Iterator

import torch

from fluxfast.ops.tensors import divide
from fluxfast_kernels.launch import interpreted
from support import bound, product_tolerance

DEVICE = "cpu" if interpreted() else "cuda"

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def randn(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    """Reproducible normal numbers in fp64, on the test's device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(DEVICE)


def product_bound(dtype: torch.dtype, fmt: str) -> float:
    """`bound` for a product of codes, of whose sums the device may lose something."""
    return product_tolerance(bound(dtype), fmt, torch.device(DEVICE))


def widen(x: torch.Tensor, left: int = 16, right: int = 16) -> torch.Tensor:
    """A copy of x that is a slice of columns of a wider tensor full of NaN."""
    wide = torch.full(
        (*x.shape[:-1], left + x.shape[-1] + right), float("nan"), dtype=x.dtype, device=x.device
    )
    out = wide[..., left : left + x.shape[-1]]
    out.copy_(x)
    return out


def quantize_rows(y: torch.Tensor, fmt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and one scale for each row of fp32 values, by the formula that the kernels claim."""
    top = {"int8": 127.0, "e4m3": 448.0}[fmt]
    scale = divide(y.abs().amax(-1), top)
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
    scaled = y * (1 / scale)[..., None]
    if fmt == "int8":
        return scaled.clamp(-127, 127).round().to(torch.int8), scale
    return scaled.to(torch.float8_e4m3fn), scale


def product_error(actual: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> float:
    """The error of actual = left right by norm, relative to the sums of the terms' magnitudes.

    With one row and one rank there is a single number, in which the terms may cancel.
    """
    error = (actual.double() - left.double() @ right.double()).norm()
    magnitude = (left.double().abs() @ right.double().abs()).norm()
    return float(error / magnitude) if magnitude > 0 else float(error)


@contextlib.contextmanager
def programs_backwards() -> Iterator[None]:
    """Inside, the interpreter runs a launch's programs from the last to the first."""
    from triton.runtime.interpreter import interpreter_builder as builder

    forwards = builder.set_grid_idx

    def backwards(*index: int) -> None:
        forwards(*(n - 1 - i for n, i in zip(builder.grid_dim, index, strict=True)))

    builder.set_grid_idx = backwards
    try:
        yield
    finally:
        builder.set_grid_idx = forwards
