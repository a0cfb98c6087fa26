"""The host's time: ours asks for launches that do nothing, and everything is as it was afterwards."""

import pytest
import torch

import fluxfast_kernels.gelu as kernels
from fluxfast.ops.gelu import gelu
from fluxfast_bench import host


@pytest.mark.parametrize("name", ["diffusers", "fluxfast-int8+int8"])
def test_a_record(monkeypatch, name):
    monkeypatch.setattr(host, "STEPS", 1)
    monkeypatch.setattr(host, "WARM_STEPS", 0)
    launches = []
    monkeypatch.setattr(host, "_no_launch", lambda kernel, *args, **numbers: launches.append(kernel))
    record = host.measure(name, "full")
    assert record["contestant"] == f"{name}:full" and record["ours"] == (name != "diffusers")
    assert record["seconds"] == pytest.approx(record["forward_seconds"] + record["backward_seconds"], abs=2e-5)
    # some fifty for each of 57 blocks
    assert (len(launches) > 2000) == record["ours"]


def test_launches_come_back():
    before, x = kernels.launch, torch.randn(3, 64)
    with host.launches_nothing():
        assert kernels.launch is not before
        assert gelu(x).shape == x.shape
    assert kernels.launch is before
    assert torch.allclose(gelu(x), torch.nn.functional.gelu(x, approximate="tanh"), atol=1e-6)
