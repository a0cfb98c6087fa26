"""Every way off the fused path is seen, named, and runs as the host would."""

import pytest
import torch
from dropin_cases import counts, hosts, output
from dropin_hosts import FP32, add_lora
from torch import nn

import fluxfast
from support import make_inputs, relative_error


@pytest.fixture(scope="module")
def inputs():
    return make_inputs(2, 3, 5, guidance=False)


def other_processor(model):
    processor = model.transformer_blocks[0].attn.processor
    model.transformer_blocks[0].attn.set_processor(type("Other", (type(processor),), {})())


def hook_on_attention(model):
    model.transformer_blocks[0].attn.register_forward_pre_hook(lambda *_: None)


def hook_on_norm(model):
    model.transformer_blocks[0].norm2.register_forward_hook(lambda *_: None)


def hook_on_linear(model):
    model.transformer_blocks[0].ff.net[2].register_forward_hook(lambda *_: None)


def hook_on_dropout(model):
    model.transformer_blocks[0].attn.to_out[1].register_forward_hook(lambda *_: None)


def exact_gelu(model):
    model.single_transformer_blocks[0].act_mlp = nn.GELU()


def other_activation(model):
    model.single_transformer_blocks[0].act_mlp = nn.SiLU()


def norm_of_another_kind(model):
    norm = model.transformer_blocks[0].norm2
    model.transformer_blocks[0].norm2 = nn.RMSNorm(norm.normalized_shape, eps=norm.eps)
    model.requires_grad_(False)


def other_norm(model):
    class Norm(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) * 1.5

    dim = model.transformer_blocks[0].norm2.normalized_shape
    model.transformer_blocks[0].norm2 = Norm(dim, elementwise_affine=False, eps=1e-6)


def norm_with_weights(model):
    model.transformer_blocks[0].norm2 = nn.LayerNorm(
        model.transformer_blocks[0].norm2.normalized_shape, eps=1e-6
    )
    with torch.no_grad():
        model.transformer_blocks[0].norm2.weight.fill_(1.5)
    model.requires_grad_(False)


def dora_and_lora(model, target="to_q"):
    add_lora(model, targets=[target])
    add_lora(model, "dora", use_dora=True, targets=[target])
    model.set_adapters(["default", "dora"])


def dora_and_lora_on_modulation(model):
    dora_and_lora(model, "norm1.linear")


def trained_base(model):
    model.transformer_blocks[0].ff.net[2].requires_grad_(True)


def trained_norm(model):
    model.transformer_blocks[0].attn.norm_q.requires_grad_(True)


WAYS_OFF = {
    other_processor: ("composed", "its attention processor is Other"),
    hook_on_attention: ("composed", "its FluxAttention is called as a module: it has hooks"),
    hook_on_norm: ("host", "its LayerNorm is called as a module: it has hooks"),
    hook_on_linear: ("composed", "a linear of it is called by its module: it has hooks"),
    hook_on_dropout: ("composed", "its Dropout is called as a module: it has hooks"),
    exact_gelu: ("host", "its GELU is not the module that FLUX.1 has there"),
    other_activation: ("host", "its SiLU is not the module that FLUX.1 has there"),
    norm_of_another_kind: ("host", "its RMSNorm is not the module that FLUX.1 has there"),
    other_norm: ("host", "its Norm is not the module that FLUX.1 has there"),
    norm_with_weights: ("host", "its LayerNorm is not the module that FLUX.1 has there"),
    dora_and_lora: ("composed", "one of several adapters is DoRA"),
    dora_and_lora_on_modulation: ("module", "one of several adapters is DoRA"),
    trained_base: ("composed", "its base is trained"),
    trained_norm: ("composed", "an RMS norm of its q or k is trained"),
}


@pytest.mark.parametrize("change", WAYS_OFF)
def test_every_way_off_the_fused_path_is_seen(inputs, change):
    how, because = WAYS_OFF[change]
    host, ours = hosts("diffusers")
    report = fluxfast.accelerate(ours)
    for model in (host, ours):
        torch.manual_seed(0)
        change(model)
    with pytest.warns(UserWarning, match="fluxfast: ") as caught:
        assert (
            relative_error(
                output(ours, inputs, gradients=True), output(host, inputs, gradients=True)
            )
            < FP32
        )
    messages = [str(w.message) for w in caught if str(w.message).startswith("fluxfast")]
    assert len(messages) == 1 and because in messages[0]
    seen = {key: calls for one in report.blocks for key, calls in one.calls.fallbacks().items()}
    ((way, reason),) = seen
    assert way == how and because in reason and reason in str(report)
    # a modulation is not part of the fused block, which is fused all the same
    assert report.calls("fused") == 5 - (
        0 if how == "module" else len([b for b in report.blocks if b.calls.count(how)])
    )
    # a reason that is there already is an error at once, and the model is restored
    with pytest.raises(ValueError, match=r"strict=True.*would not run fused"):
        fluxfast.accelerate(ours, strict=True)
    with pytest.raises(ValueError, match="call fluxfast"):
        fluxfast.dropin.inspect(ours)
    assert torch.equal(output(ours, inputs, gradients=True), output(host, inputs, gradients=True))
    # a reason that comes later is an error in the call
    _, later = hosts("diffusers")
    fluxfast.accelerate(later, strict=True)
    change(later)
    with pytest.raises(ValueError, match=r"strict=True.*blocks\.0 would run"):
        output(later, inputs, gradients=True)


@pytest.mark.parametrize("change", [trained_base, trained_norm])
def test_what_trains_is_fused_where_nobody_asks_for_gradients(inputs, change):
    host, ours = hosts("diffusers")
    report = fluxfast.accelerate(ours)
    for model in (host, ours):
        change(model)
    assert relative_error(output(ours, inputs), output(host, inputs)) < FP32
    assert counts(report) == (5, 0, 0)
    (block,) = (b for b in fluxfast.dropin.inspect(ours).blocks if not b.fused)
    assert block.because.endswith("is trained; calls without gradients run fused")


def test_a_block_without_positions_is_the_hosts(inputs):
    host, ours = hosts("diffusers")
    report = fluxfast.accelerate(ours)
    x, txt, vec = torch.randn(1, 12, 64), torch.randn(1, 7, 64), torch.randn(1, 64)

    def blocks(model):
        with torch.no_grad():
            return [
                *model.transformer_blocks[0](x, txt, vec),
                *model.single_transformer_blocks[0](x, txt, vec),
            ]

    with pytest.warns(UserWarning, match="without image_rotary_emb"):
        actual = blocks(ours)
    assert all(map(torch.equal, actual, blocks(host))) and counts(report) == (0, 0, 2)


def test_a_vector_for_each_token_is_the_hosts():
    """Only the host's own modulation can take it: the host runs, and raises what it raises."""
    _, ours = hosts("bfl")
    report = fluxfast.accelerate(ours)
    pe = torch.eye(2).expand(1, 1, 12, 16, 2, 2)
    with pytest.warns(UserWarning, match="its vec is of each token"), pytest.raises(RuntimeError):
        ours.single_blocks[0](torch.randn(1, 12, 64), torch.randn(1, 5, 64), pe)
    assert counts(report) == (0, 0, 1)


def test_joint_attention_kwargs(inputs):
    _, ours = hosts("diffusers")
    report = fluxfast.accelerate(ours)
    for nothing in (None, {}, {"attention_mask": None}, {"other": None}):
        output(ours, {**inputs, "joint_attention_kwargs": nothing})
    assert counts(report) == (20, 0, 0)
    with pytest.warns(UserWarning, match=r"joint_attention_kwargs \['other'\]"):
        output(ours, {**inputs, "joint_attention_kwargs": {"other": 1}})
    assert counts(report) == (20, 5, 0)
