"""Attention's forward and backward against autograd of the maths in fp64."""

import pytest
import torch

from fluxfast.ops import attention
from support import relative_error

ON_CPU = {"cpu": (torch.float32, torch.bfloat16), "ref": (torch.float64, torch.float32)}
ON_GPU = {
    "cudnn": (torch.bfloat16, torch.float16),
    "flash": (torch.bfloat16, torch.float16),
    "efficient": (torch.float32, torch.bfloat16),
}
# fp64: the same formula in another order; fp32 and 16 bit: rounding of the inputs, of p and of the sums
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
CASES = [(name, dtype) for name, dtypes in (ON_GPU if torch.cuda.is_available() else ON_CPU).items() for dtype in dtypes]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(batch=2, tokens=63, heads=3, head_dim=16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, tokens, heads, head_dim, generator=generator, dtype=torch.float64) for _ in range(4)]


def masks(tokens):
    keep = torch.rand(2, 1, 1, tokens, generator=torch.Generator().manual_seed(1)) > 0.3
    keep[..., 0] = True
    return {"none": None, "bool": keep, "added": torch.randn(1, 3, tokens, tokens, generator=torch.Generator().manual_seed(2))}


@pytest.mark.parametrize(("backend", "dtype"), CASES)
@pytest.mark.parametrize("mask", ["none", "bool", "added"])
@pytest.mark.parametrize("tokens", [1, 63])
def test_values_and_gradients(backend, dtype, mask, tokens):
    if backend == "flash" and mask != "none":
        with pytest.raises(ValueError, match="takes no mask"):
            attention.resolve(backend, torch.empty(1, 1, 1, 8, dtype=dtype, device=DEVICE), torch.ones(1, device=DEVICE))
        return
    *qkv, dout = inputs(tokens=tokens)
    bias = masks(tokens)[mask]
    leaves = [x.clone().requires_grad_() for x in qkv]
    expected = attention.attention_ref(*leaves, bias)
    grads = torch.autograd.grad(expected, leaves, dout)

    q, k, v, g = (x.to(DEVICE, dtype) for x in (*qkv, dout))
    bias = None if bias is None else bias.to(DEVICE)
    assert attention.resolve(backend, q, bias) == backend
    out, saved = attention.forward(q, k, v, bias, backend=backend)
    actual = attention.backward(g, q, k, v, out, saved, bias, backend=backend)
    assert out.shape == q.shape and out.dtype == dtype
    assert relative_error(out.cpu(), expected.detach()) < TOLERANCE[dtype]
    # one token attends to itself alone: dq and dk are 0, and what is there is rounding against the size of dv
    for grad, wanted in zip(actual, grads, strict=True):
        assert grad.shape == q.shape
        error = (grad.cpu().double() - wanted).norm() / max(wanted.norm(), grads[2].norm())
        assert error < TOLERANCE[dtype]


def test_the_reference_is_sdpa():
    q, k, v, _ = inputs()
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    assert torch.allclose(attention.attention_ref(q, k, v), expected, atol=1e-12)


def test_auto_says_what_it_takes(caplog):
    attention._automatic.cache_clear()
    with caplog.at_level("INFO", "fluxfast"):
        chosen = attention.resolve("auto", torch.empty(1, 2, 1, 8), None)
        attention.resolve("auto", torch.empty(1, 2, 1, 8), None)
    assert chosen == "cpu" and [r.message for r in caplog.records] == ["attention runs on 'cpu': tensors on the CPU"]
    assert attention.resolve("auto", torch.empty(1, 2, 1, 8, dtype=torch.float64), None) == "ref"


@pytest.mark.parametrize(
    ("backend", "dtype", "message"),
    [
        ("sage", torch.float32, "must be one of"),
        ("flash", torch.bfloat16, "does not run on cpu"),
        ("cudnn", torch.float32, "on cpu"),
    ],
)
def test_an_explicit_backend_runs_or_raises(backend, dtype, message):
    with pytest.raises(ValueError, match=message):
        attention.resolve(backend, torch.empty(1, 2, 1, 8, dtype=dtype), None)
