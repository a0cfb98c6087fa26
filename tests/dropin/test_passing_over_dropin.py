"""An accelerated model avoids what failed its check on this machine."""

import pytest
import torch
from diffusers import FluxTransformer2DModel

import fluxfast
from fluxfast.doctor.checks import Outcome
from fluxfast.doctor.scope import Scope
from fluxfast.doctor.store import Store
from fluxfast.ops import dispatch, verdicts
from support import SMALL, make_inputs, randomise

pytestmark = pytest.mark.skipif(not dispatch.HAS_NATIVE, reason="the native module was not built")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield
    verdicts.set_failed({})


def keep(what, way):
    store = Store(torch.device("cpu"))
    store.add(
        [Outcome("a check", "fail", what, way, cause="it is off by 0.4")],
        Scope(device="cpu", dtype="float32"),
    )
    store.save()


def model():
    made = FluxTransformer2DModel(**SMALL | {"guidance_embeds": True})
    randomise(made)
    return made.requires_grad_(False)


def test_what_a_check_found_counts():
    plain = model()(**make_inputs(1, 2, 3)).sample
    accelerated = model()
    keep("gelu", "native")
    fluxfast.accelerate(accelerated)
    assert verdicts.failed("gelu", "native")
    assert torch.allclose(accelerated(**make_inputs(1, 2, 3)).sample, plain, atol=1e-4)
    keep("a fused block", "native")
    report = fluxfast.accelerate(accelerated)
    assert (
        not any(block.fused for block in report.blocks) and "off by 0.4" in report.blocks[0].because
    )


def test_what_was_asked_for_and_failed():
    keep("compute", "int8")
    with pytest.raises(ValueError, match="compute='int8' can't be had: it failed its check"):
        fluxfast.accelerate(model(), compute="int8")
