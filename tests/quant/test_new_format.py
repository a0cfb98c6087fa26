"""A format with nothing but its reference and its line in FORMATS works everywhere."""

import logging

import pytest
import torch
from safetensors.torch import save_file

from fluxfast import FluxTransformer
from fluxfast.checkpoint.opening import open_single_file
from fluxfast.checkpoint.side_by_side import pack_groups, side_by_side
from fluxfast.memory.sizes import Linear, Storage
from fluxfast.ops import dispatch
from fluxfast.ops.linear.adapters import Lora
from fluxfast.ops.linear.lora_linear import lora_linear
from fluxfast.ops.linear.params import LinearParams
from fluxfast.ops.row_quant import row_quant_ref
from fluxfast.quant import FORMATS, QuantWeight
from fluxfast.quant.gemv import gemv
from fluxfast.quant.linear import QuantLinear
from quant_cases import gaussian
from small_flux import small_flux
from support import SMALL, make_inputs, randomise, relative_error
from toy_format import COLUMNS

IMPLS = ["ref"]
IMPLS += ["native"] if dispatch.HAS_NATIVE else []
IMPLS += ["triton"] if dispatch.HAS_TRITON else []


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(FORMATS, "columns", COLUMNS)


def test_it_is_quantised_decoded_and_made_codes():
    weight = gaussian(24, 63)
    stored = QuantWeight.of(weight, COLUMNS)
    # half a step of each column's grid
    step = weight.abs().amax(0) / 127
    assert ((stored.to(torch.float64) - weight).abs() <= step * 0.5001).all()
    assert stored.to(torch.bfloat16).dtype == torch.bfloat16
    decoded = stored.to(torch.float32)
    for fmt in ("int8", "e4m3"):
        assert not stored.stores(fmt)
        for made, expected in zip(stored.codes(fmt), row_quant_ref(decoded, fmt), strict=True):
            assert torch.equal(made, expected)
    assert COLUMNS.bits_per_weight == pytest.approx(8.01, abs=0.001)
    bad = weight.clone()
    bad[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"columns: the weight \[24, 63\] holds nan at \[3, 5\]"):
        COLUMNS.quantize(bad)


def test_auto_says_once_what_it_takes(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_announced", set())
    with caplog.at_level(logging.INFO, "fluxfast"):
        for _ in range(2):
            QuantWeight.of(gaussian(4, 64), COLUMNS).to(torch.float32)
    wanted = "native" if dispatch.HAS_NATIVE else "triton"
    said = [message for message in caplog.messages if message.startswith("columns.")]
    if dispatch.HAS_NATIVE:
        why = f"columns has its reference for that, and nothing in {wanted}"
        assert said == [
            f"columns.{task} runs on 'ref': {why}" for task in ("quantize", "dequantize")
        ]
    assert len(said) == 2


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "ref"])
def test_an_implementation_that_it_has_not_is_refused(impl):
    weight = gaussian(4, 64)
    stored, q = QuantWeight.of(weight, COLUMNS), torch.empty(4, 64, dtype=torch.int8)
    refused = f"impl='{impl}' can't do this call: columns has its reference"
    with pytest.raises(ValueError, match=f"columns.quantize: {refused}"):
        COLUMNS.quantize(weight, impl=impl)
    with pytest.raises(ValueError, match=f"columns.dequantize: {refused}"):
        stored.to(torch.float32, impl=impl)
    with pytest.raises(ValueError, match=f"columns.codes: {refused}"):
        stored.decode_into(q, torch.empty(4), impl=impl)
    if impl == "native":
        with pytest.raises(ValueError, match=r"gemv: .* doesn't read columns"):
            gemv(torch.randn(1, 64), stored, impl="native")


@pytest.mark.parametrize("batch", [1, 3])
def test_products_with_vectors(batch):
    stored, x = QuantWeight.of(gaussian(40, 63), COLUMNS), torch.randn(batch, 63)
    assert relative_error(gemv(x, stored), x.double() @ stored.to(torch.float64).T) < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("compute", ["same", "int8"])
def test_groups_of_linears(impl, compute):
    g = torch.Generator().manual_seed(1)
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"

    def rand(*shape):
        return torch.randn(*shape, generator=g).to(device)

    linears = [
        LinearParams(
            QuantWeight.of(gaussian(n, 48, seed=n).to(device), COLUMNS),
            rand(n),
            (Lora(rand(3, 48).requires_grad_(), rand(n, 3).requires_grad_(), 0.5),),
        )
        for n in (32, 16)
    ]
    x, dy = rand(9, 48).requires_grad_(), rand(9, 48)
    trained = [t for p in linears for t in p.adapters[0].tensors]
    y = lora_linear(x, linears, impl, compute=compute)
    grads = torch.autograd.grad(y, [x, *trained], dy)
    decoded = [p._replace(weight=p.weight.to(torch.float32)) for p in linears]
    expected = lora_linear(x, decoded, "ref", compute=compute)
    wanted = torch.autograd.grad(expected, [x, *trained], dy)
    for a, e in zip((y, *grads), (expected, *wanted), strict=True):
        assert relative_error(a, e) < 2e-6


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("compute", ["same", "int8"])
def test_a_model_trains_over_it(ahead, compute):
    targets = ["to_q", "to_v", "proj_mlp", "proj_out", "ff.net.2"]
    model, plain = small_flux("columns", targets), small_flux("columns", targets)
    for name, module in list(plain.named_modules()):
        if isinstance(module, QuantLinear):
            linear = torch.nn.Linear(
                module.in_features, module.out_features, bias=module.bias is not None
            )
            bias = {} if module.bias is None else {"bias": module.bias}
            linear.load_state_dict({"weight": module.weight, **bias})
            parent, _, child = name.rpartition(".")
            setattr(plain.get_submodule(parent), child, linear.requires_grad_(False))
    pack_groups(model)
    attn = model.transformer_blocks[0].attn
    qkv = [getattr(attn, f"to_{name}") for name in "qkv"]
    bases = [getattr(module, "base_layer", module) for module in qkv]
    assert side_by_side([base.weight_packed for base in bases])
    if ahead:
        model.set_modulation_ahead(True)
    trained, losses = {}, {}
    for name, each in (("model", model), ("plain", plain)):
        each.set_compute(compute)
        parameters = [p for p in each.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        before = each(**make_inputs(2, 3, 4)).sample.square().mean()
        before.backward()
        optimizer.step()
        with torch.no_grad():
            after = each(**make_inputs(2, 3, 4)).sample.square().mean()
        assert after < before
        losses[name] = torch.stack([before.detach(), after])
        trained[name] = torch.cat([p.grad.flatten() for p in parameters])
    assert relative_error(losses["model"], losses["plain"]) < 1e-4
    assert relative_error(trained["model"], trained["plain"]) < 1e-4


def test_it_is_saved_and_loaded(tmp_path):
    source = FluxTransformer(**SMALL | {"guidance_embeds": True})
    randomise(source)
    save_file(source.state_dict(), tmp_path / "flux.safetensors")
    path = tmp_path / "columns.safetensors"
    open_single_file(tmp_path / "flux.safetensors").quantize(FluxTransformer, path, COLUMNS)
    saved = open_single_file(path)
    assert saved.quantized is not None and saved.quantized.format is COLUMNS
    again = saved.load(FluxTransformer, torch.float32)
    placed = open_single_file(tmp_path / "flux.safetensors").load(
        FluxTransformer, torch.float32, format=COLUMNS
    )
    inputs = make_inputs(1, 2, 3)
    with torch.no_grad():
        first, second = (model(**inputs).sample for model in (again, placed))
    assert torch.equal(first, second)
    exact = source.eval()(**inputs).sample
    assert 1e-4 < relative_error(first, exact) < 0.1
    linear = again.transformer_blocks[0].attn.to_q
    assert isinstance(linear, QuantLinear) and linear.format is COLUMNS
    # what the plan reckons with is what there is
    planned = Storage("columns").weight(Linear("to_q", linear.out_features, linear.in_features))
    assert planned == linear.packed().nbytes
