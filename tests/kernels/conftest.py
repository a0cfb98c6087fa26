"""Kernels run in Triton's interpreter where there is no GPU, and find garbage in memory that nobody wrote."""

import os

import pytest
import torch

# before anything imports triton: its own library is interpreted or compiled for good when it is imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# pytest keeps one module named conftest: whoever is collected after this folder still finds the shared helpers in it
from tests.conftest import *  # noqa: F403


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype == torch.float8_e4m3fn:
        tensor.view(torch.uint8).fill_(0x7F)
        return tensor
    return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `torch.empty` and its kin return NaN (77 in integers), so that an element left unwritten fails its test."""
    for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, original=original, **kw: _poison(original(*args, **kw)))
