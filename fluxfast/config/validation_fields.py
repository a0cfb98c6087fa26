"""The options of a run's validation images, under SimpleTuner's names.

They are fields of the run's config like all others (`run_fields`).
"""

from pathlib import Path
from typing import Literal

from fluxfast.config.option import option
from fluxfast.config.settings import Settings
from fluxfast.config.validation_adapters import ValidationAdapterRun

# switches that these options are only read with
VALIDATION = "validation_disable=false"
_REFERENCES = "model_flavour=kontext"


class ValidationFields(Settings):
    """What a config file can say of validation."""

    validation_disable: bool = option(False, on_resume="ignored")
    """Draw no validation images."""
    validation_step_interval: int = option(
        100, ge=0, only_with=VALIDATION, on_resume="ignored", aliases=("validation_steps",)
    )
    """Optimiser steps between validations (0: only at the ends)."""
    validation_epoch_interval: int | None = option(
        None, ge=0, only_with=VALIDATION, on_resume="ignored"
    )
    """Epochs between validations, beside validation_step_interval."""
    validate_after_step: int | None = option(None, ge=0, only_with=VALIDATION, on_resume="ignored")
    """Draw nothing at an interval before this step."""
    validate_after_epoch: int | None = option(None, ge=0, only_with=VALIDATION, on_resume="ignored")
    """Draw nothing at an interval before the end of this epoch."""
    validation_on_startup: bool = option(False, only_with=VALIDATION, on_resume="ignored")
    """Draw validation images before a resumed run goes on."""
    validation_prompt: str | None = option(None, only_with=VALIDATION, on_resume="ignored")
    """Prompt to draw."""
    user_prompt_library: Path | None = option(None, only_with=VALIDATION, on_resume="ignored")
    """JSON file of further prompts by nickname."""
    validation_prompt_library: bool = option(False, only_with=VALIDATION, on_resume="ignored")
    """Draw SimpleTuner's own prompts as well."""
    validation_negative_prompt: str = option(
        "blurry, cropped, ugly",
        only_with=(VALIDATION, "validation_guidance_real"),
        on_resume="ignored",
    )
    """Negative prompt, used if validation_guidance_real is above 1."""
    validation_input: dict[str, str | list[str]] | None = option(
        None, only_with=(VALIDATION, _REFERENCES), on_resume="ignored"
    )
    """Reference images of prompts by nickname: {"nickname": "file.png"}, or a JSON file of that."""
    validation_using_datasets: bool | None = option(
        None, only_with=(VALIDATION, _REFERENCES), on_resume="ignored"
    )
    """Draw with the references of some samples of the datasets too (unset: yes)."""
    eval_dataset_id: tuple[str, ...] | None = option(
        None, only_with=(VALIDATION, _REFERENCES), on_resume="ignored"
    )
    """The datasets whose samples those are, one or a list (unset: all)."""
    validation_stitch_input_location: Literal["left", "right"] = option(
        "left", only_with=(VALIDATION, _REFERENCES), on_resume="ignored"
    )
    """Where references stand beside the image that was drawn with them."""
    validation_adapter_path: str | None = option(None, only_with=VALIDATION, on_resume="ignored")
    """A LoRA to draw with beside the trained one: file, folder, repository, or repository:file."""
    validation_adapter_name: str | None = option(
        None, only_with=(VALIDATION, "validation_adapter_path"), on_resume="ignored"
    )
    """What the images drawn with validation_adapter_path are called by."""
    validation_adapter_strength: float = option(
        1.0, gt=0, only_with=(VALIDATION, "validation_adapter_path"), on_resume="ignored"
    )
    """What the output of validation_adapter_path's LoRA is multiplied with."""
    validation_adapter_config: tuple[ValidationAdapterRun, ...] | None = option(
        None, only_with=VALIDATION, on_resume="ignored"
    )
    """Several such LoRAs in turn: a list of {"label", "path", "strength"}, or a JSON file of it."""
    validation_adapter_mode: Literal["adapter_only", "comparison", "none"] = option(
        "adapter_only",
        only_with=(VALIDATION, "validation_adapter_path or validation_adapter_config"),
        on_resume="ignored",
    )
    """Draw with those LoRAs only, or without them too (comparison), or without them (none)."""
    validation_resolution: str = option("256", only_with=VALIDATION, on_resume="ignored")
    """Sizes to draw in pixels, between commas: "1024x1024,1280x768" or "512"."""
    validation_guidance: float = option(7.5, ge=0, only_with=VALIDATION, on_resume="ignored")
    """Guidance that validation tells the model."""
    validation_guidance_real: float = option(1.0, ge=0, only_with=VALIDATION, on_resume="ignored")
    """Classifier-free guidance; above 1 it takes a second pass a step."""
    validation_no_cfg_until_timestep: int = option(
        2, ge=0, only_with=(VALIDATION, "validation_guidance_real"), on_resume="ignored"
    )
    """Denoising steps before classifier-free guidance begins."""
    validation_num_inference_steps: int = option(
        30, ge=1, only_with=VALIDATION, on_resume="ignored"
    )
    """Denoising steps per image."""
    validation_preview: bool = option(False, only_with=VALIDATION, on_resume="ignored")
    """Show images as they are drawn: to webhooks, and in preview_NICKNAME.png."""
    validation_preview_steps: int = option(
        1, ge=1, only_with=(VALIDATION, "validation_preview"), on_resume="ignored"
    )
    """Denoising steps between previews; the first step has one in any case."""
    validation_preview_model: str = option(
        "madebyollin/taef1",
        only_with=(VALIDATION, "validation_preview"),
        on_resume="ignored",
        ours=True,
    )
    """Folder or Hub repository of the Tiny AutoEncoder that decodes previews."""
    validation_seed: int | None = option(
        None, ge=0, lt=2**63, only_with=VALIDATION, on_resume="ignored"
    )
    """Seed of each image (unset: the run's seed)."""
    validation_randomize: bool = option(False, only_with=VALIDATION, on_resume="ignored")
    """Draw other noise in each validation; images are not the same scene then."""
    validation_image_format: Literal["png", "webp", "jpeg"] = option(
        "png", only_with=VALIDATION, on_resume="ignored"
    )
    """Format of the image files; png loses nothing."""
    validation_image_quality: int = option(
        90,
        ge=1,
        le=100,
        only_with=(VALIDATION, "validation_image_format=webp or validation_image_format=jpeg"),
        on_resume="ignored",
    )
    """Quality of webp and jpeg files."""
    num_validation_images: int = option(1, ge=1, only_with=VALIDATION, on_resume="ignored")
    """Images per prompt and size."""
    disable_benchmark: bool = option(False, only_with=VALIDATION, on_resume="ignored")
    """Don't draw the base model's images at step 0."""
