"""Which checks a scope has, also on a GPU that is not there."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fluxfast.doctor.catalogue import checks_for
from fluxfast.doctor.executor import MOST_WORKERS, workers_for
from fluxfast.doctor.rates import gpu_of
from fluxfast.doctor.scope import FULL_GPU, Scope, everything, sizes_for
from fluxfast.ops import dispatch

# one of each kind
EXPECTED = {
    "layer norm, int8 codes (Triton)",
    "residual and layer norm, values and e4m3 codes (Triton)",
    "gelu behind attention (Triton)",
    "q and k norm, rope, routed (Triton)",
    "tokens scattered (Triton)",
    "q, k and v, nf4 weights in int8 (Triton)",
    "q, k and v, plain weights in int8, 4 channels apart (Triton)",
    "adapters with dropout in e4m3 (Triton)",
    "LoKr and DoRA in int8 (Triton)",
    "int2: decoded to codes (Triton)",
    "int4: decoded (native, on the GPU)",
    "attention (cudnn)",
    "attention, masked (efficient)",
    "AdamW, bfloat16 (Triton)",
    "blocks, int8 weights, products in int8 (Triton)",
    "CUDA graphs",
    "streamed blocks",
    "host to device",
    "products in e4m3",
    "CPU's products with a vector, bfloat16 weights",
}
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """An H100, as far as the code asks."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr("fluxfast.ops.device.generation", lambda device: 9)
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    with FakeTensorMode():
        yield


def names(scope):
    return {check.name for check in checks_for(scope)}


def test_everything_on_a_gpu(gpu):
    scope = everything(GPU)
    assert Scope.from_json(scope.as_json()) == scope
    assert (scope.dtype, scope.sizes, scope.computes) == (
        "bfloat16",
        FULL_GPU,
        ("same", "int8", "e4m3"),
    )
    checks = {check.name: check for check in checks_for(scope)}
    assert checks.keys() >= EXPECTED
    assert "attention, masked (flash)" not in checks
    # what `auto` never takes may be missing
    assert not checks["attention (cudnn)"].optional and checks["attention (flash)"].optional
    assert checks["copy"].assumed == pytest.approx(3350e9 * 0.9)
    assert checks["host to device"].assumed == pytest.approx(63e9 * 0.8)
    assert checks["CUDA graphs"].obstacle is None


def test_the_short_form_has_what_a_run_launches(gpu):
    of = Scope(
        device="cuda",
        dtype="bfloat16",
        formats=("int4",),
        computes=("same", "int8"),
        dropout=0.1,
        short=True,
    )
    short = names(of)
    assert {
        "gelu, values and int8 codes (Triton)",
        "int4: decoded to codes (Triton)",
        "attention (cudnn)",
    } <= short
    assert not any(
        name.startswith(("blocks", "CUDA graphs", "copy", "attention (flash)")) for name in short
    )
    assert len(short) < 50


def test_without_triton(gpu, monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    checks = checks_for(everything(GPU))
    obstacles = {check.obstacle for check in checks if "(Triton)" in check.name}
    assert obstacles == {"triton is not installed"}


def test_on_a_cpu_what_cannot_be_checked_is_said():
    obstacles = {
        check.name: check.obstacle for check in checks_for(everything(CPU)) if check.obstacle
    }
    assert "there is no GPU" in obstacles["Triton's kernels"]
    assert obstacles["CUDA graphs"] == "only a GPU has CUDA graphs"


def test_sizes_by_device():
    assert (
        sizes_for(GPU, short=False, interpreted=False).dim
        == sizes_for(CPU, short=False, interpreted=False).dim
        == 3072
    )
    assert sizes_for(GPU, short=True, interpreted=False).timed == 0
    assert sizes_for(CPU, short=False, interpreted=True).dim < 100


@pytest.mark.parametrize(
    ("free", "cores", "expected"), [(80, 16, MOST_WORKERS), (24, 4, 4), (7.5, 16, 2), (1, 16, 1)]
)
def test_processes_by_memory_and_cores(monkeypatch, free, cores, expected):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * 2**30), 80 * 2**30))
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    assert workers_for(GPU) == expected
    assert workers_for(CPU) == 0


def test_a_gpu_that_plan_does_not_know(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Somebody's GPU")
    assert gpu_of(GPU) is None and gpu_of(CPU) is None
