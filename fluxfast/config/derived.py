"""What follows from a run's options: values that no file says, but that the run reads."""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fluxfast.config.adapters import DORA, FULL
from fluxfast.config.dataset_fields import DatasetDefaults
from fluxfast.config.flavours import FLAVOURS, Flavour
from fluxfast.config.optimizers import OPTIMIZERS, FusedVersion, OptimizerKind
from fluxfast.config.run_fields import TrainFields
from fluxfast.config.settings import shown
from fluxfast.config.validation_adapters import ValidationAdapterRun

if TYPE_CHECKING:
    import torch


class ModelSource(NamedTuple):
    """Where a part of the model comes from.

    Attributes:
        path: a folder, a file or a repository on the Hub.
        subfolder: the part's folder in it; None is its root.
        revision: branch, tag or commit of a repository; None is its default branch.
    """

    path: str
    subfolder: str | None
    revision: str | None


class DerivedValues(TrainFields):
    """The options with the values that follow from them."""

    @property
    def flavour(self) -> Flavour:
        """What holds for every run on this flavour's weights."""
        return FLAVOURS[self.model_flavour]

    @property
    def optimizer_kind(self) -> OptimizerKind:
        """What is known of the optimiser before it is built."""
        return OPTIMIZERS[self.optimizer]

    @property
    def optimizer_version(self) -> FusedVersion | None:
        """Our version of the optimiser, where the run takes that. ValueError as `version`'s."""
        return self.optimizer_kind.version(self.optimizer_impl, self.optimizer_config or ())

    @property
    def optimizer_kernel(self) -> str | None:
        """The name among fluxfast's ops of the kernel that the optimiser runs on, if it has one."""
        version = self.optimizer_version
        return version.kernel if version else self.optimizer_kind.kernel

    @property
    def trains_all(self) -> bool:
        """Whether the transformer itself trains, and no adapter on it."""
        return self.model_type == "full"

    @property
    def adapter_kind(self) -> str:
        """The name of the adapter's kind in `ADAPTER_KINDS`."""
        if self.trains_all:
            return FULL
        return DORA if self.use_dora and self.lora_type == "standard" else self.lora_type

    @property
    def alpha(self) -> float:
        """The LoRA's alpha; its scale is alpha / lora_rank."""
        return float(self.lora_rank) if self.lora_alpha is None else self.lora_alpha

    @property
    def betas(self) -> tuple[float, ...]:
        """The optimiser's decay of the first and second moment, and of any others that it has."""
        beta1, beta2, *others = self.optimizer_kind.defaults.get("betas", (None, None))
        if self.optimizer_beta1 is not None and self.optimizer_beta2 is not None:
            return self.optimizer_beta1, self.optimizer_beta2, *others
        return self._given("adam_beta1", beta1), self._given("adam_beta2", beta2), *others

    @property
    def epsilon(self) -> float:
        """The optimiser's epsilon."""
        return self._given("adam_epsilon", self.optimizer_kind.defaults.get("eps"))

    @property
    def weight_decay(self) -> float:
        """The optimiser's weight decay."""
        return self._given("adam_weight_decay", self.optimizer_kind.defaults.get("weight_decay"))

    @property
    def optimizer_arguments(self) -> dict[str, Any]:
        """Keyword arguments of the optimiser: its own defaults, where the config says nothing.

        Those of `optimizer_config` come before all others.
        """
        told = {
            "betas": self.betas,
            "eps": self.epsilon,
            "weight_decay": self.weight_decay,
            # a schedule-free method warms up by itself
            "warmup_steps": self.lr_warmup_steps,
            "prodigy_steps": self.prodigy_steps or 0,
        }
        defaults = self.optimizer_kind.defaults
        arguments = {name: told.get(name, default) for name, default in defaults.items()}
        if self.releases_gradients:
            arguments["gradient_release"] = True
        return arguments | (self.optimizer_config or {})

    @property
    def scheduled_warmup(self) -> int:
        """Optimiser steps over which the schedule raises the learning rate."""
        return 0 if self.optimizer_kind.averages else self.lr_warmup_steps

    @property
    def releases_gradients(self) -> bool:
        """Whether weights are updated within backward, and gradients freed as they come."""
        return self.optimizer_release_gradients and self.optimizer.startswith("optimi-")

    @property
    def clipped_to(self) -> float:
        """The bound that gradients are clipped to; 0 where they are not."""
        return 0.0 if self.optimizer_kind.clips else self.max_grad_norm

    def _given(self, name: str, default: Any) -> Any:
        """The option's value where the config sets it; `default`, if there is one, where not."""
        if default is None or name in self.model_fields_set:
            return getattr(self, name)
        return default

    @property
    def weight_dtype_name(self) -> Literal["bf16", "fp32"]:
        """Type of the model's inputs, and of its weights where they are not quantised, by name."""
        quantised = self.base_model_precision != "no_change"
        if self.mixed_precision == "bf16":
            return "bf16"
        return "bf16" if quantised and self.base_model_default_dtype == "bf16" else "fp32"

    @property
    def weight_dtype(self) -> "torch.dtype":
        """Type of the model's inputs, and of its weights where they are not quantised."""
        return _torch_dtype(self.weight_dtype_name)

    @property
    def base_dtype(self) -> "torch.dtype":
        """Type of the transformer's weights that are not quantised."""
        if self.trains_all:
            return self.adapter_dtype
        if self.base_model_precision == "no_change":
            return self.weight_dtype
        return _torch_dtype(self.base_model_default_dtype)

    @property
    def adapter_dtype(self) -> "torch.dtype":
        """Type of the weights that are trained."""
        return _torch_dtype(self.optimizer_kind.weights)

    @property
    def autocast_dtype(self) -> "torch.dtype | None":
        """Type of the products of weights that train in a wider one; None: in their own."""
        if self.trains_all and self.adapter_dtype.itemsize > self.weight_dtype.itemsize:
            return self.weight_dtype
        return None

    @property
    def average_is_on(self) -> Literal["device", "host"] | None:
        """Where the moving average of the weights is kept; None: there is none."""
        if not self.use_ema:
            return None
        return "device" if self.ema_device == "accelerator" and not self.ema_cpu_only else "host"

    @property
    def assistant_lora(self) -> str | None:
        """The frozen LoRA that the run has beside its own; None: there is none."""
        if self.disable_assistant_lora:
            return None
        return self.assistant_lora_path or self.flavour.assistant_lora

    @property
    def draws_with_datasets(self) -> bool:
        """Whether validation draws with the references of samples of the datasets."""
        return self.flavour.takes_references and self.validation_using_datasets is not False

    @property
    def combines_references(self) -> bool:
        """Whether a batch has all references of its images, not those of one dataset."""
        return self.conditioning_multidataset_sampling == "combined"

    @property
    def schedule(self) -> Literal["sigmoid", "uniform", "beta", "fast", "custom"]:
        """How sigma is sampled."""
        if self.flow_custom_timesteps is not None:
            return "custom"
        if self.flow_use_uniform_schedule:
            return "uniform"
        if self.flow_use_beta_schedule:
            return "beta"
        return "fast" if self.flux_fast_schedule else "sigmoid"

    @property
    def schedule_text(self) -> str:
        """The schedule and its shift in a few words."""
        if self.schedule in ("fast", "custom"):
            return f"{self.schedule}, which no shift applies to"
        if self.flow_schedule_auto_shift:
            return f"{self.schedule}, shifted by each image's resolution"
        if self.flow_schedule_shift:
            return f"{self.schedule}, shift {self.flow_schedule_shift:g}"
        return f'{self.schedule}, no shift ("flow_schedule_shift")'

    @property
    def custom_sigmas(self) -> tuple[float, ...] | None:
        """The custom schedule's sigmas, from 0 to 1."""
        if self.flow_custom_timesteps is None or max(self.flow_custom_timesteps) <= 1:
            return self.flow_custom_timesteps
        return tuple(timestep / 1000 for timestep in self.flow_custom_timesteps)

    @property
    def validation_adapters(self) -> tuple[ValidationAdapterRun, ...]:
        """The LoRAs that validation draws with beside the trained one, in turn."""
        if self.validation_adapter_mode == "none":
            return ()
        if self.validation_adapter_path is None:
            return self.validation_adapter_config or ()
        adapter = {
            "path": self.validation_adapter_path,
            "adapter_name": self.validation_adapter_name,
            "strength": self.validation_adapter_strength,
        }
        return (ValidationAdapterRun.model_validate(adapter),)

    @property
    def validation_resolutions(self) -> list[tuple[int, int]]:
        """(width, height), in pixels, of the validation images."""
        return read_sizes(self.validation_resolution)

    @property
    def base_source(self) -> ModelSource:
        """The pipeline that whatever has no path of its own is loaded from."""
        path = self.pretrained_model_name_or_path or self.flavour.repository
        return ModelSource(path, None, self.revision)

    @property
    def transformer_source(self) -> ModelSource:
        """The transformer's weights."""
        subfolder = self.pretrained_transformer_subfolder
        return self._source(
            self.pretrained_transformer_model_name_or_path,
            None if subfolder in ("none", "") else subfolder,
        )

    @property
    def vae_source(self) -> ModelSource:
        """The VAE's weights."""
        return self._source(self.pretrained_vae_model_name_or_path, "vae")

    @property
    def t5_source(self) -> ModelSource:
        """The T5 text encoder's weights; its tokenizer is in tokenizer_2 beside them."""
        return self._source(self.pretrained_t5_model_name_or_path, "text_encoder_2")

    def _source(self, path: str | None, subfolder: str | None) -> ModelSource:
        base = self.base_source
        if path in (None, base.path):
            return base._replace(subfolder=subfolder)
        # the config's revision is one of the pipeline's repository
        return ModelSource(path or "", subfolder, None)

    @property
    def dataset_defaults(self) -> DatasetDefaults:
        """What `load_data_config` gives to datasets that don't say."""
        names = [field.name for field in dataclasses.fields(DatasetDefaults)]
        return DatasetDefaults(**{name: getattr(self, name) for name in names})


def _torch_dtype(name: Literal["bf16", "fp32"]) -> "torch.dtype":
    # imported here, so that a mistake in a config is named before torch has loaded
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def read_sizes(text: str) -> list[tuple[int, int]]:
    """(width, height) of each size in a text such as "1024x1024,512".

    ValueError where one is no size, or not a multiple of 16 pixels each way.
    """
    sizes = []
    for size in text.split(","):
        edges = size.strip().lower().split("x")
        if not 1 <= len(edges) <= 2 or not all(edge.strip().isdecimal() for edge in edges):
            raise ValueError(
                'expects sizes in pixels such as "1024x1024" or "512", between commas, not '
                f"{shown(size)}"
            )
        width, height = int(edges[0]), int(edges[-1])
        if not width or not height or width % 16 or height % 16:
            near = "x".join(str(max(16, round(edge / 16) * 16)) for edge in (width, height))
            raise ValueError(
                f"{size.strip()}: FLUX.1 draws multiples of 16 pixels; {near} is the nearest"
            )
        sizes.append((width, height))
    return sizes
