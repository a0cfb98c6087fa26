"""The options that fluxfast implements, under SimpleTuner's names: type, range, default, meaning.

A new option is a field here, or of one of the classes that `TrainFields` is made of, each of which
is a section of docs/options.md. `option` says what else the loader, the notes and a resumed run
need to know of it. Sizes in pixels or megapixels follow resolution_type; steps are optimiser steps
unless a field says otherwise.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from fluxfast.config.adapter_fields import AdapterFields
from fluxfast.config.cache_folders import default_cache
from fluxfast.config.compute_fields import ComputeFields
from fluxfast.config.data_fields import DataFields
from fluxfast.config.evaluation_fields import EvaluationFields
from fluxfast.config.hub_fields import HubFields
from fluxfast.config.model_fields import ModelFields
from fluxfast.config.objective_fields import ObjectiveFields
from fluxfast.config.optimizers import OptimizerImpl, optimizer_options
from fluxfast.config.option import option
from fluxfast.config.reporting_fields import ReportingFields
from fluxfast.config.settings import Settings, Utf8Path, named_in
from fluxfast.config.validation_fields import ValidationFields

Scheduler = Literal[
    "constant", "constant_with_warmup", "linear", "polynomial", "sine", "cosine",
    "cosine_with_restarts",
]  # fmt: skip

# several options are only read with it; a budget of VRAM may turn streaming on
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


class TrainFields(
    ModelFields,
    AdapterFields,
    ComputeFields,
    ObjectiveFields,
    DataFields,
    ValidationFields,
    EvaluationFields,
    ReportingFields,
    HubFields,
):
    """What a config file can say, each value valid by itself."""

    # the run
    output_dir: Utf8Path = option(Path("simpletuner-results"), on_resume="ignored")
    """Folder for checkpoints, images, logs and the LoRA."""
    cache_dir: Utf8Path = option(
        default_factory=lambda settled: default_cache(settled["output_dir"]), on_resume="ignored"
    )
    """Folder for caches that name none (unset: $XDG_CACHE_HOME/fluxfast, for all runs)."""
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
    """GiB of VRAM, or auto for all that is free: recompute and streaming are chosen to fit it."""
    vram_reserve: float | None = option(
        None, ge=0, only_with="vram_budget=auto", on_resume="ignored", ours=True
    )
    """GiB that vram_budget auto leaves free (unset: 1 on a card for screens, else 0.25)."""
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
    optimizer_impl: OptimizerImpl = option("auto", ours=True)
    """Whose version of the optimiser: `fluxfast`'s fused one, the `package`'s, or `auto`."""
    optimizer_config: dict[str, Any] | None = None
    """Further arguments of the optimiser's class, as "name=value,name=value" or an object."""
    optimizer_release_gradients: bool = option(False, only_with="optimizer=optimi-*")
    """Update each weight within backward and free its gradient: no clipping, no accumulation."""
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
    init_lora_ema: str | None = option(None, only_with="use_ema", on_resume="start_only")
    """LoRA (file, folder, repository) that the average starts as (unset: as the weights)."""
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
