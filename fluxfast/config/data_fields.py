"""The options of the data, and what datasets have that don't say it themselves.

They are fields of the run's config like all others (`run_fields`).
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from fluxfast.config.option import option
from fluxfast.config.settings import Settings


class DataFields(Settings):
    """What a config file can say of the data."""

    data_backend_config: Path = option(on_resume="ignored")
    """The dataloader's config (multidatabackend.json)."""
    data_backend_sampling: Literal["uniform", "auto-weighting"] = "auto-weighting"
    """How the next batch's dataset is drawn: by probability, or by probability and size."""
    resolution: float = Field(1024.0, gt=0)
    """Image size in resolution_type's unit, for datasets that name none."""
    resolution_type: Literal["pixel", "area", "pixel_area"] = "pixel_area"
    """Unit of sizes: shorter edge in pixels; megapixels; pixels of the edge of an equal square."""
    minimum_image_size: float | None = Field(None, ge=0)
    """Smaller images are left out (resolution_type's unit)."""
    maximum_image_size: float | None = Field(None, ge=0)
    """Larger images are downsampled before cropping (same unit)."""
    target_downsample_size: float | None = Field(None, ge=0)
    """Size that larger images are downsampled to (same unit)."""
    max_upscale_threshold: float | None = Field(None, ge=0, le=1)
    """Most that a bucket of crop_aspect_buckets may enlarge an image by (0.2: 20 %)."""
    aspect_bucket_rounding: int = Field(2, ge=1, le=9)
    """Decimals of an aspect ratio."""
    aspect_bucket_alignment: int = option(64, ge=8, on_resume="ignored")
    """Multiple, in pixels, of a bucket's edges; always 64."""
    caption_strategy: Literal["filename", "textfile", "instanceprompt"] = "filename"
    """Where captions come from, for datasets that don't say."""
    instance_prompt: str | None = None
    """Caption of instanceprompt datasets, and what prepend_instance_prompt prepends."""
    prepend_instance_prompt: bool = False
    """Put instance_prompt before each caption."""
    only_instance_prompt: bool = False
    """Replace each caption by instance_prompt."""
    disable_multiline_split: bool = False
    """A caption file is one caption, not one a line."""
    caption_dropout_probability: float = Field(0.1, ge=0, le=1)
    """Probability of replacing a caption by the empty one."""
    conditioning_multidataset_sampling: Literal["random", "combined"] = "random"
    """Of an image's references, a batch has those of one dataset, or of all."""
    masked_loss_probability: float = Field(1.0, ge=0, le=1)
    """How often a segmentation weighs the loss; a mask always does."""
    flux_attention_masked_training: bool = False
    """Let no token attend to T5's padding (LibreFlux always)."""
    t5_padding: Literal["unmodified", "zero"] = "unmodified"
    """Keep or zero T5's outputs at padding."""
    tokenizer_max_length: int = Field(512, ge=1)
    """T5 tokens per caption; always the flavour's number."""
    vae_batch_size: int = option(4, ge=1, on_resume="ignored")
    """Images per VAE pass."""
    vae_cache_ondemand: bool = False
    """Encode images when batches first need them, for datasets that don't say."""
    vae_cache_disable: bool = False
    """Encode images whenever batches need them and keep no latents, for datasets that don't say."""
    text_encoder_batch_size: int = Field(1, ge=1)
    """Captions per text encoder pass."""
    write_batch_size: int = Field(128, ge=1)
    """No effect: the embeddings that are encoded together are written together."""
    disable_bucket_pruning: bool = False
    """Keep buckets with fewer images than a step takes."""
    allow_dataset_oversubscription: bool = False
    """Raise a dataset's repeats until each bucket fills a step."""
