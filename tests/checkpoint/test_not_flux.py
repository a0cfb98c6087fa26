"""Whole safetensors files that are no base are refused by what they hold, with what to take."""

import pytest
import torch
from checkpoint_cases import bfl_model
from safetensors.torch import save_file

from fluxfast import FluxTransformer
from fluxfast.checkpoint.keys import COMFY_PREFIX
from fluxfast.checkpoint.not_flux import why_not_flux
from fluxfast.checkpoint.opening import open_checkpoint
from fluxfast.checkpoint.reader import CheckpointError

UNQUANTISED = "take the unquantised transformer, such as flux1-dev.safetensors"


@pytest.fixture(scope="module")
def states():
    """The names of a whole transformer, by style."""
    with torch.device("meta"):
        bfl = bfl_model().state_dict()
        ours = FluxTransformer(
            **{"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True}
        ).state_dict()
    return {
        "bfl": [*bfl],
        "comfy": [COMFY_PREFIX + key for key in bfl],
        "diffusers": [*ours],
    }


def test_transformers_pass(states):
    for keys in states.values():
        assert why_not_flux(keys) is None
    parts = [
        "text_encoders.t5xxl.transformer.scaled_fp8",
        "text_encoders.clip_l.text_model.x",
        "vae.decoder.conv_in.x",
    ]
    assert why_not_flux([*states["comfy"], *parts]) is None


@pytest.mark.parametrize("style", ["bfl", "comfy", "diffusers"])
@pytest.mark.parametrize(
    ("endings", "message"),
    [
        ([".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4"], "bitsandbytes to 4 bits"),
        ([".quant_state.bitsandbytes__fp4"], "bitsandbytes to 4 bits"),
        ([".SCB"], "bitsandbytes to int8"),
        (["._data", "._scale"], "optimum-quanto"),
        (["_qdata", "_scale"], "torchao"),
        (["_scale"], "with scales"),
        (["_scale_inv"], "with scales"),
        (["_scale_2"], "with scales"),
    ],
)
def test_quantised_by_others(states, style, endings, message):
    weights = [key for key in states[style] if key.endswith(".weight")]
    keys = [*states[style], *(key + ending for key in weights for ending in endings)]
    why = why_not_flux(keys)
    assert message in why and UNQUANTISED in why


@pytest.mark.parametrize("suffix", ["scale_weight", "scale_input", "input_scale", "comfy_quant"])
def test_scales_beside_the_weights(states, suffix):
    for keys in states.values():
        scales = [key.removesuffix("weight") + suffix for key in keys if key.endswith(".weight")]
        assert "with scales" in why_not_flux([*keys, *scales])
    assert "with scales" in why_not_flux([*states["bfl"], "scaled_fp8"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            ["transformer_blocks.0.qkv_proj.qweight", "transformer_blocks.0.qkv_proj.wscales"],
            "weights quantised by SVDQuant",
        ),
        (
            ["transformer_blocks.0.mlp_fc1.qweight", "transformer_blocks.0.mlp_fc1.lora_down"],
            "weights quantised by SVDQuant",
        ),
        (["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"], "a LoRA .*init_lora"),
        (
            ["double_blocks.0.img_attn.qkv.lora_B.weight", "double_blocks.0.norm.key_norm.scale"],
            "a LoRA",
        ),
        (["lora_unet_double_blocks_0_img_attn_proj.lora_down.weight"], "a LoRA"),
        (["double_blocks.0.processor.proj_lora1.down.weight"], "a LoRA"),
        (["lycoris_transformer_blocks_0_attn_to_q.lokr_w1"], "a LoRA"),
        (["diffusion_model.double_blocks.0.img_attn.qkv.hada_w1_a", "x.hada_w1"], "an adapter"),
        (["controlnet_blocks.0.weight", "transformer_blocks.0.attn.to_q.weight"], "a ControlNet"),
        (["double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"], "an IP-Adapter"),
        (["redux_up.weight", "redux_down.weight"], "FLUX.1 Redux"),
        (["text_model.encoder.layers.0.mlp.fc1.weight"], "a CLIP text encoder"),
        (
            ["embeddings.token_embedding.weight", "encoder.layers.0.mlp.fc1.weight"],
            "a CLIP text encoder",
        ),
        (["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"], "a T5 text encoder"),
        (["decoder.up.0.block.0.conv1.weight", "encoder.conv_in.weight"], "an autoencoder"),
        (["decoder.up_blocks.0.resnets.0.conv1.weight"], "an autoencoder"),
        (
            ["double_blocks.0.img_attn.qkv.weight", "double_stream_modulation_img.lin.weight"],
            "FLUX.2",
        ),
        (
            ["transformer_blocks.0.attn.to_q.weight", "single_stream_modulation.linear.weight"],
            "FLUX.2",
        ),
        (
            ["double_blocks.0.img_attn.qkv.weight", "distilled_guidance_layer.in_proj.weight"],
            "Chroma",
        ),
        (
            ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "first_stage_model.x"],
            "Stable Diffusion 3",
        ),
        (
            ["transformer_blocks.0.attn.add_q_proj.weight", "pos_embed.proj.weight"],
            "Stable Diffusion 3",
        ),
        (
            ["model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.x"],
            "Stable Diffusion 1, 2 or XL",
        ),
        (["down_blocks.0.resnets.0.conv1.weight"], "Stable Diffusion 1, 2 or XL"),
        (["double_stream_blocks.0.block.adaLN_modulation.1.bias"], "HiDream"),
        (["transformer_blocks.0.img_mod.1.weight"], "Qwen-Image"),
        (
            [
                "double_blocks.0.img_attn_qkv.weight",
                "txt_in.individual_token_refiner.blocks.0.norm1.weight",
            ],
            "HunyuanVideo",
        ),
        (["blocks.0.self_attn.q.weight", "patch_embedding.weight"], "Wan"),
        (["layers.0.attention.qkv.weight", "cap_embedder.0.weight"], "Lumina or Z-Image"),
    ],
)
def test_other_models(tmp_path, keys, message):
    path = tmp_path / "base.sft"
    save_file({key: torch.zeros(1) for key in keys}, path)
    with pytest.raises(
        CheckpointError, match=rf"base\.sft: .*{message}.* take .*flux1-dev\.safetensors"
    ):
        open_checkpoint(path)


def test_anything_else(tmp_path):
    save_file({"blocks.0.weight": torch.zeros(1)}, tmp_path / "base.sft")
    with pytest.raises(
        CheckpointError,
        match=r"not a FLUX.1 transformer: .*found blocks\.0\.weight; take .*flux1-dev",
    ):
        open_checkpoint(tmp_path / "base.sft")
    save_file({}, tmp_path / "none.sft")
    with pytest.raises(CheckpointError, match="found no tensor at all"):
        open_checkpoint(tmp_path / "none.sft")
