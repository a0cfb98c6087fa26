"""Fixtures of the op tests: memory that is poison until written."""

import pytest
import torch


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
