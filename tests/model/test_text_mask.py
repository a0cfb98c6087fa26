"""Attention without the text's padding: values and gradients in fp64, with routes and adapters."""

import pytest
import torch
from peft import LoraConfig

from fluxfast.model.text_mask import joint_mask
from fluxfast.model.transformer import FluxTransformer
from fluxfast.train import flow

TINY = {
    "in_channels": 64, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 24, "pooled_projection_dim": 12,
    "guidance_embeds": False, "axes_dims_rope": (4, 4, 8),
}  # fmt: skip
# tokens of the captions, of 23
LENGTHS = (5, 11)
POLICIES = ("none", "selective", "full")


def model():
    torch.manual_seed(0)
    transformer = FluxTransformer(**TINY).double().requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "to_add_out"]
    transformer.add_adapter(LoraConfig(r=3, target_modules=targets, lora_dropout=0.0))
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter, dtype=torch.float64) * 0.2
    return transformer


def inputs(batch=2):
    torch.manual_seed(1)
    mask = torch.arange(23) < torch.tensor(LENGTHS[-batch:])[:, None]
    return {
        "hidden_states": torch.randn(batch, 63, 64, dtype=torch.float64),
        "timestep": torch.tensor([0.3, 0.9], dtype=torch.float64)[:batch],
        "encoder_hidden_states": torch.randn(batch, 23, 24, dtype=torch.float64),
        "pooled_projections": torch.randn(batch, 12, dtype=torch.float64),
        "img_ids": flow.image_ids(14, 18),
        "txt_ids": torch.zeros(23, 3),
        "text_mask": mask,
    }


def step(transformer, given):
    transformer.zero_grad(set_to_none=True)
    hidden = given["hidden_states"].clone().requires_grad_()
    if transformer.router is not None:
        transformer.router.generator.manual_seed(3)
    output = transformer(**{**given, "hidden_states": hidden}, return_dict=False)[0]
    torch.manual_seed(2)
    output.backward(torch.randn_like(output))
    grads = {n: p.grad.clone() for n, p in transformer.named_parameters() if p.requires_grad}
    return {"output": output.detach(), "input": hidden.grad, **grads}


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        # fp64, but for the sinusoids of positions and timesteps in fp32, which both have
        torch.testing.assert_close(one[name], other[name], rtol=1e-7, atol=1e-9, msg=name)


ROUTES = [{"selection_ratio": 0.4, "start_layer_idx": 1, "end_layer_idx": 2}]


@pytest.mark.parametrize("routes", [None, ROUTES], ids=["whole", "routed"])
@pytest.mark.parametrize("policy", POLICIES)
def test_padding_of_any_kind_changes_nothing(policy, routes):
    """What stands at padding reaches no prediction and no gradient."""
    transformer = model().train()
    transformer.set_recompute(policy)
    transformer.set_routes(routes)
    given = inputs()
    first = step(transformer, given)
    other = dict(given)
    noise = torch.randn_like(given["encoder_hidden_states"]) * 100
    other["encoder_hidden_states"] = torch.where(
        given["text_mask"][..., None], given["encoder_hidden_states"], noise
    )
    same(first, step(transformer, other))
    unmasked = step(transformer, {**given, "text_mask": None})
    assert (unmasked["output"] - first["output"]).abs().max() > 1e-3


@pytest.mark.parametrize("routes", [None, ROUTES], ids=["whole", "routed"])
def test_a_text_that_is_cut_is_one_that_is_masked(routes):
    """To the longest caption, exactly and rounded up, and alone without a mask."""
    transformer = model().train()
    transformer.set_routes(routes)
    given = inputs()
    whole = step(transformer, given)
    for multiple, length in ((1, 11), (8, 16), (64, 23)):
        text, mask = flow.cut_text(given["encoder_hidden_states"], given["text_mask"], multiple)
        assert text.shape[1] == mask.shape[1] == length
        cut = {
            "encoder_hidden_states": text, "text_mask": mask, "txt_ids": given["txt_ids"][:length],
        }  # fmt: skip
        same(whole, step(transformer, {**given, **cut}))
    alone = inputs(batch=1)
    text, mask = flow.cut_text(alone["encoder_hidden_states"], alone["text_mask"])
    assert mask is None and text.shape[1] == LENGTHS[-1]
    cut = {"encoder_hidden_states": text, "text_mask": None, "txt_ids": alone["txt_ids"][:11]}
    same(step(transformer, alone), step(transformer, {**alone, **cut}))


def test_the_mask_is_diffusers_own():
    """Its class adds a mask of 0 and -inf to the scores; whole, with ones for the image."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    ours = FluxTransformer(**TINY).double()
    theirs = FluxTransformer2DModel(**TINY).double()
    theirs.load_state_dict(ours.state_dict())
    given = inputs()
    mask = joint_mask(given.pop("text_mask"), 63)
    assert mask.shape == (2, 1, 1, 23 + 63) and mask[:, ..., 23:].all()
    with torch.no_grad():
        one = ours(**given, text_mask=mask[:, 0, 0, :23], return_dict=False)[0]
        other = theirs(**given, joint_attention_kwargs={"attention_mask": mask}, return_dict=False)[
            0
        ]
    torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)


def test_an_empty_caption_leaves_one_token():
    text, mask = torch.randn(1, 7, 3), torch.zeros(1, 7, dtype=torch.bool)
    cut, left = flow.cut_text(text, mask)
    assert cut.shape == (1, 1, 3) and not left.any()
