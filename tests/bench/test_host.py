"""The host's time: ours asks for launches that do nothing, and everything is as it was afterwards."""

import pytest
import torch

import fluxfast_kernels.gelu as kernels
from fluxfast.ops.gelu import gelu
from fluxfast_bench import host
from fluxfast_bench.cases import Shape
from fluxfast_bench.meta_step import as_on_gpu, fluxfast_model, forward_backward, inputs_of


def counted_launches():
    """Of the same step as `counts` has it: linears packed, modulation computed ahead."""
    shape = Shape("narrow", "flux", host.SIDE, host.TXT, 1).with_model(**host.NARROW)
    model = fluxfast_model(shape, adapters=torch.bfloat16, format="int8", compute="int8")
    launches = []
    with as_on_gpu(lambda kernel, args, numbers: launches.append(kernel)):
        forward_backward(model, inputs_of(shape))
    return len(launches)


@pytest.mark.parametrize("name", ["diffusers", "fluxfast-int8+int8"])
def test_a_record(monkeypatch, name):
    monkeypatch.setattr(host, "STEPS", 1)
    monkeypatch.setattr(host, "WARM_STEPS", 0)
    launches = []
    monkeypatch.setattr(
        host, "_no_launch", lambda kernel, *args, **numbers: launches.append(kernel)
    )
    record = host.measure(name, "full")
    assert record["contestant"] == f"{name}:full" and record["ours"] == (name != "diffusers")
    assert record["seconds"] == pytest.approx(
        record["forward_seconds"] + record["backward_seconds"], abs=2e-5
    )
    assert len(launches) == (counted_launches() if record["ours"] else 0)


def test_launches_come_back():
    before, x = kernels.launch, torch.randn(3, 64)
    with host.launches_nothing():
        assert kernels.launch is not before
        assert gelu(x).shape == x.shape
    assert kernels.launch is before
    assert torch.allclose(gelu(x), torch.nn.functional.gelu(x, approximate="tanh"), atol=1e-6)
