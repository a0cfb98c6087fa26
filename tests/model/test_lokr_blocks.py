"""Whole blocks over LoKr and over weight decomposition (DoRA): fused against modules whose forward
forms the weight, in plain torch; and launch plans over them, bit for bit.
"""

import functools

import pytest
import torch
from torch import nn

from block_cases import EVERYTHING
from fluxfast.adapters.kind import Wrapped
from fluxfast.adapters.kinds import KINDS
from fluxfast.model import fused_double, tape
from fluxfast.ops.linear.adapters import Lora
from fluxfast.ops.linear.lokr import Lokr
from plan_cases import decode_by_kernels, replays
from small_flux import small_flux
from support import in_interpreter, make_inputs, relative_error


class Changed(nn.Module):
    """A linear with a LoKr or a weight-decomposed LoRA; its forward forms the weight."""

    def __init__(self, base_layer, generator, decomposed, lora):
        super().__init__()
        self.base_layer = base_layer
        k, n = base_layer.in_features, base_layer.out_features

        def drawn(*shape):
            made = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3
            return nn.Parameter(made.to(torch.get_default_dtype()))

        if lora:
            self.factors = nn.ParameterList([drawn(2, k), drawn(n, 2)])
        else:
            self.factors = nn.ParameterList([drawn(4, 2), drawn(n // 4, 3), drawn(3, k // 2)])
        self.magnitude = nn.Parameter(drawn(n, 1).abs().detach() + 0.5) if decomposed else None
        self.lora = lora

    def adapter(self):
        if self.lora:
            magnitude = None if self.magnitude is None else self.magnitude[:, 0]
            return Lora(*self.factors, 0.5, magnitude=magnitude)
        w1, *w2 = self.factors
        return Lokr((w1,), tuple(w2), 0.5, magnitude=self.magnitude)

    def forward(self, x):
        base, adapter = self.base_layer, self.adapter()
        weight = base.weight if isinstance(base, nn.Linear) else base.packed().to(x.dtype)
        if self.magnitude is not None:
            return nn.functional.linear(x, adapter.decomposed_ref(weight.detach()), base.bias)
        w1, w2 = adapter.whole()
        return nn.functional.linear(x, weight.detach() + 0.5 * torch.kron(w1, w2), base.bias)


class ChangedKind:
    """What blocks ask of a kind of adapter."""

    def read(self, module, *, share_dropout):
        if not isinstance(module, Changed):
            return None
        return Wrapped(module.base_layer, (module.adapter(),))


@pytest.fixture
def are_read(monkeypatch):
    monkeypatch.setitem(KINDS, "changed", ChangedKind())


def change_linears(model, decomposed=False, lora=False, of=EVERYTHING):
    """Puts a module around each linear; a block's are of different values."""
    g, dtype = torch.Generator().manual_seed(5), next(model.parameters()).dtype
    for name, module in list(model.named_modules()):
        if "blocks" in name and any(name.endswith(f".{end}") for end in of):
            while hasattr(module, "base_layer"):
                module = module.base_layer
            made = Changed(module, g, decomposed, lora).to(dtype)
            model.set_submodule(name, made)
    return model


def make_model(format=None, dtype=torch.float64, **kind):
    model = small_flux(format, num_layers=1, num_single_layers=1).to(dtype)
    return change_linears(model, **kind)


class Log(list):
    def record(self, how, because=None, value=""):
        self.append(how)


def run(model, dtype, policy="none", compute="same", impl="auto", ran="fused"):
    """The output, and every gradient, for fixed inputs."""
    model.set_compute(compute)
    log = Log()
    for block in model.blocks:
        block.policy, block.log, block.impl = policy, log, impl
        # a back end that CPUs have, for Triton's kernels in the interpreter
        block.attention = "cpu" if impl == "triton" else "auto"
    inputs = {name: t.to(dtype) for name, t in make_inputs(2, 3, 4).items()}
    inputs["hidden_states"].requires_grad_()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    out = model(**inputs).sample
    assert log == [ran] * 2
    grads = torch.autograd.grad(out.square().mean(), [inputs["hidden_states"], *trained.values()])
    return out, dict(zip(["input", *trained], grads, strict=True))


def modules_called(model, dtype):
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(KINDS, "changed")
        return run(model, dtype, ran="composed")


KINDS_OF_CHANGE = [{}, {"decomposed": True}, {"decomposed": True, "lora": True}]
every_change = pytest.mark.parametrize("kind", KINDS_OF_CHANGE, ids=["LoKr", "LoKr+wd", "DoRA"])


@pytest.mark.usefixtures("are_read")
@every_change
@pytest.mark.parametrize("policy", tape.POLICIES)
@pytest.mark.parametrize("format", [None, "int8", "int4"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 3e-5)])
def test_values_and_every_gradient(kind, format, policy, dtype, tolerance):
    model = make_model(format, dtype, **kind)
    expected_out, expected = modules_called(model, dtype)
    out, grads = run(model, dtype, policy)
    assert relative_error(out, expected_out) < tolerance
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert relative_error(grad, expected[name]) < tolerance, name


@in_interpreter
@pytest.mark.usefixtures("are_read")
@every_change
def test_on_our_kernels(kind, monkeypatch):
    """Text and image are in one launch each, unless a linear's rows have scales of their own."""
    pairs = []

    class Spied(fused_double.LinearPair):
        def __init__(self, *args):
            pairs.append(self)
            super().__init__(*args)

    monkeypatch.setattr(fused_double, "LinearPair", Spied)
    model = make_model(None, torch.float32, **kind)
    expected_out, expected = modules_called(model, torch.float32)
    out, grads = run(model, torch.float32, "full", impl="triton")
    assert bool(pairs) != ("decomposed" in kind)
    assert relative_error(out, expected_out) < 3e-5
    for name, grad in grads.items():
        assert relative_error(grad, expected[name]) < 3e-5, name


@pytest.mark.usefixtures("are_read")
@every_change
@pytest.mark.parametrize("format", [None, "int8", "int4"])
def test_products_of_codes(kind, format):
    """Products of codes round the inputs; both policies by the same codes."""
    model = make_model(format, torch.float32, **kind)
    expected_out, expected = modules_called(model, torch.float32)
    out, grads = run(model, torch.float32, compute="int8")
    assert 1e-5 < relative_error(out, expected_out) < 0.05
    for name, grad in grads.items():
        assert relative_error(grad, expected[name]) < 0.1, name
    again_out, again = run(model, torch.float32, policy="full", compute="int8")
    assert relative_error(again_out, out) < 1e-6
    assert max(relative_error(again[name], grad) for name, grad in grads.items()) < 1e-5


@in_interpreter
@pytest.mark.usefixtures("are_read")
@pytest.mark.parametrize("kind", ["double", "single"])
@pytest.mark.parametrize("change", KINDS_OF_CHANGE[::2], ids=["LoKr", "DoRA"])
def test_launch_plans(kind, change, monkeypatch):
    decode_by_kernels(monkeypatch)
    replays(kind, prepare=functools.partial(change_linears, **change), policy="full")


@in_interpreter
@pytest.mark.usefixtures("are_read")
def test_launch_plans_with_codes(monkeypatch):
    decode_by_kernels(monkeypatch)
    replays("double", "int8", prepare=change_linears, policy="full", compute="int8")
