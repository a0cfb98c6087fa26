"""DoRA: PEFT's, over plain and quantised linears, in blocks, in files and in checkpoints."""

import json

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_flux import pipeline, run, tiny_transformer, train

from fluxfast import FluxTransformer
from fluxfast.adapters.kind import AdapterSettings, trainable_parameters
from fluxfast.adapters.kinds import KINDS
from fluxfast.adapters.lora import add_lora, load_lora
from fluxfast.adapters.lora_read import LoraFile
from fluxfast.adapters.lora_state import (
    adapter_state,
    exported_state,
    load_adapter_state,
    lora_layers,
)
from fluxfast.adapters.lora_write import save_lora
from fluxfast.quant import FORMATS
from fluxfast.quant.linear import QuantLinear
from fluxfast.quant.rules import quantize_model
from small_flux import small_flux
from support import make_inputs, relative_error

TARGETS = ["to_q", "to_add_out", "ff.net.0.proj", "proj_mlp", "norm1.linear", "proj_out"]
RANK, ALPHA = 4, 6


def add(model, **arguments):
    arguments = {"targets": TARGETS, "rank": RANK, "alpha": ALPHA, "dora": True} | arguments
    return add_lora(model, **arguments)


def trained(**arguments):
    transformer = tiny_transformer()
    train(add(transformer, **arguments))
    return transformer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", [None, "int8", "nf4"])
def test_it_begins_with_the_norms_of_the_rows(format, dtype):
    transformer = tiny_transformer()
    if format is not None:
        quantize_model(transformer, FORMATS[format])
    before = run(transformer)
    parameters = add(transformer, dtype=dtype)
    assert {p.dtype for p in parameters} == {dtype}
    assert [id(p) for p in parameters] == [
        id(p) for p in trainable_parameters(transformer).values()
    ]
    layers = lora_layers(transformer)
    assert len(parameters) == 3 * len(layers)
    for layer in layers.values():
        magnitude = layer.lora_magnitude_vector["default"].weight
        assert magnitude.shape == (layer.out_features,)
        expected = layer.get_base_layer().weight.double().norm(dim=1)
        assert torch.equal(magnitude, expected.to(dtype))
    # a magnitude in bf16 is off by up to 2^-9 of itself
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(run(transformer), before, rtol=0, atol=tolerance)


def peft_twin(model):
    """diffusers' own model with PEFT's DoRA over the weights that `model` decodes."""
    twin = FluxTransformer2DModel(**{k: v for k, v in model.config.items() if k[0] != "_"})
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    state = {n: p.detach() for n, p in model.named_parameters() if "lora_" not in n}
    state |= {
        f"{n}.weight": m.packed().to(torch.float32)
        for n, m in linears.items()
        if isinstance(m, QuantLinear)
    }
    twin.load_state_dict({n.replace(".base_layer", ""): t for n, t in state.items()})
    twin.requires_grad_(False)
    return twin


class Log(list):
    """How each call of a block ran."""

    def record(self, how, because=None, value=""):
        self.append((how, because))


def gradients(model, trained, inputs):
    """The output, and the gradients of the input and of all that trains."""
    x = inputs["hidden_states"].clone().requires_grad_()
    out = model(**inputs | {"hidden_states": x}).sample
    return out, torch.autograd.grad(out.square().mean(), [x, *trained.values()])


def both(format, dtype):
    """A model of ours and its twin in one dtype, with the same adapters and values."""
    model = small_flux(format, num_layers=1, num_single_layers=1)
    model.requires_grad_(False)
    add(model)
    twin = peft_twin(model)
    twin.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, use_dora=True))
    train(list(trainable_parameters(model).values()))
    own, theirs = trainable_parameters(model), trainable_parameters(twin)
    assert own.keys() == theirs.keys()
    for name, p in theirs.items():
        p.data = own[name].detach().clone()
    return model.to(dtype), twin.to(dtype).train()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("format", [None, "int8", "int4", "nf4"])
def test_values_and_every_gradient_are_pefts(format, dtype):
    model, twin = both(format, dtype)
    log = Log()
    for block in model.blocks:
        block.log = log
    own, theirs = trainable_parameters(model), trainable_parameters(twin)
    inputs = {name: t.to(dtype) for name, t in make_inputs(2, 3, 4).items()}
    out, grads = gradients(model, own, inputs)
    expected_out, expected = gradients(twin, theirs, inputs)
    assert log == [("fused", None)] * 2
    # diffusers computes the embedding of the time in fp32 whatever its weights are in, which alone
    # leaves 1e-8; in fp32 sums are in another order
    tolerance = 1e-7 if dtype == torch.float64 else 3e-5
    assert relative_error(out, expected_out) < tolerance
    for name, grad, wanted in zip(["input", *own], grads, expected, strict=True):
        assert relative_error(grad, wanted) < tolerance, name


def test_what_only_peft_can_compute():
    """A dropout of the base's input too, and a norm that another adapter changes."""
    model = tiny_transformer()
    add(model, dropout=0.1)
    (layer, *_) = lora_layers(model).values()
    assert "DoRA with a dropout" in read(layer.train())
    (lora,) = read(layer.eval())
    assert lora.magnitude is layer.lora_magnitude_vector["default"].weight
    model.add_adapter(LoraConfig(r=2, target_modules=TARGETS), "second")
    model.set_adapters(["default", "second"])
    assert "one of several adapters is DoRA" in read(layer)
    model.set_adapters("second")
    (lora,) = read(layer)
    assert lora.magnitude is None


def read(layer):
    return KINDS["standard"].read(layer, share_dropout=True).adapters


@pytest.mark.parametrize("init", ["default", "pissa", "olora"])
def test_diffusers_loads_the_file(tmp_path, init):
    transformer = trained(init=init)
    expected, untrained = run(transformer), run(tiny_transformer())
    assert not torch.allclose(expected, untrained, atol=0.05)
    path = save_lora(transformer, tmp_path)
    keys = {
        f"transformer.{name}.{part}"
        for name in lora_layers(transformer)
        for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    }
    state = load_file(path)
    assert state.keys() == keys
    with safe_open(path, framework="pt") as reader:
        config = json.loads(reader.metadata()["lora_adapter_metadata"])
    assert config["transformer.use_dora"] is True
    pipe, model = pipeline(tiny_transformer()), tiny_transformer()
    pipe.load_lora_weights(str(tmp_path))
    model.load_lora_adapter(dict(state), prefix="transformer", network_alphas=None)
    # the saved pair of an adapter from the base is a difference, taken in fp32
    torch.testing.assert_close(run(pipe.transformer), expected, rtol=1e-4, atol=1e-5)


def test_plain_lora_says_that_it_is_plain(tmp_path):
    transformer = tiny_transformer()
    add(transformer, dora=False)
    with safe_open(save_lora(transformer, tmp_path), framework="pt") as reader:
        config = json.loads(reader.metadata()["lora_adapter_metadata"])
    assert config["transformer.use_dora"] is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_init_lora_goes_on_exactly(tmp_path, dtype):
    transformer = trained(dtype=dtype)
    state = exported_state(transformer)[0]
    names = list(lora_layers(transformer))
    file = LoraFile.of(
        tmp_path / "x.safetensors",
        {key: tensor.float() for key, tensor in state.items()},
        ranks=dict.fromkeys(names, RANK),
        alphas=dict.fromkeys(names, float(ALPHA)),
    )
    assert file.dora and file.common("use_dora") is True
    again = tiny_transformer()
    parameters = load_lora(again, file, dtype=dtype)
    assert all(p.requires_grad and p.dtype == dtype for p in parameters)
    assert torch.equal(run(again), run(transformer))
    del file.state[f"{names[0]}.lora_magnitude_vector"]
    with pytest.raises(ValueError, match=f"{names[0]} has no lora_magnitude_vector in it"):
        load_lora(tiny_transformer(), file)


@pytest.mark.parametrize("init", ["default", "olora"])
def test_a_resumed_adapter_is_bit_identical(init):
    first = trained(init=init)
    saved = {key: tensor.clone() for key, tensor in adapter_state(first).items()}
    second = tiny_transformer()
    add(second)
    load_adapter_state(second, saved)
    assert torch.equal(run(first), run(second))
    plain = tiny_transformer()
    add(plain, dora=False)
    with pytest.raises(ValueError, match="other modules than this run's"):
        load_adapter_state(plain, saved)
    file = KINDS["standard"].from_state("x", saved)
    assert file.dora and set(file.state) == set(exported_state(first)[0])


def test_a_plan_counts_the_magnitudes():
    with torch.device("meta"):
        model = FluxTransformer(num_layers=1, num_single_layers=1)
        model.requires_grad_(False)
        settings = AdapterSettings("all+ffs", rank=16, alpha=16)
        KINDS["dora"].add(model, settings)
    trained = sum(p.numel() for p in trainable_parameters(model).values())
    counted = sum(
        KINDS["dora"].elements(layer.out_features, layer.in_features, 16)
        for layer in lora_layers(model).values()
    )
    assert trained == counted
    plain = sum(
        KINDS["standard"].elements(layer.out_features, layer.in_features, 16)
        for layer in lora_layers(model).values()
    )
    assert counted - plain == sum(layer.out_features for layer in lora_layers(model).values())
