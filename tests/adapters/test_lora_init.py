"""LoRAs that begin with what a quantised base lacks (LoftQ), or a part of it (PiSSA, OLoRA)."""

import pytest
import torch
from peft.utils.loftq_utils import _low_rank_decomposition
from tiny_flux import run, tiny_transformer, train

from fluxfast.adapters import low_rank
from fluxfast.adapters.dora import row_norms
from fluxfast.adapters.kind import AdapterSettings
from fluxfast.adapters.kinds import KINDS
from fluxfast.adapters.lora import add_lora
from fluxfast.adapters.lora_state import (
    adapter_state,
    exported_state,
    load_adapter_state,
    lora_layers,
)
from fluxfast.quant import FORMATS
from fluxfast.quant.linear import QuantLinear
from fluxfast.quant.rules import quantize_model
from support import relative_error

# a module of every shape among the quantised, and one that stays in floats
TARGETS = ["to_q", "ff.net.0.proj", "norm_out.linear", "x_embedder"]
KEPT = "x_embedder"
RANK, ALPHA = 4, 6
SCALE = ALPHA / RANK
INITS = [("loftq", 1), ("loftq", 3), ("pissa", 1), ("pissa_niter_8", 1), ("olora", 1)]


def quantised(format, dtype=torch.float32):
    """The tiny transformer in a format, and the weights that it had before, of that dtype."""
    model = tiny_transformer(dtype)
    weights = {
        name: module.weight.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    quantize_model(model, FORMATS[format])
    return model, lambda names: ((name, weights[name]) for name in sorted(names)), weights


def add(model, originals, init, iterations=1, **arguments):
    return add_lora(
        model, targets=TARGETS, rank=RANK, alpha=ALPHA, init=init, loftq_iterations=iterations,
        originals=originals, **arguments,
    )  # fmt: skip


def product(layer):
    """s·B A of a layer in fp64."""
    a, b = (getattr(layer, key)["default"].weight.detach().double() for key in ("lora_A", "lora_B"))
    return SCALE * b @ a


def base(layer):
    """A layer's base as it is stored, in fp64."""
    linear = layer.get_base_layer()
    stored = linear.packed().to(torch.float32) if isinstance(linear, QuantLinear) else linear.weight
    return stored.detach().double()


def over_quantised(model):
    layers = {name: layer for name, layer in lora_layers(model).items() if name != KEPT}
    assert len(layers) == 5
    return layers


def best(matrix):
    """The best approximation of rank RANK, by an exact decomposition in fp64."""
    u, s, vh = torch.linalg.svd(matrix.double())
    return u[:, :RANK] * s[:RANK] @ vh[:RANK]


@pytest.mark.parametrize("format", FORMATS)
def test_loftq_corrects_the_error_and_leaves_the_base_as_it_is(format):
    untouched = quantised(format)[0]
    model, originals, weights = quantised(format)
    add(model, originals, "loftq")
    for name, layer in over_quantised(model).items():
        codes = layer.get_base_layer().packed().parts
        for part, expected in untouched.get_submodule(name).packed().parts.items():
            assert torch.equal(codes[part].view(torch.uint8), expected.view(torch.uint8))
        error = weights[name].double() - base(layer)
        # the factors are rounded to fp32
        assert relative_error(product(layer), best(error)) < 1e-6
        assert (error - product(layer)).norm() < error.norm()
        # what PEFT's LoftQ computes of the same error, in fp32 and for a scale of 1
        peft = _low_rank_decomposition(error.float(), RANK)
        assert relative_error(product(layer), peft["L"] @ peft["R"]) < 1e-4
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert torch.allclose(a.norm(dim=1), b.norm(dim=0))
    # there is nothing to correct in a weight that is kept in floats
    assert not lora_layers(model)[KEPT].lora_B["default"].weight.any()


@pytest.mark.parametrize("format", ["int8", "int4", "nf4", "int2"])
def test_loftq_goes_by_turns(format):
    model, originals, weights = quantised(format)
    add(model, originals, "loftq", 3)
    for name, layer in over_quantised(model).items():
        weight, taken = weights[name].double(), 0
        for _ in range(3):
            left = (weight - taken).float()
            parts = FORMATS[format].quantize_ref(left)
            decoded = FORMATS[format].dequantize_ref(parts, tuple(left.shape)).double()
            taken, last = best(weight - decoded), taken
        # factors are rounded to fp32, so that a few codes may fall on the other side
        assert relative_error(base(layer), decoded) < 1e-3
        assert relative_error(product(layer), taken) < 2e-2
        assert last is not taken


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_what_is_left_of_the_weight_is_quantised_again(format, init):
    plain = tiny_transformer()
    add_lora(plain, targets=TARGETS, rank=RANK, alpha=ALPHA, init=init)
    model, originals, weights = quantised(format)
    add(model, originals, init)
    for name, layer in lora_layers(model).items():
        # the factors are those of the original weight, not of the quantised one
        assert relative_error(product(layer), product(lora_layers(plain)[name])) < 1e-3
        left = (weights[name].double() - product(layer)).float()
        if name != KEPT:
            expected = FORMATS[format].quantize_ref(left)
            left = FORMATS[format].dequantize_ref(expected, tuple(left.shape))
        assert torch.equal(base(layer), left.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("init", "iterations"), INITS)
def test_a_saved_file_has_what_training_adds(init, iterations, dtype):
    model, originals, _ = quantised("int4")
    parameters = add(model, originals, init, iterations, dtype=dtype)
    assert {p.dtype for p in parameters} == {dtype}
    began = {name: product(layer) for name, layer in lora_layers(model).items()}
    for trained in (False, True):
        if trained:
            train(parameters)
        state, growth = exported_state(model)
        assert growth == 2
        for name, layer in lora_layers(model).items():
            a, b = (state[f"{name}.lora_{x}.weight"].double() for x in "AB")
            assert a.shape[0] == b.shape[1] == 2 * RANK
            torch.testing.assert_close(SCALE * b @ a, product(layer) - began[name])
            assert (SCALE * b @ a).abs().max() > 0.01 or not trained


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("format", ["int8", "nf4"])
@pytest.mark.parametrize(("init", "iterations"), INITS)
def test_a_resumed_adapter_has_its_base_again(init, iterations, format, dora):
    first, originals, _ = quantised(format)
    train(add(first, originals, init, iterations, dora=dora))
    saved = {key: tensor.clone() for key, tensor in adapter_state(first).items()}

    second, originals, _ = quantised(format)
    add_lora(second, targets=TARGETS, rank=RANK, alpha=ALPHA, dora=dora)
    load_adapter_state(second, saved, originals=originals)
    layers = over_quantised(second)
    assert all(
        torch.equal(base(layer), base(layers[n])) for n, layer in over_quantised(first).items()
    )
    assert torch.equal(run(first), run(second))
    resaved = adapter_state(second)
    assert saved.keys() == resaved.keys()
    assert all(torch.equal(saved[key], resaved[key]) for key in saved)
    assert exported_state(first)[1] == exported_state(second)[1] == 2

    third = quantised(format)[0]
    add_lora(third, targets=TARGETS, rank=RANK, alpha=ALPHA, dora=dora)
    if (init, iterations) == ("loftq", 1):
        load_adapter_state(third, saved)
        assert torch.equal(run(first), run(third))
    else:
        with pytest.raises(ValueError, match="changed its quantised base, and needs the weights"):
            load_adapter_state(third, saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("init", "iterations"), INITS)
def test_the_error_before_and_after_is_said(init, iterations, dtype):
    model, originals, weights = quantised("int2", dtype)
    before = {name: base_of.double() for name, base_of in decoded_weights(model).items()}
    settings = AdapterSettings(
        tuple(TARGETS), RANK, ALPHA, init=init, loftq_iterations=iterations, originals=originals
    )
    lines = KINDS["standard"].add(model, settings)
    layers = over_quantised(model)
    squares = torch.tensor([
        [
            weights[name].double().square().sum(),
            (weights[name].double() - before[name]).square().sum(),
            (weights[name].double() - base(layer) - product(layer)).square().sum(),
        ]
        for name, layer in layers.items()
    ], dtype=torch.float64)  # fmt: skip
    all_before, all_after = (squares[:, 1:].sum(0) / squares[:, 0].sum()).sqrt().tolist()
    each = (squares[:, 1:] / squares[:, :1]).sqrt()
    worst = int(each[:, 1].argmax())
    assert lines == [
        f"lora_init_type {init}: the quantised base is {all_before:.3%} away from the original "
        f"weights, and with the adapter {all_after:.3%} (5 linears; the worst, "
        f"{list(layers)[worst]}: {each[worst, 0]:.3%} and {each[worst, 1]:.3%})",
        f"lora_init_type {init}: a saved file has what training adds to the original weights, as a "
        "LoRA of twice the rank (8)",
    ]
    assert all_after < all_before or init != "loftq"


def decoded_weights(model):
    return {
        name: module.packed().to(torch.float32)
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear)
    }


@pytest.mark.parametrize("init", ["loftq", "pissa", "olora"])
def test_magnitudes_begin_with_the_norms_of_what_came_out(init):
    model, originals, _ = quantised("int4")
    add(model, originals, init, 2, dora=True)
    for layer in lora_layers(model).values():
        magnitude = layer.lora_magnitude_vector["default"].weight
        expected = (base(layer) + product(layer)).norm(dim=1)
        torch.testing.assert_close(magnitude, expected.float())
        torch.testing.assert_close(row_norms(layer, "default"), expected)


def test_what_needs_the_original_weights_is_refused_without_them():
    for init in ("loftq", "pissa", "olora"):
        model = quantised("int8")[0]
        with pytest.raises(ValueError, match=rf"'{init}' over a quantised base needs the weights"):
            add(model, None, init)
        assert not lora_layers(model)
    # these need none
    for init in ("default", "gaussian"):
        model = quantised("int8")[0]
        before = run(model)
        add(model, None, init)
        assert torch.equal(run(model), before)


@pytest.mark.parametrize(("targets", "rank"), [(["to_q"], 33), (["x_embedder", "to_q"], 33)])
def test_a_rank_beyond_a_quantised_weights_is_refused(targets, rank):
    model, originals, _ = quantised("int8")
    with pytest.raises(ValueError, match=r"rank 33 from transformer_blocks\.0\.attn\.to_q"):
        add_lora(model, targets=targets, rank=rank, init="loftq", originals=originals)
    # what is not quantised is not decomposed: its rank may be any
    add_lora(
        model, targets=["x_embedder", "norm_out.linear"], rank=9, init="loftq", originals=originals
    )


@pytest.mark.parametrize(("out", "inp"), [(800, 1000), (1000, 800)])
def test_a_randomised_decomposition_finds_nearly_all_of_the_best(out, inp):
    torch.manual_seed(3)
    weight = torch.randn(out, inp) * torch.rand(out, 1)
    parts = FORMATS["int4"].quantize_ref(weight)
    error = (weight - FORMATS["int4"].dequantize_ref(parts, (out, inp))).double()
    assert min(out, inp) > low_rank.EXACT_UP_TO
    removed = [
        error.square().sum() - (error - factors.product(2.0, error)).square().sum()
        for factors in (low_rank.of_error(error, 8, 2.0), low_rank.principal(error, 8, 2.0))
    ]
    assert 0.97 < removed[0] / removed[1] <= 1


def test_weights_of_zero_are_no_error():
    errors = low_rank.Errors()
    zero = torch.zeros(3, 4)
    errors.add("a", zero, zero, zero)
    assert errors.relative() == (0, 0)
