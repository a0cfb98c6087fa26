"""Weights to quantise: as FLUX.1's are (gaussian, rows of different size), heavy-tailed, and awkward ones."""

import torch

AWKWARD = [(1, 64), (1, 1), (5, 63), (3, 1000), (7, 24), (2, 129), (64, 16), (33, 320)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def gaussian(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    """fp32, standard deviation 0.02 times a factor per row, log-normal with sigma 0.5."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=g) * 0.02 * torch.exp(0.5 * torch.randn(rows, 1, generator=g))


def heavy_tailed(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    """fp32, Student's t with 3 degrees of freedom times 0.02: a normal number over the root of a chi-squared one's mean."""
    g = torch.Generator().manual_seed(seed)
    normals = torch.randn(4, rows, cols, generator=g)
    return 0.02 * normals[0] / normals[1:].square().mean(0).sqrt()


def hard(cols: int = 192) -> torch.Tensor:
    """fp32 rows that break a careless quantiser: zeros, one value, one sign, outliers, tiny and huge numbers, signed zeros."""
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
