import pytest
import torch
from op_cases import needs_triton, places
from op_checks import DTYPES, TRITON_DEVICE, outputs_and_grads, randn

from fluxfast.ops.token_route import (
    token_gather,
    token_gather_ref,
    token_scatter,
    token_scatter_ref,
)


def test_refs_are_loops_over_rows():
    x, idx = randn(2, 9, 5, grad=False), places(9)
    y = randn(2, idx.shape[1], 5, seed=4, grad=False)
    out, whole = token_gather_ref(x, idx), token_scatter_ref(x, y, idx)
    for b in range(2):
        taken = idx[b].tolist()
        assert all(torch.equal(out[b, k], x[b, s]) for k, s in enumerate(taken))
        for s in range(9):
            assert torch.equal(whole[b, s], y[b, taken.index(s)] if s in taken else x[b, s])


def test_ref_gradients():
    x, idx = randn(2, 7, 3).double(), places(7)
    x = x.detach().requires_grad_()
    y = randn(2, idx.shape[1], 3, seed=2, grad=False).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: token_gather_ref(x, idx), [x])
    assert torch.autograd.gradcheck(lambda x, y: token_scatter_ref(x, y, idx), [x, y])


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", ["per sample", "int32", "one for all", "all rows", "one row"])
def test_triton_copies_exactly(poisoned, dtype, index):
    """Nothing is computed, so every bit must be there, in the gradients too."""
    idx = {
        "per sample": places(9),
        "int32": places(9).int(),
        "one for all": torch.tensor([7, 0, 3]),
        "all rows": torch.stack((torch.arange(9), torch.arange(9).flip(0))),
        "one row": torch.tensor([[8], [0]]),
    }[index].to(TRITON_DEVICE)
    x = randn(2, 9, 63, grad=False).to(TRITON_DEVICE, dtype).requires_grad_()
    y = randn(2, idx.shape[-1], 63, seed=2, grad=False).to(TRITON_DEVICE, dtype).requires_grad_()

    def gather(impl):
        return lambda x: token_gather(x, idx, impl=impl)

    def scatter(impl):
        return lambda x, y: token_scatter(x, y, idx, impl=impl)

    for op, inputs in (
        (gather, [x]),
        (scatter, [x, y]),
        (scatter, [x.detach(), y]),
        (scatter, [x, y.detach()]),
    ):
        (out,), grads = outputs_and_grads(op("triton"), inputs)
        (expected,), expected_grads = outputs_and_grads(op("ref"), inputs)
        assert torch.equal(out, expected)
        for grad, wanted in zip(grads, expected_grads, strict=True):
            assert (grad is None and wanted is None) or torch.equal(grad, wanted)


def test_there_and_back():
    x = randn(2, 9, 5, grad=False)
    for idx in (places(9), torch.tensor([2, 8, 4])):
        assert torch.equal(token_scatter(x, token_gather(x, idx), idx), x)


@pytest.mark.parametrize(
    "idx", [torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0, dtype=torch.int32)]
)
@pytest.mark.parametrize("impl", ["ref", pytest.param("triton", marks=needs_triton)])
def test_no_tokens_taken(impl, idx):
    x, idx = randn(2, 9, 5).to(TRITON_DEVICE), idx.to(TRITON_DEVICE)
    assert token_gather(x, idx, impl=impl).shape == (2, 0, 5)
    assert torch.equal(token_scatter(x, x[:, :0], idx, impl=impl), x)


@pytest.mark.parametrize(
    ("idx", "message"),
    [
        (
            torch.ones(2, 2, 2, dtype=torch.int64),
            r"idx \[K\] or \[2, K\], int32 or int64, got \[2, 2, 2\]",
        ),
        (torch.ones(3, 2, dtype=torch.int64), r"idx \[K\] or \[2, K\].*got \[3, 2\]"),
        (torch.ones(2, 2), "torch.float32"),
        (torch.arange(10), "10 distinct rows of 9"),
        (torch.arange(3, device="meta"), r"idx's device \(meta\)"),
    ],
)
def test_wrong_indices_are_refused(idx, message):
    x = randn(2, 9, 5)
    with pytest.raises(ValueError, match=f"token_gather: .*{message}"):
        token_gather(x, idx)
    with pytest.raises(ValueError, match=f"token_scatter: .*{message}"):
        token_scatter(x, x, idx)


def test_wrong_rows_are_refused():
    x, idx = randn(2, 9, 5), torch.tensor([1, 2])
    with pytest.raises(
        ValueError, match=r"y \[B, K, D\] = \[2, 2, 5\] in torch.float32, got \[2, 3, 5\]"
    ):
        token_scatter(x, x[:, :3], idx)
    with pytest.raises(ValueError, match=r"torch\.bfloat16"):
        token_scatter(x, x[:, :2].bfloat16(), idx)
    with pytest.raises(ValueError, match="x of three dimensions"):
        token_gather(x[0], idx)
