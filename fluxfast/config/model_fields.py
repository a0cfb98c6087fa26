"""The options of the model: where its parts come from, and how they are stored.

They are fields of the run's config like all others (`run_fields`).
"""

from typing import Annotated, Literal

from fluxfast.config.flavours import FLAVOURS
from fluxfast.config.option import option
from fluxfast.config.settings import Settings, named_in

Precision = Literal[
    "no_change", "int8-quanto", "int8-torchao", "int4-quanto", "int2-quanto", "nf4-bnb",
    "fp8-quanto", "fp8-torchao",
]  # fmt: skip


class ModelFields(Settings):
    """What a config file can say of the model."""

    model_type: Literal["lora", "full"] = option(on_resume="elsewhere")
    """What is trained: an adapter (lora_type), or every weight of a small transformer."""
    model_family: Literal["flux"] = option(on_resume="ignored")
    """The model's architecture."""
    model_flavour: Annotated[str, named_in(lambda: FLAVOURS)] = "krea"
    """Which FLUX.1: weights to load if no path is given, and their rules."""
    pretrained_model_name_or_path: str | None = None
    """Pipeline folder or Hub repository (unset: the flavour's)."""
    pretrained_transformer_model_name_or_path: str | None = None
    """Folder, single file or repository of the transformer (unset: the pipeline's)."""
    pretrained_transformer_subfolder: str = "transformer"
    """Folder of the transformer in its repository; "none" is the root."""
    pretrained_vae_model_name_or_path: str | None = None
    """Repository of the VAE (unset: the pipeline's)."""
    pretrained_t5_model_name_or_path: str | None = None
    """Repository of the T5 text encoder (unset: the pipeline's)."""
    revision: str | None = None
    """Branch, tag or commit of pretrained_model_name_or_path."""
    variant: str | None = None
    """Variant of the weight files, such as fp16."""
    base_model_precision: Precision = option("no_change", on_resume="refused")
    """Storage format of the frozen transformer (int8, int4, int2, nf4 and fp8 will do)."""
    base_model_default_dtype: Literal["bf16", "fp32"] = "bf16"
    """Type of what a quantised base leaves unquantised."""
    text_encoder_1_precision: Precision = "no_change"
    """Storage format of CLIP."""
    text_encoder_2_precision: Precision = "no_change"
    """Storage format of T5."""
    quantize_via: Literal["cpu", "accelerator"] | None = option(None, on_resume="ignored")
    """Where weights are quantised (unset: on the accelerator if there is one)."""
    offload_during_startup: bool = option(False, on_resume="ignored")
    """Text encoders and VAE take turns on the device; here they always do."""
    vae_dtype: Literal["default", "fp32", "fp16", "bf16"] = "bf16"
    """Type that the VAE computes in on an accelerator."""
    vae_enable_tiling: bool = False
    """Encode large images tile by tile: less memory, slightly other values."""
    vae_enable_slicing: bool = option(False, on_resume="ignored")
    """Encode a batch's images one by one: less memory."""
