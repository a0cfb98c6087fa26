"""Which implementation an op takes, what it refuses, and how its threads behave."""

import logging
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from op_cases import needs_native, needs_triton
from op_checks import TRITON_DEVICE, randn
from torch._subclasses.fake_tensor import FakeTensorMode

from fluxfast.ops import dispatch
from fluxfast.ops.gated_residual import gated_residual
from fluxfast.ops.gelu import gelu, gelu_ref
from fluxfast.ops.modulated_layer_norm import modulated_layer_norm, modulated_layer_norm_ref
from fluxfast.ops.qk_norm_rope import qk_norm_rope
from fluxfast.ops.row_quant import row_quant
from fluxfast.ops.token_route import token_gather, token_scatter


def qk(x, **kwargs):
    head_dim = x.shape[-1] // 3
    table = x.new_ones(x.shape[1], head_dim // 2)
    return qk_norm_rope(
        x, x.new_ones(head_dim), x.new_ones(head_dim), table, 0 * table, heads=1, **kwargs
    )


def modulation(x):
    return x.new_ones(x.shape[0], x.shape[2], requires_grad=x.requires_grad)


NATIVE_OPS = {
    "gated_residual": lambda x, **kwargs: gated_residual(x, modulation(x), x, **kwargs),
    "gelu": gelu,
    "modulated_layer_norm": lambda x, **kwargs: modulated_layer_norm(
        x, modulation(x), modulation(x), **kwargs
    ),
    "qk_norm_rope": qk,
    "row_quant": lambda x, **kwargs: row_quant(x, "int8", **kwargs),
}
OPS = NATIVE_OPS | {
    "token_gather": lambda x, **kwargs: token_gather(x, torch.arange(3, device=x.device), **kwargs),
    "token_scatter": lambda x, **kwargs: token_scatter(
        x, 2 * x[:, :3], torch.arange(3, device=x.device), **kwargs
    ),
}
every_op = pytest.mark.parametrize("op", OPS)
every_native_op = pytest.mark.parametrize("op", NATIVE_OPS)


@pytest.fixture
def log(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_announced", set())
    caplog.set_level(logging.INFO, logger="fluxfast")
    return caplog


@needs_native
@every_native_op
def test_auto_says_once_what_it_took(log, op):
    x = randn(1, 5, 12)
    OPS[op](x)
    OPS[op](x)
    assert log.messages == [f"{op} runs on 'native': float32 tensors on the CPU"]


@needs_native
@every_native_op
def test_auto_takes_the_reference_for_other_dtypes(log, op):
    OPS[op](randn(1, 5, 12).double())
    (message,) = log.messages
    assert message.startswith(f"{op} runs on 'ref': ")
    assert "torch.float64" in message


@every_native_op
def test_without_the_native_module(log, monkeypatch, op):
    monkeypatch.setattr(dispatch, "HAS_NATIVE", False)
    x = randn(1, 5, 12)
    OPS[op](x)
    assert log.messages == [f"{op} runs on 'ref': the native module fluxfast._C was not built"]
    with pytest.raises(
        ValueError, match=f"{op}: impl='native' can't do this call: the native module .* not built"
    ):
        OPS[op](x, impl="native")


@needs_native
def test_gated_residual_of_a_frozen_gate_is_addcmul(log):
    x = randn(1, 5, 12)
    gated_residual(x, x[:, 0].detach(), x)
    assert "addcmul" in log.messages[0]


@needs_native
@every_native_op
@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.bfloat16, "cpu"), (torch.float64, "cpu"), (torch.float32, "meta")]
)
def test_an_explicit_native_never_falls_back(op, dtype, device):
    with pytest.raises(
        ValueError, match=f"{op}: impl='native' can't do this call: .*({dtype}|{device})"
    ):
        OPS[op](torch.ones(1, 5, 12, dtype=dtype, device=device), impl="native")


@pytest.mark.parametrize("op", sorted(OPS.keys() - NATIVE_OPS.keys()))
def test_ops_that_the_native_module_does_not_have(log, op):
    with pytest.raises(
        ValueError, match=f"{op}: impl='native' can't do this call: the native module (has|doesn't)"
    ):
        OPS[op](randn(1, 5, 12), impl="native")
    OPS[op](randn(1, 5, 12))
    assert log.messages[0].startswith(f"{op} runs on 'ref': the native module")


@needs_triton
@every_op
@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.float64, TRITON_DEVICE), (torch.float32, "meta")]
)
def test_an_explicit_triton_never_falls_back(op, dtype, device):
    with pytest.raises(
        ValueError, match=f"{op}: impl='triton' can't do this call: .*({dtype}|{device})"
    ):
        OPS[op](torch.ones(1, 5, 12, dtype=dtype, device=device), impl="triton")


@every_op
def test_without_triton(monkeypatch, op):
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    with pytest.raises(
        ValueError, match=f"{op}: impl='triton' can't do this call: triton is not installed"
    ):
        OPS[op](randn(1, 5, 12), impl="triton")


@every_op
def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch, op):
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    monkeypatch.setattr(dispatch, "_interpreted", lambda: False)
    with pytest.raises(
        ValueError,
        match=f"{op}: impl='triton' .* run on a GPU and a tensor is on cpu .*TRITON_INTERPRET=1",
    ):
        OPS[op](randn(1, 5, 12), impl="triton")


def test_auto_on_a_gpu(log, monkeypatch):
    """On a fake one: nothing runs there, but the choice is the same."""
    with FakeTensorMode():
        tensors = [torch.empty(1, 5, 12, device="cuda", dtype=torch.bfloat16)]
    for has_triton in (True, False):
        monkeypatch.setattr(dispatch, "HAS_TRITON", has_triton)
        assert dispatch.resolve("op", "auto", tensors) == ("triton" if has_triton else "ref")
    assert dispatch.resolve("other_op", "auto", tensors, obstacle="it is too hard") == "ref"
    assert log.messages == [
        "op runs on 'triton': tensors on a GPU",
        "op runs on 'ref': triton is not installed",
        "other_op runs on 'ref': it is too hard",
    ]


def test_triton_is_imported_only_when_a_kernel_is_asked_for():
    script = (
        "import sys, torch\n"
        "from fluxfast.ops import gated_residual, gelu, modulated_layer_norm, qk_norm_rope, "
        "row_quant, token_route\n"
        "gelu.gelu(torch.ones(3))\n"
        "token_route.token_gather(torch.ones(1, 3, 4), torch.tensor([2]))\n"
        "kernels = {name for name in sys.modules if name.startswith('fluxfast_kernels.')}\n"
        # which has no kernel, and tells how text and image lie in one tensor
        "assert kernels == {'fluxfast_kernels.parts'} and 'triton' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@every_op
def test_unknown_implementation(op):
    with pytest.raises(ValueError, match="'auto', 'triton', 'native' or 'ref', not 'cuda'"):
        OPS[op](randn(1, 5, 12), impl="cuda")


@needs_native
# codes have no first one
@pytest.mark.parametrize("op", sorted(NATIVE_OPS.keys() - {"row_quant"}))
def test_second_derivatives_are_refused(op):
    x = randn(1, 5, 12)
    out = OPS[op](x, impl="native")
    out = out[0] if isinstance(out, tuple) else out
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@needs_native
def test_unknown_instruction_set():
    with pytest.raises(ValueError, match="'mmx'"):
        dispatch.native.use_cpu_isa("mmx")


@needs_native
def test_several_python_threads_at_once(isa):
    """The calls compete for the same workers, without the interpreter's lock between them."""
    inputs = [randn(1, 100, 300, seed=seed, grad=False) for seed in range(8)]
    expected = [gelu_ref(x.double()) for x in inputs]
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda x: [gelu(x, impl="native") for _ in range(5)], inputs))
    for outs, want in zip(results, expected, strict=True):
        assert all(torch.equal(out, outs[0]) for out in outs)
        torch.testing.assert_close(outs[0].double(), want, rtol=1e-5, atol=1e-6)


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own():
    """Torch's OpenMP threads don't survive a fork, and a parallel region in the child would wait
    for them for ever.
    """
    x, modulation = randn(1, 200, 300, grad=False), randn(1, 300, seed=2, grad=False)
    expected = modulated_layer_norm(x, modulation, modulation, impl="native")
    stats = torch.empty(2, 200)
    results = torch.full((2, 1, 200, 300), float("nan")).share_memory_()
    child = os.fork()
    if child == 0:
        # a child that waits for ever is ended, and fails the test
        signal.alarm(30)
        # the second call finds the pool that the first one made
        threads = 3
        for result in results:
            dispatch.native.modulated_layer_norm_fwd(
                *(
                    x.data_ptr(),
                    200 * 300,
                    300,
                    modulation.data_ptr(),
                    300,
                    modulation.data_ptr(),
                    300,
                ),
                *(result.data_ptr(), stats.data_ptr(), 1, 200, 300, 1e-6, threads),
            )
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert all(torch.equal(result, expected) for result in results)
    # and the parent's threads still work
    assert torch.equal(modulated_layer_norm(x, modulation, modulation, impl="native"), expected)
    torch.testing.assert_close(
        expected, modulated_layer_norm_ref(x, modulation, modulation), rtol=1e-5, atol=1e-5
    )
