"""The options that fluxfast implements, under SimpleTuner's names: type, range, default, meaning.

A new option is a field here. `option` says what else the loader, the notes and a resumed run need
to know of it. Sizes in pixels or megapixels follow resolution_type; steps are optimiser steps
unless a field says otherwise.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from fluxfast.config.adapters import LORA_TYPES, LoraFormat
from fluxfast.config.compute_fields import ComputeFields
from fluxfast.config.evaluation_fields import EvaluationFields
from fluxfast.config.flavours import FLAVOURS
from fluxfast.config.hub_fields import HubFields
from fluxfast.config.lycoris import LycorisConfig
from fluxfast.config.optimizers import optimizer_options
from fluxfast.config.option import option
from fluxfast.config.reporting_fields import ReportingFields
from fluxfast.config.settings import Settings, Utf8Path, named_in
from fluxfast.config.validation_fields import ValidationFields

Precision = Literal[
    "no_change", "int8-quanto", "int8-torchao", "int4-quanto", "int2-quanto", "nf4-bnb",
    "fp8-quanto", "fp8-torchao",
]  # fmt: skip
LoraTarget = Literal[
    "mmdit", "context", "context+ffs", "all", "all+ffs", "ai-toolkit", "tiny", "nano",
    "all+ffs+embedder", "all+ffs+embedder+controlnet",
]  # fmt: skip
Scheduler = Literal[
    "constant", "constant_with_warmup", "linear", "polynomial", "sine", "cosine",
    "cosine_with_restarts",
]  # fmt: skip

# switches that several options are only read with
_ASSISTANT = "assistant_lora_path or model_flavour=schnell"
# a budget of VRAM may turn streaming on
_STREAMING = "enable_group_offload or vram_budget"


class TreadRoute(Settings):
    """A range of blocks that a part of the image tokens skips."""

    selection_ratio: float = Field(ge=0, lt=1)
    """Part of the image tokens to drop."""
    start_layer_idx: int
    """First block that sees fewer tokens: from 0 through both kinds; below 0, from the last."""
    end_layer_idx: int
    """Last such block."""


class TreadConfig(Settings):
    """TREAD's routes, in order."""

    routes: tuple[TreadRoute, ...] = Field(min_length=1)
    """The ranges; they may not overlap."""


class TrainFields(ComputeFields, ValidationFields, EvaluationFields, ReportingFields, HubFields):
    """What a config file can say, each value valid by itself."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    # the model
    model_type: Literal["lora"] = option(on_resume="ignored")
    """What is trained."""
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
    """Storage format of the frozen transformer."""
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

    # the LoRA
    assistant_lora_path: str | None = option(None, on_resume="told")
    """Frozen LoRA beside the one that is trained (unset: the flavour's, which schnell has)."""
    assistant_lora_strength: float = option(1.0, gt=0, only_with=_ASSISTANT)
    """What the assistant LoRA's output is multiplied with in training."""
    assistant_lora_inference_strength: float = option(
        0.0, ge=0, only_with=_ASSISTANT, on_resume="ignored"
    )
    """The same at validation."""
    disable_assistant_lora: bool = False
    """Train without an assistant LoRA."""
    lora_type: Annotated[str, named_in(lambda: LORA_TYPES)] = "standard"
    """Kind of adapter; standard is PEFT's LoRA, lycoris what lycoris_config says."""
    lycoris_config: LycorisConfig | None = option(
        "config/lycoris_config.json", only_with="lora_type=lycoris", validate_default=True
    )
    """JSON file of the LyCORIS algorithms and their targets."""
    init_lokr_norm: float | None = option(
        None, gt=0, only_with="lora_type=lycoris", on_resume="start_only"
    )
    """Start LoKrs at this fraction of values like the base's (unset: at zero)."""
    validation_lycoris_strength: float = option(
        1.0, only_with=("lora_type=lycoris", "validation_disable=false"), on_resume="ignored"
    )
    """Factor of LyCORIS adapters while validation images are drawn."""
    lora_rank: int = option(16, ge=1, on_resume="elsewhere")
    """Rank of the LoRA's matrices."""
    lora_alpha: float | None = option(None, gt=0, on_resume="elsewhere")
    """The LoRA's scale is alpha / rank (unset: alpha is the rank)."""
    lora_dropout: float = Field(0.1, ge=0, lt=1)
    """Probability of dropping an input of the LoRA."""
    lora_init_type: Literal["default", "gaussian", "loftq", "olora", "pissa"] = option(
        "default", on_resume="start_only"
    )
    """How the LoRA's matrices start; loftq corrects a quantised base, in any of its formats."""
    loftq_iterations: int = option(
        1, ge=1, only_with="lora_init_type=loftq", on_resume="start_only", ours=True
    )
    """How often loftq quantises: after the first time with the LoRA taken out of the base."""
    use_dora: bool = option(False, only_with="lora_type=standard", on_resume="elsewhere")
    """Train a magnitude for each row of the weights beside the LoRA (DoRA)."""
    init_lora: str | None = option(None, on_resume="start_only")
    """LoRA file, folder or repository to continue from."""
    lora_format: LoraFormat = option("diffusers", on_resume="ignored")
    """Key layout of the saved LoRA; `adapters/styles.py` says which programs read which."""
    flux_lora_target: LoraTarget = option("all", on_resume="elsewhere")
    """Preset of the modules that get a LoRA."""
    peft_lora_target_modules: tuple[str, ...] | None = option(
        None, min_length=1, on_resume="elsewhere"
    )
    """Module name suffixes in place of the preset: a list, or a JSON file that holds one."""

    # the run
    output_dir: Utf8Path = option(Path("simpletuner-results"), on_resume="ignored")
    """Folder for checkpoints, images, logs and the LoRA."""
    cache_dir: Utf8Path = option(
        default_factory=lambda settled: settled["output_dir"] / "cache", on_resume="ignored"
    )
    """Folder for caches that name none (unset: output_dir/cache)."""
    seed: int | None = option(None, ge=-1, lt=2**63, on_resume="elsewhere")
    """Seed of everything random (unset, 0 or -1: drawn when the run starts)."""
    resume_from_checkpoint: str = option("latest", on_resume="ignored")
    """Checkpoint folder to go on from; "latest" is the newest one, "" a fresh start."""
    max_train_steps: int | None = option(None, ge=0, on_resume="elsewhere")
    """Length of the run in optimiser steps (0 or unset: by epochs)."""
    num_train_epochs: int = option(1, ge=0, on_resume="elsewhere")
    """Length of the run in passes over the data (0: by steps)."""
    train_batch_size: int = option(4, ge=1, on_resume="refused")
    """Images per forward pass."""
    gradient_accumulation_steps: int = option(1, ge=0, on_resume="refused")
    """Forward passes per optimiser step."""
    mixed_precision: Literal["bf16", "no"] = "bf16"
    """Type of weights and activations; no is fp32."""
    compute_precision: Literal["auto", "same", "int8", "fp8"] = option("auto", ours=True)
    """Type of the blocks' products: the activations' (same), 8 bits (auto, of a quantised base)."""
    compute_outliers: int = option(0, ge=0, ours=True)
    """Channels of each product's input, the largest, that are kept out of 8 bits."""
    cuda_graphs: bool | Literal["auto"] = option("auto", on_resume="ignored", ours=True)
    """Replay forward and backward as CUDA graphs that were checked first (auto: where possible)."""
    deterministic: bool = option(False, ours=True)
    """Give the same bits on a GPU each time, so that resuming changes nothing; slower."""
    recompute: Literal["none", "selective", "full"] | None = option(
        None, on_resume="ignored", ours=True
    )
    """What blocks recompute in the backward pass (unset: as gradient_checkpointing says)."""
    gradient_checkpointing: bool = option(True, on_resume="ignored")
    """Recompute activations in the backward pass: less memory."""
    gradient_checkpointing_interval: int | None = option(
        None, ge=1, only_with="gradient_checkpointing=true", on_resume="ignored"
    )
    """Checkpoint every nth block (unset: each)."""
    modulation_ahead: bool | Literal["auto"] = option("auto", on_resume="ignored", ours=True)
    """Compute modulation a step ahead on the CPU (auto: for a GPU, unless the LoRA trains it)."""
    vram_budget: float | Literal["auto"] | None = option(None, on_resume="ignored", ours=True)
    """GiB of VRAM, or auto for all there is: recompute and streaming are chosen to fit it."""
    enable_group_offload: bool = option(False, on_resume="ignored")
    """Keep the blocks' weights in host memory and stream them to the device as they are used."""
    group_offload_type: Literal["block_level", "leaf_level"] = option(
        "block_level", only_with=_STREAMING, on_resume="ignored"
    )
    """What moves at a time: blocks either way, since leaves are the same bytes in more pieces."""
    group_offload_blocks_per_group: int = option(1, ge=1, only_with=_STREAMING, on_resume="ignored")
    """Blocks that move together."""
    group_offload_use_stream: bool = option(False, only_with=_STREAMING, on_resume="ignored")
    """Copy on a CUDA stream of its own, beside the computation."""
    group_offload_to_disk_path: str = option("", only_with=_STREAMING, on_resume="ignored")
    """Folder for the streamed weights ("": they are in host memory)."""
    tread_config: TreadConfig | None = None
    """Token routing: an object with "routes", a list of `TreadRoute`."""
    num_processes: int = option(1, ge=1, on_resume="ignored")
    """Training processes."""
    max_workers: int = option(32, ge=1, on_resume="ignored")
    """Threads that read images."""
    disable_tf32: bool = False
    """Compute fp32 matrix products in full fp32 on the GPU."""
    i_know_what_i_am_doing: bool = option(False, on_resume="ignored")
    """Lift the checks that say so."""

    # optimiser and learning rate
    learning_rate: float = Field(4e-7, gt=0)
    """Highest learning rate."""
    optimizer: Annotated[str, named_in(optimizer_options)] = option(
        "adamw_bf16", on_resume="refused"
    )
    """Optimiser of the LoRA's weights; its state's bytes are in `fluxfast-train plan`."""
    optimizer_config: dict[str, Any] | None = None
    """Further arguments of the optimiser's class, as "name=value,name=value" or an object."""
    prodigy_steps: int | None = option(None, ge=0, only_with="optimizer=prodigy*")
    """Step after which Prodigy's estimate of the learning rate stays (unset: it never does)."""
    optimizer_beta1: float | None = option(None, ge=0, lt=1, on_resume="elsewhere")
    """First-moment decay; goes before adam_beta1."""
    optimizer_beta2: float | None = option(None, ge=0, lt=1, on_resume="elsewhere")
    """Second-moment decay; goes before adam_beta2."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """First-moment decay."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Second-moment decay."""
    adam_weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay, per unit of learning rate."""
    adam_epsilon: float = Field(1e-8, gt=0)
    """Added to the root of the second moment (unset: the optimiser's own)."""
    lr_scheduler: Scheduler = "constant_with_warmup"
    """Course of the learning rate over the run."""
    lr_warmup_steps: int = Field(0, ge=0)
    """Optimiser steps until the highest learning rate."""
    lr_num_cycles: int = option(
        1, ge=1, only_with="lr_scheduler=cosine_with_restarts or lr_scheduler=sine"
    )
    """Waves of cosine_with_restarts or sine over the run."""
    lr_power: float = option(0.8, gt=0, only_with="lr_scheduler=polynomial")
    """Exponent of the polynomial schedule."""
    lr_end: float = option(
        4e-7, ge=0, only_with="lr_scheduler=polynomial or lr_scheduler=cosine* or lr_scheduler=sine"
    )
    """Lowest learning rate of a polynomial, cosine or sine schedule."""
    max_grad_norm: float = Field(2.0, ge=0)
    """Bound that gradients are clipped to (0: not clipped)."""
    grad_clip_method: Literal["norm", "value"] = "norm"
    """Clip the gradients' joint norm, or each value."""

    # the average of the weights
    use_ema: bool = False
    """Keep an exponential moving average of the trained weights, and save it beside them."""
    ema_decay: float = option(0.995, ge=0, lt=1, only_with="use_ema")
    """What an update keeps of the average: at most this, and less in the first steps."""
    ema_update_interval: int = option(1, ge=1, only_with="use_ema")
    """Optimiser steps between updates of the average."""
    ema_warmup_steps: int = option(0, ge=0, only_with="use_ema")
    """Steps in which the average is the weights; ema_decay holds from then on."""
    ema_device: Literal["accelerator", "cpu"] = option(
        "cpu", only_with="use_ema", on_resume="ignored"
    )
    """Where the average is kept, in fp32."""
    ema_cpu_only: bool = option(False, only_with="use_ema", on_resume="ignored")
    """Keep the average on the CPU, whatever ema_device says."""
    ema_foreach_disable: bool = option(False, only_with="use_ema", on_resume="ignored")
    """Update the average tensor by tensor, which gives the same bits."""
    ema_validation: Literal["none", "ema_only", "comparison"] = option(
        "comparison", only_with=("use_ema", "validation_disable=false"), on_resume="ignored"
    )
    """Draw validation images with the weights, with the average, or with both."""

    # objective
    loss_type: Literal["l2", "huber", "smooth_l1"] = "l2"
    """Distance between prediction and target."""
    huber_schedule: Literal["snr", "exponential", "constant"] = option(
        "snr", only_with="loss_type=huber"
    )
    """How huber's width follows the timestep."""
    huber_c: float = option(0.1, gt=0, only_with="loss_type=huber or loss_type=smooth_l1")
    """Width of the quadratic part of huber and smooth_l1."""
    flow_sigmoid_scale: float = Field(1.0, gt=0)
    """Standard deviation of the normal under the sigmoid schedule."""
    flow_schedule_shift: float = Field(0.0, ge=0)
    """Static shift k of sigma: k s / (1 + (k - 1) s) (0: none)."""
    flow_schedule_auto_shift: bool = False
    """Shift sigma by the image's resolution, as FLUX.1 does at inference."""
    flow_use_uniform_schedule: bool = False
    """Sample sigma uniformly."""
    flow_use_beta_schedule: bool = False
    """Sample sigma from a beta distribution."""
    flow_beta_schedule_alpha: float = option(2.0, gt=0, only_with="flow_use_beta_schedule")
    """First parameter of the beta distribution."""
    flow_beta_schedule_beta: float = option(2.0, gt=0, only_with="flow_use_beta_schedule")
    """Second parameter of the beta distribution."""
    flow_custom_timesteps: tuple[float, ...] | None = Field(None, min_length=1)
    """Sigmas (all up to 1) or timesteps (up to 1000): a list, or numbers between commas."""
    flow_timesteps_mode: Literal["fixed-list", "round-robin"] = option(
        "fixed-list", only_with="flow_custom_timesteps"
    )
    """Draw from the custom timesteps, or take turns."""
    flux_fast_schedule: bool = False
    """FLUX.1-schnell's schedule: mostly sigma 1, else 0.75, 0.5 or 0.25."""
    flux_guidance_mode: Literal["constant", "random-range"] = "constant"
    """Guidance that training tells the model."""
    flux_guidance_value: float = option(1.0, ge=0, only_with="flux_guidance_mode=constant")
    """Guidance in constant mode; 1 keeps the distillation."""
    flux_guidance_min: float = option(0.0, ge=0, only_with="flux_guidance_mode=random-range")
    """Lowest guidance in random-range mode."""
    flux_guidance_max: float = option(4.0, ge=0, only_with="flux_guidance_mode=random-range")
    """Highest guidance in random-range mode."""

    # data
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

    # checkpoints
    checkpoint_step_interval: int = option(
        500, ge=0, on_resume="ignored", aliases=("checkpointing_steps",)
    )
    """Optimiser steps between checkpoints (0: only at the end)."""
    checkpoint_epoch_interval: int | None = option(None, ge=0, on_resume="ignored")
    """Epochs between checkpoints."""
    checkpoints_total_limit: int = option(
        5, ge=1, on_resume="ignored", aliases=("save_total_limit",)
    )
    """Checkpoints to keep."""
