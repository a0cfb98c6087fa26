"""Weights to quantise: as FLUX.1's are (gaussian, rows of different size), heavy-tailed, and
awkward ones; and what every back end is held to.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fluxfast.quant import Format, QuantWeight

AWKWARD = [(1, 64), (1, 1), (5, 63), (3, 1000), (7, 24), (2, 129), (64, 16), (33, 320)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def gaussian(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    """fp32, standard deviation 0.02 times a factor per row, log-normal with sigma 0.5."""
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, cols, generator=g)
        * 0.02
        * torch.exp(0.5 * torch.randn(rows, 1, generator=g))
    )


def heavy_tailed(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    """fp32, Student's t with 3 degrees of freedom times 0.02: a normal number over the root of a
    chi-squared one's mean.
    """
    g = torch.Generator().manual_seed(seed)
    normals = torch.randn(4, rows, cols, generator=g)
    return 0.02 * normals[0] / normals[1:].square().mean(0).sqrt()


def hard(cols: int = 192) -> torch.Tensor:
    """fp32 rows that break a careless quantiser: zeros, one value, one sign, outliers, tiny and
    huge numbers, signed zeros.
    """
    w = gaussian(12, cols, seed=5)
    w[0] = 0
    w[1] = 0.37
    w[2] = w[2].abs() + 1
    w[3] = -w[3].abs()
    w[4, 7] = 30.0
    w[5] *= 1e-12
    w[6] *= 1e-35
    w[7] *= 1e6
    w[8, ::2] = 0
    w[9] = torch.where(w[9] > 0, 0.0, -0.0)
    w[10, : cols // 2] = 0
    w[11] = torch.arange(cols) % 16 - 7.5
    return w


def same_bytes(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors are of one shape and dtype and equal in every bit: zeros have signs, and
    NaN is a number.
    """
    return (
        actual.shape == expected.shape
        and actual.dtype == expected.dtype
        and torch.equal(
            actual.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)
        )
    )


class DividesAsAGpu(TorchDispatchMode):
    """Inside, torch divides by a plain number as it does on a GPU: it multiplies with the number's
    reciprocal.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.div.Tensor and isinstance(args[1], (int, float)):
            return args[0] * (1 / torch.tensor(args[1], dtype=args[0].dtype))
        return func(*args, **(kwargs or {}))


class FloatsHeld(TorchDispatchMode):
    """Counts the elements of the largest fp32 tensor that torch makes inside it."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            self.largest = max(self.largest, out.numel())
        return out


def assert_shares_a_scratch(format: Format, device: str, impl: str) -> None:
    """Two linears of 3 and 6 rows decode into rows of one [ΣN, K], as values and as codes, and
    nothing beside them changes, also where that is a part of the columns of a wider one.

    But for the reference, none of them is held in fp32 on the way.
    """
    rows, cols = (3, 6), 128
    weights = [QuantWeight.of(gaussian(n, cols, seed=n).to(device), format) for n in rows]
    places = [slice(1, 4), slice(4, 10)]
    _check_in_wider_rows(weights, cols, device, impl)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = torch.full((11, cols), 77.0, dtype=dtype, device=device)
        for weight, place in zip(weights, places, strict=True):
            out = values[place]
            with FloatsHeld() as held:
                weight.decode_into(out, impl=impl)
            # the interpreter copies what it is given
            assert impl == "ref" or dtype == torch.float32 or held.largest < out.numel()
            assert same_bytes(values[place], weight.to(dtype, "ref"))
        assert (values[0] == 77).all() and (values[10] == 77).all()
    for fmt, dtype in (("int8", torch.int8), ("e4m3", torch.float8_e4m3fn)):
        q = torch.full((11, cols), 77.0, device=device).to(dtype)
        untouched, scale = q[0].clone(), torch.full((11,), 77.0, device=device)
        for weight, place in zip(weights, places, strict=True):
            codes, scales = q[place], scale[place]
            with FloatsHeld() as held:
                weight.decode_into(codes, scales, impl)
            assert impl == "ref" or held.largest < codes.numel()
            expected = weight.codes(fmt, "ref")
            assert same_bytes(q[place], expected.q) and same_bytes(scale[place], expected.scale)
        assert all(same_bytes(q[row], untouched) and scale[row] == 77 for row in (0, 10))


def _check_in_wider_rows(weights: list[QuantWeight], cols: int, device: str, impl: str) -> None:
    """Outputs may be columns of a wider tensor, whose other columns stay as they are."""
    for weight in weights:
        for dtype, fmt in (
            (torch.float32, None), (torch.bfloat16, None), (torch.float64, None),
            (torch.int8, "int8"), (torch.float8_e4m3fn, "e4m3"),
        ):  # fmt: skip
            wide = torch.full((weight.shape[0], cols + 5), 77.0, device=device).to(dtype)
            before, out = wide.clone(), wide[:, 3 : 3 + cols]
            scale = None if fmt is None else torch.empty(weight.shape[0], device=device)
            weight.decode_into(out, scale, impl)
            expected = weight.to(dtype, "ref") if fmt is None else weight.codes(fmt, "ref").q
            assert same_bytes(out, expected)
            for beside in (slice(None, 3), slice(3 + cols, None)):
                assert same_bytes(wide[:, beside], before[:, beside])
