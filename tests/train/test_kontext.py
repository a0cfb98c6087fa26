"""FLUX.1-Kontext's training: what the model sees, beside diffusers' pipeline, and whole runs."""

import pytest
import torch
from diffusers import FluxKontextPipeline
from kill_cases import Killed, kill_at, same_files
from safetensors import safe_open
from test_trainer import BF16, FP32, TREAD

from fluxfast.model.transformer import FluxTransformer
from fluxfast.train import flow

TINY = {
    "in_channels": 64, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 24, "pooled_projection_dim": 12,
    "guidance_embeds": True, "axes_dims_rope": (4, 4, 8),
}  # fmt: skip
# fp64, but for the sinusoids of positions and timesteps, which both have in fp32
CLOSE = {"rtol": 1e-6, "atol": 2e-8}
# 9 x 7 tokens, and references of other shapes
SCENE, SIZES = (18, 14), [(18, 14), (10, 20)]


def model(dtype=torch.float64):
    torch.manual_seed(0)
    return FluxTransformer(**TINY).to(dtype).requires_grad_(False)


def inputs(sizes=SIZES, dtype=torch.float64, batch=2, text=11):
    torch.manual_seed(1)
    scene, *references = (
        flow.pack_latents(torch.randn(batch, 16, *size, dtype=dtype)) for size in (SCENE, *sizes)
    )
    return {
        "hidden_states": torch.cat([scene, *references], dim=1),
        "timestep": torch.tensor([0.3, 0.9], dtype=dtype)[:batch],
        "guidance": torch.full((batch,), 2.5, dtype=dtype),
        "encoder_hidden_states": torch.randn(batch, text, 24, dtype=dtype),
        "pooled_projections": torch.randn(batch, 12, dtype=dtype),
        "img_ids": torch.cat([flow.image_ids(*SCENE), flow.reference_ids(sizes)]),
        "txt_ids": torch.zeros(text, 3),
    }


def test_positions_of_one_reference_are_diffusers_and_of_more_lie_beside_it():
    (one,) = [flow.reference_ids([(10, 6)])]
    theirs = FluxKontextPipeline._prepare_latent_image_ids(1, 5, 3, "cpu", torch.float32)
    theirs[..., 0] = 1
    assert torch.equal(one, theirs)
    # after 10 x 6: 8 x 4 to the right would make 10 wide, below 18 high, so it goes to the right;
    # then 4 x 20 is put below, as 10 + 20 wide is more than 10 + 4 high
    ids = flow.reference_ids([(10, 6), (8, 4), (4, 20)]).split([15, 8, 20])
    assert [tuple(part[0].tolist()) for part in ids] == [(1, 0, 0), (1, 0, 3), (1, 5, 0)]
    assert tuple(ids[1][-1].tolist()) == (1, 3, 4)
    assert tuple(ids[2][-1].tolist()) == (1, 6, 9)


@pytest.mark.parametrize("sizes", [SIZES[:1], SIZES])
def test_the_prediction_is_the_scenes_part_of_the_whole(sizes):
    """Values and gradients of the inputs, in fp64, beside diffusers' class cut by hand."""
    from diffusers import FluxTransformer2DModel

    ours, given = model(), inputs(sizes)
    theirs = FluxTransformer2DModel(**TINY).double().requires_grad_(False)
    theirs.load_state_dict(ours.state_dict())
    scene = SCENE[0] * SCENE[1] // 4
    found = []
    for transformer, options in ((ours, {"scene_tokens": scene}), (theirs, {})):
        hidden = given["hidden_states"].clone().requires_grad_()
        output = transformer(**{**given, "hidden_states": hidden}, **options, return_dict=False)[0][
            :, :scene
        ]
        torch.manual_seed(2)
        output.backward(torch.randn_like(output))
        found.append((output.detach(), hidden.grad))
    assert found[0][0].shape == (2, scene, 64)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    # the references are seen
    assert found[0][1][:, scene:].abs().max() > 1e-6


def test_routes_never_drop_a_reference_and_count_the_scene_alone():
    ours, given = model(), inputs()
    scene = SCENE[0] * SCENE[1] // 4
    total = given["hidden_states"].shape[1]
    ours.set_routes([{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": 3}])
    ours.train()
    draws = ours.router.draws(2, scene, None, torch.device("cpu"), references=total - scene)
    kept = draws[1]
    assert kept.shape == (2, scene - round(scene * 0.5) + total - scene)
    behind = torch.arange(scene, total).expand(2, -1)
    assert torch.equal(kept[:, -(total - scene) :], behind)
    assert (kept[:, : -(total - scene)] < scene).all()
    # the scene's draws are those of a run without references
    ours.router.generator.manual_seed(5)
    with_references = ours.router.draws(2, scene, None, torch.device("cpu"), references=7)[1]
    ours.router.generator.manual_seed(5)
    assert torch.equal(
        with_references[:, :-7], ours.router.draws(2, scene, None, torch.device("cpu"))[1]
    )


def test_a_routed_step_is_the_blocks_on_the_tokens_that_are_left():
    """Beside diffusers' class, called with the gathered tokens and their own positions, in fp64."""
    from diffusers import FluxTransformer2DModel

    ours, given = model(), inputs()
    theirs = FluxTransformer2DModel(**TINY).double().requires_grad_(False)
    theirs.load_state_dict(ours.state_dict())
    scene = SCENE[0] * SCENE[1] // 4
    # from the first to the last block
    ours.set_routes([{"selection_ratio": 0.4, "start_layer_idx": 0, "end_layer_idx": -1}], seed=3)
    ours.train()
    hidden = given["hidden_states"].clone().requires_grad_()
    output = ours(**{**given, "hidden_states": hidden}, scene_tokens=scene, return_dict=False)[0]
    output.sum().backward()

    total = hidden.shape[1]
    ours.router.generator.manual_seed(3)
    kept = ours.router.draws(2, scene, None, torch.device("cpu"), references=total - scene)[0]
    for sample, index in enumerate(kept):
        one = {
            name: value[sample : sample + 1] for name, value in given.items() if "ids" not in name
        }
        leaf = given["hidden_states"][sample : sample + 1].clone().requires_grad_()
        part = theirs(
            **{**one, "hidden_states": leaf[:, index]}, img_ids=given["img_ids"][index],
            txt_ids=given["txt_ids"], return_dict=False,
        )[0]  # fmt: skip
        drawn = index < scene
        torch.testing.assert_close(output[sample, index[drawn]], part[0, drawn], **CLOSE)
        part[0, drawn].sum().backward()
        # what is dropped goes around the blocks, and has a gradient of its own
        torch.testing.assert_close(hidden.grad[sample, scene:], leaf.grad[0, scene:], **CLOSE)


# what SimpleTuner's page on Kontext has beside paths: int8, rank 16, one set of references a sample
DOCUMENTED = {
    "model_flavour": "kontext",
    "base_model_precision": "int8-quanto",
    "optimizer": "optimi-lion",
    "lora_rank": 16,
    "learning_rate": 1e-4,
    "conditioning_multidataset_sampling": "random",
}


@pytest.mark.parametrize(
    "mode",
    [
        DOCUMENTED,
        BF16 | TREAD | {"conditioning_multidataset_sampling": "combined"},
        FP32 | {"gradient_checkpointing": False},
        BF16 | {"base_model_precision": "nf4-bnb", "modulation_ahead": True},
        FP32 | {"enable_group_offload": True},
    ],
    ids=["documented", "bf16-tread-combined", "fp32", "nf4-ahead", "streamed"],
)
def test_a_killed_run_ends_with_the_same_bits(run, references, monkeypatch, mode):
    others = [references(), references("reference_loose", id="beside")]
    mode = {"model_flavour": "kontext", "others": others} | mode
    whole, _ = run(name="whole", **mode)
    kill_at(monkeypatch, 4)
    with pytest.raises(Killed):
        run(name="killed", **mode)
    killed, _ = run(name="killed", **mode)
    assert same_files(whole, killed)
    with safe_open(whole, "pt") as file:
        assert file.metadata()["modelspec.architecture"] == "flux-kontext/lora"


def test_regularisation_sees_the_references_too(run, references):
    mode = FP32 | {"model_flavour": "kontext", "max_train_steps": 3}
    held = {"is_regularisation_data": True}
    # the adapter begins at the base, and so does its prediction: nothing moves
    lora, _ = run(**mode, dataset=held, others=[references()])
    with safe_open(lora, "pt") as file:
        # weight decay alone moves A
        assert not any(file.get_tensor(key).any() for key in file.keys() if "lora_B" in key)  # noqa: SIM118
