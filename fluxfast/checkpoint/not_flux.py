"""What a safetensors file holds if it is no FLUX.1 transformer, or one that can't be loaded.

The names of its tensors tell, or the config beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from fluxfast.checkpoint.keys import COMFY_PREFIX

TAKE_TRANSFORMER = "take FLUX.1's transformer, such as flux1-dev.safetensors"
TAKE_UNQUANTISED = (
    "only weights in bf16, fp16, fp32 and plain fp8 are read: take the unquantised transformer, "
    "such as flux1-dev.safetensors; it is quantised while it is read"
)

_TAKE_ADAPTER = f"name it as init_lora; as the base, {TAKE_TRANSFORMER}"
# (pattern of a tensor's name, what has such tensors, what to take); the first match decides. So
# additions to a model stand before models, and other models before ways to quantise a model
_KINDS = (
    # before LoRAs, since SVDQuant's files hold low-rank factors too
    (r".*\.qweight$", "weights quantised by SVDQuant (nunchaku), GPTQ or AWQ", TAKE_UNQUANTISED),
    (
        r"(.*[._])?(lora_(A|B|a|b|down|up|mid)\b|lora_(unet|te\d?|transformer)_|proj_lora\d?\.)|lycoris_",
        "a LoRA",
        _TAKE_ADAPTER,
    ),
    (r".*\.(hada_w\d|lokr_w\d|dora_scale|oft_blocks|diff|diff_b)\b", "an adapter", _TAKE_ADAPTER),
    (
        r"controlnet_|control_model\.|input_hint_block\.|pos_embed_input|control_(all_x_embedder|layers)",
        "a ControlNet",
        TAKE_TRANSFORMER,
    ),
    (r"(.*\.)?ip_adapter|image_proj\.", "an IP-Adapter", TAKE_TRANSFORMER),
    (r"redux_(up|down)\.", "FLUX.1 Redux, which makes embeddings of an image", TAKE_TRANSFORMER),
    (
        r"(.*\.)?text_model\.|text_projection|embeddings\.token_embedding\.",
        "a CLIP text encoder",
        TAKE_TRANSFORMER,
    ),
    (
        r"(.*\.)?(encoder|decoder)\.block\.\d+\.layer\.\d|shared\.weight$",
        "a T5 text encoder",
        TAKE_TRANSFORMER,
    ),
    (
        r"(first_stage_model\.|vae\.)?((encoder|decoder)\.(conv_in|conv_out|down|up|mid|down_blocks|up_blocks|mid_block|middle)"
        r"\.|(post_)?quant_conv\.)",
        "an autoencoder (VAE)",
        TAKE_TRANSFORMER,
    ),
    (r"double_stream_modulation_|single_stream_modulation", "FLUX.2", TAKE_TRANSFORMER),
    (r"distilled_guidance_layer\.", "Chroma", TAKE_TRANSFORMER),
    (r"joint_blocks\.|pos_embed\.proj\.", "Stable Diffusion 3", TAKE_TRANSFORMER),
    (r"(input|output|down|up)_blocks\.\d", "Stable Diffusion 1, 2 or XL", TAKE_TRANSFORMER),
    (r"(double|single)_stream_blocks\.", "HiDream", TAKE_TRANSFORMER),
    (
        r"transformer_blocks\.\d+\.img_mod\.|txt_norm\.|txt_in\.text_norm",
        "Qwen-Image",
        TAKE_TRANSFORMER,
    ),
    (
        r"txt_in\.individual_token_refiner|context_embedder\.token_refiner",
        "HunyuanVideo",
        TAKE_TRANSFORMER,
    ),
    (r"patch_embedding\.|head\.modulation|condition_embedder\.", "Wan", TAKE_TRANSFORMER),
    (r"(cap_embedder|noise_refiner|context_refiner)\.", "Lumina or Z-Image", TAKE_TRANSFORMER),
    (r"(double|single)_layers\.", "AuraFlow", TAKE_TRANSFORMER),
    (
        r"adaln_single\.|caption_projection\.|patchify_proj\.",
        "PixArt, Sana or LTX",
        TAKE_TRANSFORMER,
    ),
    (
        r".*\.(absmax|quant_map|nested_absmax|quant_state\.bitsandbytes__\w+)$",
        "weights quantised by bitsandbytes to 4 bits (nf4 or fp4)",
        TAKE_UNQUANTISED,
    ),
    (r".*\.(SCB|weight_format)$", "weights quantised by bitsandbytes to int8", TAKE_UNQUANTISED),
    (r".*\._(data|scale|shift)$", "weights quantised by optimum-quanto", TAKE_UNQUANTISED),
    (r".*[._:](qdata|int_data|tensor_impl)$", "weights quantised by torchao", TAKE_UNQUANTISED),
    (
        r"scaled_fp8$|.*\.(scale_(weight|input)|(weight|input|output)_scale\w*|comfy_quant)$",
        "weights in 8 bits or less with scales (scaled fp8, int8)",
        TAKE_UNQUANTISED,
    ),
)
# FLUX.1 models that take more than the noisy image, by their number of input channels
_CONDITIONED = {
    384: "FLUX.1 Fill, which takes a masked image and its mask beside the noisy image",
    128: "FLUX.1 Canny, Depth or another control model, which takes a second image",
}


def why_not_flux(keys: Iterable[str]) -> str | None:
    """Why these tensors are no FLUX.1 transformer that can be loaded; None if nothing tells so.

    `keys` are the tensors' names. In a file that holds text encoders and a VAE beside its
    transformer (Comfy's prefix), only the transformer's count.
    """
    keys = sorted(keys)
    inner = [key.removeprefix(COMFY_PREFIX) for key in keys if key.startswith(COMFY_PREFIX)]
    keys = inner or keys
    for pattern, what, advice in _KINDS:
        matches = re.compile(pattern).match
        if (key := next((key for key in keys if matches(key)), None)) is not None:
            verdict = "holds" if advice is TAKE_UNQUANTISED else "not a FLUX.1 transformer but"
            return f"{verdict} {what} (tensor {key}): {advice}"
    return None


def why_not_config(config: Mapping[str, Any]) -> str | None:
    """Why a config.json does not describe a transformer that can be loaded; None if it may."""
    if (name := config.get("_class_name", "FluxTransformer2DModel")) != "FluxTransformer2DModel":
        return f"describes {name}, expected FluxTransformer2DModel: {TAKE_TRANSFORMER}"
    quantised = config.get("quantization_config")
    if isinstance(quantised, Mapping) and quantised.get("quant_method") != "fluxfast":
        return (
            f"its weights are quantised by {quantised.get('quant_method', 'another program')}: "
            f"{TAKE_UNQUANTISED}"
        )
    return None


def why_not_channels(found: int, expected: int) -> str | None:
    """Why a transformer with `found` input channels can't be trained, None if it can.

    `expected` is the number of channels that the run's latents give.
    """
    if found == expected:
        return None
    kind = _CONDITIONED.get(
        found, "a kind of FLUX.1 that takes something else than the noisy image"
    )
    return (
        f"{found} input channels: {kind}. It is not trained here: take flux1-dev.safetensors "
        f"({expected} channels)"
    )
