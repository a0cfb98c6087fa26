"""The native GPU kernels: their source run on the CPU, compiled for devices, and, where there is
one, on the device.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fluxfast.ops import dispatch
from fluxfast.ops.row_quant import row_quant_ref
from fluxfast.quant import FORMATS, QuantWeight, gpu, nf4
from fluxfast.quant.rows import CODE_TYPES, FLOAT_TYPES
from quant_cases import AWKWARD, gaussian, hard, heavy_tailed, same_bytes

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
DECODED = [FORMATS[name] for name in ("int4", "int2", "nf4")]
decoded_format = pytest.mark.parametrize("format", DECODED, ids=[format.name for format in DECODED])


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler was found")
    library = tmp_path_factory.mktemp("gpu_on_cpu") / "kernels.so"
    source = ROOT / "tests/quant/gpu_on_cpu.cpp"
    flags = [
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-ffp-contract=off",
        "-shared",
        "-fPIC",
    ]
    # which finds an access in eights to an address that isn't one of eights
    flags += ["-fsanitize=undefined", "-fno-sanitize-recover", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *flags, source, "-o", library], check=True)
    return ctypes.CDLL(str(library))


def call(function, *args):
    """`function` of tensors, or None, as addresses, and of integers as 64 bits."""
    function.restype = None
    addresses = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in args]
    function(*(ctypes.c_int64(a) if isinstance(a, int) else a for a in addresses))


def row_quant(kernels, x, fmt, col_scale=None):
    dtype = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn}[fmt]
    q, scale = (
        torch.full(x.shape, 0x77, dtype=torch.uint8).view(dtype),
        torch.full(x.shape[:1], float("nan")),
    )
    call(
        kernels.row_quant,
        x,
        FLOAT_TYPES[x.dtype],
        *x.shape,
        x.stride(0),
        col_scale,
        q,
        CODE_TYPES[dtype],
        scale,
    )
    return q, scale


@pytest.mark.parametrize("fmt", ["int8", "e4m3"])
@pytest.mark.parametrize("dtype", list(FLOAT_TYPES))
@pytest.mark.parametrize("shape", [*AWKWARD, (3, 4160)])
def test_row_quant(kernels, fmt, dtype, shape):
    wide = heavy_tailed(shape[0], shape[1] + 11).to(dtype)
    # rows apart, and on no address in particular
    for x in (heavy_tailed(*shape).to(dtype), wide[:, 3 : 3 + shape[1]]):
        for col_scale in (None, gaussian(1, shape[1], seed=1)[0]):
            expected = row_quant_ref(x, fmt, col_scale)
            q, scale = row_quant(kernels, x, fmt, col_scale)
            assert same_bytes(q, expected.q) and same_bytes(scale, expected.scale)


@pytest.mark.parametrize("fmt", ["int8", "e4m3"])
@pytest.mark.parametrize("dtype", list(FLOAT_TYPES))
def test_row_quant_of_hard_rows(kernels, fmt, dtype):
    # fp16 ends at 65504
    x = hard(200).clamp(-6e4, 6e4).to(dtype)
    for got, expected in zip(row_quant(kernels, x, fmt), row_quant_ref(x, fmt), strict=True):
        assert same_bytes(got, expected)


@pytest.mark.parametrize("fmt", ["int8", "e4m3"])
def test_row_quant_of_every_number_of_sixteen_bits(kernels, fmt):
    for dtype in (torch.bfloat16, torch.float16):
        x = (
            torch.arange(2**16, dtype=torch.int32)
            .to(torch.int16)
            .view(128, 512)
            .view(dtype)
            .clone()
        )
        x[~x.isfinite()] = 1
        for got, expected in zip(row_quant(kernels, x, fmt), row_quant_ref(x, fmt), strict=True):
            assert same_bytes(got, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_the_scale(kernels, value):
    x = gaussian(3, 40)
    x[1, 33] = value
    _, scale = row_quant(kernels, x, "int8")
    assert scale.isfinite().tolist() == [True, False, True]


def parts_of(format, parts):
    tables = (nf4.code(CPU), nf4.absmax_code(CPU)) if format.name == "nf4" else ()
    return [*parts.values(), *tables]


@decoded_format
@pytest.mark.parametrize("shape", [*AWKWARD, (2, 4160), (2, 4104), (3, 40)])
def test_decoders(kernels, format, shape):
    parts = format.quantize(heavy_tailed(*shape), impl="ref")
    # guarded rows, and an address that isn't one of eight columns'
    for offset in (0, 1):
        room = torch.full((shape[0] * shape[1] + 16,), 77.0, dtype=torch.bfloat16)
        out = room[offset : offset + shape[0] * shape[1]].view(shape)
        call(getattr(kernels, f"dequantize_{format.name}"), out, *shape, *parts_of(format, parts))
        assert same_bytes(out, QuantWeight(format, parts, shape).to(torch.bfloat16, impl="ref"))
        assert (room[:offset] == 77).all() and (room[offset + out.numel() :] == 77).all()


@decoded_format
def test_decoders_of_hard_rows(kernels, format):
    parts, out = format.quantize(hard(), impl="ref"), torch.empty(12, 192, dtype=torch.bfloat16)
    call(getattr(kernels, f"dequantize_{format.name}"), out, *out.shape, *parts_of(format, parts))
    assert same_bytes(out, QuantWeight(format, parts, (12, 192)).to(torch.bfloat16, impl="ref"))


@pytest.mark.skipif(shutil.which("bash") is None, reason="the check is a bash script")
def test_the_compile_check_fails_where_it_should(tmp_path):
    """With compilers that are there but fail, that are asked for but not there, and that work."""
    script = tmp_path / "compiler"

    def check(behaviour: str, **env: str) -> subprocess.CompletedProcess[str]:
        script.write_text(f"#!/bin/sh\n{behaviour}\n")
        script.chmod(0o755)
        names = {"NVCC": str(script), "HIPCC": str(script)} | env
        command = ["bash", str(ROOT / "csrc/compile_check.sh")]
        return subprocess.run(
            command, env=os.environ | names, capture_output=True, text=True, check=False
        )

    passed = check("exit 0")
    assert passed.returncode == 0 and passed.stdout.count(" compiles\n") == 2 * 5
    failing = check("echo wrong here; exit 1")
    assert (
        failing.returncode == 1
        and "sm_86: gpu/dequant.cu does not compile\nwrong here" in failing.stdout
    )
    assert check("echo 'ptxas info: 8 bytes spill stores'").returncode == 1
    assert check("echo 'remark: VGPRs Spill: 3'").returncode == 1
    absent = check("exit 0", HIPCC=str(tmp_path / "none"))
    assert absent.returncode == 1 and "HIPCC=" in absent.stderr


@pytest.mark.parametrize("format", FORMATS.values(), ids=list(FORMATS))
def test_native_on_a_gpu_runs_or_is_refused(format, monkeypatch):
    """Never another back end in its place: on fake CUDA tensors, whatever this machine has."""
    monkeypatch.setattr(gpu, "obstacle", lambda: "this test says so")
    with FakeTensorMode():
        weight = torch.empty(4, 64, device="cuda")
        parts = format.empty((4, 64), "cuda")
        quantizes, decodes = "quantize" in format.gpu_tasks, "dequantize" in format.gpu_tasks
        assert quantizes != decodes
        why = "this test says so" if quantizes else "the native module doesn't quantize this format"
        with pytest.raises(
            ValueError, match=f"{format.name}.quantize: impl='native' can't do this call: .*{why}"
        ):
            format.quantize(weight, impl="native")
        why = "this test says so" if decodes else "the native module doesn't dequantize this format"
        with pytest.raises(
            ValueError, match=f"{format.name}.dequantize: impl='native' can't do this call: .*{why}"
        ):
            format.implementation("dequantize", "native", parts["packed"], torch.bfloat16)
        why = (
            "decodes to torch.bfloat16, not to torch.float32"
            if decodes
            else "the native module doesn't"
        )
        with pytest.raises(ValueError, match=why):
            format.implementation("dequantize", "native", parts["packed"], torch.float32)


def test_the_obstacle_is_named(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_NATIVE", False)
    assert gpu.obstacle() == "the native module fluxfast._C was not built"
    monkeypatch.setattr(dispatch, "HAS_NATIVE", True)

    class Native:
        def __init__(self, backend, error=None):
            self.gpu_backend, self.gpu_error = lambda: backend, lambda: error

    torchs, other = ("cuda", "hip") if torch.version.hip is None else ("hip", "cuda")
    for native, why in (
        (Native(""), f"built without GPU kernels (FLUXFAST_{torchs.upper()}=ON"),
        (Native(other), f"built for {other}, and torch for {torchs}"),
        (Native(torchs, "no driver"), f"{torchs} says: no driver"),
    ):
        monkeypatch.setattr(dispatch, "native", native, raising=False)
        assert why in (gpu.obstacle() or "")
    monkeypatch.setattr(dispatch, "native", Native(torchs))
    assert gpu.obstacle() is None


WHY_NOT = gpu.obstacle() if torch.cuda.is_available() else "torch has no GPU"


@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
@pytest.mark.parametrize("format", FORMATS.values(), ids=list(FORMATS))
@pytest.mark.parametrize("shape", [*AWKWARD, (64, 3072), (3, 4160), (2, 4104)])
def test_on_the_device(format, shape):
    weight = heavy_tailed(*shape)
    expected = format.quantize(weight, impl="ref")
    if "quantize" in format.gpu_tasks:
        for dtype in FLOAT_TYPES:
            parts = format.quantize(weight.to("cuda", dtype), impl="native")
            reference = format.quantize(weight.to(dtype), impl="ref")
            assert all(same_bytes(parts[name].cpu(), reference[name]) for name in reference)
    if "dequantize" in format.gpu_tasks:
        parts = {name: part.cuda() for name, part in expected.items()}
        values = QuantWeight(format, parts, shape).to(torch.bfloat16, impl="native").cpu()
        assert same_bytes(
            values, QuantWeight(format, expected, shape).to(torch.bfloat16, impl="ref")
        )
