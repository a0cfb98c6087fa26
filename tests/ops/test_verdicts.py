"""What failed its check on this machine: `auto` passes over it and says so, an explicit choice is
an error.
"""

import logging

import pytest
import torch
from op_cases import needs_native
from op_checks import randn

from fluxfast.ops import attention, dispatch, verdicts
from fluxfast.ops.gelu import gelu
from fluxfast.quant import FORMATS, QuantWeight


@pytest.fixture
def log(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_announced", set())
    attention._on_cpu.cache_clear()
    attention._automatic.cache_clear()
    caplog.set_level(logging.WARNING, logger="fluxfast")
    yield caplog
    verdicts.set_failed({})


@needs_native
def test_auto_passes_over_an_op_and_says_so_once(log):
    x = randn(1, 5, 12)
    right = gelu(x)
    assert not log.messages
    verdicts.set_failed({("gelu", "native"): "gelu (native avx2): y is off by 0.3"})
    assert torch.allclose(gelu(x), right, atol=1e-6)
    gelu(x)
    (message,) = log.messages
    assert message.startswith(
        "gelu runs on 'ref': not on 'native': it failed its check on this machine"
    )
    assert "y is off by 0.3" in message and "fluxfast-train doctor" in message
    with pytest.raises(
        ValueError, match=r"gelu: impl='native' can't do this call: it failed its check .* doctor"
    ):
        gelu(x, impl="native")
    with verdicts.ignored():
        assert torch.equal(gelu(x, impl="native"), right)
    with pytest.raises(ValueError, match="it failed its check"):
        gelu(x, impl="native")


@needs_native
def test_a_decoder_is_passed_over_by_itself(log):
    format, weight = FORMATS["nf4"], torch.randn(3, 64)
    parts = format.quantize(weight)
    right = QuantWeight(format, parts, (3, 64)).to(torch.float32)
    verdicts.set_failed({("nf4.dequantize", "native"): "wrong"})
    assert torch.equal(QuantWeight(format, parts, (3, 64)).to(torch.float32), right)
    assert [message.partition(" runs")[0] for message in log.messages] == ["nf4.dequantize"]
    with pytest.raises(ValueError, match=r"nf4.dequantize: impl='native' .* failed its check"):
        QuantWeight(format, parts, (3, 64)).to(torch.float32, impl="native")
    format.quantize(weight, impl="native")


@needs_native
def test_attention_takes_another_back_end(log):
    q = randn(1, 4, 2, 16, grad=False)
    mask = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    own = attention.resolve("auto", q, None)
    verdicts.set_failed({("attention", own): "wrong", ("masked attention", "cpu"): "wrong"})
    assert attention.resolve("auto", q, None) == ("ref" if own == "cpu" else "cpu")
    assert attention.resolve("auto", q, mask) == "ref"
    assert log.messages == [
        f"attention passes over '{name}': it failed its check on this machine"
        for name in (own, "cpu")
    ]
    with pytest.raises(ValueError, match=f"the back end '{own}' can't be had: it failed its check"):
        attention.resolve(own, q, None)
    with pytest.raises(ValueError, match="'cpu' can't be had"):
        attention.resolve("cpu", q, mask)


@pytest.mark.parametrize(
    ("capability", "masked", "failed", "chosen"),
    [
        (9, False, (), "cudnn"),
        (9, False, ("cudnn",), "flash"),
        (9, False, ("cudnn", "flash"), "efficient"),
        (9, True, ("cudnn",), "efficient"),
        (8, False, ("flash",), "efficient"),
        (8, False, ("flash", "efficient"), "ref"),
        (8, True, ("efficient",), "ref"),
    ],
)
def test_on_a_gpu_the_next_fastest_is_taken(log, capability, masked, failed, chosen):
    assert (
        attention._automatic("cuda", torch.bfloat16, 128, masked, capability, frozenset(failed))
        == chosen
    )
    assert len(log.messages) == len(failed)


def test_verdicts_take_each_others_place():
    verdicts.set_failed(
        {("attention", "flash"): "a", ("attention", "cudnn"): "b", ("gelu", "triton"): "c"}
    )
    assert verdicts.ways_failed("attention") == {"flash", "cudnn"}
    verdicts.set_failed({})
    assert (
        verdicts.ways_failed("attention") == frozenset()
        and verdicts.failed("gelu", "triton") is None
    )
