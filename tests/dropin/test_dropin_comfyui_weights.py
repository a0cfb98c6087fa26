"""Weights that ComfyUI makes for a call: cast, of 8 bits and fewer, changed by LoRAs and nodes."""

import pytest
import torch
from comfyui_cases import BF16, FP32, hosts
from dropin_cases import counts, output
from host_comfyui_ops import (
    AtEachCall,
    CastingLinear,
    CodesLinear,
    Difference,
    Fp8Linear,
    Linear,
    LoRA,
    MixedLinear,
    OwnCast,
    ScaledLinear,
)
from torch import nn

import fluxfast
from fluxfast.model.linear import obstacle, read_linear
from support import make_inputs, relative_error


@pytest.fixture(scope="module")
def inputs():
    return make_inputs(2, 3, 5, guidance=False)


def linears_of(model, kind=Linear):
    blocks = ((n, m) for n, m in model.named_modules() if "_blocks" in n)
    return {name: module for name, module in blocks if isinstance(module, kind)}


def rounded(inputs):
    return {k: x if "ids" in k else x.bfloat16() for k, x in inputs.items()}


def noise(*shape, seed=1, size=0.1):
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lora_for(linear, seed, part=None, **more):
    rows, cols = linear.weight.shape
    if part is not None:
        rows, cols = (part[2], cols) if part[0] == 0 else (rows, part[2])
    return LoRA(noise(rows, 4, seed=seed), noise(4, cols, seed=seed + 1, size=1), **more)


def halved(lora):
    up, down, *_ = lora.weights
    return LoRA(up.half(), down.half())


def patched(model, make, kind=Linear, **functions):
    """The model with a patcher's function on each of its linears, of the patches of `make`."""
    patches = {}
    for i, (name, linear) in enumerate(linears_of(model, kind).items()):
        patches[name] = make(linear, 10 * i)
        made = {key: getattr(linear, method) for key, method in functions.items()}
        linear.weight_function = [AtEachCall(name, patches, **made)]
    return model


def patch(adapter, strength=0.7, of_model=1.0, part=None):
    return strength, adapter, of_model, part, None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("kind", [CastingLinear, Fp8Linear])
def test_weights_are_cast_to_the_inputs_dtype(inputs, kind, dtype):
    host, ours = hosts(kind)
    for model in (host, ours):
        for name, p in model.named_parameters():
            p.data = p.data.to(torch.float32 if "_norm." in name else dtype)
    report = fluxfast.accelerate(ours.requires_grad_(False))
    assert {linear.base for linear in report.linears} >= {str(dtype).removeprefix("torch.")}
    assert relative_error(output(ours, inputs), output(host, inputs)) < FP32
    assert counts(report) == (5, 0, 0)


def test_bfloat16(inputs, monkeypatch):
    monkeypatch.setattr("fluxfast.dropin.cpu.has_matrix_unit", lambda: False)
    host, ours = hosts()
    report = fluxfast.accelerate(ours.bfloat16())
    more = rounded(inputs)
    assert relative_error(output(ours, more), output(host.bfloat16(), more)) < BF16
    assert counts(report) == (5, 0, 0)


# patches of a linear, of which all are LoRAs
LORAS = {
    "one": lambda linear, i: [patch(lora_for(linear, i, alpha=2.0))],
    "two": lambda linear, i: [patch(lora_for(linear, i)), patch(lora_for(linear, i + 3), -0.5)],
    "of rows": lambda linear, i: [patch(lora_for(linear, i, part=part), part=part)
                                  for part in ((0, 0, 16), (0, 16, 32))],
    "of columns": lambda linear, i: [patch(lora_for(linear, i, part=(1, 8, 16)), part=(1, 8, 16))],
    "of fp16": lambda linear, i: [patch(halved(lora_for(linear, i)))],
}  # fmt: skip
# LoRAs that are more than a product beside the base, and other adapters
OTHERS = {
    "of part of the model": lambda linear, i: [patch(lora_for(linear, i), of_model=0.9)],
    "with DoRA": lambda linear, i: [patch(lora_for(linear, i, dora=torch.tensor(1.1)))],
    "beside another": lambda linear, i: [
        patch(lora_for(linear, i)),
        patch(Difference(noise(*linear.weight.shape, seed=i))),
    ],
}


@pytest.mark.parametrize("what", [*LORAS, *OTHERS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_loras_at_each_call(inputs, what, dtype):
    host, ours = hosts(CastingLinear)
    plain = output(host, inputs)
    for model in (host, ours):
        for linear in linears_of(model).values():
            linear.weight.data = linear.weight.data.to(dtype)
        patched(model, (LORAS | OTHERS)[what])
    with torch.no_grad():
        report = fluxfast.accelerate(ours, strict=True)
    expected = output(host, inputs)
    assert relative_error(expected, plain) > 1e-2
    assert relative_error(output(ours, inputs), expected) < FP32
    with torch.inference_mode():
        assert relative_error(ours(**inputs), expected) < FP32
    assert counts(report) == (10, 0, 0)
    if what in LORAS:
        each = 2 if what in ("two", "of rows") else 1
        assert {linear.adapters for linear in report.linears} == {each}
    else:
        assert all("changed at each call" in linear.base for linear in report.linears)
    # the patcher takes them away again
    for linear in linears_of(ours).values():
        linear.weight_function = []
    assert relative_error(output(ours, inputs), expected) > 1e-2


def test_a_lora_that_does_not_fit_is_left_to_the_host():
    """ComfyUI logs it, and leaves the weight as it is; only its own function knows."""
    _, ours = hosts(CastingLinear)
    linear = ours.requires_grad_(False).double_blocks[0].img_mlp[0]
    for up, down, part in (
        (noise(8, 4), noise(4, 64), None),
        (noise(256, 4), noise(8, 64), None),
        (noise(8, 4), noise(4, 64), (0, 250, 8)),
        (noise(8, 4), noise(4, 64), (0, 0, 9)),
    ):
        linear.weight_function = [AtEachCall("w", {"w": [patch(LoRA(up, down), part=part)]})]
        found = read_linear(linear)
        assert found.adapters == () and found.weight.functions == linear.weight_function


def test_bfloat16_with_loras(inputs, monkeypatch):
    monkeypatch.setattr("fluxfast.dropin.cpu.has_matrix_unit", lambda: False)
    host, ours = hosts(CastingLinear)
    for model in (host, ours):
        patched(model.bfloat16(), LORAS["two"])
    report = fluxfast.accelerate(ours.requires_grad_(False))
    more = rounded(inputs)
    assert relative_error(output(ours, more), output(host, more)) < BF16
    assert counts(report) == (5, 0, 0)


def test_functions_of_nodes(inputs):
    """Whatever they do to a weight or a bias, they do it for ours as well."""
    host, ours = hosts()
    for model in (host, ours):
        linear = model.double_blocks[0].img_mlp[0]
        linear.weight_function = [lambda weight: weight * 1.5, lambda weight: weight + 0.01]
        linear.bias_function = [lambda bias: bias - 0.5]
        model.double_blocks[1].img_mod.lin.bias_function = linear.bias_function
    report = fluxfast.accelerate(ours.requires_grad_(False))
    assert relative_error(output(ours, inputs), output(host, inputs)) < FP32
    assert counts(report) == (5, 0, 0)
    # with gradients, the function may have something in it that is trained
    assert "its weight_function may be trained" in obstacle(linear)
    with torch.no_grad():
        assert obstacle(linear) is None
    linear.weight_function = linear.bias_function = []
    assert obstacle(linear) is None
    linear.weight_lowvram_function = lambda weight: weight
    assert "its weight_lowvram_function" in obstacle(linear)
    # where its weight is in memory that ComfyUI shares out
    linear._v = object()
    assert "ComfyUI brings its weight" in obstacle(linear)


@pytest.mark.filterwarnings("ignore:fluxfast")
def test_norms_that_are_changed_on_their_way(inputs):
    host, ours = hosts()
    report = fluxfast.accelerate(ours)
    for model in (host, ours):
        norm = model.single_blocks[1].norm.query_norm
        norm.weight_function = [lambda weight: weight * 2]
    assert relative_error(output(ours, inputs), output(host, inputs)) < FP32
    assert counts(report) == (4, 0, 1)


def stored(model, *args):
    for module in model.modules():
        if isinstance(module, (ScaledLinear, MixedLinear)):
            module.store(*args)
    return model


# what the patcher's function is given where a linear has a scale
SCALED = {"convert_func": "convert_weight", "set_func": "set_weight"}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_scaled_fp8(inputs, dtype):
    host, ours = (stored(model, dtype) for model in hosts(ScaledLinear))
    report = fluxfast.accelerate(ours.requires_grad_(False))
    base = "fp8" if dtype == torch.float8_e4m3fn else "float8_e5m2"
    assert report.count("module") == 0 and {linear.base for linear in report.linears} == {base}
    expected = output(host, inputs)
    assert relative_error(output(ours, inputs), expected) < FP32
    # without them, the function adds to the codes
    for functions in (SCALED, {}):
        for patches in (LORAS["one"], OTHERS["beside another"]):
            for model in (host, ours):
                patched(model, patches, **functions)
            changed = output(host, inputs)
            assert relative_error(changed, expected) > (1e-2 if functions else 0)
            assert relative_error(output(ours, inputs), changed) < FP32
    assert counts(report) == (25, 0, 0)


@pytest.mark.parametrize("layout", ["TensorCoreFP8Layout", "TensorCoreFourBitLayout"])
def test_linears_of_several_formats(inputs, layout):
    host, ours = (stored(model.requires_grad_(False), layout) for model in hosts(MixedLinear))
    for model in (host, ours):
        linear = model.double_blocks[0].img_mlp[0]
        linear.weight = nn.Parameter(linear.weight.to(torch.float32).dequantize(), False)
    report = fluxfast.accelerate(ours)
    base = "fp8" if "FP8" in layout else "FourBit"
    assert {linear.base for linear in report.linears} == {base, "float32"}
    expected = output(host, inputs)
    assert relative_error(output(ours, inputs), expected) < FP32
    for patches in (LORAS["two"], OTHERS["beside another"]):
        for model in (host, ours):
            patched(model, patches, MixedLinear)
        assert relative_error(output(host, inputs), expected) > 1e-2
        assert relative_error(output(ours, inputs), output(host, inputs)) < FP32
    assert counts(report) == (15, 0, 0)


@pytest.mark.parametrize("kind", [ScaledLinear, MixedLinear])
def test_a_model_that_was_loaded_in_inference_mode(inputs, kind):
    """Nobody counts how often its tensors are written to."""
    layout = ("TensorCoreFP8Layout",) if kind is MixedLinear else ()
    functions = SCALED if kind is ScaledLinear else {}
    with torch.inference_mode():
        host, ours = hosts(kind)
        for model in (host, ours):
            patched(stored(model, *layout), LORAS["one"], kind, **functions)
        report = fluxfast.accelerate(ours)
        assert relative_error(ours(**inputs), host(**inputs)) < FP32
    assert relative_error(output(ours, inputs), output(host, inputs)) < FP32
    assert counts(report) == (10, 0, 0)


@pytest.mark.filterwarnings("ignore:fluxfast")
@pytest.mark.parametrize(
    ("kind", "said"), [(CodesLinear, "doesn't know: round"), (OwnCast, "OwnCast is not known")]
)
def test_linears_of_another_product_are_called(inputs, kind, said):
    host, ours = hosts(kind)
    # they are given what the host gives them, and cast by themselves
    for model in (host, ours):
        for linear in linears_of(model).values():
            linear.weight.data = linear.weight.data.half() if kind is CodesLinear else linear.weight
    report = fluxfast.accelerate(ours)
    assert said in report.linears[0].because
    assert relative_error(output(ours, inputs), output(host, inputs)) < FP32
    assert counts(report) == (0, 5, 0)


def test_a_scale_that_its_class_does_not_read():
    linear = Fp8Linear(8, 8).requires_grad_(False)
    assert obstacle(linear) is None
    linear.scale_weight = nn.Parameter(torch.ones(()), False)
    assert obstacle(linear) == "its scale_weight is not that of its class"
    linear = CastingLinear(8, 8)
    assert obstacle(linear) == "its base is trained"
    with torch.no_grad():
        assert obstacle(linear) is None
    linear.requires_grad_(False).weight = nn.Parameter(AnyTensor(torch.ones(8, 8)), False)
    assert obstacle(linear) == "its weight is of the class AnyTensor"


class AnyTensor(torch.Tensor):
    """A library's tensor that nobody knows."""
