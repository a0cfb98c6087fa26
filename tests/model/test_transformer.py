"""`FluxTransformer` beside diffusers' own model and beside an independent BFL-style one, on shared
weights.
"""

from functools import partial

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from bfl_reference import BflFlux
from fluxfast import FluxTransformer
from fluxfast.checkpoint.reader import CheckpointError
from small_flux import randomise_lora
from support import SMALL, make_inputs, randomise, relative_error

# fp32: two orders of summation differ by a few ulp per product, and depth adds them up
FP32 = 1e-5
# bf16 storage, fp32 compute here against bf16 compute there: 2^-8 per rounding, over every op of
# five blocks
BF16 = 2e-2

TARGETS = [
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *(
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
        "proj_mlp",
        "proj_out",
    ),
    *("norm.linear", "norm1.linear", "norm1_context.linear", "x_embedder", "context_embedder"),
]


def pair(*, guidance=True, lora=False, dtype=torch.float32, dropout=0.0):
    config = SMALL | {"guidance_embeds": guidance}
    theirs, ours = FluxTransformer2DModel(**config), FluxTransformer(**config)
    randomise(theirs)
    for model in (theirs, ours):
        model.to(dtype)
    ours.load_state_dict(theirs.state_dict())
    if lora:
        for model in (theirs, ours):
            model.requires_grad_(False)
            model.add_adapter(
                LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, lora_dropout=dropout)
            )
            randomise_lora(model)
    return theirs, ours


def lora_grads(model):
    return {n: p.grad for n, p in model.named_parameters() if "lora_" in n}


def loss_of(model, inputs):
    out = model(**inputs).sample
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out, (out * weights).sum()


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 4, 4), (2, 3, 9), (3, 7, 2)])
def test_outputs_equal_diffusers(guidance, batch, height, width):
    theirs, ours = pair(guidance=guidance)
    inputs = make_inputs(batch, height, width, guidance=guidance)
    with torch.no_grad():
        assert relative_error(ours(**inputs).sample, theirs(**inputs).sample) < FP32


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("interval", [None, 1, 2])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 5, 3), (3, 2, 6)])
def test_lora_gradients_equal_diffusers(guidance, interval, batch, height, width):
    theirs, ours = pair(guidance=guidance, lora=True)
    inputs = make_inputs(batch, height, width, guidance=guidance)
    for model in (theirs, ours):
        model.train()
    if interval:
        ours.enable_gradient_checkpointing()
        ours.gradient_checkpointing_interval = interval
    # diffusers' own gradients in fp32 are up to 1.5e-5 from these
    expected_out, expected = loss_of(
        theirs.double(), {name: x.double() for name, x in inputs.items()}
    )
    actual_out, actual = loss_of(ours, inputs)
    expected.backward()
    actual.backward()
    assert relative_error(actual_out, expected_out) < FP32
    grads, reference = lora_grads(ours), lora_grads(theirs)
    assert grads.keys() == reference.keys() and len(grads) == 98
    worst = max(reference, key=lambda n: relative_error(grads[n], reference[n]))
    assert relative_error(grads[worst], reference[worst]) < FP32, worst
    assert all(p.grad is None for n, p in ours.named_parameters() if "lora_" not in n)


def test_checkpointing_recomputes_every_nth_block():
    _, ours = pair()
    ours(**make_inputs(1, 2, 2))
    assert [block.policy for block in ours.blocks] == ["none"] * 5
    ours.enable_gradient_checkpointing()
    ours.gradient_checkpointing_interval = 2
    ours(**make_inputs(1, 2, 2))
    assert [block.policy for block in ours.blocks] == ["full", "none", "full", "none", "full"]
    ours.set_recompute("selective")
    ours(**make_inputs(1, 2, 2))
    assert [block.policy for block in ours.blocks] == ["selective"] * 5
    ours.set_recompute(None)
    ours.disable_gradient_checkpointing()
    ours(**make_inputs(1, 2, 2))
    assert [block.policy for block in ours.blocks] == ["none"] * 5


def test_a_checkpointing_function_of_the_callers_own_is_called():
    _, ours = pair()
    seen = []
    ours.enable_gradient_checkpointing(lambda block, *args: seen.append(block) or block(*args))
    ours(**make_inputs(1, 2, 2))
    assert seen == ours.blocks and all(block.policy == "none" for block in ours.blocks)
    with torch.no_grad():
        ours(**make_inputs(1, 2, 2))
    assert len(seen) == len(ours.blocks)


@pytest.mark.parametrize("policy", [["none", "selective", "full", "selective", "none"], "full"])
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_recomputing_changes_no_bit(policy, reentrant):
    """By policies of the blocks, inside somebody's checkpoint as well: the same ops on the same
    numbers.
    """
    _, ours = pair(lora=True, dropout=0.3)
    inputs = make_inputs(2, 3, 4)

    def grads():
        ours.zero_grad()
        torch.manual_seed(0)
        loss_of(ours, inputs)[1].backward()
        return lora_grads(ours)

    expected = grads()
    ours.set_recompute(policy)
    if reentrant is not None:
        ours.set_recompute(None)
        ours.enable_gradient_checkpointing(partial(torch_checkpoint, use_reentrant=reentrant))
        # a reentrant checkpoint hands on gradients only where an input asks for one
        inputs["hidden_states"].requires_grad_()
        inputs["encoder_hidden_states"].requires_grad_()
    for name, grad in grads().items():
        assert torch.equal(grad, expected[name]), name


def test_choices_are_checked():
    _, ours = pair()
    with pytest.raises(ValueError, match="got 'int4'"):
        ours.set_compute("int4")
    with pytest.raises(ValueError, match="outliers: expected a number"):
        ours.set_compute("int8", -1)
    with pytest.raises(ValueError, match="none, selective, full; got 'some'"):
        ours.set_recompute("some")
    with pytest.raises(ValueError, match="each of 5 blocks, got 2"):
        ours.set_recompute(["full", "none"])


@pytest.mark.parametrize("guidance", [True, False])
def test_bf16_storage(guidance):
    """Weights and inputs in bf16: outputs as diffusers' in bf16; gradients as diffusers' in fp32 on
    the same weights.
    """
    theirs, ours = pair(guidance=guidance, lora=True, dtype=torch.bfloat16)
    inputs = make_inputs(2, 4, 5, guidance=guidance)
    # values whose product with 1000 bf16 holds exactly: elsewhere the two precisions embed
    # different timesteps
    inputs["timestep"] = torch.tensor([0.5, 0.25])
    if guidance:
        inputs["guidance"] = torch.tensor([1.0, 0.5])
    cast = {k: v if "ids" in k else v.bfloat16() for k, v in inputs.items()}
    out, loss = loss_of(ours, cast)
    assert out.dtype == torch.bfloat16
    loss.backward()
    with torch.no_grad():
        assert relative_error(out, theirs(**cast).sample) < BF16
    _, loss = loss_of(theirs.float(), {k: v.float() for k, v in cast.items()})
    loss.backward()
    expected = lora_grads(theirs)
    for name, grad in lora_grads(ours).items():
        assert grad.dtype == torch.bfloat16
        assert relative_error(grad, expected[name]) < BF16, name


def test_bf16_timestep_is_rounded_as_in_diffusers():
    theirs, ours = pair(dtype=torch.bfloat16)
    cast = {k: v if "ids" in k else v.bfloat16() for k, v in make_inputs(2, 3, 3).items()}
    cast["timestep"] = torch.tensor([0.3711, 0.8437])
    with torch.no_grad():
        assert relative_error(ours(**cast).sample, theirs(**cast).sample) < BF16


def test_dropout_adapters_are_applied_and_trained():
    """Dropout changes the result in training mode, and its adapters train; without it all agree."""
    theirs, ours = pair(lora=True, dropout=0.5)
    inputs = make_inputs(1, 3, 3)
    for model in (theirs, ours):
        model.train()
    no_drop = {}
    for name, model in (("theirs", theirs), ("ours", ours)):
        model.eval()
        no_drop[name] = model(**inputs).sample
        model.train()
        torch.manual_seed(0)
        dropped = model(**inputs).sample
        assert relative_error(dropped, no_drop[name]) > 1e-3
        dropped.sum().backward()
        assert all(
            p.grad is not None and p.grad.abs().sum() > 0
            for n, p in model.named_parameters()
            if "lora_A" in n
        )
    assert relative_error(no_drop["ours"], no_drop["theirs"]) < FP32


def test_adapter_states_are_honoured():
    """Scale by joint_attention_kwargs, disabled, merged, two at once: as PEFT computes them."""
    theirs, ours = pair(lora=True)
    inputs = make_inputs(1, 3, 4)

    def check():
        with torch.no_grad():
            expected, actual = theirs(**inputs).sample, ours(**inputs).sample
        assert relative_error(actual, expected) < FP32
        return actual

    base = check()
    inputs["joint_attention_kwargs"] = {"scale": 0.3}
    scaled = check()
    del inputs["joint_attention_kwargs"]
    for model in (theirs, ours):
        model.add_adapter(
            LoraConfig(r=2, target_modules=["to_q", "proj_mlp"], init_lora_weights=False), "second"
        )
        randomise_lora(model)
        model.set_adapters(["default", "second"], weights=[0.7, 1.3])
    both = check()
    for model in (theirs, ours):
        model.disable_adapters()
    off = check()
    for model in (theirs, ours):
        model.enable_adapters()
        model.set_adapters(["default"])
        model.fuse_lora()
    check()
    assert all(relative_error(a, b) > 1e-3 for a, b in [(base, scaled), (base, both), (base, off)])


def test_base_weights_can_be_trained_too():
    """A base weight that requires a gradient gets it (fine-tuning the model is unusual here,
    silence would be wrong).
    """
    theirs, ours = pair()
    inputs = make_inputs(1, 3, 3)
    for model in (theirs, ours):
        loss_of(model, inputs)[1].backward()
    for (name, expected), (_, actual) in zip(
        theirs.named_parameters(), ours.named_parameters(), strict=True
    ):
        assert relative_error(actual.grad, expected.grad) < 2e-5, name


def test_fused_qkv_projections_hooks_and_control_residuals():
    theirs, ours = pair()
    inputs = make_inputs(1, 3, 4)
    calls = []
    ours.transformer_blocks[0].attn.to_q.register_forward_hook(lambda *args: calls.append(1))
    inputs["controlnet_block_samples"] = [torch.randn(1, 12, 64)]
    inputs["controlnet_single_block_samples"] = [torch.randn(1, 12, 64), torch.randn(1, 12, 64)]
    with torch.no_grad():
        assert relative_error(ours(**inputs).sample, theirs(**inputs).sample) < FP32
        assert calls == [1]
        ours.fuse_qkv_projections()
        assert relative_error(ours(**inputs).sample, theirs(**inputs).sample) < FP32


def test_single_block_called_as_diffusers_calls_it():
    theirs, ours = pair()
    img, txt, vec = torch.randn(2, 6, 64), torch.randn(2, 5, 64), torch.randn(2, 64)
    pe = theirs.pos_embed(torch.arange(33.0).view(11, 3))
    for name in ("transformer_blocks", "single_transformer_blocks"):
        expected = getattr(theirs, name)[0](img, txt, vec, pe)
        actual = getattr(ours, name)[0](img, txt, vec, pe)
        assert all(relative_error(a, e) < FP32 for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_bfl_model_and_its_files(tmp_path, guidance, prefix):
    """An independent model in BFL's layout, saved, loaded by us, same outputs."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    bfl = BflFlux(
        in_channels=16,
        dim=64,
        n_heads=2,
        depth=2,
        depth_single=3,
        context=24,
        pooled=20,
        axes=(4, 14, 14),
        guidance=guidance,
    )
    extra = {"vae.decoder.conv_in.weight": torch.zeros(2)} if prefix else {}
    save_file(
        {prefix + k: v for k, v in bfl.state_dict().items()} | extra, tmp_path / "flux.safetensors"
    )
    ours = FluxTransformer.from_single_file(tmp_path / "flux.safetensors")
    assert ours.config.guidance_embeds is guidance
    i = make_inputs(2, 3, 5, guidance=guidance)
    with torch.no_grad():
        expected = bfl(
            *(
                i[k]
                for k in (
                    "hidden_states",
                    "img_ids",
                    "encoder_hidden_states",
                    "txt_ids",
                    "timestep",
                    "pooled_projections",
                )
            ),
            i.get("guidance"),
        )
        assert relative_error(ours(**i).sample, expected) < FP32


def test_saved_folder_loads_in_diffusers_and_back(tmp_path):
    theirs, ours = pair()
    ours.save_pretrained(tmp_path / "ours", max_shard_size="100KB")
    assert (tmp_path / "ours" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "ours")
    assert type(again) is FluxTransformer2DModel
    mine = FluxTransformer.from_pretrained(tmp_path / "ours", torch_dtype=torch.float32)
    for loaded in (again, mine):
        assert all(
            torch.equal(tensor, theirs.state_dict()[name])
            for name, tensor in loaded.state_dict().items()
        )
    inputs = make_inputs(1, 2, 3)
    expected = theirs(**inputs).sample
    # the weights are the same bits, but a mapped file's lie at other addresses: by a tensor's
    # alignment, BLAS chooses a kernel with its own order of summation
    assert relative_error(again(**inputs).sample, expected) < FP32
    assert relative_error(mine(**inputs).sample, expected) < FP32
    with pytest.raises(CheckpointError, match="no such folder"):
        FluxTransformer.from_pretrained(tmp_path / "absent")
