"""AdamWBF16 on Triton, beside the plain path."""

import copy

import pytest
import torch
from torch.nn import Parameter

from fluxfast.ops import dispatch
from fluxfast.train.adamw_bf16 import AdamWBF16

pytestmark = pytest.mark.skipif(not dispatch.HAS_TRITON, reason="triton is not installed")

BF16 = torch.bfloat16
# in its interpreter, if there is no GPU
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _fused(params: list[Parameter], **options) -> AdamWBF16:
    return AdamWBF16(params, 1e-2, weight_decay=0.1, impl="triton", **options)


def _on_device(dtype: torch.dtype, shapes=((1,), (63,), (5, 7), (2, 700))) -> list[Parameter]:
    g = _generator(1)
    return [Parameter(torch.randn(shape, generator=g).to(DEVICE, dtype)) for shape in shapes]


def _step_both(one: torch.optim.Optimizer, other: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        for optimizer in (one, other):
            g = _generator(100 + step)
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.randn(p.shape, generator=g).to(p)
            optimizer.step()


def test_fp32_follows_the_plain_path():
    fused, plain = _on_device(torch.float32), _on_device(torch.float32)
    one, other = _fused(fused), AdamWBF16(plain, 1e-2, weight_decay=0.1, impl="ref")
    _step_both(one, other, 3)
    for p, q in zip(fused, plain, strict=True):
        # fp32 sums of a few terms in another order
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                one.state[p][name], other.state[q][name], rtol=1e-5, atol=1e-7
            )


def test_bf16_rounds_to_a_neighbour_with_the_mean_kept():
    shape = [(2, 2048)]
    (p,), (exact,) = _on_device(BF16, shape), _on_device(torch.float32, shape)
    with torch.no_grad():
        exact.copy_(p)
    _step_both(_fused([p]), AdamWBF16([exact], 1e-2, weight_decay=0.1, impl="ref"), 1)
    error = (p.float() - exact) / exact.abs()
    # bf16's steps are 2^-7 of a number or less; the error is uniform within one, so its mean is one
    # over √n of that
    assert error.abs().max() < 2**-7 + 1e-4
    assert abs(error.mean()) < 5 * 2**-7 / (12 * p.numel()) ** 0.5
    assert not torch.equal(p, exact.to(BF16))


def test_noise_is_the_seeds_and_a_resumed_run_goes_on():
    def run(seed: int, resume: bool) -> list[torch.Tensor]:
        params = _on_device(BF16)
        optimizer = _fused(params, seed=seed)
        for step in range(3):
            if resume and step == 2:
                # other memory for all of the state, and a table of its own
                params = [Parameter(p.detach().clone()) for p in params]
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = _fused(params, seed=seed)
                optimizer.load_state_dict(state)
            g = _generator(100 + step)
            for p in params:
                p.grad = torch.randn(p.shape, generator=g).to(p)
            optimizer.step()
        return [p.detach() for p in params]

    whole = run(1, False)
    assert all(map(torch.equal, whole, run(1, True)))
    assert not all(map(torch.equal, whole, run(2, False)))


def test_groups_ages_and_copies():
    """Parameters of two ages and two dtypes in two groups, one without a gradient, in an optimiser
    that was copied.
    """
    params = [*_on_device(BF16, [(5, 7), (9,)]), *_on_device(torch.float32, [(3,), (4,)])]
    optimizer = AdamWBF16([{"params": params[:2]}, {"params": params[2:]}], 1e-2, impl="triton")
    for step in range(2):
        for p in params[: 3 + step]:
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.zero_grad()
    assert [optimizer.state[p]["step"] for p in params] == [2, 2, 2, 1]
    same = copy.deepcopy(optimizer)
    (p, *_), (q, *_) = optimizer.param_groups[0]["params"], same.param_groups[0]["params"]
    for each, o in ((p, optimizer), (q, same)):
        each.grad = torch.full_like(each, 0.5)
        o.step()
    assert torch.equal(p, q)


def test_on_request_never_falls_back():
    p = Parameter(torch.randn(4, 6, device=DEVICE).T)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="a parameter is not contiguous"):
        _fused([p]).step()
    AdamWBF16([p], 1e-2).step()
