"""SageAttention while validation images are drawn, with a package that stands in for it."""

import importlib.machinery
import io
import sys
import types

import pytest
import torch
from drawing_cases import DRAWS_TRAINED
from rich.console import Console

from fluxfast.config.run import load_config
from fluxfast.config.settings import ConfigError
from fluxfast.ops import attention
from fluxfast.ops.attention_sage import FUNCTIONS
from fluxfast.train.trainer import train

DRAWS = DRAWS_TRAINED | {
    "validation_resolution": "64", "validation_num_inference_steps": 2, "max_train_steps": 2,
    "modulation_ahead": False, "cuda_graphs": False,
}  # fmt: skip


@pytest.fixture
def package(monkeypatch):
    """A package of that name, whose functions note their calls and compute with PyTorch."""
    module, calls = types.ModuleType("sageattention"), []
    module.__spec__ = importlib.machinery.ModuleSpec("sageattention", None)

    def named(name):
        def function(q, k, v, tensor_layout, is_causal):
            assert (tensor_layout, is_causal) == ("NHD", False)
            assert not torch.is_grad_enabled()
            calls.append(name)
            heads_first = [x.transpose(1, 2) for x in (q, k, v)]
            out = torch.nn.functional.scaled_dot_product_attention(*heads_first)
            return out.transpose(1, 2)

        return function

    for name in FUNCTIONS.values():
        setattr(module, name, named(name))
    module.calls = calls
    monkeypatch.setitem(sys.modules, "sageattention", module)
    return module


@pytest.mark.parametrize("mechanism", FUNCTIONS)
def test_a_run_draws_with_it_and_trains_without(
    write_config, package, pretend_gpu, monkeypatch, mechanism
):
    pretend_gpu("H100")
    in_training = []
    backward = attention.backward

    def watched(*args, backend, **kwargs):
        in_training.append(backend)
        return backward(*args, backend=backend, **kwargs)

    monkeypatch.setattr(attention, "backward", watched)
    out = io.StringIO()
    train(load_config(write_config(**DRAWS, attention_mechanism=mechanism)), Console(file=out))
    # three blocks in each of two denoising steps, of one image
    assert package.calls == [FUNCTIONS[mechanism]] * 6
    assert len(in_training) >= 6 and not set(in_training) & set(FUNCTIONS)


def test_it_is_refused_where_it_can_not_run(write_config, package, pretend_gpu, monkeypatch):
    def refusal(**changes):
        with pytest.raises(ConfigError) as caught:
            train(load_config(write_config(**DRAWS, **changes)), Console(file=io.StringIO()))
        return str(caught.value)

    sage = {"attention_mechanism": "sageattention-int8-fp8-cuda"}
    assert "there is none" in refusal(**sage)
    pretend_gpu("RTX 3090")
    assert "8.9" in refusal(**sage)
    pretend_gpu("H100")
    monkeypatch.delattr(package, "sageattn_qk_int8_pv_fp8_cuda")
    assert "install a later version" in refusal(**sage)
    monkeypatch.delitem(sys.modules, "sageattention")
    assert "pip install sageattention" in refusal(**sage)


def test_the_op_has_no_backward_and_takes_no_mask(package):
    q = torch.randn(1, 5, 2, 16, requires_grad=True)
    out = attention.attention(q, q, q, backend="sageattention")
    torch.testing.assert_close(out, attention.attention_ref(q, q, q))
    with pytest.raises(ValueError, match="no backward"):
        out.sum().backward()
    with pytest.raises(ValueError, match="takes no mask"):
        attention.attention(q, q, q, torch.ones(5, 5, dtype=torch.bool), backend="sageattention")
