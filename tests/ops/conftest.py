"""Fixtures of the op tests: memory that is poison until written, and dgrad on transposed codes."""

import pytest
import torch
from op_checks import TRITON_DEVICE


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory is NaN, so that an element nobody wrote shows."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poison(make):
        def poisoned_make(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return poisoned_make

    monkeypatch.setattr(torch, "empty", poison(empty))
    monkeypatch.setattr(torch, "empty_like", poison(empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(new_empty))


@pytest.fixture
def transposes(monkeypatch):
    """Codes that dgrad has transposed for itself. It does so from one row on, as sm_90 does from
    many, whatever the device is.
    """
    from fluxfast_kernels import launch, quant_matmul

    made, transpose = [], quant_matmul.transpose_codes
    monkeypatch.setattr(quant_matmul, "transpose_codes", lambda w: made.append(w) or transpose(w))
    arch = launch.arch_key(torch.device(TRITON_DEVICE))
    monkeypatch.setitem(launch.TRANSPOSE_FROM, arch, {"rows": 1})
    return made
