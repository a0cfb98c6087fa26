"""A linear group's registered ops: torch's own checks of them, fake tensors, and torch.compile."""

import pytest
import torch
from lora_cases import as_codes, leaves, make_group
from op_cases import needs_native, needs_triton
from op_checks import TRITON_DEVICE, randn
from torch._subclasses.fake_tensor import FakeTensorMode

from fluxfast.ops.linear import products_native, products_torch, products_triton  # noqa: F401 (they register the ops)
from fluxfast.ops.linear.lora_linear import lora_linear
from fluxfast.ops.row_quant import row_quant_ref

OUTS, RANKS = [16, 32], [[3], [2]]
every_compute = pytest.mark.parametrize("compute", ["same", "int8", "e4m3"])


def calls():
    device = TRITON_DEVICE

    def rand(*shape, seed):
        return randn(*shape, seed=seed, grad=False).to(device)

    x, dy, s = rand(5, 24, seed=0), rand(5, 48, seed=1), rand(5, 5, seed=2)
    a, b = [rand(3, 24, seed=3), rand(2, 24, seed=4)], [rand(16, 3, seed=5), rand(32, 2, seed=6)]
    weights, biases = [rand(16, 24, seed=7), rand(32, 24, seed=8)], [rand(16, seed=9), None]
    codes = [row_quant_ref(w, "int8") for w in weights]
    (q, scale), (dyq, dy_scale) = row_quant_ref(x, "int8"), row_quant_ref(dy, "int8")
    ops, scales, counts = torch.ops.fluxfast, [0.5, 2.0], [1, 1]
    yield ops.linear_down, (x, None, a, scales, torch.float32, None)
    yield ops.linear_down, (q, scale, a, scales, torch.float16, None)
    yield ops.linear_ds_db, (dy, s, b, scales, counts, OUTS, torch.float32, None)
    yield ops.linear_da, (s, q, scale, torch.float32)
    yield ops.linear_dropout, (x, 0.5, torch.tensor(1 << 40, device=device), 2)
    yield ops.linear_mask, (x.cpu(), 0.5, torch.tensor(3), 2)
    yield (
        ops.linear_lora_grads,
        (x.cpu(), dy.cpu(), [t.cpu() for t in a], [t.cpu() for t in b], scales, [0, 16]),
    )
    y, dx = torch.zeros(5, 48, device=device), torch.zeros(5, 24, device=device)
    qs, q_scales = [c.q for c in codes], [c.scale for c in codes]
    yield ops.linear_fwd, (x, None, weights, [], biases, s, b, counts, y)
    yield ops.linear_fwd, (q, scale, qs, q_scales, [None, None], None, [], [0, 0], y)
    yield ops.linear_dgrad, (dy, None, 0, weights, [], s, a, False, dx)
    yield ops.linear_dgrad, (dyq[:, :20], dy_scale, 0, qs, q_scales, None, [], True, dx)


@needs_triton
def test_registration():
    for op, arguments in calls():
        torch.library.opcheck(op, arguments)


def outputs(x, linears, **options):
    y = lora_linear(x, linears, **options)
    return [y, *torch.autograd.grad(y, [x, *leaves(linears)], torch.ones_like(y))]


@needs_triton
@every_compute
def test_fake_tensors_go_through(compute):
    """As whoever counts bytes and launches sends them; every launch of Triton shows as an op of
    ours.
    """
    real = outputs(
        torch.zeros(5, 24, requires_grad=True),
        make_group(24, OUTS, RANKS, torch.float32),
        compute=compute,
    )
    seen = set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(str(func))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode():
        linears = make_group(24, OUTS, RANKS, torch.float32)
        x = torch.zeros(5, 24, requires_grad=True)
        with Watch():
            fakes = outputs(x, linears, compute=compute, impl="triton")
    for fake, expected in zip(fakes, real, strict=True):
        assert fake.shape == expected.shape and fake.dtype == expected.dtype
    wanted = {f"fluxfast.linear_{name}.default" for name in ("down", "fwd", "ds_db", "da", "dgrad")}
    assert wanted <= seen
    assert ("fluxfast.row_quant_fwd.default" in seen) == (compute != "same")


@pytest.mark.parametrize(
    ("impl", "compute"),
    [
        ("ref", "same"),
        pytest.param("native", "int8", marks=needs_native),
        pytest.param("native", "e4m3", marks=needs_native),
        pytest.param("triton", "same", marks=needs_triton),
        pytest.param("triton", "int8", marks=needs_triton),
    ],
)
def test_compiles_whole_and_once(impl, compute):
    """One graph, eager's values, and no recompilation for another number of tokens; weights that
    are codes, and dropout.
    """
    device = TRITON_DEVICE if impl == "triton" else "cpu"
    linears = as_codes(
        make_group(24, OUTS, RANKS, torch.float32, dropout=0.3, device=device), "int8", True
    )
    options = {"impl": impl, "compute": compute, "dropout_seed": torch.tensor(5, device=device)}
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: lora_linear(x, linears, **options), fullgraph=True, backend="aot_eager"
    )
    for tokens in (3, 4, 5):
        x = torch.randn(1, tokens, 24, device=device, requires_grad=True)
        with torch.compiler.set_stance("default" if tokens < 5 else "fail_on_recompile"):
            y = compiled(x)
            grads = torch.autograd.grad(y.square().sum(), [x, *leaves(linears)])
        expected = lora_linear(x, linears, **options)
        wanted = torch.autograd.grad(expected.square().sum(), [x, *leaves(linears)])
        for actual, reference in zip((y, *grads), (expected, *wanted), strict=True):
            torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-4)
