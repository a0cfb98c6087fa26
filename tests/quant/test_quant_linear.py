"""`QuantLinear`: values and gradients beside fp64, what it keeps, state dicts, casts and moves,
PEFT, torch.compile.
"""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

from fluxfast.quant import FORMATS, QuantWeight
from fluxfast.quant.linear import QuantLinear, quant_linear
from quant_cases import gaussian
from support import relative_error

every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=list(FORMATS))


def plain(n_in=63, n_out=24, dtype=torch.float32, bias=True) -> nn.Linear:
    linear = nn.Linear(n_in, n_out, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(gaussian(n_out, n_in))
        if bias:
            linear.bias.copy_(gaussian(1, n_out, seed=1)[0])
    return linear


@every_format
@pytest.mark.parametrize("bias", [True, False])
# the order of summation over at most 63 terms, at fp32's 6e-8; one rounding of W and of the result
# at bf16's 4e-3
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 6e-3)]
)
def test_forward_and_gradients_equal_fp64(format, bias, dtype, tolerance):
    module = QuantLinear.from_linear(plain(bias=bias), format)
    weight = module.packed().to(torch.float64)
    x = (
        torch.randn(2, 5, 63, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
    )
    dy = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        dtype
    )
    y = module(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    expected = nn.functional.linear(x.double(), weight, module.bias.double() if bias else None)
    assert y.dtype == dx.dtype == dtype
    assert relative_error(y, expected) < tolerance
    assert relative_error(dx, dy.double() @ weight) < tolerance


def test_gradcheck_of_x_and_bias():
    weight = QuantLinear.from_linear(plain(), FORMATS["int4"]).packed()
    x = torch.randn(3, 63, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, bias: quant_linear(x, weight, bias), (x, bias))


@every_format
def test_backward_keeps_the_parts_and_nothing_else(format):
    module = QuantLinear.from_linear(plain(), format)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        module(torch.randn(4, 63, requires_grad=True))
    parts = {part.data_ptr() for part in module.packed().parts.values()}
    assert {t.data_ptr() for t in saved} == parts


@every_format
def test_it_is_a_frozen_linear_on_the_same_bias(format):
    linear = plain(dtype=torch.bfloat16)
    module = QuantLinear.from_linear(linear, format)
    assert isinstance(module, nn.Linear) and (module.in_features, module.out_features) == (63, 24)
    assert not any(p.requires_grad for p in module.parameters())
    assert module.bias.data_ptr() == linear.bias.data_ptr()
    assert module.weight.dtype == torch.bfloat16 and module.weight.shape == (24, 63)
    assert type(module.weight) is torch.Tensor and all(
        type(b) is torch.Tensor for b in module.buffers()
    )
    assert (
        repr(module)
        == f"QuantLinear(in_features=63, out_features=24, bias=True, format={format.name})"
    )
    weight = module.packed()
    assert isinstance(weight, QuantWeight) and weight.shape == (24, 63)
    assert weight.parts["packed"] is module.weight_packed
    assert torch.equal(weight.to(torch.bfloat16), module.weight)


@every_format
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(format, assign):
    source = nn.ModuleDict({"proj": QuantLinear.from_linear(plain(), format)})
    state = source.state_dict()
    assert set(state) == {"proj.bias", *(f"proj.weight.{name}" for name in format.layout((24, 63)))}
    target = nn.ModuleDict(
        {"proj": QuantLinear(63, 24, format=format, device="meta" if assign else None)}
    )
    target.load_state_dict(state, assign=assign)
    assert torch.equal(target["proj"].weight, source["proj"].weight)
    assert torch.equal(target["proj"].bias, source["proj"].bias)


def test_state_dicts_that_do_not_fit():
    state = QuantLinear.from_linear(plain(), FORMATS["int4"]).state_dict()
    module = QuantLinear(63, 24, format=FORMATS["int4"])
    with pytest.raises(RuntimeError, match=r"Missing key.*weight\.zero"):
        module.load_state_dict(
            {name: part for name, part in state.items() if name != "weight.zero"}
        )
    with pytest.raises(
        RuntimeError,
        match=r"weight\.scale: int4 of a weight \[24, 63\] is \[24, 1\] torch.bfloat16, the",
    ):
        module.load_state_dict(state | {"weight.scale": state["weight.scale"].float()})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"weight"'):
        module.load_state_dict(state | {"weight": torch.zeros(24, 63)})
    with pytest.raises(RuntimeError, match=r"weight\.packed"):
        QuantLinear(64, 25, format=FORMATS["int4"]).load_state_dict(state)


@every_format
def test_casts_and_moves_leave_the_parts_alone(format):
    module = QuantLinear.from_linear(plain(), format)
    before = {name: part.clone() for name, part in module.packed().parts.items()}
    for dtype, cast in (
        (torch.bfloat16, module.bfloat16),
        (torch.float16, module.half),
        (torch.float32, module.float),
    ):
        assert cast() is module
        assert module.compute_dtype == module.weight.dtype == module.bias.dtype == dtype
    module.to(torch.float64)
    for name, part in module.packed().parts.items():
        assert part.dtype == before[name].dtype and torch.equal(
            part.view(torch.uint8), before[name].view(torch.uint8)
        )
    twin = copy.deepcopy(module)
    assert torch.equal(twin.weight, module.weight)
    layout = {
        name: (tuple(part.shape), part.dtype)
        for name, part in twin.to("meta").packed().parts.items()
    }
    assert layout == format.layout((24, 63)) and twin.weight_packed.is_meta


@every_format
def test_peft_wraps_it_as_a_linear(format):
    model = nn.Sequential(QuantLinear.from_linear(plain(), format))
    inject_adapter_in_model(LoraConfig(r=3, target_modules=["0"], init_lora_weights=False), model)
    wrapped = model[0]
    assert type(wrapped) is PeftLinear and isinstance(wrapped.base_layer, QuantLinear)
    a, b = wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight
    x = torch.randn(7, 63, requires_grad=True)
    y = wrapped(x)
    weight = wrapped.base_layer.packed().to(torch.float64)
    bias = wrapped.base_layer.bias.double()
    leaves = [x, a, b]
    grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
    xd, ad, bd = (t.detach().double().requires_grad_() for t in leaves)
    expected = (
        nn.functional.linear(xd, weight, bias) + xd @ ad.T @ bd.T * wrapped.scaling["default"]
    )
    expected_grads = torch.autograd.grad(expected, [xd, ad, bd], torch.ones_like(expected))
    # sums of at most 63 terms in fp32
    assert relative_error(y, expected) < 1e-6
    for grad, reference in zip(grads, expected_grads, strict=True):
        assert relative_error(grad, reference) < 1e-6


def test_peft_gives_adapters_the_compute_dtype():
    model = nn.Sequential(QuantLinear.from_linear(plain(dtype=torch.bfloat16), FORMATS["int8"]))
    inject_adapter_in_model(LoraConfig(r=3, target_modules=["0"]), model)
    assert model[0].lora_A["default"].weight.dtype == torch.bfloat16


@every_format
def test_autocast(format):
    module = QuantLinear.from_linear(plain(), format)
    x = torch.randn(4, 63, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert relative_error(y, module(x)) < 1e-2 and x.grad.dtype == torch.float32


@every_format
def test_compiles_in_one_graph_for_every_token_count(format):
    torch._dynamo.reset()
    module = QuantLinear.from_linear(plain(), format)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 9, 13):
        x = torch.randn(tokens, 63, requires_grad=True)
        with torch.compiler.set_stance("default" if tokens == 5 else "fail_on_recompile"):
            y = compiled(x)
        expected = module(x)
        assert torch.equal(y, expected)
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert torch.equal(grad, torch.autograd.grad(expected, x, torch.ones_like(y))[0])


@every_format
def test_the_registered_op(format):
    parts = list(QuantLinear.from_linear(plain(), format).packed().parts.values())
    # torch's schema test can't compare float8 tensors
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    size, scale = (24, 63), torch.zeros(24)
    other = "int8" if format.stored_codes == "e4m3" else "e4m3"
    q = torch.zeros(size, dtype=torch.int8 if other == "int8" else torch.float8_e4m3fn)
    for out in ((torch.zeros(size), None, None), (q, scale, None), (q, scale, q.new_zeros(63, 24))):
        has_float8 = format.name == "fp8_e4m3" or out[0].dtype == torch.float8_e4m3fn
        torch.library.opcheck(
            torch.ops.fluxfast.decode.default,
            (parts, format.name, *out, "auto"),
            test_utils=checks if has_float8 else (*checks, "test_schema"),
        )


@every_format
def test_decoding_into_a_scratch_compiles(format):
    weight = QuantLinear.from_linear(plain(), format).packed()

    def scaled(out, q, scale):
        weight.decode_into(out[2:26])
        weight.decode_into(q, scale)
        return out[2:26] + 1, weight.codes("int8").scale * 2

    out, q, scale = torch.zeros(30, 63), torch.zeros(24, 63, dtype=torch.int8), torch.zeros(24)
    values, doubled = torch.compile(scaled, fullgraph=True, backend="aot_eager")(out, q, scale)
    assert torch.equal(out[2:26], weight.to(torch.float32)) and torch.equal(
        values, weight.to(torch.float32) + 1
    )
    codes = weight.codes("int8")
    assert (
        torch.equal(q, codes.q)
        and torch.equal(scale, codes.scale)
        and torch.equal(doubled, codes.scale * 2)
    )
