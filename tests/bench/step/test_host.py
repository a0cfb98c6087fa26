"""The host's time: our launches do nothing while it is measured, and run again afterwards."""

import pytest
import torch

from fluxfast.ops import device
from fluxfast.ops.gelu import gelu
from fluxfast_bench.counted.meta_step import as_on_gpu, fluxfast_model, forward_backward, inputs_of
from fluxfast_bench.shapes import Shape
from fluxfast_bench.step import host
from fluxfast_kernels.launch import arch_key


def counted_launches():
    """Of the same step as `counts` has it: linears packed, modulation computed ahead."""
    shape = Shape("narrow", "flux", host.SIDE, host.TXT, 1).with_model(**host.NARROW)
    model = fluxfast_model(shape, adapters=torch.bfloat16, format="int8", compute="int8")
    launches = []
    with as_on_gpu(lambda kernel, args, numbers: launches.append(kernel.__name__)):
        forward_backward(model, inputs_of(shape))
    # on a CPU blocks compute in fp32, for which dS and dB are two launches
    return len(launches) + launches.count("lora_grads_kernel")


@pytest.mark.parametrize("name", ["diffusers", "fluxfast-int8+int8"])
def test_a_record(monkeypatch, name):
    monkeypatch.setattr(host, "STEPS", 1)
    monkeypatch.setattr(host, "WARM_STEPS", 0)
    launches = []
    monkeypatch.setattr(host, "no_launch", lambda kernel, args, numbers: launches.append(kernel))
    record = host.measure(name, "full")
    assert record["contestant"] == f"{name}:full" and record["ours"] == (name != "diffusers")
    assert record["seconds"] == pytest.approx(
        record["forward_seconds"] + record["backward_seconds"], abs=2e-5
    )
    assert len(launches) == (counted_launches() if record["ours"] else 0)


def test_nothing_runs_inside_and_everything_after():
    x = torch.randn(3, 64)
    truth = torch.nn.functional.gelu(x, approximate="tanh")
    with host.launches_nothing():
        assert device.pretending() and arch_key(x.device) == "sm_90"
        y = gelu(x)
        assert y.shape == x.shape and not torch.allclose(y, truth, atol=1e-6)
    assert not device.pretending() and arch_key(x.device) == "default"
    assert torch.allclose(gelu(x), truth, atol=1e-6)


def test_one_pretence_inside_another():
    heard = []

    def hear(arch):
        return lambda kernel, args, numbers: heard.append(arch)

    x = torch.empty(3, 64, device="meta")
    with device.pretend("sm_90", hear("sm_90")):
        with device.pretend("gfx942", hear("gfx942")):
            gelu(x)
        gelu(x)
    assert heard == ["gfx942", "sm_90"]
