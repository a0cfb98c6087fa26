"""Fixtures of the op tests: every instruction set the native module can use here, and memory that is poison until written."""

import pytest
import torch

from fluxfast.ops import _impl

ISAS = _impl.native.cpu_isas() if _impl.HAS_NATIVE else []


# without the native module there are none, and pytest skips what asks for one
@pytest.fixture(params=ISAS)
def isa(request):
    _impl.native.use_cpu_isa(request.param)
    yield request.param
    _impl.native.use_cpu_isa(ISAS[-1])


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
