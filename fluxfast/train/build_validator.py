"""Building what draws a run's validation images, as its config asks for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from fluxfast.config.attention import MECHANISMS
from fluxfast.config.datasets import DataConfig
from fluxfast.config.run import TrainConfig
from fluxfast.config.settings import ConfigError, read_json, shown
from fluxfast.data.encoders import compute_dtype
from fluxfast.data.model_folders import local_folder
from fluxfast.data.prepared import Prepared
from fluxfast.memory.wishes import Wishes
from fluxfast.model.apply import drawing_with
from fluxfast.model.compiled import CompiledRegions
from fluxfast.model.transformer import FluxTransformer
from fluxfast.text import text_problem
from fluxfast.train.edits import dataset_edits, prompt_edits
from fluxfast.train.validation import ValidationSettings, Validator

# the nickname of validation_prompt, beside those of the user's library
PRIMARY_PROMPT = "validation"
VAE_DTYPES = {
    "default": torch.bfloat16,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}


def validation_prompts(config: TrainConfig) -> dict[str, str]:
    """Nickname to prompt: validation_prompt and the user's library."""
    if config.validation_disable:
        return {}
    prompts = {PRIMARY_PROMPT: config.validation_prompt} if config.validation_prompt else {}
    if config.user_prompt_library:
        library = read_json(config.user_prompt_library)
        if not isinstance(library, dict) or not all(
            isinstance(text, str) for text in library.values()
        ):
            raise ConfigError(
                [
                    f'{config.user_prompt_library}: expected {{"nickname": "prompt", ...}}, all '
                    "of them texts"
                ]
            )
        problems = [
            f'{config.user_prompt_library}: the prompt "{nickname}" {problem}'
            for nickname, text in library.items()
            if (problem := text_problem(text))
        ]
        if PRIMARY_PROMPT in library and prompts:
            problems.append(
                f'{config.user_prompt_library}: "{PRIMARY_PROMPT}" is the nickname of '
                "validation_prompt: take another one"
            )
        if problems:
            raise ConfigError(problems)
        prompts |= library
    for name, text in [
        *prompts.items(),
        ("validation_negative_prompt", config.validation_negative_prompt),
    ]:
        if (name + text).encode(errors="replace").decode() != name + text:
            raise ConfigError(
                [
                    f"the prompt {shown(name)} holds half of a character ({ascii(text)[:100]}): "
                    "write it anew"
                ]
            )
    return prompts


def build_validator(
    config: TrainConfig,
    wishes: Wishes,
    data: DataConfig,
    prepared: Prepared,
    seed: int,
    transformer: FluxTransformer,
    scheduler: FlowMatchEulerDiscreteScheduler,
) -> Validator | None:
    """What draws a run's images; None where validation is off or has no prompt."""
    prompts = prompt_edits(config, validation_prompts(config))
    if not config.validation_disable:
        prompts |= dataset_edits(config, data, (*prepared.datasets, *prepared.held_out))
    if not prompts:
        return None
    settings = ValidationSettings(
        prompts=prompts,
        negative_prompt=config.validation_negative_prompt,
        resolutions=config.validation_resolutions,
        steps=config.validation_num_inference_steps,
        guidance=config.validation_guidance,
        guidance_real=config.validation_guidance_real,
        seed=seed if config.validation_seed is None else config.validation_seed,
        images_per_prompt=config.num_validation_images,
        beside_base=not config.disable_benchmark,
        references_at=config.validation_stitch_input_location,
        other_noise=config.validation_randomize,
        image_format=config.validation_image_format,
        quality=config.validation_image_quality,
        no_cfg_steps=config.validation_no_cfg_until_timestep,
        masked_text=config.flux_attention_masked_training,
    )

    def embeds(prompt: str) -> dict[str, Tensor]:
        tensors = prepared.prompts.get(prompt)
        return {name: tensor[None] for name, tensor in tensors.items()}

    def load_vae() -> Any:
        vae = AutoencoderKL.from_pretrained(
            local_folder(config.vae_source),
            torch_dtype=compute_dtype(transformer.device, VAE_DTYPES[config.vae_dtype]),
        )
        if config.vae_enable_tiling:
            vae.enable_tiling()
        if config.vae_enable_slicing:
            vae.enable_slicing()
        return vae.eval()

    return Validator(
        settings,
        output_dir=config.output_dir,
        transformer=transformer,
        scheduler=scheduler,
        load_vae=load_vae,
        embeds=embeds,
        dtype=config.weight_dtype,
        drawing=_drawing(wishes, transformer),
    )


def _drawing(
    wishes: Wishes, transformer: FluxTransformer
) -> Callable[[], AbstractContextManager[None]]:
    """The context in which validation images are drawn: its own attention, compiled or not."""
    compiled = None
    if wishes.draws_compiled is not None:
        # graphs of training serve here too, where something is compiled there
        compiled = transformer.compiled or CompiledRegions(wishes.draws_compiled)
    attention = MECHANISMS[wishes.mechanism].drawing
    return partial(drawing_with, transformer, attention, compiled)
