"""A host with ComfyUI's interfaces: what is bookkeeping runs fused, and what acts is its own."""

import copy
import sys
import types

import pytest
import torch
from dropin_cases import counts, output
from host_of_comfyui import CastingLinear, CodesLinear, ComfyFlux, Linear

import fluxfast
from fluxfast.model.linear import obstacle
from support import make_inputs, randomise, relative_error

# fp32: two orders of summation differ by a few ulp per product, and depth adds them up
FP32 = 1e-5
# 2^-8 a rounding, over every op of five blocks, of which the host rounds each
BF16 = 2e-2
# what ComfyUI's sampler gives to every call
SAMPLER = {
    "sample_sigmas": torch.linspace(1, 0, 5),
    "sigmas": torch.ones(1),
    "cond_or_uncond": [0, 1],
    "uuids": ["a", "b"],
    "wrappers": {"a": {}},
    "callbacks": {},
    "patches": {"double_block": [lambda args: args], "post_input": [lambda args: args]},
    "patches_replace": {},
}


@pytest.fixture(scope="module")
def inputs():
    return make_inputs(2, 3, 5, guidance=False)


def hosts(linear=Linear, **options):
    torch.manual_seed(0)
    host = ComfyFlux(linear, **options)
    randomise(host)
    for name, p in host.named_parameters():
        if "_norm." in name:
            p.data.abs_().add_(0.5)
    return host, copy.deepcopy(host)


@pytest.mark.parametrize("linear", [Linear, CastingLinear])
@pytest.mark.parametrize("old", [True, False])
def test_a_samplers_calls_run_fused(inputs, linear, old):
    host, ours = hosts(linear, old=old)
    with torch.no_grad():
        report = fluxfast.accelerate(ours, strict=True)
    assert report.layout == "bfl" and report.count("module") == 0
    more = {"transformer_options": SAMPLER}
    assert relative_error(output(ours, inputs | more), output(host, inputs | more)) < FP32
    assert counts(report) == (5, 0, 0)
    with torch.inference_mode():
        assert relative_error(ours(**inputs | more), host(**inputs | more)) < FP32
    assert counts(report) == (10, 0, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_weights_are_cast_to_the_inputs_dtype(inputs, dtype):
    host, ours = hosts(CastingLinear)
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
    rounded = {k: x if "ids" in k else x.bfloat16() for k, x in inputs.items()}
    report = fluxfast.accelerate(ours.bfloat16())
    assert relative_error(output(ours, rounded), output(host.bfloat16(), rounded)) < BF16
    assert counts(report) == (5, 0, 0)


def scaled(x, *rest):
    return (1.5 * x, *rest) if rest else 1.5 * x


# what a node puts into the options, and how the report names it
ACTING = {
    "attention's inputs": ({"patches": {"attn1_patch": [scaled]}}, "attn1_patch"),
    "attention's output": ({"patches": {"attn1_output_patch": [scaled]}}, "attn1_output_patch"),
    "attention": ({"optimized_attention_override": scaled}, "optimized_attention_override"),
}


@pytest.mark.filterwarnings("ignore:fluxfast")
@pytest.mark.parametrize("what", [*ACTING, "something new", "a mask"])
def test_what_changes_a_block_is_left_to_it(inputs, what):
    host, ours = hosts()
    report = fluxfast.accelerate(ours)
    plain = output(host, inputs)
    if what == "a mask":
        mask = torch.ones(2, 1, 22, 22, dtype=torch.bool)
        mask[0, :, :, :3] = False
        more, name = {"attn_mask": mask}, "its argument attn_mask"
    else:
        options, name = ACTING.get(what, ({"a_nodes_own": 1}, "a_nodes_own"))
        more = {"transformer_options": SAMPLER | options}
    expected = output(host, inputs | more)
    assert torch.equal(output(ours, inputs | more), expected)
    assert (relative_error(expected, plain) > 1e-3) == (what != "something new")
    assert counts(report) == (0, 0, 5) and name in str(report)
    # it is the call that had something in it
    assert relative_error(output(ours, inputs), plain) < FP32
    assert counts(report) == (5, 0, 5)


def test_vectors_for_parts_of_the_rows():
    host, ours = hosts()
    report = fluxfast.accelerate(ours)
    x, vec = torch.randn(2, 12, 64), torch.randn(2, 2, 64)
    pe = torch.eye(2).expand(2, 1, 12, 16, 2, 2)
    dims = [(0, 5, 0), (5, 12, 1)]
    with torch.no_grad(), pytest.warns(UserWarning, match="only the host knows its argument"):
        actual, expected = (
            m.single_blocks[0](x.clone(), vec, pe, modulation_dims=dims) for m in (ours, host)
        )
    assert torch.equal(actual, expected) and counts(report) == (0, 0, 1)


def test_a_block_in_the_place_of_which_a_patch_is_called(inputs):
    """The patch calls the block with what it likes: the block is ours all the same."""
    host, ours = hosts()
    report = fluxfast.accelerate(ours)

    def patch(args, block):
        img, txt = block(**args | {"vec": args["vec"] * 0.5})
        return img * 1.1, txt

    replaced = {"patches_replace": {"dit": {("double_block", 1): patch}}}
    more = {"transformer_options": SAMPLER | replaced}
    assert relative_error(output(ours, inputs | more), output(host, inputs | more)) < FP32
    assert relative_error(output(host, inputs | more), output(host, inputs)) > 1e-3
    assert counts(report) == (5, 0, 0)


@pytest.mark.filterwarnings("ignore:fluxfast")
def test_linears_that_are_changed_on_their_way_are_called(inputs):
    """A LoRA that ComfyUI adds to a weight when it casts it."""
    host, ours = hosts()
    report = fluxfast.accelerate(ours)
    for model in (host, ours):
        linear = model.double_blocks[0].img_mlp[0]
        linear.weight_function = [lambda weight: weight * 1.5]
        model.single_blocks[1].norm.query_norm.weight_function = [lambda weight: weight * 2]
    assert "its weight_function" in obstacle(linear)
    assert relative_error(output(ours, inputs), output(host, inputs)) < FP32
    assert counts(report) == (3, 1, 1)
    linear.weight_function = []
    assert obstacle(linear.requires_grad_(False)) is None
    linear.weight_lowvram_function = lambda weight: weight
    assert "its weight_lowvram_function" in obstacle(linear)


@pytest.mark.filterwarnings("ignore:fluxfast")
def test_linears_of_another_product_are_called(inputs):
    host, ours = hosts(CodesLinear)
    report = fluxfast.accelerate(ours)
    assert report.linears[0].because.endswith("doesn't know: round")
    assert relative_error(output(ours, inputs), output(host, inputs)) < FP32
    assert counts(report) == (0, 5, 0)


def test_weights_that_a_call_brings(inputs):
    """What ComfyUI keeps in another memory, and casts for the length of a product."""
    _, ours = hosts(CastingLinear)
    report = fluxfast.accelerate(ours)
    ours.double_blocks[0].img_mlp[2].to("meta")
    with (
        pytest.warns(UserWarning, match="is on meta, and its input is not"),
        pytest.raises((NotImplementedError, RuntimeError)),
    ):
        output(ours, inputs)
    assert counts(report) == (0, 0, 1)


@pytest.mark.filterwarnings("ignore:fluxfast")
def test_attention_that_is_not_exact(inputs, monkeypatch):
    host, ours = hosts()
    report = fluxfast.accelerate(ours)
    attention = types.ModuleType("comfy.ldm.modules.attention")
    attention.optimized_attention = types.FunctionType((lambda: 0).__code__, {}, "attention_sage")
    monkeypatch.setitem(sys.modules, "comfy.ldm.modules.attention", attention)
    assert torch.equal(output(ours, inputs), output(host, inputs))
    assert counts(report) == (0, 0, 5) and "its attention is attention_sage" in str(report)
    attention.optimized_attention.__name__ = "attention_pytorch"
    ours.double_blocks[0].comfy_attention = types.SimpleNamespace(function=scaled)
    output(ours, inputs)
    assert counts(report) == (4, 0, 6)


@pytest.mark.filterwarnings("ignore:fluxfast")
def test_an_eps_that_depends_on_the_dtype(inputs):
    host, ours = hosts()
    report = fluxfast.accelerate(ours)
    for model in (host, ours):
        model.single_blocks[0].norm.key_norm.eps = None
    assert relative_error(output(ours, inputs), output(host, inputs)) < FP32
    assert counts(report) == (4, 0, 1)


@pytest.mark.parametrize("linear", [Linear, CastingLinear])
def test_a_compiled_model(inputs, linear):
    """A compiler traces ComfyUI's own modules, whose code cannot be asked for names then."""
    host, ours = hosts(linear)
    report = fluxfast.accelerate(ours)
    more = {"transformer_options": SAMPLER}
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="eager")
    assert relative_error(output(compiled, inputs | more), output(host, inputs | more)) < FP32
    assert counts(report) == (0, 0, 0)
    torch._dynamo.reset()
    assert relative_error(output(ours, inputs | more), output(host, inputs | more)) < FP32
    assert counts(report) == (5, 0, 0)


def test_lora_by_patched_weights_and_copies(inputs):
    """ComfyUI exchanges a weight for a patched one, and puts the old one back."""
    host, ours = hosts()
    report = fluxfast.accelerate(ours)
    plain = output(ours, inputs)
    change = 0.1 * torch.randn(192, 64, generator=torch.Generator().manual_seed(1))
    kept = []
    for model in (host, ours):
        linear = model.double_blocks[1].txt_attn.qkv
        kept.append(linear.weight)
        linear.weight = torch.nn.Parameter(linear.weight.detach() + change, requires_grad=False)
    patched = output(ours, inputs)
    assert relative_error(patched, output(host, inputs)) < FP32
    assert relative_error(patched, plain) > 1e-3
    assert torch.equal(output(copy.deepcopy(ours), inputs), patched)
    ours.double_blocks[1].txt_attn.qkv.weight = kept[1]
    assert torch.equal(output(ours, inputs), plain) and counts(report) == (15, 0, 0)
