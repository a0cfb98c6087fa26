"""diffusers' FLUX.1 pipelines around a small transformer, without text encoders."""

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)

from support import SMALL, randomise

# latents have half the pixels of an image's side, and a token is two latents wide: 4 x 6 of them
HEIGHT, WIDTH = 16, 24
LATENT_CHANNELS = SMALL["in_channels"] // 4
STEPS = 3


def tiny_vae():
    torch.manual_seed(2)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=LATENT_CHANNELS,
        scaling_factor=0.36,
        shift_factor=0.12,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def tiny_transformer(extra_channels=0, **config):
    """A transformer as `from_pretrained` gives one: nothing in it is frozen."""
    channels = SMALL["in_channels"]
    given = SMALL | {"in_channels": channels + extra_channels, "out_channels": channels}
    model = FluxTransformer2DModel(**given | {"guidance_embeds": True} | config)
    randomise(model)
    return model.eval()


def picture(seed=0, channels=3):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(1, channels, HEIGHT, WIDTH, generator=g)


def mask():
    mask = torch.zeros(1, 1, HEIGHT, WIDTH)
    mask[..., 4:12, 6:20] = 1
    return mask


def embeds(seed, name=""):
    """The embeddings of a prompt, as a pipeline's arguments."""
    g = torch.Generator().manual_seed(seed)
    return {
        f"{name}prompt_embeds": torch.randn(1, 7, SMALL["joint_attention_dim"], generator=g),
        f"{name}pooled_prompt_embeds": torch.randn(1, SMALL["pooled_projection_dim"], generator=g),
    }


TRUE_CFG = {"true_cfg_scale": 2.0, **embeds(8, "negative_")}
TO_PICTURE = {"image": picture(), "strength": 0.5}
# a pipeline, how many channels its transformer has beside the latents', and its own arguments
PIPELINES = {
    "text": (FluxPipeline, 0, {}),
    "true CFG": (FluxPipeline, 0, TRUE_CFG),
    "control": (FluxControlPipeline, 16, {"control_image": picture(3)}),
    "kontext": (
        FluxKontextPipeline,
        0,
        {"image": picture(), "max_area": HEIGHT * WIDTH, "_auto_resize": False},
    ),
    "img2img": (FluxImg2ImgPipeline, 0, TO_PICTURE),
    "inpaint": (FluxInpaintPipeline, 0, {**TO_PICTURE, "mask_image": mask()}),
    # the masked image's latents, and a mask of as many pixels as a token has
    "fill": (FluxFillPipeline, 32, {"image": picture(), "mask_image": mask()}),
    "controlnet": (
        FluxControlNetPipeline,
        0,
        {"control_image": picture(3), "controlnet_conditioning_scale": 0.7},
    ),
}


def tiny_controlnet():
    model = FluxControlNetModel(
        **SMALL | {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True}
    )
    randomise(model, seed=4)
    return model.eval()


def tiny_pipeline(kind, transformer):
    """A pipeline of PIPELINES."""
    encoders = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    parts = {"controlnet": tiny_controlnet()} if kind == "controlnet" else {}
    pipe = PIPELINES[kind][0](
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(),
        transformer=transformer,
        **encoders,
        **parts,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, kind="text", **changes):
    """The latents that a pipeline ends with."""
    options = {
        "height": HEIGHT,
        "width": WIDTH,
        "num_inference_steps": STEPS,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(5),
        **embeds(7),
        **PIPELINES[kind][2],
    }
    return pipe(**options | changes).images
