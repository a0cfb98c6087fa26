"""What a device can do."""

from types import SimpleNamespace

import pytest
import torch

from fluxfast.ops import device

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("capability", "products"),
    [
        ((7, 0), set()),
        ((7, 5), set()),
        ((8, 0), {"same", "int8"}),
        ((8, 6), {"same", "int8"}),
        ((8, 9), {"same", "int8", "e4m3"}),
        ((9, 0), {"same", "int8", "e4m3"}),
        ((12, 0), {"same", "int8", "e4m3"}),
    ],
)
def test_what_nvidia_gpus_multiply(monkeypatch, capability, products):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    every = ("same", "int8", "e4m3")
    assert {compute for compute in every if device.multiplies(compute, GPU)} == products


@pytest.mark.parametrize(
    ("architecture", "e4m3"),
    [("gfx90a:sramecc+", False), ("gfx942:sramecc+", True), ("gfx1100", False), ("gfx1201", True)],
)
def test_what_amd_gpus_multiply(monkeypatch, architecture, e4m3):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    properties = SimpleNamespace(gcnArchName=architecture)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert device.multiplies("same", GPU) and device.multiplies("int8", GPU)
    assert device.multiplies("e4m3", GPU) == e4m3


@pytest.mark.parametrize("compute", ["same", "int8", "e4m3"])
def test_a_cpu_emulates_what_is_asked_for(compute):
    assert device.multiplies(compute, CPU)
