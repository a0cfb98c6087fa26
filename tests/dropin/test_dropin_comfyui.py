"""A host with ComfyUI's interfaces: what is bookkeeping runs fused, and what acts is its own."""

import copy
import functools
import types

import host_of_comfyui
import pytest
import torch
from comfyui_cases import FP32, hosts
from dropin_cases import counts, output
from host_comfyui_ops import CastingLinear, Linear
from torch import nn

import fluxfast
from fluxfast.dropin.comfyui import default_eps
from support import make_inputs, relative_error

# what ComfyUI's sampler gives to every call
SAMPLER = {
    "sample_sigmas": torch.linspace(1, 0, 5),
    "sigmas": torch.ones(1),
    "cond_or_uncond": [0, 1],
    "uuids": ["a", "b"],
    "wrappers": {"a": {}},
    "callbacks": {},
    # a node's own, for what it does around the model
    "easycache": object(),
    "patches": {"double_block": [lambda args: args], "post_input": [lambda args: args]},
    "patches_replace": {},
}


@pytest.fixture(scope="module")
def inputs():
    return make_inputs(2, 3, 5, guidance=False)


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


def scaled(x, *rest):
    return (1.5 * x, *rest) if rest else 1.5 * x


# what a node puts into the options, and how the report names it
ACTING = {
    "attention's inputs": ({"patches": {"attn1_patch": [scaled]}}, "attn1_patch"),
    "attention's output": ({"patches": {"attn1_output_patch": [scaled]}}, "attn1_output_patch"),
    "attention": ({"optimized_attention_override": scaled}, "optimized_attention_override"),
    "a switch in the host's code": ({"halved": True}, "only the host knows of its transformer"),
}


@pytest.mark.filterwarnings("ignore:fluxfast")
@pytest.mark.parametrize("what", [*ACTING, "a mask"])
def test_what_changes_a_block_is_left_to_it(inputs, what):
    host, ours = hosts()
    report = fluxfast.accelerate(ours)
    plain = output(host, inputs)
    if what == "a mask":
        mask = torch.ones(2, 1, 22, 22, dtype=torch.bool)
        mask[0, :, :, :3] = False
        more, name = {"attn_mask": mask}, "its argument attn_mask"
    else:
        options, name = ACTING[what]
        more = {"transformer_options": SAMPLER | options}
    expected = output(host, inputs | more)
    assert torch.equal(output(ours, inputs | more), expected)
    assert relative_error(expected, plain) > 1e-3
    assert counts(report) == (0, 0, 5) and name in str(report)
    # it is the call that had something in it
    assert relative_error(output(ours, inputs), plain) < FP32
    assert counts(report) == (5, 0, 5)


def test_vectors_for_parts_of_the_rows():
    host, ours = hosts()
    report = fluxfast.accelerate(ours)
    x, _, pe = block_inputs()
    vec = torch.randn(2, 2, 64)
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


@pytest.mark.parametrize(
    "name", ["img_mlp.2", "txt_mod.lin", "img_attn.norm.query_norm", "img_attn.proj"]
)
def test_weights_that_a_call_brings(inputs, name):
    """What ComfyUI keeps in another memory, and casts for the length of a product."""
    _, ours = hosts(CastingLinear)
    report = fluxfast.accelerate(ours)
    ours.double_blocks[0].get_submodule(name).to("meta")
    with (
        pytest.warns(UserWarning, match="is on meta, and its input is not"),
        pytest.raises((NotImplementedError, RuntimeError)),
    ):
        output(ours, inputs)
    assert counts(report) == (0, 0, 1)


def halved(function):
    return lambda *args: function(*args) / 2


# what nodes and switches put in an attention's place, and what the report says
ATTENTIONS = {
    "another of the host's": (
        "optimized_attention",
        host_of_comfyui.attention_sage,
        "its attention is attention_sage",
    ),
    "a node's": (
        "optimized_attention",
        halved(host_of_comfyui.attention_pytorch),
        "its attention is <lambda>",
    ),
    "a node's around the host's": (
        "optimized_attention",
        functools.wraps(host_of_comfyui.attention_pytorch)(
            # of another module
            types.FunctionType(
                halved(host_of_comfyui.attention_pytorch).__code__,
                {},
                closure=halved(host_of_comfyui.attention_pytorch).__closure__,
            )
        ),
        "its attention has another function around it",
    ),
    "what calls it": (
        "attention",
        halved(host_of_comfyui.attention),
        "names that fluxfast doesn't know: function",
    ),
    "an object": ("optimized_attention", torch.nn.Identity(), "its attention is not known"),
}


@pytest.mark.filterwarnings("ignore:fluxfast")
@pytest.mark.parametrize("what", ATTENTIONS)
def test_attention_that_is_exchanged(inputs, monkeypatch, what):
    host, ours = hosts()
    report = fluxfast.accelerate(ours)
    plain = output(host, inputs)
    name, function, said = ATTENTIONS[what]
    with monkeypatch.context() as patched:
        patched.setattr(host_of_comfyui, name, function)
        if what != "an object":
            expected = output(host, inputs)
            assert torch.equal(output(ours, inputs), expected)
            assert relative_error(expected, plain) > 1e-3
        else:
            assert "not known" in str(fluxfast.dropin.inspect(ours))
            return
        assert counts(report) == (0, 0, 5) and said in str(report)
    assert relative_error(output(ours, inputs), plain) < FP32
    assert counts(report) == (5, 0, 5)


@pytest.mark.filterwarnings("ignore:fluxfast")
def test_a_checkpoint_that_chooses_its_attention(inputs):
    _, ours = hosts()
    report = fluxfast.accelerate(ours)
    ours.double_blocks[0].comfy_attention = types.SimpleNamespace(function=scaled)
    output(ours, inputs)
    assert counts(report) == (4, 0, 1)


@pytest.mark.filterwarnings("ignore:fluxfast")
def test_a_forward_that_is_exchanged(inputs, monkeypatch):
    """A node may put another into the host's class, which ours derives from."""
    host, ours = hosts()
    report = fluxfast.accelerate(ours)
    kind = host_of_comfyui.SingleStreamBlock
    monkeypatch.setattr(kind, "forward", doubled(kind.forward))
    assert torch.equal(
        ours.single_blocks[0](*block_inputs()), host.single_blocks[0](*block_inputs())
    )
    assert "names that fluxfast doesn't know: forward" in str(report)


def doubled(forward):
    def run(self, x, vec, pe, attn_mask=None, modulation_dims=None, transformer_options=None):
        return forward(self, x, vec, pe) * 2

    return run


def block_inputs():
    g = torch.Generator().manual_seed(1)
    x, vec = torch.randn(2, 12, 64, generator=g), torch.randn(2, 64, generator=g)
    return x, vec, torch.eye(2).expand(2, 1, 12, 16, 2, 2)


@pytest.mark.filterwarnings("ignore:fluxfast")
def test_blocks_that_are_not_flux_1s(inputs):
    """Other models are made of the same classes."""
    host, ours = hosts()
    report = fluxfast.accelerate(ours)
    plain = output(host, inputs)
    for model in (host, ours):
        model.double_blocks[0].flipped_img_txt = True
        model.double_blocks[1].img_mlp[1] = nn.SiLU()
        model.single_blocks[0].mlp_act = nn.SiLU()
    expected = output(host, inputs)
    assert relative_error(output(ours, inputs), expected) < FP32
    assert relative_error(expected, plain) > 1e-3
    assert counts(report) == (2, 0, 3)
    assert "its image comes before its text" in str(report)
    assert "its SiLU is not the module that FLUX.1 has there" in str(report)


def test_an_eps_that_torch_chooses(inputs):
    """ComfyUI's norms of today say none; small q and k show what is added to them."""
    host, ours = hosts()
    for model in (host, ours):
        for module in model.modules():
            if isinstance(module, nn.RMSNorm):
                module.eps = None
            elif isinstance(module, host_of_comfyui.SelfAttention):
                module.qkv.weight.data *= 1e-3
                module.qkv.bias.data *= 1e-3
    report = fluxfast.accelerate(ours)
    expected = output(host, inputs)
    assert relative_error(output(ours, inputs), expected) < FP32
    assert counts(report) == (5, 0, 0)
    for module in ours.modules():
        if isinstance(module, nn.RMSNorm):
            module.eps = 1e-6
    assert relative_error(output(ours, inputs), expected) > 2 * FP32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_eps_of_torchs_rms_norm(dtype):
    x = (torch.randn(4, 32, generator=torch.Generator().manual_seed(1)) * 0.01).to(dtype)
    norm = torch.nn.functional.rms_norm
    assert torch.equal(norm(x, (32,)), norm(x, (32,), eps=default_eps(x)))
    assert not torch.equal(norm(x, (32,)), norm(x, (32,), eps=10 * default_eps(x)))


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
