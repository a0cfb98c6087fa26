"""Outputs, LoRA gradients and trained LoRAs equal those of the same hosts left alone."""

from functools import partial

import pytest
import torch
from diffusers.models.embeddings import ImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from dropin_hosts import (
    ATTENTION,
    FP32,
    add_lora,
    assert_equal,
    diffusers_host,
    lora_parameters,
    outputs_and_grads,
    pair,
    randomise_trained,
)
from host_of_simpletuner import OlderFlux
from peft import LoKrConfig
from torch.utils.checkpoint import checkpoint

import fluxfast
from fluxfast.model import single_block
from support import make_inputs, randomise, relative_error

# 16 bits: 2^-8 per rounding there, over every op of five blocks; here a CPU rounds between blocks
# only
BF16 = 2e-2


def cast(inputs, dtype):
    return {key: x if "ids" in key else x.to(dtype) for key, x in inputs.items()}


@pytest.fixture(scope="module")
def inputs():
    return make_inputs(2, 3, 5, guidance=False)


def checkpointing(model, how):
    if how == "default":
        model.enable_gradient_checkpointing()
    elif how is not None:
        model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=how == "reentrant"))


@pytest.mark.parametrize("how", [None, "default", "function", "reentrant"])
@pytest.mark.parametrize("before", [True, False])
def test_peft_lora_and_checkpointing(inputs, how, before):
    """LoRA is injected before or after, with any function that the host checkpoints with."""
    host, ours = pair(diffusers_host, guidance_embeds=True)
    inputs = make_inputs(2, 3, 5)
    if before:
        fluxfast.accelerate(ours)
    for model in (host, ours):
        add_lora(model)
        model.train()
        checkpointing(model, how)
        if how == "reentrant":
            # it passes gradients on only if an input requires one
            model.x_embedder.register_forward_hook(lambda module, args, out: out.requires_grad_())
            model.context_embedder.register_forward_hook(
                lambda module, args, out: out.requires_grad_()
            )
    if not before:
        fluxfast.accelerate(ours)
    assert_equal(host, ours, inputs)


@pytest.mark.parametrize(
    "policy", ["none", "selective", "full", ["full", "none", "selective", "none", "full"]]
)
@pytest.mark.parametrize("how", [None, "default"])
def test_recompute_policies(inputs, policy, how):
    host, ours = pair(diffusers_host)
    for model in (host, ours):
        add_lora(model)
        checkpointing(model, how)
    fluxfast.accelerate(ours, recompute=policy)
    assert_equal(host, ours, inputs)


def test_a_checkpoint_does_not_compute_a_block_twice(inputs):
    """The block recomputes by its own policy, once, what the host's checkpoint would recompute."""
    _, ours = pair(diffusers_host)
    add_lora(ours)
    ours.enable_gradient_checkpointing()
    fluxfast.accelerate(ours)
    calls = []
    for block in ours.transformer_blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    outputs_and_grads(ours, inputs, lora_parameters(ours))
    assert len(calls) == 2


def test_text_and_image_stay_one_tensor(inputs, monkeypatch):
    """Between single blocks nothing is copied: only the first one joins text and image."""
    _, ours = pair(diffusers_host)
    add_lora(ours)
    fluxfast.accelerate(ours)
    real, kept = single_block.joined, []

    def joined(txt, img):
        out = real(txt, img)
        kept.append(out is txt._base)
        return out

    monkeypatch.setattr(single_block, "joined", joined)
    ours(**inputs)
    assert kept == [False, True, True]


def ip_adapter(model):
    g = torch.Generator().manual_seed(2)
    for block in model.transformer_blocks:
        processor = FluxIPAdapterAttnProcessor(model.inner_dim, 24, num_tokens=(4,), scale=0.8)
        with torch.no_grad():
            for p in processor.parameters():
                p.copy_(torch.randn(p.shape, generator=g) * 0.1)
        block.attn.set_processor(processor.requires_grad_(False))
    projection = ImageProjection(20, 24, num_image_text_embeds=4).requires_grad_(False)
    randomise(projection)
    model.encoder_hid_proj = projection


def test_ip_adapter(inputs):
    host, ours = pair(diffusers_host)
    fluxfast.accelerate(ours)
    for model in (host, ours):
        add_lora(model)
        ip_adapter(model)
    image = torch.randn(2, 20, generator=torch.Generator().manual_seed(1))
    results = []
    for model in (host, ours):
        # diffusers' forward takes a name out of the dict that it is given
        kwargs = {"joint_attention_kwargs": {"ip_adapter_image_embeds": image}}
        model.encoder_hid_proj = ListOf(model.encoder_hid_proj)
        results.append(outputs_and_grads(model, inputs | kwargs, lora_parameters(model)))
    (expected, expected_grads), (actual, grads) = results
    assert relative_error(actual, expected) < FP32
    assert all(relative_error(grad, expected_grads[name]) < FP32 for name, grad in grads.items())
    reasons = {block.because for block in fluxfast.dropin.inspect(ours).blocks}
    assert reasons == {None, "its attention processor is FluxIPAdapterAttnProcessor"}


class ListOf(torch.nn.Module):
    """What diffusers' loader puts around image projections: one result for each adapter."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return [self.inner(x)]


def dora(model):
    add_lora(model, use_dora=True, targets=ATTENTION)


def lokr(model):
    model.add_adapter(
        LoKrConfig(r=2, target_modules=["to_q", "to_add_out", "proj_mlp"], init_weights=False), "kr"
    )
    randomise_trained(model)


def bias_in_b(model):
    add_lora(model, targets=["to_k", "ff.net.2"], lora_bias=True)


def dropped(model):
    add_lora(model, lora_dropout=0.4)


def mixed(model):
    add_lora(model, targets=["to_q", "proj_out"])
    add_lora(model, "second", targets=["to_q", "to_v"], seed=4)
    model.set_adapters(["default", "second"], [0.3, 1.2])
    model.transformer_blocks[1].attn.to_q.register_forward_hook(lambda module, args, out: out * 1.5)


def dora_dropped(model):
    add_lora(model, use_dora=True, targets=ATTENTION, lora_dropout=0.4)


@pytest.mark.parametrize("how", [None, "default"])
@pytest.mark.parametrize("inject", [dora, lokr])
def test_dora_and_lokr_are_fused(inputs, how, inject):
    host, ours = pair(diffusers_host)
    for model in (host, ours):
        inject(model)
        model.train()
        checkpointing(model, how)
    report = fluxfast.accelerate(ours)
    assert report.count("module") == 0 and all(block.fused for block in report.blocks)
    assert_equal(host, ours, inputs)


@pytest.mark.parametrize("inject", [dora_dropped, bias_in_b, dropped, mixed])
@pytest.mark.parametrize("how", [None, "default"])
def test_what_is_no_plain_lora_is_computed_by_its_module(inputs, inject, how):
    """The modules are called in diffusers' order, so the same seed gives the same dropout masks."""
    host, ours = pair(diffusers_host)
    for model in (host, ours):
        torch.manual_seed(0)
        inject(model)
        model.train()
        checkpointing(model, how)
    report = fluxfast.accelerate(ours)
    assert report.count("module") > 0 and all(
        linear.because for linear in report.linears if linear.runs == "module"
    )
    assert_equal(host, ours, inputs)


@pytest.fixture(params=[True, False])
def matrix_unit(request, monkeypatch):
    monkeypatch.setattr("fluxfast.dropin.cpu.has_matrix_unit", lambda: request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(inputs, dtype, matrix_unit):
    host, ours = pair(diffusers_host, dtype)
    reference = diffusers_host()
    for model in (host, ours):
        add_lora(model)
        model.to(dtype)
    # the same rounded weights, computed in fp32: neither of the two in 16 bits is the truth
    add_lora(reference)
    for (_, p), (_, q) in zip(reference.named_parameters(), ours.named_parameters(), strict=True):
        p.data.copy_(q.data)
    report = fluxfast.accelerate(ours)
    theirs = matrix_unit and dtype == torch.bfloat16
    assert [block.fused for block in report.blocks] == [not theirs] * 5
    rounded = cast(inputs, dtype)
    # values whose product with 1000 bf16 holds exactly: elsewhere the two precisions embed
    # different timesteps
    rounded["timestep"] = torch.tensor([0.5, 0.25], dtype=dtype)
    with torch.no_grad():
        expected, actual = host(**rounded).sample, ours(**rounded).sample
    assert actual.dtype == dtype and relative_error(actual, expected) < BF16
    (_, theirs), (_, grads), (_, truth) = (
        outputs_and_grads(model, x, lora_parameters(model))
        for model, x in (
            (host, rounded),
            (ours, rounded),
            (reference, cast(rounded, torch.float32)),
        )
    )
    for name, grad in grads.items():
        bound = max(BF16, relative_error(theirs[name], truth[name]))
        assert grad.dtype == dtype and relative_error(grad, truth[name]) <= bound, name


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inject", [add_lora, dora])
def test_autocast(inputs, storage, inject, matrix_unit):
    """Adapters in fp32, the base in fp32 or bf16, and both under autocast, as scripts run them."""
    host, ours = pair(diffusers_host, storage)
    for model in (host, ours):
        inject(model)
        for p in lora_parameters(model).values():
            p.data = p.data.float()
    fluxfast.accelerate(ours)
    inputs = cast(inputs, storage)
    inputs["timestep"] = torch.tensor([0.5, 0.25], dtype=storage)
    with torch.autocast("cpu", torch.bfloat16):
        (expected, truth), (actual, grads) = (
            outputs_and_grads(m, inputs, lora_parameters(m)) for m in (host, ours)
        )
    assert actual.dtype == expected.dtype and relative_error(actual, expected) < BF16
    for name, grad in grads.items():
        # gradients have twice as many roundings behind them, and the host does all of its own in
        # bf16
        assert relative_error(grad, truth[name]) < 2.5 * BF16, name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_two_training_steps(inputs, dropout):
    """Same seed, same two steps of AdamW: the same LoRA."""
    host, ours = pair(diffusers_host)
    for model in (host, ours):
        add_lora(model, lora_dropout=dropout)
        model.train()
        model.enable_gradient_checkpointing()
    fluxfast.accelerate(ours)
    trained = []
    for model in (host, ours):
        torch.manual_seed(4)
        optimizer = torch.optim.AdamW(lora_parameters(model).values(), lr=1e-3)
        target = torch.randn(2, 15, 16)
        for _ in range(2):
            loss = torch.nn.functional.mse_loss(model(**inputs).sample, target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append({name: p.detach().clone() for name, p in lora_parameters(model).items()})
    for name, expected in trained[0].items():
        # AdamW divides by a gradient's own size: where that is rounding alone, a step of 1e-3 goes
        # either way
        assert relative_error(trained[1][name], expected) < 1e-4, name


def test_whole_model_training(inputs):
    """A base that trains is computed by its modules: gradients of every weight are the host's."""
    host, ours = pair(diffusers_host)
    for model in (host, ours):
        model.requires_grad_(True)
    report = fluxfast.accelerate(ours)
    assert {linear.because for linear in report.linears} == {"its base is trained"}
    assert_equal(host, ours, inputs, grad_tolerance=2e-5)


def test_routes_drop_tokens_in_training_only(inputs):
    """A route that keeps everything changes nothing; one that drops tokens is our own model's."""
    routes = [{"selection_ratio": 0.0, "start_layer_idx": 1, "end_layer_idx": 3}]
    host, ours = pair(diffusers_host)
    for model in (host, ours):
        add_lora(model)
        model.train()
    fluxfast.accelerate(ours, tread=routes)
    assert_equal(host, ours, inputs)
    routes[0]["selection_ratio"] = 0.5
    mine = fluxfast.FluxTransformer(**dict(host.config)).requires_grad_(False)
    add_lora(mine)
    mine.load_state_dict(host.state_dict())
    mine.set_routes(routes, seed=3)
    for how in (None, "default"):
        checkpointing(mine, how)
        checkpointing(ours, how)
        # both draw again from the same seed
        mine.set_routes(routes, seed=3)
        fluxfast.accelerate(ours, tread={"routes": routes}, seed=3)
        assert_equal(mine.train(), ours, inputs)
    ours.eval()
    with torch.no_grad():
        assert relative_error(ours(**inputs).sample, host(**inputs).sample) < FP32
    with pytest.raises(ValueError, match="tread: routes run in"):
        fluxfast.accelerate(OlderFlux(), tread=routes)


def unwrapped(model):
    return {name.removeprefix("_orig_mod."): p for name, p in lora_parameters(model).items()}


@pytest.mark.filterwarnings("error:Dynamo detected a call")
@pytest.mark.parametrize("regional", [True, False])
def test_compiled(inputs, regional):
    host, ours = pair(diffusers_host, num_layers=1, num_single_layers=1)
    for model in (host, ours):
        add_lora(model)
    fluxfast.accelerate(ours)
    torch._dynamo.reset()
    if regional:
        ours.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
        compiled = ours
    else:
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert_equal(host, compiled, inputs, trained=unwrapped)
    torch._dynamo.reset()
