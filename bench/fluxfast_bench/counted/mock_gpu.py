"""A mock driver for Triton: its JIT compiles and caches as on a GPU, and launches nothing.

Kernels can be compiled where there is no GPU, and on a machine that has one in many processes at
once, without a CUDA context in each. The keys of the cache are the JIT's own. Where CUDA's driver
is installed, Triton's launchers are built too: one small module in C for each signature.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fluxfast_bench.counted.compilers import SHARED_LIMITS
from fluxfast_kernels.aot import AOT_TARGETS


class _Utils:
    """What Triton asks of a device, and what it is told of a kernel that was loaded."""

    def __init__(self, shared: int) -> None:
        self._shared = shared

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self._shared, "multiprocessor_count": 132}

    def load_binary(
        self, name: str, kernel: bytes, shared: int, device: int
    ) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills and most threads of a kernel: nobody uses these."""
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        return None


class _NoLauncher:
    """In the place of Triton's launcher where it can't be built."""

    def __init__(self, source: Any, metadata: Any) -> None:
        return None

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None


class _BuiltLauncher(_NoLauncher):
    """Builds Triton's launcher, which leaves it in Triton's cache, and never calls it."""

    def __init__(self, source: Any, metadata: Any) -> None:
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(source, metadata)


def _has_cuda_driver() -> bool:
    try:
        from triton.backends.nvidia.driver import libcuda_dirs

        return bool(libcuda_dirs())
    except (AssertionError, ImportError, OSError):
        return False


class MockDriver:
    """Triton's driver for a key of AOT_TARGETS; `triton.runtime.driver.set_active` takes it."""

    def __init__(self, target: str) -> None:
        self._target = GPUTarget(*AOT_TARGETS[target])
        self.utils = _Utils(SHARED_LIMITS[target])
        self.launcher_cls = (
            _BuiltLauncher if self._target.backend == "cuda" and _has_cuda_driver() else _NoLauncher
        )

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        return None

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> None:
        return None

    def is_active(self) -> bool:
        return True


def activate(target: str) -> None:
    """From now on this process compiles for that target, and launches nothing."""
    driver.set_active(MockDriver(target))
