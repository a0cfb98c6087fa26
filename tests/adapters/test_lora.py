import pytest
import torch
from tiny_flux import run, tiny_transformer, train

from fluxfast.adapters.kind import trainable_parameters
from fluxfast.adapters.lora import add_lora
from fluxfast.adapters.lora_state import (
    adapter_state,
    exported_state,
    load_adapter_state,
    lora_layers,
)

FROM_BASE = ["olora", "pissa", "pissa_niter_8"]
# one module of every shape, and the transformer's own last linear
SHAPES = ["to_q", "ff.net.0.proj", "proj_out"]


def _base_weights(transformer: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.replace(".base_layer", ""): p.detach().clone()
        for name, p in transformer.named_parameters()
        if "lora_" not in name
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_only_the_lora_trains_in_its_own_dtype(base, dtype):
    transformer = tiny_transformer(base)
    parameters = add_lora(
        transformer, targets="all+ffs", rank=4, alpha=6, dropout=0.25, dtype=dtype
    )
    layers = lora_layers(transformer)
    assert [id(p) for p in parameters] == [
        id(p) for p in trainable_parameters(transformer).values()
    ]
    assert {p.dtype for p in parameters} == {dtype}
    assert {p.dtype for n, p in transformer.named_parameters() if "lora_" not in n} == {base}
    assert len(parameters) == 2 * len(layers)
    for layer in layers.values():
        assert layer.r["default"] == 4
        assert layer.scaling["default"] == 1.5
        assert layer.lora_dropout["default"].p == 0.25
    run(transformer).float().sum().backward()
    assert all(p.grad is not None for p in parameters)


@pytest.mark.parametrize("init", ["default", "gaussian"])
def test_a_fresh_adapter_changes_nothing(init):
    transformer = tiny_transformer()
    before = run(transformer)
    parameters = add_lora(transformer, targets="all+ffs", rank=4, init=init)
    assert torch.equal(run(transformer), before)
    assert all(p.abs().sum() > 0 for p in parameters[::2])
    assert all(p.abs().sum() == 0 for p in parameters[1::2])


def test_gaussian_draws_a_normal_of_one_over_rank():
    transformer = tiny_transformer()
    parameters = add_lora(transformer, targets="all+ffs", rank=8, init="gaussian")
    values = torch.cat([p.detach().flatten() for p in parameters[::2]])
    # about 8,000 draws: a standard error of 1 / √(2·8000) = 0.8 % of the deviation
    assert values.std().item() == pytest.approx(1 / 8, rel=0.04)
    assert values.abs().max() > 2.5 / 8


@pytest.mark.parametrize("alpha", [None, 10])
@pytest.mark.parametrize("init", FROM_BASE)
def test_an_adapter_from_the_base_changes_the_base_not_the_function(init, alpha):
    transformer = tiny_transformer()
    original, before = _base_weights(transformer), run(transformer)
    add_lora(transformer, targets=SHAPES, rank=4, alpha=alpha, init=init)
    # W - s·BA + s·BA in fp32: a few roundings of W
    torch.testing.assert_close(run(transformer), before, rtol=1e-4, atol=1e-5)
    residual = _base_weights(transformer)
    for name in lora_layers(transformer):
        assert not torch.allclose(residual[f"{name}.weight"], original[f"{name}.weight"], atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", FROM_BASE)
def test_exported_state_is_for_the_original_base(init, base, dtype):
    transformer = tiny_transformer(base)
    original = _base_weights(transformer)
    parameters = add_lora(transformer, targets=SHAPES, rank=4, alpha=6, init=init, dtype=dtype)
    train(parameters)
    state, growth = exported_state(transformer)
    assert growth == 2
    for name, layer in lora_layers(transformer).items():
        a, b = state[f"{name}.lora_A.weight"].double(), state[f"{name}.lora_B.weight"].double()
        assert a.shape[0] == b.shape[1] == 8
        current_a, current_b = (
            layer.lora_A["default"].weight.double(),
            layer.lora_B["default"].weight.double(),
        )
        effective = layer.get_base_layer().weight.double() + 1.5 * current_b @ current_a
        # the residual base is rounded to its storage: half a ulp of its entries, which are all
        # under 1
        atol = 2**-24 if base == torch.float32 else 2**-8 / 2
        expected = original[f"{name}.weight"].double() + 1.5 * b @ a
        torch.testing.assert_close(effective, expected, rtol=0, atol=atol)


def test_pissa_takes_the_principal_part_and_olora_the_first_columns():
    transformer = tiny_transformer()
    weight = transformer.transformer_blocks[0].attn.to_q.weight.detach().double()
    add_lora(transformer, targets=["transformer_blocks.0.attn.to_q"], rank=4, alpha=8, init="pissa")
    layer = lora_layers(transformer)["transformer_blocks.0.attn.to_q"]
    u, s, vh = torch.linalg.svd(weight)
    product = 2 * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).double()
    torch.testing.assert_close(product, u[:, :4] * s[:4] @ vh[:4], rtol=1e-4, atol=1e-5)

    transformer = tiny_transformer()
    add_lora(transformer, targets=["transformer_blocks.0.attn.to_q"], rank=4, init="olora")
    layer = lora_layers(transformer)["transformer_blocks.0.attn.to_q"]
    b = layer.lora_B["default"].weight.double()
    torch.testing.assert_close(b.T @ b, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        b @ (b.T @ weight), b @ layer.lora_A["default"].weight.double(), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("init", ["default", "olora", "pissa_niter_8"])
def test_a_resumed_adapter_is_bit_identical(init):
    first = tiny_transformer()
    train(add_lora(first, targets=SHAPES, rank=4, alpha=6, init=init))
    saved = {key: tensor.clone() for key, tensor in adapter_state(first).items()}

    second = tiny_transformer()
    torch.manual_seed(99)
    parameters = add_lora(second, targets=SHAPES, rank=4, alpha=6)
    load_adapter_state(second, saved)
    assert torch.equal(run(first), run(second))
    assert [id(p) for p in parameters] == [id(p) for p in trainable_parameters(second).values()]
    resaved = adapter_state(second)
    assert saved.keys() == resaved.keys()
    assert all(torch.equal(saved[key], resaved[key]) for key in saved)
    one, two = exported_state(first), exported_state(second)
    assert one[1] == two[1]
    assert all(torch.equal(one[0][key], two[0][key]) for key in one[0])


def test_another_adapters_state_is_refused():
    transformer = tiny_transformer()
    add_lora(transformer, targets=["to_q"], rank=4)
    state = adapter_state(transformer)
    other = tiny_transformer()
    add_lora(other, targets=["to_k"], rank=4)
    with pytest.raises(ValueError, match="other modules"):
        load_adapter_state(other, state)
    wider = tiny_transformer()
    add_lora(wider, targets=["to_q"], rank=5)
    with pytest.raises(ValueError, match=r"to_q\.lora_A: expected \[5, 32\], found \[4, 32\]"):
        load_adapter_state(wider, state)
    louder = tiny_transformer()
    add_lora(louder, targets=["to_q"], rank=4, alpha=8)
    with pytest.raises(
        ValueError, match=r"to_q: expected alpha 8, found 4\.0 in the saved adapter"
    ):
        load_adapter_state(louder, state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init": "loftq"}, "none of the .* targeted linears is quantised: set base_model_prec"),
        ({"init": "loftq", "loftq_iterations": 0}, "loftq_iterations must be at least 1, got 0"),
        ({"init": "orthogonal"}, "lora_init_type: expected one of .* got 'orthogonal'"),
        ({"init": "pissa_niter_0"}, "lora_init_type: expected one of"),
        ({"rank": 0}, "lora_rank"),
        (
            {"init": "pissa", "rank": 33},
            "rank 33 from transformer_blocks.0.attn.to_q, a 32 to 32 linear",
        ),
    ],
)
def test_impossible_adapters_are_refused_before_anything_changes(arguments, message):
    transformer = tiny_transformer()
    original = _base_weights(transformer)
    with pytest.raises(ValueError, match=message):
        add_lora(transformer, **{"targets": "all", "rank": 4, **arguments})
    assert original.keys() == dict(transformer.named_parameters()).keys()


def test_an_init_from_the_base_needs_floating_point():
    transformer = tiny_transformer()
    linear = transformer.transformer_blocks[0].attn.to_q
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(
        ValueError,
        match="'olora' needs a base in floating point or in one of fluxfast's formats, but "
        r"transformer_blocks\.0\.attn\.to_q",
    ):
        add_lora(transformer, targets="all", rank=4, init="olora")
    add_lora(transformer, targets="all", rank=4)
    with pytest.raises(ValueError, match="already carries another adapter"):
        add_lora(transformer, targets="all", rank=4, init="olora", adapter_name="second")


def test_nothing_is_decoded_to_add_a_lora_to_a_quantised_base(monkeypatch):
    from fluxfast.quant import FORMATS, QuantWeight
    from fluxfast.quant.rules import quantize_model

    model = tiny_transformer(torch.float32)
    quantize_model(model, FORMATS["nf4"])
    decoded, original = [], QuantWeight.to
    monkeypatch.setattr(
        QuantWeight, "to", lambda self, *args: decoded.append(1) or original(self, *args)
    )
    add_lora(model, targets="all+ffs", rank=2, dtype=torch.bfloat16)
    assert not decoded
    linear = model.transformer_blocks[0].attn.to_q
    # PEFT took shape, dtype and device from it all the same, and it has its values again
    assert linear.lora_A["default"].weight.shape == (2, linear.in_features)
    assert linear.base_layer.weight.abs().sum() > 0 and decoded
