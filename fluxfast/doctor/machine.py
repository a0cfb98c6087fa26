"""What this machine is: its device, its driver, and the versions of what a kernel goes through."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fluxfast import __version__
from fluxfast.ops import dispatch


def facts(device: torch.device) -> dict[str, str]:
    """The facts by name, as text. Two machines with the same facts get the same verdicts."""
    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "driver": driver() if device.type == "cuda" else "none",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda or torch.version.hip),
        "triton": _installed("triton"),
        "fluxfast": __version__,
        "native module": native_module(),
        "sources": sources_digest(),
    }
    if device.type == "cuda":
        found["architecture"] = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
        if torch.version.hip is not None:
            found["architecture"] = torch.cuda.get_device_properties(device).gcnArchName
    return found


def key(found: Mapping[str, str]) -> str:
    """A file's name for these facts."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:24]


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def cpu_name() -> str:
    """The processor's name, in its maker's words."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = re.findall(r"^model name\s*: (.+)$", text, flags=re.MULTILINE)
    return names[0] if names else platform.machine()


@functools.cache
def driver() -> str:
    """The GPU driver's version, or else that of the CUDA interface it offers."""
    for path, pattern in (
        ("/proc/driver/nvidia/version", r"Kernel Module.*?(\d+\.\d+[.\d]*)"),
        ("/sys/module/amdgpu/version", r"(\S+)"),
    ):
        try:
            found = re.search(pattern, Path(path).read_text(encoding="utf-8"))
        except OSError:
            continue
        if found:
            return found[1]
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(
            query, capture_output=True, check=True, timeout=30, text=True
        ).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return f"interface {torch._C._cuda_getDriverVersion()}"  # type: ignore[attr-defined]


@functools.cache
def native_module() -> str:
    """What the native module is built with: instruction sets, GPU back end, and its digest."""
    if not dispatch.HAS_NATIVE:
        return "not built"
    gpu = dispatch.native.gpu_backend() or "none"
    digest = hashlib.sha256(Path(dispatch.native.__file__).read_bytes()).hexdigest()[:12]
    return f"{' '.join(dispatch.native.cpu_isas())}, GPU {gpu}, {digest}"


@functools.cache
def sources_digest() -> str:
    """A digest of the kernels and of what launches and checks them.

    The version number alone does not change with every edit.
    """
    import fluxfast_kernels

    digest, package = hashlib.sha256(), Path(__file__).parent.parent
    folders = [
        Path(fluxfast_kernels.__path__[0]),
        *(package / name for name in ("ops", "quant", "model", "memory", "doctor")),
    ]
    for folder in folders:
        for path in sorted(folder.glob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]
