"""Adapters that trainers put on linears by replacing their forwards are read as what they are."""

import pytest
import torch
from dropin_hosts import assert_equal, diffusers_host, pair, randomise_trained
from host_adapters import (
    NETWORK,
    KohyaInference,
    KohyaLora,
    MusubiLoha,
    MusubiLokr,
    MusubiLora,
    Network,
    OneTrainerColumnDora,
    OneTrainerDora,
    OneTrainerLoha,
    OneTrainerLokr,
    OneTrainerLora,
    ToolkitDora,
    ToolkitLokr,
    ToolkitLora,
)
from host_of_sd_scripts import Flux
from peft import LoHaConfig, LoKrConfig, inject_adapter_in_model
from torch import nn

import fluxfast
from fluxfast.model.linear import obstacle, project, read_linear
from support import make_inputs, randomise, relative_error

ADAPTERS = [
    KohyaLora,
    KohyaInference,
    MusubiLora,
    MusubiLoha,
    MusubiLokr,
    ToolkitLora,
    ToolkitLokr,
    ToolkitDora,
    OneTrainerLora,
    OneTrainerDora,
    OneTrainerColumnDora,
    OneTrainerLoha,
    OneTrainerLokr,
]
# fp64: a sum's order, and OneTrainer's alpha in fp32
EXACT = 1e-6


def draw(module, seed=5):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3 + (p.ndim == 2 and 1 in p.shape))
    return module


def linear_with(*makes, features=(28, 40)):
    """A frozen linear in fp64, and its adapters, one around the other."""
    linear = nn.Linear(*features)
    draw(linear, 1).requires_grad_(False).double()
    return linear, nn.ModuleList(draw(make(linear), 2 + i).double() for i, make in enumerate(makes))


def results(call, x, adapters):
    y = call(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    modules = isinstance(adapters, nn.Module)
    trained = [p for p in adapters.parameters() if p.requires_grad] if modules else adapters
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), [x, *trained])]


def assert_read(linear, adapters, wanted=None):
    """Values and every gradient are the module's own; as many adapters as `wanted` were read."""
    assert (because := obstacle(linear)) is None, because
    assert len(read_linear(linear).adapters) == (len(adapters) if wanted is None else wanted)
    x = torch.randn(2, 63, linear.in_features, dtype=torch.float64).requires_grad_()
    expected = results(linear, x, adapters)
    actual = results(lambda x: project(x, linear), x, adapters)
    for ours, theirs in zip(actual, expected, strict=True):
        assert relative_error(ours, theirs) < EXACT


@pytest.mark.parametrize("make", [OneTrainerLora, OneTrainerLokr])
def test_adapters_made_in_inference_mode(make):
    """Their alpha is a tensor whose changes nobody counts."""
    with torch.inference_mode():
        linear, _ = linear_with(make)
        x = torch.randn(3, 28, dtype=torch.float64)
        expected = linear(x)
    with torch.no_grad():
        assert obstacle(linear) is None
        assert relative_error(project(x, linear), expected) < EXACT


@pytest.mark.parametrize("make", ADAPTERS)
def test_values_and_gradients_are_those_of_the_trainers_module(make):
    assert_read(*linear_with(make))


def test_each_part_of_the_outputs_may_have_factors_of_its_own():
    linear, adapters = linear_with(lambda linear: KohyaLora(linear, split_dims=[8, 12, 20]))
    # one adapter, whose factors are those of all parts
    assert_read(linear, adapters)


def test_one_adapter_may_be_around_another_trainers():
    assert_read(*linear_with(KohyaInference, KohyaLora, ToolkitLokr))


def test_dora_beside_another_adapter_is_called():
    linear, _ = linear_with(KohyaLora, OneTrainerDora)
    assert "one of several adapters is DoRA" in obstacle(linear)


def test_multipliers_and_switches_are_read_at_each_call(monkeypatch):
    linear, adapters = linear_with(KohyaInference, ToolkitLora)
    inference, toolkit = adapters
    inference.multiplier = -0.7
    monkeypatch.setattr(NETWORK, "_multiplier", 0.25)
    assert_read(linear, adapters)
    inference.enabled = False
    assert [a.scale for a in read_linear(linear).adapters] == [0.125]
    monkeypatch.setattr(NETWORK, "is_active", False)
    assert read_linear(linear).adapters == ()
    inference.enabled = True
    assert len(read_linear(linear).adapters) == 1
    assert toolkit.scale == 0.5


def test_a_number_in_a_tensor_may_change():
    linear, adapters = linear_with(OneTrainerLora)
    assert_read(linear, adapters)
    adapters[0].alpha.fill_(3)
    assert read_linear(linear).adapters[0].scale == 1
    assert_read(linear, adapters)


class SampleMultipliers(Network):
    _multiplier = (1.0, 0.5)


class NewForward(KohyaLora):
    """A later version, which does more."""

    def forward(self, x):
        return super().forward(x) + self.new_part(x)


def doubled(forward):
    def around(self, x):
        return 2 * forward(self, x)

    return around


class AroundForward(KohyaLora):
    """Somebody has put a function around its forward, whose own code names nothing."""

    forward = doubled(KohyaLora.forward)


class ScaledDora(ToolkitDora):
    def __init__(self, linear):
        super().__init__(linear)
        self.scale = 0.5


SAMPLES = SampleMultipliers()


@pytest.mark.parametrize(
    ("make", "because"),
    [
        (lambda linear: KohyaLora(linear, dropout=0.2), "a dropout between its two factors"),
        (lambda linear: ToolkitLora(linear, network=SAMPLES), "its multiplier is of each sample"),
        (ScaledDora, "its DoRA has a scale"),
        (NewForward, "names that fluxfast doesn't know: forward, new_part, super"),
        (AroundForward, "names that fluxfast doesn't know: forward"),
    ],
)
def test_what_cannot_be_read_is_called_and_says_why(make, because):
    linear, _ = linear_with(make)
    assert because in obstacle(linear)


def test_a_dropout_matters_in_training_alone():
    linear, adapters = linear_with(lambda linear: KohyaLora(linear, dropout=0.2))
    adapters.eval()
    assert_read(linear, adapters)


def test_a_hook_on_the_linear_or_on_a_factor_is_run():
    linear, adapters = linear_with(KohyaLora)
    handle = adapters[0].lora_up.register_forward_hook(lambda *_: None)
    assert "a factor of its LoRA is called as a module" in obstacle(linear)
    handle.remove()
    assert obstacle(linear) is None
    linear.register_forward_hook(lambda *_: None)
    assert obstacle(linear) is not None


def test_lycoris_own_modules_are_read():
    locon = pytest.importorskip("lycoris.modules.locon").LoConModule
    lokr = pytest.importorskip("lycoris.modules.lokr").LokrModule
    loha = pytest.importorskip("lycoris.modules.loha").LohaModule

    def applied(kind, **options):
        def make(linear):
            module = kind("name", linear, multiplier=1.5, lora_dim=3, alpha=2, **options)
            module.apply_to()
            return module

        return make

    for bypass in (True, False):
        for kind in (locon, loha):
            assert_read(*linear_with(applied(kind, bypass_mode=bypass)))
        for scalar in (True, False):
            assert_read(
                *linear_with(applied(lokr, factor=4, bypass_mode=bypass, use_scalar=scalar))
            )
    for kind in (lokr, loha):
        decomposed, _ = linear_with(applied(kind, weight_decompose=True))
        assert "weight-decomposed" in obstacle(decomposed)
    scaled, _ = linear_with(applied(loha, use_scalar=True))
    assert "trained scalar" in obstacle(scaled)


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("config", [LoKrConfig, LoHaConfig])
def test_pefts_lokr_and_loha_are_read(config, decomposed):
    options = {"decompose_both": True} if decomposed and config is LoKrConfig else {}
    host = nn.Sequential(nn.Linear(28, 40))
    config = config(r=2, target_modules=["0"], init_weights=False, **options)
    inject_adapter_in_model(config, host, "one")
    inject_adapter_in_model(config, host, "two")
    host.double()
    host[0].set_adapter(["one", "two"])
    randomise_trained(host)
    host[0].base_layer.requires_grad_(False)
    assert_read(host[0], [p for p in host.parameters() if p.requires_grad], wanted=2)
    host[0].set_adapter(["two"])
    assert len(read_linear(host[0]).adapters) == 1
    host[0].enable_adapters(False)
    assert read_linear(host[0]).adapters == ()


def linears_of(model):
    for block in model.modules():
        if type(block).__name__.endswith(("StreamBlock", "TransformerBlock")):
            yield from (m for m in block.modules() if type(m) is nn.Linear)


def host_with(make, host):
    model = Flux() if host == "bfl" else diffusers_host()
    randomise(model)
    model.requires_grad_(False)
    model.network = nn.ModuleList(make(linear) for linear in list(linears_of(model)))
    randomise_trained(model)
    return model


BLOCKS = [KohyaLora, ToolkitLokr, OneTrainerDora, OneTrainerColumnDora, OneTrainerLoha]


@pytest.mark.parametrize("host", ["bfl", "diffusers"])
@pytest.mark.parametrize("make", BLOCKS)
def test_blocks_run_fused_with_a_trainers_adapters(make, host):
    theirs, ours = pair(host_with, make, host)
    report = fluxfast.accelerate(ours, strict=True)
    assert all(block.fused for block in report.blocks)
    # a modulation's linear is no part of a fused block's products
    assert {linear.runs for linear in report.linears} == {"fused", "alone"}
    assert all(linear.adapters == 1 for linear in report.linears)
    assert_equal(theirs, ours, make_inputs(2, 6, 4, guidance=False))
    assert report.calls("fused") == report.calls() == len(report.blocks)
    fluxfast.restore(ours)
    assert_equal(theirs, ours, make_inputs(2, 6, 4, guidance=False), tolerance=1e-12)
