"""Whole blocks with adapters of kinds that fluxfast doesn't know, beside LoRAs: the fused block
against the modules' own forwards in plain torch.
"""

import pytest
import torch
from torch import nn

from fluxfast.adapters.kind import Wrapped
from fluxfast.adapters.kinds import KINDS
from fluxfast.model import tape
from small_flux import small_flux
from support import make_inputs, relative_error
from toy_adapters import Diagonal, Shift

LORAS = ["to_q", "to_v", "to_out.0", "proj_mlp", "ff.net.2"]
# some with a LoRA beneath, some without
ADAPTED = ["attn.to_q", "attn.to_k", "attn.add_v_proj", "proj_mlp", "proj_out", "ff.net.2"]


class Adapted(nn.Module):
    """A linear, with or without LoRA, under two adapters; its forward is plain torch."""

    def __init__(self, base_layer, generator):
        super().__init__()
        self.base_layer = base_layer
        k, n = base_layer.in_features, base_layer.out_features
        for name, shape in {"v": (n,), "d": (k,), "p": (n, k)}.items():
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * k**-0.5
            setattr(self, name, nn.Parameter(drawn.to(torch.get_default_dtype())))
        self.dropout = 0.0

    def adapters(self):
        p = self.dropout if self.training else 0.0
        return Diagonal(self.d, self.p, p), Shift(self.v, p)

    def forward(self, x):
        assert self.dropout == 0
        return self.base_layer(x) + (x * self.d) @ self.p.T + self.v


class AdaptedKind:
    """What blocks ask of a kind of adapter."""

    def read(self, module, *, share_dropout):
        if not isinstance(module, Adapted):
            return None
        return Wrapped(module.base_layer, module.adapters())


@pytest.fixture
def are_read(monkeypatch):
    """Blocks read what the modules hold; where no kind can, they call the modules."""
    monkeypatch.setitem(KINDS, "adapted", AdaptedKind())


def make_model(format=None, dtype=torch.float64, dropout=0.0):
    model = small_flux(format, LORAS, num_layers=1, num_single_layers=1).to(dtype)
    g = torch.Generator().manual_seed(5)
    for name, module in list(model.named_modules()):
        if ".base_layer" not in name and any(name.endswith(f".{end}") for end in ADAPTED):
            parent, _, child = name.rpartition(".")
            adapted = Adapted(module, g).to(dtype)
            adapted.dropout = dropout
            setattr(model.get_submodule(parent), child, adapted)
    return model


class Log(list):
    """How each call of a block ran."""

    def record(self, how, because=None, value=""):
        self.append(how)


def run(model, dtype, policy="none", compute="same", ran="fused"):
    """The output, and every gradient, for fixed inputs."""
    model.set_compute(compute)
    log = Log()
    for block in model.blocks:
        block.policy, block.log = policy, log
    inputs = {name: t.to(dtype) for name, t in make_inputs(2, 3, 4).items()}
    inputs["hidden_states"].requires_grad_()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    torch.manual_seed(1)
    out = model(**inputs).sample
    # a comparison of one path with itself would tell nothing
    assert log == [ran] * 2
    grads = torch.autograd.grad(out.square().mean(), [inputs["hidden_states"], *trained.values()])
    return out, dict(zip(["input", *trained], grads, strict=True))


def modules_called(model, dtype, **options):
    """The same with the adapters' modules called as they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(KINDS, "adapted")
        return run(model, dtype, ran="composed", **options)


@pytest.mark.usefixtures("are_read")
@pytest.mark.parametrize("policy", tape.POLICIES)
@pytest.mark.parametrize("format", [None, "int8", "int4"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 3e-5)])
def test_values_and_every_gradient(format, policy, dtype, tolerance):
    model = make_model(format, dtype)
    expected_out, expected = modules_called(model, dtype)
    out, grads = run(model, dtype, policy)
    assert relative_error(out, expected_out) < tolerance
    toys = [name for name in grads if name.rpartition(".")[2] in ("v", "d", "p")]
    assert len(toys) == 3 * (4 + 2 + 2) and grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert relative_error(grad, expected[name]) < tolerance, name


@pytest.mark.usefixtures("are_read")
@pytest.mark.parametrize("format", [None, "int8", "int4"])
def test_products_of_codes(format):
    """Products of codes round the base's input; the adapters see values and so err by no more."""
    model = make_model(format, torch.float32)
    expected_out, expected = modules_called(model, torch.float32)
    out, grads = run(model, torch.float32, compute="int8")
    assert 1e-5 < relative_error(out, expected_out) < 0.03
    for name, grad in grads.items():
        assert relative_error(grad, expected[name]) < 0.06, name
    again_out, again = run(model, torch.float32, policy="full", compute="int8")
    assert relative_error(again_out, out) < 1e-6
    assert max(relative_error(again[name], grad) for name, grad in grads.items()) < 1e-5


@pytest.mark.usefixtures("are_read")
@pytest.mark.parametrize("policy", tape.POLICIES)
def test_dropout(policy):
    """Gradients are those of the function that the masks of a seed make: by finite differences."""
    model = make_model(None, torch.float64, dropout=0.3)
    out, grads = run(model, torch.float64, policy)
    g = torch.Generator().manual_seed(9)
    trained = [(p, grads[n]) for n, p in model.named_parameters() if p.requires_grad]
    moves = [torch.randn(p.shape, generator=g, dtype=torch.float64) for p, _ in trained]
    losses = []
    for step in (1e-6, -1e-6):
        for (p, _), move in zip(trained, moves, strict=True):
            p.data.add_(move, alpha=step)
        losses.append(run(model, torch.float64, policy)[0].detach().square().mean())
        for (p, _), move in zip(trained, moves, strict=True):
            p.data.sub_(move, alpha=step)
    slope = sum((grad * move).sum() for (_, grad), move in zip(trained, moves, strict=True))
    assert abs((losses[0] - losses[1]) / 2e-6 - slope) < 1e-6 * abs(slope)
    model.eval()
    assert relative_error(run(model, torch.float64)[0], out) > 1e-2
