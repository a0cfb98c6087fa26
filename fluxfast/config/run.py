"""A run's config: SimpleTuner's `config.json`, parsed once into a typed, validated, frozen object.

Names, types and defaults are SimpleTuner's, except that the timestep schedule has no shift,
gradients are clipped by norm, every nth block is checkpointed, and "false" means false.

`TrainFields` lists the options, `DerivedValues` adds what follows from them, `TrainConfig` checks
them against each other. `run_file` finds and reads the file, `simpletuner` and `switches` know the
keys that are no options of ours, `rules` what values do to each other.
"""

import ast
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import (
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fluxfast.config.derived import DerivedValues, read_sizes
from fluxfast.config.lycoris import read_lycoris
from fluxfast.config.optimizers import read_arguments
from fluxfast.config.option import facts_of
from fluxfast.config.rules import adjustments, conflicts
from fluxfast.config.run_file import find_config, parse_overrides, read_config
from fluxfast.config.settings import ConfigError, expand, problem_text, read_json, shown
from fluxfast.config.simpletuner import (
    canonical,
    is_off_in_other_words,
    malformed,
    means_default,
    not_yet,
    unknown,
    without_field,
)
from fluxfast.config.switches import is_refused_with_its_switch, switched_off
from fluxfast.config.switches import note as switch_note
from fluxfast.config.validation_adapters import listed_runs


class TrainConfig(DerivedValues):
    """Everything a training run is told, once options that decide others have done so."""

    _notes: tuple[str, ...] = PrivateAttr(())

    @field_validator("peft_lora_target_modules", mode="before")
    @classmethod
    def _read_targets(cls, value: Any) -> Any:
        if isinstance(value, str) and not value.lstrip().startswith("["):
            return read_json(Path(value))
        return json.loads(value) if isinstance(value, str) else value

    @field_validator("lycoris_config", mode="before")
    @classmethod
    def _read_lycoris(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("lora_type") != "lycoris":
            return None
        return read_lycoris(Path(value)) if isinstance(value, str | Path) else value

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

    @field_validator("optimizer_config", mode="before")
    @classmethod
    def _read_optimizer_config(cls, value: Any) -> Any:
        return read_arguments(value) if isinstance(value, str) else value or None

    @field_validator("validation_input", mode="before")
    @classmethod
    def _read_validation_input(cls, value: Any) -> Any:
        if isinstance(value, str) and not value.lstrip().startswith("{"):
            return read_json(Path(value)) if value else None
        return json.loads(value) if isinstance(value, str) else value or None

    @field_validator("validation_adapter_config", mode="before")
    @classmethod
    def _read_validation_adapters(cls, value: Any) -> Any:
        if isinstance(value, str) and not value.lstrip().startswith(("{", "[")):
            value = read_json(Path(value)) if value else None
        return listed_runs(json.loads(value) if isinstance(value, str) else value)

    @field_validator("eval_dataset_id", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return ([value] if value else None) if isinstance(value, str) else value or None

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
        read_sizes(value)
        return value

    @model_validator(mode="after")
    def _apply_rules(self) -> "TrainConfig":
        forced, notes = adjustments(self)
        # past the model's freeze: nobody has read these values yet
        self.__dict__.update(forced)
        self._notes = tuple(notes)
        problems = conflicts(self)
        if problems:
            raise _Conflicts(self, problems)
        return self

    @property
    def notes(self) -> tuple[str, ...]:
        """What a run prints once: values that other options decide, and keys without effect."""
        return self._notes


class _Conflicts(ValueError):
    """Values that are right by themselves and can't go together; `config` holds them."""

    def __init__(self, config: TrainConfig, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.config = config


_REQUIRED = {
    "model_type": (
        "lora",
        'set "model_type": "lora", or "full" to train every weight of a small transformer '
        "(SimpleTuner's default)",
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
    or keys and values.

    Raises:
        ConfigError: it names every key that is unknown, not implemented yet, of a wrong value or
            in conflict with another.
    """
    config, problems = check_config(find_config(path), overrides)
    if problems or config is None:
        raise ConfigError(problems)
    return config


def check_config(
    file: Path, overrides: Sequence[str] | Mapping[str, Any] = ()
) -> tuple[TrainConfig | None, list[str]]:
    """(config, problems) of a config file, for those who look for further problems.

    With problems the config is what the keys without one say, or None. ConfigError where the file
    or the overrides can't be read.
    """
    fields = TrainConfig.model_fields
    problems: list[str] = []
    given: dict[str, tuple[Any, str]] = {}
    for raw, where in (
        (read_config(file), str(file)),
        (parse_overrides(overrides), "command line"),
    ):
        expanded = expand(raw, {"model_family": "flux"}, problems, where)
        values, found = canonical(expanded, fields)
        problems += [f"{where}: {problem}" for problem in found]
        given.update({name: (value, where) for name, value in values.items()})
    # null asks for the default
    given = {name: (value, where) for name, (value, where) in given.items() if value is not None}
    found, notes = _keys_problems(given)
    problems += found
    values = {
        name: value
        for name, (value, _) in given.items()
        if name in fields and not is_off_in_other_words(name, value)
    }
    config, found = _build(values, {name: where for name, (_, where) in given.items()}, str(file))
    problems += found
    if config is not None:
        config._notes += tuple(notes)
    return config, problems


def _keys_problems(given: dict[str, tuple[Any, str]]) -> tuple[list[str], list[str]]:
    """(problems, notes) of the keys that nothing reads.

    They are unknown, not implemented, or without effect. given: by option, its value and where it
    was written.
    """
    fields = TrainConfig.model_fields
    problems, notes = [], []
    # options by the switch that is off
    unread: dict[str, list[str]] = {}
    values = {name: value for name, (value, _) in given.items()}
    for name, (value, where) in given.items():
        is_field = name in fields
        problem, note = unknown(name, fields), None
        if problem is None and not means_default(name, value, fields):
            if (switch := switched_off(name, values, fields)) is not None:
                problem = None if is_field else malformed(name, value)
                unread.setdefault(switch, []).append(name)
            elif not is_field and not is_refused_with_its_switch(name, values, fields):
                problem, note = without_field(name, value)
        problems += [f"{where}: {problem}"] if problem else []
        notes += [note] if note else []
    return problems, notes + [switch_note(switch, names) for switch, names in unread.items()]


def default_config() -> TrainConfig:
    """The config of an empty file, for commands that were given none."""
    return TrainConfig.model_validate({name: value for name, (value, _) in _REQUIRED.items()})


def _build(
    fields: dict[str, Any], origin: dict[str, str], file: str
) -> tuple[TrainConfig | None, list[str]]:
    """(config, problems), as `check_config` gives them.

    Keys of wrong values are named and put aside, so that the conflicts of the others show as well.
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
            found = details[0]["ctx"]["error"]
            problems += [
                f"{file}: {line}"
                for line in str(found).split("\n")
                if not any(f'"{name}"' in line for name in aside)
            ]
            return found.config if isinstance(found, _Conflicts) else None, problems
        # a default that is checked, as a file's name is, may be wrong too; null asks for none
        defaults = [n for n in wrong if TrainConfig.model_fields[n].validate_default]
        for name in (*(n for n in fields if n in wrong), *(n for n in defaults if n not in fields)):
            where = origin.get(name, file)
            given = fields.get(name)
            later = not_yet(name, given) if wrong[name]["type"] == "literal_error" else None
            is_secret = facts_of(TrainConfig.model_fields[name]).is_secret
            problem = problem_text(wrong[name], is_secret=is_secret)
            text = f"is {shown(given)}: {later}; " if later else problem
            if later:
                text += f"fluxfast has {wrong[name]['ctx']['expected']}"
            place = ".".join(map(str, wrong[name]["loc"]))
            problems.append(f'{where}: "{place}" {text}')
        aside |= wrong.keys()
        fields = {name: value for name, value in fields.items() if name not in wrong}
        fields |= dict.fromkeys(defaults)
