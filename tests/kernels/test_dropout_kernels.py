"""The dropout kernel: what it keeps, how often, and what its mask depends on."""

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, randn, widen

from fluxfast_kernels.dropout import dropout


def seed(number):
    return torch.tensor(number, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.75, 1.0])
def test_keeps_and_scales(dtype, p):
    x = randn(5, 63, seed=1).to(dtype)
    y = dropout(x, p, seed(7))
    kept = y != 0
    assert y.dtype == dtype and bool(kept.all()) == (p == 0) and bool(kept.any()) == (p < 1)
    # one rounding, which the interpreter cuts off in bf16
    expected = x.double() / (1 - p) if p < 1 else x.double()
    torch.testing.assert_close(
        y[kept].double(), expected[kept], rtol=torch.finfo(dtype).eps, atol=0
    )


def test_the_mask_is_the_seeds():
    x = torch.ones(6, 40, device=DEVICE)
    mask = dropout(x, 0.5, seed(7)) != 0
    assert torch.equal(dropout(x, 0.5, seed(7)) != 0, mask)
    assert not torch.equal(dropout(x, 0.5, seed(8)) != 0, mask)
    # seeds that agree in their low 32 bits, too
    assert not torch.equal(dropout(x, 0.5, seed(7 + (1 << 40))) != 0, mask)
    # a number is as good as another seed
    assert torch.equal(dropout(x, 0.5, seed(5), 2) != 0, mask)
    # another layout, another width, other rows: the same mask where they overlap
    assert torch.equal(dropout(widen(x, 3, 5), 0.5, seed(7)) != 0, mask)
    assert torch.equal(dropout(x[:4, :17], 0.5, seed(7)) != 0, mask[:4, :17])
    assert not torch.equal(mask[0], mask[1])


def test_share_and_independence():
    kept = (dropout(torch.ones(24, 1000, device=DEVICE), 0.25, seed(3)) != 0).float()
    # 24,000 draws: five standard deviations
    assert abs(kept.mean() - 0.75) < 5 * (0.75 * 0.25 / kept.numel()) ** 0.5
    # neighbours in a row and in a column know nothing of each other
    centred = kept - kept.mean()
    for other in (centred.roll(1, 0), centred.roll(1, 1)):
        assert abs((centred * other).mean()) < 5 * 0.75 * 0.25 / kept.numel() ** 0.5


def test_nothing_to_drop():
    assert dropout(torch.empty(0, 5, device=DEVICE), 0.5, seed(1)).shape == (0, 5)
