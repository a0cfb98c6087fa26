"""`token_gather` and `token_scatter`: what indexing does, and each is the other's backward."""

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, randn, widen

from fluxfast_kernels.token_route import inverse_index, token_gather, token_scatter

# batch, tokens, kept, width
SIZES = [(1, 1, 1, 96), (2, 63, 31, 40), (3, 10, 10, 1000), (2, 9, 0, 16)]


def route(batch, tokens, kept, *, index_dtype=torch.int64, ordered=True):
    generator = torch.Generator().manual_seed(tokens)
    idx = torch.stack(
        [torch.randperm(tokens, generator=generator)[:kept] for _ in range(batch)]
    ).to(DEVICE)
    return (idx.sort(-1).values if ordered else idx).to(index_dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "kept", "width"), SIZES)
def test_values_and_gradients(dtype, batch, tokens, kept, width):
    x, base = (widen(randn(batch, tokens, width, seed=seed).to(dtype)) for seed in (1, 2))
    y = widen(randn(batch, kept, width, seed=3).to(dtype))
    idx = route(batch, tokens, kept)
    where, inverse = idx[..., None].expand(-1, -1, width), inverse_index(idx, tokens)

    leaf = x.clone().requires_grad_()
    gathered = leaf.gather(1, where)
    assert torch.equal(token_gather(x, idx), gathered)
    (dx,) = torch.autograd.grad(gathered, leaf, y)
    assert torch.equal(token_scatter(None, y, inverse), dx)

    leaves = [base.clone().requires_grad_(), y.clone().requires_grad_()]
    scattered = leaves[0].scatter(1, where, leaves[1])
    assert torch.equal(token_scatter(base, y, inverse), scattered)
    dbase, dy = torch.autograd.grad(scattered, leaves, x)
    assert torch.equal(token_scatter(x, None, inverse), dbase) and torch.equal(
        token_gather(x, idx), dy
    )


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_any_order_and_a_shared_route(index_dtype):
    x = randn(3, 12, 8, seed=1).float()
    idx = route(1, 12, 5, index_dtype=index_dtype, ordered=False).expand(3, -1)
    inverse = inverse_index(idx, 12)
    y = token_gather(x, idx)
    assert torch.equal(y, x[:, idx[0].long()])
    assert torch.equal(
        token_scatter(torch.zeros_like(x), y, inverse), token_scatter(None, y, inverse)
    )
    assert torch.equal(token_scatter(x, y, inverse), x)


def test_nan_moves_as_it_is():
    x = randn(1, 6, 8, seed=1).float()
    x[0, 2] = float("nan")
    idx = torch.tensor([[2, 4]], device=DEVICE)
    assert token_gather(x, idx)[0, 0].isnan().all()
    assert token_scatter(x, None, inverse_index(idx, 6)).isfinite().all()


def test_refusals():
    with pytest.raises(ValueError, match=r"x \[1, 8, 6\] must have a contiguous last dimension"):
        token_gather(randn(1, 6, 8, seed=1).transpose(1, 2), route(1, 6, 2))
