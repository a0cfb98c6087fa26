"""The run's config: SimpleTuner's `config.json`, parsed once into one typed, validated, frozen
object.

Names, types and defaults are SimpleTuner's, except that the timestep schedule has no shift,
gradients are clipped by norm, every nth block is checkpointed, and "false" means false.
`config_file` finds and reads the file, `config_fields` lists the options, `options` knows the keys
that are none of them, `config_rules` what values do to each other. Only `train` and `cli` see this
object.
"""

import ast
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import PrivateAttr, ValidationError, field_validator, model_validator

from fluxfast.config.datasets import DatasetDefaults
from fluxfast.config.rules import adjustments, conflicts
from fluxfast.config.run_fields import TrainFields
from fluxfast.config.run_file import find_config, parse_overrides, read_config
from fluxfast.config.settings import ConfigError, expand, problem_text, read_json, shown
from fluxfast.config.simpletuner import (
    canonical,
    malformed,
    means_default,
    not_yet,
    unknown,
    without_field,
)
from fluxfast.config.switches import Switch, is_refused_with_its_switch, switched_off
from fluxfast.config.switches import note as switch_note

if TYPE_CHECKING:
    import torch

FLAVOURS = {
    "krea": "black-forest-labs/FLUX.1-Krea-dev",
    "dev": "black-forest-labs/FLUX.1-dev",
    "schnell": "black-forest-labs/FLUX.1-schnell",
    "fluxbooru": "terminusresearch/fluxbooru-v0.3",
}


class Source(NamedTuple):
    """Where a part of the model comes from: a folder, file or Hub repository, and the folder inside
    it (None: its root).
    """

    path: str
    subfolder: str | None
    revision: str | None


class TrainConfig(TrainFields):
    """Everything a training run is told, with what one option settles for another already settled."""

    _notes: tuple[str, ...] = PrivateAttr(())

    @field_validator("peft_lora_target_modules", mode="before")
    @classmethod
    def _read_targets(cls, value: Any) -> Any:
        if isinstance(value, str) and not value.lstrip().startswith("["):
            return read_json(Path(value))
        return json.loads(value) if isinstance(value, str) else value

    @field_validator("tread_config", mode="before")
    @classmethod
    def _read_routes(cls, value: Any) -> Any:
        if isinstance(value, str):
            try:
                # SimpleTuner writes it as Python does, a form may as JSON does
                value = ast.literal_eval(value) if value.strip() else None
            except (ValueError, SyntaxError):
                raise ValueError(f"expects an object with routes, not {shown(value)}") from None
        return value or None

    @field_validator("flow_custom_timesteps", mode="before")
    @classmethod
    def _split_timesteps(cls, value: Any) -> Any:
        return value.strip("[] ").split(",") if isinstance(value, str) else value

    @field_validator("flow_custom_timesteps")
    @classmethod
    def _check_timesteps(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value and not all(0 <= timestep <= 1000 for timestep in value):
            raise ValueError("expects sigmas from 0 to 1 or timesteps from 0 to 1000")
        return value

    @field_validator("vram_budget", mode="before")
    @classmethod
    def _read_budget(cls, value: Any) -> Any:
        try:
            if value in (None, "auto") or float(value) > 0:
                return value
        except (TypeError, ValueError):
            pass
        raise ValueError(f'expects GiB, a number above 0, or "auto", not {shown(value)}')

    @field_validator("validation_resolution")
    @classmethod
    def _check_sizes(cls, value: str) -> str:
        _sizes(value)
        return value

    @model_validator(mode="after")
    def _settle(self) -> "TrainConfig":
        forced, notes = adjustments(self)
        # behind the freeze, as other options decide these values before anyone reads them
        self.__dict__.update(forced)
        self._notes = tuple(notes)
        problems = conflicts(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def notes(self) -> tuple[str, ...]:
        """What a run prints once: values that others settled, and keys that were accepted without
        effect.
        """
        return self._notes

    @property
    def alpha(self) -> float:
        """The LoRA's alpha; its scale is alpha / lora_rank."""
        return float(self.lora_rank) if self.lora_alpha is None else self.lora_alpha

    @property
    def betas(self) -> tuple[float, float]:
        """AdamW's decay of the first and second moment."""
        if self.optimizer_beta1 is not None and self.optimizer_beta2 is not None:
            return self.optimizer_beta1, self.optimizer_beta2
        return self.adam_beta1, self.adam_beta2

    @property
    def epsilon(self) -> float:
        """AdamW's epsilon: adamw_bf16 has 1e-6 unless adam_epsilon is given."""
        if self.optimizer == "adamw_bf16" and "adam_epsilon" not in self.model_fields_set:
            return 1e-6
        return self.adam_epsilon

    @property
    def weight_dtype_name(self) -> Literal["bf16", "fp32"]:
        """Type of the model's inputs, and of its weights where they are not quantised, by name."""
        quantised = self.base_model_precision != "no_change"
        return (
            "bf16"
            if self.mixed_precision == "bf16"
            or (quantised and self.base_model_default_dtype == "bf16")
            else "fp32"
        )

    @property
    def weight_dtype(self) -> "torch.dtype":
        """Type of the model's inputs, and of its weights where they are not quantised."""
        # here, so that a mistake in a config is named before torch has loaded
        import torch

        return {"bf16": torch.bfloat16, "fp32": torch.float32}[self.weight_dtype_name]

    @property
    def base_dtype(self) -> "torch.dtype":
        """Type of the transformer's weights that are not quantised."""
        import torch

        if self.base_model_precision == "no_change":
            return self.weight_dtype
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[self.base_model_default_dtype]

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
    def custom_sigmas(self) -> tuple[float, ...] | None:
        """The custom schedule's sigmas, from 0 to 1."""
        if self.flow_custom_timesteps is None or max(self.flow_custom_timesteps) <= 1:
            return self.flow_custom_timesteps
        return tuple(timestep / 1000 for timestep in self.flow_custom_timesteps)

    @property
    def validation_resolutions(self) -> list[tuple[int, int]]:
        """(width, height), in pixels, of the validation images."""
        return _sizes(self.validation_resolution)

    @property
    def base_source(self) -> Source:
        """The pipeline that whatever has no path of its own is loaded from."""
        return Source(
            self.pretrained_model_name_or_path or FLAVOURS[self.model_flavour], None, self.revision
        )

    @property
    def transformer_source(self) -> Source:
        """The transformer's weights."""
        subfolder = (
            None
            if self.pretrained_transformer_subfolder in ("none", "")
            else self.pretrained_transformer_subfolder
        )
        return self._source(self.pretrained_transformer_model_name_or_path, subfolder)

    @property
    def vae_source(self) -> Source:
        """The VAE's weights."""
        return self._source(self.pretrained_vae_model_name_or_path, "vae")

    @property
    def t5_source(self) -> Source:
        """The T5 text encoder's weights; its tokenizer is in tokenizer_2 beside them."""
        return self._source(self.pretrained_t5_model_name_or_path, "text_encoder_2")

    def _source(self, path: str | None, subfolder: str | None) -> Source:
        base = self.base_source
        # a revision is one repository's
        return (
            base._replace(subfolder=subfolder)
            if path in (None, base.path)
            else Source(path or "", subfolder, None)
        )

    @property
    def dataset_defaults(self) -> DatasetDefaults:
        """What `load_data_config` gives to datasets that don't say."""
        return DatasetDefaults(
            **{
                field.name: getattr(self, field.name)
                for field in dataclasses.fields(DatasetDefaults)
            }
        )


def _sizes(text: str) -> list[tuple[int, int]]:
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


_REQUIRED = {
    "model_type": (
        "lora",
        'SimpleTuner\'s default is full training, fluxfast trains LoRAs: set "model_type": "lora"',
    ),
    "model_family": ("flux", 'set "model_family": "flux"'),
    "data_backend_config": (
        "unset",
        "name the dataloader's config, such as config/multidatabackend.json",
    ),
}


def load_config(
    path: str | Path | None = None, overrides: Sequence[str] | Mapping[str, Any] = ()
) -> TrainConfig:
    """The config of a run: SimpleTuner's file, with the command line's overrides in front of it.

    `path` None is looked for as `find_config` says. `overrides` are words (`--max_train_steps=10`)
    or keys and values. `ConfigError` names every key that is unknown, not implemented yet, of a
    wrong value or in conflict with another.
    """
    file = find_config(path)
    problems: list[str] = []
    given: dict[str, tuple[Any, str]] = {}
    for raw, where in (
        (read_config(file), str(file)),
        (parse_overrides(overrides), "command line"),
    ):
        values, found = canonical(expand(raw, {"model_family": "flux"}, problems, where))
        problems += [f"{where}: {problem}" for problem in found]
        given.update({name: (value, where) for name, value in values.items()})
    # null asks for the default
    given = {name: (value, where) for name, (value, where) in given.items() if value is not None}
    found, notes = _keys_problems(given)
    problems += found
    fields = {name: value for name, (value, _) in given.items() if name in TrainConfig.model_fields}
    config, found = _build(fields, {name: where for name, (_, where) in given.items()}, str(file))
    problems += found
    if problems or config is None:
        raise ConfigError(problems)
    config._notes += tuple(notes)
    return config


def _keys_problems(given: dict[str, tuple[Any, str]]) -> tuple[list[str], list[str]]:
    """(problems, notes) of the keys that nothing reads: unknown, not implemented, or without
    effect.

    given: value by option, and where it was written.
    """
    problems, notes = [], []
    unread: dict[Switch, list[str]] = {}
    values = {name: value for name, (value, _) in given.items()}
    for name, (value, where) in given.items():
        is_field = name in TrainConfig.model_fields
        problem, note = unknown(name, TrainConfig.model_fields), None
        if problem is None and not means_default(name, value):
            if (switch := switched_off(name, values)) is not None:
                problem = None if is_field else malformed(name, value)
                unread.setdefault(switch, []).append(name)
            elif not is_field and not is_refused_with_its_switch(name, values):
                problem, note = without_field(name, value)
        problems += [f"{where}: {problem}"] if problem else []
        notes += [note] if note else []
    return problems, notes + [switch_note(switch, names) for switch, names in unread.items()]


def default_config() -> TrainConfig:
    """What a config would be that says nothing, for whoever has none to read."""
    return TrainConfig.model_validate({name: value for name, (value, _) in _REQUIRED.items()})


def _build(
    fields: dict[str, Any], origin: dict[str, str], file: str
) -> tuple[TrainConfig | None, list[str]]:
    """(config, problems). Keys of wrong values are named and put aside, so that the conflicts of
    the others show as well.
    """
    problems = [
        f'{file}: "{name}" is required: {how}'
        for name, (_, how) in _REQUIRED.items()
        if name not in fields
    ]
    aside: set[str] = set()
    while True:
        stand_ins = {name: value for name, (value, _) in _REQUIRED.items() if name not in fields}
        try:
            return TrainConfig.model_validate({**stand_ins, **fields}), problems
        except ValidationError as error:
            details = error.errors(include_url=False)
        wrong = {str(detail["loc"][0]): detail for detail in reversed(details) if detail["loc"]}
        if not wrong:
            # a conflict with a key that was put aside may be none
            lines = str(details[0]["ctx"]["error"]).split("\n")
            problems += [
                f"{file}: {line}"
                for line in lines
                if not any(f'"{name}"' in line for name in aside)
            ]
            return None, problems
        for name in (name for name in fields if name in wrong):
            where = origin.get(name, file)
            later = not_yet(name, fields[name]) if wrong[name]["type"] == "literal_error" else None
            text = f"is {shown(fields[name])}: {later}; " if later else problem_text(wrong[name])
            if later:
                text += f"fluxfast has {wrong[name]['ctx']['expected']}"
            place = ".".join(map(str, wrong[name]["loc"]))
            problems.append(f'{where}: "{place}" {text}')
        aside |= wrong.keys()
        fields = {name: value for name, value in fields.items() if name not in wrong}
