"""LoKr beside lycoris-lora's LokrModule: shapes, first values, outputs and every gradient."""

import pytest
import torch
from torch import nn

from fluxfast.adapters.lokr import LokrLinear, divided, lokr_shapes
from fluxfast.config.lycoris import LycorisOptions

lycoris_modules = pytest.importorskip("lycoris.modules")

# (out, in): a prime, one row, one column, awkward numbers, FLUX.1's own ratio
SIZES = [(64, 64), (60, 48), (127, 36), (1, 24), (18, 1), (250, 360), (96, 384)]
OPTIONS = {
    "plain": {},
    "whole factors": {"full_matrix": True, "factor": 4},
    "a large rank": {"dim": 10000, "alpha": 3, "factor": 8},
    "narrow factors": {"decompose_both": True, "dim": 1, "alpha": 0.5},
    "unbalanced": {"unbalanced_factorization": True, "factor": 6, "dim": 2},
    "a scalar": {"use_scalar": True, "factor": 4, "dim": 2, "alpha": 3},
    "an alpha of 0": {"alpha": 0, "dim": 3, "factor": 3},
    "a multiplier": {"multiplier": 0.3, "alpha": 2},
    "rows of a trained length": {"weight_decompose": True, "dim": 2},
    "all of it": {
        "weight_decompose": True, "use_scalar": True, "multiplier": 0.7, "factor": 5,
        "decompose_both": True, "dim": 1,
    },
}  # fmt: skip


def options_of(**options):
    return LycorisOptions(algo="lokr", **options)


def make_linear(shape, bias=True):
    torch.manual_seed(1)
    return nn.Linear(shape[1], shape[0], bias=bias, dtype=torch.float64).requires_grad_(False)


def make_library(linear, options, seed=2):
    torch.manual_seed(seed)
    names = ("decompose_both", "factor", "use_scalar", "weight_decompose", "full_matrix")
    names += ("unbalanced_factorization", "bypass_mode")
    o = options
    return lycoris_modules.LokrModule(
        "x", linear, o.multiplier, o.dim, o.alpha, o.dropout, o.rank_dropout, o.module_dropout,
        **{name: getattr(o, name) for name in names},
    )  # fmt: skip


def make_ours(linear, options, dtype=torch.float64, seed=2):
    torch.manual_seed(seed)
    return LokrLinear(linear, options, dtype)


def test_features_are_divided_as_the_library_does():
    from lycoris.functional import factorization

    for features in (*range(1, 400), 3072, 12288, 9216, 15360, 18432):
        for factor in (-1, 1, 2, 3, 4, 7, 8, 16, 17, 100, 5000):
            assert divided(features, factor) == factorization(features, factor), (features, factor)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("name", OPTIONS)
def test_first_values_are_the_librarys(name, shape):
    options, linear = options_of(**OPTIONS[name]), make_linear(shape)
    ours = make_ours(linear, options, torch.float32).trained()
    theirs = dict(make_library(linear, options).named_parameters())
    assert ours.keys() == theirs.keys() == lokr_shapes(*shape, options).keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("name", OPTIONS)
def test_output_and_every_gradient_are_the_librarys(name, shape):
    options, linear = options_of(**OPTIONS[name]), make_linear(shape)
    theirs, ours = make_library(linear, options).double(), make_ours(linear, options)
    g = torch.Generator().manual_seed(3)
    for key, tensor in theirs.named_parameters():
        drawn = torch.randn(tensor.shape, generator=g, dtype=torch.float64)
        tensor.data.copy_(tensor.data + drawn if key == "dora_scale" else drawn)
        ours.trained()[key].data.copy_(tensor.data)
    x = torch.randn(2, 3, shape[1], generator=g, dtype=torch.float64).requires_grad_()
    dy = torch.randn(2, 3, shape[0], generator=g, dtype=torch.float64)
    found = []
    for module in (ours, theirs):
        y, own = module(x), dict(module.named_parameters())
        grads = torch.autograd.grad(y, [x, *(own[name] for name in ours.trained())], dy)
        found.append([y, *grads])
    for key, own, expected in zip(["y", "x", *ours.trained()], *found, strict=True):
        # fp64, with sums of some hundred terms; the gradient of a row of one trained length and one
        # column is zero but for rounding
        assert (own - expected).norm() < 1e-11 * max(float(expected.norm()), 1), key


@pytest.mark.parametrize("norm", [1e-3, 0.5])
def test_a_start_like_the_base(norm):
    linear = make_linear((60, 48))
    with torch.no_grad():
        linear.weight += 0.25
    module = LokrLinear(linear, options_of(factor=4, full_matrix=True), torch.float64, norm)
    own = module.trained()
    assert torch.equal(own["lokr_w1"], torch.ones(4, 4, dtype=torch.float64))
    for what in ("mean", "std"):
        expected = norm * getattr(linear.weight, what)()
        # drawn in fp32
        assert getattr(own["lokr_w2"], what)().item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match="a rank divides them"):
        LokrLinear(linear, options_of(factor=4, dim=1), torch.float64, norm)


def test_a_weight_that_is_no_matrix_of_numbers():
    linear = make_linear((6, 4))
    linear.weight = nn.Parameter(torch.ones(12, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"Linear keeps its weight as \[12, 2\] torch\.uint8"):
        make_ours(linear, options_of(weight_decompose=True))


def test_without_the_library(monkeypatch):
    """LoKr needs no lycoris-lora, and everything else says so."""
    import sys

    from fluxfast.adapters.lycoris_library import LibraryLinear

    for name in [name for name in sys.modules if name.partition(".")[0] == "lycoris"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lycoris", None)
    linear = make_linear((6, 4))
    assert make_ours(linear, options_of()).trained()
    with pytest.raises(ValueError, match=r"algo loha needs the package lycoris-lora .*\[lycoris\]"):
        LibraryLinear(linear, LycorisOptions(algo="loha"), torch.float64)
