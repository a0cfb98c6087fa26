"""Bases that other libraries have quantised are read in place, and give their modules' results."""

import types

import pytest
import torch
from dropin_hosts import add_lora, diffusers_host, lora_parameters, outputs_and_grads
from torch import nn

import fluxfast
from fluxfast.config.precision_words import in_words
from fluxfast.foreign.weights import Decoded
from fluxfast.memory import gpus
from fluxfast.model.linear import obstacle, read_linear
from fluxfast.model.stored_codes import transposed_copies
from fluxfast.quant import FORMATS, QuantWeight
from fluxfast.quant.rules import quantize_model
from support import make_inputs, relative_error

pytestmark = pytest.mark.usefixtures("eager_peers")

# the host decodes to its scales' 16 bits where we compute in fp32: 2^-8 a weight, averaged over a
# sum, over five blocks
DECODED = 2e-2
# bitsandbytes' int8 product also rounds its input to 8 bits: 0.6 % of a row's RMS in each of some
# twenty products
INT8 = 5e-2


def quantised(convert):
    """The small model with the linears of its blocks converted, found by name."""
    model = diffusers_host(torch.bfloat16)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "blocks." in name:
            parent, _, child = name.rpartition(".")
            model.get_submodule(parent)._modules[child] = convert(module)
    return model.requires_grad_(False)


def bnb4(quant_type="nf4", nested=True):
    bnb = pytest.importorskip("bitsandbytes")

    def convert(linear):
        made = bnb.nn.Linear4bit(
            *(linear.in_features, linear.out_features, linear.bias is not None, torch.float32),
            compress_statistics=nested,
            quant_type=quant_type,
        )
        made.weight = bnb.nn.Params4bit(
            linear.weight.data,
            requires_grad=False,
            compress_statistics=nested,
            quant_type=quant_type,
        ).to("cpu")
        made.bias = linear.bias
        return made

    return convert


def bnb8():
    bnb = pytest.importorskip("bitsandbytes")

    def convert(linear):
        made = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
        made.weight = bnb.nn.Int8Params(
            linear.weight.data, requires_grad=False, has_fp16_weights=False
        ).to("cpu")
        made.bias = linear.bias
        return made

    return convert


def quanto(qtype):
    library = pytest.importorskip("optimum.quanto")

    def convert(linear):
        made = library.QLinear.from_module(linear, weights=getattr(library, qtype))
        made.freeze()
        return made

    return convert


def torchao(config):
    library = pytest.importorskip("torchao.quantization")

    def convert(linear):
        holder = nn.Sequential(linear)
        library.quantize_(holder, getattr(library, config)())
        return holder[0]

    return convert


# the format that it is read as; None: decoded by its library
BASES = {
    "bnb nf4": (lambda: bnb4(), "nf4", DECODED),
    "bnb nf4, plain statistics": (lambda: bnb4(nested=False), None, DECODED),
    "bnb fp4": (lambda: bnb4("fp4"), None, DECODED),
    "bnb int8": (bnb8, "int8", INT8),
    "quanto int8": (lambda: quanto("qint8"), "int8", DECODED),
    "quanto fp8": (lambda: quanto("qfloat8_e4m3fn"), "fp8_e4m3", DECODED),
    "quanto fp8 e5m2": (lambda: quanto("qfloat8_e5m2"), None, DECODED),
    "quanto int4": (lambda: quanto("qint4"), None, DECODED),
    "quanto int2": (lambda: quanto("qint2"), None, DECODED),
    "torchao int8": (lambda: torchao("Int8WeightOnlyConfig"), "int8", DECODED),
    "torchao fp8": (lambda: torchao("Float8WeightOnlyConfig"), "fp8_e4m3", DECODED),
}
every_base = pytest.mark.parametrize("base", BASES)


@every_base
def test_weights_are_read_in_place(base):
    make, name, _ = BASES[base]
    torch.manual_seed(0)
    linear = nn.Linear(192, 96).bfloat16().requires_grad_(False)
    exact = linear.weight.data.clone()
    module = make()(linear)
    module.requires_grad_(False)
    params = read_linear(module)
    assert params is not None and obstacle(module) is None and params.weight.shape == (96, 192)
    decoded = params.weight.to(torch.float32)
    assert decoded.shape == (96, 192) and params.bias is not None
    # bitsandbytes' own numbers, or those of the library's decoder, up to the rounding of its 16-bit
    # result (in training mode: on some CPUs a Linear4bit that is not packs its weight anew for
    # inference)
    module.train()
    x = torch.eye(192, dtype=torch.bfloat16)
    own = (module(x) - params.bias).float().T
    assert relative_error(decoded, own) < (2**-6 if base == "bnb int8" else 2**-7)
    assert relative_error(decoded, exact) < (0.6 if "int2" in base else 0.2)
    assert isinstance(params.weight, QuantWeight if name else Decoded)
    q, scale = params.weight.codes("int8")
    assert relative_error(q.float() * scale[:, None], decoded) < 0.02
    if name:
        assert params.weight.format.name == name
        storages = {t.untyped_storage().data_ptr() for t in tensors_of(module)}
        packed = [p for p in params.weight.parts.values() if p.dtype != torch.float32]
        assert packed and all(part.untyped_storage().data_ptr() in storages for part in packed)


def tensors_of(module):
    weight = module.weight
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return [weight.data, state.absmax, state.state2.absmax, state.offset]
    inner = [
        getattr(weight, name)
        for name in ("_data", "_scale", "qdata", "scale")
        if hasattr(weight, name)
    ]
    return inner or [weight.data]


def test_a_plain_bfloat16_base_is_left_to_a_matrix_unit(monkeypatch):
    """Only a plain base: a quantised one is decoded once here, and in every product there."""
    for unit, base in ((True, "its own"), (True, "quanto int8"), (False, "its own")):
        monkeypatch.setattr("fluxfast.dropin.cpu.has_matrix_unit", lambda unit=unit: unit)
        model = quantised((lambda linear: linear) if base == "its own" else BASES[base][0]())
        fused = {block.fused for block in fluxfast.accelerate(model).blocks}
        assert fused == {base != "its own" or not unit}


@every_base
def test_outputs_and_gradients(base):
    make, name, tolerance = BASES[base]
    convert = make()
    host, ours = quantised(convert), quantised(convert)
    for model in (host, ours):
        add_lora(model, targets=["to_q", "to_out.0", "proj_mlp", "ff.net.2"])
        for p in lora_parameters(model).values():
            p.data = p.data.float()
        model.train()
    report = fluxfast.accelerate(ours)
    assert all(block.fused for block in report.blocks), str(report)
    assert {linear.base for linear in report.linears} == {
        in_words(name or "decoded by its library")
    }
    assert report.compute == "same"
    inputs = {
        k: x if "ids" in k else x.bfloat16()
        for k, x in make_inputs(2, 3, 5, guidance=False).items()
    }
    inputs["timestep"] = torch.tensor([0.5, 0.25], dtype=torch.bfloat16)
    (expected, truth), (actual, grads) = (
        outputs_and_grads(m, inputs, lora_parameters(m)) for m in (host, ours)
    )
    assert relative_error(actual, expected) < tolerance
    flat, flat_truth = (
        torch.cat([g.float().flatten() for g in every.values()]) for every in (grads, truth)
    )
    assert relative_error(flat, flat_truth) < 2 * tolerance


def test_what_can_not_be_read_says_why():
    linear = nn.Linear(64, 32)
    assert obstacle(linear) == "its base is trained"
    linear.requires_grad_(False)
    assert obstacle(linear) is None
    linear.forward = types.MethodType(lambda self, x: x, linear)
    assert obstacle(linear) == "its forward was replaced"
    assert "Identity is not known" in obstacle(nn.Identity())

    library = pytest.importorskip("optimum.quanto")
    unfrozen = library.QLinear.from_module(nn.Linear(64, 32), weights=library.qint8)
    assert obstacle(unfrozen) == "its weight is not frozen yet"
    both = library.QLinear.from_module(
        nn.Linear(64, 32), weights=library.qint8, activations=library.qint8
    )
    both.freeze()
    assert obstacle(both) == "it has hooks"


def test_an_int8_scale_that_changes_is_read_anew():
    module = quanto("qint8")(nn.Linear(64, 32).bfloat16().requires_grad_(False)).requires_grad_(
        False
    )
    before = read_linear(module).weight.to(torch.float32)
    with torch.no_grad():
        module.weight._scale.mul_(2)
    assert relative_error(read_linear(module).weight.to(torch.float32), 2 * before) < 1e-6


def test_a_tensor_of_an_unknown_class_is_left_to_its_module():
    class Other(torch.Tensor):
        def dequantize(self):
            raise AssertionError("nobody asked for it")

    linear = nn.Linear(64, 32).requires_grad_(False)
    linear.weight = nn.Parameter(linear.weight.data.as_subclass(Other), requires_grad=False)
    assert obstacle(linear) == "its weight is of the class Other"


def copies_in(model):
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    groups = [group for block in blocks for group in block.linear_groups()]
    return transposed_copies(groups, "int8")


@pytest.mark.parametrize("base", ["ours", "quanto"])
def test_transposed_codes_where_there_is_room(base, monkeypatch):
    """The GPU is an entry of the table, and the tensors stay on the CPU."""
    if base == "ours":
        model = diffusers_host(torch.bfloat16)
        quantize_model(model, FORMATS["int8"])
    else:
        model = quantised(quanto("qint8"))
    before = list(model.state_dict())
    monkeypatch.setattr(gpus, "this_gpu", lambda device: gpus.find_gpu("H100"))
    report = fluxfast.accelerate(model)
    assert report.compute == "int8" and report.transposed_codes
    assert "transposed codes kept: dgrad reads it on this GPU" in str(report)
    assert copies_in(model) and list(model.state_dict()) == before
    # a second call counts no copy twice, and keeps those that are there
    places = [copy.data_ptr() for copy in copies_in(model)]
    assert fluxfast.accelerate(model).transposed_codes
    assert [copy.data_ptr() for copy in copies_in(model)] == places
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    groups = [group for block in blocks for group in block.linear_groups()]
    fluxfast.restore(model)
    assert not transposed_copies(groups, "int8")

    monkeypatch.setattr(gpus, "this_gpu", lambda device: gpus.find_gpu("RTX 3090"))
    report = fluxfast.accelerate(model)
    assert report.compute == "int8" and not report.transposed_codes
    assert "transposed codes not kept: products on this device read codes" in str(report)
